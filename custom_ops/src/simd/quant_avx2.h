// Integer operations for quantized products: AVX2, with AVX-VNNI where the compiler has it switched on. What each one means is in
// quant_scalar.h.
#pragma once
#include "simd/avx2.h"

#ifdef __AVXVNNI__
#define OCTAVO_QUANT_TARGET quant_avxvnni
#else
#define OCTAVO_QUANT_TARGET quant_avx2
#endif

namespace octavo::OCTAVO_QUANT_TARGET {

using namespace octavo::avx2;

struct Bytes {
  __m256i a, b;
};
struct Ints {
  __m256i a, b;
};

OCTAVO_INLINE void prefetch(const std::uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
OCTAVO_INLINE float widen(Half half) { return _cvtsh_ss(half.bits); }
OCTAVO_INLINE Bytes load_bytes(const std::uint8_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
OCTAVO_INLINE __m256i nibbles(__m256i b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
OCTAVO_INLINE Bytes low_nibbles(Bytes b) { return {nibbles(b.a), nibbles(b.b)}; }
OCTAVO_INLINE Bytes high_nibbles(Bytes b) { return {nibbles(_mm256_srli_epi16(b.a, 4)), nibbles(_mm256_srli_epi16(b.b, 4))}; }
OCTAVO_INLINE Ints broadcast_int(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
OCTAVO_INLINE Ints load_less(const std::uint8_t* p, int offset) {
  const __m256i less = _mm256_set1_epi32(offset);
  return {_mm256_sub_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), less),
          _mm256_sub_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))), less)};
}
OCTAVO_INLINE Ints times_small(Ints lanes, std::int32_t b) {
  const __m256i all = _mm256_set1_epi32(b);
  return {_mm256_madd_epi16(lanes.a, all), _mm256_madd_epi16(lanes.b, all)};
}
OCTAVO_INLINE Vec to_float(Ints a) { return {_mm256_cvtepi32_ps(a.a), _mm256_cvtepi32_ps(a.b)}; }
OCTAVO_INLINE Vec field(Bytes b, int shift, int mask) {
  const __m256i kept = _mm256_set1_epi32(mask);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(b.a, shift), kept)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(b.b, shift), kept))};
}
OCTAVO_INLINE Ints max_magnitude(Ints a, Vec x) {
  const __m256i kept = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_max_epi32(a.a, _mm256_and_si256(_mm256_castps_si256(x.a), kept)),
          _mm256_max_epi32(a.b, _mm256_and_si256(_mm256_castps_si256(x.b), kept))};
}
OCTAVO_INLINE std::int32_t max_lane(Ints x) {
  const __m256i eight = _mm256_max_epi32(x.a, x.b);
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
OCTAVO_INLINE void store_int8(std::int8_t* p, Vec x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
OCTAVO_INLINE Vec square_root(Vec a) { return {_mm256_sqrt_ps(a.a), _mm256_sqrt_ps(a.b)}; }

// 16 ymm registers: 4 rows × 1 tile take 8 for the sums.
inline constexpr int kRowBlock = 4;
constexpr int block_tiles(int) { return 1; }
inline constexpr int kKeptSums = 1;

#ifdef __AVXVNNI__

inline constexpr int kByteOffset = 0;

template <int Bits>
struct Sum {
  Ints acc;
  OCTAVO_INLINE void begin(Ints start) { acc = start; }
  OCTAVO_INLINE void add(Bytes w, std::int32_t quad) {
    const __m256i x = _mm256_set1_epi32(quad);
    acc = {_mm256_dpbusd_avx_epi32(acc.a, w.a, x), _mm256_dpbusd_avx_epi32(acc.b, w.b, x)};
  }
  OCTAVO_INLINE void flush() {}
  OCTAVO_INLINE Ints total() const { return acc; }
};

#else

inline constexpr int kByteOffset = 128;

OCTAVO_INLINE __m256i pairs_of_words(__m256i words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }

// 4 bits: a pair of products is at most 2·15·127 = 3810, so eight of them fit in sixteen bits.
template <int Bits>
struct Sum {
  Ints acc, pairs;
  OCTAVO_INLINE void begin(Ints start) {
    acc = start;
    pairs = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  }
  OCTAVO_INLINE void add(Bytes w, std::int32_t quad) {
    const __m256i x = _mm256_set1_epi32(quad);
    pairs = {_mm256_add_epi16(pairs.a, _mm256_maddubs_epi16(w.a, x)), _mm256_add_epi16(pairs.b, _mm256_maddubs_epi16(w.b, x))};
  }
  OCTAVO_INLINE void flush() {
    acc = {_mm256_add_epi32(acc.a, pairs_of_words(pairs.a)), _mm256_add_epi32(acc.b, pairs_of_words(pairs.b))};
    pairs = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  }
  OCTAVO_INLINE Ints total() const { return acc; }
};

// 8 bits: the weight less 128 is taken apart into magnitude (≤ 128, unsigned) and sign, which goes to x: a pair is at most 2·128·127 = 32512.
template <>
struct Sum<8> {
  Ints acc;
  OCTAVO_INLINE void begin(Ints start) { acc = start; }
  OCTAVO_INLINE static __m256i product(__m256i w, __m256i x) {
    const __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    return pairs_of_words(_mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(x, s)));
  }
  OCTAVO_INLINE void add(Bytes w, std::int32_t quad) {
    const __m256i x = _mm256_set1_epi32(quad);
    acc = {_mm256_add_epi32(acc.a, product(w.a, x)), _mm256_add_epi32(acc.b, product(w.b, x))};
  }
  OCTAVO_INLINE void flush() {}
  OCTAVO_INLINE Ints total() const { return acc; }
};

#endif

}  // namespace octavo::OCTAVO_QUANT_TARGET
