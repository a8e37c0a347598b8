#include "simd/scalar.h"

#include "kernels/table-inl.h"

namespace octavo {
extern const Kernels kernels_scalar;
constinit const Kernels kernels_scalar = scalar::table("scalar");
}  // namespace octavo
