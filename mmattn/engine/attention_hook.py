"""Training hook that writes pictures of the model's attention at every evaluation."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from mmattn.visualization.capture import Capture, capture, find_backbone
from mmattn.visualization.detection import Instances
from mmattn.visualization.draw.base import rendered
from mmattn.visualization.draw.maps import plot_features
from mmattn.visualization.pictures import PictureOptions, attention_pictures


@HOOKS.register_module()
class AttentionHook(Hook):
    """Write pictures of attention and features to the Runner's visualizer at evaluations.

    The pictures are those of :mod:`mmattn.visualization.pictures`, drawn for the first image of
    each of the first batches, and named ``<picture>_<batch index>``.

    Args:
        num_images: number of batches of which the first image is drawn.
        interval: draw at every ``interval``-th evaluation.
        stage: index of the stage to show; None shows all.
        head: index of the head to show beside the mean; None shows the first ones.
        score_thr: detections with a lower score are left out.

    Raises:
        ValueError: an argument is out of range; or, at the first evaluation, the model has no such
            stage or head.
        TypeError: at the first evaluation, the model has no backbone whose attention can be
            captured.
    """

    priority = 'LOW'

    def __init__(
        self,
        num_images: int = 1,
        interval: int = 1,
        stage: int | None = None,
        head: int | None = None,
        score_thr: float = 0.5,
    ):
        for name, value in (('num_images', num_images), ('interval', interval)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} must be a positive integer, got {value!r}')
        self.num_images = num_images
        self.interval = interval
        self.options = PictureOptions(stage=stage, head=head, threshold=score_thr)
        self.evaluations = 0
        self._watching = ExitStack()
        self._seen: Capture | None = None

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        if mode != 'train':
            self.evaluations += 1

    def _before_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = 'train'
    ) -> None:
        due = (self.evaluations - 1) % self.interval == 0
        if mode != 'train' and due and batch_idx < self.num_images and is_main_process():
            self._seen = self._watching.enter_context(capture(runner.model))

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
        mode: str = 'train',
    ) -> None:
        if self._seen is None or mode == 'train':
            return
        seen, self._seen = self._seen, None
        self._watching.close()
        picture = _picture(data_batch['inputs'][0])
        found = _found(outputs[0], picture)
        found = found and found.above(self.options.threshold)
        name = type(find_backbone(runner.model)).__name__
        classes = (getattr(runner.visualizer, 'dataset_meta', None) or {}).get('classes')
        if classes is None and found is not None:
            classes = [str(label) for label in range(int(found.labels.max(initial=0)) + 1)]
        pictures = attention_pictures(picture, seen, name, self.options, found, classes or ())
        pictures['features'] = lambda: plot_features(picture, seen.features, seen.input_size, name)
        with torch.no_grad():
            for kind, draw in pictures.items():
                runner.visualizer.add_image(f'{kind}_{batch_idx}', rendered(draw()), runner.iter)


def _picture(inputs: Tensor) -> np.ndarray:
    """Packed image of the test pipeline, (3, H, W) BGR -> uint8 RGB (H, W, 3)."""
    return inputs.permute(1, 2, 0).cpu().numpy()[..., ::-1].clip(0, 255).astype(np.uint8).copy()


def _found(result: Any, picture: np.ndarray) -> Instances | None:
    """Boxes of a detector in pixels of the picture; mmdet's are in pixels of the file."""
    if 'pred_instances' not in result:
        return None
    found = result.pred_instances.cpu().numpy()
    height, width = result.metainfo.get('ori_shape', picture.shape)[:2]
    scale = np.array([picture.shape[1] / width, picture.shape[0] / height] * 2)
    return Instances(found.labels, found.bboxes * scale, scores=found.scores)
