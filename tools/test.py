"""Test a detector, segmentor or classifier: ``python tools/test.py CONFIG CHECKPOINT [options]``."""

import argparse
from copy import deepcopy

from _runtime import (
    add_options,
    build_runner,
    check_data,
    fit_machine,
    is_sharded,
    read_config,
    say,
    stop,
)
from mmengine.config import ConfigDict
from mmengine.evaluator import DumpResults

import mmattn  # registers the backbones, and lets a torchvision without operators load

# How the views of --tta are merged, by task; mmseg's configs say it themselves.
TTA_MODELS = {
    'mmdet': dict(
        type='DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    ),
    'mmpretrain': dict(type='AverageClsScoreTTA'),
}


def parse_args():
    parser = argparse.ArgumentParser(description='Test a model.')
    add_options(parser)
    parser.add_argument('checkpoint', help="a file of one's own or a published one; a URL")
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to this file')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', metavar='FOLDER', help='write pictures of the predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds for each window [2]')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'argument --out must end with .pkl or .pickle, got {args.out}')
    return args


def main():
    args = parse_args()
    cfg = read_config(args)
    check_data(cfg, ['test_dataloader'])
    if args.show or args.show_dir:
        draw(cfg, args)
    if args.tta:
        augment(cfg)
    if is_sharded(cfg):  # in training; its checkpoints are as all others
        cfg.pop('strategy')
        cfg.pop('runner_type')
    fit_machine(cfg)
    runner = build_runner(cfg)
    load(runner, args.checkpoint)
    if args.tta and cfg.tta_model.type == 'DetTTAModel':
        leave_out_masks(runner.model)
    if args.out:
        runner.test_evaluator.metrics.append(dump_to(args.out, cfg.default_scope))
    runner.test()


def load(runner, checkpoint):
    """Load any format that mmattn reads; a part of the model without weights is an error."""
    try:
        report = mmattn.checkpoint.load_checkpoint(runner.model, checkpoint)
    except (mmattn.checkpoint.CheckpointError, FileNotFoundError) as error:
        stop(str(error))
    if report.fresh:
        stop(
            f'{checkpoint} ({report.format}) has no weights for {len(report.fresh)} tensors of the '
            f'model, such as {", ".join(report.fresh[:3])}; a test would take random ones'
        )
    runner.logger.info(str(report))


def draw(cfg, args):
    """Turn on the task's visualization hook, for every image; each names its options differently."""
    hook = cfg.default_hooks.visualization
    hook.update(show=args.show, wait_time=args.wait_time, interval=1)
    if cfg.default_scope == 'mmpretrain':
        hook.update(enable=True, out_dir=args.show_dir)
    else:
        hook.draw = True
        if args.show_dir and cfg.default_scope == 'mmseg':
            cfg.visualizer.save_dir = args.show_dir
        elif args.show_dir:
            hook.test_out_dir = args.show_dir


def augment(cfg):
    """Test with the config's own views, or else with each image and its mirror image."""
    if 'tta_model' not in cfg:
        cfg.tta_model = TTA_MODELS[cfg.default_scope]
    if 'segm' in cfg.test_evaluator.get('metric', ()):
        say('--tta: mmdet merges boxes alone, so masks are neither predicted nor evaluated.')
        cfg.test_evaluator.metric = 'bbox'
    dataset = cfg.test_dataloader.dataset
    if 'tta_pipeline' not in cfg:
        *steps, pack = deepcopy(dataset.pipeline)
        if 'meta_keys' in pack:
            pack.meta_keys = (*pack.meta_keys, 'flip', 'flip_direction')
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        cfg.tta_pipeline = [*steps, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def leave_out_masks(model):
    """Once loaded, let a detector's heads predict boxes alone."""
    for module in model.modules():
        if hasattr(module, 'mask_head'):
            module.mask_head = None


def dump_to(path, scope):
    if scope != 'mmdet':
        return DumpResults(out_file_path=path)
    from mmdet.evaluation import DumpDetResults  # packs masks as run lengths

    return DumpDetResults(out_file_path=path)


if __name__ == '__main__':
    main()
