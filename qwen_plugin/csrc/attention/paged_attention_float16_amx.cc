// Rows over one partition of float16 pools with AMX: products of bfloat16, summed in float32.
//
// A float16 is the sum of two bfloat16, "high" and "low"; a query or softmax weight is too, but for 2^-17 of it. Of the
// four products that makes, low * low (2^-15 at most) is left out. Queries and weights are the tile operand A, keys and
// values B. A product of tiles sums over 32 numbers; as it takes them in pairs, both have them in the order 0, 16,
// 1, 17...
//
// A row's sums go over the same numbers in the same order whatever rows stand beside it, and zeros change no sum. What
// is not finite would make NaN of its product with 0, hence AddBroken.
#include "attention/paged_attention_amx.h"
#include "attention/paged_attention_kernels.h"
#include "vectors/vector_avx512.h"

namespace paged_attention {
namespace {

using Bfloat16 = uint16_t;

constexpr int kSide = 16;                        // lines of a tile, and columns of its sums
constexpr int kTileNumbers = kSide * kTile;      // bfloat16
constexpr int kBlockNumbers = 4 * kTileNumbers;  // B of 32 columns: (high and low, 2, 16, 32)
constexpr int kMaxChunks = kMaxHeadDim / kTile;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Keys and values of a partition as B, a block for every 32 keys and 32 channels.
struct Split {
  alignas(64) Bfloat16 keys[kTilesPerPartition * kMaxChunks * kBlockNumbers];
  alignas(64) Bfloat16 values[kTilesPerPartition * kMaxChunks * kBlockNumbers];
};

// ---- Two bfloat16 for a number

inline __m512i AddInts(__m512 x, int number) {
  return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(number));
}

// What a bfloat16 keeps of each, alternating.
inline __m512i Interleave(__m512i even, __m512i odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
}

// The high parts of `even` and `odd`, alternating, and the low ones, which kRound rounds where they don't fit.
template <bool kRound>
inline void StorePairs(__m512 even, __m512 odd, Bfloat16* high, Bfloat16* low) {
  const auto upper = [](__m512 x) {
    return _mm512_castsi512_ps(_mm512_and_si512(AddInts(x, kRound ? 0x8000 : 0), _mm512_set1_epi32(int(0xffff0000))));
  };
  const __m512 even_high = upper(even), odd_high = upper(odd);
  _mm512_store_si512(high, Interleave(_mm512_castps_si512(even_high), _mm512_castps_si512(odd_high)));
  const __m512 even_low = _mm512_sub_ps(even, even_high), odd_low = _mm512_sub_ps(odd, odd_high);
  constexpr int kHalf = kRound ? 0x8000 : 0;
  _mm512_store_si512(low, Interleave(AddInts(even_low, kHalf), AddInts(odd_low, kHalf)));
}

// ---- B

// A block from 32 lines of 32 columns, `stride` apart.
inline void SplitBlock(const uint16_t* from, int64_t stride, Bfloat16* block, Fetcher& fetcher) {
  for (int line = 0; line < kSide; ++line, from += stride, block += kTile) {
    if (line % 8 != 7) fetcher.FetchTwoLines();  // one in eight is left to the softmax
    for (int i = 0; i < 2; ++i) {
      Bfloat16* high = block + i * kTileNumbers;
      StorePairs<false>(Avx512::Load(from + i * kSide), Avx512::Load(from + kSide * stride + i * kSide), high,
                        high + 2 * kTileNumbers);
    }
  }
}

// As SplitBlock, where only lines [first, last) and the first `columns` of them are to be read. All else becomes 0, and
// with kFinite what is not finite. Whether there was such.
template <bool kFinite>
bool SplitPart(const uint16_t* from, int64_t stride, int first, int last, int columns, Bfloat16* block) {
  __mmask16 broken = 0;
  for (int i = 0; i < 2; ++i) {
    const auto there = __mmask16((1 << Min(Max(columns - i * kSide, 0), kSide)) - 1);
    const auto load = [&](int line) {
      if (line < first || line >= last) return _mm512_setzero_ps();
      const __m512 x = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, from + line * stride + i * kSide));
      if (!kFinite) return x;
      const __mmask16 bad = _mm512_fpclass_ps_mask(x, 0x99);  // infinite or NaN
      broken |= bad;
      return _mm512_maskz_mov_ps(_knot_mask16(bad), x);
    };
    for (int line = 0; line < kSide; ++line) {
      Bfloat16* high = block + i * kTileNumbers + line * kTile;
      StorePairs<false>(load(line), load(line + kSide), high, high + 2 * kTileNumbers);
    }
  }
  return broken != 0;
}

