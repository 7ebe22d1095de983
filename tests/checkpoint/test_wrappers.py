"""Names that wrappers, distillers and compilers add to."""

import pytest
import torch
from helpers import published
from helpers.small_backbones import small
from torch import nn

from mmattn.checkpoint import CheckpointError, load_checkpoint

FAMILY = {'gcvit': 'gcvit', 'dat': 'dat', 'dat++': 'dat', 'quadtree': 'quadtree'}
every_family = pytest.mark.parametrize('kind', FAMILY)
origins = pytest.mark.parametrize('names', ['own', 'published'])


def state_of(kind, names):
    state = small(kind).state_dict()
    return state if names == 'own' else published.NAMES[FAMILY[kind]](state)


def assert_loads(kind, state, **options):
    expected, model = small(kind).state_dict(), small(kind, seed=1)
    report = load_checkpoint(model, state, **options)
    assert not report.fresh and not report.resized
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    return report


@every_family
@origins
@pytest.mark.parametrize(
    'prefix',
    [
        'module.',
        '_orig_mod.',
        'module._orig_mod.',
        'model.',
        'model.backbone.',
        'module.student._orig_mod.backbone.',
        'encoder_q.0.',
        'base.net.model.',
    ],
)
def test_one_prefix_before_all_names(kind, names, prefix):
    state = {prefix + name: value for name, value in state_of(kind, names).items()}
    assert_loads(kind, state)


@every_family
@origins
@pytest.mark.parametrize('wrapper', ['_orig_mod.', '_checkpoint_wrapped_module.'])
def test_wrapped_blocks(kind, names, wrapper):
    state = {}
    for name, value in state_of(kind, names).items():
        parts = name.split('.')
        state['.'.join([*parts[:-2], wrapper + parts[-2], parts[-1]])] = value
    assert_loads(kind, state)


def test_wrapped_by_torch():
    model = small('gcvit')
    averaged = torch.optim.swa_utils.AveragedModel(model).state_dict()
    assert 'n_averaged' in averaged
    assert_loads('gcvit', averaged)
    assert_loads('gcvit', torch.compile(model, backend='eager').state_dict())


@every_family
@origins
def test_of_two_models_one_is_chosen_by_its_prefix(kind, names):
    other = small(kind, seed=2).state_dict()
    state = {f'teacher.backbone.{name}': value for name, value in other.items()}
    state |= {f'student.backbone.{k}': v for k, v in state_of(kind, names).items()}
    with pytest.raises(CheckpointError, match=r"below 'teacher\.' and 'student\.': choose one"):
        load_checkpoint(small(kind), state)
    for prefix in ('student.', 'student', 'student.backbone', 'student.backbone.'):
        report = assert_loads(kind, state, prefix=prefix)
        assert sum('not below' in reason for reason in report.dropped.values()) >= len(other)


@every_family
def test_heads_below_the_prefix_are_loaded(kind):
    class Detector(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.backbone = small(kind, seed)
            self.bbox_head = nn.Linear(4, 5)

    trained, model = Detector(0), Detector(1)
    state = {f'model.{name}': value for name, value in trained.state_dict().items()}
    state['loss.weight'] = torch.ones(3)
    report = load_checkpoint(model, state)
    assert report.dropped == {'loss.weight': "not below 'model.'"}
    assert torch.equal(model.bbox_head.weight, trained.bbox_head.weight)


@every_family
@pytest.mark.parametrize('prefix', ['backbone', 'backbone.', 'model.backbone.', 'model'])
def test_prefix_in_init_cfg(kind, prefix, tmp_path):
    trained, root = small(kind), prefix.split('backbone')[0].rstrip('.')
    state = {
        f'{root + "." if root else ""}backbone.{k}': v for k, v in trained.state_dict().items()
    }
    torch.save(dict(state_dict=state), tmp_path / 'file.pth')
    config = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'), prefix=prefix)
    model = small(kind, seed=1, init_cfg=config)
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name
