// The products of sorted rows with the weights of their experts, shared among threads in pieces smaller than an expert.
#pragma once
#include <cstdint>
#include <vector>

#include "experts/routing.h"
#include "linear/product.h"

namespace experts {

// One expert's product.
struct Part {
  quant_linear::Problem p;
  const quant_linear::Kernels* kernels;
  int64_t tiles, tile_bytes, blocks;  // of rows; blocks of so many tiles that they stay in a cache
  int64_t first_tile, first_item;     // among those of all parts; an item is a panel times a block
  char* activations;
};

struct Products {
  std::vector<Part> parts;
  int64_t tiles = 0, items = 0, activation_bytes = 0;
  bool shares_tile = false;  // the parts have one and the same row

  // settings: those of an expert, with the weight of the first; y (rows, width) of the sorted rows. The product's rows
  // are rows of x: sources[i] for the sorted row i, or row i itself if it is null.
  // one_row: all rows are one and the same.
  Products(const quant_linear::Problem& settings, const quant_linear::KernelChoice& kernels,
           const std::vector<Group>& groups, const float* x, const int32_t* sources, float* y, bool one_row);

  // What Kernels::quantize made of the rows of x takes their place.
  void TakeQuantized(const char* rows);
  // Into memory of activation_bytes, aligned to 64.
  void Prepare(Threads& threads, char* activations);
  // Of all panels; `order` and `ahead` as in Threads::For.
  void Multiply(Threads& threads, const std::shared_ptr<Order>& order = nullptr,
                const std::vector<Ahead>* ahead = nullptr) const;
  // The weights that each of so many threads reads first.
  std::vector<Ahead> FirstWeights(int threads) const;
  // The following products are of panels [first, last) alone, into y (rows, 32 * (last - first)).
  void TakePanels(const quant_linear::Problem& settings, const std::vector<Group>& groups, int64_t first, int64_t last,
                  float* y);

 private:
  void CountItems();
};

}  // namespace experts
