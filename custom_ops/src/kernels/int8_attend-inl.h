// One chunk of the int8 cache against one tile of query rows, all products in integers.
//
// The score of a key is, groups ascending from 0, f = fma(float(n)·query scale, key scale, f) with the exact n = Σ q·k of the group. In a chunk
// every row has its own maximum m of the keys that it sees; p = exp(score − m); l = Σ p in sixteen lanes and one tree; w = p·value scale is
// rounded to u8 against the largest w of the row in this chunk; o = float(Σ u8·v)·(that/255), the sum exact. A key that the row does not
// see has the byte 0 and takes no part, whatever its bytes and scales are: so nothing of a row depends on its company, as in attend-inl.h.
#pragma once
#include <type_traits>

#include "kernels/attend-inl.h"
#include "kv/int8_layout.h"

namespace octavo::OCTAVO_INT8_TARGET {

// Lines asked for at each quad of a product and each vector of a softmax: these pass once over a chunk in fewer steps than it has lines.
inline constexpr int kLinesAhead = 4;

struct QueryRow {
  const float* scale;
  const std::int32_t* start;
  const std::int8_t* q;
};

OCTAVO_INLINE QueryRow query_row(const Tile& tile, int r, int groups) {
  const float* scale = static_cast<const float*>(tile.query[r]);
  const std::int32_t* start = reinterpret_cast<const std::int32_t*>(scale + groups);
  return {scale, start, reinterpret_cast<const std::int8_t*>(start + groups)};
}

template <int R, int V, class Asks>
OCTAVO_INLINE void score_block(const Tile& tile, const ChunkView& view, int row, int vec, float (*scores)[kChunk], Asks* ahead) {
  const int P = 1 << view.log2_block, groups = static_cast<int>(int8_groups(tile.D)), quads = static_cast<int>(int8_padded(tile.D)) / 4;
  const int size = groups == 1 ? quads : kScaleGroup / 4;
  const std::uint8_t* key[V];
  const float* scale[V];
  QueryRow query[R];
  for (int v = 0; v < V; ++v) {
    const int at = (vec + v) * kLanes, slot = at & (P - 1);
    const std::uint8_t* block = static_cast<const std::uint8_t*>(view.key[at >> view.log2_block]);
    key[v] = block + slot * 4;
    scale[v] = reinterpret_cast<const float*>(block + quads * 4 * P) + slot;
  }
  for (int r = 0; r < R; ++r) query[r] = query_row(tile, row + r, groups);
  for (int g = 0; g < groups; ++g) {
    Ints acc[R][V];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) acc[r][v] = broadcast_int(query[r].start[g]);
    }
    const int end = quads < (g + 1) * size ? quads : (g + 1) * size;
    for (int quad = g * size; quad < end; ++quad) {
      ahead->template step<kLinesAhead>();
      Unsigned k[V];
      for (int v = 0; v < V; ++v) k[v] = load_unsigned(key[v] + quad * 4 * P);
      for (int r = 0; r < R; ++r) {
        const Signed q = broadcast_signed(query[r].q + quad * 4);
        for (int v = 0; v < V; ++v) acc[r][v] = dot(acc[r][v], k[v], q);
      }
    }
    for (int v = 0; v < V; ++v) {
      const Vec key_scale = load(scale[v] + g * P);
      for (int r = 0; r < R; ++r) {
        float* to = &scores[row + r][(vec + v) * kLanes];
        const Vec f = mul(to_float(acc[r][v]), broadcast(query[r].scale[g]));
        store(to, fma(f, key_scale, g == 0 ? broadcast(0.0f) : load(to)));
      }
    }
  }
}

template <class Asks>
OCTAVO_INLINE void score_all(const Tile& tile, const ChunkView& view, int first_vec, int last_vec, float (*scores)[kChunk], Asks* ahead) {
  for (int row = 0; row < tile.rows;) {
    const int rows = tile.rows - row < kRows ? tile.rows - row : kRows;
    with_size<kRows>(rows, [&](auto size) __attribute__((always_inline)) {
      constexpr int R = decltype(size)::value, V = vecs(R);
      int vec = first_vec;
      for (; vec + V <= last_vec; vec += V) score_block<R, V>(tile, view, row, vec, scores, ahead);
      for (; vec < last_vec; ++vec) score_block<R, 1>(tile, view, row, vec, scores, ahead);
    });
    row += rows;
  }
}

