// Integer operations of the int8 cache: AArch64 with dot products of signed bytes. What each one means is in int8_scalar.h.
#pragma once
#include "simd/neon.h"

#define OCTAVO_INT8_TARGET int8_neon
#define OCTAVO_EACH for (int i = 0; i < 4; ++i)

namespace octavo::int8_neon {

using namespace octavo::neon;

struct Ints {
  int32x4_t x[4];
};
// Less 128, so that both sides of a product are signed.
struct Unsigned {
  int8x16_t x[4];
};
// With 128 times the sum of each lane's four bytes, which makes up for it.
struct Signed {
  int8x16_t x[4];
  int32x4_t more[4];
};

// 32 registers: 16 for the sums.
inline constexpr int kRows = 4;
constexpr int vecs(int rows) { return rows == 1 ? 2 : 1; }

OCTAVO_INLINE int8x16_t four_bytes(const void* p) {
  std::int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}
OCTAVO_INLINE int8x16_t less_128(int8x16_t u) { return veorq_s8(u, vdupq_n_s8(-128)); }
OCTAVO_INLINE int32x4_t sums_128(int8x16_t s) { return vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), s, vdupq_n_s8(1)), 7); }

OCTAVO_INLINE Unsigned load_unsigned(const std::uint8_t* p) {
  Unsigned r;
  OCTAVO_EACH r.x[i] = less_128(vreinterpretq_s8_u8(vld1q_u8(p + 16 * i)));
  return r;
}
OCTAVO_INLINE Signed load_signed(const std::int8_t* p) {
  Signed r;
  OCTAVO_EACH {
    r.x[i] = vld1q_s8(p + 16 * i);
    r.more[i] = sums_128(r.x[i]);
  }
  return r;
}
OCTAVO_INLINE Unsigned broadcast_unsigned(const std::uint8_t* p) {
  const int8x16_t q = less_128(four_bytes(p));
  return {{q, q, q, q}};
}
OCTAVO_INLINE Signed broadcast_signed(const std::int8_t* p) {
  const int8x16_t q = four_bytes(p);
  const int32x4_t more = sums_128(q);
  return {{q, q, q, q}, {more, more, more, more}};
}
OCTAVO_INLINE Ints dot(Ints acc, Unsigned u, Signed s) {
  OCTAVO_EACH acc.x[i] = vdotq_s32(vaddq_s32(acc.x[i], s.more[i]), u.x[i], s.x[i]);
  return acc;
}
OCTAVO_INLINE Ints broadcast_int(std::int32_t value) { const int32x4_t v = vdupq_n_s32(value); return {{v, v, v, v}}; }
OCTAVO_INLINE Vec to_float(Ints a) { Vec r; OCTAVO_EACH r.x[i] = vcvtq_f32_s32(a.x[i]); return r; }
OCTAVO_INLINE void store_rounded(std::uint8_t* p, Vec x) {
  uint16x4_t words[4];
  OCTAVO_EACH words[i] = vmovn_u32(vcvtnq_u32_f32(x.x[i]));
  vst1q_u8(p, vcombine_u8(vmovn_u16(vcombine_u16(words[0], words[1])), vmovn_u16(vcombine_u16(words[2], words[3]))));
}
OCTAVO_INLINE float32x4_t larger_bits(float32x4_t a, float32x4_t b) {
  return vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(a), vreinterpretq_s32_f32(b)));
}
OCTAVO_INLINE Vec max_bits(Vec a, Vec b) { OCTAVO_EACH a.x[i] = larger_bits(a.x[i], b.x[i]); return a; }
OCTAVO_INLINE float maximum_bits(Vec v) {
  const std::int32_t bits = vmaxvq_s32(vreinterpretq_s32_f32(larger_bits(larger_bits(v.x[0], v.x[1]), larger_bits(v.x[2], v.x[3]))));
  float r;
  __builtin_memcpy(&r, &bits, 4);
  return r;
}
template <int Step>
OCTAVO_INLINE Vec butterfly(Vec a) {
  Vec r;
  OCTAVO_EACH {
    if constexpr (Step >= 4) {
      const float32x4_t other = a.x[i ^ (Step / 4)];
      r.x[i] = i & (Step / 4) ? vsubq_f32(other, a.x[i]) : vaddq_f32(a.x[i], other);
    } else {
      const float32x4_t other = Step == 1 ? vrev64q_f32(a.x[i]) : vextq_f32(a.x[i], a.x[i], 2);
      const std::uint32_t turned[4] = {0, Step == 1 ? ~0u : 0u, Step == 2 ? ~0u : 0u, ~0u};
      r.x[i] = vbslq_f32(vld1q_u32(turned), vsubq_f32(other, a.x[i]), vaddq_f32(a.x[i], other));
    }
  }
  return r;
}

}  // namespace octavo::int8_neon

#undef OCTAVO_EACH
