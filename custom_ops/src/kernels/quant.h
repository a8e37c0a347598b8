// What the kernels of QuantLinear and QuantEmbedding take, and the table of functions that every instruction set fills.
//
// This header is compiled with the flags of every instruction set. It must hold no inline function (see kernels.h).
//
// Weight layout "o16-k8.1" (WEIGHT_LAYOUT of custom_ops/contract.py). A tile holds 16 outputs × all K, contiguous, a multiple of 64 bytes:
//
//     scales       [groups][16]   fp16 or fp32
//     zero points  [groups][16]   u8, or minimums of the scales' type, or nothing
//     padding to a multiple of 64 bytes
//     weights      4 bits: K/8 lines of 64 bytes, byte 4·o + j of line v has w[o][8v + j] in its low nibble, w[o][8v + 4 + j] in its high one
//                  8 bits: K/4 lines of 64 bytes, byte 4·o + j of line v is w[o][4v + j]
//
// so that one line of 8-bit weights (or one half of a line of 4-bit ones) is sixteen lanes of four consecutive k. Where a gate follows, tiles
// of the gate and of the values it multiplies alternate.
#pragma once
#include <cstdint>

namespace octavo {

inline constexpr int kTileOutputs = 16;   // lanes of a tile
inline constexpr int kUnitTiles = 2;      // tiles that one thread computes together: a gate and its values, or two neighbours
inline constexpr int kUnitOutputs = kTileOutputs * kUnitTiles;
inline constexpr int kChunkRows = 96;     // rows of one call of `multiply`, at most; a multiple of every row_block

enum ZeroPoint : int { kSymmetric = 0, kZeroPointBytes = 1, kMinimum = 2 };
enum Gate : int { kNoGate = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3 };

// w = scale·(q − 2^(bits − 1)), scale·(q − zero point), or fma(scale, q, minimum); each rounded once to float32.
struct PackedWeight {
  const std::uint8_t* tiles;
  std::int64_t tile_bytes, zero_offset, lines_offset;  // inside a tile
  int K, group, bits, tile_count;
  ZeroPoint zero_point;
  bool half_scales;
};

// Everything before the product, row by row: x + skip, RMSNorm, quantization. A null pointer leaves its part out.
struct Prologue {
  const float* x;            // (rows, K)
  const float* skip;         // (rows, K)
  float* sum;                // (rows, K): x + skip
  const float* norm_weight;  // (K)
  float epsilon;
  const float* scale;        // (groups): what int8 activations are rounded with, in place of scales of the row's own
};

// The input of a product, prepared in blocks of `row_block` rows; the last block holds the R rows that are left. With int8 activations:
//     int8 q[K/4][R][4], int32 start[groups][R], float scale[groups][R], float sum[groups][R]
// q = round(x/scale), scale = the group's largest magnitude/127, or given. `start` and `sum` make up for the weights' offset (quant_rows-inl.h).
// With float activations: float x[K][R].
struct Prepared {
  std::uint8_t* blocks;
  std::int64_t block_bytes;
  bool int8;
};

// Everything after the product: y = f + bias; y = act(y of the gate)·y of the values; y = y + residual. LoRA deltas will be added to f.
struct Epilogue {
  const float* bias;      // (M), or (2·M): gate, then values
  const float* residual;  // (rows, M)
  float* output;          // (rows, M)
  std::int64_t M;
  Gate gate;
};

struct QuantKernels {
  int row_block;  // rows of a block of Prepared
  // Rows [row0, row0 + rows) of one block.
  void (*prepare)(const PackedWeight&, const Prologue&, std::int64_t row0, int rows, const Prepared& out);
  // Units [unit0, unit1) × rows [row0, row0 + rows) of `total` ones; row0 is a multiple of row_block, rows ≤ kChunkRows.
  void (*multiply)(const PackedWeight&, const Prepared&, const Epilogue&, std::int64_t unit0, std::int64_t unit1, std::int64_t row0, int rows);
  // The K values of one output, for QuantEmbedding.
  void (*dequantize)(const PackedWeight&, std::int64_t output, float* values);
};

}  // namespace octavo
