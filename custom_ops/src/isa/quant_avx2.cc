#include "simd/quant_avx2.h"

#include "kernels/quant_multiply-inl.h"

namespace octavo {
extern const QuantKernels quant_kernels_avx2;
constinit const QuantKernels quant_kernels_avx2 = quant_avx2::quant_table();
}  // namespace octavo
