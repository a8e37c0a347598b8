// Integer operations for quantized products: AArch64 with dot products of signed bytes. What each one means is in quant_scalar.h.
#pragma once
#include "simd/neon.h"

#define OCTAVO_QUANT_TARGET quant_neon
#define OCTAVO_EACH for (int i = 0; i < 4; ++i)

namespace octavo::quant_neon {

using namespace octavo::neon;

struct Bytes {
  uint8x16_t x[4];
};
struct Ints {
  int32x4_t x[4];
};

OCTAVO_INLINE void prefetch(const std::uint8_t* p) { __builtin_prefetch(p); }
OCTAVO_INLINE float widen(Half half) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half.bits))), 0); }
OCTAVO_INLINE Bytes load_bytes(const std::uint8_t* p) { Bytes b; OCTAVO_EACH b.x[i] = vld1q_u8(p + 16 * i); return b; }
OCTAVO_INLINE Bytes low_nibbles(Bytes b) { OCTAVO_EACH b.x[i] = vandq_u8(b.x[i], vdupq_n_u8(15)); return b; }
OCTAVO_INLINE Bytes high_nibbles(Bytes b) { OCTAVO_EACH b.x[i] = vshrq_n_u8(b.x[i], 4); return b; }
OCTAVO_INLINE Ints broadcast_int(std::int32_t x) { const int32x4_t v = vdupq_n_s32(x); return {{v, v, v, v}}; }
OCTAVO_INLINE Ints load_less(const std::uint8_t* p, int offset) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  const uint32x4_t wide[4] = {vmovl_u16(vget_low_u16(low)), vmovl_u16(vget_high_u16(low)), vmovl_u16(vget_low_u16(high)), vmovl_u16(vget_high_u16(high))};
  Ints r;
  OCTAVO_EACH r.x[i] = vsubq_s32(vreinterpretq_s32_u32(wide[i]), vdupq_n_s32(offset));
  return r;
}
OCTAVO_INLINE Ints times_small(Ints lanes, std::int32_t b) {
  OCTAVO_EACH lanes.x[i] = vmulq_n_s32(lanes.x[i], static_cast<std::int16_t>(b));
  return lanes;
}
OCTAVO_INLINE Vec to_float(Ints a) { Vec r; OCTAVO_EACH r.x[i] = vcvtq_f32_s32(a.x[i]); return r; }
OCTAVO_INLINE Vec field(Bytes b, int shift, int mask) {
  Vec r;
  OCTAVO_EACH {
    const uint32x4_t moved = vshlq_u32(vreinterpretq_u32_u8(b.x[i]), vdupq_n_s32(-shift));
    r.x[i] = vcvtq_f32_u32(vandq_u32(moved, vdupq_n_u32(static_cast<std::uint32_t>(mask))));
  }
  return r;
}
OCTAVO_INLINE Ints max_magnitude(Ints a, Vec x) {
  OCTAVO_EACH a.x[i] = vmaxq_s32(a.x[i], vandq_s32(vreinterpretq_s32_f32(x.x[i]), vdupq_n_s32(0x7fffffff)));
  return a;
}
OCTAVO_INLINE std::int32_t max_lane(Ints a) { return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.x[0], a.x[1]), vmaxq_s32(a.x[2], a.x[3]))); }
OCTAVO_INLINE void store_int8(std::int8_t* p, Vec x) {
  int16x4_t words[4];
  OCTAVO_EACH words[i] = vmovn_s32(vcvtq_s32_f32(x.x[i]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(vcombine_s16(words[0], words[1])), vmovn_s16(vcombine_s16(words[2], words[3]))));
}
OCTAVO_INLINE Vec square_root(Vec a) { OCTAVO_EACH a.x[i] = vsqrtq_f32(a.x[i]); return a; }

// 32 registers: 4 rows × 1 tile take 16 for the sums.
inline constexpr int kRowBlock = 4;
constexpr int block_tiles(int) { return 1; }
inline constexpr int kKeptSums = 1;

inline constexpr int kByteOffset = 128;

// 4-bit weights are signed bytes as they are, 8-bit ones less 128.
template <int Bits>
struct Sum {
  Ints acc;
  OCTAVO_INLINE void begin(Ints start) { acc = start; }
  OCTAVO_INLINE void add(Bytes w, std::int32_t quad) {
    const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(quad));
    OCTAVO_EACH {
      const uint8x16_t less = Bits == 8 ? veorq_u8(w.x[i], vdupq_n_u8(128)) : w.x[i];
      acc.x[i] = vdotq_s32(acc.x[i], vreinterpretq_s8_u8(less), x);
    }
  }
  OCTAVO_INLINE void flush() {}
  OCTAVO_INLINE Ints total() const { return acc; }
};

}  // namespace octavo::quant_neon

#undef OCTAVO_EACH
