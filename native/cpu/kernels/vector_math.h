/* exp, tanh and GELU on vectors, from the operations of simd_*.h alone: the same results on every instruction set that
 * has fused multiply-add. */
#ifndef DG_CPU_VECTOR_MATH_H
#define DG_CPU_VECTOR_MATH_H

/* exp(x), relative error below 2e-7; 0 for x < −87, and x is taken as at most 88. */
static inline vf vf_exp(vf x) {
    const vf lowest = vf_set(-87.0f);
    vf clamped = vf_min(vf_max(x, lowest), vf_set(88.0f));
    vi exponent = vi_from_float(vf_mul(clamped, vf_set(1.44269504f)));
    vf n = vf_from_int(exponent);
    /* ln 2 in two parts, the first with few enough bits that n times it is exact */
    vf r = vf_fma(n, vf_set(-0.693359375f), clamped);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    /* exp on ±ln(2)/2: the minimax polynomial of the Cephes library */
    vf p = vf_set(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set(5.0000001201e-1f));
    p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set(1.0f)));
    return vf_where_less(x, lowest, vf_set(0.0f), vf_mul(p, vf_power_of_two(exponent)));
}

/* tanh(x), absolute error below 3e-7 and relative error below 1e-6 */
static inline vf vf_tanh(vf x) {
    vf magnitude = vf_abs(x), square = vf_mul(x, x);
    /* Near zero 1 − 2/(e^2x + 1) would cancel: the odd polynomial of the Cephes library instead. */
    vf p = vf_set(-5.70498872745e-3f);
    p = vf_fma(p, square, vf_set(2.06390887954e-2f));
    p = vf_fma(p, square, vf_set(-5.37397155531e-2f));
    p = vf_fma(p, square, vf_set(1.33314422036e-1f));
    p = vf_fma(p, square, vf_set(-3.33332819422e-1f));
    vf small = vf_fma(vf_mul(p, square), x, x);
    vf e = vf_exp(vf_add(magnitude, magnitude));
    vf large = vf_sub(vf_set(1.0f), vf_div(vf_set(2.0f), vf_add(e, vf_set(1.0f))));
    large = vf_where_less(x, vf_set(0.0f), vf_sub(vf_set(0.0f), large), large);
    return vf_where_less(magnitude, vf_set(0.625f), small, large);
}

/* x/2 · (1 + tanh u) with u = √(2/π) · (x + 0.044715 x³), written as x / (1 + e^−2u), which does not cancel */
static inline vf vf_gelu(vf x) {
    vf square = vf_mul(x, x);
    vf inner = vf_mul(x, vf_fma(square, vf_set(0.044715f), vf_set(1.0f)));
    vf e = vf_exp(vf_mul(inner, vf_set(-1.5957691216f)));
    return vf_div(x, vf_add(e, vf_set(1.0f)));
}

#endif
