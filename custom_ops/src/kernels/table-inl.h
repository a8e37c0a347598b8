// All kernels of one instruction set. Included once per isa/<name>.cc, after simd/<name>.h.
#pragma once
#include "kernels/attend-inl.h"
#include "kernels/rows-inl.h"
#include "kernels/softmax-inl.h"

namespace octavo::OCTAVO_TARGET {

// constexpr: the table is data in the file, and no code of this instruction set runs before it is chosen.
constexpr Kernels table(const char* name, const QuantKernels* quant) {
  return {name,
          quant,
          {attend_chunk<float>, attend_chunk<Half>},
          merge,
          finish,
          rotate,
          {append_key<float>, append_key<Half>},
          {append_value<float>, append_value<Half>}};
}

}  // namespace octavo::OCTAVO_TARGET
