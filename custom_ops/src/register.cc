// The entry point that onnxruntime looks up, and the table of ops.
#include <cstdio>

#include "isa/dispatch.h"
#include "ops/ops.h"
#include "status.h"

namespace octavo {
namespace {

constexpr const char* kDomain = "ai.octavo";

struct Domain {
  OrtCustomOpDomain* domain;
  Status status;
};

Domain make_domain(const OrtApi* api) {
  const OpDefinition* const ops[] = {paged_attention(), flash_attention(), quant_linear(), quant_embedding()};
  OrtCustomOpDomain* domain = nullptr;
  Status status = Status::from_ort(api, ort::CreateCustomOpDomain(api, kDomain, &domain));
  for (const OpDefinition* op : ops) {
    if (status.is_ok()) status = Status::from_ort(api, ort::CustomOpDomain_Add(api, domain, op));
  }
  return {domain, status};
}

Status register_ops(OrtSessionOptions* options, const OrtApi* api) {
  const Kernels* kernels = nullptr;
  OCTAVO_TRY(active_kernels(&kernels));
  // Made once and never released: sessions keep pointers into it, and nothing tells when the last one is gone.
  static const Domain made = make_domain(api);
  OCTAVO_TRY(made.status);
  return Status::from_ort(api, ort::AddCustomOpDomain(api, options, made.domain));
}

}  // namespace
}  // namespace octavo

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace octavo;
  unsigned major = 0, minor = 0;
  const bool known = std::sscanf(base->GetVersionString(), "%u.%u", &major, &minor) == 2 && major == 1;
  if (!known || minor < ort::kMinimumMinor) {
    const OrtApi* oldest = base->GetApi(1);
    return Status::failed("needs onnxruntime 1.%u or a later 1.x, this is %s", ort::kMinimumMinor, base->GetVersionString()).to_ort(oldest, kDomain);
  }
  const OrtApi* api = base->GetApi(ort::kMinimumMinor);
  return register_ops(options, api).to_ort(api, kDomain);
}
