"""Results of the attention modules' ``details(*inputs, queries=None)``.

Every module of :mod:`mmattn.attention` answers this call for the inputs of its ``forward``.
``queries`` are row-major indices of some tokens of the map, int64 (n,); None takes all, n = H * W.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LocalDetails(NamedTuple):
    """Attention to a window of the map.

    Attributes:
        weights: (B, heads, n, N), attention of each query to the N tokens of its window.
        keys: int64 (n, N), row-major indices of these tokens in the map; -1 for padding.
    """

    weights: Tensor
    keys: Tensor


class DeformableDetails(NamedTuple):
    """Attention to sampled points.

    Attributes:
        weights: (B, heads, n, H_k, W_k), attention of each query to each sample.
        positions: (B, G, H_k, W_k, 2), sampled points (y, x) of each group of heads; the centers of
            the map's cells reach from -1 to 1.
        references: (H_k, W_k, 2), the same points before their offsets.
    """

    weights: Tensor
    positions: Tensor
    references: Tensor


class KeptKeys(NamedTuple):
    """Keys that the queries of one pyramid level keep.

    Attributes:
        query_size: rows and columns of the level's queries, padding included.
        key_size: rows and columns of the level's keys, padding included.
        indices: row-major indices of the kept keys, int64 (B, queries, K, heads); queries are
            row-major, and the most probable key comes first.
        scores: their probabilities at this level, in type A times those of all ancestors,
            (B, queries, K, heads).
    """

    query_size: tuple[int, int]
    key_size: tuple[int, int]
    indices: Tensor
    scores: Tensor


class QuadTreeDetails(NamedTuple):
    """Attention to token pyramids.

    Attributes:
        weights: one (B, heads, n, H_l, W_l) a level, coarsest first, padding included: the share of
            the level's values in the message of each query, without the convolution of the values.
            In type B all levels of a query and head sum to 1.
        kept: the :class:`KeptKeys` of each level that chooses, coarsest first, for all queries.
    """

    weights: list[Tensor]
    kept: list[KeptKeys]
