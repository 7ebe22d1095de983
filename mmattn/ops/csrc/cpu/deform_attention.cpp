// deform_attention: attention to sampled keys, its bias read from a table at the displacements on
// the way.
#include "../checks.h"
#include "attention.h"

namespace mmattn {
namespace {

// Queries of a forward task.
constexpr int64_t QUERIES = 1024;

struct Shape {
  int64_t batch, heads, queries, keys, d, groups, table_height, table_width;

  Shape(const Tensor& q, const Tensor& k, const Tensor& table, const Tensor& positions)
      : batch(q.size(0)),
        heads(q.size(1)),
        queries(q.size(2)),
        keys(k.size(2)),
        d(q.size(3)),
        groups(positions.size(1)),
        table_height(table.size(1)),
        table_width(table.size(2)) {}

  int64_t group(int64_t head) const { return head / (heads / groups); }
};

// The bias of a tile of one head: the table read bilinearly at (query - key) / 2.
//
// The table has a border of zeros, one cell before and two after, and what is outside it reads
// those after: so every position has four cells to read.
template <class A>
class PositionBias {
 public:
  PositionBias(const Shape& s, bool backward)
      : s_(s),
        row_(s.table_width + 3),
        table_((s.table_height + 3) * row_),
        gradient_(backward ? COPIES * table_.size() : 0),
        key_y_(KEY_TILE),
        key_x_(KEY_TILE),
        cell_(backward ? QUERY_TILE * KEY_TILE : KEY_TILE),
        y_(cell_.size()),
        x_(cell_.size()),
        slope_y_(backward ? cell_.size() : 0),
        slope_x_(backward ? cell_.size() : 0) {}

  // Takes up a head.
  void read(
      const View<const A, 3>& table,
      const View<const A, 2>& grid,
      const View<const A, 4>& positions,
      int64_t b,
      int64_t h) {
    table_.fill(0);
    gradient_.fill(0);
    for (int64_t y = 0; y < s_.table_height; ++y)
      for (int64_t x = 0; x < s_.table_width; ++x)
        table_[(y + 1) * row_ + x + 1] = *table.at(h, y, x);
    grid_ = grid;
    positions_ = {positions.at(b, s_.group(h)), {positions.stride[2], positions.stride[3]}};
  }

  void write(int64_t i0, int64_t rows, int64_t j0, int64_t keys, A* scores, int64_t row) const {
    read_keys(j0, keys);
    for (int64_t i = 0; i < rows; ++i) {
      locate(i0 + i, keys, 0);
      for (int64_t j = 0; j < keys; ++j) {
        const A* cell = table_ + cell_[j];
        const A above = cell[0] + x_[j] * (cell[1] - cell[0]);
        const A below = cell[row_] + x_[j] * (cell[row_ + 1] - cell[row_]);
        scores[i * row + j] = above + y_[j] * (below - above);
      }
    }
  }

  // The same, and what add_gradient needs is kept.
  void write_and_keep(int64_t i0, int64_t rows, int64_t j0, int64_t keys, A* scores, int64_t row)
      const {
    read_keys(j0, keys);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t tile = i * KEY_TILE;
      locate(i0 + i, keys, tile);
      for (int64_t n = tile; n < tile + keys; ++n) {
        const A* cell = table_ + cell_[n];
        const A step_above = cell[1] - cell[0], step_below = cell[row_ + 1] - cell[row_];
        const A above = cell[0] + x_[n] * step_above, below = cell[row_] + x_[n] * step_below;
        slope_y_[n] = below - above;
        slope_x_[n] = step_above + y_[n] * (step_below - step_above);
        scores[i * row + n - tile] = above + y_[n] * (below - above);
      }
    }
  }

