#include "simd/int8_avx2.h"

#include "kernels/int8_attend-inl.h"
#include "kernels/int8_rows-inl.h"

namespace octavo {
extern const CacheKernels int8_kernels_avx2;
constinit const CacheKernels int8_kernels_avx2 = {int8_avx2::attend_chunk, int8_avx2::prepare_query, int8_avx2::append_key,
                                             int8_avx2::append_value};
}  // namespace octavo
