#include "simd/avx2.h"

#include "kernels/table-inl.h"

namespace octavo {
extern const QuantKernels quant_kernels_avx2, quant_kernels_avxvnni;
extern const CacheKernels int8_kernels_avx2, int8_kernels_avxvnni;
extern const Kernels kernels_avx2, kernels_avxvnni;
constinit const Kernels kernels_avx2 = avx2::table("avx2", &quant_kernels_avx2, &int8_kernels_avx2);
constinit const Kernels kernels_avxvnni = avx2::table("avxvnni", &quant_kernels_avxvnni, &int8_kernels_avxvnni);
}  // namespace octavo
