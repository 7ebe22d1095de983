"""QuadTree attention (Tang et al., ICLR 2022, arXiv 2201.02767), self and cross, types A and B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.ops._backend import known_equal
from mmattn.ops.quadtree import quadtree_level, quadtree_root

ATTN_TYPES = ('A', 'B')
VALUE_ACTS = {'ReLU': nn.ReLU, 'GELU': nn.GELU}


class KeptKeys(NamedTuple):
    """What the queries of a level have kept.

    Attributes:
        query_size: rows and columns of the level's queries, their padding included.
        key_size: rows and columns of the level's keys, their padding included.
        indices: row-major indices of the kept keys, int64 (B, queries, K, heads), queries row-major too and the
            most probable key first.
        scores: their probabilities at this level, and in type A the product with those of all ancestors,
            (B, queries, K, heads).
    """

    query_size: tuple[int, int]
    key_size: tuple[int, int]
    indices: Tensor
    scores: Tensor


def quadtree_attention(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    num_heads: int,
    topks: int | Sequence[int],
    attn_type: str = 'B',
    level_weights: Tensor | None = None,
    key_extent: tuple[int, int] | None = None,
    kept: list[KeptKeys] | None = None,
) -> Tensor:
    """Attention through token pyramids: full at the coarsest level, then among the children of the kept keys.

    Args:
        queries: one map (B, heads*d, H_l, W_l) a level, finest first; each level halves the sides exactly.
        keys: likewise; their sides may differ from those of the queries.
        values: the shapes of the keys.
        num_heads: heads; head h owns channels h*d .. (h+1)*d - 1.
        topks: keys that each query keeps, at every level or one a level, coarsest first; all are kept where a
            level has no more. The finest level keeps none, but in type A with one level.
        attn_type: 'A': each kept key's score is divided among its children; 'B': a softmax at each level.
        level_weights: (levels,), logits of type B's mix of the levels, coarsest first; without them the levels
            are summed.
        key_extent: (rows, columns) of the finest keys that are no padding, if not all are. Keys of any level that
            lie wholly outside get probability 0.
        kept: a list to which every level that chooses appends its :class:`KeptKeys`, coarsest first.

    Returns:
        (B, H_0*W_0, heads, d) in the dtype of the values, tokens row-major.

    Raises:
        ValueError: an argument does not fit the others; the message names it, and the level (0 is the finest).
    """
    levels = _check(queries, keys, values, num_heads, topks, attn_type, level_weights, key_extent)
    topks = [topks] * levels if isinstance(topks, int) else topks
    weights = None if level_weights is None else level_weights.softmax(0)
    message = indices = scores = None
    for i, topk in enumerate(topks):
        level = levels - 1 - i
        q, k, v = (_to_quads(t[level], num_heads, i) for t in (queries, keys, values))
        padding = None if key_extent is None else _padding(keys, level, key_extent, i)
        if i == 0:
            chosen = topk if levels > 1 or attn_type == 'A' else None
            own, indices, scores = quadtree_root(
                q, k, v, chosen, attn_type, padding, kept is not None
            )
        else:
            q = q.unflatten(1, (-1, 4))
            chosen = topk if level else None
            parent_scores = scores if attn_type == 'A' else None
            own, indices, scores = (
                None if t is None else t.flatten(1, 2)
                for t in quadtree_level(
                    q, k, v, indices, chosen, parent_scores, padding, kept is not None
                )
            )
        if weights is not None:
            own = own * weights[i].to(own.dtype)
        message = own if message is None else _refine(message, own)
        if kept is not None and indices is not None:
            kept.append(_kept_keys(queries[level], keys[level], indices, scores, i))
    return _from_quads(message, *queries[0].shape[2:], levels - 1)


class LevelMix(nn.Module):
    """What type B adds to the levels' messages: their learned weights, and the values' local enhancement.

    Args:
        dim: channels C.
        num_levels: levels L.
        lepe: add a depthwise convolution of each level's values to its message (arXiv 2107.00652).
        level_weights: weight the levels instead of summing them.
    """

    def __init__(self, dim: int, num_levels: int, lepe: bool, level_weights: bool):
        super().__init__()
        weight = nn.Parameter(torch.zeros(num_levels)) if level_weights else None
        self.register_parameter('weight', weight)
        convs = [nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(num_levels * lepe)]
        self.get_vs = nn.ModuleList(convs)

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        """The values' pyramid, finest first -> the mix of its convolutions, (B, C, H_0, W_0)."""
        weights = (
            [1.0] * len(self.get_vs) if self.weight is None else self.weight.softmax(0).unbind()
        )
        mix = None
        for conv, weight, value in zip(self.get_vs, weights, reversed(values), strict=True):
            own = weight * conv(value)
            mix = own if mix is None else own + F.interpolate(mix, size=own.shape[2:])
        return mix


