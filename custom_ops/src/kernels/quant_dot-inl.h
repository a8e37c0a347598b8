// Integer products: int8 activations by 4- or 8-bit weights.
//
// The bits of an output depend on its row and its weights only: per group one exact integer sum, then f = fma(float(sum)·scale of the row,
// scale of the output, f), and f = fma(Σq·scale of the row, minimum, f) where weights have one; groups ascending from f = 0.
#pragma once
#include "kernels/quant_rows-inl.h"

namespace octavo::OCTAVO_QUANT_TARGET {

inline constexpr int kLineBytes = 64;
// Lines that are asked for before they are needed, in bytes of lines: a multiple of every group's. Worth up to a factor of 3 where weights come from
// memory; on Zen 5, 6 KB reach nine tenths of the bandwidth, 4 KB three quarters.
inline constexpr int kAhead = 6144;
inline constexpr int kStretch = 32;  // k between two flushes: every group is a multiple

// T neighbouring tiles of a weight.
template <int T>
struct TileHeads {
  const std::uint8_t* tile;
  const PackedWeight& w;
};

// Where the bytes to ask for lie, seen from a tile of which T are read at once: heads and lines are two streams, and lines skip the heads.
struct Ahead {
  std::int64_t first, end, skip, numbers;

  OCTAVO_INLINE Ahead(const PackedWeight& w, int T) {
    const unsigned lines = static_cast<unsigned>(w.tile_bytes - w.lines_offset);
    const std::int64_t step = T * w.tile_bytes, whole = kAhead / lines * step;
    first = whole + w.lines_offset + kAhead % lines;
    end = whole + w.tile_bytes;
    skip = step - lines;
    numbers = whole + step;
  }
};

// Sixteen scales or minimums per group, at `number` and the same place of the next tile.
struct Numbers {
  const std::uint8_t* at;
  std::int64_t tile_bytes, group_bytes;
  bool half;

  OCTAVO_INLINE Numbers(const PackedWeight& w, const std::uint8_t* tile, std::int64_t offset)
      : tile_bytes(w.tile_bytes), group_bytes(w.half_scales ? 2 * kTileOutputs : 4 * kTileOutputs), half(w.half_scales) {
    at = tile + offset;
  }
  OCTAVO_INLINE Vec of(int t) const {
    const std::uint8_t* p = at + t * tile_bytes;
    return half ? load(reinterpret_cast<const Half*>(p)) : load(reinterpret_cast<const float*>(p));
  }
  OCTAVO_INLINE void next() { at += group_bytes; }
};

// acc[r][t] += the integer products of one group: `Stretches` · 32 k from `line` and `q`, which move on, as `ahead` does. With Stretches = 0 their number
// is `stretches`.
template <int R, int T, int Bits, int Stretches>
OCTAVO_INLINE void sum_group(const std::uint8_t** line, const std::int8_t** q, const std::uint8_t** ahead, std::int64_t tile_bytes, int stretches,
                             Sum<Bits> (*acc)[T]) {
  const auto quad = [&](const Bytes* bytes) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      std::int32_t four;
      __builtin_memcpy(&four, *q + 4 * r, 4);
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) acc[r][t].add(bytes[t], four);
    }
    *q += 4 * R;
  };
  const auto stretch = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < kStretch * Bits / 32; ++v) {
      Bytes whole[T], low[T], high[T];
      for (int t = 0; t < T; ++t) {
        whole[t] = load_bytes(line[t]);
        prefetch(*ahead + t * tile_bytes);
        line[t] += kLineBytes;
        if constexpr (Bits == 4) {
          low[t] = low_nibbles(whole[t]);
          high[t] = high_nibbles(whole[t]);
        }
      }
      *ahead += kLineBytes;
      if constexpr (Bits == 4) {
        quad(low);
        quad(high);
      } else {
        quad(whole);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) acc[r][t].flush();
    }
  };
  if constexpr (Stretches == 0) {
    for (int i = 0; i < stretches; ++i) stretch();
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < Stretches; ++i) stretch();
  }
}

