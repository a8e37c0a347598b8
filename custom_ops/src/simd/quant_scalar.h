// Integer operations for quantized products in plain C++: what each one means. Sixteen lanes of four bytes are one line of weights.
#pragma once
#include "simd/scalar.h"

#define OCTAVO_QUANT_TARGET quant_scalar

namespace octavo::scalar {

struct Bytes {
  std::uint8_t x[64];
};
struct Ints {
  std::int32_t x[kLanes];
};

#define OCTAVO_EACH for (int i = 0; i < kLanes; ++i)

OCTAVO_INLINE void prefetch(const std::uint8_t* p) { __builtin_prefetch(p); }
OCTAVO_INLINE float widen(Half half) { return from_half(half); }
OCTAVO_INLINE Bytes load_bytes(const std::uint8_t* p) { Bytes b; std::memcpy(b.x, p, 64); return b; }
OCTAVO_INLINE Bytes low_nibbles(Bytes b) { for (auto& x : b.x) x &= 15; return b; }
OCTAVO_INLINE Bytes high_nibbles(Bytes b) { for (auto& x : b.x) x >>= 4; return b; }
OCTAVO_INLINE Ints broadcast_int(std::int32_t x) { Ints r; OCTAVO_EACH r.x[i] = x; return r; }
// The sixteen bytes at p, each less `offset`.
OCTAVO_INLINE Ints load_less(const std::uint8_t* p, int offset) { Ints r; OCTAVO_EACH r.x[i] = p[i] - offset; return r; }
// lanes · the signed low half of b, whose high half is 0; every lane fits in sixteen bits.
OCTAVO_INLINE Ints times_small(Ints lanes, std::int32_t b) { OCTAVO_EACH lanes.x[i] *= static_cast<std::int16_t>(b); return lanes; }
OCTAVO_INLINE Vec to_float(const Ints& a) { Vec r; OCTAVO_EACH r.x[i] = static_cast<float>(a.x[i]); return r; }
// Byte j of every lane, or one of its nibbles: (lane >> shift) & mask as float.
OCTAVO_INLINE Vec field(const Bytes& b, int shift, int mask) {
  Vec r;
  OCTAVO_EACH {
    std::uint32_t lane;
    std::memcpy(&lane, b.x + 4 * i, 4);
    r.x[i] = static_cast<float>(static_cast<int>(lane >> shift) & mask);
  }
  return r;
}
// The larger of a and the bits of |x|: as integers, infinities and NaNs are above every number.
OCTAVO_INLINE Ints max_magnitude(Ints a, const Vec& x) {
  OCTAVO_EACH {
    const std::int32_t bits = static_cast<std::int32_t>(float_to_bits(x.x[i]) & 0x7fffffffu);
    a.x[i] = bits > a.x[i] ? bits : a.x[i];
  }
  return a;
}
OCTAVO_INLINE std::int32_t max_lane(const Ints& a) { std::int32_t m = a.x[0]; OCTAVO_EACH m = a.x[i] > m ? a.x[i] : m; return m; }
// Sixteen whole numbers of at most 127 in magnitude, as bytes.
OCTAVO_INLINE void store_int8(std::int8_t* p, const Vec& x) { OCTAVO_EACH p[i] = static_cast<std::int8_t>(x.x[i]); }
OCTAVO_INLINE Vec square_root(Vec a) { OCTAVO_EACH a.x[i] = __builtin_sqrtf(a.x[i]); return a; }

}  // namespace octavo::scalar

namespace octavo::quant_scalar {

using namespace octavo::scalar;

inline constexpr int kRowBlock = 4;
constexpr int block_tiles(int) { return 1; }
inline constexpr int kKeptSums = 1;

// 8-bit weights enter the products less this: 128 where the multiplier wants signed bytes.
inline constexpr int kByteOffset = 0;

// start + Σ w·x over the lines and quads added; exact. `flush` comes after every 32 k.
template <int Bits>
struct Sum {
  Ints acc;
  OCTAVO_INLINE void begin(const Ints& start) { acc = start; }
  __attribute__((noinline)) void add(const Bytes& w, std::int32_t quad) {  // inlined, it would be unrolled to a quarter megabyte of code
    for (int j = 0; j < 4; ++j) {
      const int x = static_cast<std::int8_t>(quad >> (8 * j));
      OCTAVO_EACH acc.x[i] += w.x[4 * i + j] * x;
    }
  }
  OCTAVO_INLINE void flush() {}
  OCTAVO_INLINE const Ints& total() const { return acc; }
};

}  // namespace octavo::quant_scalar

#undef OCTAVO_EACH
