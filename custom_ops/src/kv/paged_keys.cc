#include "kv/paged_keys.h"

#include <algorithm>

namespace octavo {
namespace {

// `count` items, `stride` items apart, from place `from_at` of one block to place `to_at` of another.
template <class T>
void copy_items(const char* from, std::int64_t from_at, char* to, std::int64_t to_at, std::int64_t count, std::int64_t stride) {
  const T* source = reinterpret_cast<const T*>(from) + from_at;
  T* target = reinterpret_cast<T*>(to) + to_at;
  for (std::int64_t i = 0; i < count; ++i) target[i * stride] = source[i * stride];
}

// One slot of the cache into place `to` of a block of our own.
void copy_slot(const PagedCache& cache, std::int64_t slot, int g, char* key, char* value, std::int64_t to) {
  const char* from_key = cache.key_block(slot, g);
  const char* from_value = cache.value_block(slot, g);
  const std::int64_t P = cache.P, E = cache.E, at = slot % P;
  if (cache.type == kCacheHalf) {
    copy_items<std::uint16_t>(from_key, at, key, to, cache.D, P);
    copy_items<std::uint16_t>(from_value, at * E, value, to * E, E, 1);
  } else if (cache.type == kCacheFloat) {
    copy_items<std::uint32_t>(from_key, at, key, to, cache.D, P);
    copy_items<std::uint32_t>(from_value, at * E, value, to * E, E, 1);
  } else {
    const std::int64_t padded = int8_padded(E);
    copy_items<std::uint32_t>(from_key, at, key, to, int8_key_width(cache.D) / 4, P);  // quads of d, then scales: all P apart
    copy_items<std::uint8_t>(from_value, at / 4 * padded * 4 + at % 4, value, to / 4 * padded * 4 + to % 4, padded, 4);
    copy_items<std::uint32_t>(from_value + padded * P, at, value + padded * P, to, 1, 1);
  }
}

}  // namespace

void PagedKeys::view(std::int64_t sequence, int g, std::int32_t chunk, std::size_t lane, ChunkView* out) const {
  const Owner& owner = step_.owners[sequence];
  const int log2_block = __builtin_ctz(static_cast<unsigned>(cache_.P)), blocks = kChunk >> log2_block;
  const std::int64_t key_bytes = cache_.key_bytes() << log2_block, value_bytes = cache_.value_bytes() << log2_block;
  const std::int32_t* table = input_.block_table + owner.b * input_.M;
  out->first = chunk * kChunk;
  out->log2_block = log2_block;
  out->key_stride = cache_.P;
  out->value_stride = cache_.E;
  out->key_bytes = key_bytes;
  out->value_bytes = value_bytes;
  for (std::int64_t i = 0, at = std::int64_t{chunk} * blocks; i < blocks; ++i, ++at) {
    const std::int32_t block = at < input_.M ? table[at] : -1;
    const bool mapped = block >= 0 && block < cache_.N;
    out->key[i] = mapped ? static_cast<const char*>(cache_.key) + (block * cache_.G + g) * key_bytes : nullptr;
    out->value[i] = mapped ? static_cast<const char*>(cache_.value) + (block * cache_.G + g) * value_bytes : nullptr;
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
  const std::int64_t P = cache_.P;
  for (std::int64_t i = 0; i < kChunk / P; ++i) {
    const std::int64_t begin = first + i * P, end = begin + P;
    if (end <= past || begin >= range.hi) continue;
    char* key = base + i * P * cache_.key_bytes();
    char* value = base + kChunk * cache_.key_bytes() + i * P * cache_.value_bytes();
    for (std::int64_t p = std::max<std::int64_t>(begin, range.lo); p < std::min<std::int64_t>(end, range.hi); ++p) {
      const std::int32_t from = p < past ? -1 : ancestor[p - first];
      const std::int64_t slot = from >= 0 && input_.slots[from] >= 0 ? input_.slots[from] : slot_of(input_, b, p);
      copy_slot(cache_, slot, g, key, value, p - begin);
    }
    out->key[i] = key;
    out->value[i] = value;
  }
}

}  // namespace octavo
