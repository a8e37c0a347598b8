// What choosing a token takes of a row of n floats. Compiled with the flags of every instruction set: no inline function here.
#pragma once
#include <cstdint>

namespace octavo {

// Sums and maxima are kept for runs of this many elements, the last perhaps shorter.
inline constexpr int kRun = 128;

struct SampleKernels {
  // The largest element; NaN where any is one.
  float (*highest)(const float* x, int n);
  // Index of the first element equal to `value`; n where none is.
  int (*find)(const float* x, int n, float value);
  int (*count_above)(const float* x, int n, float value);
  // peaks[r] is the largest element of run r.
  void (*peaks)(const float* x, int n, float* peaks);
  // w[i] = exp((x[i] − best)·inverse) for x ≤ best; sums[r] of run r, in one tree.
  void (*weigh)(const float* x, int n, float best, float inverse, float* w, float* sums);
  // The sum of the elements that are `least` or more, within a few millionths.
  double (*mass_from)(const float* w, int n, float least);
  // The indices of elements that are `least` or more, ascending; how many they are.
  int (*collect)(const float* x, int n, float least, std::int32_t* indices);
};

}  // namespace octavo
