// Whole numbers of 16 bits in a register, made of 8-bit ones; products of pairs of them added up in 32 bits.
//
// Two rows stand side by side as `lower_two` and `upper_two` leave them: of kShorts numbers the sums of 0..3, 8..11 and so
// on stand in one vector, the others in the next.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __ARM_NEON
#include "sets/neon_shorts.hpp"
#else

inline std::int32_t two_shorts(const std::int16_t* source) {
    std::int32_t two;
    std::memcpy(&two, source, sizeof two);
    return two;
}

#ifdef __AVX512BF16__

using Shorts = __m512i;
using Sums = __m512i;

constexpr int kShorts = 32;  // in a register; half as many sums
template <int HEADS>
constexpr int kKeysAtOnce = 4;  // sums of their products with HEADS queries stay in registers

inline Sums no_sums() { return _mm512_setzero_si512(); }
inline Shorts load_shorts(const std::int16_t* source) { return _mm512_loadu_si512(source); }
inline Shorts load_shorts(const std::int8_t* source, Values values) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(values, source));
}
inline Shorts repeat_two(const std::int16_t* source) { return _mm512_set1_epi32(two_shorts(source)); }
inline Shorts lower_two(Shorts one, Shorts other) { return _mm512_unpacklo_epi16(one, other); }
inline Shorts upper_two(Shorts one, Shorts other) { return _mm512_unpackhi_epi16(one, other); }
inline Sums dot(Sums sum, Shorts a, Shorts b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline Vector to_float_sums(Sums sums) { return _mm512_cvtepi32_ps(sums); }

// Whole numbers that are within int16.
inline void store_shorts(std::int16_t* target, Vector values) {
    _mm256_storeu_si256((__m256i*)target, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(values)));
}

// Lane i of the 16 is the sum of all lanes of sums[i].
inline void store_totals(float* target, const Sums* sums) {
    Vector floats[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) floats[i] = to_float_sums(sums[i]);
    store(target, sums_of_16(floats));
}

// target = target * factor + sums * step
inline void add_sums(float* target, Sums sums, float factor, float step) {
    store(target, fma(to_float_sums(sums), repeat(step), load(target) * repeat(factor)));
}

// What sums of two rows side by side leave, times `scale`, as elements in order.
inline void store_two_in_order(const float* sums, int head_dim, Vector scale, Element* out) {
    store_in_order(sums, head_dim, scale, out);
}

#else

using Shorts = __m256i;
using Sums = __m256i;

constexpr int kShorts = 16;
template <int HEADS>
constexpr int kKeysAtOnce = HEADS == 4 ? 2 : HEADS == 1 ? 8 : 4;

inline Sums no_sums() { return _mm256_setzero_si256(); }
inline Shorts load_shorts(const std::int16_t* source) { return _mm256_loadu_si256((const __m256i*)source); }
inline Shorts load_shorts(const std::int8_t* source, Values) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)source));
}
inline Shorts repeat_two(const std::int16_t* source) { return _mm256_set1_epi32(two_shorts(source)); }
inline Shorts lower_two(Shorts one, Shorts other) { return _mm256_unpacklo_epi16(one, other); }
inline Shorts upper_two(Shorts one, Shorts other) { return _mm256_unpackhi_epi16(one, other); }
inline Sums dot(Sums sum, Shorts a, Shorts b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

inline void store_shorts(std::int16_t* target, Vector values) {
    const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(values.low), _mm256_cvtps_epi32(values.high));
    _mm256_storeu_si256((__m256i*)target, _mm256_permute4x64_epi64(mixed, 0xd8));
}

inline void store_totals(float* target, const Sums* sums) {
    __m256 floats[16];
    for (int i = 0; i < 16; i++) floats[i] = _mm256_cvtepi32_ps(sums[i]);
    _mm256_storeu_ps(target, sums_of_8(floats));
    _mm256_storeu_ps(target + 8, sums_of_8(floats + 8));
}

inline void add_sums(float* target, Sums sums, float factor, float step) {
    const __m256 before = _mm256_loadu_ps(target) * _mm256_set1_ps(factor);
    _mm256_storeu_ps(target, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(step), before));
}

inline void store_two_in_order(const float* sums, int head_dim, Vector scale, Element* out) {
    for (int at = 0; at < head_dim; at += 16) {
        const __m256 lower = _mm256_loadu_ps(sums + at), upper = _mm256_loadu_ps(sums + at + 8);
        const Vector whole{_mm256_permute2f128_ps(lower, upper, 0x20), _mm256_permute2f128_ps(lower, upper, 0x31)};
        store(out + at, whole * scale);
    }
}

#endif

#endif
