"""Figures of instances: panels, outlines, colors and label positions."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmattn.visualization import Instances, plot_predictions
from mmattn.visualization.detection import class_colors, draw_instances, place_labels

CLASSES = ('disk', 'box', 'bar')


def instances(boxes, labels, scores=None, size=(64, 64)):
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    return Instances(np.array(labels, int), np.array(boxes, float).reshape(-1, 4), masks, scores)


def rendered(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


@pytest.fixture
def example():
    rng = np.random.default_rng(0)
    truth = instances([(5, 5, 25, 30), (30, 20, 60, 55)], [0, 2])
    found = instances(
        [(6, 5, 25, 31), (30, 20, 58, 55), (0, 40, 20, 60)], [0, 2, 1], np.array([0.9, 0.5, 0.49])
    )
    return rng.integers(90, 110, (64, 64, 3), dtype=np.uint8), truth, found


@pytest.mark.parametrize('num', [1, 2, 5])
def test_each_example_has_a_pair_of_panels(example, num):
    figure = plot_predictions([example] * num, CLASSES, 'predictions')
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == [
        'ground truth',
        'prediction (score ≥ 0.5)',
    ] * num
    assert [t.get_text() for t in panels[0].texts] == ['disk', 'bar']
    assert [t.get_text() for t in panels[1].texts] == ['disk 0.90', 'bar 0.50']
    assert [t.get_text() for t in figure.legends[0].texts] == list(CLASSES)
    picture = rendered(figure)
    assert picture.shape[1] == 1300
    assert picture.std() > 0.1


def test_threshold_is_an_argument(example):
    figure = plot_predictions([example], CLASSES, '', score_threshold=0.8)
    truth, found = figure.axes
    assert len(truth.texts) == 2
    assert [text.get_text() for text in found.texts] == ['disk 0.90']


def test_image_without_instances_has_no_marks(example):
    nothing = instances([], [], np.zeros(0))
    figure = plot_predictions([(example[0], nothing, nothing)], CLASSES, 'none')
    assert all(axes.images and not axes.texts and not axes.patches for axes in figure.axes)


def test_outline_has_the_color_of_its_class(example):
    image, truth, _ = example
    figure = Figure(figsize=(4, 4), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_instances(axes, image, truth, CLASSES, class_colors(3))
    picture = rendered(figure)
    for label, (_, top, right, bottom) in zip(truth.labels, truth.boxes, strict=True):
        edge = picture[int((top + bottom) / 2 * 6.25), int((right - 0.5) * 6.25)]
        np.testing.assert_allclose(edge, class_colors(3)[label], atol=0.12)


@pytest.mark.parametrize('num', [3, 8, 10, 11, 80])
def test_class_colors_differ(num):
    colors = class_colors(num)
    assert colors.shape == (num, 3)
    assert len(np.unique(colors.round(3), axis=0)) == num


def rectangles(texts, spots, text_height):
    width = np.array([text_height * (0.6 * len(text) + 0.6) for text in texts])
    corner = np.array(spots)
    return np.stack([*corner.T, corner[:, 0] + width, corner[:, 1] + text_height * 1.55], 1)


def test_labels_of_the_same_box_do_not_overlap():
    texts = ['circle 0.99', 'star 0.75', 'heart']
    boxes = np.array([[40, 40, 90, 90]] * 3)
    a, b, c = rectangles(texts, place_labels(texts, boxes, (128, 128), 5), 5)
    for one, other in ((a, b), (a, c), (b, c)):
        assert (one[:2] >= other[2:]).any() or (other[:2] >= one[2:]).any()


def test_labels_stay_inside_the_image():
    texts = ['circle 0.99'] * 4
    boxes = np.array([[-5, -5, 10, 10], [120, 0, 128, 9], [0, 120, 9, 128], [119, 119, 128, 128]])
    low = rectangles(texts, place_labels(texts, boxes, (128, 128), 5), 5)
    assert low.min() >= 0
    assert low.max() <= 128 + 1e-9


def test_label_is_above_its_box_if_there_is_room():
    (spot,) = place_labels(['star'], np.array([[40, 50, 90, 90]]), (128, 128), 5)
    assert spot == (40, 50 - 5 * 1.55)
