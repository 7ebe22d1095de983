import pytest
import torch

from mmattn.layers import ScaledResidual


def maps(batch=2):
    return torch.randn(2, batch, 3, 4, 5, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize('mode', ['evaluation', 'training at rate 0'])
def test_is_a_sum_where_nothing_is_dropped(mode):
    module = ScaledResidual(0.5).eval() if mode == 'evaluation' else ScaledResidual(0.0)
    x, branch = maps()
    gamma = torch.randn(5, dtype=torch.float64)
    assert torch.equal(module(x, branch), x + branch)
    torch.testing.assert_close(module(x, branch, gamma), x + gamma * branch)


@pytest.mark.parametrize('scaled', [False, True])
def test_drops_whole_samples_and_keeps_the_mean(scaled):
    module, rate = ScaledResidual(0.25), 0.25
    x, branch = maps(batch=4000)
    gamma = torch.full((5,), 3.0, dtype=torch.float64, requires_grad=True) if scaled else None
    torch.manual_seed(0)
    out = module(x, branch, gamma)
    added = (out - x) / branch
    factor = added[:, 0, 0, 0]
    torch.testing.assert_close(added, factor[:, None, None, None].expand_as(added))
    survivor = (3 if scaled else 1) / (1 - rate)
    kept = torch.isclose(factor, torch.tensor(survivor, dtype=torch.float64))
    assert torch.equal(kept, factor.abs() > 1e-12)
    assert kept.double().mean() == pytest.approx(1 - rate, abs=0.03)
    (gradient,) = torch.autograd.grad(out.sum(), branch, retain_graph=True)
    torch.testing.assert_close(gradient, added)
    if scaled:
        (gradient,) = torch.autograd.grad(out.sum(), gamma)
        expected = (branch[kept] / (1 - rate)).sum((0, 1, 2))
        torch.testing.assert_close(gradient, expected)
