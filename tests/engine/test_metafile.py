import pytest
import yaml

from mmattn.engine.metafile import entries, entry_of, weights_of

MODELS = [
    dict(Name='a', Config='configs/family/a.py', Weights='https://host.org/a.pth'),
    dict(Name='b', Config='configs/family/ablations/b.py'),
]


@pytest.fixture
def family(tmp_path):
    """A folder of configs with its metafile."""
    folder = tmp_path / 'family'
    (folder / 'ablations').mkdir(parents=True)
    (folder / 'metafile.yml').write_text(yaml.safe_dump(dict(Models=MODELS)))
    return folder


def test_entries_by_name(family):
    assert entries(family) == {'a': MODELS[0], 'b': MODELS[1]}
    assert entries(family / 'ablations') == {}


def test_entry_of_a_config(family, monkeypatch):
    assert entry_of(family / 'a.py') == MODELS[0]
    assert entry_of(family / 'ablations/b.py') == MODELS[1]
    assert entry_of(family / 'ablations/a.py') is None
    assert entry_of(family / 'b.py') is None
    monkeypatch.chdir(family)
    assert entry_of('a.py') == MODELS[0]


def test_weights_of_a_config(family):
    assert weights_of(family / 'a.py') == 'https://host.org/a.pth'
    assert weights_of(family / 'ablations/b.py') is None
    assert weights_of(family / 'unlisted.py') is None
