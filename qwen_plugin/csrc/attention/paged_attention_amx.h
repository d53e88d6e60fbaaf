// What the AMX kernels of qwen::PagedAttention share.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "attention/paged_attention_softmax.h"

namespace paged_attention {
namespace {

constexpr int kLine = 64;  // bytes of a line of a tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t line_bytes[16] = {};
  uint8_t lines[16] = {};

  // 0 to 3 are sums, 4 and 5 A, 6 and 7 B, for products that sum over `chunk` bytes. The lines of 4 are `rows`, those
  // of 5 `more_rows`; so are those of 0 and 1, and of 2 and 3.
  TileConfig(int rows, int more_rows, int chunk) {
    for (int tile = 0; tile < 8; ++tile) {
      line_bytes[tile] = uint16_t(tile == 4 || tile == 5 ? chunk : kLine);
      lines[tile] = uint8_t(tile >= 6 ? chunk / 4 : tile < 2 || tile == 4 ? rows : more_rows);
    }
  }
};

// What tile instructions read must be in memory before them, which g++ 12 does not see.
inline void KeepStores() { asm volatile("" ::: "memory"); }

// What a partition's first group fetches meanwhile: the values, then the next partition's keys. At an even pace all
// along, softmax included, as a core waits for no more than some 16 lines at a time.
class Fetcher {
 public:
  Fetcher(const Tiles& tiles, int first, int last, int lines_of_tile) : lines_of_tile_(lines_of_tile) {
    if (!tiles.fetch) return;
    for (int i = first; i < last; ++i) tiles_[count_++] = tiles.values[i];
    for (const char* keys : tiles.next_keys)
      if (keys != nullptr) tiles_[count_++] = keys;
  }

  void FetchTwoLines() {
    if (lines_ == 0) {
      if (next_ == count_) return;
      at_ = tiles_[next_++], lines_ = lines_of_tile_;
    }
    Prefetch(at_, 2 * kLine);
    at_ += 2 * kLine, lines_ -= 2;
  }
  void FetchLines(int count) {
    for (; count > 0; count -= 2) FetchTwoLines();
  }

 private:
  const char *tiles_[2 * kTilesPerPartition], *at_ = nullptr;
  int count_ = 0, next_ = 0, lines_ = 0;
  const int lines_of_tile_;
};

}  // namespace
}  // namespace paged_attention
