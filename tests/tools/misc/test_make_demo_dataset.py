"""tools/misc/make_demo_dataset.py: scenes, layouts, reproducibility, errors."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.registry import DefaultScope
from pycocotools.coco import COCO

TOOL = Path(__file__).parents[3] / 'tools/misc/make_demo_dataset.py'


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('misc/make_demo_dataset')


@pytest.fixture(scope='module')
def coco(tool, tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'coco'
    assert tool.make_dataset(out, 'coco', train=150, val=10, size=96)
    return out


def files(folder):
    """Relative path -> content of all files below a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()
    }


# ---- scenes


def scenes(tool, num, size=(96, 96)):
    for seed in range(num):
        rng = np.random.default_rng(seed)
        yield tool.draw_scene(rng, size, rng.integers(len(tool.CLASSES), size=6))


@pytest.mark.parametrize('size', [(32, 32), (64, 160), (101, 77), (480, 640)])
def test_scene_fits_the_asked_size(tool, size):
    for image, labels, masks in scenes(tool, 3, size):
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8
        assert masks.shape == (len(labels), *size)
        assert 1 <= len(labels) <= 6


def test_masks_are_disjoint_and_none_is_tiny(tool):
    for _, _, masks in scenes(tool, 20):
        assert masks.sum(0).max() == 1
        assert masks.sum((1, 2)).min() >= 0.5 * 5**2 / 2  # half of the thinnest shape, radius 5


def test_later_shapes_hide_parts_of_earlier_ones(tool):
    """The bottom shape is partly hidden in some scenes, and never shows more than alone."""
    hidden = 0
    for seed in range(20):
        crowd = tool.draw_scene(np.random.default_rng(seed), (96, 96), [0, 1, 2, 3, 4, 5])
        alone = tool.draw_scene(np.random.default_rng(seed), (96, 96), [0])
        assert not (crowd[2][0] & ~alone[2][0]).any()
        lost = 1 - crowd[2][0].sum() / alone[2][0].sum()
        assert lost <= 1 - tool.MIN_VISIBLE
        hidden += lost > 0.05
    assert hidden >= 3


def test_shapes_differ_from_what_is_around_them(tool):
    """Colors inside a mask and in the ring around it differ for nearly all shapes."""
    distances = []
    for image, _, masks in scenes(tool, 20):
        for mask in masks:
            ring = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7))).astype(bool) & ~mask
            distances.append(np.abs(image[mask].mean(0) - image[ring].mean(0)).sum())
    assert np.quantile(distances, 0.1) > 60


def test_every_class_has_its_own_outline(tool):
    """No two nearly coincide, at one position, size and angle; the ring has its hole."""
    drawn = [
        tool._coverage(i, np.array([40.0, 40.0]), 30, 0, 1)[0] > 0.5
        for i in range(len(tool.CLASSES))
    ]
    assert all(mask.any() for mask in drawn)
    for i, mask in enumerate(drawn):
        for other in drawn[:i]:
            assert (mask & other).sum() / (mask | other).sum() < 0.85
    ring = drawn[tool.CLASSES.index('ring')].astype(np.uint8)
    contours, tree = cv2.findContours(ring, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    assert len(contours) == 2
    assert tree[0, 1, 3] == 0  # the second is a hole in the first


# ---- COCO


def test_coco_masks_boxes_and_areas_agree(coco):
    for split, num in (('train2017', 150), ('val2017', 10)):
        api = COCO(str(coco / f'annotations/instances_{split}.json'))
        assert len(api.imgs) == num
        for info in api.imgs.values():
            image = cv2.imread(str(coco / split / info['file_name']))
            assert image.shape == (info['height'], info['width'], 3) == (96, 96, 3)
            anns = api.imgToAnns[info['id']]
            assert anns
            masks = np.stack([api.annToMask(ann) for ann in anns])
            assert masks.sum(0).max() == 1
            for ann, mask in zip(anns, masks, strict=True):
                y, x = np.nonzero(mask)
                assert ann['area'] == len(y)
                assert ann['bbox'] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
                assert ann['iscrowd'] == 0


def test_coco_classes_are_balanced(coco, tool):
    api = COCO(str(coco / 'annotations/instances_train2017.json'))
    assert [category['name'] for category in api.loadCats(api.getCatIds())] == list(tool.CLASSES)
    counts = [len(api.getAnnIds(catIds=i)) for i in api.getCatIds()]
    assert max(counts) < 2 * min(counts)


def test_coco_is_what_mmdet_reads(coco, tool):
    from mmdet.datasets import CocoDataset

    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = CocoDataset(
            data_root=str(coco),
            ann_file='annotations/instances_val2017.json',
            data_prefix=dict(img='val2017/'),
            metainfo=dict(classes=tool.CLASSES),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            ],
        )
        assert len(dataset) == 10
        sample = dataset[0]
    masks = sample['gt_masks'].masks
    assert len(masks) == len(sample['gt_bboxes_labels']) > 0
    assert masks.sum((1, 2)).min() > 0


# ---- ADE20K and ImageNet


