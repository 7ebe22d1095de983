"""Levels of QuadTree attention (Tang et al., ICLR 2022, arXiv 2201.02767, section 3).

Tokens are in quad order: children 4i .. 4i + 3 of token i of the next coarser level are the tokens
of its 2 x 2 cell, (0, 0), (0, 1), (1, 0), (1, 1). :mod:`mmattn.attention.quadtree` brings maps into
that order and back.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import recording, use_compiled
from ._checks import check_alike, check_device, check_shape
from ._operator import Operator, accumulate_dtype, result_dtype, without_autocast


def quadtree_root(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    topk: int | None,
    attn_type: str = 'B',
    padding: Tensor | None = None,
    with_scores: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the coarsest level: full attention, and the choice of keys that the next level refines.

    Args:
        queries: (B, N, heads, d).
        keys: (B, M, heads, d).
        values: (B, M, heads, d).
        topk: keys that each query keeps, those of highest probability, at most all; None: nothing
            is chosen.
        attn_type: 'B': the message is the sum over all keys; 'A': over those that are not kept.
        padding: (M,), true for keys outside the map. They get probability 0 and are kept only after
            all others.
        with_scores: return type B's scores too.

    Returns:
        messages (B, N, heads, d) in the dtype of ``values``; indices of the kept keys, int64
        (B, N, K, heads), highest probability first and the lower index first among equals; their
        probabilities, at least float32. The last two are None where nothing is chosen, the last one
        also in type B without ``with_scores``.

    Raises:
        ValueError: a shape, ``topk`` or ``attn_type`` does not fit the others.
    """
    _check_root(queries, keys, values, topk, attn_type, padding)
    q, k, v = (t.transpose(1, 2) for t in (queries, keys, values))
    # In ONNX, torch writes the fused attention from opset 14 on only.
    if topk is None and attn_type == 'B' and not torch.onnx.is_in_onnx_export():
        mask = None if padding is None else ~padding.unsqueeze(0)
        messages = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return messages.transpose(1, 2), None, None
    with without_autocast(q):  # in half types the products overflow
        q, k = (t.to(accumulate_dtype(t.dtype)) for t in (q, k))
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
    """Run a finer level: the children of a query token attend to the children of its kept keys.

    Candidate 4i + c is child c of the i-th kept key. Type B (without ``parent_scores``) takes the
    softmax over all 4K candidates, and the message is the sum over all of them. Type A (with
    ``parent_scores``) takes the softmax over the four children of each kept key, times that key's
    score; the message is the sum over the candidates that are not kept.

    Args:
        queries: (B, P, 4, heads, d), the children of P query tokens.
        keys: (B, M, heads, d), in quad order.
        values: (B, M, heads, d), in quad order.
        parents: indices of the keys kept by the P query tokens, int64 (B, P, K, heads), below M /
            4.
        topk: candidates that each query keeps, those of highest probability, at most all; None at
            the finest level: nothing is chosen.
        parent_scores: type A's scores of ``parents``, (B, P, K, heads), at least float32.
        padding: (M,), true for keys outside the map. They get probability 0 and are kept only after
            all others.
        with_scores: return type B's scores too.

    Returns:
        messages (B, P, 4, heads, d) in the dtype of ``values``; indices of the kept keys, int64
        (B, P, 4, K', heads), highest probability first and the lower candidate first among equals;
        their scores, at least float32. The last two are None where nothing is chosen, the last one
        also in type B without ``with_scores``. Gradients flow into queries, keys, values and
        parent_scores.

    Raises:
        ValueError: a shape, dtype, device or ``topk`` does not fit the others.
    """
    _check_level(queries, keys, values, parents, topk, parent_scores, padding)
    if not use_compiled('quadtree_level', queries.device.type):
        return _level(queries, keys, values, parents, topk, parent_scores, padding, with_scores)
    if parent_scores is not None:
        parent_scores = parent_scores.to(accumulate_dtype(result_dtype(values)))
    messages, scores, indices, _ = torch.ops.mmattn.quadtree_level(
        queries, keys, values, parents, parent_scores, padding, topk or 0, with_scores
    )
    if topk is None:
        return messages, None, None
    if parent_scores is None:
        return messages, indices, scores.detach() if with_scores else None
    return messages, indices, scores


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
    """PyTorch reference of :func:`quadtree_level`."""
    _check_level(queries, keys, values, parents, topk, parent_scores, padding)
    return _level(queries, keys, values, parents, topk, parent_scores, padding, with_scores)


