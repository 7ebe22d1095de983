"""QuadTree attention (Tang et al., ICLR 2022, arXiv 2201.02767): self and cross, types A and B."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.layers import pad_to_multiple
from mmattn.ops import known_equal

from .details import KeptKeys, QuadTreeDetails
from .heads import check_heads, select_queries
from .pyramid import attend_pyramids, check_attn_type, check_topks

VALUE_ACTS = {'ReLU': nn.ReLU, 'GELU': nn.GELU}


class QuadTreeAttention(nn.Module):
    """Multi-head QuadTree attention of a map to itself or to another one, at linear cost.

    Maps of any size: where 2**(num_levels - 1) does not divide a side, queries, keys and values
    are padded at the bottom and at the right by repeating the last row and column; keys wholly in
    the padding are never attended, and the result is cropped.

    Args:
        dim: channels C of the maps.
        num_heads: heads; head h owns channels h*C/num_heads .. (h+1)*C/num_heads - 1.
        num_levels: levels of the pyramids, 1 to 5.
        topks: keys that each query keeps, at every level or one a level, coarsest first.
        attn_type: 'A' or 'B' (section 3). Type A has none of the three options below.
        value_act: 'ReLU' (the published detectors and segmentors) or 'GELU' (the published
            classifiers) in the learned branches that make the values of each level from those of
            the finer one; None takes the mean of each cell.
        lepe: add a depthwise convolution of each level's values to its message (arXiv 2107.00652);
            for maps of one size.
        level_weights: weight the levels by a learned softmax instead of summing them.

    Raises:
        ValueError: an argument is out of range, or dim is no multiple of num_heads; in ``forward``,
            a map has another number of channels or, with ``lepe``, the two differ in size.
    """

    level_weights: nn.Parameter | None

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
        check_heads(dim, num_heads)
        if not isinstance(num_levels, int) or not 1 <= num_levels <= 5:
            raise ValueError(f'num_levels must be an integer from 1 to 5, got {num_levels!r}')
        check_attn_type(attn_type)
        check_topks(topks, num_levels)
        check_value_act(value_act)
        options = dict(value_act=value_act, lepe=lepe, level_weights=level_weights)
        if attn_type == 'A' and any(options.values()):
            raise ValueError(
                f'value_act, lepe and level_weights are for attn_type B, got {options}'
            )
        self.dim = dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.topks = topks
        self.attn_type = attn_type
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.value_branches = nn.ModuleList(
            value_branch(dim, VALUE_ACTS[value_act]) if value_act else nn.AvgPool2d(2)
            for _ in range(num_levels - 1)
        )
        self.lepe = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(num_levels * lepe)
        )
        self.register_parameter(
            'level_weights', nn.Parameter(torch.zeros(num_levels)) if level_weights else None
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, query_map: Tensor, context_map: Tensor | None = None) -> Tensor:
        """Map (B, H, W, C), and a context (B, H', W', C) if it is another map -> (B, H, W, C)."""
        context = query_map if context_map is None else context_map
        self._check_maps(query_map, context)
        if len(self.lepe) and context.shape != query_map.shape:
            raise ValueError(
                f'with lepe, context_map must have the size of query_map, '
                f'got {tuple(context.shape)} and {tuple(query_map.shape)}'
            )
        height, width = query_map.shape[1:3]
        queries = self._pyramid(self._pad(self.q_proj(query_map)))
        keys = self._pyramid(self._pad(self.k_proj(context)))
        values = [self._pad(self.v_proj(context)).permute(0, 3, 1, 2)]
        for branch in self.value_branches:
            values.append(branch(values[-1]))
        message, _ = self._attend(queries, keys, values, context)
        message = message.reshape(message.shape[0], *queries[0].shape[2:], self.dim)
        if len(self.lepe):
            message = message + self._enhance(values).permute(0, 2, 3, 1)
        return self.proj(message.narrow(1, 0, height).narrow(2, 0, width))

    def details(
        self, query_map: Tensor, context_map: Tensor | None = None, queries: Tensor | None = None
    ) -> QuadTreeDetails:
        """Attention of :meth:`forward` for the same maps; ``queries`` as in :mod:`.details`.

        The message is linear in the values, so its gradient with respect to them is the attention,
        whichever backend runs; each channel of a head answers for another query. With ``lepe``,
        contexts of another size are taken here.
        """
        context = query_map if context_map is None else context_map
        self._check_maps(query_map, context)
        height, width = query_map.shape[1:3]
        query_levels = [q.detach() for q in self._pyramid(self._pad(self.q_proj(query_map)))]
        keys = [k.detach() for k in self._pyramid(self._pad(self.k_proj(context)))]
        values = [torch.zeros_like(k, requires_grad=True) for k in keys]
        with torch.enable_grad():
            message, kept = self._attend(query_levels, keys, values, context, inspect=True)
        chosen = select_queries(queries, height * width, query_map.device)
        padded_width = query_levels[0].shape[3]
        tokens = chosen // width * padded_width + chosen % width
        parts = []
        for some in tokens.split(message.shape[3]):
            probe = torch.zeros_like(message)
            probe[:, some, :, range(len(some))] = 1
            gradients = torch.autograd.grad(message, values, probe, retain_graph=True)
            parts.append(
                [g.unflatten(1, (self.num_heads, -1))[:, :, : len(some)] for g in gradients]
            )
        weights = [torch.cat(level, 2) for level in zip(*parts, strict=True)][::-1]
        return QuadTreeDetails(weights, kept)

    def _attend(
        self,
        queries: list[Tensor],
        keys: list[Tensor],
        values: list[Tensor],
        context: Tensor,
        inspect: bool = False,
    ) -> tuple[Tensor, list[KeptKeys]]:
        # An exported graph may leave the map's sides open; keys of its padding are then masked.
        is_padded = not all(map(known_equal, keys[0].shape[2:], context.shape[1:3]))
        return attend_pyramids(
            queries,
            keys,
            values,
            self.num_heads,
            self.topks,
            self.attn_type,
            self.level_weights,
            key_extent=(context.shape[1], context.shape[2]) if is_padded else None,
            inspect=inspect,
        )

    def _enhance(self, values: list[Tensor]) -> Tensor:
        """Convolutions of all levels' values, finest first -> their mix (B, C, H_0, W_0)."""
        if self.level_weights is None:
            weights = values[0].new_ones(self.num_levels)
        else:
            weights = self.level_weights.softmax(0)
        mix = weights[0] * self.lepe[0](values[-1])
        for i in range(1, self.num_levels):
            mix = F.interpolate(mix, scale_factor=2) + weights[i] * self.lepe[i](values[-1 - i])
        return mix

    def _check_maps(self, query_map: Tensor, context: Tensor) -> None:
        for name, x in (('query_map', query_map), ('context_map', context)):
            if x.ndim != 4 or x.shape[3] != self.dim or min(x.shape[1:3]) < 1:
                raise ValueError(
                    f'{name} must be (B, H, W, {self.dim}), got shape {tuple(x.shape)}'
                )

    def _pad(self, x: Tensor) -> Tensor:
        return pad_to_multiple(x, 2 ** (self.num_levels - 1), mode='replicate')

    def _pyramid(self, x: Tensor) -> list[Tensor]:
        """(B, H, W, C) -> its pooled levels, finest first, (B, C, H_l, W_l)."""
        levels = [x.permute(0, 3, 1, 2)]
        for _ in range(self.num_levels - 1):
            levels.append(F.avg_pool2d(levels[-1], 2))
        return levels


def value_branch(dim: int, act: type[nn.Module]) -> nn.Sequential:
    """Values of the next coarser level in type B, on (B, C, H, W)."""
    return nn.Sequential(
        nn.GroupNorm(1, dim),
        act(),
        nn.Conv2d(dim, dim, 2, stride=2),
        nn.GroupNorm(1, dim),
        act(),
        nn.Conv2d(dim, dim, 1),
    )


def check_value_act(value_act: str | None) -> None:
    """Raise a ValueError unless the activation is one of :data:`VALUE_ACTS` or None."""
    if value_act is not None and value_act not in VALUE_ACTS:
        raise ValueError(
            f'value_act must be one of {", ".join(VALUE_ACTS)} or None, got {value_act!r}'
        )
