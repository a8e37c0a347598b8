// What choosing a token takes of a row of n floats. Compiled with the flags of every instruction set: no inline function here.
#pragma once
#include <cstdint>

namespace octavo {

// Sums and maxima are kept for runs of this many elements, the last perhaps shorter.
inline constexpr int kRun = 128;

struct SampleKernels {
  // The largest element; NaN where any is one. peaks[r] is the largest of run r that is a number. Unless `copy` is null, x is copied there.
  float (*highest)(const float* x, int n, float* peaks, float* copy);
  // Index of the first element equal to `value`; n where none is.
  int (*find)(const float* x, int n, float value);
  int (*count_above)(const float* x, int n, float value);
  // w[i] = exp((x[i] − best)·inverse) for x ≤ best; sums[r] of run r, in one tree. `ahead`, of as many elements, is asked for meanwhile; it may be
  // null, and so may w.
  void (*weigh)(const float* x, int n, float best, float inverse, const float* ahead, float* w, float* sums);
  // The sum of the elements that are `least` or more (> 0), within a few millionths, and how many they are. No element of run r is above bounds[r].
  double (*mass_from)(const float* w, int n, const float* bounds, float least, int* count);
  // sums[r] of run r's elements that are `least` or more.
  void (*sums_from)(const float* w, int n, const float* bounds, float least, float* sums);
  // The indices of elements that are `least` or more and less than `end` (or end is +inf), ascending; how many they are.
  int (*collect)(const float* x, int n, const float* bounds, float least, float end, std::int32_t* indices);
};

}  // namespace octavo
