#include "experts/routing.h"

namespace experts {

void TakeLargest(const float* probabilities, int64_t count, int64_t top_k, bool normalize, int32_t* places,
                 float* weights) {
  int64_t taken = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float p = probabilities[i];
    int64_t at = taken;
    if (taken == top_k) {
      if (!(p > weights[top_k - 1])) continue;
      at = top_k - 1;  // takes the place of the last
    } else {
      ++taken;
    }
    for (; at > 0 && p > weights[at - 1]; --at) weights[at] = weights[at - 1], places[at] = places[at - 1];
    weights[at] = p, places[at] = int32_t(i);
  }
  if (!normalize) return;
  float sum = 0;
  for (int64_t s = 0; s < top_k; ++s) sum += weights[s];
  for (int64_t s = 0; s < top_k; ++s) weights[s] /= sum;
}

Sorted SortByExpert(const int32_t* chosen, int64_t tokens, int64_t top_k, int64_t num_experts) {
  const int64_t slots = tokens * top_k;
  Sorted sorted;
  sorted.tokens.resize(size_t(slots)), sorted.places.resize(size_t(slots));
  std::vector<int64_t> next(size_t(num_experts), 0);  // counts, then the place of an expert's next slot
  for (int64_t i = 0; i < slots; ++i) ++next[size_t(chosen[i])];
  int64_t first = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t rows = next[size_t(e)];
    if (rows > 0) sorted.groups.push_back({e, first, rows});
    next[size_t(e)] = first;
    first += rows;
  }
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t place = next[size_t(chosen[i])]++;
    sorted.tokens[size_t(place)] = int32_t(i / top_k), sorted.places[size_t(i)] = int32_t(place);
  }
  return sorted;
}

}  // namespace experts
