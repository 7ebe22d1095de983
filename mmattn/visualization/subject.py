"""Models built from a config and a checkpoint; their attention and predictions for image files."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, DefaultScope
from mmengine.utils import import_modules_from_strings
from torch import Tensor

from mmattn.checkpoint import load_checkpoint

from .capture import Capture, capture, find_backbone
from .detection import Instances

TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation', 'mmpretrain': 'classification'}
IGNORED = 255  # label of pixels without annotation


@dataclass(frozen=True)
class Placement:
    """Map between the pixels of a file and of the model's input, both as (y, x).

    ``file = scale * input + offset``; coordinates are in pixels from the upper left corner.

    Attributes:
        scale: pixels of the file per pixel of the input.
        offset: position in the file of the input's upper left corner.
        file_size: rows and columns of the file.
        seen_size: rows and columns of the input, without padding.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]
    file_size: tuple[int, int]
    seen_size: tuple[int, int]

    def seen(self, y: float, x: float) -> tuple[float, float]:
        """Position in the model's input of a pixel of the file.

        Raises:
            ValueError: the pixel is outside the file, or the test pipeline crops it away.
        """
        if not (0 <= y < self.file_size[0] and 0 <= x < self.file_size[1]):
            raise ValueError(
                f'a query must lie in the image of {self.file_size[0]} x {self.file_size[1]} '
                f'pixels (height x width), got y {y:g}, x {x:g}'
            )
        row, column = (
            (value + 0.5 - offset) / scale
            for value, offset, scale in zip((y, x), self.offset, self.scale, strict=True)
        )
        if not (0 <= row < self.seen_size[0] and 0 <= column < self.seen_size[1]):
            low = [max(0, round(v)) for v in self.offset]
            high = [
                round(o + s * n)
                for o, s, n in zip(self.offset, self.scale, self.seen_size, strict=True)
            ]
            raise ValueError(
                f'the query y {y:g}, x {x:g} is cropped away by the test pipeline, which keeps '
                f'y {low[0]} to {high[0] - 1}, x {low[1]} to {high[1] - 1}'
            )
        return row, column

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (n, 4) of the file, as x1, y1, x2, y2, in pixels of the model's input."""
        offset, scale = (np.array([*v[::-1]] * 2) for v in (self.offset, self.scale))
        return (boxes - offset) / scale

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """A label map or mask (H, W) of the file, at the size of the model's input, (h, w)."""
        (sy, sx), (oy, ox) = self.scale, self.offset
        # cv2 counts from the center of the first pixel.
        matrix = np.array([[sx, 0, sx / 2 + ox - 0.5], [0, sy, sy / 2 + oy - 0.5]])
        flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(labels, matrix, self.seen_size[::-1], flags=flags)


@dataclass
class View:
    """One image with the model's input, attention and prediction.

    Attributes:
        path: path of the file.
        picture: uint8 RGB (H, W, 3), the model's input before normalization, without padding.
            Pixels of the prediction and of queries are its pixels.
        inputs: float32 (1, 3, H', W'), normalized and padded.
        samples: data sample of ``inputs``, in a list.
        seen: recorded inputs of the attention modules.
        prediction: :class:`Instances` of a detector, labels int16 (H, W) of a segmentor,
            probabilities float32 (classes,) of a classifier.
        placement: map between pixels of the file and of the picture.
    """

    path: Path
    picture: np.ndarray
    inputs: Tensor
    samples: list
    seen: Capture
    prediction: Instances | np.ndarray
    placement: Placement


