// Integer operations of the int8 cache in plain C++: what each one means.
#pragma once
#include "simd/scalar.h"

#define OCTAVO_INT8_TARGET int8_scalar

namespace octavo::OCTAVO_INT8_TARGET {

using namespace octavo::scalar;

struct Ints {
  std::int32_t x[kLanes];
};
// Sixteen lanes of four bytes, ready for `dot`.
struct Unsigned {
  std::uint8_t x[kLanes][4];
};
struct Signed {
  std::int8_t x[kLanes][4];
};

inline constexpr int kRows = 4;
constexpr int vecs(int) { return 1; }

OCTAVO_INLINE Ints broadcast_int(std::int32_t value) {
  Ints r;
  for (int i = 0; i < kLanes; ++i) r.x[i] = value;
  return r;
}
OCTAVO_INLINE Unsigned load_unsigned(const std::uint8_t* p) {
  Unsigned r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
OCTAVO_INLINE Signed load_signed(const std::int8_t* p) {
  Signed r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
// The four bytes at p in every lane.
OCTAVO_INLINE Unsigned broadcast_unsigned(const std::uint8_t* p) {
  Unsigned r;
  for (int i = 0; i < kLanes; ++i) std::memcpy(r.x[i], p, 4);
  return r;
}
OCTAVO_INLINE Signed broadcast_signed(const std::int8_t* p) {
  Signed r;
  for (int i = 0; i < kLanes; ++i) std::memcpy(r.x[i], p, 4);
  return r;
}
// acc + the four products of each lane, exactly.
OCTAVO_INLINE Ints dot(Ints acc, Unsigned u, Signed s) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < 4; ++j) acc.x[i] += u.x[i][j] * s.x[i][j];
  }
  return acc;
}
OCTAVO_INLINE Vec to_float(Ints a) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.x[i] = static_cast<float>(a.x[i]);
  return r;
}
// Rounded to nearest even; x lies in [0, 255]. Elsewhere, and for NaN, the byte is anything.
OCTAVO_INLINE void store_rounded(std::uint8_t* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::uint8_t>(float_to_bits(x.x[i] + 12582912.0f));
}
// The larger of numbers that are not negative, as integers: a NaN without sign is larger than all.
OCTAVO_INLINE Vec max_bits(Vec a, Vec b) {
  for (int i = 0; i < kLanes; ++i) a.x[i] = float_to_bits(a.x[i]) > float_to_bits(b.x[i]) ? a.x[i] : b.x[i];
  return a;
}
OCTAVO_INLINE float maximum_bits(Vec a) {
  for (int i = 1; i < kLanes; ++i) a.x[0] = float_to_bits(a.x[0]) > float_to_bits(a.x[i]) ? a.x[0] : a.x[i];
  return a.x[0];
}
// Lane i with lane i ^ Step: the sum where i & Step is 0, the other less this one elsewhere.
template <int Step>
OCTAVO_INLINE Vec butterfly(Vec a) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.x[i] = i & Step ? a.x[i ^ Step] - a.x[i] : a.x[i] + a.x[i ^ Step];
  return r;
}

}  // namespace octavo::OCTAVO_INT8_TARGET
