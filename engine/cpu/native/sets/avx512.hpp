// Vectors of 16 in AVX-512 with its bfloat16 products: one register each.
#pragma once

#include "sets/eights.hpp"

using Vector = __m512;     // 16 float32; + - * / are the compiler's
using Pairs = __m512i;     // 16 pairs of bfloat16
using Lanes = __mmask16;   // some of 16
using Values = __mmask32;  // the first few of 32 bfloat16

inline Lanes between(long first, long last) {  // within 16, whatever the ends
    const auto below = [](long end) { return end >= 16 ? 0xffffu : end <= 0 ? 0u : (1u << end) - 1; };
    return Lanes(below(last) & ~below(first));
}
inline Lanes lanes(long left) { return between(0, left); }  // those that hold values when `left` remain
inline Values first_values(long left) { return left >= 32 ? ~Values(0) : (Values(1) << left) - 1; }

inline Vector repeat(float value) { return _mm512_set1_ps(value); }
inline Vector widen(__m256i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }

inline Vector load(const float* source) { return _mm512_loadu_ps(source); }
inline Vector load(const float* source, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, source); }
inline Vector load(const bf16* source) { return widen(_mm256_loadu_si256((const __m256i*)source)); }
inline Vector load(const bf16* source, Lanes lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, source)); }
inline void store(float* target, Vector values) { _mm512_storeu_ps(target, values); }
inline void store(float* target, Vector values, Lanes lanes) { _mm512_mask_storeu_ps(target, lanes, values); }
inline void store(bf16* target, Vector values) { _mm256_storeu_si256((__m256i*)target, (__m256i)_mm512_cvtneps_pbh(values)); }
inline void store(bf16* target, Vector values, Lanes lanes) {
    _mm256_mask_storeu_epi16(target, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}
inline void store(bf16* target, Vector one, Vector next) {  // side by side
    _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh(next, one));
}
inline void store(bf16* target, __m256 values) { _mm_storeu_si128((__m128i*)target, (__m128i)_mm256_cvtneps_pbh(values)); }

inline Vector select(Lanes lanes, Vector values, Vector others) { return _mm512_mask_blend_ps(lanes, others, values); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector fms(Vector a, Vector b, Vector c) { return _mm512_fmsub_ps(a, b, c); }
inline Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector min(Vector a, Vector b) { return _mm512_min_ps(a, b); }  // of NaN and another the second, as max
inline Vector nearest(Vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector times_power(Vector y, Vector whole) { return _mm512_scalef_ps(y, whole); }  // y * 2^whole
inline Vector times_normal_power(Vector y, Vector whole) { return times_power(y, whole); }
inline Vector above_floor(Vector x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline Vector nearly_inverse(Vector x) { return _mm512_rcp14_ps(x); }  // relative error below 2^-14
inline float lane_0(Vector x) { return _mm512_cvtss_f32(x); }
inline float max_of(Vector x) { return _mm512_reduce_max_ps(x); }

inline float sum_of(Vector x) {  // halves, quarters and so on: the order is every set's
    const __m256 eight = _mm512_castps512_ps256(x) + _mm512_extractf32x8_ps(x, 1);
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return _mm_cvtss_f32(two) + _mm_cvtss_f32(_mm_movehdup_ps(two));
}

// Lane i of the result is what op(a, b) makes of all lanes of v[i].
template <class Op>
Vector across(const Vector* v, Op op) {
    const auto halves = [&](Vector a, Vector b) {
        return op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    Vector eights[8], fours[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) eights[i] = op(_mm512_unpacklo_ps(v[i], v[i + 8]), _mm512_unpackhi_ps(v[i], v[i + 8]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // in each 128 bits: parts of i, i + 8, i + 4, i + 12
        const __m512d a = (__m512d)eights[i], b = (__m512d)eights[i + 4];
        fours[i] = op((Vector)_mm512_unpacklo_pd(a, b), (Vector)_mm512_unpackhi_pd(a, b));
    }
    const __m512i order = _mm512_setr_epi32(0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15);
    return _mm512_permutexvar_ps(order, halves(halves(fours[0], fours[2]), halves(fours[1], fours[3])));
}

// --- pairs of bfloat16 --------------------------------------------------------------------------------------

inline Pairs load_pairs(const bf16* source) { return _mm512_loadu_si512(source); }
inline Pairs load_pairs(const bf16* source, Values values) { return _mm512_maskz_loadu_epi16(values, source); }
inline void store_pairs(bf16* target, Pairs pairs) { _mm512_storeu_si512(target, pairs); }

inline Pairs repeat_pair(const bf16* source) {
    std::int32_t two;
    std::memcpy(&two, source, sizeof two);
    return _mm512_set1_epi32(two);
}

// sum + a * b, both products of a pair, the second one first.
inline Vector dot(Vector sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// 16 values of two rows side by side; a row that is null is zeros.
inline Pairs zip(const bf16* one, const bf16* other) {
    const auto low = [](const bf16* row) {
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(row == nullptr ? 0 : 0xffff, row));
    };
    return _mm512_or_si512(low(one), _mm512_slli_epi32(low(other), 16));
}

// The same of two vectors, as elements.
inline Pairs to_pairs(Vector one, Vector other) {
    alignas(64) static constexpr std::uint16_t kTurns[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kTurns), (__m512i)_mm512_cvtne2ps_pbh(other, one));
}

// Lane j of v[i] and lane i of v[j] change places.
inline void transpose_16(Pairs* v) {
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