class QuadTreeAttention(nn.Module):
    """Multi-head QuadTree attention of a map to itself or to another one, at a cost linear in the tokens.

    Maps of any size: where a side does not divide by 2**(num_levels - 1), queries, keys and values are padded at
    the bottom and at the right by repeating the last row and column; keys wholly in the padding are never
    attended, and the result is cropped.

    Args:
        dim: channels C of the maps.
        num_heads: heads; head h owns channels h*C/num_heads .. (h+1)*C/num_heads - 1.
        num_levels: levels of the pyramids, 1 to 5.
        topks: keys that each query keeps, at every level or one a level, coarsest first.
        attn_type: 'A' or 'B' (section 3). Type A has none of the three options below.
        value_act: 'ReLU' (the published detectors and segmentors) or 'GELU' (the published classifiers) in the
            learned branches that make each level's values of the finer one's; None takes the mean of each cell.
        lepe: add a depthwise convolution of each level's values to its message; for maps of one size.
        level_weights: weight the levels by a learned softmax instead of summing them.

    Raises:
        ValueError: an argument is out of range, or dim is no multiple of num_heads; in ``forward``, with ``lepe``,
            the context has another size than the map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_levels: int,
        topks: int | Sequence[int],
        attn_type: str = 'B',
        value_act: str | None = None,
        lepe: bool = False,
        level_weights: bool = False,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f'dim must be a multiple of num_heads, got dim {dim} and num_heads {num_heads}'
            )
        if not isinstance(num_levels, int) or not 1 <= num_levels <= 5:
            raise ValueError(f'num_levels must be an integer from 1 to 5, got {num_levels!r}')
        check_attn_type(attn_type)
        check_topks(topks, num_levels)
        if value_act is not None and value_act not in VALUE_ACTS:
            choices = ', '.join(VALUE_ACTS)
            raise ValueError(f'value_act must be one of {choices} or None, got {value_act!r}')
        options = dict(value_act=value_act, lepe=lepe, level_weights=level_weights)
        if attn_type == 'A' and any(options.values()):
            raise ValueError(
                f'value_act, lepe and level_weights are for attn_type B, got {options}'
            )
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.topks = topks
        self.attn_type = attn_type
        self.q_proj = nn.Conv2d(dim, dim, 1)
        self.k_proj = nn.Conv2d(dim, dim, 1)
        self.v_proj = nn.Conv2d(dim, dim, 1)
        self.value_branchs = nn.ModuleList(
            value_branch(dim, VALUE_ACTS[value_act]) if value_act else nn.AvgPool2d(2)
            for _ in range(num_levels - 1)
        )
        self.py_att = LevelMix(dim, num_levels, lepe, level_weights)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        query_map: Tensor,
        context_map: Tensor | None = None,
        kept: list[KeptKeys] | None = None,
    ) -> Tensor:
        """Map (B, C, H, W), and a context (B, C, H', W') if it is not the map itself -> (B, C, H, W).

        ``kept``: a list to which every level that chooses appends its :class:`KeptKeys`, coarsest first.
        """
        context = query_map if context_map is None else context_map
        self.check(query_map, context)
        height, width = query_map.shape[2:]
        queries = self.pyramid(self.pad(pointwise(self.q_proj, query_map)))
        keys = self.pyramid(self.pad(pointwise(self.k_proj, context)))
        values = [self.pad(pointwise(self.v_proj, context))]
        for branch in self.value_branchs:
            values.append(branch(values[-1]))
        # An exported graph may leave the map's sides open; keys of its padding are then always masked.
        is_padded = not all(map(known_equal, keys[0].shape[2:], context.shape[2:]))
        message = quadtree_attention(
            queries,
            keys,
            values,
            self.num_heads,
            self.topks,
            self.attn_type,
            self.py_att.weight,
            key_extent=tuple(context.shape[2:]) if is_padded else None,
            kept=kept,
        )
        message = message.flatten(2).unflatten(1, queries[0].shape[2:])
        if len(self.py_att.get_vs):
            message = message + self.py_att(values).permute(0, 2, 3, 1)
        message = message.narrow(1, 0, height).narrow(2, 0, width)
        return self.proj(message).permute(0, 3, 1, 2)

    def weights(
        self, query_map: Tensor, queries: Tensor, context_map: Tensor | None = None
    ) -> list[Tensor]:
        """How much of each level's values :meth:`forward`'s message holds for chosen queries, without the lepe.

        The message is linear in the values, so its gradient by them is the attention, whichever operators serve;
        each channel of a head answers for another query.

        Args:
            query_map, context_map: (B, C, H, W) and (B, C, H', W'), as for :meth:`forward`; one of another size is
                taken with ``lepe``, too.
            queries: row-major indices of some tokens of the map, int64 (n,).

        Returns:
            One (B, n, heads, H'_l, W'_l) a level, coarsest first, the padding included; in type B all levels together
            sum to 1 for each query and head.
        """
        context = query_map if context_map is None else context_map
        maps = self.pyramid(self.pad(pointwise(self.q_proj, query_map)))
        keys = [k.detach() for k in self.pyramid(self.pad(pointwise(self.k_proj, context)))]
        values = [torch.zeros_like(k, requires_grad=True) for k in keys]
        is_padded = keys[0].shape[2:] != context.shape[2:]
        with torch.enable_grad():
            message = quadtree_attention(
                [q.detach() for q in maps],
                keys,
                values,
                self.num_heads,
                self.topks,
                self.attn_type,
                None if self.py_att.weight is None else self.py_att.weight.detach(),
                key_extent=tuple(context.shape[2:]) if is_padded else None,
            )
        width, padded_width = query_map.shape[3], maps[0].shape[3]
        tokens = queries // width * padded_width + queries % width
        parts = []
        for some in tokens.split(message.shape[3]):
            probe = torch.zeros_like(message)
            probe[:, some, :, range(len(some))] = 1
            gradients = torch.autograd.grad(message, values, probe, retain_graph=True)
            parts.append(
                [g.unflatten(1, (self.num_heads, -1))[:, :, : len(some)] for g in gradients]
            )
        return [torch.cat(level, 2).transpose(1, 2) for level in zip(*parts, strict=True)][::-1]

    def check(self, query_map: Tensor, context: Tensor) -> None:
        dim = self.q_proj.in_channels
        for name, x in (('query_map', query_map), ('context_map', context)):
            if x.ndim != 4 or x.shape[1] != dim or min(x.shape[2:]) < 1:
                raise ValueError(f'{name} must be (B, {dim}, H, W), got shape {tuple(x.shape)}')
        if len(self.py_att.get_vs) and context.shape != query_map.shape:
            raise ValueError(
                f'with lepe, context_map must have the size of query_map, '
                f'got {tuple(context.shape)} and {tuple(query_map.shape)}'
            )

    def pad(self, x: Tensor) -> Tensor:
        cell = 2 ** (self.num_levels - 1)
        bottom, right = (((side - 1) // cell + 1) * cell - side for side in x.shape[2:])
        if known_equal(bottom, 0) and known_equal(right, 0):
            return x
        return F.pad(x, (0, right, 0, bottom), mode='replicate')

    def pyramid(self, x: Tensor) -> list[Tensor]:
        levels = [x]
        for _ in range(self.num_levels - 1):
            levels.append(F.avg_pool2d(levels[-1], 2))
        return levels


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 x 1 convolution of (B, C, H, W) as a matrix product, whose result is channel-last in memory."""
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def value_branch(dim: int, act: type[nn.Module]) -> nn.Sequential:
    """Type B's way from a level's values to those of the next coarser level, on (B, C, H, W)."""
    return nn.Sequential(
        nn.GroupNorm(1, dim),
        act(),
        nn.Conv2d(dim, dim, 2, stride=2),
        nn.GroupNorm(1, dim),
        act(),
        nn.Conv2d(dim, dim, 1),
    )


