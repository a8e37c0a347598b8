// Integer operations of the int8 cache: AVX-512 with VNNI where the compiler has it switched on, without it otherwise. What each one means is
// in int8_scalar.h.
#pragma once
#include "simd/avx512.h"

#ifdef __AVX512VNNI__
#define OCTAVO_INT8_TARGET int8_avx512vnni
#else
#define OCTAVO_INT8_TARGET int8_avx512bw
#endif

namespace octavo::OCTAVO_INT8_TARGET {

using namespace octavo::avx512;

using Ints = __m512i;

OCTAVO_INLINE __m512i broadcast_quad(const void* p) {
  std::int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return _mm512_set1_epi32(quad);
}

#ifdef __AVX512VNNI__

// 8 rows × 2 vectors, or up to 4 rows × 4: 16 sums cover two multipliers of 4 to 5 cycles' latency twice over.
inline constexpr int kRows = 8;
constexpr int vecs(int rows) { return rows <= 4 ? 4 : 2; }

using Unsigned = __m512i;
using Signed = __m512i;

OCTAVO_INLINE Unsigned load_unsigned(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
OCTAVO_INLINE Signed load_signed(const std::int8_t* p) { return _mm512_loadu_si512(p); }
OCTAVO_INLINE Unsigned broadcast_unsigned(const std::uint8_t* p) { return broadcast_quad(p); }
OCTAVO_INLINE Signed broadcast_signed(const std::int8_t* p) { return broadcast_quad(p); }
// Not the intrinsic: around that, GCC 12 copies every sum of a loop twice.
OCTAVO_INLINE Ints dot(Ints acc, Unsigned u, Signed s) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
  return acc;
}

#else

inline constexpr int kRows = 4;
constexpr int vecs(int rows) { return rows <= 2 ? 2 : 1; }

// Bytes 0 and 2, and bytes 1 and 3, of each lane as 16-bit numbers.
struct Words {
  __m512i even, odd;
};
using Unsigned = Words;
using Signed = Words;

OCTAVO_INLINE Words unsigned_words(__m512i b) { return {_mm512_and_si512(b, _mm512_set1_epi16(255)), _mm512_srli_epi16(b, 8)}; }
OCTAVO_INLINE Words signed_words(__m512i b) { return {_mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8), _mm512_srai_epi16(b, 8)}; }
OCTAVO_INLINE Unsigned load_unsigned(const std::uint8_t* p) { return unsigned_words(_mm512_loadu_si512(p)); }
OCTAVO_INLINE Signed load_signed(const std::int8_t* p) { return signed_words(_mm512_loadu_si512(p)); }
OCTAVO_INLINE Unsigned broadcast_unsigned(const std::uint8_t* p) { return unsigned_words(broadcast_quad(p)); }
OCTAVO_INLINE Signed broadcast_signed(const std::int8_t* p) { return signed_words(broadcast_quad(p)); }
OCTAVO_INLINE Ints dot(Ints acc, Unsigned u, Signed s) {
  return _mm512_add_epi32(acc, _mm512_add_epi32(_mm512_madd_epi16(u.even, s.even), _mm512_madd_epi16(u.odd, s.odd)));
}

#endif

OCTAVO_INLINE Ints broadcast_int(std::int32_t value) { return _mm512_set1_epi32(value); }
OCTAVO_INLINE Vec to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
OCTAVO_INLINE void store_rounded(std::uint8_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
OCTAVO_INLINE Vec max_bits(Vec a, Vec b) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
OCTAVO_INLINE float maximum_bits(Vec a) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(a))))); }
template <int Step>
OCTAVO_INLINE Vec butterfly(Vec a) {
  Vec other;
  if constexpr (Step == 1) other = _mm512_permute_ps(a, 0xb1);
  if constexpr (Step == 2) other = _mm512_permute_ps(a, 0x4e);
  if constexpr (Step == 4) other = _mm512_shuffle_f32x4(a, a, 0xb1);
  if constexpr (Step == 8) other = _mm512_shuffle_f32x4(a, a, 0x4e);
  constexpr Mask turned = Step == 1 ? 0xaaaa : Step == 2 ? 0xcccc : Step == 4 ? 0xf0f0 : 0xff00;
  return _mm512_mask_sub_ps(_mm512_add_ps(a, other), turned, other, a);
}

}  // namespace octavo::OCTAVO_INT8_TARGET
