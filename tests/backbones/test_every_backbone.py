"""Properties of every backbone."""

import copy
import pickle
import re

import pytest
import torch
from helpers import published
from helpers.small_backbones import KINDS, channels, small
from torch import nn

from mmattn.checkpoint import load_checkpoint

every_kind = pytest.mark.parametrize('kind', KINDS)
FAMILY = {kind: kind.split('+')[0].split(' ')[0] for kind in KINDS}


def gradients(model, x, seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = model(x)
    sum(out.square().sum() for out in outputs).backward()
    return [*outputs, *(p.grad for p in model.parameters())]


# ------------------------------------------------------------------------------------- maps


@every_kind
@pytest.mark.parametrize(
    'height, width',
    [(32, 32), (33, 95), (97, 64), (61, 200), (31, 64), (1, 1), (20, 333), (130, 7)],
)
def test_any_image_size(kind, height, width):
    outputs = small(kind)(torch.randn(1, 3, height, width))
    for i, (out, dim) in enumerate(zip(outputs, channels(kind), strict=True)):
        stride = 2 ** (i + 2)
        assert out.shape == (1, dim, -(-height // stride), -(-width // stride))
        assert out.is_contiguous() and out.isfinite().all()


@every_kind
def test_thin_images_are_completed_with_zeros(kind):
    model, x = small(kind).double(), torch.randn(1, 3, 20, 70, dtype=torch.float64)
    whole = model(nn.functional.pad(x, (0, 0, 0, 12)))
    for thin, full in zip(model(x), whole, strict=True):
        torch.testing.assert_close(thin, full[:, :, : thin.shape[2], : thin.shape[3]])


@every_kind
def test_images_of_a_batch_do_not_mix(kind):
    model = small(kind).double()
    x = torch.randn(2, 3, 70, 101, dtype=torch.float64)
    for both, alone in zip(model(x), model(x[1:]), strict=True):
        torch.testing.assert_close(both[1:], alone)


@every_kind
@pytest.mark.parametrize('in_channels', [1, 4])
def test_other_channels(kind, in_channels):
    model = small(kind, in_channels=in_channels)
    assert model(torch.randn(1, in_channels, 40, 64))[3].shape[1] == channels(kind)[3]
    with pytest.raises(ValueError, match=rf'x must be images \(B, {in_channels}, H, W\)'):
        model(torch.randn(1, 3, 40, 64))


@every_kind
def test_gray_images_of_a_color_file(kind):
    """A file for RGB, loaded for one channel, gives the outputs of three equal channels."""
    color, gray = small(kind), small(kind, seed=1, in_channels=1)
    gray.load_state_dict(color.state_dict())
    x = torch.randn(1, 1, 64, 64)
    for a, b in zip(gray(x), color(x.expand(-1, 3, -1, -1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.no_backend
@every_kind
@pytest.mark.parametrize('shape', [(1, 1, 64, 64), (3, 64, 64), (1, 3, 0, 64)])
def test_image_errors_give_the_shape(kind, shape):
    with pytest.raises(ValueError, match='x must be images .*' + re.escape(str(shape))):
        small(kind)(torch.randn(shape))


# -------------------------------------------------------------------------------- training


@every_kind
@pytest.mark.parametrize('with_cp', [False, True])
def test_empty_batches_train(kind, with_cp):
    """As on a rank without images; every parameter has a gradient all the same."""
    model = small(kind, with_cp=with_cp, drop_path_rate=0.2).train()
    outputs = model(torch.randn(0, 3, 64, 96))
    for i, (out, dim) in enumerate(zip(outputs, channels(kind), strict=True)):
        assert out.shape == (0, dim, 64 // 2 ** (i + 2), 96 // 2 ** (i + 2))
    sum(out.square().sum() for out in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@every_kind
def test_checkpointing_saves_memory_and_keeps_gradients(kind):
    x = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    results, stored = [], []
    for with_cp in (False, True):
        model = small(kind, with_cp=with_cp, drop_path_rate=0.2).double().train()
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(gradients(model, x))
        stored.append(sum(saved.values()))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain)
    assert stored[1] < 0.75 * stored[0]


@pytest.mark.no_backend
@every_kind
@pytest.mark.parametrize('frozen', range(-1, 5))
def test_frozen_stages(kind, frozen):
    model = small(kind, frozen_stages=frozen, drop_path_rate=0.5)
    before_training = [p.requires_grad for p in model.parameters()]
    model.train()
    parts = [(model.stem, 0)]
    for i, stage in enumerate(model.stages):
        parts += [(stage.blocks, i + 1), (getattr(model, f'norm{i}', stage.norm), i + 1)]
        # As in Swin, the downsampling behind the last frozen stage is frozen with it.
        parts += [(stage.downsample, max(i, 1))] if i else []
    for module, level in parts:
        is_frozen = level <= frozen
        assert module.training is not is_frozen
        assert all(p.requires_grad is not is_frozen for p in module.parameters())
    assert before_training == [p.requires_grad for p in model.parameters()]


@pytest.mark.no_backend
@every_kind
def test_frozen_stages_thaw(kind):
    """Unfreeze, as a hook may during training."""
    model = small(kind, frozen_stages=2, drop_path_rate=0.5).train()
    model.frozen_stages = -1
    model.requires_grad_(True)
    model.train()
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@every_kind
def test_stages_without_an_output_are_not_built(kind):
    model = small(kind, out_indices=(0, 2)).train()
    outputs = model(torch.randn(2, 3, 64, 70))
    assert [out.shape[1] for out in outputs] == [channels(kind)[i] for i in (0, 2)]
    sum(out.square().sum() for out in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(model.stages) == 3


@every_kind
def test_drop_path_rises_from_zero_and_is_off_in_evaluation(kind):
    model, x = small(kind, drop_path_rate=0.9), torch.randn(2, 3, 32, 32)
    rates = [block.residual.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.9 * i / (len(rates) - 1) for i in range(len(rates))])
    assert torch.equal(model(x)[3], model(x)[3])
    model.train()
    assert not torch.equal(model(x)[3], model(x)[3])


@every_kind
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(kind, dtype):
    # All keys are kept: rounding may flip the choice of keys, which is no error.
    options = dict(topks=1000) if 'quadtree' in kind else {}
    model = small(kind, drop_path_rate=0.0, **options).train()
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        exact = model(x)
    with torch.autocast('cpu', dtype):
        outputs = model(x)
    for out, reference in zip(outputs, exact, strict=True):
        assert (out.float() - reference).norm() < 0.05 * reference.norm()
    sum(out.float().square().mean() for out in outputs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------- layers, copies, programs


@every_kind
def test_every_layer_with_weights_is_called_as_a_module(kind):
    """Hooks, adapters, pruning and quantization work on the modules that they find."""
    model = small(kind).train()
    called = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(torch.randn(1, 3, 70, 64))
    with_weights = {
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    assert with_weights <= called


@every_kind
def test_replaced_layers_take_part(kind):
    """Adapters around all linear layers get gradients, with and without padding."""

    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.delta = nn.Linear(layer.in_features, layer.out_features)

        def forward(self, x):
            return self.layer(x) + self.delta(x)

    model = small(kind, drop_path_rate=0.0).requires_grad_(False).train()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        parent, _, child = name.rpartition('.')
        owner = model.get_submodule(parent)
        setattr(owner, child, Adapter(getattr(owner, child)))
    gradients_of = [p for p in model.parameters() if p.requires_grad]
    assert len(gradients_of) == 2 * len(names)
    for size in ((64, 96), (70, 101)):
        model.zero_grad()
        sum(out.square().sum() for out in model(torch.randn(1, 3, *size))).backward()
        without = [
            name
            for name in names
            if not model.get_submodule(f'{name}.delta').weight.grad.abs().sum()
        ]
        assert without == []


@pytest.mark.no_backend
@every_kind
def test_parameters_are_contiguous(kind):
    assert all(p.is_contiguous() for p in small(kind).parameters())


@every_kind
def test_copies_and_pickles(kind):
    model, x = small(kind), torch.randn(1, 3, 64, 40)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(model(x), twin(x), strict=True))
        twin.load_state_dict(small(kind, seed=1).state_dict())
        assert not torch.equal(model(x)[3], twin(x)[3])


@pytest.mark.no_backend
@every_kind
def test_compiles_to_one_graph(kind):
    # The first two stages have every kind of block; more would be compiled again.
    model = small(kind, out_indices=(0, 1)).double()
    x = torch.randn(1, 3, 70, 64, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for a, b in zip(model(x), compiled(x), strict=True):
            torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------ state dicts


@pytest.mark.no_backend
@every_kind
def test_names_are_the_same_for_all(kind):
    block = r'stages\.\d\.blocks\.\d\.((conv|norm1|attn|norm2|mlp)\..*|gamma[12])'
    rest = r'stem\..*|stages\.[123]\.downsample\..*|norm\d\..*'
    own = r'|stages\.\d\.norm\..*' if 'quadtree' in kind else r'|stages\.\d\.global_query\..*'
    for name in small(kind).state_dict():
        assert re.fullmatch(f'{block}|{rest}{own}', name), name


@pytest.mark.no_backend
@every_kind
def test_published_names_load_by_load_state_dict(kind):
    source, model = small(kind), small(kind, seed=1)
    state = published.NAMES[FAMILY[kind]](source.state_dict())
    assert set(state) != set(source.state_dict())
    model.load_state_dict(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    whole = nn.ModuleDict(dict(backbone=small(kind, seed=2), bbox_head=nn.Linear(2, 2)))
    heads = {n: v for n, v in whole.state_dict().items() if n.startswith('bbox_head')}
    whole.load_state_dict({f'backbone.{name}': v for name, v in state.items()} | heads)
    for name, value in whole['backbone'].state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


@pytest.mark.no_backend
@every_kind
def test_load_state_dict_reports_what_does_not_fit(kind):
    model = small(kind)
    state = published.NAMES[FAMILY[kind]](model.state_dict())
    some = next(name for name in state if name.endswith('fc1.weight') or 'linear1' in name)
    with pytest.raises(RuntimeError, match=r'Missing key.*fc1\.weight'):
        model.load_state_dict({n: v for n, v in state.items() if n != some})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*foreign'):
        model.load_state_dict(state | {'foreign': torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r'size mismatch for .*fc1\.weight'):
        model.load_state_dict(state | {some: torch.zeros(3, 3)})


@pytest.mark.no_backend
@pytest.mark.parametrize(
    'kind, options',
    [('gcvit', dict(window_size=(6, 6, 6, 6))), ('dat', dict(img_size=64, window_size=4))],
)
def test_load_state_dict_resizes_tables(kind, options):
    source, model, twin = small(kind), small(kind, 1, **options), small(kind, 2, **options)
    model.load_state_dict(source.state_dict())
    assert load_checkpoint(twin, source.state_dict()).resized
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])


def names_of_0_1_0(kind, state):
    """Parameter names of release 0.1.0: the authors', except for some of DAT."""
    state = published.NAMES[FAMILY[kind]](state)
    state = {n: v for n, v in state.items() if not n.endswith(('_index', 'attn_mask'))}
    if not kind.startswith('dat'):
        return state
    renamed = {}
    for name, value in state.items():
        name = re.sub(r'^norms\.(\d)\.norm\.', r'norm\1.', name)
        name = re.sub(r'(layer_norms\.\d+)\.norm\.', r'\1.', name)
        if kind == 'dat':
            name = re.sub(r'^(patch_proj|down_projs\.\d)\.0\.', r'\1.conv.', name)
            name = re.sub(r'^(patch_proj|down_projs\.\d)\.1\.norm\.', r'\1.norm.norm.', name)
        table = re.sub(r'proj_(qkv|out)\.\w+$', 'relative_position_bias_table', name)
        if table in state and table != name:
            name = name.replace('proj_qkv.', 'qkv.').replace('proj_out.', 'proj.')
        name = re.sub(r'\.mlps\.(\d+)\.(?:chunk\.)?linear([12])\.(?:0\.)?', r'.mlps.\1.fc\2.', name)
        renamed[name] = (
            value.flatten(1) if '.mlps.' in name and '.fc' in name and value.ndim > 1 else value
        )
    return renamed


@pytest.mark.no_backend
@every_kind
def test_files_of_0_1_0_load(kind):
    source, model = small(kind), small(kind, seed=1)
    model.load_state_dict(names_of_0_1_0(kind, source.state_dict()))
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


# ---------------------------------------------------------------------- registry, arguments


@pytest.mark.no_backend
@every_kind
def test_registered_for_every_task(kind):
    from mmdet.registry import MODELS as MMDET
    from mmengine.registry import MODELS
    from mmpretrain.registry import MODELS as MMPRETRAIN
    from mmseg.registry import MODELS as MMSEG

    backbone, arch, _ = KINDS[kind]
    for registry in (MODELS, MMDET, MMSEG, MMPRETRAIN):
        assert isinstance(registry.build(dict(type=backbone.__name__, arch=arch)), backbone)
    for scope in ('mmdet', 'mmseg', 'mmpretrain'):
        assert MODELS.get(f'{scope}.{backbone.__name__}') is backbone


@pytest.mark.no_backend
@every_kind
def test_layer_depth_is_that_of_swin(kind):
    """Depth of the stem is 0, of block n is n, of downsampling that of the block before."""
    model = small(kind)
    depths = [len(stage.blocks) for stage in model.stages]
    last = sum(depths) + 1
    for name, _ in model.named_parameters():
        depth, count = model.get_layer_depth(f'backbone.{name}', 'backbone.')
        assert count == last + 1
        part = name.split('.')
        if part[0] == 'stem':
            expected = 0
        elif part[0] != 'stages':
            expected = last
        else:
            before = sum(depths[: int(part[1])])
            expected = {
                'downsample': before,
                'global_query': before + 1,
                'norm': before + depths[int(part[1])],
            }.get(part[2])
            if part[2] == 'blocks':
                expected = before + int(part[3]) + 1
        assert depth == expected, name
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (last, last + 1)


@pytest.mark.no_backend
@every_kind
@pytest.mark.parametrize(
    'options, error, message',
    [
        (dict(arch='huge'), ValueError, "arch must be one of .* got 'huge'"),
        (dict(arch=3), TypeError, 'arch must be a name or a dict, got int'),
        (dict(arch=dict(dim=3)), ValueError, 'arch as a dict takes the keys .*dim'),
        (dict(out_indices=(0, 4)), ValueError, r'out_indices .* got \(0, 4\)'),
        (dict(out_indices=()), ValueError, r'out_indices .* got \(\)'),
        (dict(out_indices=3), ValueError, 'out_indices .* got 3'),
        (dict(drop_path_rate=1.5), ValueError, 'drop_path_rate .* got 1.5'),
        (dict(frozen_stages=5), ValueError, 'frozen_stages .* got 5'),
        (dict(in_channels=0), ValueError, 'in_channels .* got 0'),
        (dict(windows=7), TypeError, 'windows'),
    ],
    ids=lambda value: '-'.join(value) if isinstance(value, dict) else '',
)
def test_constructor_errors_name_the_argument(kind, options, error, message):
    with pytest.raises(error, match=message):
        small(kind, **options)
