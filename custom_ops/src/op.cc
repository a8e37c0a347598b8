#include "op.h"

#include <cstdio>
#include <cstring>

namespace octavo {
namespace {

const OpDefinition* self(const OrtCustomOp* op) { return static_cast<const OpDefinition*>(op); }

void write_shape(const std::int64_t* shape, int rank, char* text, std::size_t size) {
  std::size_t used = static_cast<std::size_t>(std::snprintf(text, size, "("));
  for (int i = 0; i < rank && used < size; ++i) {
    const int wrote = std::snprintf(text + used, size - used, shape[i] < 0 ? "%sany" : "%s%lld", i ? ", " : "", static_cast<long long>(shape[i]));
    used += static_cast<std::size_t>(wrote);
  }
  if (used < size) std::snprintf(text + used, size - used, ")");
}

}  // namespace

Status expect_shape(const Tensor& tensor, int rank, const std::int64_t* shape, const char* meaning) {
  bool fits = tensor.rank == rank;
  for (int i = 0; fits && i < rank; ++i) fits = shape[i] < 0 || tensor.shape[i] == shape[i];
  if (fits) return Status::ok();
  char has[96], wants[96];
  write_shape(tensor.shape, tensor.rank, has, sizeof has);
  write_shape(shape, rank, wants, sizeof wants);
  return Status::invalid("input '%s' has shape %s, expected %s = %s", tensor.name, has, meaning, wants);
}

Status expect_type(const Tensor& tensor, ort::ElementType type, const char* type_name) {
  if (tensor.type == type) return Status::ok();
  return Status::invalid("input '%s' has element type %d, expected %s", tensor.name, tensor.type, type_name);
}

// Whether the lookup succeeded; frees the status where it did not.
bool Attributes::take(OrtStatus* status) const {
  if (status == nullptr) return true;
  ort::ReleaseStatus(api_, status);
  return false;
}

// A failed lookup does not tell absence from another type, and a default must never stand in for a value that was given.
bool Attributes::given_with_another_type(const char* name, bool expects_float) const {
  float real = 0;
  std::int64_t integer = 0;
  std::size_t size = 0;
  if (expects_float ? take(ort::KernelInfoGetAttribute_int64(api_, info_, name, &integer))
                    : take(ort::KernelInfoGetAttribute_float(api_, info_, name, &real))) {
    return true;
  }
  return take(ort::KernelInfoGetAttribute_string(api_, info_, name, nullptr, &size)) ||
         take(ort::KernelInfoGetAttributeArray_float(api_, info_, name, nullptr, &(size = 0))) ||
         take(ort::KernelInfoGetAttributeArray_int64(api_, info_, name, nullptr, &(size = 0)));
}

Status Attributes::get(const char* name, std::int64_t* out) const {
  std::int64_t value = 0;
  if (take(ort::KernelInfoGetAttribute_int64(api_, info_, name, &value))) {
    *out = value;
  } else if (given_with_another_type(name, false)) {
    return Status::invalid("attribute '%s' must be an integer", name);
  }
  return Status::ok();
}

Status Attributes::get(const char* name, float* out) const {
  float value = 0;
  if (take(ort::KernelInfoGetAttribute_float(api_, info_, name, &value))) {
    *out = value;
  } else if (given_with_another_type(name, true)) {
    return Status::invalid("attribute '%s' must be a float", name);
  }
  return Status::ok();
}

Status Attributes::require(const char* name, std::int64_t* out) const {
  *out = INT64_MIN;
  OCTAVO_TRY(get(name, out));
  return *out == INT64_MIN ? Status::invalid("attribute '%s' must be given", name) : Status::ok();
}

Status Call::input(std::size_t index, Tensor* out) const {
  const PortDefinition& port = op->inputs[index];
  *out = Tensor{};
  out->name = port.name;
  std::size_t count = 0;
  OCTAVO_TRY(Status::from_ort(api, ort::KernelContext_GetInputCount(api, context, &count)));
  const OrtValue* value = nullptr;
  if (index < count) OCTAVO_TRY(Status::from_ort(api, ort::KernelContext_GetInput(api, context, index, &value)));
  if (value == nullptr) {
    return port.optional ? Status::ok() : Status::invalid("input '%s' is missing", port.name);
  }
  std::size_t rank = 0;
  OCTAVO_TRY(Status::from_ort(api, ort::GetTensorElementTypeAndShapeDataReference(api, value, &out->type, &out->shape, &rank)));
  out->rank = static_cast<int>(rank);
  // Caches are graph inputs that the kernel updates in place; every other input is only read.
  return Status::from_ort(api, ort::GetTensorMutableData(api, const_cast<OrtValue*>(value), &out->data));
}

Status Call::output(std::size_t index, const std::int64_t* shape, std::size_t rank, float** out) const {
  bool wanted = false;
  OCTAVO_TRY(optional_output(index, shape, rank, out, &wanted));
  return wanted ? Status::ok() : Status::invalid("output '%s' is missing", op->outputs[index].name);
}

Status Call::optional_output(std::size_t index, const std::int64_t* shape, std::size_t rank, float** out, bool* wanted) const {
  *wanted = false;
  std::size_t count = 0;
  OCTAVO_TRY(Status::from_ort(api, ort::KernelContext_GetOutputCount(api, context, &count)));
  if (index >= count) return Status::ok();
  OrtValue* value = nullptr;
  void* data = nullptr;
  OCTAVO_TRY(Status::from_ort(api, ort::KernelContext_GetOutput(api, context, index, shape, rank, &value)));
  if (value == nullptr) return Status::ok();
  OCTAVO_TRY(Status::from_ort(api, ort::GetTensorMutableData(api, value, &data)));
  *wanted = true;
  *out = static_cast<float*>(data);  // may be null where the shape is empty
  return Status::ok();
}

OpDefinition base_definition(const char* name, const PortDefinition* inputs, std::size_t input_count, const PortDefinition* outputs,
                             std::size_t output_count) {
  OpDefinition op{};
  op.version = ort::kCustomOpVersion;
  op.GetName = [](const OrtCustomOp* raw) { return self(raw)->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const OrtCustomOp* raw, std::size_t i) -> int { return self(raw)->inputs[i].type; };
  op.GetInputTypeCount = [](const OrtCustomOp* raw) { return self(raw)->input_count; };
  op.GetOutputType = [](const OrtCustomOp* raw, std::size_t i) -> int { return self(raw)->outputs[i].type; };
  op.GetOutputTypeCount = [](const OrtCustomOp* raw) { return self(raw)->output_count; };
  op.GetInputCharacteristic = [](const OrtCustomOp* raw, std::size_t i) -> int {
    return self(raw)->inputs[i].optional ? ort::kOptional : ort::kRequired;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp* raw, std::size_t i) -> int {
    return self(raw)->outputs[i].optional ? ort::kOptional : ort::kRequired;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, std::size_t) -> int { return ort::kDefault; };
  op.name = name;
  op.inputs = inputs;
  op.input_count = input_count;
  op.outputs = outputs;
  op.output_count = output_count;
  return op;
}

}  // namespace octavo
