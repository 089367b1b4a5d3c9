/* Encoder of NVFP4. Included once for each instruction set, after encode_blocks.h. */

/* The E4M3 code of x, rounded down, and the value of a code; 0 ≤ x, 0 ≤ code ≤ 126. As in binary16, the codes are the
 * upper bits of a float32 with another bias. */
LANES_INLINE ints e4m3_floor(floats x) {
    ints normal = ((ints)x - (120 << 23)) >> 20, subnormal = to_ints(smaller(x, all(1.0f)) * 0x1p9f);
    return choose_ints(x < 0x1p-6f, subnormal, normal);
}

LANES_INLINE floats e4m3_value(ints code) { return (floats)(code << 20) * 0x1p120f; }

/* The code of the scale with the least error, for groups of 16 whose x are divided by the multiplier already. Codes are
 * steps of an eighth of an octave or less. Tried are eight: from one below that which puts the largest element on 6,
 * the largest E2M1, where it is clipped, to six above it, where it lies on 4 (four over six) or lower. With an
 * importance matrix the largest element may be one that hardly matters, and twelve are tried, from three below to eight
 * above. */
LANES_INLINE ints search_e4m3(const group_batch *batch, bool weighed) {
    const int n_codes = weighed ? 12 : 8;
    ints start = e4m3_floor(magnitude(extreme(batch->x, 16)) * (1.0f / 6.0f)) - (weighed ? 3 : 1);
    ints best = {0};
    floats gain = {0};
    for (int first = 0; first < n_codes; first += TRIALS_AT_ONCE) {
        floats scale[TRIALS_AT_ONCE], inverse_scale[TRIALS_AT_ONCE];
        scale_sums sums[TRIALS_AT_ONCE];
        ints code[TRIALS_AT_ONCE];
        for (int i = 0; i < TRIALS_AT_ONCE; i++) {
            code[i] = start + (first + i);
            code[i] = choose_ints(code[i] < 1, (ints){0} + 1, code[i]);
            code[i] = choose_ints(code[i] > DG_E4M3_MAX_CODE, (ints){0} + DG_E4M3_MAX_CODE, code[i]);
            scale[i] = 0.5f * e4m3_value(code[i]); /* the levels are doubled */
            inverse_scale[i] = inverse(scale[i]);
        }
        sum_trials(LEVELS_E2M1, batch->x, batch->w, 16, TRIALS_AT_ONCE, inverse_scale, sums);
        for (int i = 0; i < TRIALS_AT_ONCE; i++) {
            floats trial_gain = scale_gain(scale[i], &sums[i]);
            ints better = trial_gain > gain;
            best = choose_ints(better, code[i], best);
            gain = choose(better, trial_gain, gain);
        }
    }
    return best;
}

static void encode_nvfp4(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_nvfp4 *blocks = dst;
    for (int64_t g = 0; g < n / 16; g += N_LANES) {
        int n_groups = batch_size(n / 16 - g);
        float scaled[16 * N_LANES];
        for (int j = 0; j < 16 * n_groups; j++) scaled[j] = src[16 * g + j] * inverse_multiplier;
        group_batch batch;
        load_batch(&batch, scaled, at(weights, 16 * g), n_groups, 16);
        ints code = search_e4m3(&batch, weights != NULL);
        float inverse_scale[N_LANES];
        store(inverse_scale, inverse(0.5f * e4m3_value(code)));

        for (int i = 0; i < n_groups; i++) {
            dg_block_nvfp4 *block = blocks + (g + i) / 4;
            int64_t group = (g + i) % 4;
            uint8_t codes[16], *qs = block->qs + 8 * group;
            store_codes(LEVELS_E2M1, scaled + 16 * i, 16, inverse_scale[i], codes);
            block->scales[group] = (uint8_t)code[i];
            for (int j = 0; j < 8; j++) qs[j] = (uint8_t)(codes[j] | codes[j + 8] << 4);
        }
    }
}
