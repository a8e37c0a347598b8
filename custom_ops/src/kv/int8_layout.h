// Sizes of the int8 cache, the same for host code and kernels.
//
// One block of P slots, one KV head, in bytes:
//
//     key    [D/4][P][4]   u8 = 128 + rounded key; D is padded to a multiple of 4    then  float scale[groups][P]
//     value  [P/4][E][4]   s8, element (slot, e) at (slot/4·E + e)·4 + slot%4        then  float scale[P], E padded to a multiple of 4
//
// so that sixteen lanes of four bytes are sixteen keys × 4 d, or sixteen e × 4 keys. A key has one scale where D is a power of two (it is then
// rotated by a Hadamard matrix first, which spreads outliers), else one for each 32 of its elements.
//
// A query row of the op: float scale[groups], int32 start[groups], s8 [D], with start = −128·Σ of the group, for the offset of the keys.
//
// Everything here has internal linkage: the file is compiled with the flags of every instruction set.
#pragma once
#include <cstdint>

namespace octavo {

inline constexpr int kScaleGroup = 32;

static inline constexpr std::int64_t int8_padded(std::int64_t size) { return (size + 3) / 4 * 4; }
static inline constexpr bool int8_rotates(std::int64_t D) { return (D & (D - 1)) == 0; }
static inline constexpr std::int64_t int8_groups(std::int64_t D) { return int8_rotates(D) ? 1 : (D + kScaleGroup - 1) / kScaleGroup; }
// Bytes of one slot of one KV head, scales included.
static inline constexpr std::int64_t int8_key_width(std::int64_t D) { return int8_padded(D) + 4 * int8_groups(D); }
static inline constexpr std::int64_t int8_value_width(std::int64_t E) { return int8_padded(E) + 4; }
static inline constexpr std::int64_t int8_query_bytes(std::int64_t D) { return int8_padded(D) + 8 * int8_groups(D); }

}  // namespace octavo
