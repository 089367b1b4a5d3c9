/* Operations on rows of floats. Included by body.h, once for each instruction set. */

static void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *out) {
    enum { SUMS = 32 / LANES }; /* 32 partial sums whatever the vectors: the same result on all of them */
    vf sums[SUMS];
    for (int k = 0; k < SUMS; k++) sums[k] = vf_set(0);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < SUMS; k++) {
            vf v = vf_load(x + i + k * LANES);
            sums[k] = vf_fma(v, v, sums[k]);
        }
    float partial[32];
    for (int k = 0; k < SUMS; k++) vf_store(partial + k * LANES, sums[k]);
    double total = 0;
    for (int k = 0; k < 32; k++) total += (double)partial[k];
    for (; i < n; i++) total += (double)x[i] * (double)x[i];

    float factor = (float)(1.0 / sqrt(total / (double)n + (double)eps));
    vf factors = vf_set(factor);
    for (i = 0; i + LANES <= n; i += LANES) {
        vf v = vf_mul(vf_load(x + i), factors);
        vf_store(out + i, weight != NULL ? vf_mul(v, vf_load(weight + i)) : v);
    }
    for (; i < n; i++) out[i] = weight != NULL ? x[i] * factor * weight[i] : x[i] * factor;
}

static void gelu_multiply(const float *gate, const float *up, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_store(out + i, vf_mul(vf_gelu(vf_load(gate + i)), vf_load(up + i)));
    int left = (int)(n - i);
    if (left > 0)
        vf_store_part(out + i, vf_mul(vf_gelu(vf_load_part(gate + i, left)), vf_load_part(up + i, left)), left);
}

