"""Export a model's network to ONNX or to ``torch.export``'s format, and check what was written.

    python tools/deployment/export.py CONFIG [CHECKPOINT] OUT.onnx
    python tools/deployment/export.py CONFIG [CHECKPOINT] OUT.pt2 --shape 224 224

A classifier is exported whole, from normalized images to logits; of a detector or a segmentor the
backbone, to its feature maps. Batch, height and width stay dynamic; ``--shape`` fixes the last two.
The file needs no mmattn: it holds the operators' reference implementations. docs/export.md has the
limits.
"""

import argparse
import importlib.util
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmattn.engine.runtime import add_cfg_options, load_weights, stop

# A dynamic size must not equal a window, a patch or a number of kept keys: this one has several
# windows a side at every stage, and both sides are prime.
TRACED_BATCH, TRACED_SIZE = 2, (1031, 1291)
TRACED_SIZE_LEGACY = 97, 131  # that exporter runs the network; what it records fits any size
# Compared where sizes are dynamic: the training size, an odd one, one of another aspect ratio.
CHECKED_SIZES = ((224, 224), (97, 131), (160, 320))
CHECKED_BATCHES = (1, 2, 3)
TOLERANCE = 1e-4  # of the greatest value where that is above 1
MIN_OPSET = 11
MIN_OPSET_DYNAMO = 18  # torch's own minimum; below it the legacy exporter writes the file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', nargs='?', help='weights; random ones without it')
    parser.add_argument('out', type=Path, help='file to write, OUT.onnx or OUT.pt2; must not exist')
    parser.add_argument(
        '--shape', nargs=2, type=int, metavar=('H', 'W'), help='fix the size of the images'
    )
    parser.add_argument(
        '--backbone', action='store_true', help="export a classifier's backbone alone"
    )
    parser.add_argument(
        '--opset',
        type=int,
        default=20,
        help=f"of ONNX, from {MIN_OPSET} on; below {MIN_OPSET_DYNAMO} by torch's legacy exporter "
        '[%(default)s]',
    )
    add_cfg_options(parser)
    return parser.parse_args()


class Network(nn.Module):
    """Exported part of a model: ``images`` in, logits or a tuple of maps out."""

    def __init__(self, part: nn.Module, options: dict):
        super().__init__()
        self.part = part
        self.options = options

    def forward(self, images: Tensor) -> Any:
        return self.part(images, **self.options)


def main() -> None:
    args = parse_args()
    check(args)
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    network, names = build(cfg, args)
    network.eval().requires_grad_(False)
    legacy = args.out.suffix == '.onnx' and args.opset < MIN_OPSET_DYNAMO
    size = tuple(args.shape or (TRACED_SIZE_LEGACY if legacy else TRACED_SIZE))
    images = torch.randn(TRACED_BATCH, 3, *size)
    sides = 'x'.join(map(str, size)) if args.shape else 'any size'
    how = f" by torch's legacy exporter, opset {args.opset}" if legacy else ''
    print(f'exporting {sides}{how} ...', flush=True)
    start = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write = write_legacy_onnx if legacy else WRITERS[args.out.suffix]
    try:
        with warnings.catch_warnings():
            # torch's, about its own parts; and for each check of a size in a traced graph
            for category in (FutureWarning, DeprecationWarning, torch.jit.TracerWarning):
                warnings.simplefilter('ignore', category)
            try:
                write(network, images, names, args)
            except torch.onnx.errors.UnsupportedOperatorError as error:
                stop(str(error))  # it names the operator and the opset that has it
            except Exception as error:
                stop(f'torch cannot export this model{advice(args)}\n{error}')
        megabytes = sum(f.stat().st_size for f in files(args.out)) / 1e6
        print(f'{args.out}: {megabytes:.1f} MB in {time.monotonic() - start:.0f} s')
        verify(network, args)
    except BaseException:
        for file in files(args.out):  # do not leave an unverified file
            file.unlink()
        raise


def check(args: argparse.Namespace) -> None:
    """Stop at invalid arguments or missing packages."""
    if not Path(args.config).is_file():
        stop(f'there is no config file {args.config}')
    if args.out.suffix not in WRITERS:
        stop(f'the file to write must end with {" or ".join(WRITERS)}, got {args.out}')
    if args.out.exists():
        stop(f'{args.out} exists; name another file or remove it')
    if args.opset < MIN_OPSET:
        stop(f'--opset must be at least {MIN_OPSET}, got {args.opset}')
    if args.out.suffix == '.onnx':
        missing = [m for m in ('onnx', 'onnxscript') if importlib.util.find_spec(m) is None]
        if missing:
            stop(f"ONNX needs {' and '.join(missing)}: pip install 'mmattn[export]'")
        if os.environ.get('MMATTN_OPS') == 'compiled':
            stop("ONNX cannot hold mmattn's operators: unset MMATTN_OPS, which is 'compiled'")


