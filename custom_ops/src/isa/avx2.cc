#include "simd/avx2.h"

#include "kernels/table-inl.h"

namespace octavo {
extern const Kernels kernels_avx2;
constinit const Kernels kernels_avx2 = avx2::table("avx2");
}  // namespace octavo