static void add(const float *a, const float *b, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

static void scale(const float *a, float factor, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = a[i] * factor;
}

static void add_scaled(const float *a, float factor, int64_t n, float *out) {
    int64_t i = 0;
    vf factors = vf_set(factor);
    for (; i + LANES <= n; i += LANES) vf_store(out + i, vf_fma(vf_load(a + i), factors, vf_load(out + i)));
    int left = (int)(n - i);
    if (left > 0) vf_store_part(out + i, vf_fma(vf_load_part(a + i, left), factors, vf_load_part(out + i, left)), left);
}

static void rotate(float *x, int64_t half, const float *cosine, const float *sine, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

static float largest(const float *x, int64_t n) {
    int64_t i = 0;
    vf m = vf_set(-INFINITY);
    for (; i + LANES <= n; i += LANES) m = vf_max(m, vf_load(x + i));
    float r = vf_largest(m);
    for (; i < n; i++) r = x[i] > r ? x[i] : r;
    return r;
}

static void exponentials(const float *z, int64_t n, float max, float *out) {
    int64_t i = 0;
    vf maxima = vf_set(max);
    for (; i + LANES <= n; i += LANES) vf_store(out + i, vf_exp(vf_sub(vf_load(z + i), maxima)));
    int left = (int)(n - i);
    if (left > 0) vf_store_part(out + i, vf_exp(vf_sub(vf_load_part(z + i, left), maxima)), left);
}

static float softmax(float *x, int64_t n) {
    exponentials(x, n, largest(x, n), x);
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i];
    return (float)sum;
}

typedef struct soft_cap {
    vf inverse, cap, temperature;
} soft_cap;

static inline soft_cap soft_cap_of(float cap, float temperature) {
    return (soft_cap){vf_set(1.0f / cap), vf_set(cap), vf_set(temperature)};
}
ALWAYS_INLINE vf capped(vf z, const soft_cap *c) {
    return vf_div(vf_mul(vf_tanh(vf_mul(z, c->inverse)), c->cap), c->temperature);
}

static void softcap(float *z, int64_t n, float cap, float temperature) {
    const soft_cap c = soft_cap_of(cap, temperature);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_store(z + i, capped(vf_load(z + i), &c));
    int left = (int)(n - i);
    if (left > 0) vf_store_part(z + i, capped(vf_load_part(z + i, left), &c), left);
}

static void head_statistics(const float *z, int32_t n, int32_t first_token, dg_block_statistics *block) {
    const float max = largest(z, n);
    const vf maxima = vf_set(max);
    vf sum = vf_set(0), weighted = vf_set(0);
    int32_t argmax = 0, i = 0;
    while (argmax < n - 1 && z[argmax] != max) argmax++;
    for (; i + LANES <= n; i += LANES) {
        vf below = vf_sub(vf_load(z + i), maxima), e = vf_exp(below);
        sum = vf_add(sum, e);
        weighted = vf_fma(e, below, weighted);
    }
    float sums[2] = {vf_sum(sum), vf_sum(weighted)};
    for (; i < n; i++) {
        float below = z[i] - max, e = expf(below);
        sums[0] += e;
        sums[1] += e * below;
    }
    *block = (dg_block_statistics){max, sums[0], sums[1], first_token + argmax};
}

/* ---- Rows of the cache --------------------------------------------------------------------------------------- */

static void store_q8_0(const float *x, int32_t n, dg_block_q8_0 *block) {
    for (int32_t first = 0; first < n; first += 32, block++) {
        int32_t in_block = n - first < 32 ? n - first : 32;
        float amax = 0;
        for (int32_t j = 0; j < in_block; j++) amax = fabsf(x[first + j]) > amax ? fabsf(x[first + j]) : amax;
        uint16_t d = dg_f32_to_f16(amax / 127.0f);
        float scale = dg_f16_to_f32(d), inverse = scale > 0 ? 1.0f / scale : 0.0f;
        memset(block->qs, 0, sizeof block->qs);
        block->d = d;
        for (int32_t j = 0; j < in_block; j++) {
            float q = rintf(x[first + j] * inverse);
            block->qs[j] = (int8_t)(q > 127 ? 127 : q < -127 ? -127 : q);
        }
    }
}

static void store_cache(int32_t type, const float *x, int32_t n, void *row) {
    uint16_t *halves = row;
    int32_t i = 0;
    switch (type) {
    case DG_TYPE_F32:
        memcpy(row, x, (size_t)n * sizeof *x);
        break;
    case DG_TYPE_F16:
        for (; i + LANES <= n; i += LANES) vf_store_f16(halves + i, vf_load(x + i));
        for (; i < n; i++) halves[i] = dg_f32_to_f16(x[i]);
        break;
    case DG_TYPE_BF16:
        for (; i < n; i++) halves[i] = dg_f32_to_bf16(x[i]);
        break;
    default:
        store_q8_0(x, n, row);
        break;
    }
}

static void load_q8_0(const dg_block_q8_0 *block, int32_t n, float *x) {
    for (int32_t first = 0; first < n; first += 32, block++) {
        float d = dg_f16_to_f32(block->d);
        int32_t in_block = n - first < 32 ? n - first : 32;
        for (int32_t j = 0; j < in_block; j++) x[first + j] = d * (float)block->qs[j];
    }
}

static void load_cache(int32_t type, const void *row, int32_t n, float *x) {
    const uint16_t *halves = row;
    int32_t i = 0;
    switch (type) {
    case DG_TYPE_F32:
        memcpy(x, row, (size_t)n * sizeof *x);
        break;
    case DG_TYPE_F16:
        for (; i + LANES <= n; i += LANES) vf_store(x + i, vf_load_f16(halves + i));
        for (; i < n; i++) x[i] = dg_f16_to_f32(halves[i]);
        break;
    case DG_TYPE_BF16:
        for (; i + LANES <= n; i += LANES) vf_store(x + i, vf_load_bf16(halves + i));
        for (; i < n; i++) x[i] = dg_bf16_to_f32(halves[i]);
        break;
    default:
        load_q8_0(row, n, x);
        break;
    }
}
