// Pairs of bfloat16 in AVX2: widened to float32 where they are multiplied.
#pragma once

using Pairs = Words;  // 16 pairs

inline __m256 evens(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odds(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(std::int32_t(0xffff0000))));
}

// Of 8 pairs in memory.
inline Eight evens(const bf16* pairs) { return evens(_mm256_loadu_si256((const __m256i*)pairs)); }
inline Eight odds(const bf16* pairs) { return odds(_mm256_loadu_si256((const __m256i*)pairs)); }

// 16 values in order, from vectors of the even and the odd ones.
inline Vector interleaved(Eight evens, Eight odds) {
    const __m256 outer = _mm256_unpacklo_ps(evens, odds), inner = _mm256_unpackhi_ps(evens, odds);
    return {_mm256_permute2f128_ps(outer, inner, 0x20), _mm256_permute2f128_ps(outer, inner, 0x31)};
}

inline Pairs load_pairs(const bf16* source) {
    return {_mm256_loadu_si256((const __m256i*)source), _mm256_loadu_si256((const __m256i*)(source + 16))};
}
inline Pairs load_pairs(const bf16* source, Values values) {
    if (values == 32) return load_pairs(source);
    if (values == 16) return {_mm256_loadu_si256((const __m256i*)source), _mm256_setzero_si256()};
    bf16 found[32] = {};
    std::copy_n(source, values, found);
    return load_pairs(found);
}
inline void store_pairs(bf16* target, Pairs pairs) {
    _mm256_storeu_si256((__m256i*)target, pairs.low);
    _mm256_storeu_si256((__m256i*)(target + 16), pairs.high);
}

inline Pairs repeat_pair(const bf16* source) {
    std::int32_t two;
    std::memcpy(&two, source, sizeof two);
    return {_mm256_set1_epi32(two), _mm256_set1_epi32(two)};
}

// sum + a * b, both products of a pair, the second one first.
inline __m256 dot(__m256 sum, __m256i a, __m256i b) {
    return _mm256_fmadd_ps(evens(a), evens(b), _mm256_fmadd_ps(odds(a), odds(b), sum));
}
inline Vector dot(Vector sum, Pairs a, Pairs b) { return {dot(sum.low, a.low, b.low), dot(sum.high, a.high, b.high)}; }

// 16 values of two rows side by side; a row that is null is zeros.
inline Pairs zip(const bf16* one, const bf16* other) {
    const auto row = [](const bf16* row) {
        return row == nullptr ? _mm256_setzero_si256() : _mm256_loadu_si256((const __m256i*)row);
    };
    const __m256i a = row(one), b = row(other);
    const __m256i lower = _mm256_unpacklo_epi16(a, b), upper = _mm256_unpackhi_epi16(a, b);
    return {_mm256_permute2x128_si256(lower, upper, 0x20), _mm256_permute2x128_si256(lower, upper, 0x31)};
}

// The same of two vectors, as elements.
inline Pairs to_pairs(Vector one, Vector other) {
    bf16 rows[2][16];
    store(rows[0], one);
    store(rows[1], other);
    return zip(rows[0], rows[1]);
}
