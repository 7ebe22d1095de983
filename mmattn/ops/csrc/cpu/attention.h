// Softmax attention of one head in tiles, with online softmax (FlashAttention, arXiv 2205.14135).
//
// Forward: for each tile of queries, over the tiles of keys. Backward: for each tile of keys, over
// the tiles of queries; the probabilities are recomputed from the saved log-sum-exp. Operators
// supply token access and bias as callables.
#pragma once

#include "gemm.h"

#include <cmath>

namespace mmattn {
namespace {

constexpr int64_t QUERY_TILE = 32, KEY_TILE = 256;

// Buffers of a task; d is the depth of a head and `width` d with zero padding.
template <class A>
struct Workspace {
  int64_t d, width, row;                // row: from one query's scores to the next one's
  Buffer<A> q, grad, out;               // (QUERY_TILE, width)
  Buffer<A> scores, dscores;            // (QUERY_TILE, row)
  Buffer<A> k, v, dk, dv;               // (keys, width); only k and v hold more than one tile
  Buffer<A> kt, vt;                     // tiles of (d, KEY_TILE)
  A most[QUERY_TILE], sum[QUERY_TILE];  // of a query's scores so far
  A lse[QUERY_TILE], delta[QUERY_TILE];

  Workspace(int64_t d, int64_t keys, bool backward)
      : d(d),
        width(pad_to_lanes<A>(d)),
        // Not a power of two: avoids cache-set conflicts between rows.
        row(pad_to_lanes<A>(std::min(keys, KEY_TILE)) + LANES<A>),
        q(QUERY_TILE * width),
        grad(backward ? QUERY_TILE * width : 0),
        out(backward ? 0 : QUERY_TILE * width),
        scores(QUERY_TILE * row),
        dscores(backward ? QUERY_TILE * row : 0),
        k(KEY_TILE * width),
        v((backward ? KEY_TILE : keys) * width),
        dk(backward ? KEY_TILE * width : 0),
        dv(backward ? KEY_TILE * width : 0),
        kt(d * KEY_TILE * (backward ? 1 : ceil_div(keys, KEY_TILE))),
        vt(backward ? d * KEY_TILE : 0) {}
};

// Reads a token times `scale` in the accumulating type; zero up to `width`.
template <class T, class A>
inline void read_row(const T* from, A* to, int64_t d, int64_t width, A scale = 1) {
  for (int64_t c = 0; c < d; ++c) to[c] = static_cast<A>(from[c]) * scale;
  for (int64_t c = d; c < width; ++c) to[c] = 0;
}

template <class T, class A>
inline void write_row(const A* from, T* to, int64_t d, A scale = 1) {
  for (int64_t c = 0; c < d; ++c) to[c] = static_cast<T>(from[c] * scale);
}

// (rows, width) -> (d, KEY_TILE); columns beyond the rows, up to whole vectors, are zero.
template <class A>
inline void transpose(const A* from, A* to, int64_t rows, int64_t d, int64_t width) {
  const int64_t columns = pad_to_lanes<A>(rows);
  for (int64_t c = 0; c < d; ++c) {
    for (int64_t n = 0; n < rows; ++n) to[c * KEY_TILE + n] = from[n * width + c];
    for (int64_t n = rows; n < columns; ++n) to[c * KEY_TILE + n] = 0;
  }
}

// Reads keys [0, count) once for all queries of a task: read_key(j, k row, v row).
template <class A, class ReadKey>
void read_keys(Workspace<A>& w, int64_t count, const ReadKey& read_key) {
  for (int64_t first = 0; first < count; first += KEY_TILE) {
    const int64_t keys = std::min(KEY_TILE, count - first);
    for (int64_t j = 0; j < keys; ++j)
      read_key(first + j, w.k + j * w.width, w.v + (first + j) * w.width);
    transpose<A>(w.k, w.kt + first * w.d, keys, w.d, w.width);
  }
}

// Online softmax: scores of a query become exponentials, and earlier sums are rescaled.
template <class A>
inline void carry_on_softmax(A* scores, int64_t keys, A* out, int64_t width, A& most, A& sum) {
  const int64_t columns = pad_to_lanes<A>(keys);
  for (int64_t j = keys; j < columns; ++j) scores[j] = -std::numeric_limits<A>::infinity();
  Vec<A> greatest = load(scores);
  for (int64_t j = LANES<A>; j < columns; j += LANES<A>) {
    const Vec<A> s = load(scores + j);
    greatest = s > greatest ? s : greatest;
  }
  A next = max_of_lanes<A>(greatest);
  next = most > next ? most : next;
  Vec<A> total = {};
  for (int64_t j = 0; j < columns; j += LANES<A>) {
    const Vec<A> p = exp<A>(load(scores + j) - next);
    total += p;
    store<A>(scores + j, p);
  }
  if (next != most) {
    const A fade = std::exp(most - next);
    sum *= fade;
    for (int64_t c = 0; c < width; ++c) out[c] *= fade;
    most = next;
  }
  sum += sum_of_lanes<A>(total);
}

// Attention of `queries` queries to keys that read_keys has read.
//
// read_query(i, row): the scaled query. write_bias(first query, queries, first key, keys, scores,
// row): initial scores of a tile, `row` apart from query to query. write(i, row, 1 / sum,
// log-sum-exp): the result is row times 1 / sum.
template <class A, class ReadQuery, class WriteBias, class Write>
void attend(
    Workspace<A>& w,
    int64_t queries,
    int64_t keys,
    const ReadQuery& read_query,
    const WriteBias& write_bias,
    const Write& write) {
  for (int64_t i0 = 0; i0 < queries; i0 += QUERY_TILE) {
    const int64_t rows = std::min(QUERY_TILE, queries - i0);
    for (int64_t i = 0; i < rows; ++i) {
      read_query(i0 + i, w.q + i * w.width);
      w.most[i] = -std::numeric_limits<A>::infinity();
      w.sum[i] = 0;
    }
    std::fill(w.out + 0, w.out + rows * w.width, A(0));
    for (int64_t j0 = 0; j0 < keys; j0 += KEY_TILE) {
      const int64_t count = std::min(KEY_TILE, keys - j0);
      write_bias(i0, rows, j0, count, w.scores + 0, w.row);
      gemm<A>(
          rows,
          pad_to_lanes<A>(count),
          w.d,
          w.q,
          w.width,
          1,
          w.kt + j0 * w.d,
          KEY_TILE,
          w.scores,
          w.row,
          true);
      for (int64_t i = 0; i < rows; ++i)
        carry_on_softmax<A>(
            w.scores + i * w.row, count, w.out + i * w.width, w.width, w.most[i], w.sum[i]);
      gemm<A>(
          rows,
          w.width,
          count,
          w.scores,
          w.row,
          1,
          w.v + j0 * w.width,
          w.width,
          w.out,
          w.width,
          true);
    }
    for (int64_t i = 0; i < rows; ++i)
      write(i0 + i, w.out + i * w.width, 1 / w.sum[i], w.most[i] + std::log(w.sum[i]));
  }
}

// The gradients of attend.
//
// read_key(j, k row, v row). read_query(i, q row, upstream gradient row, lse, delta): delta is the
// product of result and upstream gradient. write_bias as in attend; add_bias_gradient the same with
// the scores' gradient. dq: (queries, width), is added to; of the scaled query. write_key(j, dk
// row, dv row).
template <
    class A,
    class ReadKey,
    class ReadQuery,
    class WriteBias,
    class AddBiasGradient,
    class WriteKey>
void attend_backward(
    Workspace<A>& w,
    int64_t queries,
    int64_t keys,
    const ReadKey& read_key,
    const ReadQuery& read_query,
    const WriteBias& write_bias,
    const AddBiasGradient& add_bias_gradient,
    A* dq,
    const WriteKey& write_key) {
  for (int64_t j0 = 0; j0 < keys; j0 += KEY_TILE) {
    const int64_t count = std::min(KEY_TILE, keys - j0), columns = pad_to_lanes<A>(count);
    for (int64_t j = 0; j < count; ++j) read_key(j0 + j, w.k + j * w.width, w.v + j * w.width);
    transpose<A>(w.k, w.kt, count, w.d, w.width);
    transpose<A>(w.v, w.vt, count, w.d, w.width);
    std::fill(w.dk + 0, w.dk + count * w.width, A(0));
    std::fill(w.dv + 0, w.dv + count * w.width, A(0));
    for (int64_t i0 = 0; i0 < queries; i0 += QUERY_TILE) {
      const int64_t rows = std::min(QUERY_TILE, queries - i0);
      for (int64_t i = 0; i < rows; ++i)
        read_query(i0 + i, w.q + i * w.width, w.grad + i * w.width, w.lse[i], w.delta[i]);
      write_bias(i0, rows, j0, count, w.scores + 0, w.row);
      gemm<A>(rows, columns, w.d, w.q, w.width, 1, w.kt, KEY_TILE, w.scores, w.row, true);
      gemm<A>(rows, columns, w.d, w.grad, w.width, 1, w.vt, KEY_TILE, w.dscores, w.row, false);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; j += LANES<A>) {
          A* s = w.scores + i * w.row + j;
          A* ds = w.dscores + i * w.row + j;
          const Vec<A> p = exp<A>(load(s) - w.lse[i]);
          store<A>(s, p);
          store<A>(ds, p * (load(ds) - w.delta[i]));
        }
      }
      add_bias_gradient(i0, rows, j0, count, w.dscores + 0, w.row);
      gemm<A>(count, w.width, rows, w.scores, 1, w.row, w.grad, w.width, w.dv, w.width, true);
      gemm<A>(count, w.width, rows, w.dscores, 1, w.row, w.q, w.width, w.dk, w.width, true);
      gemm<A>(
          rows,
          w.width,
          count,
          w.dscores,
          w.row,
          1,
          w.k,
          w.width,
          dq + i0 * w.width,
          w.width,
          true);
    }
    for (int64_t j = 0; j < count; ++j) write_key(j0 + j, w.dk + j * w.width, w.dv + j * w.width);
  }
}

// Adds up `parts` arrays of `size` numbers in their order: the sum does not depend on threads.
template <class A, class T>
void sum_parts(const A* parts, int64_t count, int64_t size, T* to) {
  torch::stable::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A sum = 0;
      for (int64_t part = 0; part < count; ++part) sum += parts[part * size + i];
      to[i] = static_cast<T>(sum);
    }
  });
}

}  // namespace
}  // namespace mmattn