// exp(x) for x ≤ 0, relative error 3e-6 (the result is rounded to eight bits), exp(0) is exactly 1, 0 below −87; NaN stays NaN.
OCTAVO_INLINE Vec exp_short(Vec x, Mask gone) {
  const Vec shift = broadcast(12582912.0f), log2e = broadcast(1.44269504f);
  const Vec t = fma(x, log2e, shift);
  const Vec r = fma(x, log2e, sub(shift, t));
  Vec p = broadcast(0.00958284828811884f);
  p = fma(p, r, broadcast(0.05590643733739853f));
  p = fma(p, r, broadcast(0.24024099111557007f));
  p = fma(p, r, broadcast(0.6931241750717163f));
  return select(gone, broadcast(0.0f), scale_by_power(fma(p, r, broadcast(1.0f)), t));
}

// A row's softmax over a chunk, in three passes: over all rows where they come from the cache, so that what ends a pass of one row waits for no other's.
struct RowState {
  float m, l, factor;  // factor: what one unit of the row's bytes is worth
  int from, to;        // positions of whole vectors that the row sees something of
};

OCTAVO_INLINE void clear(std::uint8_t* bytes, int from, int to) {
  for (int at = from; at < to; at += kLanes) store_rounded(bytes + at, broadcast(0.0f));
}

// Finishes the scores, finds their maximum, and clears the bytes of vectors that the row sees nothing of.
OCTAVO_INLINE RowState find_maximum(const Tile& tile, std::int32_t first, int r, int first_vec, int last_vec, float* scores, std::uint8_t* bytes) {
  const Range seen = within(tile, r, first);
  if (seen.lo >= seen.hi) {
    clear(bytes, first_vec * kLanes, last_vec * kLanes);
    return {-kInfinity, 0.0f, 0.0f, 0, 0};
  }
  const int from = seen.lo / kLanes * kLanes, to = (seen.hi + kLanes - 1) / kLanes * kLanes;
  clear(bytes, first_vec * kLanes, from);
  clear(bytes, to, last_vec * kLanes);
  if (tile.softcap != 0.0f || tile.has_slopes) {
    for (int at = from; at < to; at += kLanes) store(scores + at, finished_score(tile, first, r, at, seen, load(scores + at)));
  } else {  // only the ends can be hidden
    for (int at = from; at < to; at += to - from - kLanes > 0 ? to - from - kLanes : kLanes) {
      store(scores + at, select(lanes(seen.lo - at, seen.hi - at), load(scores + at), broadcast(-kInfinity)));
    }
  }
  Vec highest = broadcast(-kInfinity);
  for (int at = from; at < to; at += kLanes) highest = max(load(scores + at), highest);
  return {maximum(highest), 0.0f, 0.0f, from, to};
}

// scores become the weights of the values.
template <class Asks>
OCTAVO_INLINE void weigh(const float* value_scale, float* scores, RowState* row, Asks* ahead) {
  const int from = row->from, to = row->to;
  const float m = row->m;
  Vec total = broadcast(0.0f), heaviest = broadcast(0.0f);
  if (m == -kInfinity) {  // every score is −inf, or NaN
    for (int at = from; at < to; at += kLanes) {
      const Vec score = load(scores + at);
      total = add(total, select(equal(score, broadcast(-kInfinity)), broadcast(0.0f), score));
    }
  } else {
    for (int at = from; at < to; at += kLanes) {
      ahead->template step<kLinesAhead>();
      const Vec x = sub(load(scores + at), broadcast(m));
      const Mask gone = less(x, broadcast(-87.0f));
      const Vec p = exp_short(x, gone), w = select(gone, broadcast(0.0f), mul(p, load(value_scale + at)));
      total = add(total, p);
      heaviest = max_bits(w, heaviest);
      store(scores + at, w);
    }
  }
  const float l = sum(total), top = maximum_bits(heaviest);
  *row = {l != l ? l : m, l, top < 0x1p-120f ? 0.0f : top, from, to};
}

// Weights become bytes, and the heaviest weight their unit.
OCTAVO_INLINE void round_weights(const float* scores, std::uint8_t* bytes, RowState* row) {
  if (row->factor == 0.0f) return clear(bytes, row->from, row->to);
  const Vec inverse = broadcast(255.0f / row->factor);
  for (int at = row->from; at < row->to; at += kLanes) store_rounded(bytes + at, mul(load(scores + at), inverse));
  row->factor /= 255.0f;
}

