// From onnxruntime's calls to ours: ports and attributes as tables, tensors as checked values. Every op is one OpDefinition and one kernel class.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

#include "isa/dispatch.h"
#include "parallel.h"
#include "scratch.h"
#include "status.h"

namespace octavo {

// The port's element type, kUndefined where it takes several: the kernel then checks.
struct PortDefinition {
  const char* name;
  ort::ElementType type;
  bool optional;
};

// An input as it came. Absent optional inputs have data == nullptr and rank −1.
struct Tensor {
  const char* name = "";
  int type = ort::kUndefined;
  int rank = -1;
  const std::int64_t* shape = nullptr;
  void* data = nullptr;

  bool present() const { return rank >= 0; }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// INVALID_ARGUMENT unless `tensor` has exactly this shape; −1 takes any size. `meaning` is the shape in dimension letters.
Status expect_shape(const Tensor& tensor, int rank, const std::int64_t* shape, const char* meaning);
template <int Rank>
Status expect_shape(const Tensor& tensor, const std::int64_t (&shape)[Rank], const char* meaning) {
  return expect_shape(tensor, Rank, shape, meaning);
}
Status expect_type(const Tensor& tensor, ort::ElementType type, const char* type_name);

class Attributes {
 public:
  Attributes(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}
  // Leave *out, the default, where the attribute is absent. An attribute of another type is a status.
  Status get(const char* name, std::int64_t* out) const;
  Status get(const char* name, float* out) const;
  Status require(const char* name, std::int64_t* out) const;

 private:
  bool given_with_another_type(const char* name, bool expects_float) const;
  bool take(OrtStatus* status) const;

  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

struct OpDefinition;

// One run of a kernel.
struct Call {
  const OrtApi* api;
  OrtKernelContext* context;
  const OpDefinition* op;
  const Kernels* kernels;
  Parallel parallel;
  Scratch scratch;

  Status input(std::size_t index, Tensor* out) const;
  template <int Rank>
  Status output(std::size_t index, const std::int64_t (&shape)[Rank], float** out) const {
    return output(index, shape, Rank, out);
  }
  Status output(std::size_t index, const std::int64_t* shape, std::size_t rank, float** out) const;
  // Leaves *out where the node does not ask for this output, and says so.
  Status optional_output(std::size_t index, const std::int64_t* shape, std::size_t rank, float** out, bool* wanted) const;
};

struct OpDefinition : OrtCustomOp {
  const char* name;
  const PortDefinition* inputs;
  std::size_t input_count;
  const PortDefinition* outputs;
  std::size_t output_count;
};

// The callbacks that do not depend on the kernel.
OpDefinition base_definition(const char* name, const PortDefinition* inputs, std::size_t input_count, const PortDefinition* outputs,
                             std::size_t output_count);

// A kernel of one node: read-only after init, because runs may overlap.
template <class Kernel>
struct Node {
  const OrtApi* api = nullptr;
  const OpDefinition* op = nullptr;
  const Kernels* kernels = nullptr;
  OrtAllocator* allocator = nullptr;
  Kernel kernel;

  static OrtStatus* create(const OrtCustomOp* raw, const OrtApi* api, const OrtKernelInfo* info, void** out) {
    const OpDefinition* op = static_cast<const OpDefinition*>(raw);
    Node* node = new (std::nothrow) Node;
    if (node == nullptr) return Status::failed("out of memory").to_ort(api, op->name);
    node->api = api;
    node->op = op;
    const Status status = node->init(info);
    if (!status.is_ok()) {
      destroy(node);
      return status.to_ort(api, op->name);
    }
    *out = node;
    return nullptr;
  }

  Status init(const OrtKernelInfo* info) {
    OCTAVO_TRY(active_kernels(&kernels));
    OCTAVO_TRY(Status::from_ort(api, ort::KernelInfoGetAllocator(api, info, ort::kDefault, &allocator)));
    return kernel.init(Attributes(api, info));
  }

  static OrtStatus* compute(void* raw, OrtKernelContext* context) {
    const Node* node = static_cast<const Node*>(raw);
    Call call{node->api, context, node->op, node->kernels, Parallel(node->api, context), Scratch(node->api, node->allocator)};
    return node->kernel.compute(call).to_ort(node->api, node->op->name);
  }

  static void destroy(void* raw) {
    Node* node = static_cast<Node*>(raw);
    if (node == nullptr) return;
    if (node->allocator != nullptr) ort::ReleaseAllocator(node->api, node->allocator);
    delete node;
  }
};

template <class Kernel, std::size_t Inputs, std::size_t Outputs>
OpDefinition define(const char* name, const PortDefinition (&inputs)[Inputs], const PortDefinition (&outputs)[Outputs]) {
  OpDefinition op = base_definition(name, inputs, Inputs, outputs, Outputs);
  op.CreateKernelV2 = Node<Kernel>::create;
  op.KernelComputeV2 = Node<Kernel>::compute;
  op.KernelDestroy = Node<Kernel>::destroy;
  return op;
}

}  // namespace octavo
