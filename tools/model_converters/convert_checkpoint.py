"""Convert a published checkpoint to mmattn's format.

    python tools/model_converters/convert_checkpoint.py gcvit_tiny.pth.tar gcvit_tiny_mmattn.pth

The source is a file or URL in the authors' or timm's format. The result holds the weights alone,
under the names of OpenMMLab models with our backbones (``backbone.*``, a classifier's
``head.fc.*``): any tool of OpenMMLab loads it, by ``load_from``, ``tools/test.py`` or an
inferencer. Position tables keep their size; loading resizes them to other windows.
"""

import argparse
import sys
from pathlib import Path

import torch

import mmattn
from mmattn.checkpoint import CheckpointError, check_finite, read_state_dict, to_own_format


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('src', help='published file or URL')
    parser.add_argument('dst', type=Path, help='file to write; must not exist')
    args = parser.parse_args()
    if args.dst.exists():
        sys.exit(f'{args.dst} exists; name another file or remove it')
    try:
        state, label = read_state_dict(args.src)
        check_finite(state, label)
        source_format, own = to_own_format(state, label)
    except (CheckpointError, FileNotFoundError) as error:
        sys.exit(str(error))
    # A view would be saved with its whole storage.
    own = {name: value.clone() for name, value in own.items()}
    meta = dict(
        mmattn_version=mmattn.__version__, source=Path(label).name, source_format=source_format
    )
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=own, meta=meta), args.dst)
    megabytes = args.dst.stat().st_size / 1e6
    print(
        f'{label} ({source_format}): {len(own)} tensors written to {args.dst} ({megabytes:.1f} MB)'
    )


if __name__ == '__main__':
    main()
