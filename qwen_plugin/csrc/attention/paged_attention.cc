// qwen::PagedAttention version 1: checks every input, divides the work, calls the kernels.
//
// Inputs stand at the positions of ONNX Runtime's own com.microsoft::PagedAttention; what that operator takes and
// this one lacks is refused, never ignored. The pools of keys and values are written in place.
#include "attention/paged_attention.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "operator/instruction_set.h"
#include "operator/operator.h"
#include "operator/scratch.h"

namespace paged_attention {
namespace {

using operators::Attributes, operators::Check, operators::Tensor;

enum Input {
  kQuery,
  kKey,
  kValue,
  kKeyCache,
  kValueCache,
  kCumulativeLengths,
  kPastLengths,
  kBlockTable,
  kCosCache,
  kSinCache,
  kSlotMapping,
  kHeadSink,
  kQNormWeight,
  kKNormWeight,
  kKeyScale,
  kValueScale,
  kAttentionMetadata,
  kInputCount
};

constexpr const char* kInputNames[kInputCount] = {
    "query",         "key",           "value",     "key_cache",   "value_cache",       "cumulative_lengths",
    "past_lengths",  "block_table",   "cos_cache", "sin_cache",   "slot_mapping",      "head_sink",
    "q_norm_weight", "k_norm_weight", "key_scale", "value_scale", "attention_metadata"};

constexpr Input kMustBeAbsent[] = {kKey, kValue, kSlotMapping, kHeadSink, kAttentionMetadata};

// Below this many multiply-adds a parallel region costs more than it brings, and so it does for merging fewer floats.
constexpr int64_t kSerialWork = 100'000, kSerialMerge = 20'000;
constexpr int64_t kTokensPerWrite = 16;
constexpr size_t kWantedItems = 32;  // for ONNX Runtime's threads, whose number it doesn't tell
// Floats that the states of divided items may take, 64 MiB.
constexpr int64_t kMaxStateFloats = int64_t(16) << 20;

[[noreturn]] void Fail(const std::string& message) { throw Error(message); }

struct Settings {
  int64_t heads, kv_heads, window;
  float scale, epsilon;  // scale 0: 1 / sqrt(head_dim)
  bool rotary;
};

Settings ReadSettings(const Attributes& attributes) {
  const auto text = [](auto value) { return std::to_string(value); };
  Settings s;
  s.heads = attributes.Int("num_heads", 0, 1, 1 << 16);
  s.kv_heads = attributes.Int("kv_num_heads", 0, 1, s.heads);
  if (s.heads % s.kv_heads != 0) attributes.Refuse("kv_num_heads", text(s.kv_heads), "a divisor of num_heads");
  s.scale = attributes.Float("scale", 0.f);
  if (!std::isfinite(s.scale) || s.scale < 0) attributes.Refuse("scale", text(s.scale), "a positive number");
  s.epsilon = attributes.Float("qk_norm_epsilon", 1e-6f);
  if (!std::isfinite(s.epsilon) || s.epsilon < 0) attributes.Refuse("qk_norm_epsilon", text(s.epsilon), "0 or more");
  s.window = attributes.Int("local_window_size", -1, -1, INT64_MAX);
  if (s.window == 0) attributes.Refuse("local_window_size", "0", "-1 (none) or at least 1");
  if (s.window == -1) s.window = INT64_MAX;
  s.rotary = attributes.Int("do_rotary", 0, 0, 1) == 1;
  // What the stock operator offers and this one does not.
  const auto only = [&](const char* name, int64_t value) {
    const int64_t found = attributes.Int(name, value, INT64_MIN, INT64_MAX);
    if (found != value) attributes.Refuse(name, text(found), text(value));
  };
  only("rotary_interleaved", 0);
  only("rotary_offset", 0);
  only("v_head_size", 0);
  only("is_causal", 1);
  const float softcap = attributes.Float("softcap", 0.f);
  if (softcap != 0) attributes.Refuse("softcap", text(softcap), "0");
  return s;
}

// ---- Inputs

std::vector<Tensor> ReadInputs(const OrtApi& api, const OrtKernelContext* context) {
  std::vector<Tensor> inputs;
  inputs.reserve(kInputCount);
  for (size_t i = 0; i < kInputCount; ++i) inputs.emplace_back(api, context, i, kInputNames[i]);
  return inputs;
}

std::string Element(const Tensor& tensor, int64_t index, int64_t value) {
  return std::string(tensor.name) + "[" + std::to_string(index) + "] is " + std::to_string(value);
}

// Types and shapes. Leaves the output null.
Problem CheckShapes(const Settings& settings, const std::vector<Tensor>& in) {
  using operators::kFloat32, operators::kInt32;
  for (const Input i : kMustBeAbsent)
    if (in[i].given) Fail(std::string(in[i].name) + " is given, expected to be absent: not supported");
  for (const Input i : {kQuery, kKeyCache, kValueCache, kCumulativeLengths, kPastLengths, kBlockTable}) in[i].Require();
  for (const Input i : {kCosCache, kSinCache})
    if (settings.rotary && !in[i].given) Fail(std::string(in[i].name) + " is missing, do_rotary needs it");
  if (in[kQNormWeight].given != in[kKNormWeight].given)
    Fail("q_norm_weight and k_norm_weight: one is missing, expected both or none");
  const int element = in[kKeyCache].type;
  for (const Input i : {kKeyScale, kValueScale}) {
    if (element == kOrtInt8 && !in[i].given) Fail(std::string(in[i].name) + " is missing, an int8 cache needs it");
    if (element != kOrtInt8 && in[i].given)
      Fail(std::string(in[i].name) + " is given, expected to be absent: the cache is not int8");
  }
  in[kQuery].ExpectType(kFloat32);
  if (element != kOrtFloat16 && element != kOrtInt8)
    in[kKeyCache].ExpectType({kOrtFloat32, "float32, float16 or int8"});
  in[kValueCache].ExpectType({element, "that of key_cache"});

  Problem p = {};
  p.heads = settings.heads, p.kv_heads = settings.kv_heads, p.group = settings.heads / settings.kv_heads;
  const int64_t* keys = in[kKeyCache].dims;
  if (in[kKeyCache].rank != 5 || keys[1] != p.kv_heads || keys[4] != kTile)
    in[kKeyCache].RefuseShape("(num_blocks, kv_num_heads = " + std::to_string(p.kv_heads) +
                              ", block_size / 32, head_dim, 32)");
  p.head_dim = keys[3];
  p.block_size = keys[2] * kTile;
  if (p.head_dim < 8 || p.head_dim > kMaxHeadDim || p.head_dim % 8 != 0)
    in[kKeyCache].RefuseShape("a head_dim that is a multiple of 8, at most 256");
  if (keys[2] < 1 || keys[2] > (1 << 20) || (keys[2] & (keys[2] - 1)) != 0)
    in[kKeyCache].RefuseShape("a block_size that is a power of two, at least 32");
  in[kValueCache].Expect({element, "that of key_cache"}, {keys[0], p.kv_heads, p.block_size, p.head_dim},
                         "(num_blocks, kv_num_heads, block_size, head_dim) as key_cache has them");
  for (const Input i : {kKeyScale, kValueScale})
    in[i].Expect(kFloat32, {keys[0], p.kv_heads, p.block_size},
                 "(num_blocks, kv_num_heads, block_size) as key_cache has them");

  const int64_t width = (p.heads + 2 * p.kv_heads) * p.head_dim;
  if (in[kQuery].rank != 2 || in[kQuery].dims[1] != width)
    in[kQuery].RefuseShape("(T, " + std::to_string(width) + ") = (T, (num_heads + 2 * kv_num_heads) * head_dim)");
  in[kPastLengths].ExpectType(kInt32);
  if (in[kPastLengths].rank != 1) in[kPastLengths].RefuseShape("(S)");
  const int64_t sequences = in[kPastLengths].dims[0];
  in[kCumulativeLengths].Expect(kInt32, {sequences + 1}, "(S + 1), where past_lengths is (S)");
  in[kBlockTable].ExpectType(kInt32);
  if (in[kBlockTable].rank != 2 || in[kBlockTable].dims[0] != sequences)
    in[kBlockTable].RefuseShape("(" + std::to_string(sequences) + ", max_blocks), where past_lengths is (S)");
  p.max_blocks = in[kBlockTable].dims[1];

  for (const Input i : {kCosCache, kSinCache})
    if (in[i].given) in[i].ExpectType(kFloat32);
  if (settings.rotary) {
    const int64_t* cos = in[kCosCache].dims;
    if (in[kCosCache].rank != 2 || cos[1] < 1 || 2 * cos[1] > p.head_dim)
      in[kCosCache].RefuseShape(
          "(positions, rotary_dim / 2), at most head_dim / 2 = " + std::to_string(p.head_dim / 2) + " wide");
    in[kSinCache].Expect(kFloat32, {cos[0], cos[1]}, "that of cos_cache");
    p.rotary_half = cos[1];
    p.cos = in[kCosCache].as<float>(), p.sin = in[kSinCache].as<float>();
  }
  for (const Input i : {kQNormWeight, kKNormWeight}) in[i].Expect(kFloat32, {p.head_dim}, "(head_dim)");
  p.q_norm = in[kQNormWeight].as<float>(), p.k_norm = in[kKNormWeight].as<float>();

  p.window = settings.window;
  p.scale = settings.scale > 0 ? settings.scale : 1.f / std::sqrt(float(p.head_dim));
  p.epsilon = settings.epsilon;
  p.element = element == kOrtInt8 ? Element::kInt8 : element == kOrtFloat16 ? Element::kFloat16 : Element::kFloat32;
  p.query = in[kQuery].as<float>();
  p.key_cache = in[kKeyCache].data, p.value_cache = in[kValueCache].data;
  p.key_scale = static_cast<float*>(in[kKeyScale].data), p.value_scale = static_cast<float*>(in[kValueScale].data);
  p.cumulative = in[kCumulativeLengths].as<int32_t>(), p.past = in[kPastLengths].as<int32_t>();
  p.block_table = in[kBlockTable].as<int32_t>();
  return p;
}

// Lengths and block ids. Blocks that no new token writes or sees are not looked at.
void CheckValues(const Problem& p, const std::vector<Tensor>& in) {
  const Tensor &cumulative = in[kCumulativeLengths], &table = in[kBlockTable];
  const int64_t tokens = in[kQuery].dims[0], sequences = in[kPastLengths].dims[0], blocks = in[kKeyCache].dims[0];
  if (p.cumulative[0] != 0) Fail(Element(cumulative, 0, p.cumulative[0]) + ", expected 0");
  for (int64_t s = 0; s < sequences; ++s) {
    if (p.cumulative[s + 1] < p.cumulative[s])
      Fail(Element(cumulative, s + 1, p.cumulative[s + 1]) + ", expected at least the " +
           std::to_string(p.cumulative[s]) + " before it");
    if (p.past[s] < 0) Fail(Element(in[kPastLengths], s, p.past[s]) + ", expected 0 or more");
  }
  if (p.cumulative[sequences] != tokens)
    Fail(Element(cumulative, sequences, p.cumulative[sequences]) + ", expected the " + std::to_string(tokens) +
         " tokens of query");

  std::vector<int32_t> written;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t added = p.cumulative[s + 1] - p.cumulative[s], length = p.past[s] + added;
    if (added == 0) continue;
    if (p.rotary_half > 0 && length > in[kCosCache].dims[0])
      Fail("cos_cache has " + std::to_string(in[kCosCache].dims[0]) + " positions, sequence " + std::to_string(s) +
           " needs " + std::to_string(length) + " (past_lengths + new tokens)");
    if (length > p.max_blocks * p.block_size)
      Fail("block_table has room for " + std::to_string(p.max_blocks * p.block_size) + " tokens a sequence, sequence " +
           std::to_string(s) + " needs " + std::to_string(length) + " (past_lengths + new tokens)");
    const int64_t first_read = FirstKey(p, p.past[s]) / p.block_size, first_written = p.past[s] / p.block_size;
    for (int64_t b = first_read; b <= (length - 1) / p.block_size; ++b) {
      const int32_t block = p.block_table[s * p.max_blocks + b];
      if (block < 0 || block >= blocks)
        Fail(std::string(table.name) + "[" + std::to_string(s) + ", " + std::to_string(b) + "] is " +
             std::to_string(block) + ", expected 0 to " + std::to_string(blocks - 1) + ", a block of key_cache");
      if (b >= first_written) written.push_back(block);
    }
  }
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  if (twice != written.end())
    Fail("block_table has two places for new tokens in block " + std::to_string(*twice) + ", expected one");
}

// ---- Work

template <class Function>
void ForEach(Threads& threads, bool serial, size_t count, const Function& function) {
  for (size_t i = 0; serial && i < count; ++i) function(i);
  if (!serial) operators::ForEach(threads, int64_t(count), [&](int64_t i) { function(size_t(i)); });
}

// Cuts the rows of every sequence and kv head into items of at most `item_rows`, of each sequence the longest first.
std::vector<Item> CutItems(const Problem& p, int64_t sequences, int64_t item_rows) {
  std::vector<Item> items;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t rows = (p.cumulative[s + 1] - p.cumulative[s]) * p.group;
    for (int64_t last = rows; last > 0; last -= std::min(last, item_rows))
      for (int64_t head = 0; head < p.kv_heads; ++head)
        items.push_back({s, head, std::max<int64_t>(0, last - item_rows), last});
  }
  return items;
}

