// Joining chunks in order, and the end of a row. Lanes run over the rows of a tile for m and l, over e for o.
#pragma once
#include "kernels/kernels.h"
#include "kernels/math-inl.h"

namespace octavo::OCTAVO_TARGET {

// exp(m − highest), 0 where m is −inf (there m − highest may be NaN).
OCTAVO_INLINE Vec share(Vec m, Vec highest) {
  const Vec nothing = broadcast(-kInfinity);
  return select(equal(m, nothing), broadcast(0.0f), exp_nonpositive(sub(m, highest)));
}

inline void merge(int rows, int E, const Softmax& state, const Softmax& chunk) {
  const Vec before = load(state.m), next = load(chunk.m), highest = max(before, next);
  const Vec keep = share(before, highest), take = share(next, highest);
  alignas(64) float was[kLanes], kept[kLanes], taken[kLanes];
  store(was, before);
  store(kept, keep);
  store(taken, take);
  store(state.l, fma(load(chunk.l), take, mul(load(state.l), keep)));
  store(state.m, highest);
  const int stride = (E + kLanes - 1) / kLanes * kLanes;
  for (int r = 0; r < rows; ++r) {
    if (chunk.m[r] == -kInfinity) continue;
    const float* from = chunk.o + r * stride;
    float* to = state.o + r * stride;
    const bool fresh = was[r] == -kInfinity;  // state.o holds nothing yet
    for (int e = 0; e < E; e += kLanes) {
      store(to + e, fresh ? load(from + e) : fma(load(from + e), broadcast(taken[r]), mul(load(to + e), broadcast(kept[r]))));
    }
  }
}

inline void finish(int rows, int E, const Softmax& state, const float* sink, float* const* out) {
  Vec m = load(state.m), l = load(state.l), keep = broadcast(1.0f);
  if (sink != nullptr) {
    const Vec logit = load(sink), highest = max(m, logit);
    keep = share(m, highest);
    l = fma(l, keep, share(logit, highest));
  }
  alignas(64) float scale[kLanes];
  store(scale, div(keep, l));
  const int stride = (E + kLanes - 1) / kLanes * kLanes;
  for (int r = 0; r < rows; ++r) {
    const bool nothing = state.m[r] == -kInfinity;
    for (int e = 0; e < E; e += kLanes) {
      const Vec y = nothing ? broadcast(0.0f) : mul(load(state.o + r * stride + e), broadcast(scale[r]));
      store_partial(out[r] + e, y, E - e < kLanes ? E - e : kLanes);
    }
  }
}

}  // namespace octavo::OCTAVO_TARGET
