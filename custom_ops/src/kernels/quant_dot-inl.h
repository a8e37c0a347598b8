// Integer products: int8 activations by 4- or 8-bit weights.
//
// The bits of an output depend on its row and its weights only: per group one exact integer sum, then f = fma(float(sum)·scale of the row,
// scale of the output, f), and f = fma(Σq·scale of the row, minimum, f) where weights have one; groups ascending from f = 0.
#pragma once
#include "kernels/quant_rows-inl.h"

namespace octavo::OCTAVO_QUANT_TARGET {

enum Lines { kNibbles, kWholeBytes };  // two quads of k in a line, or one

inline constexpr int kLineBytes = 64;
inline constexpr int kStretch = 32;  // k between two flushes: every group is a multiple

// Scales and offsets of T neighbouring tiles.
template <int T>
struct TileHeads {
  const std::uint8_t* tile;
  const PackedWeight& w;

  OCTAVO_INLINE Vec number(std::int64_t offset, int g, int t) const {
    const std::uint8_t* at = tile + t * w.tile_bytes + offset;
    if (w.half_scales) return load(reinterpret_cast<const Half*>(at) + g * kTileOutputs);
    return load(reinterpret_cast<const float*>(at) + g * kTileOutputs);
  }
  OCTAVO_INLINE Vec scale(int g, int t) const { return number(0, g, t); }
  OCTAVO_INLINE Vec minimum(int g, int t) const { return number(w.zero_offset, g, t); }
  OCTAVO_INLINE Ints zero_point(int g, int t, int offset) const {
    return load_less(tile + t * w.tile_bytes + w.zero_offset + g * kTileOutputs, offset);
  }
};

// f[r][t] += groups [g0, g1) of T tiles by R rows. lines[t] is the first line of group g0. f is kept in registers where it fits.
template <int R, int T, int Bits, Lines L>
OCTAVO_INLINE void add_groups(const TileHeads<T>& heads, const std::uint8_t* const* lines, const Block& block, int g0, int g1, float* f) {
  constexpr bool kKept = R * T <= kKeptSums;
  constexpr int kOffset = Bits == 8 ? kByteOffset : 0;
  constexpr int kAhead = 4096;  // bytes of prefetch, worth up to a factor of 2 where weights come from memory
  const PackedWeight& w = heads.w;
  const std::uint8_t* line[T];
  for (int t = 0; t < T; ++t) line[t] = lines[t];
  const std::int8_t* q = block.q + static_cast<std::int64_t>(g0) * w.group * R;
  Vec kept[R][T];
  if constexpr (kKept) {
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) kept[r][t] = load(f + (r * T + t) * kLanes);
    }
  }
  for (int g = g0; g < g1; ++g) {
    Sum<Bits> acc[R][T];
    if (w.zero_point == kZeroPointBytes) {
      for (int t = 0; t < T; ++t) {
        const Ints zero = heads.zero_point(g, t, kOffset);
        for (int r = 0; r < R; ++r) acc[r][t].begin(times_small(zero, block.start[g * R + r]));
      }
    } else {
      for (int r = 0; r < R; ++r) {
        const Ints start = broadcast_int(block.start[g * R + r]);
        for (int t = 0; t < T; ++t) acc[r][t].begin(start);
      }
    }
    for (int k = 0; k < w.group; k += kStretch) {
      const auto quad = [&](const Bytes* bytes) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          std::int32_t four;
          __builtin_memcpy(&four, q + 4 * r, 4);
#pragma GCC unroll 2
          for (int t = 0; t < T; ++t) acc[r][t].add(bytes[t], four);
        }
        q += 4 * R;
      };
#pragma GCC unroll 8
      for (int v = 0; v < (L == kNibbles ? kStretch / 8 : kStretch / 4); ++v) {
        Bytes whole[T], low[T], high[T];
        for (int t = 0; t < T; ++t) {
          whole[t] = load_bytes(line[t]);
          if constexpr (L == kNibbles || Bits == 8) prefetch(line[t] + kAhead);
          line[t] += kLineBytes;
          if constexpr (L == kNibbles) {
            low[t] = low_nibbles(whole[t]);
            high[t] = high_nibbles(whole[t]);
          }
        }
        if constexpr (L == kNibbles) {
          quad(low);
          quad(high);
        } else {
          quad(whole);
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) acc[r][t].flush();
      }
    }
    const bool has_minimum = w.zero_point == kMinimum;
    for (int t = 0; t < T; ++t) {
      const Vec scale = heads.scale(g, t);
      const Vec minimum = has_minimum ? heads.minimum(g, t) : scale;
      for (int r = 0; r < R; ++r) {
        float* at = f + (r * T + t) * kLanes;
        Vec sum;
        if constexpr (kKept) sum = kept[r][t]; else sum = load(at);
        sum = fma(mul(to_float(acc[r][t].total()), broadcast(block.scale[g * R + r])), scale, sum);
        if (has_minimum) sum = fma(broadcast(block.sum[g * R + r]), minimum, sum);
        if constexpr (kKept) kept[r][t] = sum; else store(at, sum);
      }
    }
  }
  if constexpr (kKept) {
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) store(f + (r * T + t) * kLanes, kept[r][t]);
    }
  }
}

}  // namespace octavo::OCTAVO_QUANT_TARGET
