/* Encoders of the codebook formats IQ2 and IQ3. Included once for each instruction set, after encode_super.h.
 *
 * A vector of 8 or 4 magnitudes a, with weights w, becomes s · m for a point m of the codebook. It explains
 *
 *     2 s Σ w a m − s² Σ w m²
 *
 * of Σ w a². Neither sum depends on the scale s, so both are formed once for every point, and the best point is then
 * found exactly for every scale that is tried. A unit of 32 elements is looked at a time. */

#include "quant/iq_grids.h"

#define IQ_UNIT 32
#define IQ_SCALES 16     /* that are tried for a group */
#define IQ_REFINEMENTS 2 /* points and scale by turns */

/* A codebook: its code c stands for base + step · c, and for `extra` more if it is the last. */
typedef struct codebook {
    const uint16_t *grid;
    int n_points, size, bits; /* size: elements of a point */
    float base, step, extra;
    int last;
    int group;         /* elements that share a scale */
    bool even;         /* the signs of eight elements make an even number */
    float low, factor; /* x = d · factor · (low + code) · ± m, code in 0 … 15 */
} codebook;

/* Of one unit: the sums of every vector for all points, the magnitudes they are of, and the signs of eight at a time.
 */
typedef struct iq_unit {
    floats xm[8][1024 / N_LANES], mm[8][1024 / N_LANES];
    uint8_t signs[4];
    float largest[2]; /* magnitude of each group */
} iq_unit;

LANES_INLINE void take_signs(const codebook *book, const float *x, float *a, const float *w, uint8_t *signs) {
    for (int k = 0; k < IQ_UNIT / 8; k++) {
        int negative = 0, odd = 0, weakest = 0;
        for (int j = 0; j < 8; j++) {
            float value = x[8 * k + j];
            int is_negative = value < 0;
            negative |= is_negative << j;
            odd ^= is_negative;
            a[8 * k + j] = fabsf(value);
            const float *at_j = a + 8 * k + j, *at_weakest = a + 8 * k + weakest;
            if (w[8 * k + j] * *at_j * *at_j < w[8 * k + weakest] * *at_weakest * *at_weakest) weakest = j;
        }
        if (book->even && odd) { /* the one whose sign matters least has the wrong one */
            negative ^= 1 << weakest;
            a[8 * k + weakest] = -a[8 * k + weakest];
        }
        signs[k] = (uint8_t)negative;
    }
}

LANES_INLINE void form_sums(const codebook *book, const float *x, const float *w, iq_unit *unit) {
    float a[IQ_UNIT];
    take_signs(book, x, a, w, unit->signs);
    for (int g = 0; g < IQ_UNIT / book->group; g++) {
        float largest = 0.0f;
        for (int j = 0; j < book->group; j++) largest = fmaxf(largest, a[book->group * g + j]);
        unit->largest[g] = largest;
    }
    int n_vectors = IQ_UNIT / book->size, mask = (1 << book->bits) - 1;
    for (int p = 0; p < book->n_points; p += N_LANES) {
        halves packed;
        memcpy(&packed, book->grid + p, sizeof packed);
        ints points = __builtin_convertvector(packed, ints);
        floats m[8];
        for (int j = 0; j < book->size; j++) {
            ints code = points >> book->bits * j & mask;
            m[j] = book->base + book->step * to_floats(code) + (floats)((code == book->last) & (ints)all(book->extra));
        }
        for (int v = 0; v < n_vectors; v++) {
            const float *av = a + book->size * v, *wv = w + book->size * v;
            floats xm = {0}, mm = {0};
            for (int j = 0; j < book->size; j++) {
                floats wm = wv[j] * m[j];
                xm += wm * av[j];
                mm += wm * m[j];
            }
            unit->xm[v][p / N_LANES] = xm;
            unit->mm[v][p / N_LANES] = mm;
        }
    }
}

/* What the best points explain of the vectors [first, first + n) with this scale. */
LANES_INLINE float points_gain(const codebook *book, const iq_unit *unit, int first, int n, float scale) {
    float gain = 0.0f;
    for (int v = first; v < first + n; v++) {
        floats best = all(-1e30f);
        for (int p = 0; p < book->n_points / N_LANES; p++)
            best = larger(scale * (2.0f * unit->xm[v][p] - scale * unit->mm[v][p]), best);
        float most = best[0];
        for (int lane = 1; lane < N_LANES; lane++) most = best[lane] > most ? best[lane] : most;
        gain += most;
    }
    return gain;
}

