"""Texts and pixels of every kind of figure."""

import numpy as np
import pytest
import torch
from helpers.small_backbones import small_backbone

from mmattn.visualization import Instances, capture, plot_prediction
from mmattn.visualization.draw.base import rendered
from mmattn.visualization.draw.maps import plot_features, plot_grad_cam, plot_receptive_field
from mmattn.visualization.pictures import PictureOptions, attention_pictures, default_queries

PICTURE = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
FOUND = Instances(
    np.array([0, 1]), np.array([[10.0, 20, 30, 50], [40, 0, 90, 60]]), scores=np.array([0.6, 0.9])
)
CLASSES = ('cat', 'dog')


@torch.no_grad()
def look(family, height=64, width=96):
    model = small_backbone(family)
    with capture(model) as seen:
        model(torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)))
    return seen


def words(figure):
    texts = [*figure.texts, *(axes.title for axes in figure.axes)]
    texts += [t for axes in figure.axes for t in axes.texts] + [
        axes.yaxis.label for axes in figure.axes
    ]
    texts += [t for legend in figure.legends for t in legend.get_texts()]
    return ' | '.join(text.get_text().replace('\n', ' ') for text in texts)


def check(figure, *expected):
    """Check the figure's texts, and that no image in it is blank."""
    for text in expected:
        assert text in words(figure), words(figure)
    picture = rendered(figure)
    assert picture.dtype == np.uint8 and picture.ndim == 3
    for axes in figure.axes:
        if axes.images:
            box = axes.get_window_extent()
            left, right = int(box.x0), int(box.x1)
            top, bottom = len(picture) - int(box.y1), len(picture) - int(box.y0)
            assert picture[top:bottom, left:right].std() > 3


def test_gcvit():
    pictures = attention_pictures(PICTURE, look('gcvit'), 'GCViT', PictureOptions())
    assert set(pictures) == {'attention_local', 'attention_global', 'window_0'}
    figure = pictures['attention_global']()
    check(
        figure,
        'GCViT: attention of global blocks',
        'times the average',
        'mean of 2 heads',
        'head 1',
    )
    check(figure, 'stage 2, block 1', 'windows of 4 tokens')
    check(pictures['attention_local'](), 'the tokens of its window attend', '1 head in this stage')
    check(
        pictures['window_0'](), 'around y 30, x 45, mean of heads', 'attention of the chosen point'
    )
    check(pictures['window_0'](), "% of the window's attention", 'stage 3, block 0 (local)')


def test_dat_and_swin():
    from mmdet.models import SwinTransformer

    swin = SwinTransformer(
        embed_dims=16, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), window_size=4
    )
    swin.eval()
    with capture(swin) as seen, torch.no_grad():
        swin(torch.randn(1, 3, 64, 96))
    pictures = attention_pictures(
        PICTURE, look('dat'), 'DAT', PictureOptions(), FOUND, CLASSES, swin=seen.blocks
    )
    names = {'attention_local', 'attention_shifted', 'sampling_points', 'keys_0', 'keys_1'}
    assert set(pictures) == names
    figure = pictures['sampling_points']()
    check(figure, '4 × 6 points', 'group 3', 'dog 0.90', 'Arrows start at the regular grid')
    figure = pictures['keys_0']()
    check(
        figure,
        'the point at y 30, x 65',
        'all heads together',
        'head 3',
        '% of the attention in all, the largest',
        'Swin, local window: ',
    )


def test_dat_plus_plus():
    pictures = attention_pictures(PICTURE, look('dat++'), 'DAT++', PictureOptions())
    assert set(pictures) == {'sampling_points', 'keys_0'}
    check(pictures['keys_0'](), 'stage 0, block 0', 'stage 1, block 1', '2 heads in this stage')