def check_attn_type(attn_type: str) -> None:
    if attn_type not in ATTN_TYPES:
        raise ValueError(f'attn_type must be one of {", ".join(ATTN_TYPES)}, got {attn_type!r}')


def check_topks(topks: int | Sequence[int], num_levels: int) -> None:
    if isinstance(topks, int):
        topks, levels = [topks], ['every level']
    elif isinstance(topks, Sequence) and len(topks) == num_levels:
        levels = [f'level {num_levels - 1 - i}' for i in range(num_levels)]
    else:
        raise ValueError(
            f'topks must be an integer or {num_levels} of them, one a level, coarsest first, got {topks!r}'
        )
    for topk, level in zip(topks, levels, strict=True):
        if not isinstance(topk, int) or topk < 1:
            raise ValueError(f'topks must be integers of at least 1, got {topk!r} for {level}')


def _to_quads(x: Tensor, num_heads: int, depth: int) -> Tensor:
    """(B, heads*d, H, W) -> (B, H*W, heads, d): cells of side 2**depth row-major, quad order within each."""
    batch, channels, height, width = x.shape
    cell, d = 2**depth, channels // num_heads
    halves = [2] * depth
    # Channels last before the tokens move: a gradient that takes both steps in one is several times slower.
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
    """The sum of two levels' messages, (B, P, heads, d) and (B, 4P, heads, d), at the finer one."""
    return (coarse.unsqueeze(2) + fine.unflatten(1, (-1, 4))).flatten(1, 2)


