import pytest
import torch
from helpers import golden
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmattn.attention import WindowAttention
from mmattn.backbones import DAT
from mmattn.backbones.dat import arch_zoo
from mmattn.checkpoint import load_checkpoint


def compare(name, model, maps, output_error, gradient_error, x):
    case = golden.Case(name)
    assert {
        n: case.output_error(n, maps[n]) < output_error for n in case.output_names
    } == dict.fromkeys(case.output_names, True)
    case.loss({name: out.double() for name, out in maps.items()}).backward()
    tensors = golden.parameters(model, name) | dict(input=x)
    errors = {name: case.gradient_error(name, tensors[name].grad) for name in case.gradient_names}
    assert len(errors) == len(case.gradient_names) and max(errors.values()) < gradient_error, errors


# float32 gradients of this case are inexact with any kernel: stage 2 has a standard deviation of
# 1000, and in float64 a change of the image by 1e-7 changes them by 5e-4.
@pytest.mark.parametrize(
    'dtype, output_error, gradient_error',
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-3, 0.3)],
)
def test_detector_backbone_is_the_published_one(dtype, output_error, gradient_error):
    case = golden.Case('datpp_t_det_200x333')
    model = DAT('tiny++').to(dtype).eval()
    report = load_checkpoint(model, golden.state_dict('datpp_t_det_200x333'))
    assert not report.dropped and not report.fresh and not report.resized
    x = case.image.to(dtype).requires_grad_()
    maps = dict(zip(case.output_names, model(x), strict=True))
    compare('datpp_t_det_200x333', model, maps, output_error, gradient_error, x)


class Classifier(nn.Module):
    """Classifier with the published head: norm, global mean, linear layer."""

    def __init__(self, arch):
        super().__init__()
        self.backbone = DAT(arch, out_indices=(3,))
        self.head = nn.Module()
        self.head.fc = nn.Linear(self.backbone.norm3.normalized_shape[0], 1000)

    def forward(self, x):
        return self.head.fc(self.backbone(x)[0].mean((2, 3)))


@pytest.mark.parametrize(
    'case_name, arch', [('dat_t_cls_224', 'tiny'), ('datpp_t_cls_224', 'tiny++')]
)
@pytest.mark.parametrize(
    'dtype, output_error, gradient_error',
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-3, 5e-3)],
)
def test_classifier_is_the_published_one(case_name, arch, dtype, output_error, gradient_error):
    case = golden.Case(case_name)
    model = Classifier(arch).to(dtype).eval()
    report = load_checkpoint(model, golden.state_dict(case_name))
    assert not report.dropped and not report.fresh
    x, maps = case.image.to(dtype).requires_grad_(), {}
    for i, stage in enumerate(model.backbone.stages):
        stage.register_forward_hook(
            lambda _, __, out, i=i: maps.update({f'stage{i}': out.permute(0, 3, 1, 2)})
        )
    maps['logits'] = model(x)
    compare(case_name, model.backbone, maps, output_error, gradient_error, x)


@pytest.mark.parametrize('case_name, shift', [('dat_local_10x13', 0), ('dat_shift_10x13', 4)])
def test_window_blocks_are_the_published_ones(case_name, shift):
    case = golden.Case(case_name)
    module = WindowAttention(96, 3, 7, shift=shift).double()
    names = {'proj_qkv': 'qkv', 'proj_out': 'proj'}
    state = {
        '.'.join(names.get(part, part) for part in name.split('.')[1:]): value
        for name, value in golden.state_dict(case_name).items()
    }
    module.load_state_dict(state)
    x = case.image.requires_grad_()
    out = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert case.output_error('map', out) < 1e-9
    case.loss({'map': out}).backward()
    tensors = {'input': x, 'attn.relative_position_bias_table': module.relative_position_bias_table}
    assert all(case.gradient_error(name, tensors[name].grad) < 1e-9 for name in case.gradient_names)


SMALL = dict(
    dims=(16, 32, 64, 128),
    blocks=('LS', 'ND', 'LD', 'DD'),
    num_heads=(1, 2, 4, 8),
    groups=(0, 1, 2, 4),
    strides=(1, 2, 1, 1),
)


# Millions of parameters and multiply-adds in 1e9, with a 1000-class head: counted, then published
# (T's parameters are published rounded up, 2.4 % above the count).
COUNTS = {
    'tiny': (28.32, 4.56, 29, 4.6),
    'small': (49.70, 8.96, 50, 9.0),
    'base': (87.88, 15.72, 88, 15.8),
    'tiny++': (23.96, 4.26, 24, 4.3),
    'small++': (53.13, 9.38, 53, 9.4),
    'base++': (93.69, 16.50, 93, 16.6),
}


@pytest.mark.parametrize('name', arch_zoo)
def test_parameters_and_flops(name):
    with torch.device('meta'):
        model = Classifier(name)
        image = torch.empty(1, 3, 224, 224)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    flops = counter.get_total_flops() / 2e9
    counted_parameters, counted_flops, published_parameters, published_flops = COUNTS[name]
    assert parameters == pytest.approx(counted_parameters, rel=5e-3)
    assert flops == pytest.approx(counted_flops, rel=5e-3)
    assert parameters == pytest.approx(published_parameters, rel=0.025 if name == 'tiny' else 0.015)
    assert flops == pytest.approx(published_flops, rel=0.05)


@pytest.mark.no_backend
@pytest.mark.parametrize(
    'options, error, message',
    [
        (dict(arch='huge'), ValueError, r"arch must be one of tiny, .*base\+\+ .* got 'huge'"),
        (
            dict(arch=SMALL | dict(blocks=('LS', 'LS', 'LX', 'LD'))),
            ValueError,
            "stage 2 .* got 'LX'",
        ),
        (dict(arch=SMALL | dict(blocks=('LS', 'LS'))), ValueError, 'blocks must be 4 strings'),
        (
            dict(arch=SMALL | dict(groups=(0, 1, 3, 4))),
            ValueError,
            'stage 2, block D: num_heads .* groups 3',
        ),
        (
            dict(arch=SMALL | dict(num_heads=(3, 2, 4, 8))),
            ValueError,
            'stage 0, block L: dim .* num_heads 3',
        ),
        (dict(arch=SMALL | dict(groups=(0, 0, 2, 4))), ValueError, 'stage 1, block D: .* groups 0'),
        (dict(img_size=0), ValueError, 'img_size .* got 0'),
        (dict(window_size=(7, 7)), ValueError, 'window_size'),
        (dict(out_indices=(4,)), ValueError, 'out_indices'),
    ],
)
def test_constructor_errors_name_the_argument_and_the_stage(options, error, message):
    with pytest.raises(error, match=message):
        DAT(**options)
