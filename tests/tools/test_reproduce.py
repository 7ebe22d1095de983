"""tools/reproduce.py: tables, verdicts, errors, and one table tested whole on generated images."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from decimal import Decimal
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from helpers import metafiles, published
from helpers.runs import TOOLS, run_tool
from matplotlib.image import imread
from mmengine.config import Config

from mmattn.engine.reproduction import (
    METRICS,
    Row,
    Table,
    compare,
    fingerprint,
    measured_figures,
    read_tables,
    to_markdown,
    verdict,
)

ROOT = Path(__file__).parents[2]
TABLES = read_tables(ROOT / 'configs/tables.yml')
ROWS = [pytest.param(row, id=f'{t}:{r}') for t in TABLES for r, row in TABLES[t].rows.items()]


# ------------------------------------------------------------------------------------ the tables


@pytest.mark.parametrize('row', ROWS)
def test_rows_have_configs_and_figures_of_their_task(row):
    assert row.config.is_file()
    assert row.checkpoint is None or row.checkpoint.startswith('https://')
    for metric, value in row.published.items():
        assert METRICS[metric].decimals >= -value.as_tuple().exponent
        assert 15 < value < 100
    dataset = row.config.stem.rpartition('_')[2]
    tasks = dict(imagenet=('Top',), coco=('box', 'mask'), ade20k=('mIoU',))
    assert all(metric.startswith(tasks[dataset]) for metric in row.published)
    assert dataset == 'ade20k' or not row.multi_scale


def test_every_published_figure_is_in_a_table():
    shown = {
        (str(row.config.relative_to(ROOT / 'configs')), metric)
        for table in TABLES.values()
        for row in table.rows.values()
        for metric in row.published
    }
    for config, entry in metafiles.entries().items():
        for result in entry.get('Results', []):
            for metric in result['Metrics'].keys() & METRICS.keys():
                assert (config, metric) in shown


def test_other_weights_are_found_by_their_notes():
    """Where the metafiles have any; without them the rows say that there are none."""
    for entry in metafiles.entries().values():
        for other in entry.get('Other Weights', []):
            if 'timm' in other['Note']:
                rows = [row for row in TABLES['gcvit-7'].rows.values() if row.published]
                assert other['URL'] in [row.checkpoint for row in rows]


@pytest.mark.parametrize('split', ['matched', 'threshold'])
def test_imagenetv2_is_read_as_by_its_configs(split):
    row = TABLES['gcvit-7'].rows[f'gcvit_t_{split}']
    cfg = Config.fromfile(row.config)
    cfg.merge_from_dict(row.options)
    expected = Config.fromfile(ROOT / f'configs/gcvit/gcvit_t_imagenetv2_{split}.py')
    assert cfg.test_dataloader == expected.test_dataloader


def own_tables(folder, rows, **entry):
    """A file of one table, beside a metafile of one model."""
    (folder / 'configs/own').mkdir(parents=True)
    model = dict(Name='own', Config='configs/own/own.py', **entry)
    (folder / 'configs/own/metafile.yml').write_text(yaml.safe_dump(dict(Models=[model])))
    path = folder / 'configs/tables.yml'
    content = dict(
        datasets={'V2': {'test_dataloader.dataset.ann_file': 'v2.txt'}},
        tables=dict(mine=dict(title='Mine', rows=rows)),
    )
    path.write_text(yaml.safe_dump(content))
    return path


def result(dataset, **metrics):
    return dict(Dataset=dataset, Metrics={k.replace('_', ' '): v for k, v in metrics.items()})


def test_rows_choose_weights_data_sets_and_scales(tmp_path):
    other = dict(URL='https://b', Note='of 2022', Results=[result('V2', Top_1_Accuracy=70.5)])
    metrics = {'Top 1 Accuracy': 80.1, 'mIoU': 50.0, 'mIoU(ms+flip)': 51.0}
    rows = {
        'own': None,
        'many': dict(model='own', multi_scale=True),
        'v2': dict(model='own', dataset='V2'),
        'old': dict(model='own', dataset='V2', weights='2022'),
        'none': dict(model='own', weights='2021'),
    }
    path = own_tables(
        tmp_path,
        rows,
        Weights='https://a',
        Results=[dict(Dataset='V1', Metrics=metrics), result('V2', Top_1_Accuracy=69.5)],
        **{'Other Weights': [other]},
    )
    found = read_tables(path)['mine'].rows
    assert {row.config for row in found.values()} == {tmp_path / 'configs/own/own.py'}
    assert {name: row.checkpoint for name, row in found.items()} == dict(
        own='https://a', many='https://a', v2='https://a', old='https://b', none=None
    )
    assert {name: list(map(str, row.published.values())) for name, row in found.items()} == dict(
        own=['80.1', '50.0'], many=['51.0'], v2=['69.5'], old=['70.5'], none=[]
    )
    assert found['v2'].options == {'test_dataloader.dataset.ann_file': 'v2.txt'}


def test_decimals_are_those_that_were_published(tmp_path):
    path = own_tables(tmp_path, {'own': None}, Results=[result('V1', Top_1_Accuracy='83.400')])
    metafile = tmp_path / 'configs/own/metafile.yml'
    metafile.write_text(metafile.read_text().replace("'", ''))
    assert str(read_tables(path)['mine'].rows['own'].published['Top 1 Accuracy']) == '83.400'


@pytest.mark.parametrize(
    'rows, message',
    [
        ({'theirs': None}, r'table mine, row theirs: no metafile.yml has the model theirs'),
        ({'own': {'dataset': 'V3'}}, r'row own: dataset must be one of V2, got V3'),
        ({'own': {'scale': 1}}, r"row own: unknown \['scale'\]; a row may have \['dataset', "),
    ],
)
def test_wrong_tables_are_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_tables(own_tables(tmp_path, rows))


# -------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    'published, measured, expected',
    [
        ('47.9', '47.9', 'within the rounding'),
        ('47.9', '48.0', 'higher'),
        ('47.9', '47.8', 'lower'),
        ('49.2', '49.25', 'within the rounding'),  # of 49.249, for example
        ('49.2', '49.26', 'higher'),
        ('49.2', '49.15', 'within the rounding'),
        ('49.2', '49.14', 'lower'),
        ('83.5', '83.550', 'within the rounding'),
        ('83.5', '83.552', 'higher'),
        ('83.400', '83.400', 'within the rounding'),
        ('83.400', '83.402', 'higher'),  # one image of 50,000
        ('83', '83.498', 'within the rounding'),
        ('83.50', '83.5', 'within the rounding'),
        ('83.55', '83.5', 'within the rounding'),
        ('83.56', '83.5', 'lower'),
    ],
)
def test_verdicts_at_the_edges_of_rounding(published, measured, expected):
    assert verdict(Decimal(published), Decimal(measured)) == expected


def row_of(published=(), multi_scale=False):
    figures = {name: Decimal(value) for name, value in dict(published).items()}
    return Row(Path('x.py'), 'https://a', multi_scale, {}, figures)


def test_reports_become_figures():
    """As mmdet, mmseg and mmpretrain write them."""
    detector = {'coco/bbox_mAP': 0.479, 'coco/bbox_mAP_50': 0.7, 'coco/segm_mAP': 0.43, 'time': 1}
    both = row_of({'box AP': '47.9', 'mask AP': '43.2'})
    segmentor = {'aAcc': 80.0, 'mIoU': 49.23}
    many = row_of({'mIoU(ms+flip)': '50.3'}, multi_scale=True)
    classifier = {'accuracy/top1': 83.55000305175781, 'accuracy/top5': 96.5}
    for row, report, expected in (
        (both, detector, {'box AP': '47.9', 'box AP50': '70.0', 'mask AP': '43.0'}),
        (row_of(), segmentor, {'mIoU': '49.23'}),
        (many, segmentor, {'mIoU(ms+flip)': '49.23'}),
        (row_of(), classifier, {'Top 1 Accuracy': '83.550', 'Top 5 Accuracy': '96.500'}),
    ):
        found = measured_figures(row, report)
        assert {name: str(value) for name, value in found.items()} == expected

    with pytest.raises(ValueError, match=r'no mask AP .* but coco/bbox_mAP'):
        measured_figures(both, {'coco/bbox_mAP': 0.479})
    for report in ({}, {'mIoU': float('nan')}):
        with pytest.raises(ValueError, match='no known metric'):
            measured_figures(row_of(), report)


def test_lines_of_a_table():
    table = Table(
        'T',
        dict(
            a=row_of({'box AP': '47.9', 'mask AP': '43.2'}),
            b=row_of(),
            c=row_of({'box AP': '50.0'}),
            d=row_of({'box AP': '50.0'}),
            e=Row(Path('x.py'), None, False, {}, {}),
        ),
    )
    outcomes = dict(
        a=dict(
            measured={'box AP': '47.9', 'box AP50': '70.0', 'mask AP': '43.4'},
            checkpoint='https://a',
        ),
        b=dict(measured={'mIoU': '20.00'}, checkpoint='b.pth'),
        c=dict(reason='no data', checkpoint='https://a'),
    )
    lines = [[value or '' for value in line.values()] for line in compare(table, outcomes)]
    assert lines == [
        ['a', 'box AP', '47.9', '47.9', '+0.0', 'within the rounding'],
        ['a', 'mask AP', '43.2', '43.4', '+0.2', 'higher'],
        ['b', 'mIoU', '', '20.00', '', 'no published figure'],
        ['c', 'box AP', '50.0', '', '', 'failed'],
        ['d', 'box AP', '50.0', '', '', 'not tested'],
        ['e', '', '', '', '', 'not tested: train it first'],
    ]
    text = to_markdown(table, outcomes)
    assert '| a | mask AP | 43.2 | 43.4 | +0.2 | higher |\n' in text
    assert text.endswith('- b: b.pth\n- c: https://a: failed: no data\n')


# --------------------------------------------------------------------------- lists and arguments


def test_list(capsys):
    run_tool('reproduce', '--list')
    listed = capsys.readouterr().out
    assert re.findall(r'^([a-z]\S+)  \(', listed, re.M) == list(TABLES)
    assert f'  {"gcvit_t_imagenet"}: Top 1 Accuracy 83.5' in listed
    run_tool('reproduce', 'dat-ablations', '--list')
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(TABLES['dat-ablations'].rows)
    assert 'no published weights: train it first' in lines[1]


def trainings(capsys, *arguments):
    run_tool('reproduce', *arguments, '--train')
    lines = capsys.readouterr().out.splitlines()
    notes, commands, tests = lines[::3], lines[1::3], lines[2::3]
    assert all(note.startswith('# ') for note in notes)
    return notes, [shlex.split(c) for c in commands], [shlex.split(test) for test in tests]


@pytest.mark.parametrize('name', ['gcvit-7', 'datpp-retinanet'])
def test_training_commands(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, commands, tests = trainings(capsys, name)
    rows = TABLES[name].rows
    assert {row for test in tests for row in test[3 : test.index('--checkpoint')]} == set(rows)
    configs = dict.fromkeys(row.config for row in rows.values())
    for config, (tool, path, number, *options) in zip(configs, commands, strict=True):
        assert tool == 'tools/dist_train.sh'
        assert Path(path).resolve() == config
        cfg = Config.fromfile(path)
        images = int(number) * cfg.train_dataloader.batch_size
        assert (options == ['--auto-scale-lr']) == (images != cfg.auto_scale_lr.base_batch_size)
        assert options in ([], ['--auto-scale-lr'])


def test_training_on_other_numbers_of_gpus(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    row = 'fpn_dat_t_ade20k'
    notes, commands, tests = trainings(capsys, 'dat-ade20k', row, 'fpn_dat_t_ms', '--gpus', 1)
    assert notes == [
        f'# {row}: 16 images a step by the recipe, and 2 here, with the learning rate scaled'
    ]
    assert commands == [['python', 'tools/train.py', f'configs/dat/{row}.py', '--auto-scale-lr']]
    last = f'work_dirs/{row}/iter_80000.pth'
    own = ['--checkpoint', f'{row}={last}', f'fpn_dat_t_ms={last}']
    assert tests == [['python', 'tools/reproduce.py', 'dat-ade20k', row, 'fpn_dat_t_ms', *own]]

    row = 'mask_rcnn_dat_tpp_3x_coco'  # 64 images a step, 2 on each GPU
    notes, commands, _ = trainings(capsys, 'datpp-mask-rcnn', row, '--gpus', 32)
    assert notes == [f'# {row}: 64 images a step']
    assert commands == [['tools/dist_train.sh', f'configs/dat/{row}.py', '32']]


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], 'name a table; --list shows them'),
        (['gcvit-9'], 'TABLE must be one of gcvit-1, .*, got gcvit-9'),
        (['gcvit-1', 'dat_t_imagenet'], 'ROW must be one of gcvit_xxt_.*, got dat_t_imagenet'),
        (['gcvit-1', '--checkpoint', 'x=y'], 'ROW must be one of .*, got x'),
        (['gcvit-1', '--checkpoint', 'x'], 'must be ROW=FILE, got x'),
        (['gcvit-1', '--gpus', '0'], 'argument --gpus must be at least 1, got 0'),
        (['gcvit-1', '--tables', 'none.yml'], 'No such file .*none.yml'),
        (['dat-ablations', 'dat_t_explicit_imagenet'], 'has no published weights: train it'),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run_tool('reproduce', *arguments)
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_what_a_test_depends_on(tmp_path, monkeypatch):
    weights = tmp_path / 'own.pth'
    weights.write_bytes(b'1')
    row = TABLES['gcvit-1'].rows['gcvit_t_imagenet']

    def state(options=(), row=row):
        return fingerprint(row, str(weights), options)

    first = state()
    assert state() == first
    assert state(['test_dataloader.batch_size=1']) != first
    assert state(row=TABLES['gcvit-7'].rows['gcvit_t_matched']) != first
    monkeypatch.setenv('MMATTN_IMAGENET', str(tmp_path))
    assert state() != first
    monkeypatch.undo()
    weights.write_bytes(b'12')
    assert state() != first
    assert fingerprint(row, 'https://a', ()) != fingerprint(row, 'https://b', ())


def test_reasons_and_progress(load_tool):
    tool = load_tool('reproduce')
    assert tool.why(['warning\n', 'test.py: no data\n', 'after\n']) == 'no data'
    assert tool.why(['Traceback\n', 'ValueError: x\n', '\n']) == 'ValueError: x'
    assert tool.why([]) == 'the test ended without a word'
    line = '11/27 - mmengine - INFO - Epoch(test)  [  50/5000]    eta: 0:10:03  time: 0.1  data: 0'
    assert tool.progress(line) == '50/5000, 0:10:03 to go'
    assert tool.progress('   43% of 12.0 MB, 3 MB/s\n') == '43% of 12.0 MB, 3 MB/s'
    assert tool.progress('loading') is None


# --------------------------------------------------------------------------------- a whole table

CLASSIFIER = """
_base_ = '{configs}/gcvit/gcvit_xxt_imagenet.py'
model = dict(backbone=dict(arch=dict(_delete_=True, **{arch})), head=dict(in_channels=256))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=64),
    dict(type='PackInputs'),
]
quick = dict(batch_size=4, num_workers=0, persistent_workers=False)
test_dataloader = dict(dataset=dict(pipeline=test_pipeline), **quick)
"""
DETECTOR = """
_base_ = '{configs}/gcvit/demo_cascade_mask_rcnn_gcvit.py'
model = dict(test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)))
test_dataloader = dict(num_workers=0, persistent_workers=False)
"""
METAFILE = """
Models:
  - Name: classifier
    Config: configs/own/classifier.py
    Weights: {address}/classifier.pth.tar
    Results:
      - {{Task: Image Classification, Dataset: ImageNet-1k, Metrics: {{Top 1 Accuracy: 16.7}}}}
  - Name: detector
    Config: configs/own/detector.py
    Weights: {address}/detector.pth
    Results:
      - {{Task: Object Detection, Dataset: COCO, Metrics: {{box AP: 99.9}}}}
  - Name: unpublished
    Config: configs/own/detector.py