// ---- Products

// out (rows, 32), lines `out_stride` apart: the sum over chunks i of a's with block(i). a: (rows, chunks, high and low,
// 32), rows `stride` apart. kTiles: of 16 rows each.
template <int kTiles, class Block>
inline void Multiply(const Bfloat16* a, int64_t stride, int chunks, const Block& block, float* out,
                     int64_t out_stride) {
  const Bfloat16* more = a + kSide * stride;
  float* more_out = out + kSide * out_stride;
  stride *= int64_t(sizeof(Bfloat16)), out_stride *= int64_t(sizeof(float));
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const auto add = [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kTiles == 1) return;
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  for (int i = 0; i < chunks; ++i, a += 2 * kTile, more += 2 * kTile) {
    const Bfloat16* b = block(i);
    KeepStores();
    _tile_loadd(4, a, stride);
    if (kTiles == 2) _tile_loadd(5, more, stride);
    _tile_loadd(6, b + 2 * kTileNumbers, kLine);
    _tile_loadd(7, b + 3 * kTileNumbers, kLine);
    add();  // high * low
    _tile_loadd(6, b, kLine);
    _tile_loadd(7, b + kTileNumbers, kLine);
    add();  // high * high
    _tile_loadd(4, a + kTile, stride);
    if (kTiles == 2) _tile_loadd(5, more + kTile, stride);
    add();  // low * high
  }
  _tile_stored(0, out, out_stride);
  _tile_stored(1, out + kSide, out_stride);
  if (kTiles == 2) {
    _tile_stored(2, more_out, out_stride);
    _tile_stored(3, more_out + kSide, out_stride);
  }
  KeepStores();
}

// Tiles that have nothing to do for some 2,000 cycles take about as many to get going again (Sapphire Rapids).
inline void KeepTilesAwake() { _tile_dpbf16ps(0, 4, 6); }

// ---- Softmax

// 2^x for x <= 0, 0 below -125, so that no result is denormal; 1 for 0, error at most 1.5 units in the last place.
inline __m512 Exp2(__m512 x) {
  const __m512 magic = _mm512_set1_ps(12582912.f);  // 1.5 * 2^23: adding it leaves a whole number in the low bits
  const __m512 whole = _mm512_add_ps(x, magic), r = _mm512_sub_ps(x, _mm512_sub_ps(whole, magic));
  constexpr float kCoefficients[] = {9.671513e-3f, 5.5507336e-2f, 2.4022242e-1f, 6.93147e-1f, 1.f};
  __m512 p = _mm512_set1_ps(1.3264727e-3f);
  for (const float c : kCoefficients) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  const __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-125.f), _CMP_NLT_UQ);
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(whole), 23);
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(kept, _mm512_castps_si512(p), exponent));
}

