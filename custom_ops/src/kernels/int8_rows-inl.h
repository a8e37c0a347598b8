// One head of one token on its way into the int8 cache, or against it: the Hadamard rotation, scales, rounding, and the layout of int8_layout.h.
//
// A group's scale is its largest magnitude/127, its bytes are round to nearest even of x·(127/largest magnitude). Below 2^-120 the group is
// zero; with an infinity or a NaN in it the bytes are 0 and the scale NaN, so that whatever sees it is NaN.
#pragma once
#include "kernels/kernels.h"
#include "kv/int8_layout.h"

namespace octavo::OCTAVO_INT8_TARGET {

// x·H for a Hadamard matrix of ±1 in Sylvester's order: stages of sums and differences of elements 1, 2, 4, … apart.
OCTAVO_INLINE void hadamard(float* x, int D) {
  if (D < kLanes) {
    for (int step = 1; step < D; step *= 2) {
      for (int i = 0; i < D; ++i) {
        if (i & step) continue;
        const float a = x[i], b = x[i + step];
        x[i] = a + b;
        x[i + step] = a - b;
      }
    }
    return;
  }
  for (int i = 0; i < D; i += kLanes) store(x + i, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + i))))));
  for (int step = kLanes; step < D; step *= 2) {
    for (int i = 0; i < D; i += kLanes) {
      if (i & step) continue;
      const Vec a = load(x + i), b = load(x + i + step);
      store(x + i, add(a, b));
      store(x + i + step, sub(a, b));
    }
  }
}

// Rounds n elements; returns the scale.
OCTAVO_INLINE float quantize(const float* x, int n, std::int8_t* q) {
  std::uint32_t largest = 0;  // magnitudes compare as integers, NaN above infinity
  for (int i = 0; i < n; ++i) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  float magnitude;
  __builtin_memcpy(&magnitude, &largest, 4);
  const bool infinite = largest >= 0x7f800000u;
  if (infinite || magnitude < 0x1p-120f) {
    for (int i = 0; i < n; ++i) q[i] = 0;
    return infinite ? __builtin_nanf("") : 0.0f;
  }
  const float inverse = 127.0f / magnitude;
  for (int i = 0; i < n; ++i) {  // adding 1.5·2^23 rounds to an integer and leaves it in the low bits
    const float shifted = x[i] * inverse + 12582912.0f;
    std::int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    q[i] = static_cast<std::int8_t>(bits);
  }
  return magnitude / 127.0f;
}

// Rotates a copy where D is a power of two, and rounds it by groups; `q` is padded with zeros to a multiple of 4.
OCTAVO_INLINE void quantize_head(const float* x, int D, float factor, std::int8_t* q, float* scales) {
  alignas(64) float rotated[kMaxHead];
  const int groups = static_cast<int>(int8_groups(D));
  if (groups == 1 && int8_rotates(D)) {
    for (int d = 0; d < D; ++d) rotated[d] = x[d];
    hadamard(rotated, D);
    for (int d = 0; d < D; ++d) rotated[d] *= factor;
    x = rotated;
  }
  const int size = groups == 1 ? D : kScaleGroup;
  for (int g = 0; g < groups; ++g) scales[g] = quantize(x + g * size, D - g * size < size ? D - g * size : size, q + g * size);
  for (int d = D; d < static_cast<int>(int8_padded(D)); ++d) q[d] = 0;
}

inline void prepare_query(const float* query, int D, void* row) {
  const int groups = static_cast<int>(int8_groups(D)), padded = static_cast<int>(int8_padded(D)), size = groups == 1 ? padded : kScaleGroup;
  float* scale = static_cast<float*>(row);
  std::int32_t* start = reinterpret_cast<std::int32_t*>(scale + groups);
  std::int8_t* q = reinterpret_cast<std::int8_t*>(start + groups);
  quantize_head(query, D, 1.0f / static_cast<float>(D), q, scale);  // the rotations of q and k give D·q·k
  for (int g = 0; g < groups; ++g) {
    std::int32_t total = 0;
    for (int d = g * size; d < padded && d < (g + 1) * size; ++d) total += q[d];
    start[g] = -128 * total;
  }
}

inline void append_key(const float* key, int D, void* block, int slot, int P) {
  alignas(64) std::int8_t q[kMaxHead];
  float scales[kMaxHead / kScaleGroup];
  quantize_head(key, D, 1.0f, q, scales);
  const int padded = static_cast<int>(int8_padded(D));
  std::uint8_t* to = static_cast<std::uint8_t*>(block);
  for (int d = 0; d < padded; d += 4) {
    std::uint32_t quad;
    __builtin_memcpy(&quad, q + d, 4);
    quad ^= 0x80808080u;  // + 128
    __builtin_memcpy(to + (d / 4 * P + slot) * 4, &quad, 4);
  }
  float* scale = reinterpret_cast<float*>(to + padded * P);
  for (int g = 0; g < static_cast<int>(int8_groups(D)); ++g) scale[g * P + slot] = scales[g];
}

inline void append_value(const float* value, int E, void* block, int slot, int P) {
  alignas(64) std::int8_t q[kMaxHead];
  const float scale = quantize(value, E, q);
  const int padded = static_cast<int>(int8_padded(E));
  std::int8_t* to = static_cast<std::int8_t*>(block) + slot / 4 * padded * 4 + slot % 4;
  for (int e = 0; e < E; ++e) to[e * 4] = q[e];
  for (int e = E; e < padded; ++e) to[e * 4] = 0;
  reinterpret_cast<float*>(static_cast<std::uint8_t*>(block) + padded * P)[slot] = scale;
}

}  // namespace octavo::OCTAVO_INT8_TARGET
