// Reading memory and nothing else, for benchmarks to hold a kernel against: what qwen_run/bench/bandwidth.py calls.
#include "operator/fetch_window.h"

namespace {

// A line in four parts, which every processor reads at the pace of its caches.
using Part = uint64_t __attribute__((vector_size(16)));
struct Line {
  Part parts[4];
};

inline void Add(Line& sum, const Line& line) {
  for (int i = 0; i < 4; ++i) sum.parts[i] ^= line.parts[i];
}

Line ReadInOrder(const Line* data, int64_t lines) {
  Line sums[2] = {};
  int64_t i = 0;
  for (; i + 2 <= lines; i += 2) Add(sums[0], data[i]), Add(sums[1], data[i + 1]);
  if (i < lines) Add(sums[0], data[i]);
  Add(sums[0], sums[1]);
  return sums[0];
}

// Fetches the next window while it reads one; the rest in order.
Line ReadInTurn(const Line* data, int64_t lines) {
  constexpr int64_t kPageLines = kPageBytes / kLineBytes, kWindow = kWindowPages * kPageLines;
  Line sum = {};
  int64_t first = 0;
  for (; first + kWindow <= lines; first += kWindow)
    for (int64_t i = 0; i < kWindow; ++i) {
      __builtin_prefetch(data + first + kWindow + i % kWindowPages * kPageLines + i / kWindowPages, 0, 2);
      Add(sum, data[first + i]);
    }
  Add(sum, ReadInOrder(data + first, lines - first));
  return sum;
}

}  // namespace

// Reads `lines` of 64 bytes at `data`, aligned to 16, `repeats` times.
extern "C" __attribute__((visibility("default"))) void QwenRead(const void* data, int64_t lines, int64_t repeats,
                                                                int in_turn) {
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    Line sum = (in_turn != 0 ? ReadInTurn : ReadInOrder)(static_cast<const Line*>(data), lines);
    asm volatile("" : "+m"(sum) : : "memory");
  }
}
