// Scales and zero points of groups of weights, by the error that rounding with them leaves.
#pragma once
#include <cstdint>

namespace scale_search {

constexpr int kLanes = 16;                       // outputs that are searched together
constexpr int kColumns = 128, kBlockGroups = 4;  // of a block or a group, and groups of a block, at most

// What is searched. All pointers are of the caller; a group is group_size columns of one output.
struct Task {
  const float* weight;      // (outputs, groups * group_size), row after row
  const float* importance;  // (groups * group_size), not negative
  int64_t outputs, groups;
  int32_t group_size;  // a multiple of 4
  int32_t most;        // the largest integer: 2^bits - 1
  int32_t symmetric;   // the zero point is (most + 1) / 2 everywhere
  int32_t together;    // groups of a block, whose scales are whole multiples of one unit; 1: every scale is free
  // The squared error of a weight w counts importance * (|w| + flatness * root mean square of the group); not
  // finite: importance alone.
  float flatness;
  // Of blocks: the largest multiple by zero point (most + 1), significant bits of a unit, the least and largest unit.
  const float* most_units;
  int32_t unit_bits;
  float least_unit, largest_unit;
  // Found: (outputs, groups).
  float* scales;
  uint8_t* zero_points;
};

using Search = void (*)(const Task&);
void SearchPlain(const Task& task);
void SearchAvx2(const Task& task);
void SearchAvx512(const Task& task);

}  // namespace scale_search
