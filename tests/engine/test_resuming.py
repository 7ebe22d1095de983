"""Which checkpoint a training goes on from, and weights that are not finite."""

import shutil
import zipfile

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mmattn.checkpoint import CheckpointError
from mmattn.engine.resuming import last_good, let_mmengine_read, misfits, read_training


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 50)

    def forward(self, x, mode='tensor'):
        return dict(loss=self.layer(x).square().mean())


def train(work_dir, epochs=3, hooks=(), **options):
    data = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    runner = Runner(
        Toy(), str(work_dir), train_dataloader=DataLoader(TensorDataset(data), batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        default_hooks=dict(invalid_loss=dict(type='InvalidLossHook')), custom_hooks=list(hooks),
        default_scope='mmengine', log_level='ERROR', randomness=dict(seed=3), **options,
    )  # fmt: skip
    runner.train()
    return runner


@pytest.fixture
def work_dir(tmp_path):
    torch.manual_seed(0)
    train(tmp_path / 'run')
    return tmp_path / 'run'


def change(path, **parts):
    torch.save(torch.load(path, weights_only=False) | parts, path)


def zero_largest_record(path):
    """Damage a file as a power failure does."""
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    start = data.index(info.filename.encode(), info.header_offset) + len(info.filename) + 100
    data[start : start + info.file_size - 100] = bytes(info.file_size - 100)
    path.write_bytes(data)


def test_the_newest_good_one(work_dir):
    assert last_good(work_dir) == (work_dir / 'epoch_3.pth', [])


@pytest.mark.parametrize('fault', ['NaN', 'zeros', 'short', 'weights alone'])
def test_faulty_ones_are_passed_over_with_the_reason(work_dir, fault):
    newest = work_dir / 'epoch_3.pth'
    if fault == 'NaN':
        state = torch.load(newest, weights_only=False)['state_dict']
        state['layer.bias'][3] = torch.nan
        change(newest, state_dict=state)
    elif fault == 'zeros':
        zero_largest_record(newest)
    elif fault == 'short':
        newest.write_bytes(newest.read_bytes()[:-100])
    else:
        torch.save(Toy().state_dict(), newest)
    good, reasons = last_good(work_dir)
    assert good == work_dir / 'epoch_2.pth'
    expected = dict(NaN='NaN or infinity in 1 tensors, such as layer.bias', zeros='checksum',
                    short='damaged', **{'weights alone': 'has no state_dict'})[fault]  # fmt: skip
    assert len(reasons) == 1 and 'epoch_3.pth' in reasons[0] and expected in reasons[0]


def test_a_copied_folder_goes_on_from_itself(work_dir, tmp_path):
    shutil.copytree(work_dir, tmp_path / 'copy')
    assert last_good(tmp_path / 'copy') == (tmp_path / 'copy/epoch_3.pth', [])


@pytest.mark.parametrize('pointer', ['', '\0', 'nowhere.pth', '/etc/passwd', 'a\nb', '..'])
def test_any_last_checkpoint(work_dir, pointer):
    (work_dir / 'last_checkpoint').write_text(pointer)
    good, reasons = last_good(work_dir)
    assert good == work_dir / 'epoch_3.pth'
    assert len(reasons) == 1 and 'names no checkpoint of this folder' in reasons[0]


@pytest.mark.parametrize(
    'content', [[1], dict(state_dict={}), dict(state_dict={}, meta=None, optimizer={})]
)
def test_what_is_no_training_is_refused(content, tmp_path):
    torch.save(content, tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match='a training cannot go on from it'):
        read_training(tmp_path / 'file.pth')


def test_other_models_are_told(work_dir):
    checkpoint = read_training(work_dir / 'epoch_3.pth')
    assert misfits(Toy(), checkpoint) == []
    other = Toy()
    other.layer, other.more = nn.Linear(5, 50), nn.Linear(1, 1)
    assert misfits(other, checkpoint) == ['more.bias', 'more.weight', 'layer.weight']


def test_resuming_keeps_the_logs(work_dir):
    let_mmengine_read()
    checkpoint = read_training(work_dir / 'epoch_3.pth')
    assert isinstance(checkpoint['message_hub']['log_scalars']['train/loss'], HistoryBuffer)
    resumed = train(work_dir, epochs=4, resume=True, load_from=str(work_dir / 'epoch_3.pth'))
    assert resumed.epoch == 4
    log = resumed.message_hub.get_scalar('train/loss').data[0]
    before = checkpoint['message_hub']['log_scalars']['train/loss'].data[0]
    assert len(before) == 6 and len(log) > 6 and (log[:6] == before).all()


class BadGradient(Hook):
    """Makes a gradient NaN or infinite in the third iteration."""

    priority = 'HIGHEST'

    def __init__(self, number):
        self.number = number

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2:
            runner.model.layer.weight.register_hook(lambda grad: torch.full_like(grad, self.number))


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_a_gradient_that_is_not_finite_ends_training_before_it_is_saved(number, tmp_path):
    match = r'weights are not finite after iteration 3 .*such as layer\.weight.*--resume goes on'
    with pytest.raises(FloatingPointError, match=match):
        train(tmp_path / 'run', hooks=[BadGradient(number)])
    good, reasons = last_good(tmp_path / 'run')
    assert good.name == 'epoch_1.pth' and reasons == []