class Subject:
    """A detector, segmentor or classifier whose attention can be shown.

    Args:
        config: config of mmdet, mmseg or mmpretrain: a path, or an ``mmengine.Config``.
        checkpoint: as for :func:`mmattn.checkpoint.load_checkpoint`; None leaves random weights.
        device: device of the model.

    Attributes:
        task: 'detection', 'segmentation' or 'classification'.
        model: the built model, in evaluation mode.
        classes: names of the model's classes.

    Raises:
        TypeError: :func:`mmattn.visualization.capture` does not support the backbone.
        ValueError: the config's ``default_scope`` is none of mmdet, mmseg and mmpretrain.
        CheckpointError: weights are missing.
    """

    def __init__(
        self,
        config: str | Path | Config,
        checkpoint: Any = None,
        device: str | torch.device = 'cpu',
    ):
        self.config = deepcopy(config) if isinstance(config, Config) else Config.fromfile(config)
        if modules := self.config.get('custom_imports'):
            import_modules_from_strings(**modules)
        self.scope = self.config.get('default_scope', 'mmengine')
        if self.scope not in TASKS:
            raise ValueError(
                f'default_scope of the config must be one of {", ".join(TASKS)}, got {self.scope!r}'
            )
        self.task = TASKS[self.scope]
        if 'test_cfg' in self.config.model and self.task == 'segmentation':
            self.config.model.test_cfg = dict(mode='whole')  # one forward pass per image
        import_modules_from_strings([f'{self.scope}.{part}' for part in ('models', 'datasets')])
        with DefaultScope.overwrite_default_scope(self.scope):
            self.model: BaseModel = MODELS.build(self.config.model).to(device).eval()
        self.device = device
        self.backbone = find_backbone(self.model)
        if checkpoint is not None:
            load_checkpoint(self.model, checkpoint)

    @property
    def name(self) -> str:
        """Name of the model for titles, such as ``MaskRCNN with GCViT``."""
        head = '' if self.task == 'classification' else f'{type(self.model).__name__} with '
        return head + type(self.backbone).__name__

    @cached_property
    def test_dataset(self) -> ConfigDict:
        """Config of the test dataset, without wrappers."""
        dataset = self.config.test_dataloader.dataset
        while 'dataset' in dataset:
            dataset = dataset.dataset
        return dataset

    @cached_property
    def classes(self) -> tuple[str, ...]:
        with DATASETS.switch_scope_and_registry(self.scope) as registry:
            meta = dict(getattr(registry.get(self.test_dataset.type), 'METAINFO', {}))
        meta.update(self.test_dataset.get('metainfo') or {})
        if 'classes' in meta:
            return tuple(meta['classes'])
        numbers = (getattr(module, 'num_classes', None) for module in self.model.modules())
        num = next(number for number in numbers if isinstance(number, int))
        return tuple(f'class {i}' for i in range(num))

    @cached_property
    def _pipeline(self) -> Compose:
        """The test pipeline without the steps that read files."""
        steps = [
            step
            for step in self.test_dataset.pipeline
            if not str(step.type).split('.')[-1].startswith('Load')
        ]
        with DefaultScope.overwrite_default_scope(self.scope):
            return Compose([TRANSFORMS.build(step) for step in steps])

    def look(self, path: str | Path, resize_to: tuple[int, int] | None = None) -> View:
        """Read an image and run the model, recording the inputs of its attention modules.

        Args:
            path: path of the image file.
            resize_to: rows and columns to resize the image to before the test pipeline; None keeps
                its size.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no readable image.
        """
        image = read_image(path)
        if resize_to is not None:
            image = cv2.resize(image, resize_to[::-1], interpolation=cv2.INTER_AREA)
        packed = self._pack(image, path)
        picture = packed['inputs'].permute(1, 2, 0).numpy()[..., ::-1].copy()
        sample = packed['data_samples']
        with torch.no_grad():
            data = self.model.data_preprocessor(
                dict(inputs=[packed['inputs'].to(self.device)], data_samples=[sample]), False
            )
            inputs, samples = data['inputs'], data['data_samples']
            with capture(self.model) as seen:
                (result,) = self.predict(inputs, samples)
        placement = self._place(image)
        return View(
            Path(path), picture, inputs, samples, seen, self._arrays(result, picture), placement
        )

    def predict(self, inputs: Tensor, samples: list) -> list:
        """Predictions for normalized images; those of a detector in pixels of ``inputs``."""
        options = dict(rescale=False) if self.task == 'detection' else {}
        return self.model.predict(inputs, samples, **options)

    def _pack(self, image: np.ndarray, path: str | Path) -> dict:
        size = image.shape[:2]
        results = dict(img=image, img_path=str(path), img_id=0, sample_idx=0)
        return self._pipeline(dict(results, img_shape=size, ori_shape=size))

    def _place(self, image: np.ndarray) -> Placement:
        """Find the test pipeline's resizing, cropping and padding from its output for ramps."""
        height, width = image.shape[:2]
        ramps = np.full((height, width, 3), 255, np.uint8)
        ramps[..., 0] = np.linspace(0, 255, height).round()[:, None]
        ramps[..., 1] = np.linspace(0, 255, width).round()
        seen = self._pack(ramps, '')['inputs'].float().numpy()
        filled = seen[2] > 254.5  # the third channel is 255 except in padding
        (sy, oy), (sx, ox) = (
            _fit_ramp(seen[channel], filled, axis=channel, side=side)
            for channel, side in enumerate((height, width))
        )
        return Placement((sy, sx), (oy, ox), (height, width), seen.shape[1:])

    def _arrays(self, result: Any, picture: np.ndarray) -> Instances | np.ndarray:
        if self.task == 'classification':
            return result.pred_score.float().cpu().numpy()
        if self.task == 'segmentation':
            labels = result.pred_sem_seg.data[0].cpu().numpy()
            size = picture.shape[1::-1]
            return cv2.resize(labels.astype(np.int16), size, interpolation=cv2.INTER_NEAREST)
        found = result.pred_instances.cpu().numpy()
        masks = found.masks.astype(bool) if 'masks' in found else None
        return Instances(found.labels, found.bboxes, masks, found.scores)


def _fit_ramp(channel: np.ndarray, filled: np.ndarray, axis: int, side: int) -> tuple[float, float]:
    """Scale and offset along an axis, from a ramp of 0 to 255 over ``side`` pixels of the file."""
    positions = np.flatnonzero(filled.any(1 - axis))
    inside = np.where(filled, channel, np.nan)[filled.any(1)][:, filled.any(0)]
    values = np.median(inside, 1 - axis)
    margin = len(positions) // 10  # interpolation repeats pixels at borders
    inner = slice(margin, len(positions) - margin)
    scale, offset = np.polyfit(
        positions[inner] + 0.5, values[inner] / 255 * (side - 1) + 0.5, deg=1
    )
    return float(scale), float(offset)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as uint8 BGR (H, W, 3).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no readable image.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'there is no image {path}')
    image = mmcv.imread(str(path)) if Path(path).stat().st_size else None
    if image is None:
        raise ValueError(f'{path} is no image that can be read (JPEG, PNG, WebP, TIFF, BMP)')
    return image
