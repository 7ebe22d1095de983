import pytest
import torch

from mmattn.ops import quadtree
from mmattn.ops.quadtree import quadtree_level, quadtree_level_reference, quadtree_root


def draw(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def make(batch=2, parents=3, key_parents=5, kept=3, heads=2, d=4, with_scores=False):
    """Inputs of a level: every query token has kept ``kept`` of ``key_parents`` keys."""
    inputs = dict(
        queries=draw(batch, parents, 4, heads, d, seed=0).requires_grad_(),
        keys=draw(batch, 4 * key_parents, heads, d, seed=1).requires_grad_(),
        values=draw(batch, 4 * key_parents, heads, d, seed=2).requires_grad_(),
        parents=draw(batch, parents, key_parents, heads, seed=3).argsort(2)[:, :, :kept],
    )
    if with_scores:
        scores = draw(batch, parents, kept, heads, seed=4).sigmoid()
        inputs['parent_scores'] = scores.requires_grad_()
    return inputs


def choose(p, topk, outside):
    """Indices of the topk greatest; padding last, the lower index first among equals."""
    return sorted(range(len(p)), key=lambda n: (outside[n], -p[n].item(), n))[:topk]


def softmax(scores, outside):
    exp = [s.exp() * (not out) for s, out in zip(scores, outside, strict=True)]
    total = sum(exp)
    return [e / total if total > 0 else e for e in exp]


def query_by_query(queries, keys, values, parents, topk, parent_scores=None, padding=None):
    """Compute a level by loops over queries, candidates and heads."""
    batch, count, _, heads, d = queries.shape
    messages, indices, scores = torch.zeros_like(queries), [], []
    for b, i, c, h in torch.cartesian_prod(*map(torch.arange, (batch, count, 4, heads))).tolist():
        candidates = [4 * m + child for m in parents[b, i, :, h].tolist() for child in range(4)]
        outside = [padding is not None and padding[n].item() for n in candidates]
        s = [queries[b, i, c, h] @ keys[b, n, h] / d**0.5 for n in candidates]
        if parent_scores is None:
            p = softmax(s, outside)
        else:
            p = []
            for j in range(0, len(s), 4):
                family = softmax(s[j : j + 4], outside[j : j + 4])
                p += [parent_scores[b, i, j // 4, h] * own for own in family]
        chosen = [] if topk is None else choose(p, topk, outside)
        skipped = () if parent_scores is None else chosen
        messages[b, i, c, h] = sum(
            p[n] * values[b, candidates[n], h] for n in range(len(p)) if n not in skipped
        )
        indices += [candidates[n] for n in chosen]
        scores += [p[n] for n in chosen]
    if topk is None:
        return messages, None, None
    shape = (batch, count, 4, heads, -1)
    indices, scores = torch.tensor(indices).view(shape), torch.stack(scores).view(shape)
    return messages, indices.transpose(3, 4), scores.transpose(3, 4)


PADDING = torch.zeros(20, dtype=torch.bool)
PADDING[[2, 3, 7, 12, 13, 14, 15]] = True  # parts of two families, all of another


@pytest.mark.parametrize('level', [quadtree_level, quadtree_level_reference])
@pytest.mark.parametrize('padding', [None, PADDING], ids=['whole', 'padded'])
@pytest.mark.parametrize('topk', [None, 1, 5, 12, 99])
@pytest.mark.parametrize('with_scores', [False, True], ids='BA')
def test_definition_query_by_query(level, padding, topk, with_scores):
    inputs = make(with_scores=with_scores)
    leaves = [t for t in inputs.values() if t.requires_grad]
    results = []
    for function, options in ((level, dict(with_scores=True)), (query_by_query, {})):
        messages, indices, scores = function(topk=topk, padding=padding, **inputs, **options)
        loss = (messages * draw(*messages.shape, seed=5)).sum()
        if with_scores and topk is not None:
            loss = loss + (scores * draw(*scores.shape, seed=6)).sum()
        results.append(
            (messages, indices, scores, *torch.autograd.grad(loss, leaves, materialize_grads=True))
        )
    for actual, expected in zip(*results, strict=True):
        if expected is None:
            assert actual is None
        else:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert topk is None or results[0][1].shape[3] == min(topk, 12)


@pytest.mark.parametrize('padding', [None, PADDING], ids=['whole', 'padded'])
@pytest.mark.parametrize('topk', [None, 2, 99])
@pytest.mark.parametrize('attn_type', 'AB')
def test_root_query_by_query(attn_type, topk, padding):
    """The coarsest level is a finer level of one parent that has kept all keys."""
    inputs = make(parents=2, kept=5)
    inputs['parents'] = torch.arange(5).view(1, 1, 5, 1).expand(2, 2, 5, 2)
    results = []
    for function in (quadtree_root, query_by_query):
        arguments = dict(inputs, topk=topk, padding=padding)
        if function is quadtree_root:
            del arguments['parents']
            arguments |= dict(attn_type=attn_type, with_scores=True)
            arguments['queries'] = arguments['queries'].flatten(1, 2)
        outputs = list(function(**arguments))
        if function is query_by_query:
            outputs = [None if t is None else t.flatten(1, 2) for t in outputs]
            # Messages of type A's root leave out the kept keys.
            if attn_type == 'A' and topk is not None:
                index = outputs[1].unsqueeze(-1).expand(-1, -1, -1, -1, 4)
                values = inputs['values'].unsqueeze(1).expand(-1, 8, -1, -1, -1).gather(2, index)
                outputs[0] = outputs[0] - (outputs[2].unsqueeze(-1) * values).sum(2)
        leaves = [inputs[name] for name in ('queries', 'keys', 'values')]
        loss = (outputs[0] * draw(*outputs[0].shape, seed=5)).sum()
        results.append((*outputs, *torch.autograd.grad(loss, leaves)))
    for actual, expected in zip(*results, strict=True):
        if expected is None:
            assert actual is None
        else:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('with_scores', [False, True], ids='BA')
def test_gradcheck(with_scores):
    inputs = make(1, 2, 3, 2, 1, 2, with_scores)
    inputs = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    names = list(inputs)

    def function(*tensors):
        outputs = quadtree_level(
            topk=3, padding=PADDING[:12], **dict(zip(names, tensors, strict=True))
        )
        return outputs[0], *(outputs[2:] if with_scores else ())

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_equal_keys_are_kept_in_their_order():
    inputs = make(1, 3, 5, 3, 2, 4)
    inputs['queries'] = inputs['queries'].round()  # makes the scores equal bit for bit
    inputs['keys'] = torch.ones_like(inputs['keys'])
    _, indices, _ = quadtree_level(topk=6, **inputs)
    candidates = 4 * inputs['parents'].repeat_interleave(4, 2) + torch.arange(12).view(12, 1) % 4
    assert torch.equal(indices, candidates[:, :, None, :6].expand(-1, -1, 4, -1, -1))
    _, indices, _ = quadtree_root(
        inputs['queries'].flatten(1, 2), inputs['keys'], inputs['values'], 7
    )
    assert torch.equal(indices, torch.arange(7).view(1, 1, 7, 1).expand(1, 12, 7, 2))


@pytest.mark.parametrize('topk', [1, 7, 60, 99])
@pytest.mark.parametrize('padded', [False, True])
def test_choice_without_sorting_is_the_sorted_one(padded, topk):
    p = draw(4, 30, 60, seed=0, dtype=torch.float32).abs().round(decimals=1)
    p[2:] /= 1e30  # many equal values in each row, some 0
    padding = draw(60, seed=1) > 1 if padded else None
    actual = quadtree._choose_without_sorting(p, topk, padding)
    assert torch.equal(actual, quadtree._choose(p, topk, padding))


def test_padding_comes_after_underflowing_probabilities():
    queries, keys = torch.ones(1, 1, 1, 1), torch.tensor([9.0, 1e4, -1e4, -1e5]).view(1, 4, 1, 1)
    padding = torch.tensor([True, False, False, False])
    messages, indices, scores = quadtree_root(queries, keys, keys, 4, 'B', padding, True)
    assert indices.flatten().tolist() == [1, 2, 3, 0]
    assert scores.flatten().tolist() == [1, 0, 0, 0] and messages.item() == 1e4
    parents = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    _, indices, _ = quadtree_level(
        queries.view(1, 1, 1, 1, 1).expand(1, 1, 4, 1, 1), keys, keys, parents, 3, padding=padding
    )
    assert indices[0, 0, 0, :, 0].tolist() == [1, 2, 3]


def test_kept_keys_in_the_padding_give_zeros():
    inputs = make(with_scores=True)
    inputs['parents'] = torch.full_like(inputs['parents'], 3)  # whose children are all padding
    messages, _, scores = quadtree_level(topk=2, padding=PADDING, **inputs)
    (messages.sum() + scores.sum()).backward()
    assert (messages == 0).all() and (scores == 0).all()
    assert all((inputs[name].grad == 0).all() for name in ('queries', 'keys', 'values'))


@pytest.mark.parametrize('with_scores', [False, True], ids='BA')
def test_gathered_keys_are_not_kept_for_the_backward_pass(with_scores):
    inputs = make(1, 256, 256, 16, 2, 16, with_scores)
    gathered = 256 * 4 * 16 * 2 * 16 * 8
    stored = {}

    def pack(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        messages, _, _ = quadtree_level(topk=16, **inputs)
    messages.sum().backward()
    assert sum(stored.values()) < 0.5 * gathered
    stored.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quadtree_level_reference(topk=16, **inputs)
    assert sum(stored.values()) > 2 * gathered


def test_any_strides():
    inputs = make(with_scores=True)
    expected = quadtree_level(topk=5, **inputs)
    strided = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in inputs.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    for actual, wanted in zip(quadtree_level(topk=5, **strided), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('with_scores', [False, True], ids='BA')
def test_lower_precision(dtype, with_scores):
    inputs = make(2, 6, 9, 5, 3, 16, with_scores)
    expected, _, _ = quadtree_level(topk=None, **inputs)
    low = {
        name: t.detach().to(dtype) if t.is_floating_point() and name != 'parent_scores' else t
        for name, t in inputs.items()
    }
    actual, indices, scores = quadtree_level(topk=3, **low, with_scores=True)
    assert actual.dtype == dtype and scores.dtype == torch.promote_types(
        torch.float32, scores.dtype
    )
    assert indices.dtype == torch.int64
    actual, _, _ = quadtree_level(topk=None, **low)
    assert (actual.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize('with_scores', [False, True], ids='BA')
def test_empty_batch(with_scores):
    messages, indices, _ = quadtree_level(topk=5, **make(batch=0, with_scores=with_scores))
    assert messages.shape == (0, 3, 4, 2, 4) and indices.shape == (0, 3, 4, 5, 2)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(queries=torch.zeros(2, 3, 4, 2, 5)), r'queries .*\(2, P, 4, 2, 4\).*, 5\)'),
        (dict(values=torch.zeros(2, 20, 2, 5)), r'keys and values .*\(2, 20, 2, 4\).*, 5\)'),
        (
            dict(keys=torch.zeros(2, 19, 2, 4), values=torch.zeros(2, 19, 2, 4)),
            r'keys must be 4 children .*\(2, 19, 2, 4\)',
        ),
        (dict(parents=torch.zeros(2, 4, 3, 2).long()), r'parents .*\(2, 3, K, 2\), got \(2, 4'),
        (dict(parents=torch.zeros(2, 3, 3, 2)), r'parents must be int64 .*float32'),
        (dict(parent_scores=torch.zeros(2, 3, 4, 2)), r'parent_scores .*\(2, 3, 3, 2\)'),
        (dict(padding=torch.zeros(19, dtype=torch.bool)), r'padding .*\(20,\).*\(19,\)'),
        (dict(padding=torch.zeros(20)), r'padding must be bool .*float32'),
        (dict(topk=0), 'topk .* got 0'),
        (dict(topk=2.0), 'topk .* got 2.0'),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        quadtree_level(**(make() | dict(topk=3) | change))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(queries=torch.zeros(2, 3, 3, 4)), r'queries .*\(2, N, 2, 4\).* got \(2, 3, 3, 4\)'),
        (dict(values=torch.zeros(2, 4, 2, 4)), r'keys and values .*\(2, 4, 2, 4\)'),
        (dict(keys=torch.zeros(2, 0, 2, 4), values=torch.zeros(2, 0, 2, 4)), 'at least one token'),
        (dict(attn_type='C'), "attn_type must be 'A' or 'B', got 'C'"),
        (dict(topk=-1), 'topk .* got -1'),
    ],
)
def test_root_errors_name_the_argument(change, message):
    zeros = dict.fromkeys(('queries', 'keys', 'values'), torch.zeros(2, 3, 2, 4))
    with pytest.raises(ValueError, match=message):
        quadtree_root(**(zeros | dict(topk=3) | change))
