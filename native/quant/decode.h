/* The decoders behind dg_type_traits. Each decodes n elements, a multiple of the type's block size. */
#ifndef DG_QUANT_DECODE_H
#define DG_QUANT_DECODE_H

#include <stdint.h>

void dg_decode_f32(const void *src, float *dst, int64_t n);
void dg_decode_f16(const void *src, float *dst, int64_t n);
void dg_decode_bf16(const void *src, float *dst, int64_t n);
void dg_decode_q4_0(const void *src, float *dst, int64_t n);
void dg_decode_q4_1(const void *src, float *dst, int64_t n);
void dg_decode_q5_0(const void *src, float *dst, int64_t n);
void dg_decode_q5_1(const void *src, float *dst, int64_t n);
void dg_decode_q8_0(const void *src, float *dst, int64_t n);
void dg_decode_iq4_nl(const void *src, float *dst, int64_t n);
void dg_decode_nvfp4(const void *src, float *dst, int64_t n);

void dg_decode_q2_k(const void *src, float *dst, int64_t n);
void dg_decode_q3_k(const void *src, float *dst, int64_t n);
void dg_decode_q4_k(const void *src, float *dst, int64_t n);
void dg_decode_q5_k(const void *src, float *dst, int64_t n);
void dg_decode_q6_k(const void *src, float *dst, int64_t n);
void dg_decode_iq4_xs(const void *src, float *dst, int64_t n);

void dg_decode_iq2_xxs(const void *src, float *dst, int64_t n);
void dg_decode_iq2_xs(const void *src, float *dst, int64_t n);
void dg_decode_iq2_s(const void *src, float *dst, int64_t n);
void dg_decode_iq3_xxs(const void *src, float *dst, int64_t n);
void dg_decode_iq3_s(const void *src, float *dst, int64_t n);

#endif
