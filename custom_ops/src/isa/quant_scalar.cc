#include "simd/quant_scalar.h"

#include "kernels/quant_multiply-inl.h"

namespace octavo {
extern const QuantKernels quant_kernels_scalar;
constinit const QuantKernels quant_kernels_scalar = quant_scalar::quant_table();
}  // namespace octavo