void WriteTokens(Threads& threads, const Kernels& kernels, const Problem& p, int64_t sequences) {
  std::vector<TokenRange> ranges;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t added = p.cumulative[s + 1] - p.cumulative[s];
    for (int64_t first = 0; first < added; first += kTokensPerWrite)
      ranges.push_back({s, first, std::min(added, first + kTokensPerWrite)});
  }
  const bool serial = p.cumulative[sequences] * (p.heads + 2 * p.kv_heads) * p.head_dim * 2 < kSerialWork;
  ForEach(threads, serial, ranges.size(), [&](size_t i) { kernels.write_tokens[int(p.element)](p, ranges[i]); });
}

// How the work is divided changes which thread does it and never a bit of the result.
void Attend(Threads& threads, const Kernels& kernels, const Problem& p, int64_t sequences) {
  const auto attend = kernels.attend[int(p.element)];
  // Large items read the cache less often; there should be enough of them for every thread.
  int64_t item_rows = std::min<int64_t>(kMaxItemRows, kMaxItemFloats / p.head_dim);
  std::vector<Item> items = CutItems(p, sequences, item_rows);
  while (items.size() < kWantedItems && item_rows > 16) {
    item_rows /= 2;
    items = CutItems(p, sequences, item_rows);
  }
  int64_t work = 0, largest = 0, state_floats = 0;
  for (const Item& item : items) {
    const int64_t rows = item.last - item.first, count = Partitions(p, item).last - Partitions(p, item).first;
    const int64_t keys = std::min(count * kPartition, p.past[item.sequence] + item.last / p.group + 1);
    work += rows * p.head_dim * 2 * keys;
    largest = std::max(largest, rows * p.head_dim * 2 * keys);
    state_floats += count * StateFloats(p, rows);
  }
  const bool serial = work < kSerialWork;
  // Too few items for the threads, or one so large that the others would wait for it.
  const bool uneven = items.size() < kWantedItems || largest * int64_t(kWantedItems) > 4 * work;
  if (serial || !uneven || state_floats > kMaxStateFloats) {
    ForEach(threads, serial, items.size(), [&](size_t i) {
      alignas(64) float state[kMaxItemFloats + 2 * kMaxItemRows];
      attend(p, items[i], Partitions(p, items[i]), state);
      kernels.finish(p, items[i], state);
    });
    return;
  }

  // Every (item, partition) on its own.
  struct Unit {
    const Item* item;
    int64_t partition;
    float* state;
  };
  thread_local std::vector<float> states;
  if (int64_t(states.size()) < state_floats) states.resize(size_t(state_floats));
  std::vector<Unit> units;
  std::vector<size_t> first_units;  // of each item, and the end
  float* next = states.data();
  for (const Item& item : items) {
    first_units.push_back(units.size());
    for (int64_t i = Partitions(p, item).first; i < Partitions(p, item).last; ++i) {
      units.push_back({&item, i, next});
      next += StateFloats(p, item.last - item.first);
    }
  }
  first_units.push_back(units.size());
  ForEach(threads, false, units.size(),
          [&](size_t i) { attend(p, *units[i].item, {units[i].partition, units[i].partition + 1}, units[i].state); });
  ForEach(threads, state_floats < kSerialMerge, items.size(), [&](size_t i) {
    float* state = units[first_units[i]].state;
    for (size_t u = first_units[i] + 1; u < first_units[i + 1]; ++u) kernels.merge(p, items[i], state, units[u].state);
    kernels.finish(p, items[i], state);
  });
}

