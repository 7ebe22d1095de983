"""Ground truth of an image, if it belongs to the config's test data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.registry import DATASETS, DefaultScope
from pycocotools import mask as mask_utils

from .detection import Instances
from .subject import IGNORED, Placement, Subject, View


class GroundTruth:
    """Annotations of the config's test data.

    Args:
        subject: model whose config has the test data.

    Attributes:
        problem: reason why there are no annotations; empty if the data could be read.
    """

    def __init__(self, subject: Subject):
        self.task = subject.task
        self.images: dict[str, int] = {}  # file name -> index in the data
        self.problem = ''
        config = dict(subject.test_dataset, pipeline=[], test_mode=True)
        config.pop('indices', None)
        try:
            with DefaultScope.overwrite_default_scope(subject.scope):
                self.dataset = DATASETS.build(config)
        except (FileNotFoundError, OSError) as error:
            self.problem = f"the config's test data cannot be read ({error})"
            return
        for i in range(len(self.dataset)):
            self.images[Path(self.dataset.get_data_info(i)['img_path']).name] = i

    def of(self, view: View) -> Instances | np.ndarray | int | None:
        """Annotation in pixels of the model's input, or None if the image is not in the data.

        Instances for a detector, labels (H, W) for a segmentor, a class index for a classifier.

        Raises:
            FileNotFoundError: the annotation's segmentation map cannot be read.
        """
        if view.path.name not in self.images:
            return None
        info = self.dataset.get_data_info(self.images[view.path.name])
        if self.task == 'classification':
            return int(info['gt_label'])
        if self.task == 'segmentation':
            return self._labels(info, view.placement)
        return _instances(info['instances'], view.placement)

    def _labels(self, info: dict, placement: Placement) -> np.ndarray:
        labels = cv2.imread(info['seg_map_path'], cv2.IMREAD_UNCHANGED)
        if labels is None:
            raise FileNotFoundError(f'cannot read the segmentation map {info["seg_map_path"]}')
        if info.get('reduce_zero_label'):
            labels = np.where(labels == 0, IGNORED, labels - 1).astype(np.uint8)
        for old, new in (info.get('label_map') or {}).items():
            labels[labels == old] = new
        return placement.labels(labels)


def _instances(entries: list[dict], placement: Placement) -> Instances:
    entries = [entry for entry in entries if not entry['ignore_flag']]
    boxes = np.array([entry['bbox'] for entry in entries], float).reshape(-1, 4)
    masks = [
        placement.labels(_mask(entry['mask'], placement)) for entry in entries if 'mask' in entry
    ]
    return Instances(
        labels=np.array([entry['bbox_label'] for entry in entries], int),
        boxes=placement.boxes(boxes),
        masks=np.array(masks, bool) if len(masks) == len(entries) and masks else None,
    )


def _mask(segmentation: Any, placement: Placement) -> np.ndarray:
    """Mask, uint8 (H, W) of the file, from COCO's polygons or run lengths."""
    if isinstance(segmentation, list):
        segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, *placement.file_size))
    elif isinstance(segmentation['counts'], list):
        segmentation = mask_utils.frPyObjects(segmentation, *placement.file_size)
    return mask_utils.decode(segmentation)
