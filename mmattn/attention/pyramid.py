"""QuadTree attention over given token pyramids (arXiv 2201.02767, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmattn.ops.quadtree import quadtree_level, quadtree_root

from .details import KeptKeys

ATTN_TYPES = ('A', 'B')


def quadtree_attention(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    num_heads: int,
    topks: int | Sequence[int],
    attn_type: str = 'B',
    level_weights: Tensor | None = None,
    key_extent: tuple[int, int] | None = None,
) -> Tensor:
    """Attend fully at the coarsest level, then among the children of the kept keys.

    Args:
        queries: one map (B, heads*d, H_l, W_l) a level, finest first; each level halves the sides
            of the finer one exactly.
        keys: likewise; their sides may differ from those of the queries.
        values: maps of the shapes of the keys.
        num_heads: heads; head h owns channels h*d .. (h+1)*d - 1.
        topks: keys that each query keeps, at every level or one number a level, coarsest first; all
            are kept where a level has no more. The finest level keeps none, except in type A with
            one level.
        attn_type: 'A': each kept key's score is divided among its children; 'B': a softmax at each
            level.
        level_weights: (levels,), logits of type B's mix of the levels, coarsest first; without them
            the levels are summed.
        key_extent: (rows, columns) of the finest keys that are no padding, if not all are. Keys of
            any level that lie wholly outside get probability 0.

    Returns:
        (B, H_0*W_0, heads, d) in the dtype of the values, tokens row-major.

    Raises:
        ValueError: an argument does not fit the others; the message names it and the level (0 is
            the finest).
    """
    return attend_pyramids(
        queries, keys, values, num_heads, topks, attn_type, level_weights, key_extent
    )[0]


def attend_pyramids(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    num_heads: int,
    topks: int | Sequence[int],
    attn_type: str = 'B',
    level_weights: Tensor | None = None,
    key_extent: tuple[int, int] | None = None,
    inspect: bool = False,
) -> tuple[Tensor, list[KeptKeys]]:
    """Message of :func:`quadtree_attention`, and with ``inspect`` the keys that its levels kept."""
    levels = _check(queries, keys, values, num_heads, topks, attn_type, level_weights, key_extent)
    topks = [topks] * levels if isinstance(topks, int) else topks
    weights = None if level_weights is None else level_weights.softmax(0)

    def padding(depth: int) -> Tensor | None:
        return None if key_extent is None else _padding(keys, levels - 1 - depth, key_extent, depth)

    def weigh(message: Tensor, depth: int) -> Tensor:
        return message if weights is None else message * weights[depth].to(message.dtype)

    kept = []
    q, k, v = (_to_quads(maps[-1], num_heads, 0) for maps in (queries, keys, values))
    chosen = topks[0] if levels > 1 or attn_type == 'A' else None
    message, indices, scores = quadtree_root(q, k, v, chosen, attn_type, padding(0), inspect)
    message = weigh(message, 0)
    for depth in range(1, levels):
        level = levels - 1 - depth
        assert indices is not None  # every level but the finest chooses
        if inspect:
            kept.append(_kept_keys(queries[level + 1], keys[level + 1], indices, scores, depth - 1))
        q, k, v = (_to_quads(maps[level], num_heads, depth) for maps in (queries, keys, values))
        own, indices, scores = quadtree_level(
            q.reshape(*indices.shape[:2], 4, *q.shape[2:]),
            k,
            v,
            indices,
            topks[depth] if level else None,
            scores if attn_type == 'A' else None,
            padding(depth),
            inspect,
        )
        indices, scores = (None if t is None else t.flatten(1, 2) for t in (indices, scores))
        message = _refine(message, weigh(own.flatten(1, 2), depth))
    if inspect and indices is not None:
        kept.append(_kept_keys(queries[0], keys[0], indices, scores, levels - 1))
    height, width = queries[0].shape[2:]
    return _from_quads(message, height, width, levels - 1), kept


def check_attn_type(attn_type: str) -> None:
    """Raise a ValueError unless the type is one of :data:`ATTN_TYPES`."""
    if attn_type not in ATTN_TYPES:
        raise ValueError(f'attn_type must be one of {", ".join(ATTN_TYPES)}, got {attn_type!r}')


def check_topks(topks: int | Sequence[int], num_levels: int) -> None:
    """Raise a ValueError unless ``topks`` is a positive integer, or one for each level."""
    if isinstance(topks, int):
        topks, levels = [topks], ['every level']
    elif isinstance(topks, Sequence) and len(topks) == num_levels:
        levels = [f'level {num_levels - 1 - i}' for i in range(num_levels)]
    else:
        raise ValueError(
            f'topks must be an integer or {num_levels} of them, one a level, coarsest first, '
            f'got {topks!r}'
        )
    for topk, level in zip(topks, levels, strict=True):
        if not isinstance(topk, int) or topk < 1:
            raise ValueError(f'topks must be integers of at least 1, got {topk!r} for {level}')


def _to_quads(x: Tensor, num_heads: int, depth: int) -> Tensor:
    """(B, heads*d, H, W) -> (B, H*W, heads, d), in quad order within cells of side 2**depth."""
    batch, channels, height, width = x.shape
    cell, d = 2**depth, channels // num_heads
    halves = [2] * depth
    # Channels last before the tokens move: the gradient of both steps in one is far slower.
    x = x.permute(0, 2, 3, 1).contiguous()
    x = x.view(batch, height // cell, *halves, width // cell, *halves, num_heads, d)
    rows, columns = range(1, 2 + depth), range(2 + depth, 3 + 2 * depth)
    tokens = [dim for pair in zip(rows, columns, strict=True) for dim in pair]
    # Heads outermost in memory: the children of a key are then one piece for each head.
    x = x.permute(0, x.ndim - 2, *tokens, x.ndim - 1).reshape(batch, num_heads, height * width, d)
    return x.transpose(1, 2)


def _from_quads(x: Tensor, height: int, width: int, depth: int) -> Tensor:
    """Tokens (B, H*W, ...) back from :func:`_to_quads` into row-major order."""
    cell = 2**depth
    rest = x.shape[2:]
    x = x.reshape(x.shape[0], height // cell, width // cell, *[2] * (2 * depth), *rest)
    rows, columns = range(1, 3 + 2 * depth, 2), range(2, 3 + 2 * depth, 2)
    rest_dims = range(3 + 2 * depth, x.ndim)
    return x.permute(0, *rows, *columns, *rest_dims).reshape(x.shape[0], height * width, *rest)


def _refine(coarse: Tensor, fine: Tensor) -> Tensor:
    """Sum of two levels' messages, (B, P, heads, d) and (B, 4P, heads, d), at the finer one."""
    return (coarse.unsqueeze(2) + fine.reshape(*coarse.shape[:2], 4, *fine.shape[2:])).flatten(1, 2)


