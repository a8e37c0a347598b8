// Register tiles have sizes known at compile time.
#pragma once
#include <type_traits>

namespace octavo::OCTAVO_TARGET {

// Calls body(integral_constant<n>) for 1 ≤ n ≤ Max.
template <int Max, class Body>
OCTAVO_INLINE void with_size(int n, const Body& body) {
  if constexpr (Max > 1) {
    if (n < Max) return with_size<Max - 1>(n, body);
  }
  body(std::integral_constant<int, Max>{});
}

}  // namespace octavo::OCTAVO_TARGET
