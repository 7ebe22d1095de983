"""``compile_blocks``: equal outputs and gradients, no compilation for a new image size."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mmattn.backbones import DAT, GCViT, QuadTree

pytestmark = pytest.mark.no_backend

FAMILIES = {
    'gcvit': (GCViT, dict(embed_dims=16, depths=(1, 1, 3, 1), num_heads=(1, 1, 2, 2), mlp_ratio=2)),
    'dat': (
        DAT,
        dict(
            dims=(16, 16, 32, 32),
            blocks=('N', 'D', 'LDD', 'S'),
            num_heads=(1, 1, 2, 2),
            groups=(0, 1, 1, 0),
            plus_plus=True,
        ),
    ),
    'quadtree': (
        QuadTree,
        dict(
            embed_dims=(16, 16, 32, 32),
            depths=(1, 1, 2, 1),
            num_heads=(1, 1, 2, 2),
            mlp_ratios=(2, 2, 2, 2),
        ),
    ),
}


@pytest.fixture
def counter(monkeypatch):
    """Count compilations, by a backend that runs programs uncompiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('eager')
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def gradients(model, x):
    model.zero_grad()
    outputs = model(x)
    sum((out**2).mean() for out in outputs).backward()
    return [*outputs, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize('family', FAMILIES)
def test_same_numbers_and_no_compilation_for_a_new_size(family, counter):
    kind, arch = FAMILIES[family]
    options = dict(topks=4) if kind is QuadTree else {}
    torch.manual_seed(0)
    plain = kind(arch, drop_path_rate=0.0, **options).double()
    compiled = kind(arch, drop_path_rate=0.0, compile_blocks=True, **options).double()
    compiled.load_state_dict(plain.state_dict())
    # The first map must not be as high as it has channels: dynamo would assume that they are equal.
    # Other sides than multiples of 32 may need more programs, for padding; QuadTree's take half a
    # minute to trace.
    sizes = [(96, 160), (160, 96), (128, 224)]
    for height, width in sizes if family == 'quadtree' else [*sizes, (105, 65)]:
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        for actual, expected in zip(gradients(compiled, x), gradients(plain, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
        if height == 96:
            programs = counter.frame_count
            assert programs > 0
        elif height % 32 == 0:
            assert counter.frame_count == programs
    assert counter.frame_count <= 2 * programs


def test_drop_path_rates_share_a_program(counter):
    arch = dict(embed_dims=16, depths=(1, 1, 7, 1), num_heads=(1, 1, 2, 2), mlp_ratio=2)
    model = GCViT(arch, drop_path_rate=0.2, compile_blocks=True)
    model(torch.randn(2, 3, 96, 160))
    # Local and global blocks share one program each; the first block drops nothing.
    assert counter.frame_count == 5
