// The paged cache as a KeySource, draft trees included.
#pragma once
#include "attention.h"
#include "kv/int8_layout.h"
#include "kv/step.h"

namespace octavo {

// One layer's cache tensors: keys (N, G, D, P), values (N, G, P, E); of the int8 cache with its own widths (int8_layout.h) for D and E.
struct PagedCache {
  CacheType type;
  std::int64_t N, G, D, E, P;
  void* key;
  void* value;

  // Bytes of one slot of one KV head.
  std::int64_t key_bytes() const { return type == kCacheInt8 ? int8_key_width(D) : D * element_size(); }
  std::int64_t value_bytes() const { return type == kCacheInt8 ? int8_value_width(E) : E * element_size(); }
  std::int64_t element_size() const { return type == kCacheInt8 ? 1 : type == kCacheHalf ? 2 : 4; }
  // The block that a slot lies in.
  char* key_block(std::int64_t slot, std::int64_t g) const { return static_cast<char*>(key) + (slot / P * G + g) * P * key_bytes(); }
  char* value_block(std::int64_t slot, std::int64_t g) const { return static_cast<char*>(value) + (slot / P * G + g) * P * value_bytes(); }
};

class PagedKeys final : public KeySource {
 public:
  // `lane_scratch` holds lane_bytes(cache) for each lane; it may be null where the step has no tree.
  PagedKeys(const PagedCache& cache, const StepInput& input, const Step& step, char* lane_scratch)
      : cache_(cache), input_(input), step_(step), lane_scratch_(lane_scratch) {}

  static std::int64_t lane_bytes(const PagedCache& cache) { return kChunk * (cache.key_bytes() + cache.value_bytes()); }

  void view(std::int64_t sequence, int g, std::int32_t chunk, std::size_t lane, ChunkView* out) const override;
  bool in_place(std::int64_t sequence) const override { return step_.owners[sequence].tree_row < 0; }

 private:
  void gather(std::int32_t row, std::int64_t b, int g, std::size_t lane, ChunkView* out) const;

  const PagedCache& cache_;
  const StepInput& input_;
  const Step& step_;
  char* lane_scratch_;
};

}  // namespace octavo
