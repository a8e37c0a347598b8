// How one chunk of one KV head lies in memory.
//
// Cache layout "k-dp-v-pd.1" (custom_ops/contract.py), one block of P slots, one KV head:
//
//     key    [D][P]     element (d, slot) at d·P + slot     lanes run over slots, the reduction over D stays in order
//     value  [P][E]     element (slot, e) at slot·E + e     lanes run over E, the reduction over keys stays in order
//
// so that a whole key cache is [N][G][D][P] and a whole value cache [N][G][P][E]. int8_layout.h draws the blocks of the int8 cache, which are bytes.
#pragma once
#include <cstdint>

namespace octavo {

// Positions are visited in chunks of this many, aligned to position 0: CHUNK of the contract. Bits depend on it.
inline constexpr int kChunk = 256;
inline constexpr int kLanes = 16;  // virtual vector width of every instruction set
inline constexpr int kMaxBlocks = kChunk / kLanes;
inline constexpr int kMaxHead = 256;

struct Half {
  std::uint16_t bits;
};

enum CacheType : int { kCacheFloat = 0, kCacheHalf = 1, kCacheInt8 = 2 };
inline constexpr int kCacheTypes = 3;

// Where the kChunk positions from `first` lie. Block i holds positions [first + i·2^log2_block, …) of this KV head; a block that no row of
// the tile sees may be null and is never touched. Inside a touched block every slot is readable memory of any content.
struct ChunkView {
  std::int32_t first;
  int log2_block;
  std::int64_t key_stride;    // elements between (d, slot) and (d + 1, slot); of fp32 and fp16 only
  std::int64_t value_stride;  // elements between (slot, e) and (slot + 1, e); of fp32 and fp16 only
  const void* key[kMaxBlocks];
  const void* value[kMaxBlocks];
  std::int64_t key_bytes;     // of a block that lies in one piece; 0: not worth asking for early
  std::int64_t value_bytes;
  const ChunkView* ahead;     // what this thread reads next, or null
  bool cold;                  // not what the chunk before pointed at
};

}  // namespace octavo
