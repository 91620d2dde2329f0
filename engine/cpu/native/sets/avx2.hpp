// Vectors of 16 in AVX2 with FMA: two registers each. Elements' pairs are in avx2_pairs.hpp or float32_pairs.hpp.
//
// Every operation gives the bits that sets/avx512.hpp gives, denormals apart: those are not flushed here.
#pragma once

#include "sets/eights.hpp"
#include "sets/lanes.hpp"

struct Vector {  // 16 float32
    __m256 low, high;
};
struct Words {  // 16 times 32 bits
    __m256i low, high;
};

inline Vector operator+(Vector a, Vector b) { return {a.low + b.low, a.high + b.high}; }
inline Vector operator-(Vector a, Vector b) { return {a.low - b.low, a.high - b.high}; }
inline Vector operator*(Vector a, Vector b) { return {a.low * b.low, a.high * b.high}; }
inline Vector operator/(Vector a, Vector b) { return {a.low / b.low, a.high / b.high}; }

inline Vector repeat(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

// The lanes as sign bits of `low` and `high`.
inline Words mask_of(Lanes lanes) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), eight = _mm256_set1_epi32(8);
    const __m256i before = _mm256_set1_epi32(lanes.first - 1), end = _mm256_set1_epi32(lanes.last);
    const auto mask = [&](__m256i at) { return _mm256_and_si256(_mm256_cmpgt_epi32(at, before), _mm256_cmpgt_epi32(end, at)); };
    return {mask(index), mask(_mm256_add_epi32(index, eight))};
}

inline __m256 widen(__m128i values) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16)); }

inline Vector load(const float* source) { return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)}; }
inline Vector load(const float* source, Lanes lanes) {
    if (is_all(lanes)) return load(source);
    const Words mask = mask_of(lanes);
    return {_mm256_maskload_ps(source, mask.low), _mm256_maskload_ps(source + 8, mask.high)};
}
inline Vector load(const bf16* source) {
    return {widen(_mm_loadu_si128((const __m128i*)source)), widen(_mm_loadu_si128((const __m128i*)(source + 8)))};
}
inline Vector load(const bf16* source, Lanes lanes) {
    if (is_all(lanes)) return load(source);
    bf16 values[16] = {};
    std::copy(source + lanes.first, source + lanes.last, values + lanes.first);
    return load(values);
}

// To bfloat16, ties to even, each in the lower half of its lane.
inline __m256i narrow(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values), kept = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(kept, _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_or_si256(kept, _mm256_set1_epi32(0x40));
    const __m256 is_nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(_mm256_srli_epi32(near, 16), nan, _mm256_castps_si256(is_nan));
}

inline void store(float* target, Vector values) {
    _mm256_storeu_ps(target, values.low);
    _mm256_storeu_ps(target + 8, values.high);
}
inline void store(float* target, Vector values, Lanes lanes) {
    const Words mask = mask_of(lanes);
    _mm256_maskstore_ps(target, mask.low, values.low);
    _mm256_maskstore_ps(target + 8, mask.high, values.high);
}
inline void store(bf16* target, Vector values) {
    const __m256i mixed = _mm256_packus_epi32(narrow(values.low), narrow(values.high));
    _mm256_storeu_si256((__m256i*)target, _mm256_permute4x64_epi64(mixed, 0xd8));
}
inline void store(bf16* target, Vector values, Lanes lanes) {
    if (is_all(lanes)) return store(target, values);
    bf16 narrowed[16];
    store(narrowed, values);
    std::copy(narrowed + lanes.first, narrowed + lanes.last, target + lanes.first);
}
inline void store(bf16* target, __m256 values) {
    const __m256i bits = narrow(values);
    const __m128i eight = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128((__m128i*)target, eight);
}

inline Vector select(Lanes lanes, Vector values, Vector others) {
    const Words mask = mask_of(lanes);
    return {_mm256_blendv_ps(others.low, values.low, _mm256_castsi256_ps(mask.low)),
            _mm256_blendv_ps(others.high, values.high, _mm256_castsi256_ps(mask.high))};
}
inline Vector fma(Vector a, Vector b, Vector c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vector fms(Vector a, Vector b, Vector c) {
    return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Vector min(Vector a, Vector b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Vector nearest(Vector x) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, kMode), _mm256_round_ps(x.high, kMode)};
}

// y * 2^whole in two factors, so that denormals and infinity are reached as by one.
inline __m256 times_power(__m256 y, __m256 whole) {
    const __m256i power = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(whole, _mm256_set1_ps(-250.0f)), _mm256_set1_ps(250.0f)));
    const __m256i half = _mm256_srai_epi32(power, 1), bias = _mm256_set1_epi32(127);
    const auto factor = [&](__m256i power) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(power, bias), 23));
    };
    return y * factor(half) * factor(_mm256_sub_epi32(power, half));
}
inline Vector times_power(Vector y, Vector whole) {
    return {times_power(y.low, whole.low), times_power(y.high, whole.high)};
}

// The same where neither y nor the result is a denormal.
inline Vector times_normal_power(Vector y, Vector whole) {
    const auto added = [](__m256 y, __m256 whole) {
        const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
    };
    return {added(y.low, whole.low), added(y.high, whole.high)};
}

inline float lane_0(Vector x) { return _mm256_cvtss_f32(x.low); }
inline float max_of(Vector x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ps(two, _mm_movehdup_ps(two)));
}
inline float sum_of(Vector x) {  // halves, quarters and so on: the order is every set's
    const __m256 eight = x.low + x.high;
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return _mm_cvtss_f32(two) + _mm_cvtss_f32(_mm_movehdup_ps(two));
}

// A vector's bits, and the vector that bits are.
inline Words words_of(Vector x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
inline Vector meant_by(Words x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }

inline void transpose_8(const __m256i* v, __m256i* t) {
    __m256i w[8], x[8];
    for (int i = 0; i < 8; i += 2) {
        w[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        w[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {  // x[i + j]: lanes j and j + 4 of four rows
        x[i] = _mm256_unpacklo_epi64(w[i], w[i + 2]);
        x[i + 1] = _mm256_unpackhi_epi64(w[i], w[i + 2]);
        x[i + 2] = _mm256_unpacklo_epi64(w[i + 1], w[i + 3]);
        x[i + 3] = _mm256_unpackhi_epi64(w[i + 1], w[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm256_permute2x128_si256(x[j], x[j + 4], 0x20);
        t[j + 4] = _mm256_permute2x128_si256(x[j], x[j + 4], 0x31);
    }
}

// Lane j of v[i] and lane i of v[j] change places.
inline void transpose_16(Words* v) {
    __m256i rows[4][8], turned[8];  // quarters: rows 0..7 and 8..15, each their low and their high lanes
    for (int i = 0; i < 8; i++) {
        rows[0][i] = v[i].low, rows[1][i] = v[i].high;
        rows[2][i] = v[i + 8].low, rows[3][i] = v[i + 8].high;
    }
    for (int quarter = 0; quarter < 4; quarter++) {
        transpose_8(rows[quarter], turned);
        for (int i = 0; i < 8; i++) {
            Words& target = v[i + quarter % 2 * 8];
            (quarter < 2 ? target.low : target.high) = turned[i];
        }
    }
}
