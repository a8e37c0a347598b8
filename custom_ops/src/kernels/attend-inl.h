// One chunk of keys against one tile of query rows.
//
// The bits of a row depend on its query, its visible keys and values, and their positions; never on the other rows of the tile, on what hidden
// slots hold, or on how a chunk is cut into blocks. Therefore: each score is one fma chain over d, ascending; the row's own maximum; l over
// sixteen lanes (position mod 16) and one tree; each output one fma chain over its visible positions, ascending.
#pragma once
#include "kernels/ahead-inl.h"
#include "kernels/kernels.h"
#include "kernels/math-inl.h"
#include "kernels/with_size-inl.h"

namespace octavo::OCTAVO_TARGET {

// In place of the probability of a key that the row does not see. The probability of a visible key is never negative.
inline constexpr float kHidden = -0.0f;

// Positions relative to the chunk.
struct Range {
  int lo, hi;
};

OCTAVO_INLINE Range within(const Tile& tile, int r, std::int32_t first) {
  const std::int32_t lo = tile.lo[r] - first, hi = tile.hi[r] - first;
  return {lo < 0 ? 0 : lo, hi > kChunk ? kChunk : hi};
}

OCTAVO_INLINE bool hides(float probability) { return __builtin_signbit(probability) != 0; }

// scores[r][position] = query[r] · key[position] for R rows from `row` and V vectors of positions from `vec`.
template <class T, int R, int V, class Asks>
OCTAVO_INLINE void score_block(const Tile& tile, const ChunkView& view, int row, int vec, float (*scores)[kChunk], Asks* ahead) {
  const T* key[V];
  const float* query[R];
  Vec acc[R][V];
  for (int v = 0; v < V; ++v) {
    const int at = (vec + v) * kLanes;
    key[v] = static_cast<const T*>(view.key[at >> view.log2_block]) + (at & ((1 << view.log2_block) - 1));
  }
  for (int r = 0; r < R; ++r) {
    query[r] = static_cast<const float*>(tile.query[row + r]);
    for (int v = 0; v < V; ++v) acc[r][v] = broadcast(0.0f);
  }
  for (int d = 0; d < tile.D; ++d) {
    ahead->template step<sizeof(T)>();
    Vec k[V];
    for (int v = 0; v < V; ++v) {
      k[v] = load(key[v]);
      key[v] += view.key_stride;
    }
    for (int r = 0; r < R; ++r) {
      const Vec q = broadcast(query[r][d]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(q, k[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(&scores[row + r][(vec + v) * kLanes], acc[r][v]);
  }
}

template <class T, class Asks>
OCTAVO_INLINE void score_all(const Tile& tile, const ChunkView& view, int first_vec, int last_vec, float (*scores)[kChunk], Asks* ahead) {
  for (int row = 0; row < tile.rows;) {
    const int rows = tile.rows - row < kTileRows ? tile.rows - row : kTileRows;
    with_size<kTileRows>(rows, [&](auto size) __attribute__((always_inline)) {
      constexpr int R = decltype(size)::value, V = tile_vecs(R);
      int vec = first_vec;
      for (; vec + V <= last_vec; vec += V) score_block<T, R, V>(tile, view, row, vec, scores, ahead);
      for (; vec < last_vec; ++vec) score_block<T, R, 1>(tile, view, row, vec, scores, ahead);
    });
    row += rows;
  }
}

// Softcap, slope and bias; −inf where hidden. `at` is relative to the chunk.
OCTAVO_INLINE Vec finished_score(const Tile& tile, std::int32_t first, int r, int at, Range seen, Vec score) {
  if (tile.softcap != 0.0f) {
    const Vec cap = broadcast(tile.softcap);
    score = mul(cap, tanh(div(score, cap)));
  }
  const std::int32_t position = first + at;
  if (tile.has_slopes) {
    const Vec distance = add(broadcast(static_cast<float>(position - tile.position[r])), iota());  // exact below 2^24
    score = fma(broadcast(tile.slope[r]), distance, score);
  }
  Mask visible = lanes(seen.lo - at, seen.hi - at);
  const int left = tile.keys - position;
  if (tile.bias_type == kFloatBias) {
    score = add(score, load_partial(static_cast<const float*>(tile.bias[r]) + position, left < kLanes ? left : kLanes));
  } else if (tile.bias_type == kBoolBias) {
    visible = both(visible, nonzero(static_cast<const std::uint8_t*>(tile.bias[r]) + position, left));
  }
  if (tile.key_mask != nullptr) visible = both(visible, nonzero(tile.key_mask + position, left));
  return select(visible, score, broadcast(-kInfinity));
}

struct RowSoftmax {
  float m, l;
  bool all_seen;  // no key of the row's range is hidden
};

// scores[r] becomes exp(score − m), kHidden where the row does not see.
OCTAVO_INLINE RowSoftmax softmax_row(const Tile& tile, std::int32_t first, int r, int first_vec, int last_vec, float* scores) {
  const Range seen = within(tile, r, first);
  const Vec hidden = broadcast(-kInfinity);
  bool all_seen = true;
  Vec highest = hidden;
  for (int vec = first_vec; vec < last_vec; ++vec) {
    const int at = vec * kLanes;
    const Vec score = finished_score(tile, first, r, at, seen, load(scores + at));
    if (any(both(equal(score, hidden), lanes(seen.lo - at, seen.hi - at)))) all_seen = false;
    highest = max(score, highest);
    store(scores + at, score);
  }
  const float m = maximum(highest);
  Vec total = broadcast(0.0f);
  for (int vec = first_vec; vec < last_vec; ++vec) {
    float* at = scores + vec * kLanes;
    const Vec score = load(at);
    const Vec p = select(equal(score, hidden), broadcast(kHidden), exp_nonpositive(sub(score, broadcast(m))));
    total = add(total, p);
    store(at, p);
  }
  // The highest key adds 1 to l, so only a row that sees nothing ends at 0. NaN scores may have slipped through max: they are in l for sure.
  const float l = sum(total);
  return {l != l ? l : m, l, all_seen && l != 0.0f};
}

// o[r][e…] = Σ p[r][j]·value[j][e…] for R rows and V vectors of e; the last vector holds `width` lanes. All R rows see every key of `common`.
template <class T, int R, int V, class Asks>
OCTAVO_INLINE void value_block(const ChunkView& view, int row, int e, int width, Range all, Range common, const float (*p)[kChunk], float* o,
                               int o_stride, Asks* ahead) {
  Vec acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = broadcast(0.0f);
  }
  const auto load_value = [&](int j, Vec* value) __attribute__((always_inline)) {
    const T* at = static_cast<const T*>(view.value[j >> view.log2_block]) + (j & ((1 << view.log2_block) - 1)) * view.value_stride + e;
    for (int v = 0; v < V; ++v) value[v] = v == V - 1 && width < kLanes ? load_partial(at + v * kLanes, width) : load(at + v * kLanes);
  };
  const auto some_rows = [&](int lo, int hi) __attribute__((always_inline)) {
    for (int j = lo; j < hi; ++j) {
      Vec value[V];
      bool loaded = false;
      for (int r = 0; r < R; ++r) {
        const float weight = p[row + r][j];
        if (hides(weight)) continue;
        if (!loaded) load_value(j, value);  // a key that no row sees may lie in a block that is not there
        loaded = true;
        for (int v = 0; v < V; ++v) acc[r][v] = fma(broadcast(weight), value[v], acc[r][v]);
      }
    }
  };
  some_rows(all.lo, common.lo);
  for (int j = common.lo; j < common.hi; ++j) {
    ahead->template step<sizeof(T)>();
    Vec value[V];
    load_value(j, value);
    for (int r = 0; r < R; ++r) {
      const Vec weight = broadcast(p[row + r][j]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(weight, value[v], acc[r][v]);
    }
  }
  some_rows(common.hi, all.hi);
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(o + (row + r) * o_stride + e + v * kLanes, acc[r][v]);
  }
}

template <class T, class Asks>
OCTAVO_INLINE void value_all(const Tile& tile, const ChunkView& view, Range all, const Range* full, const float (*p)[kChunk], float* o, Asks* ahead) {
  const int o_stride = (tile.E + kLanes - 1) / kLanes * kLanes;
  for (int row = 0; row < tile.rows;) {
    const int rows = tile.rows - row < kTileRows ? tile.rows - row : kTileRows;
    Range common = all;
    for (int r = row; r < row + rows; ++r) {
      if (full[r].lo > common.lo) common.lo = full[r].lo;
      if (full[r].hi < common.hi) common.hi = full[r].hi;
    }
    if (common.lo >= common.hi) common = {all.hi, all.hi};
    with_size<kTileRows>(rows, [&](auto size) __attribute__((always_inline)) {
      constexpr int R = decltype(size)::value, V = tile_vecs(R);
      int e = 0;
      for (; e + V * kLanes <= tile.E; e += V * kLanes) value_block<T, R, V>(view, row, e, kLanes, all, common, p, o, o_stride, ahead);
      for (; e < tile.E; e += kLanes) {
        value_block<T, R, 1>(view, row, e, tile.E - e < kLanes ? tile.E - e : kLanes, all, common, p, o, o_stride, ahead);
      }
    });
    row += rows;
  }
}

template <class T, class Asks>
void attend_with(const Tile& tile, const ChunkView& view, const Softmax& out) {
  Range all = {kChunk, 0}, full[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    out.m[r] = -kInfinity;
    out.l[r] = 0.0f;
  }
  for (int r = 0; r < tile.rows; ++r) {
    const Range seen = within(tile, r, view.first);
    if (seen.lo >= seen.hi) continue;
    if (seen.lo < all.lo) all.lo = seen.lo;
    if (seen.hi > all.hi) all.hi = seen.hi;
  }
  if (all.lo >= all.hi) return;
  const int first_vec = all.lo / kLanes, last_vec = (all.hi + kLanes - 1) / kLanes;
  alignas(64) float scores[kLanes][kChunk];
  Asks ahead(view);
  score_all<T>(tile, view, first_vec, last_vec, scores, &ahead);
  for (int r = 0; r < tile.rows; ++r) {
    const RowSoftmax row = softmax_row(tile, view.first, r, first_vec, last_vec, scores[r]);
    out.m[r] = row.m;
    out.l[r] = row.l;
    full[r] = row.all_seen ? within(tile, r, view.first) : Range{kChunk, 0};
  }
  value_all<T>(tile, view, all, full, scores, out.o, &ahead);
}

template <class T>
void attend_chunk(const Tile& tile, const ChunkView& view, const Softmax& out) {
  with_ahead(tile, view, [&](auto* asks) { attend_with<T, std::remove_pointer_t<decltype(asks)>>(tile, view, out); });
}

}  // namespace octavo::OCTAVO_TARGET