def test_quadtree_in_one_image_and_between_two():
    seen = look('quadtree')
    other = PICTURE[::-1].copy(), look('quadtree')
    options = PictureOptions(queries=[(20, 70)])
    pictures = attention_pictures(PICTURE, seen, 'QuadTree', options, other=other)
    assert set(pictures) == {'kept_0', 'kept_between_0'}
    figure = pictures['kept_0']()
    check(figure, 'the point at y 20, x 70 keeps in its image', 'level 3: 4 patches of 32 px')
    check(figure, 'this stage has 2 levels', '% of the attention', 'attends to all tokens of 32 px')
    check(pictures['kept_between_0'](), 'keeps in another image', 'the chosen point')


@pytest.mark.parametrize('family', ['gcvit', 'dat', 'quadtree'])
def test_one_stage_and_one_head(family):
    pictures = attention_pictures(PICTURE, look(family), 'm', PictureOptions(stage=2, head=1))
    for name, draw in pictures.items():
        figure = draw()
        assert ('head 1' in words(figure)) != (name == 'sampling_points')
        assert 'head 0' not in words(figure) and 'group 1' not in words(figure)
        assert 'stage 2' in words(figure) and 'stage 1' not in words(figure)


def test_unknown_stage_or_head_is_an_error():
    seen = look('gcvit')
    with pytest.raises(
        ValueError, match=r'in stage 4; there is stage 0: local, global \(1 head\); stage 1'
    ):
        attention_pictures(PICTURE, seen, 'm', PictureOptions(stage=4))
    with pytest.raises(ValueError, match=r'no head 2; there is stage 0: local, global \(1 head\)'):
        attention_pictures(PICTURE, seen, 'm', PictureOptions(head=2))


def test_default_queries_are_the_best_detections():
    assert default_queries(PICTURE, FOUND) == [(30, 65), (35, 20)]
    assert default_queries(PICTURE, None) == [(30, 45)]
    nothing = Instances(np.zeros(0, int), np.zeros((0, 4)), scores=np.zeros(0))
    assert default_queries(PICTURE, nothing) == [(30, 45)]


def test_feature_maps():
    seen = look('gcvit')
    check(
        plot_features(PICTURE, seen.features, (64, 96), 'm'), 'at 1/32: 128 channels, ', 'variance'
    )
    cams = [np.random.default_rng(1).random(f.shape[2:]) for f in seen.features]
    figure = plot_grad_cam(PICTURE, cams, (64, 96), 'the class dog', 'm', np.array([1, 2, 30, 40]))
    check(figure, 'm: Grad-CAM for the class dog', 'features at 1/16', 'share of the maximum')
    field = np.ones((64, 96)) / 64 / 96
    field[30:34, 46:50] = 1
    figure = plot_receptive_field(PICTURE, [field], [8], 'm')
    check(figure, 'features at 1/8: 90% within 5 × 5 px', 'dependence, over its maximum')


def test_predictions_of_the_three_tasks():
    figure = plot_prediction(PICTURE, FOUND, FOUND, CLASSES, 'm', threshold=0.7)
    check(figure, 'ground truth: 2', 'prediction: 1 with a score ≥ 0.7', 'dog 0.90')
    check(plot_prediction(PICTURE, FOUND, None, CLASSES, 'm'), 'no ground truth', 'cat 0.60')

    labels = np.zeros((60, 90), np.int16)
    labels[:, 45:] = 1
    truth = labels.astype(np.uint8)
    truth[:30] = 255
    truth[30:, :45] = 1
    figure = plot_prediction(PICTURE, labels, truth, CLASSES, 'm')
    check(
        figure,
        'prediction: 50% of the annotated pixels correct',
        'gray: not annotated',
        'cat',
        'dog',
    )

    figure = plot_prediction(PICTURE, np.array([0.3, 0.7]), 1, CLASSES, 'm')
    check(figure, 'ground truth: dog', '70.0 %')
    bars = figure.axes[1]
    assert [label.get_text() for label in bars.get_yticklabels()] == ['dog', 'cat']
