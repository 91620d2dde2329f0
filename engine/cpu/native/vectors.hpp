// bfloat16 in memory, float32 in registers: loads, stores and the few functions that the decoder needs.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

using bf16 = std::uint16_t;

constexpr float kLog2E = 1.44269504f;

// The lanes of a vector of 16 that hold values when `left` of them remain.
inline __mmask16 lanes(long left) { return left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1); }

inline __m512 widen(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

inline __m512 load(const bf16* source) { return widen(_mm256_loadu_si256((const __m256i*)source)); }

inline __m512 load(const bf16* source, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, source)); }

inline void store(bf16* target, __m512 values, __mmask16 mask = 0xffff) {
    _mm256_mask_storeu_epi16(target, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

inline __m512bh load_pairs(const bf16* source) { return (__m512bh)_mm512_loadu_si512(source); }

inline __m512bh load_pairs(const bf16* source, __mmask32 mask) {
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, source);
}

inline float rounded(float value) {  // to bfloat16 and back
    return _mm512_cvtss_f32(widen((__m256i)_mm512_cvtneps_pbh(_mm512_set1_ps(value))));
}

// 2^x: the fraction by a polynomial of degree 6 (relative error 2e-7), the whole part by the exponent. 2^-inf = 0.
inline __m512 exp2(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.54035304e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.33335581e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.61812911e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.55041087e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.40226507e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.93147181e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

// 2^x for finite x <= 0, to what is left of it in bfloat16: a polynomial of degree 3 (relative error 1e-4).
inline __m512 exp2_rough(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(5.51716600e-2f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.42611120e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.93260990e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.99928070e-1f));
    return _mm512_scalef_ps(y, whole);
}

inline __m512 silu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp2(_mm512_mul_ps(x, _mm512_set1_ps(-kLog2E)))));
}

// 1 / rms(x), as a factor.
inline float inverse_rms(const float* x, long size, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < size; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(lanes(size - i), x + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    return 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / float(size) + eps);
}

// Lane i of the result is the sum of all lanes of v[i]. `v` is overwritten.
inline __m512 sums_of_16(__m512* v) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {  // lane 4k + j: halves of v[i] (j even) and v[i + 8] (j odd)
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 8]), _mm512_unpackhi_ps(v[i], v[i + 8]));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 4]), _mm512_unpackhi_ps(v[i], v[i + 4]));
    }  // each 128-bit lane of v[i]: parts of i, i + 4, i + 8, i + 12
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 2], 0x88), _mm512_shuffle_f32x4(v[i], v[i + 2], 0xdd));
    }  // 128-bit lanes: two of i, two of i + 2
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
    // 128-bit lanes are 0, 2, 1, 3 here, and each holds i, i + 4, i + 8, i + 12
    const __m512i order = _mm512_set_epi32(15, 7, 11, 3, 14, 6, 10, 2, 13, 5, 9, 1, 12, 4, 8, 0);
    return _mm512_permutexvar_ps(order, sums);
}

// Lane j of v[i] and lane i of v[j] change places.
inline void transpose_16(__m512i* v) {
    __m512i w[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {  // pairs of rows: 32-bit lanes
        w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // fours of rows: 64-bit lanes; v[i + j]: lanes j, j + 4, j + 8, j + 12
        v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {  // 128-bit lanes
        const __m512i a = _mm512_shuffle_i32x4(v[j], v[j + 4], 0x88), b = _mm512_shuffle_i32x4(v[j], v[j + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0xdd);
        w[j] = _mm512_shuffle_i32x4(a, c, 0x88);       // lane j of every row
        w[j + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);   // lane j + 8
        w[j + 4] = _mm512_shuffle_i32x4(b, d, 0x88);   // lane j + 4
        w[j + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);  // lane j + 12
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = w[i];
}
