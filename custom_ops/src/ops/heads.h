// The attributes that both attention ops share, checked.
#pragma once
#include <cmath>

#include "op.h"

namespace octavo {

struct Heads {
  std::int64_t H = 0, G = 0, window = -1;
  float scale = 0.0f, softcap = 0.0f;

  Status init(const Attributes& attributes) {
    OCTAVO_TRY(attributes.require("num_heads", &H));
    OCTAVO_TRY(attributes.require("kv_num_heads", &G));
    OCTAVO_TRY(attributes.get("scale", &scale));
    OCTAVO_TRY(attributes.get("softcap", &softcap));
    OCTAVO_TRY(attributes.get("local_window_size", &window));
    if (H < 1 || H > 65536) return Status::invalid("attribute 'num_heads' is %lld, must be 1 to 65536", static_cast<long long>(H));
    if (G < 1 || H % G != 0) return Status::invalid("attribute 'kv_num_heads' is %lld, must divide num_heads", static_cast<long long>(G));
    if (!std::isfinite(scale)) return Status::invalid("attribute 'scale' must be finite");
    if (!std::isfinite(softcap) || softcap < 0) return Status::invalid("attribute 'softcap' must be finite and not negative");
    if (window != -1 && window < 1) {
      return Status::invalid("attribute 'local_window_size' is %lld, must be -1 or at least 1", static_cast<long long>(window));
    }
    return Status::ok();
  }

  float scale_for(std::int64_t D) const { return scale != 0.0f ? scale : 1.0f / std::sqrt(static_cast<float>(D)); }
};

// Splits the width of a tensor into heads of at most kMaxHead.
inline Status head_size(const Tensor& tensor, int axis, std::int64_t heads, std::int64_t* out) {
  if (tensor.rank <= axis) return Status::invalid("input '%s' has rank %d, expected at least %d", tensor.name, tensor.rank, axis + 1);
  const std::int64_t width = tensor.shape[axis];
  *out = width / heads;
  if (width < 1 || width % heads != 0 || *out > kMaxHead) {
    return Status::invalid("input '%s' is %lld wide, not %lld heads of 1 to %d", tensor.name, static_cast<long long>(width),
                           static_cast<long long>(heads), kMaxHead);
  }
  return Status::ok();
}

}  // namespace octavo
