// The part of ONNX Runtime's C ABI that a library of custom operators needs.
//
// The ABI is append-only: OrtApi is a table of function pointers whose places never change, and
// OrtCustomOp is a struct that only grows. No wheel ships the headers, so the places stand here.
#pragma once
#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

using OrtFunction = void (*)();

struct OrtApiBase {
  const OrtFunction* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum OrtErrorCode { kOrtFail = 1, kOrtInvalidArgument = 2 };
enum OrtElementType {
  kOrtAnyType = 0,
  kOrtFloat32 = 1,
  kOrtUint8 = 2,
  kOrtInt8 = 3,
  kOrtInt32 = 6,
  kOrtInt64 = 7,
  kOrtFloat16 = 10
};
enum OrtAttributeType { kOrtInteger = 1 };
enum OrtArity { kOrtRequired = 0, kOrtOptional = 1 };

constexpr uint32_t kOrtApiVersion = 18;  // the first that has every function and field used here (1.18)

// Version 18 of the struct that describes an operator. Fields left null are optional.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtFunction*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtFunction*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

// Typed access to the table. A function that can fail returns null or a status that its receiver releases.
class OrtApi {
 public:
  explicit OrtApi(const OrtFunction* table) : table_(table) {}

#define ORT_FUNCTION(index, result, name, parameters, arguments) \
  result name parameters const { return reinterpret_cast<result(*) parameters>(table_[index]) arguments; }

  ORT_FUNCTION(0, OrtStatus*, CreateStatus, (int code, const char* message), (code, message))
  ORT_FUNCTION(26, OrtStatus*, CreateCustomOpDomain, (const char* domain, OrtCustomOpDomain** out), (domain, out))
  ORT_FUNCTION(27, OrtStatus*, CustomOpDomain_Add, (OrtCustomOpDomain * domain, const OrtCustomOp* op), (domain, op))
  ORT_FUNCTION(28, OrtStatus*, AddCustomOpDomain, (OrtSessionOptions * options, OrtCustomOpDomain* domain),
               (options, domain))
  ORT_FUNCTION(51, OrtStatus*, GetTensorMutableData, (OrtValue * value, void** out), (value, out))
  ORT_FUNCTION(57, OrtStatus*, CreateTensorTypeAndShapeInfo, (OrtTensorTypeAndShapeInfo * *out), (out))
  ORT_FUNCTION(58, OrtStatus*, SetTensorElementType, (OrtTensorTypeAndShapeInfo * info, int type), (info, type))
  ORT_FUNCTION(59, OrtStatus*, SetDimensions, (OrtTensorTypeAndShapeInfo * info, const int64_t* dims, size_t count),
               (info, dims, count))
  ORT_FUNCTION(60, OrtStatus*, GetTensorElementType, (const OrtTensorTypeAndShapeInfo* info, int* out), (info, out))
  ORT_FUNCTION(61, OrtStatus*, GetDimensionsCount, (const OrtTensorTypeAndShapeInfo* info, size_t* out), (info, out))
  ORT_FUNCTION(62, OrtStatus*, GetDimensions, (const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t count),
               (info, dims, count))
  ORT_FUNCTION(63, OrtStatus*, GetSymbolicDimensions,
               (const OrtTensorTypeAndShapeInfo* info, const char** names, size_t count), (info, names, count))
  ORT_FUNCTION(65, OrtStatus*, GetTensorTypeAndShape, (const OrtValue* value, OrtTensorTypeAndShapeInfo** out),
               (value, out))
  ORT_FUNCTION(85, OrtStatus*, KernelInfoGetAttribute_float, (const OrtKernelInfo* info, const char* name, float* out),
               (info, name, out))
  ORT_FUNCTION(86, OrtStatus*, KernelInfoGetAttribute_int64,
               (const OrtKernelInfo* info, const char* name, int64_t* out), (info, name, out))
  ORT_FUNCTION(87, OrtStatus*, KernelInfoGetAttribute_string,
               (const OrtKernelInfo* info, const char* name, char* out, size_t* size), (info, name, out, size))
  ORT_FUNCTION(88, OrtStatus*, KernelContext_GetInputCount, (const OrtKernelContext* context, size_t* out),
               (context, out))
  ORT_FUNCTION(89, OrtStatus*, KernelContext_GetOutputCount, (const OrtKernelContext* context, size_t* out),
               (context, out))
  ORT_FUNCTION(90, OrtStatus*, KernelContext_GetInput,
               (const OrtKernelContext* context, size_t index, const OrtValue** out), (context, index, out))
  ORT_FUNCTION(91, OrtStatus*, KernelContext_GetOutput,
               (OrtKernelContext * context, size_t index, const int64_t* dims, size_t count, OrtValue** out),
               (context, index, dims, count, out))
  ORT_FUNCTION(93, void, ReleaseStatus, (OrtStatus * status), (status))
  ORT_FUNCTION(99, void, ReleaseTensorTypeAndShapeInfo, (OrtTensorTypeAndShapeInfo * info), (info))
  ORT_FUNCTION(238, OrtStatus*, GetSessionConfigEntry,
               (const OrtSessionOptions* options, const char* key, char* out, size_t* size), (options, key, out, size))
  ORT_FUNCTION(268, OrtStatus*, ShapeInferContext_GetInputTypeShape,
               (const OrtShapeInferContext* context, size_t index, OrtTensorTypeAndShapeInfo** out),
               (context, index, out))
  ORT_FUNCTION(269, OrtStatus*, ShapeInferContext_GetAttribute,
               (const OrtShapeInferContext* context, const char* name, const OrtOpAttr** out), (context, name, out))
  ORT_FUNCTION(270, OrtStatus*, ShapeInferContext_SetOutputTypeShape,
               (const OrtShapeInferContext* context, size_t index, const OrtTensorTypeAndShapeInfo* info),
               (context, index, info))
  ORT_FUNCTION(271, OrtStatus*, SetSymbolicDimensions,
               (OrtTensorTypeAndShapeInfo * info, const char** names, size_t count), (info, names, count))
  ORT_FUNCTION(272, OrtStatus*, ReadOpAttr,
               (const OrtOpAttr* attribute, int type, void* data, size_t size, size_t* out),
               (attribute, type, data, size, out))
#undef ORT_FUNCTION

 private:
  const OrtFunction* table_;
};
