// The native function `octavo_kv_copy`: blocks of caches moved within them, over all layers in one call.
#include <cstdint>
#include <cstring>

#include "native/export.h"

// caches[c] is an array of `blocks` blocks of block_bytes[c] bytes; block sources[i] is copied over block targets[i] in every one of them, in
// the order of i. 0; or 1 where a block is not in the cache, and nothing was copied.
OCTAVO_EXPORT int octavo_kv_copy(unsigned char* const* caches, const std::int64_t* block_bytes, int num_caches, std::int64_t blocks,
                                 const std::int64_t* sources, const std::int64_t* targets, int count) {
  for (int i = 0; i < count; ++i) {
    if (sources[i] < 0 || sources[i] >= blocks || targets[i] < 0 || targets[i] >= blocks) return 1;
  }
  for (int c = 0; c < num_caches; ++c) {
    const std::size_t size = static_cast<std::size_t>(block_bytes[c]);
    for (int i = 0; i < count; ++i) {
      if (sources[i] != targets[i]) std::memcpy(caches[c] + targets[i] * block_bytes[c], caches[c] + sources[i] * block_bytes[c], size);
    }
  }
  return 0;
}
