// Rows over one partition of int8 pools with AMX: the same whole numbers as Int8Rows, so the same bits.
//
// The two bytes of every query and softmax weight, 256 * high + low, are rows of a tile operand (A), or with many rows
// of two; keys and values, just as the pools hold them, are the other (B): lines of 16 tokens or channels by 4 numbers
// to sum over.
#include "attention/paged_attention_amx.h"

#include "attention/paged_attention_kernels.h"
#include "vectors/vector_avx512.h"

namespace paged_attention {
namespace {

constexpr int kLanes = 16;         // int32 of a line
constexpr int kRowsOfOneTile = 8;  // whose high and low bytes fit

// Lines fetched meanwhile for each 64 channels: a partition's values in its scores and softmax, the next one's keys
// while values are added. A tile has 32 of them.
constexpr int kLinesInHalfTile = 8, kLinesInSoftmax = 128, kLinesInChannels = 64;  // of scores, in all, of 16 channels

// Row `row` of A (chunks, high and low, rows, 64) from its int16 numbers, whose count is a multiple of 32.
template <int kChunk>
inline void SplitRow(const int16_t* numbers, int count, int row, int rows, int8_t* a) {
  const __m512i half = _mm512_set1_epi16(128);
  for (int i = 0; i < count; i += 32) {
    const __m512i words = _mm512_loadu_si512(numbers + i);
    int8_t* high = a + (i / kChunk * 2 * rows + row) * kLine + i % kChunk;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high),
                        _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_add_epi16(words, half), 8)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + rows * kLine), _mm512_cvtepi16_epi8(words));
  }
}

// Tiles for the sums of one multiplication: of all bytes in HIGH with kOneTile, else of the low ones in LOW. Their
// numbers must stand in the source, hence a macro.
#define SUMS(NAME, HIGH, LOW, B)                                                            \
  template <bool kOneTile>                                                                  \
  struct NAME {                                                                             \
    static void Clear() {                                                                   \
      _tile_zero(HIGH);                                                                     \
      if (!kOneTile) _tile_zero(LOW);                                                       \
    }                                                                                       \
    static void Add(const int8_t* high, const int8_t* low, const char* b, int64_t stride) { \
      _tile_loadd(B, b, stride);                                                            \
      _tile_loadd(4, high, kLine);                                                          \
      _tile_dpbssd(HIGH, 4, B);                                                             \
      if (kOneTile) return;                                                                 \
      _tile_loadd(5, low, kLine);                                                           \
      _tile_dpbssd(LOW, 5, B);                                                              \
    }                                                                                       \
    static void Store(int32_t* high, int32_t* low) {                                        \
      _tile_stored(HIGH, high, kLine);                                                      \
      if (!kOneTile) _tile_stored(LOW, low, kLine);                                         \
    }                                                                                       \
  };
SUMS(EvenSums, 0, 1, 6)
SUMS(OddSums, 2, 3, 7)
#undef SUMS

// Multiplies each row of A with 16 tokens or channels, whose part of B is at b[i] + offset for each chunk, lines
// `stride` apart.
template <class Sums>
inline void Multiply(const int8_t* a, int rows, const char* const* b, int offset, int chunks, int64_t stride) {
  Sums::Clear();
  for (int i = 0; i < chunks; ++i, a += 2 * rows * kLine) Sums::Add(a, a + rows * kLine, b[i] + offset, stride);
}

// take(row, its 16 sums) for what Multiply found.
template <class Sums, class Take>
inline void TakeSums(int rows, const Take& take) {
  alignas(64) int32_t sums[2 * kMostRows][kLanes];  // of the high bytes, then of the low ones
  Sums::Store(sums[0], sums[rows]);
  for (int r = 0; r < rows; ++r) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_load_si512(sums[r]), 8);
    take(r, _mm512_cvtepi32_ps(_mm512_add_epi32(shifted, _mm512_load_si512(sums[rows + r]))));
  }
}

struct AmxRows {
  using Stored = int8_t;
  using I = Avx512;
  static constexpr int kMaxRows = kMostRows;

  static bool Fits(const Problem& p) { return p.head_dim % kLine == 0; }

  static int64_t QueryFloats(int64_t rows, int64_t head_dim) { return 16 + rows * head_dim / 2; }

  // (rows, head_dim) becomes A, after the (rows) steps that its numbers are multiples of.
  static void Load(const float* const* queries, int rows, int D, float* out) {
    int16_t numbers[kMaxHeadDim];
    for (int r = 0; r < rows; ++r) {
      out[r] = Quantize<I::Narrow>(queries[r], D, kLevels, numbers);
      SplitRow<kLine>(numbers, D, r, rows, reinterpret_cast<int8_t*>(out + 16));
    }
  }

  static void Attend(int rows, const Group& g) {
    const bool one_tile = rows <= kRowsOfOneTile;
    if (g.block_size >= kLine) return (one_tile ? AttendWith<true, kLine> : AttendWith<false, kLine>)(rows, g);
    (one_tile ? AttendWith<true, kTile> : AttendWith<false, kTile>)(rows, g);
  }

