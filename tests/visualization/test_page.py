"""Data of the interactive page, and a click in a browser."""

import base64
import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from helpers.small_backbones import small_backbone

from mmattn.visualization import (
    Instances,
    PageImage,
    attention_maps,
    capture,
    page_data,
    render_page,
)

# RGBA of the canvas at a point of the image. A copy is read: reading the canvas itself would change
# how the browser draws it.
PIXEL = """([y, x]) => {
    const heat = document.getElementById('heat'), copy = document.createElement('canvas');
    copy.width = copy.height = 1;
    const left = Math.round(x / 96 * heat.width), top = Math.round(y / 60 * heat.height);
    copy.getContext('2d').drawImage(heat, -left, -top);
    return [...copy.getContext('2d').getImageData(0, 0, 1, 1).data];
}"""
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')


@pytest.fixture(scope='module')
def blocks():
    model = small_backbone('gcvit')
    with capture(model) as seen, torch.no_grad():
        model(torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)))
    return seen.last_blocks()


@pytest.fixture(scope='module')
def data(blocks):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (2, 60, 96, 3), dtype=np.uint8)
    found = Instances(np.array([1]), np.array([[10.0, 20, 50, 50]]), scores=np.array([0.9]))
    images = [
        PageImage('first </script> image', pictures[0], blocks, found),
        PageImage('second', pictures[1], blocks[:3]),
    ]
    return page_data(images, 'a small model', ('cat', 'dog'))


def decoded(url):
    header, body = url.split(',')
    assert header.startswith('data:image/')
    return cv2.imdecode(np.frombuffer(base64.b64decode(body), np.uint8), cv2.IMREAD_UNCHANGED)


def test_mosaics_contain_the_attention_of_each_query(data, blocks):
    for layer, block in zip(data['images'][0]['layers'], blocks, strict=True):
        assert (layer['stage'], layer['kind']) == (block.stage, block.kind)
        rows, columns = layer['grid']
        height, width = layer['map']
        assert max(layer['grid']) <= 12 and max(layer['map']) <= 28
        maps = attention_maps(block, layer['queries'])
        names = layer['heads']
        assert len(names) == len(layer['mosaics']) == len(layer['peaks'])
        assert len(names) == (1 if block.num_heads == 1 else 1 + block.num_heads)
        for head, (url, peaks) in enumerate(zip(layer['mosaics'], layer['peaks'], strict=True)):
            mosaic = decoded(url)
            assert mosaic.shape == (rows * height, columns * width)
            query = rows * columns // 2 + 1
            y, x = query // columns * height, query % columns * width
            tile = mosaic[y : y + height, x : x + width]
            share = maps[query].mean(0) if head == 0 else maps[query, head - 1]
            assert tile.max() == 255
            assert np.unravel_index(tile.argmax(), tile.shape) == np.unravel_index(
                share.argmax(), share.shape
            )
            np.testing.assert_allclose(tile / 255, share / share.max(), atol=0.003)
            assert peaks[query] == pytest.approx(share.max() * share.size, rel=0.01)


def test_data_contain_pictures_and_boxes(data):
    first, second = data['images']
    picture = decoded(first['picture'])
    assert picture.shape == (first['height'], first['width'], 3) == (60, 96, 3)
    assert first['boxes'] == [dict(box=[10.0, 20.0, 50.0, 50.0], label='dog 0.90')]
    assert second['boxes'] == [] and len(second['layers']) == 3
    assert len(data['colors']) == 64


def test_large_maps_are_reduced():
    from mmattn.attention import WindowAttention
    from mmattn.visualization import Block

    block = Block(0, 0, 'local', WindowAttention(8, 2, 7), (torch.randn(1, 40, 90, 8),), (40, 90))
    picture = np.zeros((160, 360, 3), np.uint8)
    (layer,) = page_data([PageImage('wide', picture, [block])], 'm')['images'][0]['layers']
    assert layer['grid'] == (5, 12) and layer['map'] == (12, 28)
    assert len(layer['queries']) == 60 and layer['queries'][-1] == (36, 86)


def test_page_is_self_contained(data):
    page = render_page(data)
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://|@import|url\(""", page)
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1]
    assert json.loads(text) == json.loads(json.dumps(data))


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api')
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f'no browser: none of {", ".join(BROWSERS)} is installed')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.mark.parametrize('width, height', [(1280, 900), (390, 844)], ids=['desktop', 'phone'])
def test_click_shows_the_attention_of_the_point(browser, data, blocks, tmp_path, width, height):
    (tmp_path / 'index.html').write_text(render_page(data))
    page = browser.new_page(viewport=dict(width=width, height=height))
    problems, requests = [], []
    page.on('console', lambda message: problems.append(message.text))
    page.on('pageerror', lambda error: problems.append(str(error)))
    page.on('request', lambda request: requests.append(request.url))
    page.goto((tmp_path / 'index.html').as_uri())
    page.wait_for_selector('#heat[data-drawn]')

    def drawn():
        return page.get_attribute('#heat', 'data-drawn')

    def pixel(y, x):
        return page.evaluate(PIXEL, [int(y), int(x)])

    def click(y, x):
        area = page.locator('#stage-area').bounding_box()
        page.mouse.click(area['x'] + x / 96 * area['width'], area['y'] + y / 60 * area['height'])

    assert page.evaluate('document.documentElement.scrollWidth') <= width
    page.select_option('#stage', '1')
    page.select_option('#kind', 'local')
    page.select_option('#head', '1')
    for y, x in ((4, 4), (44, 92)):
        click(y, x)
        query = (y // 8) * 12 + x // 8
        page.wait_for_selector(f'#heat[data-drawn="0/1/local/1/{query}"]')
        layer, block = data['images'][0]['layers'][2], blocks[2]
        assert (block.stage, block.kind) == (1, 'local')
        share = attention_maps(block, [layer['queries'][query]])[0, 0]
        # The picture ends before the map.
        row, column = np.unravel_index(share[:7].argmax(), (7, 12))
        bright, dark = pixel(row * 8 + 1, column * 8 + 1), pixel(60 - y, 96 - x)
        assert sum(bright[:3]) > 450 and sum(dark[:3]) < 60, (
            'the window must be bright, the rest dark'
        )
        assert f'{layer["peaks"][1][query]:g} times the average' in page.inner_text('#peak')
    opaque = pixel(44, 90)[3]
    page.eval_on_selector(
        '#opacity', "slider => { slider.value = 0.25; slider.dispatchEvent(new Event('input')); }"
    )
    page.wait_for_function(f'before => ({PIXEL})([44, 90])[3] < before / 2', arg=opaque)
    page.select_option('#image', '1')
    page.wait_for_selector('#heat[data-drawn^="1/"]')
    assert drawn().startswith('1/1/local/1/')
    assert page.locator('#boxes-label').is_hidden()
    assert not problems
    assert all(url.startswith(('file:', 'data:')) for url in requests)
    page.close()
