"""GC ViT, DAT and QuadTree attention as OpenMMLab backbones.

``import mmattn`` registers everything in mmengine's root registries.
"""

import sys

from ._dependencies import check_dependencies

__version__ = '0.1.0'
__all__ = ['attention', 'backbones', 'checkpoint', 'engine', 'ops']

# Python imports this package on the way to `python -m mmattn.doctor`, which has to run where the
# rest does not import. At that time argv[0] is '-m', and orig_argv has the module's name.
if not (sys.argv[:1] == ['-m'] and 'mmattn.doctor' in sys.orig_argv):
    check_dependencies()

    import mmattn_configs

    mmattn_configs.register()

    from . import attention, backbones, checkpoint, engine, ops
