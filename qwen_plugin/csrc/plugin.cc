// Entry point of the library: ONNX Runtime calls it when the library is registered with a session's options.
#include <initializer_list>

#include "ort_abi.h"
#include "paged_attention.h"
#include "quant_operators.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtFunction* table = base->GetApi(kOrtApiVersion);
  if (table == nullptr) return nullptr;  // older than any version that calls this; it has reported the mismatch
  static const OrtApi api(table);
  // ONNX Runtime keeps a pointer to the domain for as long as any session lives, so it is made once and never freed.
  static OrtCustomOpDomain* domain = nullptr;
  static OrtStatus* const failure = [] {
    OrtStatus* status = api.CreateCustomOpDomain("qwen", &domain);
    for (const OrtCustomOp* op :
         {paged_attention::Operator(api), QuantLinearOperator(api), QuantEmbeddingOperator(api)})
      if (status == nullptr) status = api.CustomOpDomain_Add(domain, op);
    return status;
  }();
  if (failure != nullptr) return api.CreateStatus(kOrtFail, "qwen_plugin: the operators could not be registered");
  return api.AddCustomOpDomain(options, domain);
}