// ---- The operator

Kernels ChooseKernels() {
  const InstructionSet set = ChooseInstructionSet();
#if defined(__x86_64__)
  if (set == InstructionSet::kAvx512) {
    Kernels kernels = kAvx512Kernels;
    if (UsesExtension(Extension::kAmx)) {
      kernels.attend[int(Element::kInt8)] = AmxAttendInt8;
      kernels.attend[int(Element::kFloat16)] = AmxAttendFloat16;
    }
    return kernels;
  }
  if (set >= InstructionSet::kAvx2) return kAvx2Kernels;
#elif defined(__aarch64__)
  if (set == InstructionSet::kNeon) return kNeonKernels;
#endif
  return kPlainKernels;
}

struct Kernel {
  OrtApi api;
  Settings settings;
  const Kernels kernels;
  const std::shared_ptr<Threads> threads;

  Kernel(const OrtApi& ort, const Attributes& attributes, std::shared_ptr<Threads> of_session)
      : api(ort), settings(ReadSettings(attributes)), kernels(ChooseKernels()), threads(std::move(of_session)) {}

  void Compute(OrtKernelContext* context) const {
    const std::vector<Tensor> inputs = ReadInputs(api, context);
    Problem problem = CheckShapes(settings, inputs);
    CheckValues(problem, inputs);
    problem.output =
        operators::NewOutput<float>(api, context, 0, {inputs[kQuery].dims[0], problem.heads * problem.head_dim});
    const int64_t sequences = inputs[kPastLengths].dims[0];
    WriteTokens(*threads, kernels, problem, sequences);
    Attend(*threads, kernels, problem, sequences);
  }
};

