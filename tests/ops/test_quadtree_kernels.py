"""quadtree_level's compiled kernels against the reference."""

import pytest
import torch
from helpers import cuda_on_host
from helpers.comparison import EPS, Draw, assert_agree, exact, results, rounding

from mmattn.ops import quadtree_level, quadtree_level_reference

GRADIENTS = ('queries', 'keys', 'values', 'parent_scores')


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setenv('MMATTN_OPS', 'compiled')


def case(seed, most=5):
    """Inputs of a level with up to ``most`` parents, and as many kept keys for each."""
    draw = Draw(seed)
    dtype = draw.dtype()
    batch, heads, d = draw.integer(0, 2), draw.integer(1, 3), draw.integer(1, 70)
    count, kept = draw.integer(0, most), draw.integer(1, most)
    if draw.one_of(True, False):  # sizes of vectorized loads
        d = draw.one_of(16, 32, 64)
    key_parents = kept + draw.integer(0, 4)
    parents = torch.rand(batch, heads, count, key_parents, generator=draw.generator)
    inputs = dict(
        queries=draw.tensor(batch, count, 4, heads, d, dtype=dtype),
        keys=draw.tensor(batch, 4 * key_parents, heads, d, dtype=dtype),
        values=draw.tensor(batch, 4 * key_parents, heads, d, dtype=dtype),
        parents=parents.argsort(-1)[..., :kept].permute(0, 2, 3, 1),
        topk=draw.one_of(None, draw.integer(1, 4 * kept), 4 * kept, 1000),
    )
    if draw.one_of('A', 'B') == 'A':
        scores = draw.tensor(
            batch, count, kept, heads, dtype=torch.promote_types(dtype, torch.float32)
        )
        inputs['parent_scores'] = scores.sigmoid()
    if draw.one_of(True, False):
        inputs['padding'] = torch.rand(4 * key_parents, generator=draw.generator) < 0.3
    inputs['with_scores'] = draw.one_of(True, False)
    return inputs


def candidates_of(inputs):
    """Candidate keys of each query, (B, P, 1, 4K, heads)."""
    children = 4 * inputs['parents'].unsqueeze(3) + torch.arange(4).view(4, 1)
    return children.flatten(2, 3).unsqueeze(2)


def check(actual, inputs, message):
    """Compare with the reference in float64.

    Where rounding flips the choice between nearly equal candidates, the kept ones must be as
    probable; messages of type A then differ, and are not compared.
    """
    dtype = inputs['values'].dtype
    expected = results(quadtree_level_reference, exact(inputs), GRADIENTS)
    indices = actual.pop('output 1', None), expected.pop('output 1', None)
    assert (indices[0] is None) == (indices[1] is None), message
    if indices[0] is not None and not torch.equal(*indices):
        assert dtype != torch.float64, message
        check_kept(indices[0], inputs, message)
        if 'parent_scores' in inputs:
            return
    assert_agree(actual, expected, rounding(dtype), 1, message)


def check_kept(kept, inputs, message):
    """Assert that kept keys are distinct candidates, and as probable as the best in order."""
    everything = exact(inputs) | dict(topk=10**6, with_scores=True)
    _, indices, scores = quadtree_level_reference(**everything)
    is_kept = indices.unsqueeze(4) == kept.unsqueeze(3)  # (B, P, 4, 4K, K', heads)
    assert (is_kept.sum(3) == 1).all() and is_kept.sum(4).max() == 1, message
    own = (is_kept * scores.unsqueeze(4)).sum(3)
    differences = (own - scores[:, :, :, : kept.shape[3]]).abs()
    assert differences.max() <= 100 * EPS[torch.float32] * scores.max(), message


def test_cpu_kernels_equal_the_reference(fuzz_seeds):
    for seed in fuzz_seeds:
        inputs = case(seed)
        check(results(quadtree_level, inputs, GRADIENTS), inputs, f'case {seed}')