  // dpositions: (keys, 2) of the head, is added to.
  void add_gradient(
      int64_t rows,
      int64_t j0,
      int64_t keys,
      const A* dscores,
      int64_t row,
      A* dpositions) const {
    // A position is subtracted: half of it, and table_height - 1 cells for a displacement of 2.
    const A cells_y = -A(s_.table_height - 1) / 4, cells_x = -A(s_.table_width - 1) / 4;
    A by_y[KEY_TILE] = {}, by_x[KEY_TILE] = {};
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t tile = i * KEY_TILE;
      for (int64_t j = 0; j < keys; ++j) {
        by_y[j] += dscores[i * row + j] * slope_y_[tile + j];
        by_x[j] += dscores[i * row + j] * slope_x_[tile + j];
      }
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t n = tile + j;
        // Neighboring keys read the same cells: with a copy each, an addition need not wait for the
        // last.
        A* cell = gradient_ + j % COPIES * table_.size() + cell_[n];
        const A ds = dscores[i * row + j], below = ds * y_[n], above = ds - below;
        cell[0] += above - above * x_[n];
        cell[1] += above * x_[n];
        cell[row_] += below - below * x_[n];
        cell[row_ + 1] += below * x_[n];
      }
    }
    for (int64_t j = 0; j < keys; ++j) {
      dpositions[2 * (j0 + j)] += by_y[j] * cells_y;
      dpositions[2 * (j0 + j) + 1] += by_x[j] * cells_x;
    }
  }

  // to: (Th, Tw), dense.
  void write_gradient(A* to) const {
    for (int64_t y = 0; y < s_.table_height; ++y) {
      for (int64_t x = 0; x < s_.table_width; ++x) {
        const A* from = gradient_ + (y + 1) * row_ + x + 1;
        A sum = 0;
        for (int64_t copy = 0; copy < COPIES; ++copy) sum += from[copy * table_.size()];
        to[y * s_.table_width + x] = sum;
      }
    }
  }

 private:
  static constexpr int64_t COPIES = 4;

  void read_keys(int64_t j0, int64_t keys) const {
    for (int64_t j = 0; j < keys; ++j) {
      const A* position = positions_.at(j0 + j);
      key_y_[j] = position[0];
      key_x_[j] = position[positions_.stride[1]];
    }
  }

  // grid_sample's arithmetic, in its order; the cell that the table's border makes of an outside
  // one.
  static void
  locate_on_axis(A query, const A* key, int64_t size, int64_t keys, A* cell, A* fraction) {
    const A last = static_cast<A>(size - 1), outside = static_cast<A>(size);
    for (int64_t j = 0; j < keys; ++j) {
      const A t = ((query - key[j]) / 2 + 1) / 2 * last;
      const A inside = t >= -1 && t <= outside ? t : outside;  // so is NaN
      cell[j] = std::floor(inside);
      fraction[j] = inside - cell[j];
    }
  }

  // Cells and fractions of a query's row of the tile, from `tile` on.
  void locate(int64_t i, int64_t keys, int64_t tile) const {
    const A* query = grid_.at(i);
    A row[KEY_TILE], column[KEY_TILE];
    locate_on_axis(query[0], key_y_, s_.table_height, keys, row, y_ + tile);
    locate_on_axis(query[grid_.stride[1]], key_x_, s_.table_width, keys, column, x_ + tile);
    for (int64_t j = 0; j < keys; ++j)
      cell_[tile + j] = (int32_t(row[j]) + 1) * int32_t(row_) + int32_t(column[j]) + 1;
  }

  const Shape& s_;
  int64_t row_;  // of the table with its border
  Buffer<A> table_, gradient_;
  Buffer<A> key_y_, key_x_;
  Buffer<int32_t> cell_;         // the first of the four cells
  Buffer<A> y_, x_;              // the position's distance from it, in cells
  Buffer<A> slope_y_, slope_x_;  // of the bias, by the position in cells
  View<const A, 2> grid_, positions_;
};

