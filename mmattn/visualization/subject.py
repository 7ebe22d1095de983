"""A model with its way of reading images: from a config, a checkpoint and a file to all that is drawn."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, DefaultScope
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn

from mmattn.checkpoint import load_checkpoint

from .capture import Capture, capture, find_backbone
from .detection import Instances

TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation', 'mmpretrain': 'classification'}
IGNORED = 255  # the label of pixels that a segmentation leaves out


@dataclass(frozen=True)
class Placement:
    """Where the pixels that a model sees come from: ``file = scale * seen + offset``, each as (y, x).

    Attributes:
        scale: pixels of the file for one that the model sees.
        offset: place in the file of the upper left corner of what it sees.
        file_size: rows and columns of the file.
        seen_size: rows and columns of what the model sees, without padding.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]
    file_size: tuple[int, int]
    seen_size: tuple[int, int]

    def seen(self, y: float, x: float) -> tuple[float, float]:
        """A point of the file, in pixels, as the model sees it.

        Raises:
            ValueError: it is outside the file, or in a part of it that the test pipeline crops away.
        """
        if not (0 <= y < self.file_size[0] and 0 <= x < self.file_size[1]):
            raise ValueError(
                f'a query must lie in the image of {self.file_size[0]} x {self.file_size[1]} pixels '
                f'(height x width), got y {y:g}, x {x:g}'
            )
        place = tuple(
            (value + 0.5 - offset) / scale
            for value, offset, scale in zip((y, x), self.offset, self.scale, strict=True)
        )
        if not all(0 <= p < side for p, side in zip(place, self.seen_size, strict=True)):
            low = [max(0, round(v)) for v in self.offset]
            high = [
                round(o + s * n)
                for o, s, n in zip(self.offset, self.scale, self.seen_size, strict=True)
            ]
            raise ValueError(
                f'the query y {y:g}, x {x:g} is cropped away by the test pipeline, which keeps '
                f'y {low[0]} to {high[0] - 1}, x {low[1]} to {high[1] - 1}'
            )
        return place

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (n, 4) of the file, as x1, y1, x2, y2, as the model sees them."""
        offset, scale = (np.array([*v[::-1]] * 2) for v in (self.offset, self.scale))
        return (boxes - offset) / scale

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """A map (H, W) of the file's labels, or a mask, as the model sees it."""
        (sy, sx), (oy, ox) = self.scale, self.offset
        # cv2's coordinates are those of the pixels' centres.
        matrix = np.array([[sx, 0, sx / 2 + ox - 0.5], [0, sy, sy / 2 + oy - 0.5]])
        flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(labels, matrix, self.seen_size[::-1], flags=flags)


@dataclass
class View:
    """One image and what the model made of it.

    Attributes:
        path: of the file.
        picture: uint8 RGB (H, W, 3), what the model sees, without padding; all pixels below are its pixels.
        inputs: (1, 3, H', W'), normalised and padded.
        samples: the data sample that goes with them, in a list.
        seen: what the attention modules were given.
        prediction: :class:`Instances` of a detector, labels int64 (H, W) of a segmentor, probabilities (classes,) of
            a classifier.
        placement: from and to the file's pixels.
    """

    path: Path
    picture: np.ndarray
    inputs: Tensor
    samples: list
    seen: Capture
    prediction: Instances | np.ndarray
    placement: Placement


