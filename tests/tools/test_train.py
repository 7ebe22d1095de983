"""tools/train.py up to the Runner; test_main_job.py runs the whole."""

import os
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from mmengine.config import Config

from mmattn.engine import runtime
from mmattn.engine.resuming import last_good

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / 'configs/gcvit/cascade_mask_rcnn_gcvit_t_coco.py')


@pytest.fixture
def train(load_tool):
    return load_tool('train')


@pytest.fixture
def data(monkeypatch, tmp_path):
    """Files whose existence train.py checks."""
    for name in ('instances_train2017.json', 'instances_val2017.json'):
        path = tmp_path / 'coco/annotations' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setenv('MMATTN_COCO', str(tmp_path / 'coco'))


@pytest.fixture
def run(train, monkeypatch, tmp_path):
    """Run main() with options; return the config that would be trained."""

    def run(*options, config=CONFIG):
        built = []

        class FakeRunner:
            model = torch.nn.Module()

            def train(self):
                pass

        monkeypatch.setattr(train, 'build_runner', lambda cfg: built.append(cfg) or FakeRunner())
        argv = ['train.py', config, '--work-dir', str(tmp_path / 'run'), *options]
        monkeypatch.setattr(sys, 'argv', argv)
        train.main()
        return built[0]

    return run


def complaint(run, capsys, *options, **kwargs):
    """The one line with which the tool ends, at status 2."""
    with pytest.raises(SystemExit) as stop:
        run(*options, **kwargs)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1, error
    return error