std::tuple<Tensor, Tensor> deform_attention(
    const Tensor& q_,
    const Tensor& k_,
    const Tensor& v_,
    const Tensor& table,
    const Tensor& query_grid,
    const Tensor& key_positions,
    double scale) {
  check_deform_attention(q_, k_, v_, table, query_grid, key_positions);
  const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_);
  const Shape s(q, k, table, key_positions);
  Tensor out =
      torch::stable::transpose(empty({s.batch, s.queries, s.heads, s.d}, v, v.scalar_type()), 1, 2);
  Tensor lse = empty({s.batch, s.heads, s.queries}, v, accumulate_dtype(v.scalar_type()));
  dispatch(v.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const auto from_q = view<const T, 4>(q), from_k = view<const T, 4>(k),
               from_v = view<const T, 4>(v);
    const auto tables = view<const A, 3>(table);
    const auto grid = view<const A, 2>(query_grid);
    const auto positions = view<const A, 4>(key_positions);
    const auto result = view<T, 4>(out);
    const auto sums = view<A, 3>(lse);
    const int64_t parts = ceil_div(s.queries, QUERIES);
    torch::stable::parallel_for(0, s.batch * s.heads * parts, 1, [&](int64_t begin, int64_t end) {
      Workspace<A> w(s.d, s.keys, false);
      PositionBias<A> bias(s, false);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / parts / s.heads, h = task / parts % s.heads;
        const int64_t first = task % parts * QUERIES;
        bias.read(tables, grid, positions, b, h);
        read_keys<A>(w, s.keys, [&](int64_t j, A* k_row, A* v_row) {
          read_row(from_k.at(b, h, j), k_row, s.d, w.width);
          read_row(from_v.at(b, h, j), v_row, s.d, w.width);
        });
        attend<A>(
            w,
            std::min(QUERIES, s.queries - first),
            s.keys,
            [&](int64_t i, A* row) {
              read_row(from_q.at(b, h, first + i), row, s.d, w.width, static_cast<A>(scale));
            },
            [&](int64_t i0, auto... tile) { bias.write(first + i0, tile...); },
            [&](int64_t i, const A* row, A factor, A lse) {
              write_row(row, result.at(b, h, first + i), s.d, factor);
              *sums.at(b, h, first + i) = lse;
            });
      }
    });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_attention_backward(
    const Tensor& grad_,
    const Tensor& q_,
    const Tensor& k_,
    const Tensor& v_,
    const Tensor& table,
    const Tensor& query_grid,
    const Tensor& key_positions,
    double scale,
    const Tensor& out,
    const Tensor& lse) {
  check_deform_attention(q_, k_, v_, table, query_grid, key_positions);
  const ScalarType dtype = v_.scalar_type(), accumulate = accumulate_dtype(dtype);
  const int64_t batch = q_.size(0), heads = q_.size(1), queries = q_.size(2), d = q_.size(3);
  check_tensor("grad_out", grad_, {batch, heads, queries, d}, dtype);
  check_tensor("out", out, {batch, heads, queries, d}, dtype);
  check_tensor("lse", lse, {batch, heads, queries}, accumulate);
  const Tensor grad = with_dense_rows(grad_);
  const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_);
  const Shape s(q, k, table, key_positions);
  Tensor dq = empty({s.batch, s.heads, s.queries, s.d}, v, dtype);
  Tensor dk = empty({s.batch, s.heads, s.keys, s.d}, v, dtype);
  Tensor dv = empty({s.batch, s.heads, s.keys, s.d}, v, dtype);
  // Shares of the images in the gradient of the table, and of a group's heads in that of the
  // positions.
  Tensor table_parts = empty({s.batch, s.heads, s.table_height, s.table_width}, v, accumulate);
  Tensor position_parts = zeros({s.batch, s.groups, s.heads / s.groups, s.keys, 2}, v, accumulate);
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const auto from_q = view<const T, 4>(q), from_k = view<const T, 4>(k),
               from_v = view<const T, 4>(v);
    const auto upstream = view<const T, 4>(grad), result = view<const T, 4>(out);
    const auto sums = view<const A, 3>(lse);
    const auto tables = view<const A, 3>(table);
    const auto grid = view<const A, 2>(query_grid);
    const auto positions = view<const A, 4>(key_positions);
    const auto to_q = view<T, 4>(dq), to_k = view<T, 4>(dk), to_v = view<T, 4>(dv);
    const auto to_table = view<A, 4>(table_parts);
    A* to_positions = view<A, 5>(position_parts).data;
    torch::stable::parallel_for(0, s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
      Workspace<A> w(s.d, s.keys, true);
      PositionBias<A> bias(s, true);
      const Buffer<A> dq_rows(s.queries * w.width);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / s.heads, h = task % s.heads;
        A* dpositions = to_positions + task * s.keys * 2;
        bias.read(tables, grid, positions, b, h);
        dq_rows.fill(0);
        attend_backward<A>(
            w,
            s.queries,
            s.keys,
            [&](int64_t j, A* k_row, A* v_row) {
              read_row(from_k.at(b, h, j), k_row, s.d, w.width);
              read_row(from_v.at(b, h, j), v_row, s.d, w.width);
            },
            [&](int64_t i, A* q_row, A* grad_row, A& lse, A& delta) {
              read_row(from_q.at(b, h, i), q_row, s.d, w.width, static_cast<A>(scale));
              read_row(upstream.at(b, h, i), grad_row, s.d, w.width);
              const T* o = result.at(b, h, i);
              lse = *sums.at(b, h, i);
              delta = 0;
              for (int64_t c = 0; c < s.d; ++c) delta += grad_row[c] * static_cast<A>(o[c]);
            },
            [&](auto... tile) { bias.write_and_keep(tile...); },
            [&](int64_t, int64_t rows, int64_t j0, int64_t keys, const A* dscores, int64_t row) {
              bias.add_gradient(rows, j0, keys, dscores, row, dpositions);
            },
            dq_rows + 0,
            [&](int64_t j, const A* dk_row, const A* dv_row) {
              write_row(dk_row, to_k.at(b, h, j), s.d);
              write_row(dv_row, to_v.at(b, h, j), s.d);
            });
        for (int64_t i = 0; i < s.queries; ++i)
          write_row(dq_rows + i * w.width, to_q.at(b, h, i), s.d, static_cast<A>(scale));
        bias.write_gradient(to_table.at(b, h));
      }
    });
  });
  const int64_t over_images[] = {0}, over_heads[] = {2};
  return {
      dq,
      dk,
      dv,
      torch::stable::sum(table_parts, over_images),
      torch::stable::sum(position_parts, over_heads)};
}

}  // namespace
}  // namespace mmattn

STABLE_TORCH_LIBRARY_IMPL(mmattn, CPU, m) {
  m.impl("deform_attention", TORCH_BOX(&mmattn::deform_attention));
  m.impl("deform_attention_backward", TORCH_BOX(&mmattn::deform_attention_backward));
}
