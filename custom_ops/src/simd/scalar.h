// Sixteen lanes in plain C++: the meaning of every vector operation, and the build for processors without a better one.
#pragma once
#include <cmath>
#include <cstring>

#include "kv/block_view.h"

#define OCTAVO_TARGET scalar
#define OCTAVO_INLINE inline __attribute__((always_inline))
#define OCTAVO_EACH for (int i = 0; i < kLanes; ++i)

namespace octavo::scalar {

struct Vec {
  float x[kLanes];
};
struct Mask {
  bool x[kLanes];
};

inline constexpr int kTileRows = 4;
constexpr int tile_vecs(int) { return 1; }

OCTAVO_INLINE float bits_to_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
OCTAVO_INLINE std::uint32_t float_to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

OCTAVO_INLINE float from_half(Half half) {
  const std::uint32_t sign = (half.bits & 0x8000u) << 16, exponent = (half.bits >> 10) & 31u, mantissa = half.bits & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));  // hardware quiets NaNs
  if (exponent != 0) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float tiny = static_cast<float>(mantissa) * 0x1p-24f;
  return bits_to_float(sign | float_to_bits(tiny));
}

// Round to nearest even, as vcvtps2ph does.
OCTAVO_INLINE Half to_half(float value) {
  const std::uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffffu;
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  std::uint32_t out;
  if (magnitude > 0x7f800000u) {
    out = 0x7e00u | ((magnitude >> 13) & 0x1ffu);
  } else if (magnitude >= 0x47800000u) {  // 2^16 and above
    out = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: a carry out of the mantissa raises the exponent, up to infinity
    const std::uint32_t rebased = magnitude - 0x38000000u;
    out = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  } else {  // below 2^-14: adding 1/2 makes the float unit round at 2^-24
    out = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  return Half{static_cast<std::uint16_t>(sign | out)};
}
OCTAVO_INLINE void prefetch(const void*) {}
OCTAVO_INLINE void convert(float value, float* out) { *out = value; }
OCTAVO_INLINE void convert(float value, Half* out) { *out = to_half(value); }
OCTAVO_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

OCTAVO_INLINE Vec broadcast(float x) { Vec r; OCTAVO_EACH r.x[i] = x; return r; }
OCTAVO_INLINE Vec iota() { Vec r; OCTAVO_EACH r.x[i] = static_cast<float>(i); return r; }
OCTAVO_INLINE Vec load(const float* p) { Vec r; OCTAVO_EACH r.x[i] = p[i]; return r; }
OCTAVO_INLINE Vec load(const Half* p) { Vec r; OCTAVO_EACH r.x[i] = from_half(p[i]); return r; }
OCTAVO_INLINE Vec load_partial(const float* p, int n) { Vec r; OCTAVO_EACH r.x[i] = i < n ? p[i] : 0.0f; return r; }
OCTAVO_INLINE Vec load_partial(const Half* p, int n) { Vec r; OCTAVO_EACH r.x[i] = i < n ? from_half(p[i]) : 0.0f; return r; }
OCTAVO_INLINE void store(float* p, Vec a) { OCTAVO_EACH p[i] = a.x[i]; }
OCTAVO_INLINE void store_partial(float* p, Vec a, int n) { for (int i = 0; i < n; ++i) p[i] = a.x[i]; }
OCTAVO_INLINE Vec add(Vec a, Vec b) { OCTAVO_EACH a.x[i] += b.x[i]; return a; }
OCTAVO_INLINE Vec sub(Vec a, Vec b) { OCTAVO_EACH a.x[i] -= b.x[i]; return a; }
OCTAVO_INLINE Vec mul(Vec a, Vec b) { OCTAVO_EACH a.x[i] *= b.x[i]; return a; }
OCTAVO_INLINE Vec div(Vec a, Vec b) { OCTAVO_EACH a.x[i] /= b.x[i]; return a; }
OCTAVO_INLINE Vec fma(Vec a, Vec b, Vec c) { OCTAVO_EACH a.x[i] = fma(a.x[i], b.x[i], c.x[i]); return a; }
// b where a and b are unordered or equal, on every instruction set.
OCTAVO_INLINE Vec max(Vec a, Vec b) { OCTAVO_EACH a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i]; return a; }
OCTAVO_INLINE Vec min(Vec a, Vec b) { OCTAVO_EACH a.x[i] = a.x[i] < b.x[i] ? a.x[i] : b.x[i]; return a; }
OCTAVO_INLINE Vec absolute(Vec a) { OCTAVO_EACH a.x[i] = bits_to_float(float_to_bits(a.x[i]) & 0x7fffffffu); return a; }
OCTAVO_INLINE Vec copy_sign(Vec a, Vec sign) {
  OCTAVO_EACH a.x[i] = bits_to_float((float_to_bits(a.x[i]) & 0x7fffffffu) | (float_to_bits(sign.x[i]) & 0x80000000u));
  return a;
}
// a·2^n, where t = n + 1.5·2^23: n then lies in the low bits of t.
OCTAVO_INLINE Vec scale_by_power(Vec a, Vec t) {
  OCTAVO_EACH a.x[i] *= bits_to_float((float_to_bits(t.x[i]) << 23) + 0x3f800000u);
  return a;
}
OCTAVO_INLINE Mask less(Vec a, Vec b) { Mask m; OCTAVO_EACH m.x[i] = a.x[i] < b.x[i]; return m; }
OCTAVO_INLINE Mask equal(Vec a, Vec b) { Mask m; OCTAVO_EACH m.x[i] = a.x[i] == b.x[i]; return m; }
OCTAVO_INLINE Mask both(Mask a, Mask b) { OCTAVO_EACH a.x[i] = a.x[i] && b.x[i]; return a; }
// Bit i is lane i.
OCTAVO_INLINE unsigned bits(Mask a) { unsigned r = 0; OCTAVO_EACH r |= static_cast<unsigned>(a.x[i]) << i; return r; }
OCTAVO_INLINE bool any(Mask a) { bool r = false; OCTAVO_EACH r = r || a.x[i]; return r; }
// Lanes [lo, hi); either may lie outside of [0, kLanes].
OCTAVO_INLINE Mask lanes(int lo, int hi) { Mask m; OCTAVO_EACH m.x[i] = lo <= i && i < hi; return m; }
// Lanes below n whose byte is not 0.
OCTAVO_INLINE Mask nonzero(const std::uint8_t* p, int n) { Mask m; OCTAVO_EACH m.x[i] = i < n && p[i] != 0; return m; }
OCTAVO_INLINE Vec select(Mask m, Vec a, Vec b) { OCTAVO_EACH a.x[i] = m.x[i] ? a.x[i] : b.x[i]; return a; }
// The one tree of every sum over lanes: i with i + 8, then + 4, + 2, + 1.
OCTAVO_INLINE float sum(Vec a) {
  for (int w = kLanes / 2; w > 0; w /= 2) {
    for (int i = 0; i < w; ++i) a.x[i] += a.x[i + w];
  }
  return a.x[0];
}
OCTAVO_INLINE float maximum(Vec a) {
  for (int w = kLanes / 2; w > 0; w /= 2) {
    for (int i = 0; i < w; ++i) a.x[i] = a.x[i] > a.x[i + w] ? a.x[i] : a.x[i + w];
  }
  return a.x[0];
}

}  // namespace octavo::scalar

#undef OCTAVO_EACH
