/* Loops that do nothing but multiply, from registers, to learn what the machine can do at most. Included by body.h,
 * once for each instruction set. Each returns the operations it has done, two for a multiply-add, and writes its sums
 * to `sink` so that they are not optimised away. */

#define CHAINS 12 /* independent sums: more than latency × instructions a cycle of the machines known */

static double peak_f32(int64_t n_rounds, float *sink) {
    vf sum[CHAINS], a = vf_set(0.999f), b = vf_set(1e-3f);
    UNROLL
    for (int i = 0; i < CHAINS; i++) sum[i] = vf_set((float)i);
    for (int64_t round = 0; round < n_rounds; round++) {
        UNROLL
        for (int i = 0; i < CHAINS; i++) sum[i] = vf_fma(a, sum[i], b);
        KEEP_IN_REGISTERS(a);
    }
    for (int i = 0; i < CHAINS; i++) vf_store(sink, vf_add(vf_load(sink), sum[i]));
    return (double)n_rounds * CHAINS * LANES * 2;
}

#if !defined(HAS_TILES) /* amx/limits.h */
#if HAS_SHORT_SUMS
/* Codes of four bits, which are what most weights are: eight products of four bytes for each sum, which is then widened
 * and added to those of 32 bits. */
static double peak_int8(int64_t n_rounds, float *sink) {
    enum { SUMS = 6, PRODUCTS = DG_BLOCK / 4 };
    const int8_t four[4] = {1, -2, 3, -4};
    vi total[SUMS], w = vi_set(0x01020304);
    UNROLL
    for (int i = 0; i < SUMS; i++) total[i] = vi_set(i);
    for (int64_t round = 0; round < n_rounds; round++) {
        vs sum[SUMS];
        UNROLL
        for (int i = 0; i < SUMS; i++) sum[i] = vs_begin(0);
        UNROLL
        for (int k = 0; k < PRODUCTS; k++) {
            UNROLL
            for (int i = 0; i < SUMS; i++) {
                sum[i] = vs_add(sum[i], w, four);
                KEEP_IN_REGISTERS(w); /* or the compiler multiplies once for all sums */
            }
        }
        UNROLL
        for (int i = 0; i < SUMS; i++) total[i] = vi_add(total[i], vs_end(sum[i], 0));
    }
    for (int i = 0; i < SUMS; i++) vf_store(sink, vf_add(vf_load(sink), vf_from_int(total[i])));
    return (double)n_rounds * SUMS * PRODUCTS * LANES * 4 * 2;
}
#else
static double peak_int8(int64_t n_rounds, float *sink) {
#if HAS_ROW_PAIRS
    enum { PRODUCTS = 32 }; /* of an instruction */
#else
    enum { PRODUCTS = LANES * 4 };
    const int8_t four[4] = {1, -2, 3, -4};
#endif
    vi sum[CHAINS], w = vi_set(0x01020304);
    UNROLL
    for (int i = 0; i < CHAINS; i++) sum[i] = vi_set(i);
    for (int64_t round = 0; round < n_rounds; round++) {
        UNROLL
        for (int i = 0; i < CHAINS; i++) {
#if HAS_ROW_PAIRS
            sum[i] = vi_dot8_pairs(sum[i], w, w);
#else
            sum[i] = vi_dot4(sum[i], w, four, Q8_OFFSET == 0);
#endif
            KEEP_IN_REGISTERS(w); /* or the compiler multiplies once for all sums */
        }
    }
    for (int i = 0; i < CHAINS; i++) vf_store(sink, vf_add(vf_load(sink), vf_from_int(sum[i])));
    return (double)n_rounds * CHAINS * PRODUCTS * 2;
}
#endif

static double peak_bf16(int64_t n_rounds, float *sink) {
#if defined(__AVX512BF16__)
    __m512 sum[CHAINS];
    __m512bh w = (__m512bh)_mm512_set1_epi16(0x3f80), x = (__m512bh)_mm512_set1_epi16(0x3c00);
    UNROLL
    for (int i = 0; i < CHAINS; i++) sum[i] = vf_set((float)i);
    for (int64_t round = 0; round < n_rounds; round++) {
        UNROLL
        for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_dpbf16_ps(sum[i], w, x);
        KEEP_IN_REGISTERS(x);
    }
    for (int i = 0; i < CHAINS; i++) vf_store(sink, vf_add(vf_load(sink), sum[i]));
    return (double)n_rounds * CHAINS * LANES * 2 * 2;
#else
    (void)n_rounds;
    (void)sink;
    return 0;
#endif
}
#endif
