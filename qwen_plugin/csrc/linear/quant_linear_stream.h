// How the kernels of qwen::QuantLinear fetch a panel before they read it.
#pragma once
#include <cstdint>

#include "linear/quant_linear.h"
#include "operator/fetch_window.h"

#define UNROLL_FOR(i, count) _Pragma("GCC unroll 32") for (int i = 0; i < (count); ++i)

namespace quant_linear {
namespace {

// Memory that is wanted soon, fetched as the kernel goes along; a step of the kernel fetches as many lines as it reads.
// That of a single tile is fetched in windows.
// Passed by reference: reading a copy just written, in one wide load, waits until all earlier stores to y are done,
// which took a fifth of a long prefill.
struct Stream {
  const uint8_t* next = nullptr;
  int64_t step = 0, left = 0;         // bytes from one fetch to the next, and fetches until there is more to decide
  int64_t a_group = 0, of_share = 0;  // several tiles: fetches in each group of columns, and those not yet allowed
  int64_t rows = 0, row = 0, windows = 0;  // one tile: fetches of each place in a window, those done, windows to come

  void StartGroup() {
    const int64_t more = of_share < a_group ? of_share : a_group;
    left += more, of_share -= more;
  }
  // For this group of columns, and for good where there is one tile.
  bool IsDone() const { return left == 0 && row == rows && windows == 0; }
  // So many fetches, of kLines each. Four at once take fewer instructions, if there are always four to go; but AVX-512,
  // which waits for memory with one row, is 1.02 times as fast with one at a time.
  template <int kLines, int kTimes = 1>
  void Fetch() {
    if (left == 0 && !StartRow(kLineBytes * kLines)) return;
    if (left < kTimes) {
      for (int i = 0; i < kTimes; ++i) Fetch<kLines>();
      return;
    }
    UNROLL_FOR(t, kTimes) {
      UNROLL_FOR(i, kLines)
      __builtin_prefetch(next + t * step + kLineBytes * i, 0, 2);  // to the second level: it waits for more at once
    }
    next += kTimes * step, left -= kTimes;
  }
  bool StartRow(int64_t bytes) {
    if (row == rows) {
      if (windows == 0) return false;
      --windows, row = 0;
      next -= (rows - 1) * bytes;
    } else {
      next += bytes - kWindowPages * step;
    }
    ++row, left = kWindowPages;
    return true;
  }
};

// Fetches the first window of the `size` bytes at `from` and returns a stream of the others. `bytes`: of a fetch.
inline Stream StartWindows(const uint8_t* from, int64_t size, int64_t bytes) {
  Stream stream;
  stream.windows = (size + kWindowBytes / 2) / kWindowBytes + (size < kWindowBytes / 2);
  stream.rows = stream.row = size / (stream.windows * kWindowPages * bytes);
  stream.step = stream.rows * bytes;
  for (int64_t at = 0; at < stream.step; at += 64)
    for (int64_t i = 0; i < kWindowPages; ++i) __builtin_prefetch(from + i * stream.step + at, 0, 2);
  stream.next = from + kWindowPages * stream.step + (stream.rows - 1) * bytes;  // as at the end of that window
  --stream.windows;
  return stream;
}

// Lines that are fetched at once.
constexpr int FetchLines(int bits) { return bits == 8 ? 2 : 1; }

}  // namespace
}  // namespace quant_linear
