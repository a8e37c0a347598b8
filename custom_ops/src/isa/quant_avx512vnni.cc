#include "simd/quant_avx512.h"

#include "kernels/quant_multiply-inl.h"

namespace octavo {
extern const QuantKernels quant_kernels_avx512vnni;
constinit const QuantKernels quant_kernels_avx512vnni = quant_avx512vnni::quant_table();
}  // namespace octavo
