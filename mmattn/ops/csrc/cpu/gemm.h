// Small matrix products in cache, which attention's tiles are made of.
#pragma once

#include "../common.h"
#include "vec.h"

#include <algorithm>

namespace mmattn {
namespace {

// Rows and vectors of the result that are kept in registers.
#if defined(__AVX512F__)
constexpr int GEMM_ROWS = 8, GEMM_VECTORS = 2;
#else  // half as many registers
constexpr int GEMM_ROWS = 4, GEMM_VECTORS = 2;
#endif

template <class A, int ROWS, int VECTORS>
inline void gemm_tile(
    int64_t depth,
    const A* a,
    int64_t a_row,
    int64_t a_column,
    const A* b,
    int64_t b_row,
    A* c,
    int64_t c_row,
    bool add) {
  Vec<A> sum[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> right[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) right[v] = load(b + k * b_row + v * LANES<A>);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const A left = a[m * a_row + k * a_column];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[m][v] += right[v] * left;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      A* to = c + m * c_row + v * LANES<A>;
      store<A>(to, add ? load(to) + sum[m][v] : sum[m][v]);
    }
  }
}

template <class A, int ROWS, int VECTORS>
inline void gemm_rows(
    int64_t rows,
    int64_t depth,
    const A* a,
    int64_t a_row,
    int64_t a_column,
    const A* b,
    int64_t b_row,
    A* c,
    int64_t c_row,
    bool add) {
  while (rows >= ROWS) {
    gemm_tile<A, ROWS, VECTORS>(depth, a, a_row, a_column, b, b_row, c, c_row, add);
    a += ROWS * a_row;
    c += ROWS * c_row;
    rows -= ROWS;
  }
  if constexpr (ROWS > 1)
    gemm_rows<A, ROWS / 2, VECTORS>(rows, depth, a, a_row, a_column, b, b_row, c, c_row, add);
}

// c (rows x columns) = a (rows x depth) b (depth x columns), added to c or not.
//
// a may have any strides; the rows of b and c are dense, and columns is a multiple of the lanes.
template <class A>
void gemm(
    int64_t rows,
    int64_t columns,
    int64_t depth,
    const A* a,
    int64_t a_row,
    int64_t a_column,
    const A* b,
    int64_t b_row,
    A* c,
    int64_t c_row,
    bool add) {
  constexpr int64_t PANEL = GEMM_VECTORS * LANES<A>;
  int64_t n = 0;
  for (; n + PANEL <= columns; n += PANEL)
    gemm_rows<A, GEMM_ROWS, GEMM_VECTORS>(
        rows, depth, a, a_row, a_column, b + n, b_row, c + n, c_row, add);
  for (; n < columns; n += LANES<A>)
    gemm_rows<A, GEMM_ROWS, 1>(rows, depth, a, a_row, a_column, b + n, b_row, c + n, c_row, add);
}

}  // namespace
}  // namespace mmattn
