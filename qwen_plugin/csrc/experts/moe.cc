// qwen::MoE version 1: a mixture of experts. Each token goes to its top_k of num_experts; what they compute is added up
// by their weights.
#include <algorithm>
#include <cstring>

#include "experts/expert_products.h"
#include "experts/experts.h"
#include "experts/moe_problem.h"
#include "experts/operators.h"
#include "operator/instruction_set.h"
#include "operator/scratch.h"

namespace experts {
namespace {

using quant_linear::KernelChoice;
using quant_linear::kSerialWork;

constexpr int64_t kTokensAtOnce = 16;                 // whose scores a thread computes: they stay in a cache
constexpr int64_t kProductBytes = int64_t(16) << 20;  // of the rows that are added up at a time

const Kernels& ChooseExpertKernels() {
#if defined(__x86_64__)
  const InstructionSet set = ChooseInstructionSet();
  if (set == InstructionSet::kAvx512) return kAvx512Kernels;
  if (set == InstructionSet::kAvx2) return kAvx2Kernels;
#elif defined(__aarch64__)
  if (ChooseInstructionSet() == InstructionSet::kNeon) return kNeonKernels;
#endif
  return kPlainKernels;
}

KernelChoice ChooseKernels(const quant_linear::Problem& settings, const Kernels& kernels) {
  if (settings.bits == 32) return {&kernels.float_rows, &kernels.float_rows};
  return quant_linear::ChooseKernels(settings);
}

// Memory of the calling thread, by what it is for.
template <class T>
T* CallScratch(int purpose, int64_t count) {
  thread_local Scratch scratch[8];
  return static_cast<T*>(scratch[purpose].Get(count * int64_t(sizeof(T))));
}
enum Purpose { kOfInput, kOfScores, kOfExperts, kOfWeights, kOfQuantized, kOfActivations, kOfGated, kOfProducts };

// Calls function(first, last) for ranges of tokens, each of which takes `work` multiply-adds: on all threads if that is
// worth it. `order` and `weight` as in Threads::For.
template <class Function>
void ForTokens(Threads& threads, int64_t tokens, int64_t work, const Function& function,
               const std::shared_ptr<Order>& order = nullptr, const Weight& weight = {}) {
  if (tokens * work < kSerialWork) return function(0, tokens);
  const int64_t least = std::min<int64_t>(4, tokens), most = std::min(kTokensAtOnce, CeilDiv(kSerialWork, work));
  operators::ForRanges(threads, tokens, least, std::max(least, most), function, order, weight);
}

// The router's weight is known before and the weight that follows the operator after it; what experts read in between,
// the operator announces itself. So `down` stands for no weight.
struct Orders {
  std::shared_ptr<Order> router = std::make_shared<Order>(), down = std::make_shared<Order>();
};

class Run {
 public:
  Run(Threads& threads, const Orders& orders, const Kernels& kernels, const KernelChoice& gate_up,
      const KernelChoice& down, const Problem& p)
      : threads_(threads), orders_(orders), kernels_(kernels), gate_up_(gate_up), down_(down), p_(p) {}

  void Compute() {
    SetInput();
    Route();
    const Sorted sorted = SortByExpert(p_.experts, p_.tokens, p_.top_k, p_.num_experts);
    float* const gated = CallScratch<float>(kOfGated, Slots() * p_.intermediate_size);
    const int64_t row_bytes = kPanel * int64_t(sizeof(float));
    const int64_t panels = std::min(p_.down.panels, std::max<int64_t>(1, kProductBytes / (Slots() * row_bytes)));
    float* const y = CallScratch<float>(kOfProducts, Slots() * panels * kPanel);
    Products gate_up(p_.gate_up, gate_up_, sorted.groups, input_, sorted.tokens.data(), gated, p_.tokens == 1);
    Products down(p_.down, down_, sorted.groups, gated, nullptr, y, false);
    ComputeGated(gate_up, down);
    if (p_.gated != nullptr) CopyGated(sorted, gated);
    ComputeDown(sorted, down, panels, y);
  }

