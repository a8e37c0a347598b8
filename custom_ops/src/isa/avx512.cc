#include "simd/avx512.h"

#include "kernels/table-inl.h"

namespace octavo {
extern const Kernels kernels_avx512;
constinit const Kernels kernels_avx512 = avx512::table("avx512");
}  // namespace octavo
