// One head of one token: norm, rotation and scale, and the store into the cache. Each element stands alone, so the compiler may vectorise these
// loops as it likes; products and sums that must be fused say fma.
#pragma once
#include "kernels/kernels.h"

namespace octavo::OCTAVO_TARGET {

inline void rotate(const float* x, float* y, int D, const Rotary& rotary, float scale) {
  const int half = rotary.half;
  const int near = rotary.interleaved ? 2 : 1, far = rotary.interleaved ? 1 : half;  // pair i: near·i and near·i + far
  for (int i = 0; i < half; ++i) {
    const float a = x[near * i], b = x[near * i + far], c = rotary.cos[i], s = rotary.sin[i];
    y[near * i] = fma(a, c, -(b * s)) * scale;
    y[near * i + far] = fma(b, c, a * s) * scale;
  }
  for (int i = 2 * half; i < D; ++i) y[i] = x[i] * scale;
}

// The sum of squares runs in sixteen lanes, d ascending, joined by the one tree.
inline void normalize(const float* x, float* y, int D, const float* weight, float epsilon) {
  Vec squares = broadcast(0.0f);
  for (int d = 0; d < D; d += kLanes) {
    const Vec v = load_partial(x + d, D - d < kLanes ? D - d : kLanes);
    squares = fma(v, v, squares);
  }
  const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(D) + epsilon);
  for (int d = 0; d < D; ++d) y[d] = x[d] * inverse * weight[d];
}

template <class T>
void append_key(const float* key, int D, void* block, int slot, int P) {
  for (int d = 0; d < D; ++d) convert(key[d], static_cast<T*>(block) + d * P + slot);
}

template <class T>
void append_value(const float* value, int E, void* block, int slot, int) {
  for (int e = 0; e < E; ++e) convert(value[e], static_cast<T*>(block) + slot * E + e);
}

}  // namespace octavo::OCTAVO_TARGET
