// Before the product: x + skip, RMSNorm, and the rounding of a row to int8 by groups.
//
// A row stands alone. The sum of squares runs in sixteen lanes, k ascending, joined by the one tree. A group's scale is its largest
// magnitude/127, its q = round to nearest even of x·(127/largest magnitude). A group whose largest magnitude is below 2^-120 is zero; one
// with an infinity or a NaN has q = 0 and the scale NaN, so that every output of the row is NaN.
//
// With scales that are given q = round to nearest even of x·(1/scale), between −127 and 127, and the largest magnitude is not looked for. An infinity
// or a NaN makes every output of the row NaN here too.
#pragma once
#include "kernels/quant.h"

namespace octavo::OCTAVO_QUANT_TARGET {

inline constexpr int kPanelGroups = kLanes;  // groups whose scales are computed together

// The arrays of one block with R rows.
struct Block {
  std::int8_t* q;
  std::int32_t* start;
  float* scale;
  float* sum;
  float* x;
  int R;
};

OCTAVO_INLINE Block block_at(const PackedWeight& w, const Prepared& prepared, std::int64_t row0, int rows) {
  std::uint8_t* base = prepared.blocks + row0 / kRowBlock * prepared.block_bytes;
  Block block{};
  block.R = rows;
  if (!prepared.int8) {
    block.x = reinterpret_cast<float*>(base);
    return block;
  }
  const std::int64_t quantities = static_cast<std::int64_t>(w.K / w.group) * rows;
  block.q = reinterpret_cast<std::int8_t*>(base);
  block.start = reinterpret_cast<std::int32_t*>(base + static_cast<std::int64_t>(w.K) * rows);
  block.scale = reinterpret_cast<float*>(block.start + quantities);
  block.sum = block.scale + quantities;
  return block;
}

// The normed row, sixteen at a time.
struct Row {
  const float* x;
  const float* skip;
  const float* norm_weight;
  const float* scale;  // of each group, or nullptr: the row's own
  float inverse;       // 1/√(mean of squares + epsilon)

