// Eight float32 in one register of AVX.
#pragma once

using Eight = __m256;  // + - * / are the compiler's

inline Eight load_8(const float* source) { return _mm256_loadu_ps(source); }
inline Eight repeat_8(float value) { return _mm256_set1_ps(value); }
inline Eight repeat_8(const float* source) { return _mm256_broadcast_ss(source); }
inline void store(float* target, Eight values) { _mm256_storeu_ps(target, values); }

inline Eight fma(Eight a, Eight b, Eight c) { return _mm256_fmadd_ps(a, b, c); }
inline void add_product(Eight& sum, Eight a, Eight b) {  // as fma, in place: compilers move sums about where registers are few
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}
inline Eight fms(Eight a, Eight b, Eight c) { return _mm256_fmsub_ps(a, b, c); }

// Lane i of the 8 is the sum of all lanes of v[i].
inline Eight sums_of_8(const Eight* v) {
    const auto halved = [](__m256 a, __m256 b) { return _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b); };
    const __m256 even = halved(halved(v[0], v[4]), halved(v[2], v[6]));  // in each half parts of 0, 2, 4, 6
    const __m256 odd = halved(halved(v[1], v[5]), halved(v[3], v[7]));
    const auto whole = [](__m256 x) { return _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1); };
    const __m128 a = whole(even), b = whole(odd);
    return _mm256_set_m128(_mm_unpackhi_ps(a, b), _mm_unpacklo_ps(a, b));
}
