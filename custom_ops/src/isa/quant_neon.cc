#include "simd/quant_neon.h"

#include "kernels/quant_multiply-inl.h"

namespace octavo {
extern const QuantKernels quant_kernels_neon;
constinit const QuantKernels quant_kernels_neon = quant_neon::quant_table();
}  // namespace octavo