template <int R, int V, class Asks>
OCTAVO_INLINE void value_block(const Tile& tile, const ChunkView& view, int row, int e, int first, int last, const std::uint8_t (*bytes)[kChunk],
                               const float* factors, float* o, int o_stride, Asks* ahead) {
  const int P = 1 << view.log2_block, quad_bytes = static_cast<int>(int8_padded(tile.E)) * 4;
  Ints acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = broadcast_int(0);
  }
  for (int at = first; at < last;) {
    const int end = (at | (P - 1)) + 1 < last ? (at | (P - 1)) + 1 : last;
    const std::int8_t* value = static_cast<const std::int8_t*>(view.value[at >> view.log2_block]) + (at & (P - 1)) / 4 * quad_bytes + e * 4;
    for (; at < end; at += 4, value += quad_bytes) {
      ahead->template step<kLinesAhead>();
      Signed x[V];
      for (int v = 0; v < V; ++v) x[v] = load_signed(value + v * 4 * kLanes);
      for (int r = 0; r < R; ++r) {
        const Unsigned p = broadcast_unsigned(bytes[row + r] + at);
        for (int v = 0; v < V; ++v) acc[r][v] = dot(acc[r][v], p, x[v]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(o + (row + r) * o_stride + e + v * kLanes, mul(to_float(acc[r][v]), broadcast(factors[row + r])));
  }
}

// The last vector of e may reach into the next quad or the scales: what its lanes hold there is never read.
template <class Asks>
OCTAVO_INLINE void value_all(const Tile& tile, const ChunkView& view, int first, int last, const std::uint8_t (*bytes)[kChunk],
                             const float* factors, float* o, Asks* ahead) {
  const int o_stride = (tile.E + kLanes - 1) / kLanes * kLanes;
  for (int row = 0; row < tile.rows;) {
    const int rows = tile.rows - row < kRows ? tile.rows - row : kRows;
    with_size<kRows>(rows, [&](auto size) __attribute__((always_inline)) {
      constexpr int R = decltype(size)::value, V = vecs(R);
      int e = 0;
      for (; e + V * kLanes <= o_stride; e += V * kLanes) value_block<R, V>(tile, view, row, e, first, last, bytes, factors, o, o_stride, ahead);
      for (; e < o_stride; e += kLanes) value_block<R, 1>(tile, view, row, e, first, last, bytes, factors, o, o_stride, ahead);
    });
    row += rows;
  }
}

template <class Asks>
void attend_with(const Tile& tile, const ChunkView& view, const Softmax& out) {
  Range all = {kChunk, 0};
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
  const int first_vec = all.lo / kLanes, last_vec = (all.hi + kLanes - 1) / kLanes, P = 1 << view.log2_block;
  alignas(64) float scores[kLanes][kChunk], value_scale[kChunk];
  alignas(64) std::uint8_t bytes[kLanes][kChunk];
  float factors[kLanes];
  Asks ahead(view);
  score_all(tile, view, first_vec, last_vec, scores, &ahead);
  for (int at = first_vec * kLanes; at < last_vec * kLanes; at += kLanes) {
    const std::uint8_t* block = static_cast<const std::uint8_t*>(view.value[at >> view.log2_block]);
    store(value_scale + at, load(reinterpret_cast<const float*>(block + int8_padded(tile.E) * P) + (at & (P - 1))));
  }
  RowState rows[kLanes];
  const auto maximum_of = [&](int r) { rows[r] = find_maximum(tile, view.first, r, first_vec, last_vec, scores[r], bytes[r]); };
  const auto weights_of = [&](int r) { weigh(value_scale, scores[r], &rows[r], &ahead); };
  const auto bytes_of = [&](int r) {
    round_weights(scores[r], bytes[r], &rows[r]);
    out.m[r] = rows[r].m;
    out.l[r] = rows[r].l;
    factors[r] = rows[r].factor;
  };
  if constexpr (std::is_same_v<Asks, Ahead<1>>) {  // what is asked for in between comes evenly then
    for (int r = 0; r < tile.rows; ++r) {
      maximum_of(r);
      weights_of(r);
      bytes_of(r);
    }
  } else {
    for (int r = 0; r < tile.rows; ++r) maximum_of(r);
    for (int r = 0; r < tile.rows; ++r) weights_of(r);
    for (int r = 0; r < tile.rows; ++r) bytes_of(r);
  }
  value_all(tile, view, first_vec * kLanes, last_vec * kLanes, bytes, factors, out.o, &ahead);
}

inline void attend_chunk(const Tile& tile, const ChunkView& view, const Softmax& out) {
  with_ahead(tile, view, [&](auto* asks) { attend_with<std::remove_pointer_t<decltype(asks)>>(tile, view, out); });
}

}  // namespace octavo::OCTAVO_INT8_TARGET