 private:
  int64_t Slots() const { return p_.tokens * p_.top_k; }

  // What router and experts read.
  void SetInput() {
    const int64_t H = p_.hidden_size;
    if (p_.norm_weight == nullptr) {
      if (p_.input != nullptr) std::memcpy(p_.input, p_.x, size_t(p_.tokens * H) * sizeof(float));
      input_ = p_.x;
      return;
    }
    float* const out = p_.input != nullptr ? p_.input : CallScratch<float>(kOfInput, p_.tokens * H);
    ForTokens(threads_, p_.tokens, H, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        kernels_.normalize(p_.x + t * H, p_.norm_weight, p_.epsilon, H, out + t * H);
    });
    input_ = out;
  }

  // The experts of every token and their weights.
  void Route() {
    const int64_t H = p_.hidden_size, E = p_.num_experts;
    if (p_.experts == nullptr) p_.experts = CallScratch<int32_t>(kOfExperts, Slots());
    if (p_.weights == nullptr) p_.weights = CallScratch<float>(kOfWeights, Slots());
    float* const scores = CallScratch<float>(kOfScores, p_.tokens * E);
    const auto choose = [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        kernels_.softmax(scores + t * E, E);
        TakeLargest(scores + t * E, E, p_.top_k, p_.norm_topk_prob, p_.experts + t * p_.top_k,
                    p_.weights + t * p_.top_k);
      }
    };
    const Weight weight = {reinterpret_cast<const uint8_t*>(p_.router), E, H * int64_t(sizeof(float))};
    if (p_.tokens > kTokensAtOnce) {
      const auto route = [&](int64_t first, int64_t last) {
        kernels_.multiply(input_ + first * H, last - first, p_.router, E, H, scores + first * E, E);
        choose(first, last);
      };
      return ForTokens(threads_, p_.tokens, H * E, route, orders_.router, weight);
    }
    // Few tokens: the threads share the router's rows.
    const int64_t least = CeilDiv(kSerialWork, p_.tokens * H), most = std::max(least, CeilDiv(E, 8));
    const auto multiply = [&](int64_t first, int64_t last) {
      kernels_.multiply(input_, p_.tokens, p_.router + first * H, last - first, H, scores + first, E);
    };
    operators::ForRanges(threads_, E, least, most, multiply, orders_.router, weight);
    ForTokens(threads_, p_.tokens, 8 * E, choose);
  }

  void ComputeGated(Products& products, const Products& next) {
    threads_.Announce(products.FirstWeights(threads_.count()));
    // Tokens are quantised once for all of their experts, if they are at all. One alone is the same row to all.
    quant_linear::Problem all = p_.gate_up;
    if (p_.tokens > 1 && all.precision != quant_linear::Precision::kFloat32) {
      all.x = input_, all.rows = p_.tokens;
      char* const quantized = CallScratch<char>(kOfQuantized, all.rows * QuantizedBytes(all));
      ForTokens(threads_, all.rows, p_.hidden_size,
                [&](int64_t first, int64_t last) { gate_up_.few->quantize(all, {first, last}, quantized); });
      products.TakeQuantized(quantized);
    }
    products.Prepare(threads_, CallScratch<char>(kOfActivations, products.activation_bytes));
    const std::vector<Ahead> ahead = next.FirstWeights(threads_.count());
    products.Multiply(threads_, nullptr, &ahead);
  }

  void CopyGated(const Sorted& sorted, const float* gated) {
    const int64_t I = p_.intermediate_size;
    for (int64_t i = 0; i < Slots(); ++i)
      std::memcpy(p_.gated + i * I, gated + sorted.places[size_t(i)] * I, size_t(I) * sizeof(float));
  }

