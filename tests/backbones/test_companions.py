"""Uses of a backbone's layers and state by other tools: adapters, pruning, quantization."""

import copy
import importlib
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.small_backbones import KINDS, channels, small
from mmengine.config import ConfigDict
from mmengine.model import PretrainedInit
from mmengine.runner import CheckpointLoader
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters

pytestmark = pytest.mark.no_backend
every_kind = pytest.mark.parametrize('kind', KINDS)


def image(seed=0, size=(70, 64)):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def linear_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def loss_of(model, x):
    return sum(out.square().mean() for out in model(x))


def assert_equal_maps(actual, expected, **tolerance):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# ------------------------------------------------------------------------------------- layers


@pytest.fixture(scope='module')
def peft():
    """The package, which `make setup` puts into a folder that other tests do not see."""
    sys.path.append(str(Path(sys.prefix, 'peft')))
    yield importlib.import_module('peft')
    sys.path.pop()


@every_kind
def test_lora_of_peft_changes_the_output_and_merges(kind, peft):
    model, x = small(kind), image()
    names = linear_names(model)
    before = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names)).eval()
    assert_equal_maps(adapted(x), before)  # B is zero at first
    for name, parameter in adapted.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(parameter, std=0.1)
    after = adapted(x)
    assert not torch.allclose(after[3], before[3], atol=1e-3)
    loss_of(adapted, x).backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(names)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    merged = adapted.merge_and_unload()
    assert linear_names(merged) == names
    assert_equal_maps(merged(x), after, rtol=1e-4, atol=1e-4)


@every_kind
def test_dynamic_quantization(kind):
    model, x = small(kind), image()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert linear_names(quantized) == []
    for a, b in zip(quantized(x), model(x), strict=True):
        assert 0 < (a - b).norm() < 0.15 * b.norm()


@every_kind
def test_pruning(kind):
    model, x = small(kind).train(), image()
    for name in linear_names(model):
        layer = model.get_submodule(name)
        prune.l1_unstructured(layer, 'weight', amount=0.3)
        prune.ln_structured(layer, 'weight', amount=0.2, n=2, dim=0)
    for module in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        prune.l1_unstructured(module, 'weight', amount=0.3)
    for _ in range(2):  # the masks are applied anew in each forward
        loss_of(model, x).backward()
    model.eval()
    pruned = model(x)
    for name in linear_names(model):
        prune.remove(model.get_submodule(name), 'weight')
        assert (model.get_submodule(name).weight == 0).float().mean() > 0.25
    assert_equal_maps(model(x), pruned)


