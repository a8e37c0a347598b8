#include "simd/scalar.h"

#include "kernels/table-inl.h"

namespace octavo {
extern const QuantKernels quant_kernels_scalar;
extern const CacheKernels int8_kernels_scalar;
extern const Kernels kernels_scalar;
constinit const Kernels kernels_scalar = scalar::table("scalar", &quant_kernels_scalar, &int8_kernels_scalar);
}  // namespace octavo
