// qwen::QuantLinear: what the operator (quant_linear.cc) hands to its kernels (one set an instruction set).
//
// Arithmetic, the same bits whatever the kernels, the rows beside and the threads; per row and group:
//   amax = largest |x|; inverse = limit / amax; a = rint(x * inverse); scale = amax / limit; all 0 where inverse is inf
//   int8: limit 127, a is one byte. int8x2: limit 127 * 256, a = 256 * high + low, each one byte with a sign.
//   amax is that of the group; with activation_scales "token" that of the row. With "static", where s is limit / 127:
//   inverse = s / input_scale; a = rint(x * inverse clipped to +-limit); scale = input_scale / s
//   dot = sum (q - zero_point) * a, exact in int32; y = fma(float(dot) * weight_scale, scale, y), groups ascending
//   activation_scales "block", for 4 bits alone: blocks of 128 columns have a scale, amax is theirs. The weight scales
//   of a block are whole multiples of its unit (quant_weight.h): its sum of dot * weight_scale / unit, for each byte of
//   a, is an integer below 2^22, exact in any order; y = fma(sum * unit, scale, y), blocks ascending, with int8x2 in
//   place of sum * unit fma(low sum, unit, high sum * (256 * unit))
//
//   float32: y = fma((q - zero_point) * weight_scale, x, y), columns ascending
// and at last y + bias + residual, from left to right. With swiglu, for which the builder puts 16 outputs of the gate
// and the 16 that they gate into a panel: silu(y + bias of its first half) * (y + bias of its second).
#pragma once
#include "linear/quant_weight.h"

namespace quant_linear {

enum class Precision { kInt8, kInt8x2, kFloat32 };
enum class ActivationScales { kGroup, kBlock, kToken, kStatic };

// One call of the operator; everything in it has been checked.
struct Problem : QuantWeight {
  int64_t rows;
  Precision precision;
  ActivationScales activation_scales;
  float input_scale;  // of the static ones
  bool swiglu;
  int64_t width;  // columns of y: out_features, or half of them with swiglu
  float epsilon;

  const float* x;  // (rows, in_features), or of row r of the product the row sources[r]
  // The following may be null.
  const float *bias, *norm_weight, *residual;  // (out_features), (in_features), (rows, width)
  const int32_t* permutation;                  // (in_features)
  const int32_t* sources;                      // (rows)
  const char* quantized;                       // in place of x: its rows, as Kernels::quantize leaves them
  float* y;                                    // (rows, width)
  float* input;                                // (rows, in_features), or null: the product's input, normalised
};

// Bytes of an activation, of the precisions that round.
static inline int Planes(const Problem& p) { return p.precision == Precision::kInt8 ? 1 : 2; }

struct Range {
  int64_t first, last;
};

// The rows are cut evenly into tiles: tile t is rows [RowBegin(p, tiles, t), RowBegin(p, tiles, t + 1)).
static inline int64_t RowBegin(const Problem& p, int64_t tiles, int64_t tile) { return p.rows * tile / tiles; }

// What `multiply` is given at a time, at most; panels 0: a few, so that the threads end together.
struct Share {
  int64_t tiles, panels;
};

// Activations that stay in the second-level cache while panels pass by.
constexpr int64_t kCachedBytes = 1 << 20;

// A group of activations, quantised.
struct QuantizedGroup {
  float scale;
  int32_t sums[2];  // of the values in each plane
};

// Bytes of a row that Kernels::quantize leaves: planes of bytes, then groups.
static inline int64_t QuantizedBytes(const Problem& p) {
  return CeilDiv(p.groups * (Planes(p) * p.group_size + int64_t(sizeof(QuantizedGroup))), 64) * 64;
}

// Kernels keep a call's activations in one buffer, a tile after the other, in a form of their own.
// `tiles` is the number of all tiles; ranges are of tiles and of panels. Both functions run on several threads at
// once, on different ranges. They may throw std::bad_alloc.
struct Kernels {
  int64_t (*max_tile_rows)(const Problem& p);
  // Bytes of one tile in the buffer, a multiple of 64; the buffer is aligned to 64.
  int64_t (*tile_bytes)(const Problem& p);
  // Normalises rows of x (and writes p.input), permutes and quantises them into the buffer.
  void (*prepare)(const Problem& p, int64_t tiles, Range of_tiles, char* activations);
  Share (*share)(const Problem& p);
  // Normalises, permutes and quantises rows once, for products whose rows are several times the same; the same bytes
  // for all kernels. Null where nothing is quantised; not for the precision float32.
  void (*quantize)(const Problem& p, Range of_rows, char* out);
  // Multiplies tiles with panels into p.y, bias and residual added, or gated.
  void (*multiply)(const Problem& p, int64_t tiles, Range of_tiles, Range of_panels, const char* activations);
};

// Memory of the calling thread for that many floats, aligned to 64; what it held before is lost. For a row, and for
// totals.
float* RowScratch(int64_t floats);
float* TotalScratch(int64_t floats);

extern const Kernels kPlainKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvxVnniKernels, kAvx512VnniKernels, kAmxKernels, kAmxBlockKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonDotKernels;
#endif

}  // namespace quant_linear
