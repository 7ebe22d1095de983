import mmengine.config.utils
import pytest


@pytest.fixture
def no_metafiles(monkeypatch):
    """Keep mmengine from reading all metafiles for each base, which takes seconds."""

    def no_metafile(*_):
        raise ValueError

    monkeypatch.setattr(mmengine.config.utils, '_get_cfg_metainfo', no_metafile)