def _padding(keys: Sequence[Tensor], level: int, extent: tuple[int, int], depth: int) -> Tensor:
    """(H_l*W_l,) in quad order: which keys of a level lie wholly outside ``extent`` of the finest."""
    height, width = keys[level].shape[2:]
    device = keys[level].device
    rows, columns = (
        torch.arange(side, device=device) * 2**level >= inside
        for side, inside in zip((height, width), extent, strict=True)
    )
    outside = rows[:, None] | columns
    return _to_quads(outside[None, None], 1, depth).flatten()


def _kept_keys(
    query_map: Tensor, key_map: Tensor, indices: Tensor, scores: Tensor, depth: int
) -> KeptKeys:
    query_size, key_size = tuple(query_map.shape[2:]), tuple(key_map.shape[2:])
    row_major = torch.arange(key_size[0] * key_size[1], device=indices.device)
    row_major = _to_quads(row_major.view(1, 1, *key_size), 1, depth).flatten()
    return KeptKeys(
        query_size,
        key_size,
        _from_quads(row_major[indices], *query_size, depth),
        _from_quads(scores.detach(), *query_size, depth),
    )


def _check(queries, keys, values, num_heads, topks, attn_type, level_weights, key_extent) -> int:
    """The number of levels, or an error that says what does not fit, and at which level."""
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
                f'queries, keys and values must agree in batch and channels, and keys and values in size, '
                f'got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)} at level {level}'
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
            f'channels of {name} must be a multiple of num_heads, got {x.shape[1]} channels at level {level} '
            f'and num_heads {num_heads}'
        )
    if level:
        finer = tuple(maps[level - 1].shape)
        if finer != (*shape[:2], *(2 * side for side in shape[2:])):
            raise ValueError(
                f'each level of {name} must halve the sides of the finer one, got {shape} at level {level} '
                f'after {finer}'
            )
