#include "experts/expert_products.h"

#include <algorithm>

namespace experts {
namespace {

using quant_linear::kLeastTaskBytes;
using quant_linear::kSerialWork;
using quant_linear::kTaskBytes;

// The part that has item or tile i, by the first ones of the parts.
size_t PartOf(const std::vector<Part>& parts, int64_t Part::* first, int64_t i) {
  const auto after = std::upper_bound(parts.begin(), parts.end(), i,
                                      [&](int64_t value, const Part& part) { return value < part.*first; });
  return size_t(after - parts.begin()) - 1;
}

}  // namespace

Products::Products(const quant_linear::Problem& settings, const quant_linear::KernelChoice& kernels,
                   const std::vector<Group>& groups, const float* x, const int32_t* sources, float* y, bool one_row)
    : shares_tile(one_row) {
  parts.reserve(groups.size());
  for (const Group& group : groups) {
    Part part = {settings, nullptr, 0, 0, 0, tiles, 0, nullptr};
    quant_linear::Problem& p = part.p;
    p.rows = group.rows;
    p.weight += group.expert * p.panels * p.panel_bytes;
    p.x = sources == nullptr ? x + group.first * p.in_features : x;
    p.sources = sources == nullptr ? nullptr : sources + group.first;
    p.y = y + group.first * p.width;
    part.kernels = &kernels.Of(p);
    part.tiles = CeilDiv(p.rows, part.kernels->max_tile_rows(p));
    part.tile_bytes = part.kernels->tile_bytes(p);
    part.blocks = CeilDiv(part.tiles, part.kernels->share(p).tiles);
    if (!one_row || parts.empty()) tiles += part.tiles, activation_bytes += part.tiles * part.tile_bytes;
    parts.push_back(part);
  }
  CountItems();
}

void Products::CountItems() {
  items = 0;
  for (Part& part : parts) {
    part.first_item = items;
    items += part.blocks * part.p.panels;
  }
}

void Products::TakeQuantized(const char* rows) {
  for (Part& part : parts) part.p.quantized = rows;
}

void Products::Prepare(Threads& threads, char* activations) {
  char* next = activations;
  for (Part& part : parts) {
    part.activations = next;
    if (!shares_tile) next += part.tiles * part.tile_bytes;
  }
  const auto prepare = [&](int64_t first, int64_t last) {
    for (size_t i = shares_tile ? 0 : PartOf(parts, &Part::first_tile, first); first < last; ++i) {
      const Part& part = parts[i];
      const int64_t end = std::min(last - part.first_tile, part.tiles);
      part.kernels->prepare(part.p, part.tiles, {first - part.first_tile, end}, part.activations);
      first = part.first_tile + end;
    }
  };
  int64_t work = 0;
  for (const Part& part : parts) work += part.p.rows * part.p.in_features;
  if (shares_tile || work < kSerialWork) return prepare(0, tiles);
  const int64_t most = std::max<int64_t>(1, kSerialWork * tiles / work);
  operators::ForRanges(threads, tiles, 1, most, prepare);
}

void Products::Multiply(Threads& threads, const std::shared_ptr<Order>& order, const std::vector<Ahead>* ahead) const {
  int64_t rows = 0;
  for (const Part& part : parts) rows += part.p.rows;
  const quant_linear::Problem& p = parts[0].p;
  const int64_t item_work = std::max<int64_t>(1, p.in_features * kPanel * (rows * p.panels / items));
  const int64_t most = std::max<int64_t>(1, kTaskBytes / p.panel_bytes);
  const int64_t least = std::max(CeilDiv(kLeastTaskBytes, p.panel_bytes), CeilDiv(kSerialWork, item_work));
  const auto multiply = [&](int64_t first, int64_t last) {
    for (size_t i = PartOf(parts, &Part::first_item, first); first < last; ++i) {
      const Part& part = parts[i];
      const int64_t panels = part.p.panels, end = std::min(last, part.first_item + part.blocks * panels);
      while (first < end) {
        const int64_t block = (first - part.first_item) / panels, begin = (first - part.first_item) % panels;
        const int64_t stop = std::min(panels, begin + end - first);
        part.kernels->multiply(part.p, part.tiles,
                               {part.tiles * block / part.blocks, part.tiles * (block + 1) / part.blocks},
                               {begin, stop}, part.activations);
        first += stop - begin;
      }
    }
  };
  operators::ForRanges(threads, items, std::min(least, most), most, multiply, order, {}, ahead);
}

void Products::TakePanels(const quant_linear::Problem& settings, const std::vector<Group>& groups, int64_t first,
                          int64_t last, float* y) {
  for (size_t i = 0; i < parts.size(); ++i) {
    quant_linear::Problem& p = parts[i].p;
    p.weight = settings.weight + (groups[i].expert * settings.panels + first) * settings.panel_bytes;
    p.panels = last - first;
    p.out_features = p.width = kPanel * p.panels;
    p.y = y + groups[i].first * p.width;
  }
  CountItems();
}

std::vector<Ahead> Products::FirstWeights(int threads) const {
  std::vector<Ahead> weights;
  for (int t = 0; t < threads; ++t) {
    const int64_t item = items * t / threads;
    const Part& part = parts[PartOf(parts, &Part::first_item, item)];
    const int64_t panels = part.p.panels, panel = (item - part.first_item) % panels;
    weights.push_back({PanelOf(part.p, panel), PanelOf(part.p, panels)});
  }
  return weights;
}

}  // namespace experts
