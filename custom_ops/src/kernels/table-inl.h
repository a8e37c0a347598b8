// All kernels of one instruction set. Included once per isa/<name>.cc, after simd/<name>.h.
#pragma once
#include "kernels/attend-inl.h"
#include "kernels/rows-inl.h"
#include "kernels/sample-inl.h"
#include "kernels/softmax-inl.h"

namespace octavo::OCTAVO_TARGET {

// constexpr: the table is data in the file, and no code of this instruction set runs before it is chosen.
inline constexpr CacheKernels float_cache = {attend_chunk<float>, nullptr, append_key<float>, append_value<float>};
inline constexpr CacheKernels half_cache = {attend_chunk<Half>, nullptr, append_key<Half>, append_value<Half>};

constexpr Kernels table(const char* name, const QuantKernels* quant, const CacheKernels* int8_cache) {
  return {name, quant, &sample_kernels, {&float_cache, &half_cache, int8_cache}, merge, finish, rotate, normalize};
}

}  // namespace octavo::OCTAVO_TARGET
