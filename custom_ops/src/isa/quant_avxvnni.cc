#include "simd/quant_avx2.h"

#include "kernels/quant_multiply-inl.h"

namespace octavo {
extern const QuantKernels quant_kernels_avxvnni;
constinit const QuantKernels quant_kernels_avxvnni = quant_avxvnni::quant_table();
}  // namespace octavo