def _padding(keys: Sequence[Tensor], level: int, extent: tuple[int, int], depth: int) -> Tensor:
    """Mask of a level's keys wholly outside ``extent`` of the finest, (H_l*W_l,) in quad order."""
    height, width = keys[level].shape[2:]
    device = keys[level].device
    rows, columns = (
        torch.arange(side, device=device) * 2**level >= inside
        for side, inside in zip((height, width), extent, strict=True)
    )
    outside = rows[:, None] | columns
    return _to_quads(outside[None, None], 1, depth).flatten()


def _kept_keys(
    query_map: Tensor, key_map: Tensor, indices: Tensor, scores: Tensor | None, depth: int
) -> KeptKeys:
    """Keys kept by a level, tokens in row-major order."""
    assert scores is not None  # returned with `inspect`
    (height, width), (rows, columns) = query_map.shape[2:], key_map.shape[2:]
    row_major = torch.arange(rows * columns, device=indices.device)
    row_major = _to_quads(row_major.view(1, 1, rows, columns), 1, depth).flatten()
    return KeptKeys(
        (height, width),
        (rows, columns),
        _from_quads(row_major[indices], height, width, depth),
        _from_quads(scores.detach(), height, width, depth),
    )


def _check(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    num_heads: int,
    topks: int | Sequence[int],
    attn_type: str,
    level_weights: Tensor | None,
    key_extent: tuple[int, int] | None,
) -> int:
    """Number of levels, or a ValueError that names the argument and the level."""
    levels = len(queries)
    if not levels or not len(keys) == len(values) == levels:
        raise ValueError(
            f'queries, keys and values must be lists of equal length, one map a level, '
            f'got {levels}, {len(keys)} and {len(values)} maps'
        )
    check_attn_type(attn_type)
    check_topks(topks, levels)
    for name, maps in (('queries', queries), ('keys', keys), ('values', values)):
        for level, x in enumerate(maps):
            _check_map(name, level, x, maps, num_heads)
    for level, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        if q.shape[:2] != k.shape[:2] or k.shape != v.shape:
            raise ValueError(
                f'queries, keys and values must agree in batch and channels, '
                f'and keys and values in size, got {tuple(q.shape)}, {tuple(k.shape)} '
                f'and {tuple(v.shape)} at level {level}'
            )
    if level_weights is not None and attn_type == 'A':
        raise ValueError("level_weights are type B's, type A sums its levels: got both")
    if level_weights is not None and tuple(level_weights.shape) != (levels,):
        raise ValueError(
            f'level_weights must be ({levels},), one a level, got {tuple(level_weights.shape)}'
        )
    sides = tuple(keys[0].shape[2:])
    if key_extent is not None and not all(
        0 < inside <= side for inside, side in zip(key_extent, sides, strict=True)
    ):
        raise ValueError(
            f'key_extent must be rows and columns of the finest keys {sides}, got {key_extent}'
        )
    return levels


def _check_map(name: str, level: int, x: Tensor, maps: Sequence[Tensor], num_heads: int) -> None:
    shape = tuple(x.shape)
    if x.ndim != 4 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(
            f'{name} must be maps (B, heads*d, H, W), got shape {shape} at level {level}'
        )
    if num_heads < 1 or x.shape[1] < 1 or x.shape[1] % num_heads:
        raise ValueError(
            f'channels of {name} must be a multiple of num_heads, '
            f'got {x.shape[1]} channels at level {level} and num_heads {num_heads}'
        )
    if level:
        finer = tuple(maps[level - 1].shape)
        if finer != (*shape[:2], *(2 * side for side in shape[2:])):
            raise ValueError(
                f'each level of {name} must halve the sides of the finer one, '
                f'got {shape} at level {level} after {finer}'
            )
