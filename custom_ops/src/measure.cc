// What this machine can give, measured with the instructions that the kernels use: what a speed is held against.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "isa/dispatch.h"

#ifdef OCTAVO_X86_64
#include <immintrin.h>
#endif

namespace octavo {
namespace {

// Enough independent sums to hide the latency of a multiply-add, few enough for sixteen registers.
constexpr int kSums = 12;

#ifdef OCTAVO_X86_64
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
std::uint64_t read_once(const char* at, std::size_t bytes) {
  constexpr std::size_t kStep = 256, kAhead = 4096;
  std::uint64_t sums[kStep / 8] = {};
  for (const char* const end = at + bytes / kStep * kStep; at != end; at += kStep) {
    for (std::size_t line = 0; line < kStep; line += 64) __builtin_prefetch(at + kAhead + line);
    std::uint64_t words[kStep / 8];
    std::memcpy(words, at, kStep);
    for (std::size_t i = 0; i < kStep / 8; i++) sums[i] += words[i];
  }
  std::uint64_t total = 0;
  for (std::uint64_t sum : sums) total += sum;
  return total;
}

#ifdef OCTAVO_X86_64

#define OCTAVO_TARGET(names) __attribute__((target(names)))

// Without byte products into 32 bits, pairs are added up in 16: widening those comes once for several of them, and is left out.
// One body for each instruction set: functions called from here would have to share its target to be inlined.
#define OCTAVO_MULTIPLY(name, names, Vector, zero, constants, step) \
  OCTAVO_TARGET(names) void name(std::uint64_t rounds) {            \
    constants;                                                      \
    Vector sums[kSums];                                             \
    for (Vector& s : sums) s = zero;                                \
    for (std::uint64_t i = 0; i < rounds; i++) {                    \
      _Pragma("GCC unroll 12") for (int j = 0; j < kSums; j++) {    \
        Vector& s = sums[j];                                        \
        step;                                                       \
      }                                                             \
    }                                                               \
    for (Vector& s : sums) __asm__ volatile("" : : "v"(s));         \
  }

OCTAVO_MULTIPLY(multiply_vnni512, "avx512f,avx512bw,avx512vnni", __m512i, _mm512_setzero_si512(), const __m512i u = _mm512_set1_epi8(3),
                s = _mm512_dpbusd_epi32(s, u, u))
OCTAVO_MULTIPLY(multiply_madd512, "avx512f,avx512bw", __m512i, _mm512_setzero_si512(),
                const __m512i u = _mm512_set1_epi8(3), s = _mm512_add_epi16(s, _mm512_maddubs_epi16(s, u)))
OCTAVO_MULTIPLY(multiply_vnni256, "avx2,avxvnni", __m256i, _mm256_setzero_si256(), const __m256i u = _mm256_set1_epi8(3),
                s = _mm256_dpbusd_avx_epi32(s, u, u))
OCTAVO_MULTIPLY(multiply_madd256, "avx2", __m256i, _mm256_setzero_si256(), const __m256i u = _mm256_set1_epi8(3),
                s = _mm256_add_epi16(s, _mm256_maddubs_epi16(s, u)))

#undef OCTAVO_MULTIPLY
#undef OCTAVO_TARGET

struct Multiplier {
  const char* isa;
  void (*run)(std::uint64_t rounds);
  int bytes;  // products of one step
};

constexpr Multiplier kMultipliers[] = {
    {"avx512vnni", multiply_vnni512, 64},
    {"avx512bw", multiply_madd512, 64},
    {"avxvnni", multiply_vnni256, 32},
    {"avx2", multiply_madd256, 32},
};

#endif

}  // namespace
}  // namespace octavo

#define OCTAVO_EXPORT extern "C" __attribute__((visibility("default")))

// Reads `bytes` (rounded down to 256) `passes` times on this thread. The result only keeps the reading from being left out.
OCTAVO_EXPORT std::uint64_t octavo_read(const void* data, std::size_t bytes, std::uint64_t passes) {
  std::uint64_t total = 0;
  for (std::uint64_t pass = 0; pass < passes; pass++) total += octavo::read_once(static_cast<const char*>(data), bytes);
  return total;
}

// Multiplies and adds int8 on this thread as the kernels in use do, 12 · `rounds` instructions (or the few that stand for one). Returns the
// operations done, a multiply-add counted as two; 0 where those kernels have no such instruction.
OCTAVO_EXPORT std::uint64_t octavo_multiply(std::uint64_t rounds) {
#ifdef OCTAVO_X86_64
  const octavo::Kernels* kernels = nullptr;
  if (!octavo::active_kernels(&kernels).is_ok()) return 0;
  for (const octavo::Multiplier& m : octavo::kMultipliers) {
    if (std::strcmp(m.isa, kernels->name) != 0) continue;
    m.run(rounds);
    return rounds * octavo::kSums * static_cast<std::uint64_t>(m.bytes) * 2;
  }
#endif
  (void)rounds;
  return 0;
}