  // In ranges of so many panels, whose products stay in a cache until they are added up.
  void ComputeDown(const Sorted& sorted, Products& products, int64_t panels, float* y) {
    products.Prepare(threads_, CallScratch<char>(kOfActivations, products.activation_bytes));
    for (int64_t first = 0; first < p_.down.panels; first += panels) {
      const int64_t last = std::min(p_.down.panels, first + panels);
      products.TakePanels(p_.down, sorted.groups, first, last, y);
      products.Multiply(threads_, last == p_.down.panels ? orders_.down : nullptr);
      AddUp(sorted, y, first * kPanel, (last - first) * kPanel);
    }
  }

  // y of columns [first, first + count), from the sorted products of those.
  void AddUp(const Sorted& sorted, const float* products, int64_t first, int64_t count) {
    const int64_t H = p_.hidden_size, k = p_.top_k;
    ForTokens(threads_, p_.tokens, k * count, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t at = t * H + first;
        Combination c = {};
        c.products = products, c.places = sorted.places.data() + t * k, c.weights = p_.weights + t * k;
        c.top_k = k, c.stride = c.columns = count;
        c.shared = p_.shared == nullptr ? nullptr : p_.shared + at;
        c.residual = p_.residual == nullptr ? nullptr : p_.residual + at;
        c.shared_weight = 1;
        c.y = p_.y + at;
        if (p_.shared_gate != nullptr) {
          kernels_.multiply(input_ + t * H, 1, p_.shared_gate, 1, H, &c.shared_weight, 1);
          c.shared_weight = kernels_.sigmoid(c.shared_weight);
        }
        kernels_.combine(c);
      }
    });
  }

  Threads& threads_;
  const Orders& orders_;
  const Kernels& kernels_;
  const KernelChoice &gate_up_, &down_;
  Problem p_;
  const float* input_ = nullptr;  // (tokens, hidden_size)
};

struct Kernel {
  OrtApi api;
  Settings settings;
  const Kernels& kernels;
  const KernelChoice gate_up, down;
  const std::shared_ptr<Threads> threads;
  const Orders orders;

  Kernel(const OrtApi& ort, const operators::Attributes& attributes, std::shared_ptr<Threads> of_session)
      : api(ort),
        settings(ReadSettings(attributes)),
        kernels(ChooseExpertKernels()),
        gate_up(ChooseKernels(settings.gate_up, kernels)),
        down(ChooseKernels(settings.down, kernels)),
        threads(std::move(of_session)) {}

  void Compute(OrtKernelContext* context) const {
    Problem p = {};
    static_cast<Settings&>(p) = settings;
    SetInputs(api, context, p);
    const int64_t T = p.tokens, k = p.top_k;
    p.y = operators::NewOutput<float>(api, context, kY, {T, p.hidden_size});
    p.input = operators::NewOutput<float>(api, context, kProductInput, {T, p.hidden_size});
    p.experts = operators::NewOutput<int32_t>(api, context, kExperts, {T, k});
    p.weights = operators::NewOutput<float>(api, context, kWeights, {T, k});
    p.gated = operators::NewOutput<float>(api, context, kGated, {T, k, p.intermediate_size});
    if (T > 0) Run(*threads, orders, kernels, gate_up, down, p).Compute();
  }
};

struct MoE {
  static constexpr const char* kName = "MoE";
  static constexpr int kVersion = 1;
  static constexpr size_t kInputs = kInputCount, kOutputs = kOutputCount;
  static void InferShape(const OrtApi& api, OrtShapeInferContext* context) {
    operators::InferRows(api, context, "hidden_size");
  }
};

}  // namespace
}  // namespace experts

const OrtCustomOp* NewMoE(const OrtApi& api, SessionThreads& threads) {
  auto* const op = new operators::Declaration<experts::MoE, experts::Kernel>(api, threads);
  op->GetOutputType = [](const OrtCustomOp*, size_t i) {
    return int(i == experts::kExperts ? kOrtInt32 : kOrtFloat32);
  };
  return op;
}