  // kChunk: values that lie together in a block, of which a product sums over as many.
  template <bool kOneTile, int kChunk>
  static void AttendWith(int rows, const Group& g) {
    alignas(64) float scores[kMaxRows * kPartition];
    alignas(64) int16_t words[kMaxRows * kPartition];
    alignas(64) int8_t weights[2 * kMaxRows * kPartition * (kLine / kChunk)];
    float steps[kMaxRows];
    const int lines = kOneTile ? 2 * rows : rows;
    const TileConfig for_scores(lines, lines, kLine), for_values(lines, lines, kChunk);
    KeepStores();
    _tile_loadconfig(&for_scores);
    const Seen seen(g, rows);
    Fetcher fetcher(g.tiles, seen.first / kTile, (seen.last + kTile - 1) / kTile, g.D / 2);
    Scores<kOneTile>(rows, g, seen, scores, fetcher);
    const int in_turn = kLinesInSoftmax * g.D / kLine / (3 * rows) + 1;
    RoundedSoftmax<I>(g, rows, scores, words, steps, [&] { fetcher.FetchLines(in_turn); });
    for (int r = 0; r < rows; ++r) SplitRow<kChunk>(words + r * kPartition, kPartition, r, rows, weights);
    KeepStores();
    if (kChunk != kLine) _tile_loadconfig(&for_values);
    AddValues<kOneTile, kChunk>(rows, g, seen, weights, steps, fetcher);
    _tile_release();
  }

  // scores (rows of 256) of the tiles that some row sees. Two multiplications are always under way, so that neither
  // tiles nor vectors wait.
  template <bool kOneTile>
  static void Scores(int rows, const Group& g, const Seen& seen, float* scores, Fetcher& fetcher) {
    using Even = EvenSums<kOneTile>;
    using Odd = OddSums<kOneTile>;
    const auto* a = reinterpret_cast<const int8_t*>(g.queries + 16);
    const int chunks = g.D / kLine, first = seen.first / kTile, last = (seen.last + kTile - 1) / kTile;
    const char* keys[kMaxHeadDim / kLine];
    const auto find = [&](int tile) {
      for (int i = 0; i < chunks; ++i) keys[i] = g.tiles.keys[tile] + i * kLine * kTile;
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
    Multiply<Even>(a, rows, keys, 0, chunks, 4 * kTile);
    for (int tile = first; tile < last; ++tile) {
      fetcher.FetchLines(kLinesInHalfTile * chunks);
      Multiply<Odd>(a, rows, keys, kLine, chunks, 4 * kTile);
      TakeSums<Even>(rows, take(tile, 0));
      fetcher.FetchLines(kLinesInHalfTile * chunks);
      if (tile + 1 < last) {
        find(tile + 1);
        Multiply<Even>(a, rows, keys, 0, chunks, 4 * kTile);
      }
      TakeSums<Odd>(rows, take(tile, kLanes));
    }
  }

  // out (rows of head_dim): weights * values of the chunks that some row sees.
  template <bool kOneTile, int kChunk>
  static void AddValues(int rows, const Group& g, const Seen& seen, const int8_t* weights, const float* steps,
                        Fetcher& fetcher) {
    using Even = EvenSums<kOneTile>;
    using Odd = OddSums<kOneTile>;
    const int first = seen.first / kChunk, chunks = (seen.last + kChunk - 1) / kChunk - first;
    const int8_t* a = weights + first * 2 * rows * kLine;
    const char* values[kTilesPerPartition];
    for (int i = 0; i < chunks; ++i) {
      const int tile = (first + i) * kChunk / kTile;
      // A chunk's tiles lie in one block, one after the other, whether seen or not.
      values[i] = g.tiles.values[tile] ? g.tiles.values[tile] : g.tiles.values[tile + 1] - g.D * kTile;
    }
    const auto take = [&](int d) {
      return [=, &g](int r, I::Vector sums) { I::Store(g.out + r * g.D + d, I::Mul(sums, I::Set1(steps[r]))); };
    };
    KeepStores();
    Multiply<Even>(a, rows, values, 0, chunks, 4 * g.D);
    for (int d = 0; d < g.D; d += 2 * kLanes) {
      fetcher.FetchLines(kLinesInChannels);
      Multiply<Odd>(a, rows, values, 4 * d + kLine, chunks, 4 * g.D);
      TakeSums<Even>(rows, take(d));
      fetcher.FetchLines(kLinesInChannels);
      if (d + 2 * kLanes < g.D) Multiply<Even>(a, rows, values, 4 * d + 2 * kLine, chunks, 4 * g.D);
      TakeSums<Odd>(rows, take(d + kLanes));
    }
  }
};

}  // namespace

void AmxAttendInt8(const Problem& p, const Item& item, PartitionRange partitions, float* state) {
  if (AmxRows::Fits(p)) return Attend<Avx512, AmxRows>(p, item, partitions, state);
  kAvx512Kernels.attend[int(Element::kInt8)](p, item, partitions, state);
}

}  // namespace paged_attention