struct PagedAttention {
  static constexpr const char* kName = "PagedAttention";
  static constexpr int kVersion = 1;
  static constexpr size_t kInputs = kInputCount, kOutputs = 1;

  // (T, query's width - keys and values), where query and key_cache say so; nothing otherwise.
  static void InferShape(const OrtApi& api, OrtShapeInferContext* context) {
    OrtTensorTypeAndShapeInfo *query, *keys, *output;
    Check(api.ShapeInferContext_GetInputTypeShape(context, kQuery, &query));
    Check(api.ShapeInferContext_GetInputTypeShape(context, kKeyCache, &keys));
    const auto dims = [&](OrtTensorTypeAndShapeInfo* info, size_t rank, int64_t* out) {
      size_t found;
      Check(api.GetDimensionsCount(info, &found));
      if (found == rank) Check(api.GetDimensions(info, out, rank));
      return found == rank;
    };
    int64_t shape[2], cache[5];
    const char* names[2];
    if (!dims(query, 2, shape) || !dims(keys, 5, cache)) return;
    Check(api.GetSymbolicDimensions(query, names, 2));
    const bool tokens_known = shape[0] >= 0 || *names[0] != '\0';
    if (!tokens_known || shape[1] <= 0 || cache[1] <= 0 || cache[3] <= 0) return;
    shape[1] -= 2 * cache[1] * cache[3];
    if (shape[1] <= 0) return;  // Compute will say what is wrong
    names[1] = "";
    Check(api.CreateTensorTypeAndShapeInfo(&output));
    const operators::ShapeInfo release = {api, output};
    Check(api.SetTensorElementType(output, kOrtFloat32));
    Check(api.SetDimensions(output, shape, 2));
    Check(api.SetSymbolicDimensions(output, names, 2));
    Check(api.ShapeInferContext_SetOutputTypeShape(context, 0, output));
  }
};

}  // namespace

void* ThreadScratch(int64_t bytes) {
  thread_local Scratch scratch;
  return scratch.Get(bytes);
}

const OrtCustomOp* NewOperator(const OrtApi& api, SessionThreads& threads) {
  return new operators::Declaration<PagedAttention, Kernel>(api, threads);
}

}  // namespace paged_attention
