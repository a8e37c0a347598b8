#include "simd/int8_scalar.h"

#include "kernels/int8_attend-inl.h"
#include "kernels/int8_rows-inl.h"

namespace octavo {
extern const CacheKernels int8_kernels_scalar;
constinit const CacheKernels int8_kernels_scalar = {int8_scalar::attend_chunk, int8_scalar::prepare_query, int8_scalar::append_key,
                                             int8_scalar::append_value};
}  // namespace octavo
