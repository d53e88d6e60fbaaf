// What operators share: attributes, inputs, work in parallel, and errors on their way to the C ABI.
#pragma once
#include <atomic>
#include <initializer_list>
#include <new>
#include <string>

#include "operator/error.h"
#include "operator/ort_abi.h"
#include "operator/threads.h"

namespace operators {

// A failed call into ONNX Runtime.
struct StatusError {
  OrtStatus* status;
};

inline void Check(OrtStatus* status) {
  if (status != nullptr) throw StatusError{status};
}

// Runs `body`, which may throw; no exception passes the C ABI.
template <class Body>
OrtStatus* Guard(const OrtApi& api, const char* name, const Body& body) {
  const auto status = [&](int code, const char* what) {
    return api.CreateStatus(code, ("qwen::" + std::string(name) + ": " + what).c_str());
  };
  try {
    body();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const Error& error) {
    return status(kOrtInvalidArgument, error.what());
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(kOrtFail, "qwen: out of memory");  // a text of ours might need some
  } catch (const std::exception& error) {
    return status(kOrtFail, error.what());
  } catch (...) {
    return status(kOrtFail, "unknown failure");
  }
}

// "(a, b)"
template <class Container>
std::string ShapeText(const Container& dims) {
  std::string text;
  for (const int64_t dim : dims) text += (text.empty() ? "" : ", ") + std::to_string(dim);
  return "(" + text + ")";
}

// Releases what ONNX Runtime allocated.
struct ShapeInfo {
  const OrtApi& api;
  OrtTensorTypeAndShapeInfo* info;
  ~ShapeInfo() { api.ReleaseTensorTypeAndShapeInfo(info); }
};

// ---- Attributes

class Attributes {
 public:
  Attributes(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  // The attribute, in [least, most]; `absent` stands for one that is not there, and must be none of those if it is
  // required.
  int64_t Int(const char* name, int64_t absent, int64_t least, int64_t most) const {
    int64_t value = absent;
    if (!Ok(api_.KernelInfoGetAttribute_int64(info_, name, &value))) RefuseOtherType(name, "an integer");
    if (value < least || value > most)
      Refuse(name, std::to_string(value), std::to_string(least) + " to " + std::to_string(most));
    return value;
  }
  float Float(const char* name, float absent) const {
    float value = absent;
    if (!Ok(api_.KernelInfoGetAttribute_float(info_, name, &value))) RefuseOtherType(name, "a float");
    return value;
  }
  // Empty if absent.
  std::string String(const char* name) const {
    size_t size = 0;
    if (!Ok(api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size))) {
      RefuseOtherType(name, "a string");
      return "";
    }
    std::string value(size, '\0');
    Check(api_.KernelInfoGetAttribute_string(info_, name, value.data(), &size));
    value.resize(size - 1);  // its size counts the final zero
    return value;
  }
  // Whether it is there, of any of the types above.
  bool Has(const char* name) const {
    int64_t integer;
    float number;
    size_t size = 0;
    return Ok(api_.KernelInfoGetAttribute_int64(info_, name, &integer)) ||
           Ok(api_.KernelInfoGetAttribute_float(info_, name, &number)) ||
           Ok(api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size));
  }
  [[noreturn]] static void Refuse(const char* name, const std::string& value, const std::string& expected) {
    throw Error("attribute " + std::string(name) + " is " + value + ", expected " + expected);
  }

 private:
  bool Ok(OrtStatus* status) const {
    if (status != nullptr) api_.ReleaseStatus(status);
    return status == nullptr;
  }
  // ONNX Runtime fails alike for an attribute that is absent and one of another type.
  void RefuseOtherType(const char* name, const char* expected) const {
    if (Has(name)) Refuse(name, "of another type", expected);
  }

  const OrtApi& api_;
  const OrtKernelInfo* info_;
};

// ---- Inputs

