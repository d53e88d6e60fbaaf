// Entry point of the library: ONNX Runtime calls it when the library is registered with a session's options.
#include <cstdlib>
#include <string>
#include <thread>

#include "attention/paged_attention.h"
#include "experts/operators.h"
#include "linear/quant_operators.h"
#include "operator/operator.h"

namespace {

// qwen_plugin/__init__.py has both values, compile.py passes them.
constexpr char kThreadsEntry[] = THREADS_ENTRY;
constexpr int kMaxThreads = MOST_THREADS;

// The session's config entry, or all processors that this process may use.
int ReadThreads(const OrtApi& api, const OrtSessionOptions* options) {
  size_t size = 0;
  if (OrtStatus* status = api.GetSessionConfigEntry(options, kThreadsEntry, nullptr, &size)) {
    api.ReleaseStatus(status);
    const int processors = int(std::thread::hardware_concurrency());
    return processors > 0 ? processors : 1;
  }
  std::string text(size, '\0');
  operators::Check(api.GetSessionConfigEntry(options, kThreadsEntry, text.data(), &size));
  text.resize(size - 1);  // its size counts the final zero
  const bool is_number = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
  const long count = is_number ? std::strtol(text.c_str(), nullptr, 10) : 0;
  if (count < 1 || count > kMaxThreads)
    throw Error(std::string(kThreadsEntry) + " is '" + text + "', expected 1 to " + std::to_string(kMaxThreads));
  return int(count);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtFunction* table = base->GetApi(kOrtApiVersion);
  if (table == nullptr) return nullptr;  // older than any version that calls this; it has reported the mismatch
  static const OrtApi api(table);
  return operators::Guard(api, "RegisterCustomOps", [&] {
    // ONNX Runtime keeps pointers to all of these for as long as the session lives, and does not say when it ends: they
    // are never freed.
    SessionThreads& threads = *new SessionThreads(ReadThreads(api, options));
    OrtCustomOpDomain* domain;
    operators::Check(api.CreateCustomOpDomain("qwen", &domain));
    for (const OrtCustomOp* op : {paged_attention::NewOperator(api, threads), NewQuantLinear(api, threads),
                                  NewQuantEmbedding(api, threads), NewMoE(api, threads)})
      operators::Check(api.CustomOpDomain_Add(domain, op));
    operators::Check(api.AddCustomOpDomain(options, domain));
  });
}
