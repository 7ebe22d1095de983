// Vectors of the instruction set that a source is compiled for, in GCC's and Clang's notation.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

namespace mmattn {
namespace {

#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int64_t VECTOR_BYTES = 32;
#else
constexpr int64_t VECTOR_BYTES = 16;
#endif

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class A>
using Vec = typename VectorOf<A>::type;

// Numbers in a vector.
template <class A>
constexpr int64_t LANES = VECTOR_BYTES / static_cast<int64_t>(sizeof(A));

template <class A>
inline Vec<A> load(const A* from) {
  Vec<A> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class A>
inline void store(A* to, Vec<A> v) {
  std::memcpy(to, &v, sizeof(v));
}

template <class A>
constexpr int64_t pad_to_lanes(int64_t n) {
  return (n + LANES<A> - 1) / LANES<A> * LANES<A>;
}

// Memory that vectors can be loaded from and stored to at full speed.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<A*>(::operator new(size * sizeof(A) + 1, std::align_val_t(64)))),
        size_(size) {}
  operator A*() const { return data_.get(); }
  int64_t size() const { return size_; }
  void fill(A value) const {
    for (int64_t i = 0; i < size_; ++i) data_.get()[i] = value;
  }

 private:
  struct Free {
    void operator()(A* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<A, Free> data_;
  int64_t size_;
};

// What the exponential of a number type is made of.
template <class A>
struct Exponent;
template <>
struct Exponent<float> {
  using Bits = int32_t;
  static constexpr int MANTISSA = 23, BIAS = 127, DEGREE = 6;
  static constexpr float LOWEST = -87.0f;
  static constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded
  static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
};
template <>
struct Exponent<double> {
  using Bits = int64_t;
  static constexpr int MANTISSA = 52, BIAS = 1023, DEGREE = 12;
  static constexpr double LOWEST = -708.0;
  static constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double LN2_HIGH = 6.93147180369123816490e-01,
                          LN2_LOW = 1.90821492927058770002e-10;
};

template <class A>
constexpr A reciprocal_factorial(int n) {
  double product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return static_cast<A>(1 / product);
}

// exp(x) for an x that is not much above 0, as in a softmax: 0 below LOWEST, where the normal
// numbers end, and so for -inf. NaN stays NaN.
//
// x = n ln 2 + r with a whole n and |r| <= ln 2 / 2; exp(r) by its Taylor series.
template <class A>
inline Vec<A> exp(Vec<A> x) {
  using E = Exponent<A>;
  using Bits = typename E::Bits;
  const Vec<A> zero = {};
  const auto vanishes = x < zero + E::LOWEST;
  const Vec<A> shifted = x * A(1.44269504088896340736) + E::ROUND;
  const Vec<A> n = shifted - E::ROUND;
#ifdef __FMA__
  const Vec<A> r = x - n * A(0.69314718055994530942);  // the product is not rounded
#else
  const Vec<A> r = (x - n * E::LN2_HIGH) - n * E::LN2_LOW;
#endif
  Vec<A> sum = zero + reciprocal_factorial<A>(E::DEGREE);
#pragma GCC unroll 16
  for (int i = E::DEGREE - 1; i >= 0; --i) sum = sum * r + reciprocal_factorial<A>(i);
  Vec<Bits> power;
  std::memcpy(&power, &shifted, sizeof(power));  // n is in the lowest bits
  power = (power + Bits(E::BIAS)) << E::MANTISSA;
  Vec<A> scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return vanishes ? zero : sum * scale;
}

template <class A>
inline A sum_of_lanes(Vec<A> v) {
  A sum = 0;
  for (int64_t i = 0; i < LANES<A>; ++i) sum += v[i];
  return sum;
}

template <class A>
inline A max_of_lanes(Vec<A> v) {
  A most = v[0];
  for (int64_t i = 1; i < LANES<A>; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

}  // namespace
}  // namespace mmattn