struct ElementType {
  int code;
  const char* name;
};
constexpr ElementType kFloat32 = {kOrtFloat32, "float32"}, kUint8 = {kOrtUint8, "uint8"}, kInt32 = {kOrtInt32, "int32"},
                      kInt64 = {kOrtInt64, "int64"};

// An input of a call; `given` is false for an optional one that is missing.
struct Tensor {
  static constexpr size_t kMaxRank = 8;
  const char* name;
  bool given = false;
  int type = 0;
  size_t rank = 0;
  int64_t dims[kMaxRank];
  void* data = nullptr;

  Tensor(const OrtApi& api, const OrtKernelContext* context, size_t index, const char* its_name) : name(its_name) {
    size_t count;
    Check(api.KernelContext_GetInputCount(context, &count));
    const OrtValue* value = nullptr;
    if (index < count) Check(api.KernelContext_GetInput(context, index, &value));
    if (value == nullptr) return;
    given = true;
    OrtTensorTypeAndShapeInfo* info;
    Check(api.GetTensorTypeAndShape(value, &info));
    const ShapeInfo release = {api, info};
    Check(api.GetTensorElementType(info, &type));
    Check(api.GetDimensionsCount(info, &rank));
    if (rank > kMaxRank) throw Error(std::string(name) + " has " + std::to_string(rank) + " dimensions");
    Check(api.GetDimensions(info, dims, rank));
    Check(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  }

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  struct Dims {
    const int64_t *first, *last;
    const int64_t* begin() const { return first; }
    const int64_t* end() const { return last; }
  };
  Dims shape() const { return {dims, dims + rank}; }

  void Require() const {
    if (!given) throw Error(std::string(name) + " is missing");
  }
  // Checks type and shape; one that is not given passes. `meaning` explains the expected shape.
  void Expect(const ElementType& element, std::initializer_list<int64_t> expected, const char* meaning) const {
    if (!given) return;
    ExpectType(element);
    bool same = rank == expected.size();
    for (size_t i = 0; same && i < rank; ++i) same = dims[i] == expected.begin()[i];
    if (!same) RefuseShape(ShapeText(expected) + " = " + meaning);
  }
  void ExpectType(const ElementType& element) const {
    if (type != element.code)
      throw Error(std::string(name) + " has element type " + std::to_string(type) + " of ONNX, expected " +
                  element.name);
  }
  [[noreturn]] void RefuseShape(const std::string& expected) const {
    throw Error(std::string(name) + " has shape " + ShapeText(shape()) + ", expected " + expected);
  }
};

// The data of output `index` with that shape; null if the node does not ask for it.
template <class T>
T* NewOutput(const OrtApi& api, OrtKernelContext* context, size_t index, std::initializer_list<int64_t> shape) {
  size_t count;
  Check(api.KernelContext_GetOutputCount(context, &count));
  OrtValue* value = nullptr;
  if (index < count) Check(api.KernelContext_GetOutput(context, index, shape.begin(), shape.size(), &value));
  void* data = nullptr;
  if (value != nullptr) Check(api.GetTensorMutableData(value, &data));
  return static_cast<T*>(data);
}

// ---- Work

// Calls function(first, last), on all threads, for ranges that make up [0, count); see Threads::For. It may throw
// std::bad_alloc alone, which comes out here after all calls.
template <class Function>
void ForRanges(Threads& threads, int64_t count, int64_t least, int64_t most, const Function& function,
               const std::shared_ptr<Order>& order = nullptr, const Weight& weight = {},
               const std::vector<Ahead>* ahead = nullptr) {
  struct Work {
    const Function& function;
    std::atomic<bool> lacks_memory;
  } work = {function, {false}};
  const auto call = [](void* data, int64_t first, int64_t last) {
    Work& shared = *static_cast<Work*>(data);
    try {
      shared.function(first, last);
    } catch (const std::bad_alloc&) {
      shared.lacks_memory = true;
    }
  };
  threads.For(count, least, most, call, &work, order, weight, ahead);
  if (work.lacks_memory) throw std::bad_alloc();
}

// Calls function(i) for i in [0, count), on all threads, as above.
template <class Function>
void ForEach(Threads& threads, int64_t count, const Function& function) {
  ForRanges(threads, count, 1, 1, [&](int64_t i, int64_t) { function(i); });
}

// ---- Declaration

// What every operator declares beside its kName, kVersion, kInputs, kOutputs and InferShape. Inputs may be of any type
// and missing, so that Compute says what is wrong, by the input's name.
template <class Operator, class Kernel>
struct Declaration : OrtCustomOp {
  OrtApi api;
  SessionThreads& threads;

