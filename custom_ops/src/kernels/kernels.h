// What the kernels take: plain structs of pointers, sizes and strides, and the table of functions that every instruction set fills.
//
// This header is compiled with the flags of every instruction set. It must hold no inline function: the linker would keep one copy of it,
// perhaps the one with instructions that the processor lacks.
#pragma once
#include <cstdint>

#include "kernels/quant.h"
#include "kernels/sample.h"
#include "kv/block_view.h"

namespace octavo {

enum BiasType : int { kNoBias = 0, kFloatBias = 1, kBoolBias = 2 };

// Up to kLanes query rows that share one KV head. Positions are absolute; row r sees keys [lo[r], hi[r]), less what the masks hide.
struct Tile {
  int rows, D, E;
  float softcap;                        // 0: none
  bool has_slopes;
  BiasType bias_type;
  std::int32_t lo[kLanes], hi[kLanes];
  std::int32_t position[kLanes];        // of the query, for the slopes
  float slope[kLanes];
  const void* query[kLanes];            // float[D], rotated and scaled; for the int8 cache as int8_layout.h says
  const void* bias[kLanes];             // indexed by key position; float is added, bool false hides
  const std::uint8_t* key_mask;         // indexed by key position, 0 hides; or null
  std::int32_t keys;                    // bias and key_mask have this many entries
};

// Softmax state of a tile: m[r] maximum (−inf: row r has seen nothing, and its l and o mean nothing), l[r] sum of exp(score − m),
// o[r·Epad + e] sum of exp(score − m)·v, Epad = E rounded up to kLanes. m and l have kLanes entries, all written.
struct Softmax {
  float* m;
  float* l;
  float* o;
};

struct Rotary {
  const float* cos;  // of this row's position, `half` entries; half = 0: no rotation
  const float* sin;
  int half;
  bool interleaved;
};

// What depends on how keys and values are stored.
struct CacheKernels {
  // The softmax state of one chunk alone.
  void (*attend_chunk)(const Tile&, const ChunkView&, const Softmax& out);
  // A rotated and scaled query of D floats as the products take it. Null: as it is.
  void (*prepare_query)(const float* query, int D, void* row);
  // Store one head of one token in slot `slot` of a block of P, rounded to the cache's format.
  void (*append_key)(const float* key, int D, void* block, int slot, int P);
  void (*append_value)(const float* value, int E, void* block, int slot, int P);
};

struct Kernels {
  const char* name;
  const QuantKernels* quant;
  const SampleKernels* sample;
  const CacheKernels* cache[kCacheTypes];
  // state = state merged with the state of the next chunk.
  void (*merge)(int rows, int E, const Softmax& state, const Softmax& chunk);
  // out[r][e] = o / l, after sink[r] (or null) has joined the softmax; 0 where nothing was seen.
  void (*finish)(int rows, int E, const Softmax& state, const float* sink, float* const* out);
  // y = rotate(x)·scale for one head of D.
  void (*rotate)(const float* x, float* y, int D, const Rotary&, float scale);
  // y = x/√(mean(x²) + epsilon)·weight for one head of D.
  void (*normalize)(const float* x, float* y, int D, const float* weight, float epsilon);
};

}  // namespace octavo
