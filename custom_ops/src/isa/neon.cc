#include "simd/neon.h"

#include "kernels/table-inl.h"

namespace octavo {
extern const QuantKernels quant_kernels_neon;
extern const CacheKernels int8_kernels_neon;
extern const Kernels kernels_neon;
constinit const Kernels kernels_neon = neon::table("neon", &quant_kernels_neon, &int8_kernels_neon);
}  // namespace octavo
