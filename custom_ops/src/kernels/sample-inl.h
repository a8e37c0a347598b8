// Rows of logits, sixteen at a time. Every result is the same on every instruction set.
#pragma once
#include "kernels/math-inl.h"
#include "kernels/sample.h"

namespace octavo::OCTAVO_TARGET {

// Elements [i, i + kLanes) of n, `rest` past the end.
OCTAVO_INLINE Vec load_row(const float* x, int n, int i, Vec rest) {
  return n - i >= kLanes ? load(x + i) : select(lanes(0, n - i), load_partial(x + i, n - i), rest);
}

inline constexpr int kRunVecs = kRun / kLanes, kChains = 4;  // chains of sums or maxima, so that one does not wait for another

// Calls body(run, begin, end) for each run of n elements.
template <class Body>
OCTAVO_INLINE void for_runs(int n, Body&& body) {
  for (int run = 0; run * kRun < n; ++run) body(run, run * kRun, n - run * kRun < kRun ? n : (run + 1) * kRun);
}

// Calls body(elements, place, chain) for each vector of the run [begin, end), whose last may be filled up with `rest`.
template <class Body>
OCTAVO_INLINE void for_vectors(const float* x, int begin, int end, Vec rest, Body&& body) {
  if (end - begin == kRun) {
    for (int v = 0; v < kRunVecs; ++v) body(load(x + begin + v * kLanes), begin + v * kLanes, v % kChains);
  } else {
    for (int v = 0; begin + v * kLanes < end; ++v) body(load_row(x, end, begin + v * kLanes, rest), begin + v * kLanes, v % kChains);
  }
}

// Elements [i, i + kLanes) of those before `end`.
OCTAVO_INLINE void put(Vec v, float* x, int i, int end) {
  if (end - i >= kLanes) {
    store(x + i, v);
  } else {
    store_partial(x + i, v, end - i);
  }
}

OCTAVO_INLINE void fill(Vec (&chains)[kChains], float value) {
  for (Vec& chain : chains) chain = broadcast(value);
}

OCTAVO_INLINE Vec joined(const Vec (&chains)[kChains]) { return add(add(chains[0], chains[1]), add(chains[2], chains[3])); }

inline float highest(const float* x, int n, float* peaks, float* copy) {
  Vec odd = broadcast(0.0f), all = broadcast(-kInfinity);
  for_runs(n, [&](int run, int begin, int end) __attribute__((always_inline)) {
    Vec best[kChains];
    fill(best, -kInfinity);
    for_vectors(x, begin, end, broadcast(-kInfinity), [&](Vec v, int i, int chain) __attribute__((always_inline)) {
      if (copy != nullptr) put(v, copy, i, end);
      odd = select(equal(v, v), odd, broadcast(1.0f));
      best[chain] = max(v, best[chain]);
    });
    const Vec either = max(max(best[0], best[1]), max(best[2], best[3]));
    peaks[run] = maximum(either);
    all = max(either, all);
  });
  return maximum(odd) > 0.0f ? __builtin_nanf("") : maximum(all);
}

inline int find(const float* x, int n, float value) {
  const Vec wanted = broadcast(value);
  for (int i = 0; i < n; i += kLanes) {
    // A lane past the end holds a 0, which may be the value: the first that fits decides.
    if (const unsigned hits = bits(equal(load_partial(x + i, n - i < kLanes ? n - i : kLanes), wanted))) {
      const int at = i + __builtin_ctz(hits);
      return at < n ? at : n;
    }
  }
  return n;
}

inline int count_above(const float* x, int n, float value) {
  const Vec border = broadcast(value);
  int count = 0;
  for (int i = 0; i < n; i += kLanes) count += __builtin_popcount(bits(less(border, load_row(x, n, i, border))));
  return count;
}

// 2^x for x ≤ 0: 2^n·2^r, |r| ≤ 1/2; relative error of the polynomial 2e-8, 2^0 is exactly 1. From −127 down the result is 0.
OCTAVO_INLINE Vec power_of_two(Vec x) {
  const Vec shift = broadcast(12582912.0f);  // 1.5·2^23: rounds to an integer, and leaves it in the low bits
  x = max(x, broadcast(-127.0f));            // whose power comes out as 0
  const Vec t = add(x, shift);
  const Vec r = sub(x, sub(t, shift));
  Vec p = broadcast(1.5353362e-4f);
  p = fma(p, r, broadcast(1.3398874e-3f));
  p = fma(p, r, broadcast(9.618437e-3f));
  p = fma(p, r, broadcast(5.5503324e-2f));
  p = fma(p, r, broadcast(0.24022648f));
  p = fma(p, r, broadcast(0.6931472f));
  return scale_by_power(fma(p, r, broadcast(1.0f)), t);
}

inline void weigh(const float* x, int n, float best, float inverse, const float* ahead, float* w, float* sums) {
  const Vec top = broadcast(best), scale = broadcast(inverse * 1.44269504f);
  for_runs(n, [&](int run, int begin, int end) __attribute__((always_inline)) {
    Vec total = broadcast(0.0f);  // one chain: what is added takes longer to come than to add
    for_vectors(x, begin, end, broadcast(-kInfinity), [&](Vec v, int i, int) __attribute__((always_inline)) {
      if (ahead != nullptr) prefetch(ahead + i);
      const Vec weight = power_of_two(mul(sub(v, top), scale));
      if (w != nullptr) put(weight, w, i, end);
      total = add(total, weight);
    });
    sums[run] = sum(total);
  });
}

inline double mass_from(const float* w, int n, const float* bounds, float least, int* count) {
  constexpr int kRuns = 8;  // summed in float32: the rounding of longer stretches would show
  const Vec border = broadcast(least), none = broadcast(0.0f), one = broadcast(1.0f);
  double total = 0;
  Vec part[kChains], found[kChains];
  fill(part, 0.0f);
  fill(found, 0.0f);
  int held = 0;
  for_runs(n, [&](int run, int begin, int end) __attribute__((always_inline)) {
    if (bounds[run] < least) return;
    for_vectors(w, begin, end, none, [&](Vec v, int, int chain) __attribute__((always_inline)) {
      const Mask below = less(v, border);
      part[chain] = add(part[chain], select(below, none, v));
      found[chain] = add(found[chain], select(below, none, one));
    });
    if (++held == kRuns) {
      total += static_cast<double>(sum(joined(part)));
      fill(part, 0.0f);
      held = 0;
    }
  });
  *count = static_cast<int>(sum(joined(found)));
  return total + static_cast<double>(sum(joined(part)));
}

inline void sums_from(const float* w, int n, const float* bounds, float least, float* sums) {
  const Vec border = broadcast(least), none = broadcast(0.0f);
  for_runs(n, [&](int run, int begin, int end) __attribute__((always_inline)) {
    sums[run] = 0.0f;
    if (bounds[run] < least) return;
    Vec part[kChains];
    fill(part, 0.0f);
    for_vectors(w, begin, end, none, [&](Vec v, int, int chain) __attribute__((always_inline)) {
      part[chain] = add(part[chain], select(less(v, border), none, v));
    });
    sums[run] = sum(joined(part));
  });
}

inline int collect(const float* x, int n, const float* bounds, float least, float end, std::int32_t* indices) {
  const Vec border = broadcast(least), over = broadcast(end);
  const unsigned always = end == kInfinity ? 0xffffu : 0u;
  int count = 0;
  for_runs(n, [&](int run, int begin, int stop) __attribute__((always_inline)) {
    if (bounds[run] < least) return;
    for_vectors(x, begin, stop, border, [&](Vec v, int i, int) __attribute__((always_inline)) {
      const unsigned present = stop - i >= kLanes ? 0xffffu : (1u << (stop - i)) - 1u;
      for (unsigned hits = ~bits(less(v, border)) & (bits(less(v, over)) | always) & present; hits != 0; hits &= hits - 1) {
        indices[count++] = i + __builtin_ctz(hits);
      }
    });
  });
  return count;
}

inline constexpr SampleKernels sample_kernels = {highest, find, count_above, weigh, mass_from, sums_from, collect};

}  // namespace octavo::OCTAVO_TARGET