def on_host(operators, inputs):
    """Results of the CUDA kernels, named as by comparison.results."""
    arguments = [inputs.get(name) for name in ('queries', 'keys', 'values', 'parents')]
    arguments += [inputs.get('parent_scores'), inputs.get('padding')]
    arguments += [inputs['topk'] or 0, inputs['with_scores']]
    messages, scores, indices, kept = operators.quadtree_level(*arguments)
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        for x in (messages, scores)
    ]
    gradients = operators.quadtree_level_backward(*weights, *arguments, kept)
    named = {'output 0': messages, 'output 1': indices, 'output 2': scores}
    if inputs['topk'] is None:
        del named['output 1'], named['output 2']
    elif 'parent_scores' not in inputs and not inputs['with_scores']:
        del named['output 2']
    named |= {
        f'gradient of {name}': gradient
        for name, gradient in zip(GRADIENTS, gradients, strict=True)
        if name in inputs
    }
    return named


def test_other_kept_keys_must_be_as_good():
    inputs = large(3, 16) | dict(topk=4, with_scores=False)
    inputs['keys'][:, 5] = inputs['keys'][:, 6] + 1e-9
    inputs = {n: t.float() if n in GRADIENTS else t for n, t in inputs.items()}
    kept = quadtree_level(**inputs)[1]
    swapped = torch.where(kept == 5, 6, torch.where(kept == 6, 5, kept))
    check_kept(swapped, inputs, '')
    for wrong in (kept.flip(3), torch.where(kept == kept.max(), kept.min(), kept)):
        with pytest.raises(AssertionError):
            check_kept(wrong, inputs, '')


def test_cuda_kernels_equal_the_reference():
    operators = cuda_on_host.operators()
    for seed in range(60):
        inputs = case(seed, most=3)
        check(on_host(operators, inputs), inputs, f'case {seed}')


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('attn_type', 'AB')
def test_more_candidates_than_shared_memory_holds(attn_type, padded):
    inputs = large(kept=1600, d=4)
    if attn_type == 'A':
        inputs['parent_scores'] = torch.rand(1, 1, 1600, 1, dtype=torch.float64)
    if padded:
        inputs['padding'] = torch.arange(6400) % 3 == 0
    inputs |= dict(topk=40, with_scores=True)
    check(on_host(cuda_on_host.operators(), inputs), inputs, attn_type)


def large(kept, d):
    draw = Draw(0)
    return dict(
        queries=draw.tensor(1, 1, 4, 1, d, strided=False),
        keys=draw.tensor(1, 4 * kept, 1, d, strided=False),
        values=draw.tensor(1, 4 * kept, 1, d, strided=False),
        parents=torch.randperm(kept, generator=draw.generator).view(1, 1, kept, 1),
    )


@pytest.mark.parametrize('topk', [100, 129, 1024, 4096])
def test_many_candidates(topk):
    inputs = large(1024, 8) | dict(topk=topk, with_scores=True)
    check(results(quadtree_level, inputs, GRADIENTS), inputs, str(topk))


@pytest.mark.parametrize('device', ['cpu', 'cuda on host'])
@pytest.mark.parametrize('topk', [1, 6, 11, 12])
@pytest.mark.parametrize('dtype', EPS)
def test_equal_keys_are_kept_in_their_order(dtype, topk, device):
    inputs = large(3, 16) | dict(topk=topk, with_scores=False)
    inputs['keys'][:, 1:] = inputs['keys'][:, :1]  # all keys are equal
    inputs = {n: t.to(dtype) if n in GRADIENTS else t for n, t in inputs.items()}
    outputs = (
        results(quadtree_level, inputs, GRADIENTS)
        if device == 'cpu'
        else on_host(cuda_on_host.operators(), inputs)
    )
    first = candidates_of(inputs)[:, :, :, :topk].expand(-1, -1, 4, -1, -1)
    assert torch.equal(outputs['output 1'], first)


@pytest.mark.parametrize('size', [1e2, 1e4])
@pytest.mark.parametrize('attn_type', 'AB')
def test_great_scores(attn_type, size):
    inputs = {n: t.float() if t.is_floating_point() else t for n, t in large(8, 32).items()}
    inputs['queries'] = inputs['queries'] * size
    if attn_type == 'A':
        inputs['parent_scores'] = torch.rand(1, 1, 8, 1)
    expected = quadtree_level_reference(topk=None, **exact(inputs))[0]
    for actual in (
        quadtree_level(topk=None, **inputs)[0],
        on_host(cuda_on_host.operators(), inputs | dict(topk=None, with_scores=False))['output 0'],
    ):
        assert (actual - expected).abs().max() < 10 * size * EPS[torch.float32]


