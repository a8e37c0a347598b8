#include "kv/paged_keys.h"

#include <algorithm>

namespace octavo {
namespace {

template <class T>
void copy_slot(const PagedCache& cache, std::int64_t slot, int g, T* key, T* value) {
  const T* from_key = reinterpret_cast<const T*>(cache.key_at(slot, g));
  const T* from_value = reinterpret_cast<const T*>(cache.value_at(slot, g));
  for (std::int64_t d = 0; d < cache.D; ++d) key[d * cache.P] = from_key[d * cache.P];
  std::copy(from_value, from_value + cache.E, value);
}

}  // namespace

void PagedKeys::view(std::int64_t sequence, int g, std::int32_t chunk, std::size_t lane, ChunkView* out) const {
  const Owner& owner = step_.owners[sequence];
  out->first = chunk * kChunk;
  out->log2_block = __builtin_ctz(static_cast<unsigned>(cache_.P));
  out->key_stride = cache_.P;
  out->value_stride = cache_.E;
  for (std::int64_t i = 0; i < kChunk / cache_.P; ++i) {
    const std::int64_t slot = slot_of(input_, owner.b, out->first + i * cache_.P);
    out->key[i] = slot < 0 ? nullptr : cache_.key_at(slot, g);
    out->value[i] = slot < 0 ? nullptr : cache_.value_at(slot, g);
  }
  if (owner.tree_row >= 0) gather(owner.tree_row, owner.b, g, lane, out);
}

// Replaces the blocks of this chunk that reach into the step by copies in which every visible position holds what the row sees there: the
// cached token, or the row's own ancestor of that position. Other slots of a copy hold anything, as hidden slots may.
void PagedKeys::gather(std::int32_t row, std::int64_t b, int g, std::size_t lane, ChunkView* out) const {
  const RowRange& range = step_.ranges[row];
  const std::int32_t first = out->first, past = input_.past[b];
  std::int32_t ancestor[kChunk];
  for (std::int32_t r = row; r >= 0 && step_.ranges[r].position >= first; r = input_.parent[r]) {
    const std::int32_t at = step_.ranges[r].position - first;
    if (at < kChunk) ancestor[at] = r;
  }
  char* base = lane_scratch_ + static_cast<std::int64_t>(lane) * lane_bytes(cache_);
  const std::int64_t size = cache_.element_size(), P = cache_.P;
  for (std::int64_t i = 0; i < kChunk / P; ++i) {
    const std::int64_t begin = first + i * P, end = begin + P;
    if (end <= past || begin >= range.hi) continue;
    char* key = base + i * P * cache_.D * size;
    char* value = base + (kChunk * cache_.D + i * P * cache_.E) * size;
    for (std::int64_t p = std::max<std::int64_t>(begin, range.lo); p < std::min<std::int64_t>(end, range.hi); ++p) {
      const std::int32_t from = p < past ? -1 : ancestor[p - first];
      const std::int64_t slot = from >= 0 && input_.slots[from] >= 0 ? input_.slots[from] : slot_of(input_, b, p);
      const std::int64_t at = p - begin;
      if (cache_.type == kCacheHalf) {
        copy_slot(cache_, slot, g, reinterpret_cast<std::uint16_t*>(key) + at, reinterpret_cast<std::uint16_t*>(value) + at * cache_.E);
      } else {
        copy_slot(cache_, slot, g, reinterpret_cast<std::uint32_t*>(key) + at, reinterpret_cast<std::uint32_t*>(value) + at * cache_.E);
      }
    }
    out->key[i] = key;
    out->value[i] = value;
  }
}

}  // namespace octavo