def _level(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    parents: Tensor,
    topk: int | None,
    parent_scores: Tensor | None,
    padding: Tensor | None,
    with_scores: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = result_dtype(values)
    queries, keys, values = (t.to(accumulate_dtype(values.dtype)) for t in (queries, keys, values))
    attn_type = 'B' if parent_scores is None else 'A'
    parents = parents.permute(0, 3, 1, 2)  # (B, heads, P, K)
    if padding is not None:
        padding = padding.view(-1, 4)[parents].flatten(-2).unsqueeze(-2)  # (B, heads, P, 1, 4K)
    with without_autocast(values):
        q = queries.permute(0, 3, 1, 2, 4) * queries.shape[-1] ** -0.5  # (B, heads, P, 4, d)
        k, v = _children(keys, parents), _children(values, parents)  # (B, heads, P, 4K, d)
        s = q @ k.transpose(-2, -1)  # (B, heads, P, 4, 4K)
        if parent_scores is None:
            p = _softmax(s, padding)
        else:
            families = None if padding is None else padding.reshape(*parents.shape, 4).unsqueeze(-3)
            p = _softmax(s.reshape(*s.shape[:-1], parents.shape[-1], 4), families)
            p = (p * parent_scores.permute(0, 3, 1, 2)[..., None, :, None]).flatten(-2)
        kept = None if topk is None else _choose(p, topk, padding)
        messages = _message(p, v, kept, attn_type).permute(0, 2, 3, 1, 4).to(dtype)
    if kept is None:
        return messages, None, None
    scores = _kept_scores(p, kept, attn_type, with_scores)
    own_parents = parents.unsqueeze(-2).expand(*kept.shape[:-1], -1).gather(-1, kept // 4)
    indices = (4 * own_parents + kept % 4).permute(0, 2, 3, 4, 1)
    return messages, indices, None if scores is None else scores.permute(0, 2, 3, 4, 1)


def _fake_level(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    parents: Tensor,
    parent_scores: Tensor | None,
    padding: Tensor | None,
    topk: int,
    with_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _fake_level_gradients(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    parents: Tensor,
    parent_scores: Tensor | None,
    **others: Tensor | int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _level_flops(
    queries: torch.Size,
    keys: torch.Size,
    values: torch.Size,
    parents: torch.Size,
    *others: torch.Size | int | None,
) -> int:
    return 2 * 2 * prod(queries) * 4 * parents[2]  # two products


Operator(
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
    """Softmax over the last dimension, at least in float32; the padding gets 0, even alone."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if padding is None:
        return scores.softmax(-1)
    # With -inf, a row that is all padding would be NaN, in its gradient too.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(padding, lowest).softmax(-1).masked_fill(padding, 0)


def _choose(p: Tensor, topk: int, padding: Tensor | None) -> Tensor:
    """Indices of the ``topk`` largest of the last dimension, the lower one first among equals."""
    p = p.detach()
    if padding is not None:
        p = p.masked_fill(padding, -1)  # after probabilities that have underflowed to 0
    if torch.onnx.is_in_onnx_export():  # there, it is TopK, which is stable by definition
        return p.sort(dim=-1, descending=True).indices[..., :topk]
    return p.sort(dim=-1, descending=True, stable=True).indices[..., :topk]


def _choose_without_sorting(p: Tensor, topk: int, padding: Tensor | None) -> Tensor:
    """Faster :func:`_choose` of probabilities: ``topk`` of integers that are never equal.

    An integer is the bits of a probability, which order as it does, then the reversed index.
    """
    if p.dtype != torch.float32 or recording():  # neither ONNX nor jit can reinterpret bits
        return _choose(p, topk, padding)
    p = p.detach()
    if padding is not None:
        p = p.masked_fill(padding, -1)
    count = p.shape[-1]
    reversed_index = torch.arange(count - 1, -1, -1, device=p.device)
    unequal = p.view(torch.int32).to(torch.int64) * 2**32 + reversed_index
    return unequal.topk(min(topk, count)).indices


def _message(p: Tensor, v: Tensor, kept: Tensor | None, attn_type: str) -> Tensor:
    if attn_type == 'A' and kept is not None:
        p = p.scatter(-1, kept, 0)  # the kept keys are refined by the next level
    return p.to(v.dtype) @ v


def _kept_scores(p: Tensor, kept: Tensor, attn_type: str, with_scores: bool) -> Tensor | None:
    if attn_type == 'A':
        # With a gradient: the children's scores are multiples of it.
        return p.gather(-1, kept)
    return p.detach().gather(-1, kept) if with_scores else None


def _check_root(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    topk: int | None,
    attn_type: str,
    padding: Tensor | None,
) -> None:
    if attn_type not in ('A', 'B'):
        raise ValueError(f"attn_type must be 'A' or 'B', got {attn_type!r}")
    _check_keys(keys, values, topk, padding)
    batch, count, heads, d = keys.shape
    check_shape('queries', queries, 'B N heads d', (batch, None, heads, d))
    if count < 1:
        raise ValueError(f'keys must have at least one token, got shape {tuple(keys.shape)}')


def _check_level(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    parents: Tensor,
    topk: int | None,
    parent_scores: Tensor | None,
    padding: Tensor | None,
) -> None:
    _check_keys(keys, values, topk, padding)
    batch, count, heads, d = keys.shape
    if d < 1:
        raise ValueError(f'keys must have at least one channel, got shape {tuple(keys.shape)}')
    if count % 4:
        raise ValueError(f'keys must be 4 children of each parent, got shape {tuple(keys.shape)}')
    check_shape('queries', queries, 'B P 4 heads d', (batch, None, 4, heads, d))
    of_parents = (batch, queries.shape[1], None, heads)
    check_shape('parents', parents, 'B P K heads', of_parents)
    if parents.dtype != torch.int64:
        raise ValueError(f'parents must be int64 indices, got {parents.dtype}')
    if parent_scores is not None:
        check_shape('parent_scores', parent_scores, 'B P K heads', tuple(parents.shape))
    check_alike(queries=queries, keys=keys, values=values)
    check_device(queries=queries, parents=parents, parent_scores=parent_scores, padding=padding)
    if parent_scores is not None and not parent_scores.is_floating_point():
        raise ValueError(f'parent_scores must be floating-point, got {parent_scores.dtype}')


def _check_keys(keys: Tensor, values: Tensor, topk: int | None, padding: Tensor | None) -> None:
    if keys.ndim != 4 or values.shape != keys.shape:
        raise ValueError(
            'keys and values must both be (B, M, heads, d), '
            f'got {tuple(keys.shape)} and {tuple(values.shape)}'
        )
    if topk is not None and (not isinstance(topk, int) or topk < 1):
        raise ValueError(f'topk must be an integer of at least 1 or None, got {topk!r}')
    if padding is not None:
        check_shape('padding', padding, 'M', (keys.shape[1],))
        if padding.dtype != torch.bool:
            raise ValueError(f'padding must be bool ({keys.shape[1]},), got {padding.dtype}')
