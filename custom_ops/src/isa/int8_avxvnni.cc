#include "simd/int8_avx2.h"

#include "kernels/int8_attend-inl.h"
#include "kernels/int8_rows-inl.h"

namespace octavo {
extern const CacheKernels int8_kernels_avxvnni;
constinit const CacheKernels int8_kernels_avxvnni = {int8_avxvnni::attend_chunk, int8_avxvnni::prepare_query, int8_avxvnni::append_key,
                                             int8_avxvnni::append_value};
}  // namespace octavo