/* The best points themselves, the first of equals; adds up their sums. */
LANES_INLINE void choose_points(const codebook *book, const iq_unit *unit, int first, int n, float scale,
                                uint16_t *points, float *xm, float *mm) {
    *xm = *mm = 0.0f;
    for (int v = first; v < first + n; v++) {
        floats best = all(-1e30f);
        ints index = {0};
        for (int p = 0; p < book->n_points / N_LANES; p++) {
            floats gain = scale * (2.0f * unit->xm[v][p] - scale * unit->mm[v][p]);
            ints better = gain > best;
            best = choose(better, gain, best);
            index = choose_ints(better, (ints){0} + p, index);
        }
        int lane = 0;
        for (int l = 1; l < N_LANES; l++)
            if (best[l] > best[lane] || (best[l] == best[lane] && index[l] < index[lane])) lane = l;
        points[v] = (uint16_t)(index[lane] * N_LANES + lane);
        *xm += unit->xm[v][index[lane]][lane];
        *mm += unit->mm[v][index[lane]][lane];
    }
}

/* The scale of one group with the best points, as if it could be kept. */
LANES_INLINE float search_iq_scale(const codebook *book, const iq_unit *unit, int group) {
    int n = book->group / book->size, first = group * n;
    float top = book->base + book->step * (float)book->last + book->extra;
    float unit_scale = unit->largest[group] / top, scale = 0.0f, gain = 0.0f;
    if (unit_scale < 0x1p-100f) return 0.0f;
    for (int i = 0; i < IQ_SCALES; i++) {
        float trial = unit_scale * (0.6f + 0.07f * (float)i), trial_gain = points_gain(book, unit, first, n, trial);
        if (trial_gain > gain) {
            gain = trial_gain;
            scale = trial;
        }
    }
    uint16_t points[8];
    float xm, mm;
    for (int i = 0; i < IQ_REFINEMENTS && scale > 0; i++) {
        choose_points(book, unit, first, n, scale, points, &xm, &mm);
        if (!(xm > 0 && mm > 0)) break;
        scale = xm / mm;
    }
    return scale;
}

typedef struct iq_codes {
    uint16_t d;
    uint8_t codes[16]; /* of each group */
    uint16_t points[64];
    uint8_t signs[32];
    float gain, xm, mm; /* what is explained, and the sums for the best d */
} iq_codes;

/* Codes and points of a super-block with the scale d: the codes next to each group's wanted one are tried. */
LANES_INLINE void fix_codes(const codebook *book, const float *x, const float *w, const float *wanted, float d,
                            iq_codes *out) {
    int n = book->group / book->size, groups = IQ_UNIT / book->group;
    out->d = (uint16_t)scale_bits(all(d))[0];
    d = dg_f16_to_f32(out->d);
    out->gain = out->xm = out->mm = 0.0f;
    for (int u = 0; u < SUPER_BLOCK / IQ_UNIT; u++) {
        iq_unit unit;
        form_sums(book, x + IQ_UNIT * u, w + IQ_UNIT * u, &unit);
        memcpy(out->signs + 4 * u, unit.signs, 4);
        for (int g = 0; g < groups; g++) {
            int index = u * groups + g, best = 0;
            float start = d > 0 ? wanted[index] / (d * book->factor) - book->low : 0.0f, gain = -1e30f;
            int middle = (int)fminf(fmaxf(rounded(all(start))[0], 0.0f), 15.0f);
            for (int code = middle > 0 ? middle - 1 : 0; code <= (middle < 15 ? middle + 1 : 15); code++) {
                float s = d * book->factor * (book->low + (float)code);
                float trial = points_gain(book, &unit, g * n, n, s);
                if (trial > gain) {
                    gain = trial;
                    best = code;
                }
            }
            float value = book->factor * (book->low + (float)best), xm, mm;
            uint16_t points[8];
            choose_points(book, &unit, g * n, n, d * value, points, &xm, &mm);
            memcpy(out->points + index * n, points + g * n, sizeof *points * (size_t)n);
            out->codes[index] = (uint8_t)best;
            out->gain += gain;
            out->xm += value * xm;
            out->mm += value * value * mm;
        }
    }
}

