// The paged cache as a KeySource, draft trees included.
#pragma once
#include "attention.h"
#include "kv/step.h"

namespace octavo {

// One layer's cache tensors: keys (N, G, D, P), values (N, G, P, E).
struct PagedCache {
  CacheType type;
  std::int64_t N, G, D, E, P;
  void* key;
  void* value;

  std::int64_t element_size() const { return type == kCacheHalf ? 2 : 4; }
  // Address of (d = 0) and (e = 0) of one slot.
  char* key_at(std::int64_t slot, std::int64_t g) const {
    return static_cast<char*>(key) + ((slot / P * G + g) * D * P + slot % P) * element_size();
  }
  char* value_at(std::int64_t slot, std::int64_t g) const {
    return static_cast<char*>(value) + ((slot / P * G + g) * P + slot % P) * E * element_size();
  }
};

class PagedKeys final : public KeySource {
 public:
  // `lane_scratch` holds lane_bytes(cache) for each lane; it may be null where the step has no tree.
  PagedKeys(const PagedCache& cache, const StepInput& input, const Step& step, char* lane_scratch)
      : cache_(cache), input_(input), step_(step), lane_scratch_(lane_scratch) {}

  static std::int64_t lane_bytes(const PagedCache& cache) { return kChunk * (cache.D + cache.E) * cache.element_size(); }

  void view(std::int64_t sequence, int g, std::int32_t chunk, std::size_t lane, ChunkView* out) const override;

 private:
  void gather(std::int32_t row, std::int64_t b, int g, std::size_t lane, ChunkView* out) const;

  const PagedCache& cache_;
  const StepInput& input_;
  const Step& step_;
  char* lane_scratch_;
};

}  // namespace octavo
