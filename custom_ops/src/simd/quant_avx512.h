// Integer operations for quantized products: AVX-512 with VNNI where the compiler has it switched on, without it otherwise. What each one
// means is in quant_scalar.h.
#pragma once
#include "simd/avx512.h"

#ifdef __AVX512VNNI__
#define OCTAVO_QUANT_TARGET quant_avx512vnni
#else
#define OCTAVO_QUANT_TARGET quant_avx512bw
#endif

namespace octavo::OCTAVO_QUANT_TARGET {

using namespace octavo::avx512;

using Bytes = __m512i;
using Ints = __m512i;

OCTAVO_INLINE void prefetch(const std::uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
OCTAVO_INLINE float widen(Half half) { return _cvtsh_ss(half.bits); }
OCTAVO_INLINE Bytes load_bytes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
OCTAVO_INLINE Bytes low_nibbles(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
OCTAVO_INLINE Bytes high_nibbles(Bytes b) { return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15)); }
OCTAVO_INLINE Ints broadcast_int(std::int32_t x) { return _mm512_set1_epi32(x); }
OCTAVO_INLINE Ints load_less(const std::uint8_t* p, int offset) {
  const Ints wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return offset == 0 ? wide : _mm512_sub_epi32(wide, _mm512_set1_epi32(offset));
}
OCTAVO_INLINE Ints times_small(Ints lanes, std::int32_t b) { return _mm512_madd_epi16(lanes, _mm512_set1_epi32(b)); }
OCTAVO_INLINE Vec to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
OCTAVO_INLINE Vec field(Bytes b, int shift, int mask) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(b, static_cast<unsigned>(shift)), _mm512_set1_epi32(mask)));
}
OCTAVO_INLINE Ints max_magnitude(Ints a, Vec x) {
  return _mm512_max_epi32(a, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}
OCTAVO_INLINE std::int32_t max_lane(Ints a) { return _mm512_reduce_max_epi32(a); }
OCTAVO_INLINE void store_int8(std::int8_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
OCTAVO_INLINE Vec square_root(Vec a) { return _mm512_sqrt_ps(a); }

// 6 rows × 2 tiles keep 12 integer sums and 12 fp32 sums in registers: two integer ones for each multiplier of 4 to 5 cycles' latency, and a bit more.
inline constexpr int kRowBlock = 6;
constexpr int block_tiles(int rows) { return rows == 1 ? 1 : 2; }
inline constexpr int kKeptSums = 12;

#ifdef __AVX512VNNI__

inline constexpr int kByteOffset = 0;

template <int Bits>
struct Sum {
  Ints acc;
  OCTAVO_INLINE void begin(Ints start) { acc = start; }
  OCTAVO_INLINE void add(Bytes w, std::int32_t quad) { __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(_mm512_set1_epi32(quad))); }
  OCTAVO_INLINE void flush() {}
  OCTAVO_INLINE Ints total() const { return acc; }
};

#else

inline constexpr int kByteOffset = 128;

// 4 bits: a pair of products is at most 2·15·127 = 3810, so eight of them fit in sixteen bits.
template <int Bits>
struct Sum {
  Ints acc, pairs;
  OCTAVO_INLINE void begin(Ints start) {
    acc = start;
    pairs = _mm512_setzero_si512();
  }
  OCTAVO_INLINE void add(Bytes w, std::int32_t quad) {
    pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(w, _mm512_set1_epi32(quad)));
  }
  OCTAVO_INLINE void flush() {
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    pairs = _mm512_setzero_si512();
  }
  OCTAVO_INLINE Ints total() const { return acc; }
};

// 8 bits: the weight less 128 is taken apart into magnitude (≤ 128, unsigned) and sign, which goes to x: a pair is at most 2·128·127 = 32512.
template <>
struct Sum<8> {
  Ints acc;
  OCTAVO_INLINE void begin(Ints start) { acc = start; }
  OCTAVO_INLINE void add(Bytes w, std::int32_t quad) {
    const __m512i s = _mm512_xor_si512(w, _mm512_set1_epi8(-128)), x = _mm512_set1_epi32(quad);
    const __m512i turned = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(s), _mm512_setzero_si512(), x);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(s), turned), _mm512_set1_epi16(1)));
  }
  OCTAVO_INLINE void flush() {}
  OCTAVO_INLINE Ints total() const { return acc; }
};

#endif

}  // namespace octavo::OCTAVO_QUANT_TARGET
