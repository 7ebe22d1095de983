"""QuadTree attention's levels (Tang et al., ICLR 2022, arXiv 2201.02767, section 3), with their literal definitions.

Tokens are in quad order: children 4i .. 4i + 3 of token i of the next coarser level are the tokens of its 2 x 2
cell, (0, 0), (0, 1), (1, 0), (1, 1). :mod:`mmattn.attention.quadtree` brings maps into that order and back.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._backend import compiled_serves, exporting
from ._operator import accumulate_dtype, check_alike, check_device, register

# The literal definition's gathered keys and values are made for this many numbers at a time and again in the
# backward pass, never kept.
_NUMBERS_AT_A_TIME = 2**22


def quadtree_root(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    topk: int | None,
    attn_type: str = 'B',
    padding: Tensor | None = None,
    with_scores: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The coarsest level: full attention, and the choice of the keys that the next level refines.

    Args:
        queries: (B, N, heads, d).
        keys: (B, M, heads, d).
        values: (B, M, heads, d).
        topk: keys that each query keeps, those of highest probability, all where there are no more; None:
            nothing is chosen.
        attn_type: 'B': the message is the sum over all keys; 'A': over those that are not kept.
        padding: (M,), true for keys outside the map. They get probability 0 and are kept only after all others.
        with_scores: return type B's scores too.

    Returns:
        messages (B, N, heads, d) in the dtype of ``values``; indices of the kept keys, int64 (B, N, K, heads),
        highest probability first and the lower index first among equals; their probabilities, at least float32.
        The last two are None where nothing is chosen, the last one also in type B without ``with_scores``.

    Raises:
        ValueError: a shape, ``topk`` or ``attn_type`` does not fit the others.
    """
    _check_root(queries, keys, values, topk, attn_type, padding)
    q, k, v = (t.transpose(1, 2) for t in (queries, keys, values))
    if topk is None and attn_type == 'B':
        mask = None if padding is None else ~padding.unsqueeze(0)
        messages = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return messages.transpose(1, 2), None, None
    p = _softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1), padding)
    kept = None if topk is None else _choose_without_sorting(p, topk, padding)
    messages = _message(p, v, kept, attn_type).transpose(1, 2)
    if kept is None:
        return messages, None, None
    scores = _kept_scores(p, kept, attn_type, with_scores)
    return (
        messages,
        kept.permute(0, 2, 3, 1),
        None if scores is None else scores.permute(0, 2, 3, 1),
    )


