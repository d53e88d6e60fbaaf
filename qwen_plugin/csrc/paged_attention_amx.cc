// Rows over one partition of int8 pools with AMX: the same whole numbers as Int8Rows, so the same bits.
//
// The two bytes of every query and softmax weight, 256 * high + low (high signed, low not), are rows of two tile
// operands (A); keys and values, just as the pools hold them, are the other (B): 16 lines of 16 tokens or channels by 4
// numbers to sum over.
#include <immintrin.h>

#include "paged_attention_kernels.h"
#include "vector_avx512.h"

namespace paged_attention {
namespace {

constexpr int kLine = 64;      // bytes of a line of a tile
constexpr int kChunk = kLine;  // numbers that one product of tiles sums over
constexpr int kLanes = 16;     // int32 of a line

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t line_bytes[16] = {};
  uint8_t lines[16] = {};

  explicit TileConfig(int rows) {
    for (int tile = 0; tile < 8; ++tile) {
      line_bytes[tile] = kLine;
      lines[tile] = uint8_t(tile < 6 ? rows : 16);  // 0 to 3 sums, 4 and 5 A, 6 and 7 B
    }
  }
};

// What tile instructions read must be in memory before them, which g++ 12 does not see.
inline void KeepStores() { asm volatile("" ::: "memory"); }

// Row `row` of A (chunks, high and low, rows, 64) from its int16 numbers, whose count is a multiple of 32.
inline void SplitRow(const int16_t* numbers, int count, int row, int rows, uint8_t* a) {
  for (int i = 0; i < count; i += 32) {
    const __m512i words = _mm512_loadu_si512(numbers + i);
    uint8_t* high = a + (i / kChunk * 2 * rows + row) * kLine + i % kChunk;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), _mm512_cvtepi16_epi8(_mm512_srai_epi16(words, 8)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + rows * kLine), _mm512_cvtepi16_epi8(words));
  }
}

// Tiles for the sums of one multiplication. Their numbers must stand in the source, hence a macro.
#define SUMS(NAME, HIGH, LOW, B)                                                              \
  struct NAME {                                                                               \
    static void Clear() {                                                                     \
      _tile_zero(HIGH);                                                                       \
      _tile_zero(LOW);                                                                        \
    }                                                                                         \
    static void Add(const uint8_t* high, const uint8_t* low, const char* b, int64_t stride) { \
      _tile_loadd(B, b, stride);                                                              \
      _tile_loadd(4, high, kLine);                                                            \
      _tile_dpbssd(HIGH, 4, B);                                                               \
      _tile_loadd(5, low, kLine);                                                             \
      _tile_dpbusd(LOW, 5, B);                                                                \
    }                                                                                         \
    static void Store(int32_t* high, int32_t* low) {                                          \
      _tile_stored(HIGH, high, kLine);                                                        \
      _tile_stored(LOW, low, kLine);                                                          \
    }                                                                                         \
  };
SUMS(EvenSums, 0, 1, 6)
SUMS(OddSums, 2, 3, 7)
#undef SUMS

// Multiplies each row of A with 16 tokens or channels, whose part of B is at b[i] + offset for each chunk, lines
// `stride` apart.
template <class Sums>
inline void Multiply(const uint8_t* a, int rows, const char* const* b, int offset, int chunks, int64_t stride) {
  Sums::Clear();
  for (int i = 0; i < chunks; ++i, a += 2 * rows * kLine) Sums::Add(a, a + rows * kLine, b[i] + offset, stride);
}

// take(row, its 16 sums) for what Multiply found.
template <class Sums, class Take>
inline void TakeSums(int rows, const Take& take) {
  alignas(64) int32_t high[16][kLanes], low[16][kLanes];
  Sums::Store(high[0], low[0]);
  for (int r = 0; r < rows; ++r) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_load_si512(high[r]), 8);
    take(r, _mm512_cvtepi32_ps(_mm512_add_epi32(shifted, _mm512_load_si512(low[r]))));
  }
}

struct AmxRows {
  using Stored = int8_t;
  using I = Avx512;
  static constexpr int kMaxRows = kMostRows;

  // What it needs, and rows enough to be the faster one: with few, Int8Rows waits less for memory.
  static bool Fits(const Problem& p, const Item& item) {
    return p.head_dim % kChunk == 0 && p.block_size >= kChunk && item.last - item.first >= kMaxRows;
  }

  static int64_t QueryFloats(int64_t rows, int64_t head_dim) { return 16 + rows * head_dim / 2; }

  // (rows, head_dim) becomes A, after the (rows) steps that its numbers are multiples of.
  static void Load(const float* const* queries, int rows, int D, float* out) {
    int16_t numbers[kMaxHeadDim];
    for (int r = 0; r < rows; ++r) {
      out[r] = Quantize<I::Narrow>(queries[r], D, kLevels, numbers);
      SplitRow(numbers, D, r, rows, reinterpret_cast<uint8_t*>(out + 16));
    }
  }