def test_missing_data_folder_names_path_and_variable(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv('MMATTN_COCO', str(tmp_path / 'nowhere'))
    error = complaint(run, capsys)
    assert str(tmp_path / 'nowhere') in error
    assert 'MMATTN_COCO' in error


def test_missing_annotations_are_named(run, data, capsys, tmp_path):
    (tmp_path / 'coco/annotations/instances_val2017.json').unlink()
    assert 'instances_val2017.json' in complaint(run, capsys)


def test_missing_config_file(run, capsys):
    assert 'configs/none.py' in complaint(run, capsys, config='configs/none.py')


@pytest.mark.parametrize('variable', runtime.RANKS)
def test_only_rank_0_prints(run, monkeypatch, capsys, variable):
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setenv(variable, '1')
    with pytest.raises(SystemExit):
        run(config='configs/none.py')
    assert capsys.readouterr().err == ''


def test_options_reach_the_runner(run, data, tmp_path):
    cfg = run('--cfg-options', 'compile=True', 'train_dataloader.batch_size=1', '--auto-scale-lr')
    assert cfg.compile is True
    assert cfg.train_dataloader.batch_size == 1
    assert cfg.auto_scale_lr.enable is True
    assert cfg.work_dir == str(tmp_path / 'run')
    assert cfg.launcher == 'none'
    assert cfg.resume is False


def test_auto_scale_lr_needs_a_batch_size(run, data, capsys):
    error = complaint(run, capsys, '--auto-scale-lr', '--cfg-options', 'auto_scale_lr._delete_=1')
    assert 'base_batch_size' in error


def test_auto_scale_lr_counts_accumulated_batches(run, data):
    cfg = run('--auto-scale-lr', '--cfg-options', 'optim_wrapper.accumulative_counts=4')
    assert cfg.auto_scale_lr.base_batch_size == 16 / 4


def test_a_model_spread_over_processes_needs_some(run, data, capsys):
    error = complaint(run, capsys, config=str(ROOT / 'configs/gcvit/dino_gcvit_l_fsdp_coco.py'))
    assert 'tools/dist_train.sh' in error


# ---- An earlier run


def good_checkpoint(path, age=0):
    torch.save(dict(state_dict={}, meta=dict(seed=1), optimizer={}), path)
    os.utime(path, (time.time() - age,) * 2)
    return str(path)


@pytest.fixture
def work_dir(tmp_path):
    (tmp_path / 'run').mkdir()
    return tmp_path / 'run'


def test_an_earlier_run_is_not_overwritten(run, data, work_dir, capsys):
    good_checkpoint(work_dir / 'epoch_3.pth')
    error = complaint(run, capsys)
    for word in (str(work_dir), 'epoch_3.pth', '--resume', '--work-dir'):
        assert word in error


def test_a_folder_is_for_one_training(run, data, work_dir, capsys, monkeypatch):
    with FileLock(work_dir / '.lock'):
        assert f'{work_dir} is in use by another training' in complaint(run, capsys)
        for rank in runtime.RANKS:  # other processes of the training that holds it
            with monkeypatch.context() as context:
                context.setenv(rank, '1')
                run()
    run()
    run()  # the first has released it


def test_a_folder_without_checkpoints_is_used(run, data, work_dir):
    (work_dir / '20260101_000000').mkdir()
    assert not run().resume


def test_resume_from_a_path(run, data, work_dir, capsys):
    path = good_checkpoint(work_dir / 'epoch_3.pth')
    cfg = run('--resume', path)
    assert (cfg.resume, cfg.load_from) == (True, path)
    assert 'epoch_9.pth' in complaint(run, capsys, '--resume', 'epoch_9.pth')


def test_resume_auto_without_checkpoints_starts_anew(run, data):
    cfg = run('--resume')
    assert (cfg.resume, cfg.load_from) == (False, None)


@pytest.mark.parametrize('option', [['--resume'], ['--resume', 'auto']])
def test_resume_auto_takes_the_last(run, data, work_dir, option):
    good_checkpoint(work_dir / 'epoch_1.pth', age=60)
    last = good_checkpoint(work_dir / 'epoch_2.pth')
    (work_dir / 'last_checkpoint').write_text(last)
    assert run(*option).load_from == last


@pytest.mark.parametrize('pointer', ['', 'epoch_2.pth', 'gone.pth', None])
def test_resume_auto_survives_what_a_crash_leaves(run, data, work_dir, pointer, capsys):
    """A truncated checkpoint, and a `last_checkpoint` that is empty, names it, or is missing."""
    good_checkpoint(work_dir / 'epoch_0.pth', age=60)
    last = good_checkpoint(work_dir / 'epoch_1.pth', age=30)
    content = Path(good_checkpoint(work_dir / 'epoch_2.pth')).read_bytes()
    (work_dir / 'epoch_2.pth').write_bytes(content[: len(content) // 2])
    if pointer is not None:
        (work_dir / 'last_checkpoint').write_text(pointer and str(work_dir / pointer))
    assert run('--resume').load_from == last


TOY_RUN = """
import os, resource, sys
import torch
from mmattn.engine.resuming import let_mmengine_read
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.fileio import LocalBackend, register_backend
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader, TensorDataset

config, work_dir, accident = sys.argv[1:4]
hook = Config.fromfile(config).default_hooks.checkpoint  # the real one

class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 100000)
    def forward(self, x, mode='tensor'):
        return dict(loss=self.layer(x).mean())

let_mmengine_read()
written = []
def put(self, obj, filepath, LocalPut=LocalBackend.put):
    written.append(filepath)
    if len(written) == 3 and accident == 'kill':
        with open(filepath, 'wb') as file:
            file.write(obj[:len(obj) // 2])
        os.kill(os.getpid(), 9)
    if len(written) == 3 and accident == 'full_disk':
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(obj) // 2, resource.RLIM_INFINITY))
    LocalPut(self, obj, filepath)
LocalBackend.put = put

resume = dict(resume=True, load_from=sys.argv[4]) if accident == 'resume' else {}
runner = Runner(
    Toy(), work_dir, train_dataloader=DataLoader(TensorDataset(torch.ones(2, 1))),
    train_cfg=dict(by_epoch=True, max_epochs=4),
    optim_wrapper=dict(optimizer=dict(type='SGD', lr=.1)),
    default_hooks=dict(checkpoint=hook), default_scope='mmengine', log_level='WARNING', **resume)
runner.train()
print('ended at epoch', runner.epoch)
"""


@pytest.mark.parametrize('accident', ['kill', 'full_disk'])
def test_an_accident_while_saving_keeps_a_good_checkpoint(accident, tmp_path):
    """mmengine's hook with our configs' options; the third checkpoint is truncated."""
    script = tmp_path / 'toy.py'
    script.write_text(textwrap.dedent(TOY_RUN))
    work_dir = tmp_path / 'run'

    def toy(*arguments):
        return subprocess.run(
            [sys.executable, script, CONFIG, work_dir, *arguments],
            capture_output=True,
            text=True,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
        )

    broken = toy(accident)
    assert broken.returncode != 0
    if accident == 'full_disk':
        assert 'OSError' in broken.stderr
    assert not zipfile.is_zipfile(work_dir / 'epoch_3.pth')
    good, reasons = last_good(work_dir)
    assert good.name == 'epoch_2.pth' and reasons == []
    resumed = toy('resume', good)
    assert 'ended at epoch 4' in resumed.stdout, resumed.stderr
    assert Path((work_dir / 'last_checkpoint').read_text()).name == 'epoch_4.pth'


# ---- A machine without a GPU


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(runtime, 'get_device', lambda: 'cpu')


def test_amp_without_a_gpu_is_float32(run, data, cpu):
    cfg = run('--amp')
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    assert 'loss_scale' not in cfg.optim_wrapper
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'


def test_amp_with_a_gpu(run, data, monkeypatch):
    monkeypatch.setattr(runtime, 'get_device', lambda: 'cuda')
    cfg = run('--amp')
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.loss_scale) == ('AmpOptimWrapper', 'dynamic')


def test_several_processes_without_a_gpu(run, data, cpu, monkeypatch):
    groups = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', groups.append)
    cfg = run('--launcher', 'pytorch')
    assert groups == ['gloo']
    assert cfg.model_wrapper_cfg.device_ids is None
    assert 'SyncBN' not in Config(dict(model=cfg.model)).pretty_text


def test_slurm_needs_gpus(run, data, cpu, capsys):
    assert '--launcher slurm' in complaint(run, capsys, '--launcher', 'slurm')


@pytest.mark.parametrize('script', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_launch_scripts(script, tmp_path):
    """The scripts pass on every argument, also one with a space."""
    for program in ('srun', 'python'):
        path = tmp_path / program
        path.write_text('#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@"\n')
        path.chmod(0o755)
    first = {
        'dist_train': ['c.py', '2'],
        'dist_test': ['c.py', 'k.pth', '2'],
        'slurm_train': ['gpus', 'job', 'c.py', 'out'],
        'slurm_test': ['gpus', 'job', 'c.py', 'k.pth'],
    }[script]
    tool = ROOT / 'tools' / f'{script}.sh'
    env = dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}', SRUN_ARGS='--qos a')
    env.pop('PYTHON', None)

    def start(*arguments):
        return subprocess.run([tool, *arguments], capture_output=True, text=True, env=env)

    words = start(*first, '--cfg-options', 'a=1 2').stdout.splitlines()
    assert words[0] == ('srun' if 'slurm' in script else 'python')
    assert words[-2:] == ['--cfg-options', 'a=1 2']
    assert any(word.endswith(f'tools/{script.split("_")[1]}.py') for word in words)
    assert ('--nproc_per_node=2' in words) == ('dist' in script)
    assert ('--qos' in words) == ('slurm' in script)
    assert words[words.index('--launcher') + 1] == ('slurm' if 'slurm' in script else 'pytorch')
    wrong = start(first[0])
    assert wrong.returncode == 2
    assert 'CONFIG' in wrong.stderr
