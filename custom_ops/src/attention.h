// Attention of many query rows over many sequences: cut into tiles and chunks, spread over threads, put together in order.
// Nothing here depends on where keys lie (KeySource) or on the instruction set (Kernels), and how the work is cut never shows in the bits.
#pragma once
#include <cstdint>

#include "kernels/kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace octavo {

// What one token row sees: keys [lo, hi). `position` is its own, for the slopes.
struct RowRange {
  std::int32_t lo, hi, position;
};

// Rows [row0, row0 + rows) that share their keys.
struct Sequence {
  std::int64_t row0;
  std::int64_t rows;
};

class KeySource {
 public:
  // Where the keys of `chunk` of one sequence and KV head lie. `lane` is the caller's, for scratch that stays valid until the next call
  // with the same lane.
  virtual void view(std::int64_t sequence, int g, std::int32_t chunk, std::size_t lane, ChunkView* out) const = 0;
  // Whether views of this sequence take no scratch: they may then be made before they are read.
  virtual bool in_place(std::int64_t sequence) const = 0;

 protected:
  ~KeySource() = default;
};

// Strides are in elements and 0 where a dimension is broadcast.
struct Bias {
  BiasType type;
  const void* data;
  std::int64_t sequence_stride, head_stride, row_stride;
  const std::uint8_t* key_mask;  // (B, keys) or null
  std::int32_t keys;
};

struct Attention {
  int H, G, D, E;
  CacheType cache_type;
  float softcap;
  const char* query;  // (rows, H), `query_bytes` each: rotated and scaled, as the cache's kernels take it
  std::int64_t query_bytes;
  float* output;       // (rows, H, E)
  const RowRange* ranges;
  const Sequence* sequences;
  std::int64_t sequence_count;
  const float* head_sink;     // (H) or null
  const float* alibi_slopes;  // (H) or null
  Bias bias;
  const KeySource* keys;
};

Status attend(const Attention&, const Kernels&, const Parallel&, Scratch&);

}  // namespace octavo
