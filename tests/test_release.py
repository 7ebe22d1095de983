"""Agreement of files that name the version with the package."""

import re
from pathlib import Path

import yaml

import mmattn

ROOT = Path(__file__).parents[1]


def test_the_citation_has_the_version_and_all_papers():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == mmattn.__version__
    papers = {reference['url'] for reference in citation['references']}
    for metafile in ROOT.glob('configs/*/metafile.yml'):
        for collection in yaml.safe_load(metafile.read_text())['Collections']:
            assert collection['Paper']['URL'] in papers, metafile


def test_the_changelog_has_the_version_after_unreleased():
    versions = re.findall(r'^## \[(.+?)\]', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
    assert versions[0] == 'Unreleased'
    assert versions[1] == mmattn.__version__
