#include "simd/avx512.h"

#include "kernels/table-inl.h"

namespace octavo {
extern const QuantKernels quant_kernels_avx512bw, quant_kernels_avx512vnni;
extern const CacheKernels int8_kernels_avx512bw, int8_kernels_avx512vnni;
extern const Kernels kernels_avx512bw, kernels_avx512vnni;
constinit const Kernels kernels_avx512bw = avx512::table("avx512bw", &quant_kernels_avx512bw, &int8_kernels_avx512bw);
constinit const Kernels kernels_avx512vnni = avx512::table("avx512vnni", &quant_kernels_avx512vnni, &int8_kernels_avx512vnni);
}  // namespace octavo
