#include "simd/int8_avx512.h"

#include "kernels/int8_attend-inl.h"
#include "kernels/int8_rows-inl.h"

namespace octavo {
extern const CacheKernels int8_kernels_avx512bw;
constinit const CacheKernels int8_kernels_avx512bw = {int8_avx512bw::attend_chunk, int8_avx512bw::prepare_query, int8_avx512bw::append_key,
                                             int8_avx512bw::append_value};
}  // namespace octavo
