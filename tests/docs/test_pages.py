"""Links have targets, generated pages are up to date, and the site builds."""

import importlib
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import model_zoo
import pytest
import troubleshooting
from helpers.pages import PAGES, ROOT, anchors, links, read


@pytest.mark.parametrize('page', PAGES)
def test_links(page):
    for link in links(page):
        if link.startswith(('http://', 'https://')):
            continue
        path, _, anchor = link.partition('#')
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if page.startswith('docs/'):
            assert target.is_relative_to(ROOT / 'docs'), f'{link} is not part of the site'
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT)), link


def test_links_are_seen(monkeypatch):
    text = '# A `b` c\n[x](y.md#z) `[no](code)`\n\n    [no](block)\n\n![p](q.png)\n## A `b` c\n'
    monkeypatch.setattr('helpers.pages.read', lambda page: text)
    assert links('any') == ['y.md#z', 'q.png']
    assert anchors('any') == ['a-b-c', 'a-b-c-1']


# ---- Made from other files


@pytest.mark.parametrize('module', [model_zoo, troubleshooting])
def test_made_pages_are_up_to_date(module):
    assert module.PAGE.read_text() == module.page(), 'run `make docs` and commit what it writes'


@pytest.mark.parametrize('path', model_zoo.generated())
def test_generated_tables_are_up_to_date(path):
    text = read(path)
    assert text == model_zoo.with_generated(text, model_zoo.generated()[path]), 'run `make docs`'


def rows_of(page):
    """The last cell of each row that names a config -> all of its cells."""
    rows = [line.strip('| ').split(' | ') for line in read(page).splitlines() if '.py' in line]
    cells = {re.search(r'[\w/]+\.py', row[-1])[0]: row for row in rows if len(row) > 3}
    assert len(cells) == sum(len(row) > 3 for row in rows), 'a config has two rows'
    return cells


@pytest.mark.parametrize('metafile', model_zoo.metafiles())
def test_readmes_show_every_model_and_published_figure_once(metafile):
    models = model_zoo.metafiles()[metafile]['Models']
    folder = metafile.removesuffix('metafile.yml')
    rows = rows_of(f'{folder}README.md')
    assert rows.keys() == {model['Config'].removeprefix(folder) for model in models}
    for model in models:
        row = rows[model['Config'].removeprefix(folder)]
        metadata = model['Metadata']
        figures = Counter(re.findall(r'(?<![\d.])\d+\.\d(?!\d)', ' '.join(row[1:-5])))
        found = (model_zoo.results(model), model_zoo.results(model.get('Baseline', {})))
        if 'Published Effect' not in metadata:
            assert figures == Counter(f'{value:.1f}' for part in found for value in part.values())
        else:
            assert row.count(metadata['Published Effect']) == 1
        for key in ('Parameters (M)', 'FLOPs (G)'):
            if published := metadata.get(f'Published {key}'):
                ends = (f'({published:g})', f'({published:g}\\*)')
                assert sum(cell.endswith(ends) for cell in row) == 1
        for result in model.get('Results', []):
            assert result['Source'] in row[-3].split('; ')
        if 'Weights' in model:
            assert row[-2] == f'[weights]({model["Weights"]})'


@pytest.mark.parametrize('metafile', model_zoo.metafiles())
def test_readmes_show_other_weights_and_their_results(metafile):
    text = read(metafile.replace('metafile.yml', 'README.md'))
    content = model_zoo.metafiles()[metafile]
    for entry in (*content['Collections'], *content['Models']):
        for other in entry.get('Other Weights', []):
            (row,) = [line for line in text.splitlines() if f']({other["URL"]})' in line]
            for result in other.get('Results', []):
                assert result['Dataset'] in row and f'({result["Source"]})' in row
                assert all(f'{metric} {v}' in row for metric, v in result['Metrics'].items())


@pytest.mark.parametrize(
    ('name', 'title'),
    [
        ('cascade_mask_rcnn_dat_spp_3x_coco', 'Cascade Mask R-CNN, DAT-S++, 3x'),
        ('gcvit_l_384_imagenet', 'GC ViT-L, 384 x 384'),
        ('gcvit_l_21k_imagenet', 'GC ViT-L, ImageNet-21K'),
        ('dino_quadtree_b2_12e_coco', 'DINO, QuadTree-b2, 12 epochs'),
    ],
)
def test_titles(name, title):
    assert model_zoo.title({'Name': name}) == title


# ---- The site


class Resources(HTMLParser):
    """Collects what a page loads, and paragraphs that were meant to be lists or tables."""

    def __init__(self):
        super().__init__()
        self.loaded, self.run_in, self.in_paragraph = [], [], False

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ('script', 'img', 'iframe', 'source'):
            self.loaded.append(attributes.get('src') or '')
        elif tag == 'link':
            self.loaded.append(attributes.get('href') or '')
        self.in_paragraph = tag == 'p' or (self.in_paragraph and tag in ('code', 'a', 'strong'))

    def handle_data(self, data):
        if self.in_paragraph and re.search(r'^(- |\d+\. |\|)', data, re.MULTILINE):
            self.run_in.append(data)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The built site; strict, as mkdocs.yml says: a warning ends it."""
    folder = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    names = {page.removeprefix('docs/') for page in PAGES if page.startswith('docs/')}
    pages = {name.replace('README', 'index').replace('.md', '.html') for name in names}
    assert pages <= {path.name for path in site.glob('*.html')}
    assert not list(site.rglob('*.py'))
    for path in site.glob('*.html'):
        parser = Resources()
        parser.feed(path.read_text())
        assert not [name for name in parser.loaded if '//' in name], path.name
        assert not parser.run_in, f'{path.name}: a list or table needs an empty line before it'
    for path in site.rglob('*.css'):
        assert not re.search(r'url\(["\']?(https?:)?//', path.read_text()), path.name


@pytest.mark.parametrize(
    'name', ['backbones', 'attention', 'ops', 'checkpoint', 'engine', 'visualization']
)
def test_the_reference_has_every_public_name(site, name):
    text = (site / 'api.html').read_text()
    module = importlib.import_module(f'mmattn.{name}')
    for public in getattr(module, '__all__', ()):
        item = getattr(module, public)
        places = {f'mmattn.{name}.{public}', f'{item.__module__}.{item.__qualname__}'}
        assert any(f'id="{place}"' in text for place in places), public