  OCTAVO_INLINE Vec summed(int k) const { return skip != nullptr ? add(load(x + k), load(skip + k)) : load(x + k); }
  OCTAVO_INLINE Vec at(int k) const {
    const Vec v = summed(k);
    return norm_weight != nullptr ? mul(mul(v, broadcast(inverse)), load(norm_weight + k)) : v;
  }
};

// Fills in `inverse`. The rows' sums run side by side: each is one chain of additions.
OCTAVO_INLINE void find_inverses(Row* rows, int count, int K, float epsilon) {
  Vec squares[kRowBlock];
  for (int r = 0; r < count; ++r) squares[r] = broadcast(0.0f);
  for (int k = 0; k < K; k += kLanes) {
    for (int r = 0; r < count; ++r) {
      const Vec v = rows[r].summed(k);
      squares[r] = fma(v, v, squares[r]);
    }
  }
  for (int r = 0; r < count; ++r) rows[r].inverse = 1.0f / __builtin_sqrtf(sum(squares[r]) / static_cast<float>(K) + epsilon);
}

// What the integer sum of a group starts from, so that Σ w·q comes out for the weights as they are meant:
//     symmetric     −(middle − offset)·Σq
//     zero points   −Σq as a 16-bit number, to be multiplied by (zero point − offset) of each output
//     minimum       offset·Σq; the minimum itself enters as `sum` = Σq·scale
// where the products hold weight − offset (kByteOffset at 8 bits, 0 at 4).
OCTAVO_INLINE std::int32_t start_of(const PackedWeight& w, std::int32_t total) {
  const std::int32_t offset = w.bits == 8 ? kByteOffset : 0;
  if (w.zero_point == kSymmetric) return -((1 << (w.bits - 1)) - offset) * total;
  return w.zero_point == kMinimum ? offset * total : -total & 0xffff;
}

// Sixteen whole numbers to where the products want them, R rows side by side.
OCTAVO_INLINE void store_quads(std::int8_t* to, int R, Vec whole) {
  alignas(16) std::int8_t bytes[kLanes];
  store_int8(bytes, whole);
  for (int quad = 0; quad < kLanes / 4; ++quad) __builtin_memcpy(to + quad * 4 * R, bytes + 4 * quad, 4);
}

// What the products need to know of a group besides its q, whose sum is `total`: whole numbers below 2^24, exact in any order.
OCTAVO_INLINE void put_group(const PackedWeight& w, float total, float scale, int at, const Block& out) {
  out.start[at] = start_of(w, static_cast<std::int32_t>(total));
  out.scale[at] = scale;
  out.sum[at] = total * scale;
}

// Groups [g0, g0 + count), count ≤ kPanelGroups, of row r of a block.
// What the loops read is copied: for all that the compiler knows the bytes stored to q could change it.
inline void quantize_panel(const PackedWeight& w, const Row& given, int g0, int count, int r, const Block& out) {
  constexpr int kWidest = 128;
  const Row row = given;
  const int group = w.group, R = out.R;
  std::int8_t* const q = out.q + static_cast<std::int64_t>(g0) * group * R + 4 * r;
  alignas(64) float values[kPanelGroups * kWidest], scales[kPanelGroups], factors[kPanelGroups];
  alignas(64) std::int32_t largest[kPanelGroups] = {};
  for (int g = 0; g < count; ++g) {
    Ints magnitude = broadcast_int(0);
    for (int k = 0; k < group; k += kLanes) {
      const Vec v = row.at((g0 + g) * group + k);
      store(values + g * group + k, v);
      magnitude = max_magnitude(magnitude, v);
    }
    largest[g] = max_lane(magnitude);
  }
  const Vec most = load(reinterpret_cast<const float*>(largest));
  const Mask tiny = less(most, broadcast(0x1p-120f)), number = less(most, broadcast(kInfinity));
  const Vec zero = broadcast(0.0f);
  store(scales, select(number, select(tiny, zero, div(most, broadcast(127.0f))), broadcast(__builtin_nanf(""))));
  store(factors, select(number, select(tiny, zero, div(broadcast(127.0f), most)), zero));
  const Vec shift = broadcast(12582912.0f);  // 1.5·2^23: adding it rounds to an integer
  for (int g = 0; g < count; ++g) {
    const Vec factor = broadcast(factors[g]);
    const bool nothing = factors[g] == 0.0f;
    Vec total = zero;
    for (int k = 0; k < group; k += kLanes) {
      const Vec whole = nothing ? zero : sub(add(mul(load(values + g * group + k), factor), shift), shift);
      total = add(total, whole);
      store_quads(q + (g * group + k) * R, R, whole);
    }
    put_group(w, sum(total), scales[g], (g0 + g) * R + r, out);
  }
}

// The same with the scales that are given.
inline void round_panel(const PackedWeight& w, const Row& given, int g0, int count, int r, const Block& out) {
  const Row row = given;
  const int group = w.group, R = out.R;
  std::int8_t* const q = out.q + static_cast<std::int64_t>(g0) * group * R + 4 * r;
  alignas(64) float factors[kPanelGroups], totals[kPanelGroups];
  const Vec zero = broadcast(0.0f), most = broadcast(127.0f), least = broadcast(-127.0f), shift = broadcast(12582912.0f);
  store(factors, div(broadcast(1.0f), load_partial(row.scale + g0, count)));
  Vec sound = zero;  // stays 0 as long as every value is a number
  for (int g = 0; g < count; ++g) {
    const Vec factor = broadcast(factors[g]);
    Vec total = zero;
    for (int k = 0; k < group; k += kLanes) {
      const Vec v = row.at((g0 + g) * group + k);
      sound = fma(v, zero, sound);
      const Vec whole = sub(add(max(min(mul(v, factor), most), least), shift), shift);
      total = add(total, whole);
      store_quads(q + (g * group + k) * R, R, whole);
    }
    totals[g] = sum(total);
  }
  const float nothing = sum(sound);
  for (int g = 0; g < count; ++g) put_group(w, totals[g], row.scale[g0 + g] + nothing, (g0 + g) * R + r, out);
}

inline void prepare_row(const PackedWeight& w, const Row& row, float* total, int r, const Block& out) {
  if (total != nullptr) {
    for (int k = 0; k < w.K; k += kLanes) store(total + k, row.summed(k));
  }
  if (out.x != nullptr) {
    alignas(64) float lanes[kLanes];
    for (int k = 0; k < w.K; k += kLanes) {
      store(lanes, row.at(k));
      for (int i = 0; i < kLanes; ++i) out.x[static_cast<std::int64_t>(k + i) * out.R + r] = lanes[i];
    }
    return;
  }
  const int groups = w.K / w.group;
  for (int g = 0; g < groups; g += kPanelGroups) {
    const int count = groups - g < kPanelGroups ? groups - g : kPanelGroups;
    if (row.scale != nullptr) round_panel(w, row, g, count, r, out); else quantize_panel(w, row, g, count, r, out);
  }
}

inline void prepare(const PackedWeight& w, const Prologue& p, std::int64_t row0, int rows, const Prepared& prepared) {
  const Block block = block_at(w, prepared, row0, rows);
  Row row[kRowBlock];
  for (int r = 0; r < rows; ++r) {
    const std::int64_t at = (row0 + r) * w.K;
    row[r] = {p.x + at, p.skip != nullptr ? p.skip + at : nullptr, p.norm_weight, p.scale, 0.0f};
  }
  if (p.norm_weight != nullptr) find_inverses(row, rows, w.K, p.epsilon);
  for (int r = 0; r < rows; ++r) prepare_row(w, row[r], p.sum != nullptr ? p.sum + (row0 + r) * w.K : nullptr, r, block);
}

}  // namespace octavo::OCTAVO_QUANT_TARGET
