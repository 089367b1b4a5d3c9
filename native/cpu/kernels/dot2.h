/* Sums of products of 16-bit integers by pairs, for several rows at once. Included by body.h where a simd_*.h says
 * HAS_PAIRS; its FUSED_DOT2 says whether vi_dot2 is one instruction. */

_Static_assert(VECTORS == 2, "two vectors meet each word");

/* sum[r] += a, b · words[r · stride], pair by pair, for n_rows (a compile-time constant) rows.
 *
 * Where product and sum are two instructions, those of some rows come before their sums: a processor whose multipliers
 * add as well hands out instructions as they come, and multipliers are what is scarce. */
ALWAYS_INLINE void add_dot2(const int n_rows, vi a, vi b, const int32_t *words, int64_t stride, vi sum[][2]) {
#if FUSED_DOT2
    UNROLL
    for (int r = 0; r < n_rows; r++) {
        const vi word = vi_set(words[r * stride]);
        sum[r][0] = vi_dot2(sum[r][0], a, word);
        sum[r][1] = vi_dot2(sum[r][1], b, word);
    }
#else
    const int at_once = n_rows % 3 == 0 ? 3 : 1; /* as there are registers for products */
    UNROLL
    for (int first = 0; first < n_rows; first += at_once) {
        const int end = first + at_once < n_rows ? first + at_once : n_rows;
        vi product[3][2];
        UNROLL
        for (int r = first; r < end; r++) {
            const vi word = vi_set(words[r * stride]);
            product[r - first][0] = vi_product2(a, word);
            product[r - first][1] = vi_product2(b, word);
            KEEP_IN_REGISTERS(product[r - first][0]);
            KEEP_IN_REGISTERS(product[r - first][1]);
        }
        UNROLL
        for (int r = first; r < end; r++) {
            sum[r][0] = vi_add(sum[r][0], product[r - first][0]);
            sum[r][1] = vi_add(sum[r][1], product[r - first][1]);
            KEEP_IN_REGISTERS(sum[r][0]); /* or gcc adds products up in pairs, in more registers */
            KEEP_IN_REGISTERS(sum[r][1]);
        }
    }
#endif
}