LANES_INLINE void search_iq(const codebook *book, const float *x, const float *weights, iq_codes *out) {
    float ones[SUPER_BLOCK], wanted[16], most = 0.0f;
    for (int j = 0; j < SUPER_BLOCK; j++) ones[j] = 1.0f;
    const float *w = weights != NULL ? weights : ones;
    int groups = IQ_UNIT / book->group;
    for (int u = 0; u < SUPER_BLOCK / IQ_UNIT; u++) {
        iq_unit unit;
        form_sums(book, x + IQ_UNIT * u, w + IQ_UNIT * u, &unit);
        for (int g = 0; g < groups; g++) {
            wanted[u * groups + g] = search_iq_scale(book, &unit, g);
            most = fmaxf(most, wanted[u * groups + g]);
        }
    }
    float d = most / (book->factor * (book->low + 15.0f));
    fix_codes(book, x, w, wanted, d, out);
    if (out->mm > 0 && out->xm > 0) { /* the best d for these codes and points, if its own are better */
        iq_codes again;
        fix_codes(book, x, w, wanted, out->xm / out->mm, &again);
        if (again.gain > out->gain) *out = again;
    }
}

static void encode_iq2_xs(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    const codebook book = {iq2_xs_grid, 512, 8, 2, 8, 17, 1, 2, 16, true, 0.5f, 0.25f};
    dg_block_iq2_xs *block = dst;
    for (int64_t i = 0; i < n; i += SUPER_BLOCK, block++) {
        iq_codes found;
        search_iq(&book, src + i, at(weights, i), &found);
        block->d = found.d;
        for (int k = 0; k < 32; k++) block->qs[k] = (uint16_t)(found.points[k] | (found.signs[k] & 127) << 9);
        for (int j = 0; j < 8; j++) block->scales[j] = (uint8_t)(found.codes[2 * j] | found.codes[2 * j + 1] << 4);
    }
}

static void encode_iq2_s(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    const codebook book = {iq2_s_grid, 1024, 8, 2, 8, 17, 1, 2, 16, false, 0.5f, 0.25f};
    dg_block_iq2_s *block = dst;
    for (int64_t i = 0; i < n; i += SUPER_BLOCK, block++) {
        iq_codes found;
        search_iq(&book, src + i, at(weights, i), &found);
        block->d = found.d;
        memset(block->qh, 0, sizeof block->qh);
        for (int k = 0; k < 32; k++) {
            block->qs[k] = (uint8_t)found.points[k];
            block->qh[k / 4] |= (uint8_t)(found.points[k] >> 8 << 2 * (k % 4));
            block->signs[k] = found.signs[k];
        }
        for (int j = 0; j < 8; j++) block->scales[j] = (uint8_t)(found.codes[2 * j] | found.codes[2 * j + 1] << 4);
    }
}

static void encode_iq3_xxs(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    const codebook book = {iq3_xxs_grid, 256, 4, 3, 4, 8, 2, 7, 32, true, 0.5f, 0.5f};
    dg_block_iq3_xxs *block = dst;
    for (int64_t i = 0; i < n; i += SUPER_BLOCK, block++) {
        iq_codes found;
        search_iq(&book, src + i, at(weights, i), &found);
        block->d = found.d;
        for (int k = 0; k < 64; k++) block->qs[k] = (uint8_t)found.points[k];
        for (int g = 0; g < 8; g++) {
            uint32_t number = (uint32_t)found.codes[g] << 28;
            for (int k = 0; k < 4; k++) number |= (uint32_t)(found.signs[4 * g + k] & 127) << 7 * k;
            block->signs_scales[g] = number;
        }
    }
}

static void encode_iq3_s(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    const codebook book = {iq3_s_grid, 512, 4, 3, 1, 2, 0, 7, 32, false, 0.5f, 2.0f};
    dg_block_iq3_s *block = dst;
    for (int64_t i = 0; i < n; i += SUPER_BLOCK, block++) {
        iq_codes found;
        search_iq(&book, src + i, at(weights, i), &found);
        block->d = found.d;
        memset(block->qh, 0, sizeof block->qh);
        for (int k = 0; k < 64; k++) {
            block->qs[k] = (uint8_t)found.points[k];
            block->qh[k / 8] |= (uint8_t)(found.points[k] >> 8 << k % 8);
        }
        memcpy(block->signs, found.signs, sizeof block->signs);
        for (int j = 0; j < 4; j++) block->scales[j] = (uint8_t)(found.codes[2 * j] | found.codes[2 * j + 1] << 4);
    }
}
