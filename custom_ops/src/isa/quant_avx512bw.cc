#include "simd/quant_avx512.h"

#include "kernels/quant_multiply-inl.h"

namespace octavo {
extern const QuantKernels quant_kernels_avx512bw;
constinit const QuantKernels quant_kernels_avx512bw = quant_avx512bw::quant_table();
}  // namespace octavo
