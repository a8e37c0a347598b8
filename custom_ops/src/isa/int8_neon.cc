#include "simd/int8_neon.h"

#include "kernels/int8_attend-inl.h"
#include "kernels/int8_rows-inl.h"

namespace octavo {
extern const CacheKernels int8_kernels_neon;
constinit const CacheKernels int8_kernels_neon = {int8_neon::attend_chunk, int8_neon::prepare_query, int8_neon::append_key,
                                             int8_neon::append_value};
}  // namespace octavo
