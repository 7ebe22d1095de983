"""Test a detector, segmentor or classifier: ``tools/test.py CONFIG [CHECKPOINT] [options]``."""

import argparse
from copy import deepcopy

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.logging import print_log
from torch import nn

from mmattn.engine.metafile import weights_of
from mmattn.engine.runtime import (
    adapt_to_device,
    add_options,
    build_runner,
    check_data,
    is_sharded,
    load_weights,
    read_config,
    stop,
    warn,
)

# Models that merge the views of --tta, by task; mmseg's configs have their own.
TTA_MODELS = {
    'mmdet': dict(
        type='DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    ),
    'mmpretrain': dict(type='AverageClsScoreTTA'),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Test a model.')
    add_options(parser)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help="your own or a published file, or a URL [the config's load_from, or else its "
        'published weights]',
    )
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to this file')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', metavar='FOLDER', help='write pictures of the predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds for each window [2]')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'argument --out must end with .pkl or .pickle, got {args.out}')
    return args


def main() -> None:
    args = parse_args()
    cfg = read_config(args)
    check_data(cfg, ['test_dataloader'])
    checkpoint = choose_checkpoint(cfg, args)
    cfg.load_from, cfg.resume = None, False  # loaded here, by our loader
    if args.show or args.show_dir:
        draw(cfg, args)
    if args.tta:
        augment(cfg)
    if is_sharded(cfg):  # only in training; the checkpoints are ordinary
        cfg.pop('strategy')
        cfg.pop('runner_type')
    adapt_to_device(cfg)
    runner = build_runner(cfg)
    runner.logger.info(str(load_weights(runner.model, checkpoint)))
    if args.tta and cfg.tta_model.type == 'DetTTAModel':
        leave_out_masks(runner.model)
    if args.out:
        runner.test_evaluator.metrics.append(dump_to(args.out, cfg.default_scope))
    runner.test()


def choose_checkpoint(cfg: Config, args: argparse.Namespace) -> str:
    """Checkpoint to test: that of the options, of the config, or the published one; or stop."""
    if args.checkpoint:
        return args.checkpoint
    if cfg.get('load_from'):
        return cfg.load_from
    if published := weights_of(args.config):
        print_log(f'no checkpoint was given: testing the published {published}', logger='current')
        return published
    stop(f'no weights of {args.config} are published: name a checkpoint')


def draw(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the task's visualization hook for every image; its options differ by task."""
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


def augment(cfg: Config) -> None:
    """Test with the config's views, or else with each image and its mirror image."""
    if 'tta_model' not in cfg:
        cfg.tta_model = TTA_MODELS[cfg.default_scope]
    if 'segm' in cfg.test_evaluator.get('metric', ()):
        warn('--tta: mmdet merges boxes alone, so masks are neither predicted nor evaluated.')
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


def leave_out_masks(model: nn.Module) -> None:
    """Let the heads of a loaded detector predict boxes alone."""
    for module in model.modules():
        if hasattr(module, 'mask_head'):
            module.mask_head = None


def dump_to(path: str, scope: str) -> DumpResults:
    """Build the metric that writes predictions to a file."""
    if scope != 'mmdet':
        return DumpResults(out_file_path=path)
    from mmdet.evaluation import DumpDetResults  # packs masks as run lengths

    return DumpDetResults(out_file_path=path)


if __name__ == '__main__':
    main()
