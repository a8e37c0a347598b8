// A host for the op library where there is no onnxruntime: it fills the slots of the interface that the library calls, and runs one node per case.
//
//     host liboctavo_ops.so CASES        prints the instruction set and the number of cases; exit status 1 where a byte differs
//
// CASES holds one case after the other, in little-endian 64-bit words and bytes padded to 8: name, op, attributes (name, 0 int or 1 float, value),
// inputs and expected outputs (element type or 0 where absent, rank, shape, bytes), and which inputs are compared afterwards, with what (caches).
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace {

using namespace octavo;

struct Value {
  int type = 0;
  std::vector<std::int64_t> shape;
  std::vector<char> bytes;
};
struct Attribute {
  bool real = false;
  std::int64_t integer = 0;
  float number = 0;
  std::string name;
};
struct Case {
  std::string name, op;
  std::vector<Attribute> attributes;
  std::vector<Value> inputs, outputs, expected;
  std::vector<std::pair<std::size_t, std::vector<char>>> updated;
};

class Reader {
 public:
  explicit Reader(const char* path) {
    std::ifstream file(path, std::ios::binary);
    data_.assign(std::istreambuf_iterator<char>(file), {});
  }
  bool done() const { return at_ >= data_.size(); }
  std::int64_t word() {
    std::int64_t w = 0;
    std::memcpy(&w, take(8), 8);
    return w;
  }
  std::vector<char> bytes() {
    const std::size_t n = static_cast<std::size_t>(word());
    const char* p = take((n + 7) / 8 * 8);
    return {p, p + n};
  }
  std::string text() {
    const std::vector<char> b = bytes();
    return {b.begin(), b.end()};
  }
  Value value() {
    Value v;
    v.type = static_cast<int>(word());
    if (v.type == 0) return v;
    v.shape.resize(static_cast<std::size_t>(word()));
    for (std::int64_t& n : v.shape) n = word();
    v.bytes = bytes();
    return v;
  }
  Case next() {
    Case c{text(), text(), {}, {}, {}, {}, {}};
    for (std::int64_t n = word(); n-- > 0;) {
      Attribute a;
      a.name = text();
      a.real = word() == 1;
      a.integer = word();
      std::memcpy(&a.number, &a.integer, 4);
      c.attributes.push_back(a);
    }
    for (std::int64_t n = word(); n-- > 0;) c.inputs.push_back(value());
    for (std::int64_t n = word(); n-- > 0;) c.expected.push_back(value());
    c.outputs.resize(c.expected.size());
    for (std::int64_t n = word(); n-- > 0;) {
      const std::size_t input = static_cast<std::size_t>(word());
      c.updated.emplace_back(input, bytes());
    }
    return c;
  }

 private:
  const char* take(std::size_t n) {
    if (data_.size() - at_ < n) {
      std::fprintf(stderr, "the case file ends early\n");
      std::exit(2);
    }
    at_ += n;
    return data_.data() + at_ - n;
  }
  std::vector<char> data_;
  std::size_t at_ = 0;
};

// A status is its text; kernel info and kernel context are the case.
OrtStatus* failed(const char* text) { return reinterpret_cast<OrtStatus*>(strdup(text)); }
Case& of(const void* p) { return *static_cast<Case*>(const_cast<void*>(p)); }
const Value& value_of(const OrtValue* v) { return *reinterpret_cast<const Value*>(v); }

std::vector<const OrtCustomOp*> ops;
void* slots[512];

template <std::size_t Index, class R, class... Args>
void fill(const ort::Slot<Index, R(Args...)>&, R (*function)(Args...)) {
  slots[Index] = reinterpret_cast<void*>(function);
}

const Attribute* find(const OrtKernelInfo* info, const char* name, bool real) {
  for (const Attribute& a : of(info).attributes) {
    if (a.name == name && a.real == real) return &a;
  }
  return nullptr;
}

std::size_t item_bytes(int type) {
  return type == ort::kInt64 ? 8 : type == ort::kFloat || type == ort::kInt32 ? 4 : type == ort::kFloat16 ? 2 : 1;
}

void fill_slots() {
  fill(ort::CreateStatus, +[](int, const char* text) { return failed(text); });
  fill(ort::GetErrorMessage, +[](const OrtStatus* s) { return reinterpret_cast<const char*>(s); });
  fill(ort::ReleaseStatus, +[](OrtStatus* s) { std::free(s); });
  fill(ort::CreateCustomOpDomain, +[](const char*, OrtCustomOpDomain** out) -> OrtStatus* { *out = nullptr; return nullptr; });
  fill(ort::CustomOpDomain_Add, +[](OrtCustomOpDomain*, const OrtCustomOp* op) -> OrtStatus* { ops.push_back(op); return nullptr; });
  fill(ort::AddCustomOpDomain, +[](OrtSessionOptions*, OrtCustomOpDomain*) -> OrtStatus* { return nullptr; });
  fill(ort::GetTensorMutableData, +[](OrtValue* v, void** out) -> OrtStatus* {
    *out = const_cast<char*>(value_of(v).bytes.data());
    return nullptr;
  });
  fill(ort::AllocatorAlloc, +[](OrtAllocator*, std::size_t n, void** out) -> OrtStatus* { *out = std::malloc(n); return nullptr; });
  fill(ort::AllocatorFree, +[](OrtAllocator*, void* p) -> OrtStatus* { std::free(p); return nullptr; });
  fill(ort::KernelInfoGetAttribute_float, +[](const OrtKernelInfo* info, const char* name, float* out) -> OrtStatus* {
    const Attribute* a = find(info, name, true);
    if (a == nullptr) return failed("absent");
    *out = a->number;
    return nullptr;
  });
  fill(ort::KernelInfoGetAttribute_int64, +[](const OrtKernelInfo* info, const char* name, std::int64_t* out) -> OrtStatus* {
    const Attribute* a = find(info, name, false);
    if (a == nullptr) return failed("absent");
    *out = a->integer;
    return nullptr;
  });
  fill(ort::KernelInfoGetAttribute_string, +[](const OrtKernelInfo*, const char*, char*, std::size_t*) { return failed("absent"); });
  fill(ort::KernelInfoGetAttributeArray_float, +[](const OrtKernelInfo*, const char*, float*, std::size_t*) { return failed("absent"); });
  fill(ort::KernelInfoGetAttributeArray_int64, +[](const OrtKernelInfo*, const char*, std::int64_t*, std::size_t*) { return failed("absent"); });
  fill(ort::KernelContext_GetInputCount, +[](const OrtKernelContext* c, std::size_t* n) -> OrtStatus* { *n = of(c).inputs.size(); return nullptr; });
  fill(ort::KernelContext_GetOutputCount, +[](const OrtKernelContext* c, std::size_t* n) -> OrtStatus* { *n = of(c).outputs.size(); return nullptr; });
  fill(ort::KernelContext_GetInput, +[](const OrtKernelContext* c, std::size_t i, const OrtValue** out) -> OrtStatus* {
    const Value& v = of(c).inputs[i];
    *out = v.type == 0 ? nullptr : reinterpret_cast<const OrtValue*>(&v);
    return nullptr;
  });
  fill(ort::KernelContext_GetOutput, +[](OrtKernelContext* c, std::size_t i, const std::int64_t* shape, std::size_t rank, OrtValue** out) -> OrtStatus* {
    Value& v = of(c).outputs[i];
    v.type = ort::kFloat;
    v.shape.assign(shape, shape + rank);
    std::size_t n = item_bytes(v.type);
    for (const std::int64_t s : v.shape) n *= static_cast<std::size_t>(s);
    v.bytes.assign(n, static_cast<char>(0xcd));
    *out = reinterpret_cast<OrtValue*>(&v);
    return nullptr;
  });
  // The last item first: no order is promised.
  fill(ort::KernelContext_ParallelFor, +[](const OrtKernelContext*, ort::Item body, std::size_t n, std::size_t, void* user) -> OrtStatus* {
    while (n-- > 0) body(user, n);
    return nullptr;
  });
  fill(ort::KernelInfoGetAllocator, +[](const OrtKernelInfo*, int, OrtAllocator** out) -> OrtStatus* { *out = nullptr; return nullptr; });
  fill(ort::ReleaseAllocator, +[](OrtAllocator*) {});
  fill(ort::GetTensorElementTypeAndShapeDataReference,
       +[](const OrtValue* v, int* type, const std::int64_t** shape, std::size_t* rank) -> OrtStatus* {
         *type = value_of(v).type;
         *shape = value_of(v).shape.data();
         *rank = value_of(v).shape.size();
         return nullptr;
       });
}

// The first difference, or nullptr.
const char* run(Case& c) {
  const OrtCustomOp* op = nullptr;
  for (const OrtCustomOp* one : ops) {
    if (c.op == one->GetName(one)) op = one;
  }
  if (op == nullptr) return "no such op";
  void* kernel = nullptr;
  if (OrtStatus* s = op->CreateKernelV2(op, reinterpret_cast<OrtApi*>(slots), reinterpret_cast<OrtKernelInfo*>(&c), &kernel)) {
    return reinterpret_cast<const char*>(s);
  }
  OrtStatus* status = op->KernelComputeV2(kernel, reinterpret_cast<OrtKernelContext*>(&c));
  op->KernelDestroy(kernel);
  if (status != nullptr) return reinterpret_cast<const char*>(status);
  for (std::size_t i = 0; i < c.expected.size(); ++i) {
    if (c.outputs[i].shape != c.expected[i].shape || c.outputs[i].bytes != c.expected[i].bytes) return "an output differs";
  }
  for (const auto& [input, bytes] : c.updated) {
    if (c.inputs[input].bytes != bytes) return "a cache differs";
  }
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  fill_slots();
  void* library = dlopen(argv[1], RTLD_NOW);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  const auto register_ops = reinterpret_cast<OrtStatus* (*)(OrtSessionOptions*, const OrtApiBase*)>(dlsym(library, "RegisterCustomOps"));
  const auto active_isa = reinterpret_cast<const char* (*)()>(dlsym(library, "octavo_active_isa"));
  const OrtApiBase base{[](std::uint32_t) -> const OrtApi* { return reinterpret_cast<OrtApi*>(slots); }, [] { return "1.24.0"; }};
  if (OrtStatus* s = register_ops(nullptr, &base)) {
    std::fprintf(stderr, "%s\n", reinterpret_cast<const char*>(s));
    return 2;
  }
  int cases = 0, wrong = 0;
  for (Reader reader(argv[2]); !reader.done(); ++cases) {
    Case c = reader.next();
    if (const char* difference = run(c)) {
      std::printf("%s: %s\n", c.name.c_str(), difference);
      ++wrong;
    }
  }
  std::printf("%s: %d cases, %d differ\n", active_isa(), cases, wrong);
  return wrong != 0;
}