// f[r][t] = T tiles by R rows. f is kept in registers where it fits. No branch lies between the begin and the end of the integer sums: at one, GCC
// would move them all about.
template <int R, int T, int Bits, int Stretches, ZeroPoint Zero>
OCTAVO_INLINE void int8_product(const TileHeads<T>& heads, const Block& block, float* f) {
  constexpr bool kKept = R * T <= kKeptSums, kZeros = Zero == kZeroPointBytes, kMinimums = Zero == kMinimum;
  constexpr int kOffset = Bits == 8 ? kByteOffset : 0;
  // All that the loop reads is copied out of the structs: for all that the compiler knows the stores to f could change them.
  const PackedWeight& w = heads.w;
  Numbers scales(w, heads.tile, 0), minimums(w, heads.tile, w.zero_offset);
  const std::uint8_t* zeros = heads.tile + w.zero_offset;
  const std::int64_t tile_bytes = w.tile_bytes;
  const int stretches = w.group / kStretch, groups = w.K / w.group;
  const std::int8_t* q = block.q;
  const std::int32_t* start = block.start;
  const float* row_scale = block.scale;
  const float* row_sum = block.sum;
  const std::uint8_t* line[T];
  for (int t = 0; t < T; ++t) line[t] = heads.tile + t * tile_bytes + w.lines_offset;
  const Ahead ahead(w, T);
  const std::uint8_t* asked = heads.tile + ahead.first;
  const std::uint8_t* asked_end = heads.tile + ahead.end;
  const auto each = [](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) body(r, t);
    }
  };
  Vec kept[R][T];
  if constexpr (kKept) each([&](int r, int t) __attribute__((always_inline)) { kept[r][t] = broadcast(0.0f); });
  else each([&](int r, int t) __attribute__((always_inline)) { store(f + (r * T + t) * kLanes, broadcast(0.0f)); });
  for (int i = 0; i < groups; ++i) {
    Sum<Bits> acc[R][T];
    Ints zero[T];
    for (int t = 0; kZeros && t < T; ++t) zero[t] = load_less(zeros + t * tile_bytes, kOffset);
    each([&](int r, int t) __attribute__((always_inline)) {
      acc[r][t].begin(kZeros ? times_small(zero[t], start[r]) : broadcast_int(start[r]));
    });
    sum_group<R, T, Bits, Stretches>(line, &q, &asked, tile_bytes, stretches, acc);
    for (int t = 0; t < T; ++t) prefetch(scales.at + t * tile_bytes + ahead.numbers);
    if (asked == asked_end) {
      asked += ahead.skip;
      asked_end += T * tile_bytes;
    }
    Vec scale[T], minimum[T];
    for (int t = 0; t < T; ++t) {
      scale[t] = scales.of(t);
      if constexpr (kMinimums) minimum[t] = minimums.of(t);
    }
    each([&](int r, int t) __attribute__((always_inline)) {
      float* at = f + (r * T + t) * kLanes;
      Vec sum = fma(mul(to_float(acc[r][t].total()), broadcast(row_scale[r])), scale[t], kKept ? kept[r][t] : load(at));
      if constexpr (kMinimums) sum = fma(broadcast(row_sum[r]), minimum[t], sum);
      if constexpr (kKept) kept[r][t] = sum; else store(at, sum);
    });
    if constexpr (kMinimums) {
      minimums.next();
      row_sum += R;
    }
    if constexpr (kZeros) zeros += kTileOutputs;
    scales.next();
    start += R;
    row_scale += R;
  }
  if constexpr (kKept) each([&](int r, int t) __attribute__((always_inline)) { store(f + (r * T + t) * kLanes, kept[r][t]); });
}

// Where sums stay in memory the group is in one piece, so that nothing is carried over a loop and registers are all theirs.
template <int R, int T, int Bits, ZeroPoint Zero>
OCTAVO_INLINE void int8_product(const TileHeads<T>& heads, const Block& block, float* f) {
  if constexpr (R * T <= kKeptSums) {
    int8_product<R, T, Bits, 0, Zero>(heads, block, f);
  } else {
    const int stretches = heads.w.group / kStretch;
    if (stretches == 1) int8_product<R, T, Bits, 1, Zero>(heads, block, f);
    else if (stretches == 2) int8_product<R, T, Bits, 2, Zero>(heads, block, f);
    else int8_product<R, T, Bits, 4, Zero>(heads, block, f);
  }
}

template <int R, int T, int Bits>
OCTAVO_INLINE void int8_product(const TileHeads<T>& heads, const Block& block, float* f) {
  if (heads.w.zero_point == kZeroPointBytes) int8_product<R, T, Bits, kZeroPointBytes>(heads, block, f);
  else if (heads.w.zero_point == kMinimum) int8_product<R, T, Bits, kMinimum>(heads, block, f);
  else int8_product<R, T, Bits, kSymmetric>(heads, block, f);
}

}  // namespace octavo::OCTAVO_QUANT_TARGET