  static void Attend(int rows, const Group& g) {
    alignas(64) float scores[kMaxRows * kPartition];
    alignas(64) int16_t words[kMaxRows * kPartition];
    alignas(64) uint8_t weights[2 * kMaxRows * kPartition];
    float steps[kMaxRows];
    const TileConfig config(rows);
    KeepStores();
    _tile_loadconfig(&config);
    const Seen seen(g, rows);
    Scores(rows, g, seen, scores);
    RoundedSoftmax<I>(g, rows, scores, words, steps);
    for (int r = 0; r < rows; ++r) SplitRow(words + r * kPartition, kPartition, r, rows, weights);
    AddValues(rows, g, seen, weights, steps);
    _tile_release();
  }

  // scores (rows of 256) of the tiles that some row sees. Two multiplications are always under way, so that neither
  // tiles nor vectors wait.
  static void Scores(int rows, const Group& g, const Seen& seen, float* scores) {
    const auto* a = reinterpret_cast<const uint8_t*>(g.queries + 16);
    const int chunks = g.D / kChunk, first = seen.first / kTile, last = (seen.last + kTile - 1) / kTile;
    const char* keys[kMaxHeadDim / kChunk];
    const auto find = [&](int tile) {
      for (int i = 0; i < chunks; ++i) keys[i] = g.tiles.keys[tile] + i * kChunk * kTile;
    };
    const auto take = [&](int tile, int lane) {
      const auto key_steps = I::Load(g.tiles.key_scales[tile] + lane);
      float* place = scores + tile * kTile + lane;
      return [=, &g](int r, I::Vector sums) {
        I::Store(place + r * kPartition, I::Mul(I::Mul(sums, I::Set1(g.queries[r])), key_steps));
      };
    };
    find(first);
    KeepStores();
    Multiply<EvenSums>(a, rows, keys, 0, chunks, 4 * kTile);
    for (int tile = first; tile < last; ++tile) {
      if (g.tiles.fetch) Prefetch(g.tiles.values[tile], size_t(g.D) * kTile);
      Multiply<OddSums>(a, rows, keys, kLine, chunks, 4 * kTile);
      TakeSums<EvenSums>(rows, take(tile, 0));
      if (tile + 1 < last) {
        find(tile + 1);
        Multiply<EvenSums>(a, rows, keys, 0, chunks, 4 * kTile);
      }
      TakeSums<OddSums>(rows, take(tile, kLanes));
    }
  }

  // out (rows of head_dim): weights * values of the chunks that some row sees.
  static void AddValues(int rows, const Group& g, const Seen& seen, const uint8_t* weights, const float* steps) {
    const int first = seen.first / kChunk, chunks = (seen.last + kChunk - 1) / kChunk - first;
    const uint8_t* a = weights + first * 2 * rows * kLine;
    const char *values[kPartition / kChunk], *next[2 * kPartition / kChunk];
    for (int i = 0; i < chunks; ++i) {
      const int tile = (first + i) * kChunk / kTile;
      // A chunk's tiles lie in one block, one after the other, whether seen or not.
      values[i] = g.tiles.values[tile] ? g.tiles.values[tile] : g.tiles.values[tile + 1] - g.D * kTile;
      next[2 * i] = g.tiles.next_keys[tile], next[2 * i + 1] = g.tiles.next_keys[tile + 1];
    }
    const auto take = [&](int d) {
      return [=, &g](int r, I::Vector sums) { I::Store(g.out + r * g.D + d, I::Mul(sums, I::Set1(steps[r]))); };
    };
    KeepStores();
    Multiply<EvenSums>(a, rows, values, 0, chunks, 4 * g.D);
    for (int d = 0; d < g.D; d += 2 * kLanes) {
      for (int i = 0; g.tiles.fetch && i < 2 * chunks; ++i) Prefetch(next[i] + d * kTile, 2 * kLanes * kTile);
      Multiply<OddSums>(a, rows, values, 4 * d + kLine, chunks, 4 * g.D);
      TakeSums<EvenSums>(rows, take(d));
      if (d + 2 * kLanes < g.D) Multiply<EvenSums>(a, rows, values, 4 * d + 2 * kLine, chunks, 4 * g.D);
      TakeSums<OddSums>(rows, take(d + kLanes));
    }
  }
};

}  // namespace

void AmxAttendInt8(const Problem& p, const Item& item, PartitionRange partitions, float* state) {
  if (AmxRows::Fits(p, item)) return Attend<Avx512, AmxRows>(p, item, partitions, state);
  kAvx512Kernels.attend[int(Element::kInt8)](p, item, partitions, state);
}

}  // namespace paged_attention
