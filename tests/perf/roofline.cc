// What the machine can give: bytes a second out of a buffer as large as the weights of a step, and byte products a second.
//
//     c++ -O3 -march=native -pthread roofline.cc -o roofline && ./roofline 76 600        sizes in MB; prints `read MB threads GB/s`, `dot threads Gop/s`
//
// Reading is a stream of whole lines per thread with nothing but an exclusive or behind it; threads wait for each other at a flag, so that starting
// them is not measured. A product is 64 (or 32) multiply-adds of bytes, counted as two operations each, over 16 independent sums.
#include <immintrin.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

// Shortest of `rounds` runs of body(thread) on `count` threads.
template <class Body>
double shortest(int count, int rounds, Body body) {
  double best = 1e30;
  for (int round = 0; round < rounds; ++round) {
    std::atomic<int> ready{0}, left{count};
    std::vector<std::thread> threads;
    const auto work = [&](int t) {
      ++ready;
      while (ready.load() < count) {
      }
      body(t);
      --left;
    };
    for (int t = 1; t < count; ++t) threads.emplace_back(work, t);
    while (ready.load() < count - 1) {
    }
    const auto start = Clock::now();
    work(0);
    while (left.load() > 0) {
    }
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    for (std::thread& thread : threads) thread.join();
    if (seconds < best) best = seconds;
  }
  return best;
}

#ifdef __AVX512F__
using Line = __m512i;
Line load(const char* p) { return _mm512_load_si512(p); }
Line mix(Line a, Line b) { return _mm512_xor_si512(a, b); }
#else
using Line = __m256i;
Line load(const char* p) { return _mm256_load_si256(reinterpret_cast<const Line*>(p)); }
Line mix(Line a, Line b) { return _mm256_xor_si256(a, b); }
#endif

void read_all(const char* from, std::size_t bytes) {
  constexpr std::size_t width = sizeof(Line);
  Line sums[4] = {};
  for (std::size_t i = 0; i + 4 * width <= bytes; i += 4 * width) {
    for (std::size_t j = 0; j < 4; ++j) sums[j] = mix(sums[j], load(from + i + j * width));
  }
  for (Line& sum : sums) asm volatile("" : : "x"(sum));
}

#if defined(__AVX512VNNI__)
#define OCTAVO_DOT 128
Line dot(Line sum, Line a) { return _mm512_dpbusd_epi32(sum, a, a); }
#elif defined(__AVX512F__)
#define OCTAVO_DOT 128
Line dot(Line sum, Line a) { return _mm512_add_epi16(sum, _mm512_maddubs_epi16(a, a)); }
#else
#define OCTAVO_DOT 64
Line dot(Line sum, Line a) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, a)); }
#endif

void multiply_all(long rounds) {
  Line sums[16] = {}, a{};
  asm volatile("" : "+x"(a));
  for (Line& sum : sums) asm volatile("" : "+x"(sum));  // sixteen different ones, for all that the compiler knows
  for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (Line& sum : sums) sum = dot(sum, a);
  }
  for (Line& sum : sums) asm volatile("" : : "x"(sum));
}

}  // namespace

int main(int argc, char** argv) {
  for (int threads = 1; threads <= 2; ++threads) {
    for (int i = 1; i < argc; ++i) {
      const std::size_t page = 4096, each = static_cast<std::size_t>(std::atof(argv[i]) * 1e6) / threads / page * page, bytes = each * threads;
      void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) return 1;
      std::memset(memory, 1, bytes);
      const char* base = static_cast<const char*>(memory);
      const double seconds = shortest(threads, 6, [&](int t) { read_all(base + t * each, each); });
      std::printf("read %s %d %.1f\n", argv[i], threads, static_cast<double>(bytes) / seconds / 1e9);
      munmap(memory, bytes);
    }
    constexpr long rounds = 2'000'000;
    std::printf("dot %d %.0f\n", threads, threads * rounds * 16.0 * OCTAVO_DOT / shortest(threads, 4, [](int) { multiply_all(rounds); }) / 1e9);
  }
}