def test_ade20k_is_what_mmseg_reads(tool, tmp_path):
    from mmseg.datasets import ADE20KDataset

    tool.make_dataset(tmp_path / 'ade', 'ade20k', train=3, val=2, size=(48, 64))
    seen = set()
    for split, num in (('training', 3), ('validation', 2)):
        with DefaultScope.overwrite_default_scope('mmseg'):
            dataset = ADE20KDataset(
                data_root=str(tmp_path / 'ade'),
                data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'annotations/{split}'),
                pipeline=[
                    dict(type='LoadImageFromFile'),
                    dict(type='LoadAnnotations', reduce_zero_label=True),
                ],
            )
            assert len(dataset) == num
            for sample in dataset:
                assert sample['img'].shape == (48, 64, 3)
                assert sample['gt_seg_map'].shape == (48, 64)
                seen |= set(np.unique(sample['gt_seg_map']))
    assert 255 in seen  # the background is ignored
    assert seen - {255} <= set(range(len(tool.CLASSES)))
    assert len(seen) > 3


def test_imagenet_is_what_mmpretrain_reads(tool, tmp_path):
    from mmpretrain.datasets import ImageNet

    tool.make_dataset(tmp_path / 'imagenet', 'imagenet', train=12, val=6, size=48)
    for split, num in (('train', 12), ('val', 6)):
        assert sorted(p.name for p in (tmp_path / 'imagenet' / split).iterdir()) == sorted(
            tool.CLASSES
        )
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            dataset = ImageNet(
                data_root=str(tmp_path / 'imagenet'),
                split=split,
                pipeline=[dict(type='LoadImageFromFile')],
            )
            assert len(dataset) == num
            assert len(dataset.CLASSES) == 1000
            for sample in dataset:
                assert sample['img'].shape == (48, 48, 3)
                assert Path(sample['img_path']).parent.name == tool.CLASSES[sample['gt_label']]
            labels = [int(label) for label in dataset.get_gt_labels()]
        assert labels == list(range(6)) * (num // 6)


# ---- reproducibility


@pytest.mark.parametrize('layout', ['coco', 'ade20k', 'imagenet'])
def test_same_arguments_same_files(tool, tmp_path, layout):
    for name in 'ab':
        assert tool.make_dataset(tmp_path / name, layout, train=4, val=2, size=(40, 56), seed=3)
    assert files(tmp_path / 'a') == files(tmp_path / 'b')
    tool.make_dataset(tmp_path / 'c', layout, train=4, val=2, size=(40, 56), seed=4)
    assert files(tmp_path / 'a').keys() == files(tmp_path / 'c').keys()
    same = [
        path
        for path, content in files(tmp_path / 'a').items()
        if files(tmp_path / 'c')[path] == content
    ]
    assert not [path for path in same if path.endswith(('jpg', 'png', 'JPEG'))]


def test_more_images_leave_the_first_ones_as_they_were(tool, tmp_path):
    tool.make_dataset(tmp_path / 'few', train=3, val=2, size=48)
    tool.make_dataset(tmp_path / 'many', train=9, val=4, size=48)
    few, many = files(tmp_path / 'few'), files(tmp_path / 'many')
    images = [path for path in few if path.endswith('jpg')]
    assert len(images) == 5
    assert all(few[path] == many[path] for path in images)
    assert len({many[path] for path in many if path.endswith('jpg')}) == 13


# ---- the tool


def run(*arguments):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_second_run_finds_its_work_done(tmp_path):
    arguments = [tmp_path / 'data', '--train', 3, '--val', 1, '--size', 40, 32]
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    assert (
        f'3 training and 1 validation images of 40x32 in coco layout in {tmp_path}' in first.stdout
    )
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'data').rglob('*')}
    second = run(*arguments)
    assert second.returncode == 0
    assert 'nothing to do' in second.stdout
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / 'data').rglob('*')}


def test_other_arguments_replace_what_the_tool_made(tool, tmp_path):
    tool.make_dataset(tmp_path / 'data', 'coco', train=2, val=1, size=32)
    assert tool.make_dataset(tmp_path / 'data', 'ade20k', train=2, val=1, size=32)
    assert not (tmp_path / 'data/train2017').exists()
    assert json.loads((tmp_path / 'data' / tool.STAMP).read_text())['layout'] == 'ade20k'
    assert [p.name for p in tmp_path.iterdir()] == ['data']


def test_foreign_folder_is_refused_and_kept(tmp_path):
    (tmp_path / 'photo.jpg').write_text('precious')
    result = run(tmp_path, '--train', 1, '--val', 1)
    assert result.returncode == 2
    assert f'{tmp_path} exists and was not made by this tool' in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['photo.jpg']


def test_failure_halfway_leaves_nothing(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.cv2, 'imwrite', lambda *_: False)
    with pytest.raises(OSError, match='could not write'):
        tool.make_dataset(tmp_path / 'data', train=1, val=1, size=32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--size', 31], 'size must be one or two numbers (H W) from 32 up, got (31, 31)'),
        (
            ['--size', 64, 64, 3],
            'size must be one or two numbers (H W) from 32 up, got (64, 64, 3)',
        ),
        (['--train', 0], 'train must be at least 1, got 0'),
        (['--val', -1], 'val must be at least 1, got -1'),
        (['--seed', -1], 'seed must not be negative, got -1'),
        (['--format', 'voc'], "invalid choice: 'voc'"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    result = run(tmp_path / 'data', *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / 'data').exists()


def test_wrong_layout_is_named(tool, tmp_path):
    with pytest.raises(ValueError, match="layout must be one of coco, ade20k, imagenet, got 'voc'"):
        tool.make_dataset(tmp_path / 'data', 'voc')