@every_kind
@pytest.mark.parametrize('parametrize', [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrizations(kind, parametrize):
    model, x = small(kind), image()
    if parametrize is parametrizations.weight_norm:
        before = model(x)
        for name in linear_names(model):
            parametrize(model.get_submodule(name))
        assert_equal_maps(model(x), before, rtol=1e-4, atol=1e-4)
    else:
        for name in linear_names(model):
            parametrize(model.get_submodule(name))
    loss_of(model, x).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert all('attn' not in name or 'parametrizations' not in name for name in without)


@every_kind
def test_recorders_see_what_the_layers_give(kind):
    model, seen = small(kind), {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d)):
            module.register_forward_hook(
                lambda m, inputs, output, name=name: seen.update({name: (m, inputs[0], output)})
            )
    model(image())
    assert len(seen) >= len(linear_names(model))
    with torch.no_grad():
        for layer, given, output in seen.values():
            hooks, layer._forward_hooks = layer._forward_hooks, {}
            torch.testing.assert_close(layer(given), output)
            layer._forward_hooks = hooks


@every_kind
def test_outputs_are_modules_whose_maps_are_channel_first(kind):
    """Targets for CAM tools, which average over the last two dimensions."""
    model, seen, gradients = small(kind, out_indices=(1, 3)), {}, {}
    for i in (1, 3):
        module = model.get_submodule(f'output{i}')
        module.register_forward_hook(lambda m, inputs, output, i=i: seen.update({i: output}))
        module.register_full_backward_hook(lambda m, i_, o, i=i: gradients.update({i: o[0]}))
    maps = model(image().requires_grad_())
    assert_equal_maps(seen.values(), maps, rtol=0, atol=0)
    maps[1].square().sum().backward()
    torch.testing.assert_close(gradients[3], 2 * maps[1])


@every_kind
def test_output_of_a_hook_takes_part(kind):
    for name in linear_names(small(kind)):
        model, x = small(kind), image()
        before = model(x)
        model.get_submodule(name).register_forward_hook(lambda m, i, output: output * 1.5 + 0.1)
        assert any(not torch.equal(a, b) for a, b in zip(model(x), before, strict=True)), name


# ---------------------------------------------------------------------------------- optimizers


@every_kind
def test_lbfgs_lowers_the_loss(kind):
    model, x = small(kind, drop_path_rate=0.0).train(), image()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert closure().item() < first


@every_kind
def test_parameters_as_one_vector(kind):
    model, other, x = small(kind), small(kind, seed=1), image()
    vector_to_parameters(parameters_to_vector(model.parameters()), other.parameters())
    assert_equal_maps(other(x), model(x))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@every_kind
@pytest.mark.parametrize('views', [True, False])
def test_zero_redundancy_optimizer_updates_as_the_plain_one(kind, views, process_group):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    x, models = image(), []
    for sharded in (False, True):
        model = small(kind, drop_path_rate=0.0).train()
        step = model
        if sharded:
            step = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
            optimizer = ZeroRedundancyOptimizer(
                model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=views, lr=1e-2
            )
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(step, x).backward()
            optimizer.step()
        models.append(model.eval())
    assert_equal_maps(models[1](x), models[0](x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(models[0](x)[3], small(kind)(x)[3])


# ---------------------------------------------------------------------------------------- state


@every_kind
def test_safetensors(kind, tmp_path):
    from safetensors.torch import load_model, save_file, save_model

    model, x = small(kind), image()
    save_file(model.state_dict(), tmp_path / 'state.safetensors')
    save_model(model, tmp_path / 'model.safetensors')
    for name in ('state', 'model'):
        other = small(kind, seed=1)
        load_model(other, tmp_path / f'{name}.safetensors')
        assert_equal_maps(other(x), model(x), rtol=0, atol=0)


def build(kind, **options):
    backbone, arch, defaults = KINDS[kind]
    return backbone(arch=arch, **defaults, **options)


def assigned(kind, state):
    with torch.device('meta'):
        model = build(kind)
    model.load_state_dict(state, assign=True)
    return model


def emptied(kind, state):
    with torch.device('meta'):
        model = build(kind)
    model.to_empty(device='cpu')
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.load_state_dict(state)
    return model


def emptied_by_layer(kind, state):
    """As FSDP's param_init_fn does, and weights copied one by one."""
    with torch.device('meta'):
        model = build(kind)
    for module in model.modules():
        module.to_empty(device='cpu', recurse=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    return model


def moved(kind, state):
    model = build(kind).to('meta').to_empty(device='cpu')
    model.load_state_dict(state)
    return model


@every_kind
@pytest.mark.parametrize('materialize', [assigned, emptied, emptied_by_layer, moved])
def test_models_built_without_memory(kind, materialize):
    model, x = small(kind), image(size=(64, 96))
    twin = materialize(kind, copy.deepcopy(model.state_dict()))
    assert not any(t.is_meta for t in [*twin.parameters(), *twin.buffers()])
    assert_equal_maps(twin.eval()(x), model(x), rtol=0, atol=0)
    twin.requires_grad_(True).train()
    loss_of(twin, x).backward()
    assert all(p.grad.isfinite().all() for p in twin.parameters())


# ------------------------------------------------------------------------- weights to start from


def trained_file(kind, folder):
    model = small(kind)
    torch.save(dict(state_dict=model.state_dict()), folder / 'trained.pth')
    return model, str(folder / 'trained.pth')


@every_kind
@pytest.mark.parametrize('form', ['name', 'scoped', 'class', 'list', 'pretrained', 'scheme'])
def test_every_form_of_pretrained(kind, form, tmp_path):
    trained, file = trained_file(kind, tmp_path)
    config = dict(type='Pretrained', checkpoint=file)
    if form == 'scoped':
        config['type'] = 'mmengine.Pretrained'
    elif form == 'class':
        config['type'] = PretrainedInit
    elif form == 'list':
        config = [dict(type='TruncNormal', layer='Linear', std=0.5), config]
    elif form == 'scheme':  # such as s3://, of which mmengine's loader knows
        CheckpointLoader.register_scheme('mine://', lambda name, _: torch.load(name[7:]), True)
        config['checkpoint'] = f'mine://{file}'
    options = dict(pretrained=file) if form == 'pretrained' else dict(init_cfg=config)
    model = small(kind, seed=1, **options)
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name


def test_pretrained_and_init_cfg_exclude_each_other():
    with pytest.raises(ValueError, match='init_cfg and pretrained must not both be given'):
        small('gcvit', pretrained='a.pth', init_cfg=dict(type='Pretrained', checkpoint='b.pth'))


@every_kind
def test_weights_that_a_segmentor_hands_down(kind, tmp_path):
    from mmengine.registry import MODELS, init_default_scope

    trained, file = trained_file(kind, tmp_path)
    init_default_scope('mmseg')
    backbone, arch, options = KINDS[kind]
    decode_head = dict(
        type='FCNHead', in_channels=channels(kind)[3], in_index=3, channels=8, num_classes=2
    )
    model = MODELS.build(
        dict(
            type='EncoderDecoder', pretrained=file, decode_head=decode_head,
            backbone=ConfigDict(type=backbone.__name__, arch=arch, **options),
        )
    )  # fmt: skip
    model.init_weights()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name


@every_kind
def test_layers_without_bias_train(kind):
    model, x = small(kind, drop_path_rate=0.0).train(), image()
    for name in linear_names(model):
        owner, _, child = name.rpartition('.')
        old = model.get_submodule(name)
        new = nn.Linear(old.in_features, old.out_features, bias=False)
        new.weight = old.weight
        setattr(model.get_submodule(owner), child, new)
    loss_of(model, x).backward()
    linear = [model.get_submodule(name) for name in linear_names(model)]
    assert all(layer.weight.grad.abs().sum() > 0 for layer in linear)


@every_kind
@pytest.mark.parametrize(
    'option', ['static_graph', 'gradient_as_bucket_view', 'find_unused_parameters']
)
@pytest.mark.parametrize('changes', [dict(with_cp=True), dict(frozen_stages=1)])
def test_ddp_gives_the_gradients_of_the_model_alone(kind, option, changes, process_group):
    x = image()
    alone, model = (small(kind, drop_path_rate=0.0, **changes).train() for _ in range(2))
    wrapped = nn.parallel.DistributedDataParallel(model, **{option: True})
    for _ in range(2):
        for net in (alone, wrapped):
            net.zero_grad()
            loss_of(net, x).backward()
    for (name, a), b in zip(alone.named_parameters(), model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
