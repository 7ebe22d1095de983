"""Grad-CAM, effective receptive fields and principal components against what they have to be."""

import numpy as np
import torch
from helpers.small_backbones import small_backbone

from mmattn.visualization import capture, effective_receptive_field, feature_pca, grad_cam
from mmattn.visualization.receptive_field import side_that_holds

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_grad_cam_of_a_channel_is_the_channel():
    model = small_backbone('dat')
    with capture(model) as seen, torch.no_grad():
        model(IMAGE)
    cams = grad_cam(model, IMAGE, lambda x: model(x)[2][:, 5].mean((1, 2)))
    assert [cam.shape for cam in cams] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    channel = seen.features[2][0, 5].numpy().clip(0)
    np.testing.assert_allclose(cams[2] * 16, channel, rtol=1e-4, atol=1e-6)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for unused in (0, 1, 3):  # the maps that a score does not use
        assert not cams[unused].any()


def test_receptive_fields_are_what_the_windows_allow_and_grow():
    model = small_backbone('dat')
    fields = effective_receptive_field(model, torch.randn(1, 3, 128, 128))
    assert [field.shape for field in fields] == [(128, 128)] * 4
    np.testing.assert_allclose([field.sum() for field in fields], 1, rtol=1e-5)
    # Patches of 4 pixels in windows of 4 tokens: the window of the middle token, and nothing else.
    window = np.zeros((128, 128), bool)
    window[64:80, 64:80] = True
    assert fields[0][window].min() > 0 and not fields[0][~window].any()
    reach = [(field > 0).mean() for field in fields]
    assert reach[0] < reach[1] < reach[2] <= reach[3]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_side_that_holds():
    field = np.zeros((21, 31))
    field[8:13, 10:15] = 1
    assert side_that_holds(field, 0.99) == 5
    assert side_that_holds(field, 0.3) == 3
    assert side_that_holds(field, 0.01) == 1


def test_principal_components_are_the_planted_ones():
    rng = np.random.default_rng(0)
    planted = np.zeros((3, 4, 4))
    planted[0, :2], planted[1, :, :2], planted[2, ::2] = 9, 5, 2
    directions = np.linalg.qr(rng.standard_normal((12, 3)))[0]
    features = torch.tensor(np.einsum('cd,dyx->cyx', directions, planted))[None]
    colors, variance = feature_pca(features)
    assert colors.shape == (4, 4, 3) and colors.min() >= 0 and colors.max() <= 1
    expected = np.array([81, 25, 4]) / 110
    np.testing.assert_allclose(variance, expected, rtol=1e-6)
    # One half of the map has one color, the other the opposite one.
    for axis, component in ((0, 0), (1, 1)):
        halves = np.moveaxis(colors[..., component], axis, 0)
        assert np.ptp(halves[:2]) < 1e-5 and abs(halves[0].mean() - halves[-1].mean()) > 0.9
