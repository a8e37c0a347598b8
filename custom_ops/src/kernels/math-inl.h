// exp and tanh: polynomials of our own, so that every instruction set gives the same bits.
#pragma once

namespace octavo::OCTAVO_TARGET {

inline constexpr float kInfinity = __builtin_inff();

// exp(x) for x ≤ 0: 2^n·exp(r), r = x − n·ln 2 in two parts, |r| ≤ ln 2 / 2; relative error of the polynomial 3e-9, exp(0) is exactly 1.
// Below −87 (2^-126 is near) the result is 0, so no denormal is ever made; NaN stays NaN.
OCTAVO_INLINE Vec exp_nonpositive(Vec x) {
  const Vec shift = broadcast(12582912.0f);  // 1.5·2^23: rounds to an integer, and leaves it in the low bits
  const Vec t = fma(x, broadcast(1.44269504f), shift);
  const Vec n = sub(t, shift);
  const Vec r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
  Vec p = broadcast(1.3813878176733851e-3f);
  p = fma(p, r, broadcast(8.369063958525658e-3f));
  p = fma(p, r, broadcast(4.166842252016068e-2f));
  p = fma(p, r, broadcast(0.166665181517601f));
  p = fma(p, r, broadcast(0.4999999403953552f));
  const Vec e = add(fma(mul(r, r), p, r), broadcast(1.0f));
  return select(less(x, broadcast(-87.0f)), broadcast(0.0f), scale_by_power(e, t));
}

// An odd polynomial near 0, elsewhere (1 − e) / (1 + e) with e = exp(−2|x|); the two meet below 0.597, the end of the polynomial's fit.
OCTAVO_INLINE Vec tanh(Vec x) {
  const Vec magnitude = absolute(x), one = broadcast(1.0f);
  const Vec e = exp_nonpositive(mul(magnitude, broadcast(-2.0f)));
  const Vec far = copy_sign(div(sub(one, e), add(one, e)), x);
  const Vec z = mul(x, x);
  Vec p = broadcast(-5.928534548729658e-3f);
  p = fma(p, z, broadcast(2.0823126658797264e-2f));
  p = fma(p, z, broadcast(-5.3791407495737076e-2f));
  p = fma(p, z, broadcast(0.13332006335258484f));
  p = fma(p, z, broadcast(-0.33333301544189453f));
  const Vec near = fma(mul(x, z), p, x);
  return select(less(magnitude, broadcast(0.59f)), near, far);
}

}  // namespace octavo::OCTAVO_TARGET