def quadtree_level(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    parents: Tensor,
    topk: int | None,
    parent_scores: Tensor | None = None,
    padding: Tensor | None = None,
    with_scores: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A finer level: the four children of a query token attend to the children of the keys that it has kept.

    Candidate 4i + c is child c of the i-th kept key. Type B (without ``parent_scores``) takes the softmax over
    all 4K candidates, and the message is the sum over all of them. Type A (with ``parent_scores``) takes the
    softmax over the four children of each kept key, times that key's score; the message is the sum over the
    candidates that are not kept.

    Args:
        queries: (B, P, 4, heads, d), the children of P query tokens.
        keys: (B, M, heads, d), in quad order.
        values: (B, M, heads, d), in quad order.
        parents: indices of the keys kept by the P query tokens, int64 (B, P, K, heads), below M / 4.
        topk: candidates that each query keeps, those of highest probability, all where there are no more; None
            at the finest level: nothing is chosen.
        parent_scores: type A's scores of ``parents``, (B, P, K, heads), at least float32.
        padding: (M,), true for keys outside the map. They get probability 0 and are kept only after all others.
        with_scores: return type B's scores too.

    Returns:
        messages (B, P, 4, heads, d) in the dtype of ``values``; indices of the kept keys, int64
        (B, P, 4, K', heads), highest probability first and the lower candidate first among equals; their scores,
        at least float32. The last two are None where nothing is chosen, the last one also in type B without
        ``with_scores``. Gradients flow into queries, keys, values and parent_scores.

    Raises:
        ValueError: a shape, dtype, device or ``topk`` does not fit the others.
    """
    _check_level(queries, keys, values, parents, topk, parent_scores, padding)
    if not compiled_serves('quadtree_level', queries.device.type):
        return _level_in_parts(
            queries, keys, values, parents, topk, parent_scores, padding, with_scores
        )
    if parent_scores is not None:
        parent_scores = parent_scores.to(_score_dtype(values))
    messages, scores, indices, _ = torch.ops.mmattn.quadtree_level(
        queries, keys, values, parents, parent_scores, padding, topk or 0, with_scores
    )
    if topk is None:
        return messages, None, None
    if parent_scores is None:
        return messages, indices, scores.detach() if with_scores else None
    return messages, indices, scores


def _level_in_parts(queries, keys, values, parents, topk, parent_scores, padding, with_scores):
    batch, count, _, heads, d = queries.shape
    per_parent = 8 * parents.shape[2] * batch * heads * d
    step = max(1, _NUMBERS_AT_A_TIME // max(1, per_parent))
    inputs = (queries, keys, values, parent_scores)
    recompute = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)

    def run(queries, parents, parent_scores):
        arguments = (queries, keys, values, parents, topk, parent_scores, padding, with_scores)
        if not recompute:
            return _level(*arguments)
        return checkpoint(_level, *arguments, use_reentrant=False, preserve_rng_state=False)

    if not isinstance(step, int) or not isinstance(count, int) or count <= step:
        return run(queries, parents, parent_scores)
    scores = [None] * -(-count // step) if parent_scores is None else parent_scores.split(step, 1)
    parts = [
        run(*part)
        for part in zip(queries.split(step, 1), parents.split(step, 1), scores, strict=True)
    ]
    return tuple(
        None if part[0] is None else torch.cat(part, 1) for part in zip(*parts, strict=True)
    )


def quadtree_level_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    parents: Tensor,
    topk: int | None,
    parent_scores: Tensor | None = None,
    padding: Tensor | None = None,
    with_scores: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The literal definition of :func:`quadtree_level`, which every faster way is held against."""
    _check_level(queries, keys, values, parents, topk, parent_scores, padding)
    return _level(queries, keys, values, parents, topk, parent_scores, padding, with_scores)


def _level(queries, keys, values, parents, topk, parent_scores, padding, with_scores):
    attn_type = 'B' if parent_scores is None else 'A'
    q = queries.permute(0, 3, 1, 2, 4) * queries.shape[-1] ** -0.5  # (B, heads, P, 4, d)
    parents = parents.permute(0, 3, 1, 2)  # (B, heads, P, K)
    k, v = _children(keys, parents), _children(values, parents)  # (B, heads, P, 4K, d)
    if padding is not None:
        padding = padding.view(-1, 4)[parents].flatten(-2).unsqueeze(-2)  # (B, heads, P, 1, 4K)

    s = q @ k.transpose(-2, -1)  # (B, heads, P, 4, 4K)
    if attn_type == 'B':
        p = _softmax(s, padding)
    else:
        families = None if padding is None else padding.unflatten(-1, (-1, 4))
        p = _softmax(s.unflatten(-1, (-1, 4)), families)
        p = (p * parent_scores.permute(0, 3, 1, 2)[..., None, :, None]).flatten(-2)
    kept = None if topk is None else _choose(p, topk, padding)
    messages = _message(p, v, kept, attn_type).permute(0, 2, 3, 1, 4)
    if kept is None:
        return messages, None, None
    scores = _kept_scores(p, kept, attn_type, with_scores)
    own_parents = parents.unsqueeze(-2).expand(*kept.shape[:-1], -1).gather(-1, kept // 4)
    indices = (4 * own_parents + kept % 4).permute(0, 2, 3, 4, 1)
    return messages, indices, None if scores is None else scores.permute(0, 2, 3, 4, 1)


def _score_dtype(values: Tensor) -> torch.dtype:
    device = values.device.type
    autocast = device != 'meta' and torch.is_autocast_enabled(device)
    return accumulate_dtype(torch.get_autocast_dtype(device) if autocast else values.dtype)


def _fake_level(queries, keys, values, parents, parent_scores, padding, topk, with_scores):
    batch, count, _, heads, d = queries.shape
    kept = min(topk, 4 * parents.shape[2])
    type_a = parent_scores is not None
    dtype = accumulate_dtype(values.dtype)
    by_rank = (batch, heads, count, 4, kept)
    scores = by_rank if topk and (type_a or with_scores) else (0,)
    indices = by_rank if topk else (0,)
    return (
        values.new_empty(batch, heads, count, 4, d).permute(0, 2, 3, 1, 4),
        _heads_last(values.new_empty(scores, dtype=dtype)),
        _heads_last(values.new_empty(indices, dtype=torch.int64)),
        values.new_empty(by_rank if topk and type_a else (0,), dtype=torch.int32),
    )


def _heads_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1) if x.ndim == 5 else x


def _fake_level_gradients(queries, keys, values, parents, parent_scores, *others, **options):
    batch, count, _, heads, d = queries.shape
    keys_grad, values_grad = (
        t.new_empty(batch, heads, t.shape[1], d).transpose(1, 2) for t in (keys, values)
    )
    if parent_scores is None:
        scores_grad = keys.new_empty(0, dtype=accumulate_dtype(keys.dtype))
    else:
        scores_grad = parent_scores.new_empty(batch, heads, count, parents.shape[2])
        scores_grad = scores_grad.permute(0, 2, 3, 1)
    queries_grad = queries.new_empty(batch, heads, count, 4, d).permute(0, 2, 3, 1, 4)
    return queries_grad, keys_grad, values_grad, scores_grad


def _level_flops(queries, keys, values, parents, *others):
    return 2 * 2 * prod(queries) * 4 * parents[2]  # two products


register(
    'quadtree_level',
    'Tensor queries, Tensor keys, Tensor values, Tensor parents, Tensor? parent_scores, '
    'Tensor? padding, int topk, bool with_scores',
    outputs=['messages', 'scores', 'indices', 'kept'],
    fake=_fake_level,
    gradients=['queries', 'keys', 'values', 'parent_scores'],
    low_precision=['queries', 'keys', 'values'],
    flops=_level_flops,
    num_differentiable_outputs=2,
    saved_outputs=['kept'],
    fake_gradients=_fake_level_gradients,
    nondeterministic_backward=['cuda'],  # atomic additions to the gradients of keys and values
)


def _children(tokens: Tensor, parents: Tensor) -> Tensor:
    """The children of each parent: (B, M, heads, d), (B, heads, P, K) -> (B, heads, P, 4K, d)."""
    batch, count, heads, d = tokens.shape
    families = tokens.transpose(1, 2).reshape(batch * heads * count // 4, 4 * d)
    first = torch.arange(batch * heads, device=tokens.device).view(batch, heads, 1, 1) * (
        count // 4
    )
    gathered = families.index_select(0, (first + parents).flatten())
    return gathered.view(*parents.shape[:-1], 4 * parents.shape[-1], d)


def _softmax(scores: Tensor, padding: Tensor | None) -> Tensor:
    """Over the last dimension, in float32 or more; 0 for the padding, even where there is nothing else."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if padding is None:
        return scores.softmax(-1)
    # With -inf, a row that is all padding would be NaN, in its gradient too.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(padding, lowest).softmax(-1).masked_fill(padding, 0)


def _choose(p: Tensor, topk: int, padding: Tensor | None) -> Tensor:
    """Places of the ``topk`` greatest of the last dimension, the lower one first among equals."""
    p = p.detach()
    if padding is not None:
        p = p.masked_fill(padding, -1)  # after probabilities that have underflowed to 0
    if torch.onnx.is_in_onnx_export():  # there, it is TopK, which is stable by definition
        return p.sort(dim=-1, descending=True).indices[..., :topk]
    return p.sort(dim=-1, descending=True, stable=True).indices[..., :topk]


def _choose_without_sorting(p: Tensor, topk: int, padding: Tensor | None) -> Tensor:
    """:func:`_choose` of probabilities, by numbers that have no equals: their bits, then the place from behind."""
    if p.dtype != torch.float32 or exporting():  # ONNX has no bits of a number
        return _choose(p, topk, padding)
    p = p.detach()
    if padding is not None:
        p = p.masked_fill(padding, -1)
    count = p.shape[-1]
    from_behind = torch.arange(count - 1, -1, -1, device=p.device)
    unequal = p.view(torch.int32).to(torch.int64) * 2**32 + from_behind
    return unequal.topk(min(topk, count)).indices


def _message(p: Tensor, v: Tensor, kept: Tensor | None, attn_type: str) -> Tensor:
    if attn_type == 'A' and kept is not None:
        p = p.scatter(-1, kept, 0)  # the kept keys are refined by the next level
    return p.to(v.dtype) @ v


def _kept_scores(p: Tensor, kept: Tensor, attn_type: str, with_scores: bool) -> Tensor | None:
    if attn_type == 'A':
        return p.gather(
            -1, kept
        )  # the children's scores are multiples of theirs, also in the gradient
    return p.detach().gather(-1, kept) if with_scores else None


def _check_root(queries, keys, values, topk, attn_type, padding):
    if attn_type not in ('A', 'B'):
        raise ValueError(f"attn_type must be 'A' or 'B', got {attn_type!r}")
    _check_keys(keys, values, topk, padding)
    batch, count, heads, d = keys.shape
    if queries.ndim != 4 or tuple(queries.shape) != (batch, queries.shape[1], heads, d):
        expected = f'({batch}, N, {heads}, {d})'
        raise ValueError(f'queries must be {expected} as the keys are, got {tuple(queries.shape)}')
    if count < 1:
        raise ValueError(f'keys must have at least one token, got shape {tuple(keys.shape)}')


def _check_level(queries, keys, values, parents, topk, parent_scores, padding):
    _check_keys(keys, values, topk, padding)
    batch, count, heads, d = keys.shape
    if d < 1:
        raise ValueError(f'keys must have at least one channel, got shape {tuple(keys.shape)}')
    if count % 4:
        raise ValueError(f'keys must be 4 children of each parent, got shape {tuple(keys.shape)}')
    if queries.ndim != 5 or tuple(queries.shape) != (batch, queries.shape[1], 4, heads, d):
        expected = f'({batch}, P, 4, {heads}, {d})'
        raise ValueError(f'queries must be {expected} as the keys are, got {tuple(queries.shape)}')
    expected = (batch, queries.shape[1], heads)
    if parents.ndim != 4 or (*parents.shape[:2], parents.shape[3]) != expected:
        raise ValueError(
            f'parents must be ({batch}, {queries.shape[1]}, K, {heads}), got {tuple(parents.shape)}'
        )
    if parents.dtype != torch.int64:
        raise ValueError(f'parents must be int64 indices, got {parents.dtype}')
    if parent_scores is not None and parent_scores.shape != parents.shape:
        raise ValueError(
            f'parent_scores must be {tuple(parents.shape)} as the parents are, got {tuple(parent_scores.shape)}'
        )
    check_alike(queries=queries, keys=keys, values=values)
    check_device(queries=queries, parents=parents, parent_scores=parent_scores, padding=padding)
    if parent_scores is not None and not parent_scores.is_floating_point():
        raise ValueError(f'parent_scores must be floating-point, got {parent_scores.dtype}')


def _check_keys(keys, values, topk, padding):
    if keys.ndim != 4 or values.shape != keys.shape:
        raise ValueError(
            f'keys and values must both be (B, M, heads, d), got {tuple(keys.shape)} and {tuple(values.shape)}'
        )
    if topk is not None and (not isinstance(topk, int) or topk < 1):
        raise ValueError(f'topk must be an integer of at least 1 or None, got {topk!r}')
    if padding is not None and (
        tuple(padding.shape) != keys.shape[1:2] or padding.dtype != torch.bool
    ):
        raise ValueError(
            f'padding must be bool ({keys.shape[1]},), one for each key, '
            f'got {padding.dtype} {tuple(padding.shape)}'
        )
