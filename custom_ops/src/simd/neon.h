// Sixteen lanes as four 128-bit registers: AArch64. What each operation means is in scalar.h.
#pragma once
#include <arm_neon.h>

#include "kv/block_view.h"

#define OCTAVO_TARGET neon
#define OCTAVO_INLINE inline __attribute__((always_inline))
#define OCTAVO_EACH for (int i = 0; i < 4; ++i)

namespace octavo::neon {

struct Vec {
  float32x4_t x[4];
};
struct Mask {
  uint32x4_t x[4];
};

// 32 registers: accumulators take 16 (rows · vecs · 4).
inline constexpr int kTileRows = 4;
constexpr int tile_vecs(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

OCTAVO_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
OCTAVO_INLINE void convert(float value, float* out) { *out = value; }
OCTAVO_INLINE void convert(float value, Half* out) { out->bits = vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(value))), 0); }
OCTAVO_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

OCTAVO_INLINE float32x4_t widened(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
OCTAVO_INLINE int32x4_t lane_numbers(int i) {
  const std::int32_t first[4] = {4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3};
  return vld1q_s32(first);
}

OCTAVO_INLINE Vec broadcast(float x) { const float32x4_t v = vdupq_n_f32(x); return {{v, v, v, v}}; }
OCTAVO_INLINE Vec iota() { Vec r; OCTAVO_EACH r.x[i] = vcvtq_f32_s32(lane_numbers(i)); return r; }
OCTAVO_INLINE Vec load(const float* p) { Vec r; OCTAVO_EACH r.x[i] = vld1q_f32(p + 4 * i); return r; }
OCTAVO_INLINE Vec load(const Half* p) { Vec r; OCTAVO_EACH r.x[i] = widened(p + 4 * i); return r; }
template <class T>
OCTAVO_INLINE Vec load_partial(const T* p, int n) {
  alignas(16) T padded[kLanes] = {};
  for (int i = 0; i < n && i < kLanes; ++i) padded[i] = p[i];
  return load(padded);
}
OCTAVO_INLINE void store(float* p, Vec v) { OCTAVO_EACH vst1q_f32(p + 4 * i, v.x[i]); }
OCTAVO_INLINE void store_partial(float* p, Vec v, int n) {
  alignas(16) float all[kLanes];
  store(all, v);
  for (int i = 0; i < n && i < kLanes; ++i) p[i] = all[i];
}
OCTAVO_INLINE Vec add(Vec a, Vec b) { OCTAVO_EACH a.x[i] = vaddq_f32(a.x[i], b.x[i]); return a; }
OCTAVO_INLINE Vec sub(Vec a, Vec b) { OCTAVO_EACH a.x[i] = vsubq_f32(a.x[i], b.x[i]); return a; }
OCTAVO_INLINE Vec mul(Vec a, Vec b) { OCTAVO_EACH a.x[i] = vmulq_f32(a.x[i], b.x[i]); return a; }
OCTAVO_INLINE Vec div(Vec a, Vec b) { OCTAVO_EACH a.x[i] = vdivq_f32(a.x[i], b.x[i]); return a; }
OCTAVO_INLINE Vec fma(Vec a, Vec b, Vec c) { OCTAVO_EACH c.x[i] = vfmaq_f32(c.x[i], a.x[i], b.x[i]); return c; }
OCTAVO_INLINE float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // vmaxq would return a NaN in a
OCTAVO_INLINE Vec max(Vec a, Vec b) { OCTAVO_EACH a.x[i] = larger(a.x[i], b.x[i]); return a; }
OCTAVO_INLINE Vec min(Vec a, Vec b) { OCTAVO_EACH a.x[i] = vbslq_f32(vcltq_f32(a.x[i], b.x[i]), a.x[i], b.x[i]); return a; }
OCTAVO_INLINE Vec absolute(Vec a) { OCTAVO_EACH a.x[i] = vabsq_f32(a.x[i]); return a; }
OCTAVO_INLINE Vec copy_sign(Vec a, Vec sign) { OCTAVO_EACH a.x[i] = vbslq_f32(vdupq_n_u32(0x80000000u), sign.x[i], a.x[i]); return a; }
OCTAVO_INLINE Vec scale_by_power(Vec a, Vec t) {
  OCTAVO_EACH {
    const int32x4_t power = vaddq_s32(vshlq_n_s32(vreinterpretq_s32_f32(t.x[i]), 23), vdupq_n_s32(0x3f800000));
    a.x[i] = vmulq_f32(a.x[i], vreinterpretq_f32_s32(power));
  }
  return a;
}
OCTAVO_INLINE Mask less(Vec a, Vec b) { Mask m; OCTAVO_EACH m.x[i] = vcltq_f32(a.x[i], b.x[i]); return m; }
OCTAVO_INLINE Mask equal(Vec a, Vec b) { Mask m; OCTAVO_EACH m.x[i] = vceqq_f32(a.x[i], b.x[i]); return m; }
OCTAVO_INLINE Mask both(Mask a, Mask b) { OCTAVO_EACH a.x[i] = vandq_u32(a.x[i], b.x[i]); return a; }
OCTAVO_INLINE bool any(Mask m) { return vmaxvq_u32(vorrq_u32(vorrq_u32(m.x[0], m.x[1]), vorrq_u32(m.x[2], m.x[3]))) != 0; }
OCTAVO_INLINE unsigned bits(Mask m) {
  const std::uint32_t weights[4] = {1, 2, 4, 8};
  unsigned r = 0;
  OCTAVO_EACH r |= vaddvq_u32(vandq_u32(m.x[i], vld1q_u32(weights))) << (4 * i);
  return r;
}
OCTAVO_INLINE Mask lanes(int lo, int hi) {
  Mask m;
  OCTAVO_EACH m.x[i] = vandq_u32(vcgeq_s32(lane_numbers(i), vdupq_n_s32(lo)), vcltq_s32(lane_numbers(i), vdupq_n_s32(hi)));
  return m;
}
OCTAVO_INLINE Mask nonzero(const std::uint8_t* p, int n) {
  std::uint32_t wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = i < n && p[i] != 0 ? 0xffffffffu : 0u;
  Mask m;
  OCTAVO_EACH m.x[i] = vld1q_u32(wide + 4 * i);
  return m;
}
OCTAVO_INLINE Vec select(Mask m, Vec a, Vec b) { OCTAVO_EACH a.x[i] = vbslq_f32(m.x[i], a.x[i], b.x[i]); return a; }
OCTAVO_INLINE float sum(Vec v) {
  const float32x4_t four = vaddq_f32(vaddq_f32(v.x[0], v.x[2]), vaddq_f32(v.x[1], v.x[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
OCTAVO_INLINE float maximum(Vec v) {
  const float32x4_t four = larger(larger(v.x[0], v.x[2]), larger(v.x[1], v.x[3]));
  const float32x4_t two = larger(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(larger(two, vextq_f32(two, two, 1)), 0);
}

}  // namespace octavo::neon

#undef OCTAVO_EACH
