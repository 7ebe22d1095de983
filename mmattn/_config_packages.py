"""Lets mmengine find the configs that ``mmseg::path`` names."""

from mmengine.config.utils import MODULE2PACKAGE


def mend_config_packages():
    """Let mmengine's table of packages with configs name mmseg by what it is imported as.

    The table looks for it as the distribution mmsegmentation, which the maintained fork is not; by its import
    name it is found under either.
    """
    MODULE2PACKAGE['mmseg'] = 'mmseg'
