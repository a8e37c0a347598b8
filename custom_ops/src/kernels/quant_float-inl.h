// Float products: weights dequantized in registers, one fma chain per output over k, ascending from 0.
#pragma once
#include "kernels/quant_dot-inl.h"

namespace octavo::OCTAVO_QUANT_TARGET {

// f[r][t] = the product of T tiles by R rows.
template <int R, int T, int Bits>
OCTAVO_INLINE void float_product(const TileHeads<T>& heads, const Block& block, float* f) {
  constexpr int kPerByte = 8 / Bits, kMask = (1 << Bits) - 1;
  const PackedWeight& w = heads.w;
  const std::uint8_t* line = heads.tile + w.lines_offset;
  const float* x = block.x;
  const Vec middle = broadcast(static_cast<float>(1 << (Bits - 1)));
  Vec acc[R][T];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) acc[r][t] = broadcast(0.0f);
  }
  Numbers scales(w, heads.tile, 0), minimums(w, heads.tile, w.zero_offset);
  for (int g = 0; g * w.group < w.K; ++g) {
    Vec scale[T], zero[T];
    for (int t = 0; t < T; ++t) {
      const std::uint8_t* points = heads.tile + t * w.tile_bytes + w.zero_offset + g * kTileOutputs;
      scale[t] = scales.of(t);
      zero[t] = w.zero_point == kMinimum ? minimums.of(t) : w.zero_point == kSymmetric ? middle : to_float(load_less(points, 0));
    }
    scales.next();
    minimums.next();
    for (int k = 0; k < w.group; k += 4 * kPerByte) {
      Bytes bytes[T];
      for (int t = 0; t < T; ++t) {
        bytes[t] = load_bytes(line + t * w.tile_bytes);
        prefetch(line + t * w.tile_bytes + 4096);
      }
      line += kLineBytes;
#pragma GCC unroll 8
      for (int i = 0; i < 4 * kPerByte; ++i) {  // byte i % 4 of every lane, its low nibble first
        Vec weight[T];
        for (int t = 0; t < T; ++t) {
          const Vec q = field(bytes[t], 8 * (i % 4) + 4 * (i / 4), kMask);
          weight[t] = w.zero_point == kMinimum ? fma(q, scale[t], zero[t]) : mul(sub(q, zero[t]), scale[t]);
        }
        for (int r = 0; r < R; ++r) {
          const Vec value = broadcast(x[r]);
          for (int t = 0; t < T; ++t) acc[r][t] = fma(value, weight[t], acc[r][t]);
        }
        x += R;
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) store(f + (r * T + t) * kLanes, acc[r][t]);
  }
}

// One output's values, as the products above see them.
inline void dequantize(const PackedWeight& w, std::int64_t output, float* values) {
  const std::uint8_t* tile = w.tiles + output / kTileOutputs * w.tile_bytes;
  const int lane = static_cast<int>(output % kTileOutputs);
  const auto number = [&](std::int64_t offset, int g) {
    const int at = g * kTileOutputs + lane;
    return w.half_scales ? widen(reinterpret_cast<const Half*>(tile + offset)[at]) : reinterpret_cast<const float*>(tile + offset)[at];
  };
  for (int g = 0; g * w.group < w.K; ++g) {
    const float scale = number(0, g);
    float zero = static_cast<float>(1 << (w.bits - 1));
    if (w.zero_point == kMinimum) zero = number(w.zero_offset, g);
    if (w.zero_point == kZeroPointBytes) zero = tile[w.zero_offset + g * kTileOutputs + lane];
    for (int k = g * w.group; k < (g + 1) * w.group; ++k) {
      const std::uint8_t* line = tile + w.lines_offset + k * w.bits / 32 * kLineBytes;
      const int byte = line[4 * lane + k % 4];
      const float q = static_cast<float>(w.bits == 8 ? byte : k % 8 < 4 ? byte & 15 : byte >> 4);
      values[k] = w.zero_point == kMinimum ? fma(q, scale, zero) : (q - zero) * scale;
    }
  }
}

}  // namespace octavo::OCTAVO_QUANT_TARGET
