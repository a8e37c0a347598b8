// Rows of logits, sixteen at a time. Every result is the same on every instruction set.
#pragma once
#include "kernels/math-inl.h"
#include "kernels/sample.h"

namespace octavo::OCTAVO_TARGET {

// Elements [i, i + kLanes) of n, `rest` past the end.
OCTAVO_INLINE Vec load_row(const float* x, int n, int i, Vec rest) {
  return n - i >= kLanes ? load(x + i) : select(lanes(0, n - i), load_partial(x + i, n - i), rest);
}

inline float highest(const float* x, int n) {
  constexpr int kChains = 4;  // of maxima, so that one does not wait for another
  Vec best[kChains], odd = broadcast(0.0f);
  for (Vec& chain : best) chain = broadcast(-kInfinity);
  const auto take = [&](Vec v, Vec& chain) {
    odd = select(equal(v, v), odd, broadcast(1.0f));
    chain = max(v, chain);
  };
  int i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes) {
    for (int c = 0; c < kChains; ++c) take(load(x + i + c * kLanes), best[c]);
  }
  for (; i < n; i += kLanes) take(load_row(x, n, i, broadcast(-kInfinity)), best[0]);
  return maximum(odd) > 0.0f ? __builtin_nanf("") : maximum(max(max(best[0], best[1]), max(best[2], best[3])));
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

inline void peaks(const float* x, int n, float* out) {
  for (int run = 0; run * kRun < n; ++run) {
    const int end = n - run * kRun < kRun ? n : (run + 1) * kRun;
    Vec best = broadcast(-kInfinity);
    for (int i = run * kRun; i < end; i += kLanes) best = max(load_row(x, end, i, best), best);
    out[run] = maximum(best);
  }
}

inline void weigh(const float* x, int n, float best, float inverse, float* w, float* sums) {
  const Vec top = broadcast(best), scale = broadcast(inverse);
  for (int run = 0; run * kRun < n; ++run) {
    const int end = n - run * kRun < kRun ? n : (run + 1) * kRun;
    Vec total = broadcast(0.0f);
    for (int i = run * kRun; i < end; i += kLanes) {
      const Vec weight = exp_nonpositive(mul(sub(load_row(x, end, i, broadcast(-kInfinity)), top), scale));
      store_partial(w + i, weight, end - i < kLanes ? end - i : kLanes);
      total = add(total, weight);
    }
    sums[run] = sum(total);
  }
}

inline double mass_from(const float* w, int n, float least) {
  constexpr int kStretch = 8 * kRun;  // summed in float32: the rounding of longer ones would show
  const Vec border = broadcast(least), none = broadcast(0.0f);
  double total = 0;
  for (int begin = 0; begin < n; begin += kStretch) {
    const int end = n - begin < kStretch ? n : begin + kStretch;
    Vec part = none;
    for (int i = begin; i < end; i += kLanes) {
      const Vec v = load_row(w, end, i, none);
      part = add(part, select(less(v, border), none, v));
    }
    total += static_cast<double>(sum(part));
  }
  return total;
}

inline int collect(const float* x, int n, float least, std::int32_t* indices) {
  const Vec border = broadcast(least);
  int count = 0;
  for (int i = 0; i < n; i += kLanes) {
    const unsigned present = n - i >= kLanes ? 0xffffu : (1u << (n - i)) - 1u;
    for (unsigned hits = ~bits(less(load_row(x, n, i, border), border)) & present; hits != 0; hits &= hits - 1) {
      indices[count++] = i + __builtin_ctz(hits);
    }
  }
  return count;
}

inline constexpr SampleKernels sample_kernels = {highest, find, count_above, peaks, weigh, mass_from, collect};

}  // namespace octavo::OCTAVO_TARGET