// Scores of tiles [first, last) of one row become 2^(score - max), 0 for other keys than [begin, end), as a row of A.
// Their sum.
inline float SplitWeights(float* scores, int first, int last, int begin, int end, float max, Fetcher& fetcher) {
  const int own_first = begin / kTile, own_last = (end + kTile - 1) / kTile;
  const __m512 largest = _mm512_set1_ps(max);
  __m512 even_sum = _mm512_setzero_ps(), odd_sum = even_sum;
  for (int tile = first; tile < last; ++tile) {
    float* from = scores + tile * kTile;
    fetcher.FetchTwoLines();
    __m512 even = _mm512_setzero_ps(), odd = even;
    if (tile >= own_first && tile < own_last) {
      even = Exp2(_mm512_sub_ps(_mm512_load_ps(from), largest));
      odd = Exp2(_mm512_sub_ps(_mm512_load_ps(from + kSide), largest));
      even_sum = _mm512_add_ps(even_sum, even), odd_sum = _mm512_add_ps(odd_sum, odd);
    }
    auto* to = reinterpret_cast<Bfloat16*>(from);
    StorePairs<true>(even, odd, to, to + kTile);
  }
  return Avx512::ReduceAdd(_mm512_add_ps(even_sum, odd_sum));
}

struct Float16AmxRows {
  using Stored = uint16_t;
  static constexpr int kMaxRows = 2 * kSide;

  static int Chunks(int64_t D) { return int(D + kTile - 1) / kTile; }

  static int64_t QueryFloats(int64_t rows, int64_t head_dim) { return rows * Chunks(head_dim) * kTile; }

