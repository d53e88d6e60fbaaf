// Which experts a token has, and which tokens an expert has.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace experts {

// The top_k largest of probabilities (count), of equal ones the first: their places and themselves, in falling order.
// normalize: each over their sum. Any top_k of them where some are not numbers.
void TakeLargest(const float* probabilities, int64_t count, int64_t top_k, bool normalize, int32_t* places,
                 float* weights);

// The rows of an expert that has any: slots of `order`.
struct Group {
  int64_t expert, first, rows;
};

// The slots of all tokens, slot s of token t being t * top_k + s, in the order of their experts.
struct Sorted {
  std::vector<Group> groups;    // experts ascending
  std::vector<int32_t> tokens;  // (tokens * top_k) of the sorted slots
  std::vector<int32_t> places;  // (tokens * top_k): where a slot is among the sorted ones
};

Sorted SortByExpert(const int32_t* chosen, int64_t tokens, int64_t top_k, int64_t num_experts);

}  // namespace experts