"""
OWN_TABLES = """
datasets:
  missing: {test_dataloader.dataset.data_root: nowhere}
tables:
  own:
    title: Two small models
    rows:
      classifier:
      detector:
      astray: {model: detector, dataset: missing}
      unpublished:
"""


@pytest.fixture
def server(tmp_path):
    """A server of a folder; it waits before it sends the detector until `release` is set."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if self.path == '/detector.pth':
                asked.set()
                release.wait(300)
            super().do_GET()

        def log_message(self, *_):
            """Print no line for each request."""

    folder, requests = tmp_path / 'served', []
    folder.mkdir()
    asked, release = threading.Event(), threading.Event()
    http = ThreadingHTTPServer(
        ('127.0.0.1', 0), lambda *args: Handler(*args, directory=str(folder))
    )
    http.folder, http.requests, http.asked, http.release = folder, requests, asked, release
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    release.set()
    http.shutdown()
    http.server_close()


@pytest.fixture
def project(tmp_path, server):
    """Generated images, two small models' configs and published files, and their table."""
    own = tmp_path / 'configs/own'
    own.mkdir(parents=True)
    configs = ROOT / 'configs'
    arch = published.SMALL['gcvit']
    (own / 'classifier.py').write_text(CLASSIFIER.format(configs=configs, arch=arch))
    (own / 'detector.py').write_text(DETECTOR.format(configs=configs))
    address = f'http://127.0.0.1:{server.server_port}'
    (own / 'metafile.yml').write_text(METAFILE.format(address=address))
    (own.parent / 'tables.yml').write_text(OWN_TABLES)

    model = published.build('gcvit/gcvit_xxt_imagenet', 'small')
    model.init_weights()
    model.head.fc.bias.data[0] = 1e4  # finds the first class in every image
    state = published.classifier_file(model, 'gcvit')
    published.CONTAINERS["timm's training"](state, server.folder / 'classifier.pth.tar')
    model = published.build('gcvit/demo_cascade_mask_rcnn_gcvit')
    state = published.model_file(model, 'gcvit')
    published.CONTAINERS['mmdet 2'](state, server.folder / 'detector.pth')

    for layout, num in dict(imagenet=12, coco=3).items():
        options = ['--format', layout, '--train', 1, '--val', num, '--size', 96]
        run_tool('misc/make_demo_dataset', tmp_path / layout, *options)
    return tmp_path


