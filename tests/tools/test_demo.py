"""tools/demo.py: output, files, and one whole demo on a few images."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

TOOL = Path(__file__).parents[2] / 'tools/demo.py'


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('demo')


def demo(folder, *arguments):
    return subprocess.run(
        [sys.executable, TOOL, *arguments],
        cwd=folder,
        env={**os.environ, 'OMP_NUM_THREADS': '2'},
        capture_output=True,
        text=True,
        check=False,
    )


def test_whole_demo_end_to_end(tmp_path):
    """Data, two short epochs of training, test and pictures, by this project's tools."""
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work/predictions.png').write_text('of an earlier run')
    options = [
        '--work-dir',
        'work',
        '--data',
        'data',
        '--train',
        '8',
        '--val',
        '4',
        '--cfg-options',
    ]
    result = demo(tmp_path, 'gcvit', *options, 'train_cfg.max_epochs=2', 'train_cfg.val_interval=1')
    assert result.returncode == 0, result.stdout + result.stderr

    commands = re.findall(
        r'^\$ (MMATTN_COCO=data )?python \S+/tools/(\S+)\.py', result.stdout, re.M
    )
    assert [name for _, name in commands] == ['misc/make_demo_dataset', 'train', 'test']
    assert [bool(variable) for variable, _ in commands] == [False, True, True]
    assert re.findall(r'^  epoch  (\d)     2/2  loss \d+\.\d{3}  ', result.stdout, re.M) == [
        '1',
        '2',
    ]
    assert (
        len(re.findall(r'^  (?:validation|test): bbox mAP \S+, mask mAP', result.stdout, re.M)) == 3
    )
    last = result.stdout.splitlines()[-1]
    assert re.match(
        r'bbox mAP 0\.\d{3}, mask mAP 0\.\d{3} on 4 held-out images; training took \d+ min \d+ s '
        r'\(\d+ min \d+ s of CPU time\), all \d+ min \d+ s; '
        r'pictures: work/predictions.png, work/learning_curve.png$',
        last,
    )

    for name, shape in {'predictions.png': (780, 1300), 'learning_curve.png': (880, 990)}.items():
        picture = imread(tmp_path / 'work' / name)
        assert abs(picture.shape[0] - shape[0]) < 100
        assert picture.shape[1] == shape[1]
        assert picture[..., :3].std() > 0.05
    assert (tmp_path / 'work/train/epoch_2.pth').is_file()
    assert (tmp_path / 'work/test/results.segm.json').is_file()

    assert result.stdout.startswith('An earlier run was in work: it is now work_20')
    (earlier,) = tmp_path.glob('work_20*')
    assert (earlier / 'predictions.png').read_text() == 'of an earlier run'


def test_failed_step_shows_its_output_and_stops(tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/photo.jpg').write_text('precious')
    result = demo(tmp_path, '--data', 'data')
    assert result.returncode == 1
    assert 'data exists and was not made by this tool' in result.stderr
    assert 'tools/misc/make_demo_dataset.py failed' in result.stderr
    assert 'train.py' not in result.stdout


def test_unknown_family_names_the_known_ones(tmp_path):
    result = demo(tmp_path, 'resnet')
    assert result.returncode == 2
    assert "invalid choice: 'resnet' (choose from " in result.stderr
    assert 'gcvit' in result.stderr.rpartition('choose from')[2]
    assert not list(tmp_path.iterdir())


def test_every_family_has_its_config(tool):
    for config in tool.CONFIGS.values():
        assert (tool.ROOT / config).is_file()


@pytest.mark.parametrize(
    ('line', 'gist'),
    [
        (
            '11/21 06:30:36 - mmengine - INFO - Epoch(train) [1][ 25/375]  base_lr: 2.4e-04 '
            'lr: 2.4e-04  eta: 0:24:42  time: 1.0  data_time: 0.03  grad_norm: 7.08  loss: 4.9389  '
            'loss_rpn_cls: 0.6487\n',
            '  epoch  1    25/375  loss 4.939  0:24:42 to go',
        ),
        (
            'INFO - Epoch(train)  [12][375/375]  lr: 1e-5  eta: 1 day, 2:00:00  time: 1.0  '
            'memory: 812  loss: nan  loss_rpn_cls: nan\n',
            '  epoch 12   375/375  loss nan  1 day, 2:00:00 to go',
        ),
        (
            'INFO - Epoch(val) [2][25/25]    coco/bbox_mAP: 0.1670  coco/bbox_mAP_50: 0.2930  '
            'coco/segm_mAP: 0.1560  coco/segm_mAP_50: 0.2640\n',
            '  validation: bbox mAP 0.1670, mask mAP 0.1560',
        ),
        (
            'INFO - Epoch(test) [25/25]    coco/bbox_mAP: 0.5  coco/segm_mAP: 0.25\n',
            '  test: bbox mAP 0.5, mask mAP 0.25',
        ),
        ('INFO - Epoch(val) [2][25/25]    eta: 0:00:00  time: 1.7101\n', None),
        ('INFO - Checkpoints will be saved to work_dirs/demo.\n', None),
    ],
)
def test_progress_is_the_gist_of_the_log(tool, line, gist):
    assert tool.condense(line) == gist


# ---- The learning curve


@pytest.fixture
def figure(tool):
    epochs = [0.5, 1.0, 1.5, 2.0]
    losses = {'all': (epochs, [4, 3, 2, 1]), 'masks': (epochs, [0.9, 0.7, 0.5, 0.3])}
    metrics = {'boxes': ([1, 2], [0.1, 0.456]), 'masks': ([1, 2], [0.05, 0.345])}
    return tool.plot_learning_curve(losses, metrics, 'a small model')


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