def build(cfg: Config, args: argparse.Namespace) -> tuple[Network, list[str]]:
    """Build the network with its weights; return it and the names of its outputs."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = MODELS.build(cfg.model)
    whole = cfg.model.type.endswith('ImageClassifier') and not args.backbone
    if args.checkpoint:
        report = load_weights(model, args.checkpoint, '' if whole else 'backbone.')
        print(str(report).splitlines()[0])
    else:
        print('no checkpoint: the weights are random')
    stages = [f'stage{i}' for i in model.backbone.out_indices]
    part = 'classifier' if whole else 'backbone'
    names = ['logits'] if whole else stages
    print(f'{part} of {args.config}: images (B, 3, H, W) -> {", ".join(names)}')
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if 'mean' in preprocessor:
        order = 'RGB' if {'to_rgb', 'bgr_to_rgb'} & preprocessor.keys() else 'as the config reads'
        print(
            f'images are float32, {order}, minus {list(preprocessor["mean"])}, '
            f'divided by {list(preprocessor["std"])}'
        )
    return Network(*((model, {'mode': 'tensor'}) if whole else (model.backbone, {}))), names


def write_onnx(
    network: Network, images: Tensor, names: list[str], args: argparse.Namespace
) -> None:
    open_sides = {} if args.shape else {2: 'height', 3: 'width'}
    program = torch.onnx.export(
        network,
        (images,),
        input_names=['images'],
        output_names=names,
        opset_version=args.opset,
        dynamo=True,
        dynamic_shapes=({0: 'batch', **open_sides},),
        verbose=False,
    )
    program.save(args.out)


def write_legacy_onnx(
    network: Network, images: Tensor, names: list[str], args: argparse.Namespace
) -> None:
    open_sides = {} if args.shape else {2: 'height', 3: 'width'}
    torch.onnx.export(
        network,
        (images,),
        args.out,
        input_names=['images'],
        output_names=names,
        opset_version=args.opset,
        dynamo=False,
        dynamic_axes={'images': {0: 'batch', **open_sides}} | {n: {0: 'batch'} for n in names},
    )


def write_program(
    network: Network, images: Tensor, names: list[str], args: argparse.Namespace
) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    open_sides = {} if args.shape else {2: dynamic, 3: dynamic}
    # As in torch's ONNX exporter: no property of the traced size becomes an assumption.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(
            network, (images,), dynamic_shapes=({0: dynamic, **open_sides},)
        )
    # Queries of an input's memory layout became guards, such as 'the map is not a multiple of the
    # window'. No value depends on them; verify() runs other sizes.
    program._guards_code.clear()
    torch.export.save(program, args.out)


WRITERS = {'.onnx': write_onnx, '.pt2': write_program}


def files(out: Path) -> list[Path]:
    """Existing files of an export: large ONNX models have their weights in a second one."""
    return [f for f in (out, out.with_name(f'{out.name}.data')) if f.exists()]


def verify(network: Network, args: argparse.Namespace) -> None:
    """Compare outputs of the file with those of the model; stop if they differ."""
    run = runner(args.out)
    if run is None:
        print('not compared with the model, as onnxruntime is missing: pip install onnxruntime')
        return
    sizes = [tuple(args.shape)] * 3 if args.shape else CHECKED_SIZES
    for batch, size in zip(CHECKED_BATCHES, sizes, strict=True):
        images = torch.randn(batch, 3, *size)
        shape = 'x'.join(map(str, images.shape))
        with torch.no_grad():
            expected = network(images)
        try:
            got = run(images)
        except Exception as error:
            stop(f'{args.out} fails on images {shape}, and was removed{advice(args)}\n{error}')
        expected = (expected,) if isinstance(expected, torch.Tensor) else expected
        got = (got,) if isinstance(got, torch.Tensor) else got
        pairs = list(zip(expected, got, strict=True))
        difference = max((a - torch.as_tensor(b)).abs().max().item() for a, b in pairs)
        greatest = max(1.0, *(a.abs().max().item() for a, _ in pairs))
        print(
            f'images {shape}: greatest difference {difference:.1e}, greatest value {greatest:.1f}'
        )
        if not difference <= TOLERANCE * greatest:
            stop(
                f'{args.out} differs from the model on images {shape}, '
                f'and was removed{advice(args)}'
            )


def advice(args: argparse.Namespace) -> str:
    """Advice to fix the size, if it is dynamic."""
    return '' if args.shape else '. Where a part of it depends on the size, --shape H W fixes that'


def runner(out: Path) -> Callable[[Tensor], Any] | None:
    """Return a function that runs the file on images, or None without onnxruntime."""
    if out.suffix == '.pt2':
        return torch.export.load(out).module()
    if importlib.util.find_spec('onnxruntime') is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
    return lambda images: session.run(None, {'images': images.numpy()})


if __name__ == '__main__':
    main()
