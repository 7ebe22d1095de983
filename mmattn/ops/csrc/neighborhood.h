// Which tokens of an axis attend to which: windows of odd width, shifted inwards at the border.
#pragma once

#include "common.h"

namespace mmattn {

// The first of the `kernel` tokens, among n, that token i attends to.
C10_HOST_DEVICE inline int64_t window_start(int64_t i, int64_t n, int64_t kernel) {
  const int64_t start = i - kernel / 2;
  return start < 0 ? 0 : start > n - kernel ? n - kernel : start;
}

// The first and the last token whose window has token j. Those between have it too.
//
// A token among the first `kernel` is in the window of every token before it, as those windows do
// not move; so it is with the last ones.
C10_HOST_DEVICE inline int64_t first_attending(int64_t j, int64_t kernel) {
  return j < kernel ? 0 : j - kernel / 2;
}
C10_HOST_DEVICE inline int64_t last_attending(int64_t j, int64_t n, int64_t kernel) {
  return j >= n - kernel ? n - 1 : j + kernel / 2;
}

}  // namespace mmattn