def start(project):
    environment = dict(
        os.environ,
        MMATTN_IMAGENET='imagenet',
        MMATTN_COCO='coco',
        TORCH_HOME=str(project / 'cache'),
        PYTHONPATH=str(ROOT),
        NO_PROXY='127.0.0.1',
        no_proxy='127.0.0.1',
    )
    environment.pop('MMATTN_WEIGHTS', None)
    return subprocess.Popen(
        [sys.executable, TOOLS / 'reproduce.py', 'own', '--tables', 'configs/tables.yml'],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Jobs in the background ignore it, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_a_table_is_tested_interrupted_and_resumed(project, server):
    run = start(project)
    arrived = server.asked.wait(300)
    os.killpg(run.pid, signal.SIGINT)  # ^C, which reaches all processes
    printed, _ = run.communicate(timeout=300)
    assert arrived, printed
    assert run.returncode == 130, printed
    assert 'interrupted in detector' in printed
    out = project / 'work_dirs/reproduce/own'
    outcome = (out / 'classifier/outcome.json').read_text()
    assert json.loads(outcome)['measured']['Top 1 Accuracy'] == '16.667'
    assert not (out / 'detector/outcome.json').exists()
    logged = (out / 'classifier/test.log').stat().st_mtime_ns

    server.release.set()
    run = start(project)
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 2, printed  # a row fails
    assert re.search(r'^\[1/3\] classifier: http.*\n  tested before\n  Top 1 ', printed, re.M)
    assert printed.rstrip().endswith('1 of 3 rows failed: astray')
    assert (out / 'classifier/outcome.json').read_text() == outcome
    assert (out / 'classifier/test.log').stat().st_mtime_ns == logged
    assert server.requests.count('/classifier.pth.tar') == 1

    (report,) = out.glob('detector/test/*/*.json')
    measured = f'{100 * json.loads(report.read_text())["coco/bbox_mAP"]:.1f}'
    difference = f'{Decimal(measured) - Decimal("99.9"):+}'
    text = (out / 'own.md').read_text()
    assert text in printed
    for line in (
        '# Two small models',
        '| classifier | Top 1 Accuracy | 16.7 | 16.667 | -0.033 | within the rounding |',
        f'| detector | box AP | 99.9 | {measured} | {difference} | lower |',
        '| astray |  |  |  |  | failed |',
        '| unpublished |  |  |  |  | not tested: train it first |',
    ):
        assert f'{line}\n' in text
    assert re.search(r'^- astray: http.*: failed: test_dataloader looks for nowhere, ', text, re.M)
    content = json.loads((out / 'own.json').read_text())
    assert content['title'] == 'Two small models'
    assert [line['measured'] for line in content['lines']] == ['16.667', measured, None, None]
    assert content['tests']['classifier'] == json.loads(outcome)
    height, width, _ = imread(out / 'own.png').shape
    assert width > height > 100
