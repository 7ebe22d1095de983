"""A feature map's three strongest directions as colours."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def feature_pca(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the channels over the places of a map, as red, green and blue.

    Args:
        features: (1, C, H, W), C >= 3.

    Returns:
        float32 (H, W, 3) in [0, 1], each component from its 1st to its 99th percentile; and the share of the
        variance that each of the three has, (3,).
    """
    channels = features[0].detach().double().flatten(1).T.cpu()
    channels = channels - channels.mean(0)
    _, strengths, directions = np.linalg.svd(channels.numpy(), full_matrices=False)
    directions = directions[:3]
    # A direction's sign is arbitrary: its largest entry is made positive, so that pictures can be compared.
    largest = np.abs(directions).argmax(1)
    directions = directions * np.sign(directions[range(3), largest])[:, None]
    components = channels.numpy() @ directions.T
    low, high = np.percentile(components, [1, 99], axis=0)
    colours = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    variance = strengths**2 / max((strengths**2).sum(), 1e-30)
    return colours.reshape(*features.shape[2:], 3).astype(np.float32), variance[:3]
