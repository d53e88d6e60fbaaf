// The search in vectors of 16 floats, a lane an output: what differs between groups differs between lanes, and no sum
// goes across them. Every instruction set does the same operations in the same order, so all find the same.
//
// Included by exactly one instruction set's sources: everything has internal linkage.
#pragma once
#include <cstring>
#include <initializer_list>

#include "rounding/scale_search.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // nothing here is called from elsewhere
#endif

namespace {

using scale_search::kBlockGroups;
using scale_search::kColumns;
using scale_search::kLanes;
using scale_search::Task;

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));

// Parts of a group's range that are tried: what lies beyond is clipped, and all else has finer steps. The range of a
// symmetric grid, which has one step more below zero, is one that both sides fit, or the larger one on either side.
constexpr float kParts[] = {1.0f, 1.05f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f, 0.6f, 0.5f};
// Units of a block that are tried, beside that of which its groups' own scales are multiples.
constexpr float kUnits[] = {0.91f, 0.94f, 0.97f, 1.0f, 1.03f, 1.06f};

inline Lanes Set1(float x) { return x - Lanes{}; }
inline Lanes Min(Lanes a, Lanes b) { return a < b ? a : b; }
inline Lanes Max(Lanes a, Lanes b) { return a < b ? b : a; }

// To the nearest whole number, of which floats up to 2^22 have all.
inline Lanes Round(Lanes x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

inline Lanes Floor(Lanes x) {
  const Lanes rounded = Round(x);
  return rounded > x ? rounded - 1.0f : rounded;
}

// One group of 16 outputs, and the best grid found for it.
struct Group {
  const Lanes* x;       // (group_size)
  const Lanes* weight;  // (group_size), of a squared error
  int size;
  Lanes low, high;  // the range, with 0 inside
  Lanes error, scale, zero;
};

inline Lanes Error(const Group& group, Lanes scale, Lanes zero, float most) {
  const Lanes inverse = 1.0f / scale, lowest = -zero, highest = most - zero;
  Lanes even{}, odd{};
  const auto one = [&](int k) {
    const Lanes x = group.x[k], q = Min(Max(Round(x * inverse), lowest), highest);
    const Lanes error = q * scale - x;
    return error * error * group.weight[k];
  };
  for (int k = 0; k < group.size; k += 2) even += one(k), odd += one(k + 1);
  return even + odd;
}

// The scale with which the integers that the group has now leave the least error.
inline Lanes Fitted(const Group& group, float most) {
  const Lanes inverse = 1.0f / group.scale, lowest = -group.zero, highest = most - group.zero;
  Lanes products{}, squares{};
  for (int k = 0; k < group.size; ++k) {
    const Lanes q = Min(Max(Round(group.x[k] * inverse), lowest), highest), weighed = q * group.weight[k];
    products += weighed * group.x[k];
    squares += weighed * q;
  }
  const Lanes scale = products / squares;
  return (products > 0.0f) & (scale < __builtin_inff()) ? scale : group.scale;
}

// The zero point, not rounded, at which a grid of this scale exceeds the group's range by as much on either side.
inline Lanes Middle(const Group& group, Lanes scale, float most) {
  return (most - (group.low + group.high) / scale) * 0.5f;
}

inline Lanes Clip(Lanes x, float low, float high) { return Min(Max(x, Set1(low)), Set1(high)); }

inline void Take(Group& group, Lanes error, Lanes scale, Lanes zero) {
  const Mask better = error < group.error;
  group.error = better ? error : group.error;
  group.scale = better ? scale : group.scale;
  group.zero = better ? zero : group.zero;
}

// Scale and zero point of a group for itself.
void SearchGroup(Group& group, const Task& task) {
  const float most = float(task.most), middle = float((task.most + 1) / 2);
  group.error = Set1(__builtin_inff());
  group.scale = group.zero = Set1(middle);
  const Lanes side = Max(group.high / (middle - 1.0f), -group.low / middle);
  const Lanes larger = Max(group.high, -group.low) / (middle - 1.0f), both = (group.high - group.low) / most;
  for (const float part : kParts) {
    if (task.symmetric) {
      for (const Lanes& reach : {side, larger}) {
        const Lanes scale = Max(reach * part, Set1(1e-30f));
        Take(group, Error(group, scale, Set1(middle), most), scale, Set1(middle));
      }
      continue;
    }
    const Lanes scale = Max(both * part, Set1(1e-30f));
    const Lanes middle_zero = Middle(group, scale, most), nearest = Round(middle_zero);
    const Lanes step = middle_zero < nearest ? Set1(-1.0f) : Set1(1.0f);
    for (const Lanes& candidate : {nearest, nearest + step}) {
      const Lanes zero = Clip(candidate, 0.0f, most);
      Take(group, Error(group, scale, zero, most), scale, zero);
    }
  }
  const Lanes fitted = Fitted(group, most);
  Take(group, Error(group, fitted, group.zero, most), fitted, group.zero);
}

inline Lanes MostUnits(const Task& task, Lanes zero) {
  Lanes found;
  for (int i = 0; i < kLanes; ++i) found[i] = task.most_units[int(zero[i])];
  return found;
}

// The nearest unit that can be stored.
inline Lanes RoundUnit(const Task& task, Lanes unit) {
  Mask bits;
  unit = Clip(unit, task.least_unit, task.largest_unit);
  std::memcpy(&bits, &unit, sizeof bits);
  bits = ((bits >> 23) + 1 - task.unit_bits) << 23;  // the power of two of its last bit
  Lanes step;
  std::memcpy(&step, &bits, sizeof step);
  step = Max(step, Set1(task.least_unit));
  return Min(Max(Round(unit / step), Set1(1.0f)) * step, Set1(task.largest_unit));
}

// Makes the scales of a block multiples of one unit, which one of them is as often as its zero point allows.
void SearchBlock(Group* groups, int count, const Task& task) {
  const float most = float(task.most);
  Lanes limits[kBlockGroups], largest{}, least = Set1(__builtin_inff());
  for (int g = 0; g < count; ++g) {
    limits[g] = MostUnits(task, groups[g].zero);
    largest = Max(largest, groups[g].scale / limits[g]);
  }
  Mask is_pivot[kBlockGroups], none = largest == largest;  // the first group that needs the unit to be as large
  for (int g = 0; g < count; ++g) {
    is_pivot[g] = (groups[g].scale / limits[g] == largest) & none;
    none &= ~is_pivot[g];
  }
  Lanes scales[kBlockGroups] = {}, zeros[kBlockGroups] = {};
  for (const float part : kUnits) {
    const Lanes unit = RoundUnit(task, largest * part);
    Lanes total{};
    Group tried[kBlockGroups];
    for (int g = 0; g < count; ++g) {
      tried[g] = groups[g];
      tried[g].error = Set1(__builtin_inff());
      const Lanes lower = Floor(groups[g].scale / unit);
      for (const float step : {0.0f, 1.0f}) {
        const Lanes multiple = is_pivot[g] ? limits[g] : Min(Max(lower + step, Set1(1.0f)), limits[g]);
        const Lanes scale = multiple * unit;
        // A scale of its own may want another zero point, if the multiple still goes with that one.
        const Lanes moved = Clip(Round(Middle(groups[g], scale, most)), 0.0f, most);
        const Lanes limit = MostUnits(task, moved);
        const Mask fits = is_pivot[g] ? limit == multiple : limit >= multiple;
        const Lanes zero = fits && !task.symmetric ? moved : groups[g].zero;
        Take(tried[g], Error(groups[g], scale, zero, most), scale, zero);
      }
      total += tried[g].error;
    }
    const Mask better = total < least;
    least = better ? total : least;
    for (int g = 0; g < count; ++g) {
      scales[g] = better ? tried[g].scale : scales[g];
      zeros[g] = better ? tried[g].zero : zeros[g];
    }
  }
  for (int g = 0; g < count; ++g) groups[g].scale = scales[g], groups[g].zero = zeros[g];
}

// 16 outputs from ``first`` on, of which the last ones may not be there: their lanes are 0.
void LoadGroup(Group& group, Lanes* x, Lanes* weight, const Task& task, int64_t first, int64_t number) {
  const int size = task.group_size;
  const int64_t columns = task.groups * size;
  const int outputs = int(task.outputs - first < kLanes ? task.outputs - first : kLanes);
  const float* importance = task.importance + number * size;
  Lanes squares{};
  group = Group{};
  group.x = x, group.weight = weight, group.size = size;
  for (int k = 0; k < size; ++k) {
    const float* column = task.weight + first * columns + number * size + k;
    Lanes v{};
    for (int i = 0; i < outputs; ++i) v[i] = column[i * columns];
    x[k] = v;
    group.low = Min(group.low, v);
    group.high = Max(group.high, v);
    squares += v * v;
  }
  Lanes root;
  for (int i = 0; i < kLanes; ++i) root[i] = __builtin_sqrtf(squares[i] / float(size));
  for (int k = 0; k < size; ++k)
    weight[k] = importance[k] * (task.flatness < __builtin_inff() ? Max(x[k], -x[k]) + task.flatness * root : Set1(1));
}

void SearchAll(const Task& task) {
  Lanes memory[2 * kColumns];
  Group groups[kBlockGroups];
  for (int64_t first = 0; first < task.outputs; first += kLanes)
    for (int64_t block = 0; block < task.groups; block += task.together) {
      const int count = int(task.groups - block < task.together ? task.groups - block : task.together);
      for (int g = 0; g < count; ++g) {
        Lanes* x = memory + 2 * g * task.group_size;
        LoadGroup(groups[g], x, x + task.group_size, task, first, block + g);
        SearchGroup(groups[g], task);
      }
      if (task.together > 1) SearchBlock(groups, count, task);
      for (int g = 0; g < count; ++g)
        for (int i = 0; i < kLanes && first + i < task.outputs; ++i) {
          const int64_t place = (first + i) * task.groups + block + g;
          task.scales[place] = groups[g].scale[i];
          task.zero_points[place] = uint8_t(groups[g].zero[i]);
        }
    }
}

}  // namespace
