import io

import numpy as np
import pytest
from matplotlib.image import imread

from mmattn.visualization import (
    plot_growth,
    plot_learning_curve,
    plot_memory,
    plot_scaling,
)


@pytest.fixture
def figure():
    epochs = [0.5, 1.0, 1.5, 2.0]
    losses = {'all': (epochs, [4, 3, 2, 1]), 'masks': (epochs, [0.9, 0.7, 0.5, 0.3])}
    metrics = {'boxes': ([1, 2], [0.1, 0.456]), 'masks': ([1, 2], [0.05, 0.345])}
    return plot_learning_curve(losses, metrics, 'a small model')


def test_axes_say_what_they_show(figure):
    upper, lower = figure.axes
    assert upper.get_ylabel() == 'training loss'
    assert lower.get_ylabel() == 'COCO mAP on held-out images'
    assert lower.get_xlabel() == 'epoch'
    assert [text.get_text() for text in upper.get_legend().texts] == ['all', 'masks']
    labels = [text.get_text() for text in lower.get_legend().texts]
    assert labels == ['boxes (last: 0.456)', 'masks (last: 0.345)']
    np.testing.assert_allclose(upper.lines[0].get_xydata(), [[0.5, 4], [1, 3], [1.5, 2], [2, 1]])
    np.testing.assert_allclose(lower.lines[1].get_xydata(), [[1, 0.05], [2, 0.345]])


def test_picture_has_its_size_and_is_not_blank(figure):
    file = io.BytesIO()
    figure.savefig(file)
    file.seek(0)
    picture = imread(file)
    assert picture.shape == (880, 990, 4)
    upper, lower = picture[:440, :, :3], picture[440:, :, :3]
    assert min(upper.std(), lower.std()) > 0.05


def test_scaling_says_what_it_shows_and_in_which_units():
    tokens = [1024, 4096]
    figure = plot_scaling(
        {'quadtree': (tokens, [0.1, 0.4]), 'full': (tokens, [0.1, 1.6])},
        {'quadtree': (tokens, [2**20, 4 * 2**20]), 'full': (tokens, [2**20, 16 * 2**20])},
        {'sharp': ([1, 4], [0.5, 0.1]), 'flat': ([1, 4], [2.0, 1.0])},
        'cost and error',
        'on a machine',
    )
    left, middle, right = figure.axes
    assert [axes.get_xscale() for axes in figure.axes] == ['log'] * 3
    assert [axes.get_yscale() for axes in figure.axes] == ['log'] * 3
    assert left.get_ylabel().endswith('(s)') and middle.get_ylabel().endswith('(MiB)')
    assert [text.get_text() for text in left.get_xticklabels()] == ['32²', '64²']
    legend = [text.get_text() for text in left.get_legend().texts]
    assert legend == ['quadtree', 'full', 'slope 1', 'slope 2']
    np.testing.assert_allclose(left.lines[1].get_xydata(), [[1024, 0.1], [4096, 1.6]])
    np.testing.assert_allclose(middle.lines[1].get_xydata(), [[1024, 1], [4096, 16]])
    # The guides start where the cheapest curve does.
    np.testing.assert_allclose(left.lines[2].get_ydata(), [0.1, 0.4])
    np.testing.assert_allclose(left.lines[3].get_ydata(), [0.1, 1.6])
    assert [text.get_text() for text in right.get_legend().texts] == ['sharp', 'flat']
    assert figure.get_suptitle() == 'cost and error' and figure.get_supxlabel() == 'on a machine'
    assert left.lines[0].get_color() == middle.lines[0].get_color() != right.lines[0].get_color()


def test_growth_says_what_it_shows_and_in_which_units():
    figure = plot_growth(
        {'a': ([4096, 65536], [0.1, 1.6])}, {'a': ([4096, 65536], [2**20, 2**24])}, 'on a machine'
    )
    time, memory = figure.axes
    assert time.get_ylabel().endswith('(s)') and memory.get_ylabel().endswith('(MiB)')
    assert [text.get_text() for text in time.get_xticklabels()] == ['64²', '256²']
    np.testing.assert_allclose(memory.lines[0].get_xydata(), [[4096, 1], [65536, 16]])
    np.testing.assert_allclose(time.lines[1].get_ydata(), [0.1, 1.6])


def test_memory_has_a_panel_for_each_model_and_mib():
    record = dict(allocated=[2**20, 2**21], resident=[2**22, 2**22], size=[(100, 200), (64, 1000)])
    figure = plot_memory(dict(gcvit=record, dat=record), 1, 'two steps')
    assert [axes.get_title() for axes in figure.axes] == ['gcvit', 'dat', '', '']
    upper, lower = figure.axes[1], figure.axes[3]
    labels = [text.get_text() for text in upper.get_legend().texts]
    assert labels == ['resident (last: 4)', 'allocated (last: 2)']
    np.testing.assert_allclose(upper.lines[1].get_xydata(), [[1, 1], [2, 2]])
    np.testing.assert_allclose(lower.lines[0].get_xydata(), [[1, 20], [2, 64]])