  // (rows, head_dim) becomes A (rows, chunks, high and low, 32), for scores to the base 2.
  static void Load(const float* const* queries, int rows, int D, float* out) {
    auto* a = reinterpret_cast<Bfloat16*>(out);
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < D; d += kTile, a += 2 * kTile) {
        const auto load = [&](int i) {
          const auto there = __mmask16((1 << Min(Max(D - i, 0), kSide)) - 1);
          const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, queries[r] + i), _mm512_set1_ps(kLog2E));
          // one NaN for all: rounding would carry a larger one into the sign, and leave -0
          return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_ps(__builtin_nanf("")));
        };
        StorePairs<true>(load(d), load(d + kSide), a, a + kTile);
      }
  }

  static void Attend(int rows, const Group& g) { (rows <= kSide ? AttendWith<1> : AttendWith<2>)(rows, g); }

  template <int kTiles>
  static void AttendWith(int rows, const Group& g) {
    alignas(64) float scores[kMaxRows * kPartition];
    auto& split = *static_cast<Split*>(ThreadScratch(sizeof(Split)));  // stays, with what g.tiles says is ready
    const TileConfig config(int(Min(rows, kSide)), int(Max(rows - kSide, 1)), kLine);
    KeepStores();
    _tile_loadconfig(&config);
    const Seen seen(g, rows);
    const int first = seen.first / kTile, last = (seen.last + kTile - 1) / kTile;
    Fetcher fetcher(g.tiles, first, last, g.D);  // float16 (head_dim, 32)
    Scores<kTiles>(g, first, last, split.keys, scores, fetcher);
    for (int r = 0; r < rows; ++r)
      g.max[r] = g.Sees(r) ? LargestScore<Avx512>(scores + r * kPartition, g.begin[r], g.end[r]) : 0;
    for (int r = 0; r < rows; ++r) {
      const int begin = g.Sees(r) ? g.begin[r] : 0, end = g.Sees(r) ? g.end[r] : 0;
      g.sum[r] = SplitWeights(scores + r * kPartition, first, last, begin, end, g.max[r], fetcher);
      g.max[r] *= kLn2;
      KeepTilesAwake();
    }
    AddValues<kTiles>(g, rows, first, last, split.values, reinterpret_cast<const Bfloat16*>(scores), fetcher);
    _tile_release();
  }

  // scores (rows of 256) of tiles [first, last).
  template <int kTiles>
  static void Scores(const Group& g, int first, int last, Bfloat16* split, float* scores, Fetcher& fetcher) {
    const int chunks = Chunks(g.D);
    const auto* a = reinterpret_cast<const Bfloat16*>(g.queries);
    for (int tile = first; tile < last; ++tile) {
      const auto* keys = reinterpret_cast<const uint16_t*>(g.tiles.keys[tile]);
      const bool ready = g.tiles.keys_ready >> tile & 1;
      Bfloat16* blocks = split + (g.tiles.keep ? tile * chunks * kBlockNumbers : 0);
      const auto block = [&](int i) {
        Bfloat16* b = blocks + i * kBlockNumbers;
        if (ready) return b;
        const int lines = int(Min(g.D - i * kTile, kTile));
        const int64_t start = i * kTile * kTile;
        if (lines == kTile)
          SplitBlock(keys + start, kTile, b, fetcher);
        else
          SplitPart<false>(keys + start, kTile, 0, lines, kTile, b);
        return b;
      };
      Multiply<kTiles>(a, 2 * chunks * kTile, chunks, block, scores + tile * kTile, kPartition);
      if (g.tiles.keep) g.tiles.keys_ready |= 1u << tile;
    }
  }

  // out (rows of head_dim): weights * values of tiles [first, last).
  template <int kTiles>
  static void AddValues(const Group& g, int rows, int first, int last, Bfloat16* split, const Bfloat16* weights,
                        Fetcher& fetcher) {
    const int chunks = Chunks(g.D), D = g.D;
    Tiles& tiles = g.tiles;
    for (int c = 0; c < chunks; ++c) {
      const int columns = int(Min(D - c * kTile, kTile));
      const auto block = [&](int i) {
        const int tile = first + i;
        Bfloat16* b = split + (tiles.keep ? (tile * chunks + c) * kBlockNumbers : 0);
        if (tiles.values_ready >> tile & 1) return b;
        const auto* values = reinterpret_cast<const uint16_t*>(tiles.values[tile]) + c * kTile;
        if (columns == kTile && tile * kTile >= tiles.all_first && (tile + 1) * kTile <= tiles.all_last)
          SplitBlock(values, D, b, fetcher);
        else if (SplitPart<true>(values, D, int(Max(tiles.first - tile * kTile, 0)),
                                 int(Min(tiles.last - tile * kTile, kTile)), columns, b))
          tiles.broken |= 1u << tile;
        return b;
      };
      const auto* a = weights + first * 2 * kTile;
      if (columns == kTile) {
        Multiply<kTiles>(a, 2 * kPartition, last - first, block, g.out + c * kTile, D);
      } else {
        alignas(64) float out[kMaxRows * kTile];
        Multiply<kTiles>(a, 2 * kPartition, last - first, block, out, kTile);
        for (int r = 0; r < rows; ++r)
          std::memcpy(g.out + r * D + c * kTile, out + r * kTile, sizeof(float) * size_t(columns));
      }
    }
    if (tiles.keep) tiles.values_ready |= (1u << last) - (1u << first);
    for (int tile = first; tile < last; ++tile)
      if (tiles.broken >> tile & 1) AddBroken(g, rows, tile);
  }

  // Numbers that are not finite were left out where some row doesn't see them: they make NaN of those that do.
  static void AddBroken(const Group& g, int rows, int tile) {
    const auto* values = reinterpret_cast<const uint16_t*>(g.tiles.values[tile]);
    for (int r = 0; r < rows; ++r)
      for (int t = int(Max(g.begin[r], tile * kTile)); t < Min(g.end[r], (tile + 1) * kTile); ++t)
        for (int d = 0; d < g.D; d += Avx2::kLanes) {
          float* out = g.out + r * g.D + d;
          Avx2::Store(out, Avx2::Fma(Avx2::Zero(), Avx2::Load(values + t % kTile * g.D + d), Avx2::Load(out)));
        }
  }
};

}  // namespace

void AmxAttendFloat16(const Problem& p, const Item& item, PartitionRange partitions, float* state) {
  Attend<Avx512, Float16AmxRows>(p, item, partitions, state);
}

}  // namespace paged_attention
