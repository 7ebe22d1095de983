// Bilinear reading of a map at a position in [-1, 1], align_corners, zeros outside: grid_sample's
// convention.
#pragma once

#include "common.h"

#include <cmath>

namespace mmattn {

// [-1, 1] -> [0, size - 1].
template <class A>
C10_HOST_DEVICE inline A to_cells(A position, int64_t size) {
  return (position + 1) / 2 * (size - 1);
}

// The four cells around a position, in the order (y0, x0), (y0, x1), (y1, x0), (y1, x1).
template <class A>
struct Corners {
  int64_t row[2], column[2];
  A y, x;                    // how far the position is from the first row and column, in cells
  bool rows[2], columns[2];  // which are inside the map

  C10_HOST_DEVICE Corners(A position_y, A position_x, int64_t height, int64_t width) {
    const A cy = to_cells(position_y, height), cx = to_cells(position_x, width);
    // Not so for NaN either.
    const bool near =
        cy >= -1 && cy <= static_cast<A>(height) && cx >= -1 && cx <= static_cast<A>(width);
    const A fy = near ? std::floor(cy) : A(0), fx = near ? std::floor(cx) : A(0);
    y = near ? cy - fy : A(0);
    x = near ? cx - fx : A(0);
    for (int i = 0; i < 2; ++i) {
      row[i] = static_cast<int64_t>(fy) + i;
      column[i] = static_cast<int64_t>(fx) + i;
      rows[i] = near && row[i] >= 0 && row[i] < height;
      columns[i] = near && column[i] >= 0 && column[i] < width;
    }
  }

  C10_HOST_DEVICE bool inside(int corner) const { return rows[corner / 2] && columns[corner % 2]; }
  C10_HOST_DEVICE A weight(int corner) const {
    return (corner / 2 ? y : 1 - y) * (corner % 2 ? x : 1 - x);
  }
  // The weight's derivatives by the position, in cells.
  C10_HOST_DEVICE A weight_dy(int corner) const {
    return (corner / 2 ? A(1) : A(-1)) * (corner % 2 ? x : 1 - x);
  }
  C10_HOST_DEVICE A weight_dx(int corner) const {
    return (corner % 2 ? A(1) : A(-1)) * (corner / 2 ? y : 1 - y);
  }
};

}  // namespace mmattn
