// What a kernel reports, and the one place where it becomes an OrtStatus.
#pragma once
#include <cstdarg>
#include <cstdio>

#include "ort_abi.h"

namespace octavo {

// Holds its text in place: making one never allocates. One sentence, naming the input or attribute at fault.
class [[nodiscard]] Status {
 public:
  static Status ok() { return Status(ort::kOk); }

  [[gnu::format(printf, 1, 2)]] static Status invalid(const char* format, ...) {
    Status status(ort::kInvalidArgument);
    va_list args;
    va_start(args, format);
    std::vsnprintf(status.text_, sizeof status.text_, format, args);
    va_end(args);
    return status;
  }

  [[gnu::format(printf, 1, 2)]] static Status failed(const char* format, ...) {
    Status status(ort::kFail);
    va_list args;
    va_start(args, format);
    std::vsnprintf(status.text_, sizeof status.text_, format, args);
    va_end(args);
    return status;
  }

  // Takes over a status of the runtime's own.
  static Status from_ort(const OrtApi* api, OrtStatus* raw) {
    if (raw == nullptr) return ok();
    Status status = failed("onnxruntime: %s", ort::GetErrorMessage(api, raw));
    ort::ReleaseStatus(api, raw);
    return status;
  }

  bool is_ok() const { return code_ == ort::kOk; }
  const char* text() const { return text_; }

  // `op` names the node's type in front of the sentence. nullptr where all is well, as onnxruntime wants it.
  OrtStatus* to_ort(const OrtApi* api, const char* op) const {
    if (is_ok()) return nullptr;
    char line[sizeof text_ + 64];
    std::snprintf(line, sizeof line, "%s: %s", op, text_);
    return ort::CreateStatus(api, code_, line);
  }

 private:
  explicit Status(int code) : code_(code) { text_[0] = 0; }

  int code_;
  char text_[400];
};

}  // namespace octavo

// Returns from the enclosing function with the first status that is not ok.
#define OCTAVO_TRY(expression)                                                  \
  do {                                                                          \
    if (::octavo::Status octavo_try_ = (expression); !octavo_try_.is_ok()) {    \
      return octavo_try_;                                                       \
    }                                                                           \
  } while (false)
