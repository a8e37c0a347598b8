#include "simd/int8_avx512.h"

#include "kernels/int8_attend-inl.h"
#include "kernels/int8_rows-inl.h"

namespace octavo {
extern const CacheKernels int8_kernels_avx512vnni;
constinit const CacheKernels int8_kernels_avx512vnni = {int8_avx512vnni::attend_chunk, int8_avx512vnni::prepare_query, int8_avx512vnni::append_key,
                                             int8_avx512vnni::append_value};
}  // namespace octavo
