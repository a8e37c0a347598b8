// The part of onnxruntime's C interface that a custom-op library needs, declared here because the wheel ships no headers.
//
// The interface is append-only: a released slot never moves, so a table obtained from any runtime of at least kMinimumMinor fits these indices.
// `OrtCustomOp::version` is 18: every field below exists then, and no runtime that we run on refuses it.
#pragma once
#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtAllocator;
struct OrtShapeInferContext;
struct OrtApi;  // an array of function pointers, read through Slot

struct OrtApiBase {
  const OrtApi* (*GetApi)(std::uint32_t version);
  const char* (*GetVersionString)();
};

struct OrtCustomOp {
  std::uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, std::size_t);
  std::size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, std::size_t);
  std::size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, std::size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, std::size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, std::size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  std::size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  std::size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};
static_assert(sizeof(void*) != 8 || sizeof(OrtCustomOp) == 208);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, GetName) == 16);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, GetInputType) == 32);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, KernelDestroy) == 72);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, GetInputCharacteristic) == 80);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, GetInputMemoryType) == 96);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, GetVariadicInputMinArity) == 104);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, CreateKernelV2) == 136);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, InferOutputShapeFn) == 152);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, GetMayInplace) == 176);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, ReleaseAliasMap) == 200);

namespace octavo::ort {

inline constexpr std::uint32_t kCustomOpVersion = 18;
inline constexpr std::uint32_t kMinimumMinor = 24;  // onnxruntime 1.24: the first whose table holds every slot below

enum ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt32 = 6, kInt64 = 7, kBool = 9, kFloat16 = 10 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum ErrorCode : int { kOk = 0, kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum MemoryType : int { kDefault = 0 };

// One function of the table: `CreateStatus(api, code, text)` calls slot 0.
template <std::size_t Index, class Signature>
struct Slot;
template <std::size_t Index, class R, class... Args>
struct Slot<Index, R(Args...)> {
  R operator()(const OrtApi* api, Args... args) const {
    return reinterpret_cast<R (*const*)(Args...)>(api)[Index](args...);
  }
};

using Item = void (*)(void* user, std::size_t index);

inline constexpr Slot<0, OrtStatus*(int, const char*)> CreateStatus;
inline constexpr Slot<2, const char*(const OrtStatus*)> GetErrorMessage;
inline constexpr Slot<26, OrtStatus*(const char*, OrtCustomOpDomain**)> CreateCustomOpDomain;
inline constexpr Slot<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)> CustomOpDomain_Add;
inline constexpr Slot<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> AddCustomOpDomain;
inline constexpr Slot<51, OrtStatus*(OrtValue*, void**)> GetTensorMutableData;
inline constexpr Slot<75, OrtStatus*(OrtAllocator*, std::size_t, void**)> AllocatorAlloc;
inline constexpr Slot<76, OrtStatus*(OrtAllocator*, void*)> AllocatorFree;
inline constexpr Slot<85, OrtStatus*(const OrtKernelInfo*, const char*, float*)> KernelInfoGetAttribute_float;
inline constexpr Slot<86, OrtStatus*(const OrtKernelInfo*, const char*, std::int64_t*)> KernelInfoGetAttribute_int64;
inline constexpr Slot<87, OrtStatus*(const OrtKernelInfo*, const char*, char*, std::size_t*)> KernelInfoGetAttribute_string;
inline constexpr Slot<88, OrtStatus*(const OrtKernelContext*, std::size_t*)> KernelContext_GetInputCount;
inline constexpr Slot<89, OrtStatus*(const OrtKernelContext*, std::size_t*)> KernelContext_GetOutputCount;
inline constexpr Slot<90, OrtStatus*(const OrtKernelContext*, std::size_t, const OrtValue**)> KernelContext_GetInput;
inline constexpr Slot<91, OrtStatus*(OrtKernelContext*, std::size_t, const std::int64_t*, std::size_t, OrtValue**)> KernelContext_GetOutput;
inline constexpr Slot<93, void(OrtStatus*)> ReleaseStatus;
inline constexpr Slot<132, void(OrtAllocator*)> ReleaseAllocator;
inline constexpr Slot<162, OrtStatus*(const OrtKernelInfo*, const char*, float*, std::size_t*)> KernelInfoGetAttributeArray_float;
inline constexpr Slot<163, OrtStatus*(const OrtKernelInfo*, const char*, std::int64_t*, std::size_t*)> KernelInfoGetAttributeArray_int64;
inline constexpr Slot<274, OrtStatus*(const OrtKernelContext*, Item, std::size_t, std::size_t, void*)> KernelContext_ParallelFor;
inline constexpr Slot<278, OrtStatus*(const OrtKernelInfo*, int, OrtAllocator**)> KernelInfoGetAllocator;
inline constexpr Slot<414, OrtStatus*(const OrtValue*, int*, const std::int64_t**, std::size_t*)> GetTensorElementTypeAndShapeDataReference;

}  // namespace octavo::ort