class Subject:
    """A detector, segmentor or classifier that can be looked into.

    Args:
        config: of mmdet, mmseg or mmpretrain: a path, or an ``mmengine.Config``.
        checkpoint: whatever :func:`mmattn.checkpoint.load_checkpoint` takes; None leaves fresh weights. mmdet's Swin
            takes mmengine's own format.
        device: where it runs.

    Attributes:
        task: 'detection', 'segmentation' or 'classification'.
        model: the built model, in evaluation mode.
        classes: names of its classes.

    Raises:
        TypeError: the model has no backbone that can be looked into.
        CheckpointError: weights are missing.
    """

    def __init__(self, config: str | Path | Config, checkpoint=None, device: str = 'cpu'):
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
            self.config.model.test_cfg = dict(mode='whole')  # one pass sees the whole image
        import_modules_from_strings([f'{self.scope}.{part}' for part in ('models', 'datasets')])
        with DefaultScope.overwrite_default_scope(self.scope):
            self.model: nn.Module = MODELS.build(self.config.model).to(device).eval()
        self.device = device
        self.backbone = find_backbone(self.model)
        if checkpoint is not None:
            load_checkpoint(self.model, checkpoint)

    @property
    def name(self) -> str:
        head = '' if self.task == 'classification' else f'{type(self.model).__name__} with '
        return head + type(self.backbone).__name__

    @cached_property
    def test_dataset(self) -> dict:
        """The config of its test data."""
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
        num = next(
            m.num_classes
            for m in self.model.modules()
            if isinstance(getattr(m, 'num_classes', None), int)
        )
        return tuple(f'class {i}' for i in range(num))

    @cached_property
    def _pipeline(self) -> Compose:
        """The test pipeline without what reads files."""
        steps = [
            step
            for step in self.test_dataset.pipeline
            if not str(step.type).split('.')[-1].startswith('Load')
        ]
        with DefaultScope.overwrite_default_scope(self.scope):
            return Compose([TRANSFORMS.build(step) for step in steps])

    def look(self, path: str | Path, resize_to: tuple[int, int] | None = None) -> View:
        """Read an image, and let the model predict while its attention modules are watched.

        Args:
            path: of the image file.
            resize_to: rows and columns that the image gets before the test pipeline; None leaves it.

        Raises:
            FileNotFoundError, ValueError: it cannot be read.
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
        """The model's predictions for normalised images; a detector's in the pixels that it sees."""
        options = dict(rescale=False) if self.task == 'detection' else {}
        return self.model.predict(inputs, samples, **options)

    def _pack(self, image: np.ndarray, path: str | Path) -> dict:
        size = image.shape[:2]
        results = dict(img=image, img_path=str(path), img_id=0, sample_idx=0)
        return self._pipeline(dict(results, img_shape=size, ori_shape=size))

    def _place(self, image: np.ndarray) -> Placement:
        """Where the test pipeline takes pixels from, found out with ramps: any resizing, cropping and padding."""
        height, width = image.shape[:2]
        ramps = np.full((height, width, 3), 255, np.uint8)
        ramps[..., 0] = np.linspace(0, 255, height).round()[:, None]
        ramps[..., 1] = np.linspace(0, 255, width).round()
        seen = self._pack(ramps, '')['inputs'].float().numpy()
        filled = seen[2] > 254.5  # padding has another value
        scale, offset = [], []
        for channel, axis, side in ((0, 0, height), (1, 1, width)):
            places = np.flatnonzero(filled.any(1 - axis))
            values = np.median(
                np.where(filled, seen[channel], np.nan)[filled.any(1)][:, filled.any(0)], 1 - axis
            )
            inner = slice(
                len(places) // 10, len(places) - len(places) // 10
            )  # borders repeat pixels
            a, b = np.polyfit(places[inner] + 0.5, values[inner] / 255 * (side - 1) + 0.5, 1)
            scale.append(float(a))
            offset.append(float(b))
        return Placement(tuple(scale), tuple(offset), (height, width), seen.shape[1:])

    def _arrays(self, result, picture: np.ndarray) -> Instances | np.ndarray:
        if self.task == 'classification':
            return result.pred_score.float().cpu().numpy()
        if self.task == 'segmentation':
            labels = result.pred_sem_seg.data[0].cpu().numpy()
            size = picture.shape[1::-1]
            return cv2.resize(labels.astype(np.int16), size, interpolation=cv2.INTER_NEAREST)
        found = result.pred_instances.cpu().numpy()
        masks = found.masks.astype(bool) if 'masks' in found else None
        return Instances(found.labels, found.bboxes, masks, found.scores)


def read_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 BGR (H, W, 3).

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no image that can be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'there is no image {path}')
    image = mmcv.imread(str(path)) if Path(path).stat().st_size else None
    if image is None:
        raise ValueError(f'{path} is no image that can be read (JPEG, PNG, WebP, TIFF, BMP)')
    return image