def views(batch=2, count=600, heads=2, kept=9, d=32, with_scores=False, dtype=torch.float32):
    """Inputs strided as from maps in quad order: heads outermost in memory."""
    draw = Draw(1)

    def tokens(number):
        return draw.tensor(batch, heads, number, d, dtype=dtype, strided=False).transpose(1, 2)

    parents = torch.rand(batch, heads, count, count, generator=draw.generator).argsort(-1)
    inputs = dict(
        queries=tokens(4 * count).unflatten(1, (count, 4)),
        keys=tokens(4 * count),
        values=tokens(4 * count),
        parents=parents[..., :kept].permute(0, 2, 3, 1),
        topk=5,
    )
    if with_scores:
        scores = torch.rand(batch, heads, count, kept, generator=draw.generator)
        inputs['parent_scores'] = scores.permute(0, 2, 3, 1).to(dtype)
    return inputs


@pytest.mark.parametrize('with_scores', [False, True], ids='BA')
def test_results_do_not_depend_on_the_run_or_the_threads(with_scores):
    inputs = views(with_scores=with_scores)
    threads = torch.get_num_threads()
    runs = []
    try:
        for number in (1, 1, 2, 3):
            torch.set_num_threads(number)
            runs.append(results(quadtree_level, inputs, GRADIENTS))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(run[name], first) for name, first in runs[0].items())


@pytest.mark.parametrize('d', [32, 40, 64])
def test_views_of_maps_are_read_in_place(d):
    inputs = views(d=d)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        quadtree_level(**inputs)
    names = {event.name for event in profile.events()}
    assert 'mmattn::quadtree_level' in names
    assert not names & {'aten::copy_', 'aten::contiguous', 'aten::clone', 'aten::index_select'}


@pytest.mark.parametrize('topk', [None, 3])
@pytest.mark.parametrize('with_scores', [False, True], ids='BA')
def test_operator_is_registered_completely(with_scores, topk):
    inputs = views(2, 3, 2, 2, 4, with_scores)
    leaves = [inputs[n].requires_grad_() if n in inputs else None for n in GRADIENTS]
    padding = torch.arange(12) % 4 == 3
    arguments = (*leaves[:3], inputs['parents'], leaves[3], padding, topk or 0, True)
    torch.library.opcheck(torch.ops.mmattn.quadtree_level.default, arguments)


@pytest.mark.parametrize('with_scores', [False, True], ids='BA')
def test_gradcheck(with_scores):
    inputs = views(1, 3, 2, 2, 3, with_scores, dtype=torch.float64)
    names = [name for name in GRADIENTS if name in inputs]

    def function(*leaves):
        outputs = quadtree_level(**(inputs | dict(zip(names, leaves, strict=True))))
        return outputs[0], *(outputs[2:] if with_scores else ())

    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves)


def test_scores_of_type_b_have_no_gradient():
    inputs = views(1, 3, 2, 2, 3)
    messages, _, scores = quadtree_level(
        **(inputs | dict(queries=inputs['queries'].requires_grad_())), with_scores=True
    )
    assert messages.requires_grad and not scores.requires_grad


@pytest.mark.parametrize('parent', [-1, 3])
def test_parents_out_of_range(parent):
    inputs = views(1, 3, 2, 2, 4)
    inputs['parents'] = torch.full_like(inputs['parents'], parent)
    with pytest.raises(RuntimeError, match='parents must be indices from 0 to 2'):
        quadtree_level(**inputs)


def test_arguments_of_different_dtypes_or_devices():
    inputs = views(1, 3, 2, 2, 4)
    with pytest.raises(ValueError, match=r'queries and keys .*float32 and torch.float64'):
        quadtree_level(**(inputs | dict(keys=inputs['keys'].double())))
    with pytest.raises(ValueError, match=r'queries and parents .*cpu and meta'):
        quadtree_level(**(inputs | dict(parents=inputs['parents'].to('meta'))))
