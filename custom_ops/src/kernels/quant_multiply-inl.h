// A product from prepared rows to finished outputs: which kernel takes which rows and tiles, and what happens after the sums.
#pragma once
#include "kernels/math-inl.h"
#include "kernels/quant_dot-inl.h"
#include "kernels/quant_float-inl.h"
#include "kernels/with_size-inl.h"

namespace octavo::OCTAVO_QUANT_TARGET {

// exp(−|x|), in (0, 1].
OCTAVO_INLINE Vec exp_of_minus(Vec magnitude) { return exp_nonpositive(sub(broadcast(0.0f), magnitude)); }

// x·sigmoid(x); with e = exp(−|x|): x/(1 + e), or x·e/(1 + e) for x < 0.
OCTAVO_INLINE Vec silu(Vec x) {
  const Vec one = broadcast(1.0f), e = exp_of_minus(absolute(x));
  return div(mul(x, select(less(x, broadcast(0.0f)), e, one)), add(one, e));
}

// x·(1 + erf(x/√2))/2. With c = erfc(|x|/√2) = exp(−x²/2)·t·P(t), t = 1/(1 + |x|/√8), it is x·c/2 below 0 and x − x·c/2 above; the polynomial's
// relative error is 4.3e-8.
OCTAVO_INLINE Vec gelu(Vec x) {
  const Vec half = broadcast(0.5f);
  const Vec t = div(broadcast(1.0f), fma(absolute(x), broadcast(0.35355339f), broadcast(1.0f)));
  Vec p = broadcast(-0.05889091f);
  p = fma(p, t, broadcast(0.2837026f));
  p = fma(p, t, broadcast(-0.48538491f));
  p = fma(p, t, broadcast(0.2759794f));
  p = fma(p, t, broadcast(-0.02517844f));
  p = fma(p, t, broadcast(0.20207011f));
  p = fma(p, t, broadcast(0.24326095f));
  p = fma(p, t, broadcast(0.28235349f));
  p = fma(p, t, broadcast(0.28208768f));
  const Vec c = mul(mul(p, t), exp_of_minus(mul(mul(x, x), half)));
  const Vec tail = mul(mul(x, half), c);
  return select(less(x, broadcast(0.0f)), tail, sub(x, tail));
}

// x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))/2 = x·sigmoid(2·√(2/π)·(x + 0.044715·x³)), which keeps its precision where x is negative.
OCTAVO_INLINE Vec gelu_tanh(Vec x) {
  const Vec one = broadcast(1.0f), cubic = fma(mul(mul(x, x), x), broadcast(0.044715f), x);
  const Vec y = mul(cubic, broadcast(1.5957691f)), e = exp_of_minus(absolute(y));
  return div(mul(x, select(less(y, broadcast(0.0f)), e, one)), add(one, e));
}

OCTAVO_INLINE Vec activate(Gate gate, Vec x) { return gate == kSilu ? silu(x) : gate == kGelu ? gelu(x) : gelu_tanh(x); }

// The outputs of one tile (or, with a gate, of two) in one row. `f` holds its sums, `values` those of the gated values.
OCTAVO_INLINE void finish_tile(const Epilogue& e, std::int64_t row, std::int64_t first, const float* f, const float* values) {
  const int width = e.M - first < kLanes ? static_cast<int>(e.M - first) : kLanes;
  Vec y = load(f);
  if (e.bias != nullptr) y = add(y, load_partial(e.bias + first, width));
  if (e.gate != kNoGate) {
    Vec value = load(values);
    if (e.bias != nullptr) value = add(value, load_partial(e.bias + e.M + first, width));
    y = mul(activate(e.gate, y), value);
  }
  const std::int64_t at = row * e.M + first;
  if (e.residual != nullptr) y = add(y, load_partial(e.residual + at, width));
  if (width == kLanes) store(e.output + at, y); else store_partial(e.output + at, y, width);
}

// One or two tiles that one thread computes together.
struct Unit {
  const PackedWeight& w;
  const std::uint8_t* tile;
  int tiles;
};

template <int R, int T, int Bits>
OCTAVO_INLINE void some_tiles(const Unit& u, const Block& block, int t0, float* f) {
  const TileHeads<T> heads{u.tile + t0 * u.w.tile_bytes, u.w};
  if (block.x != nullptr) float_product<R, T, Bits>(heads, block, f);
  else int8_product<R, T, Bits>(heads, block, f);
}

template <int R, int Bits>
void unit_times_block(const Unit& u, const Block& block, float* f) {
  constexpr int T = block_tiles(R);
  if (T == 2 && u.tiles == 2) return some_tiles<R, T, Bits>(u, block, 0, f);
  for (int t = 0; t < u.tiles; ++t) some_tiles<R, 1, Bits>(u, block, t, f + t * R * kLanes);
}

OCTAVO_INLINE void accumulate(const Unit& u, const Block& block, float* f) {
  with_size<kRowBlock>(block.R, [&](auto size) __attribute__((always_inline)) {
    constexpr int R = decltype(size)::value;
    if (u.w.bits == 4) unit_times_block<R, 4>(u, block, f);
    else unit_times_block<R, 8>(u, block, f);
  });
}

OCTAVO_INLINE void finish_block(const Unit& u, const Epilogue& e, std::int64_t unit, std::int64_t row0, int R, const float* f) {
  const bool together = block_tiles(R) == 2 && u.tiles == 2;  // f is [R][2][16], else [2][R][16]
  const int row_step = (together ? 2 : 1) * kLanes, tile_step = (together ? 1 : R) * kLanes;
  for (int r = 0; r < R; ++r) {
    const float* row = f + r * row_step;
    if (e.gate != kNoGate) {
      finish_tile(e, row0 + r, unit * kTileOutputs, row, row + tile_step);
      continue;
    }
    for (int t = 0; t < u.tiles; ++t) finish_tile(e, row0 + r, unit * kUnitOutputs + t * kTileOutputs, row + t * tile_step, row);
  }
}

inline void multiply(const PackedWeight& w, const Prepared& prepared, const Epilogue& e, std::int64_t unit0, std::int64_t unit1, std::int64_t row0,
                     int rows) {
  alignas(64) float f[kRowBlock * kUnitOutputs];
  for (std::int64_t unit = unit0; unit < unit1; ++unit) {
    const std::int64_t first = unit * kUnitTiles;
    const Unit u{w, w.tiles + first * w.tile_bytes, w.tile_count - first < kUnitTiles ? 1 : kUnitTiles};
    for (int r = 0; r < rows; r += kRowBlock) {
      const Block block = block_at(w, prepared, row0 + r, rows - r < kRowBlock ? rows - r : kRowBlock);
      accumulate(u, block, f);
      finish_block(u, e, unit, row0 + r, block.R, f);
    }
  }
}

// constexpr: the table is data in the file, and no code of this instruction set runs before it is chosen.
constexpr QuantKernels quant_table() { return {kRowBlock, prepare, multiply, dequantize}; }

}  // namespace octavo::OCTAVO_QUANT_TARGET