  Declaration(const OrtApi& ort, SessionThreads& of_session) : OrtCustomOp{}, api(ort), threads(of_session) {
    version = kOrtApiVersion;
    GetName = [](const OrtCustomOp*) { return Operator::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputType = [](const OrtCustomOp*, size_t) { return int(kOrtAnyType); };
    GetInputTypeCount = [](const OrtCustomOp*) { return Operator::kInputs; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return int(kOrtOptional); };
    GetOutputType = [](const OrtCustomOp*, size_t) { return int(kOrtFloat32); };
    GetOutputTypeCount = [](const OrtCustomOp*) { return Operator::kOutputs; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) { return int(i == 0 ? kOrtRequired : kOrtOptional); };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };  // the default
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return Operator::kVersion; };
    CreateKernelV2 = [](const OrtCustomOp* self, const OrtFunction* table, const OrtKernelInfo* info, void** out) {
      const OrtApi ort(table);
      const Declaration& declaration = *static_cast<const Declaration*>(self);
      return Guard(declaration.api, Operator::kName,
                   [&] { *out = new Kernel(ort, Attributes(ort, info), declaration.threads.Get()); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const Kernel& self = *static_cast<Kernel*>(kernel);
      return Guard(self.api, Operator::kName, [&] { self.Compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    InferOutputShapeFn = [](const OrtCustomOp* self, OrtShapeInferContext* context) {
      const OrtApi& ort = static_cast<const Declaration*>(self)->api;
      return Guard(ort, Operator::kName, [&] { Operator::InferShape(ort, context); });
    };
  }
};

// Gives output 0 the shape (rows of input 0, attribute `width`), where both are known; half of that where the attribute
// `halves` is 1.
inline void InferRows(const OrtApi& api, OrtShapeInferContext* context, const char* width,
                      const char* halves = nullptr) {
  OrtTensorTypeAndShapeInfo *input, *output;
  Check(api.ShapeInferContext_GetInputTypeShape(context, 0, &input));
  size_t rank;
  Check(api.GetDimensionsCount(input, &rank));
  if (rank < 1 || rank > 2) return;  // unknown, or Compute will say what is wrong
  int64_t dims[2];
  const char* names[2];
  Check(api.GetDimensions(input, dims, rank));
  Check(api.GetSymbolicDimensions(input, names, rank));
  const auto read = [&](const char* name, int64_t absent) {
    const OrtOpAttr* attribute;
    if (OrtStatus* status = api.ShapeInferContext_GetAttribute(context, name, &attribute)) {
      api.ReleaseStatus(status);
      return absent;
    }
    size_t size;
    int64_t value;
    Check(api.ReadOpAttr(attribute, kOrtInteger, &value, sizeof value, &size));
    return value;
  };
  dims[1] = read(width, 0) / (halves != nullptr && read(halves, 0) == 1 ? 2 : 1);
  if ((dims[0] < 0 && *names[0] == '\0') || dims[1] < 1) return;
  names[1] = "";
  Check(api.CreateTensorTypeAndShapeInfo(&output));
  const ShapeInfo release = {api, output};
  Check(api.SetTensorElementType(output, kOrtFloat32));
  Check(api.SetDimensions(output, dims, 2));
  Check(api.SetSymbolicDimensions(output, names, 2));
  Check(api.ShapeInferContext_SetOutputTypeShape(context, 0, output));
}

}  // namespace operators
