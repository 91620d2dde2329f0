// Whole numbers in registers: products of bytes added up in 16 lanes of int32, and these lanes as a Vector.
//
// Bytes of weights are unsigned and bytes of inputs are signed, which VPDPBUSD multiplies without saturating. Where
// there is no such instruction its exact sum is made of products of 16 bits: all instruction sets give the same bits.
//
//     sum = first_sum<MOST>(start)                       for each lane, of a segment
//     sum = dot<MOST>(sum, weights, Fours(inputs))       for each four inputs; weights are bytes from 0 to MOST
//     last_sum<MOST>(sum, start)
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine/processor.hpp"
#include "machine/vectors.hpp"

constexpr long kSegment = 32;  // inputs of a group whose products are added up as whole numbers

// Whether inputs stand in 16 bits each, for weights of so many: of each four the even two and then the odd two.
template <int BITS>
constexpr bool kHasWideInputs = false;
template <int BITS>
constexpr long kInputSize = kHasWideInputs<BITS> ? 2 : 1;  // bytes

inline std::int32_t four_bytes(const std::int8_t* source) {
    std::int32_t bytes;
    std::memcpy(&bytes, source, sizeof bytes);
    return bytes;
}

#ifdef __ARM_NEON
#include "sets/neon_integers.hpp"
#else

// By what 4 bits of e2m1 are: twice what they mean, and 12 more.
inline __m128i e2m1_table() { return _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0); }

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

using Ints = __m512i;
using Bytes = __m512i;  // four inputs of each of 16 columns

constexpr int kVectorsAtOnce[] = {4, 4, 4, 4, 4, 4};  // sums of 16 columns that stay in registers, of one row to six

template <int BITS>
struct Fours {  // four inputs of a row, in each lane
    explicit Fours(const std::int8_t* inputs) : bytes(_mm512_set1_epi32(four_bytes(inputs))) {}
    __m512i bytes;
};

template <int MOST, int BITS>
Ints dot(Ints sum, Bytes weights, const Fours<BITS>& inputs) {
    return _mm512_dpbusd_epi32(sum, weights, inputs.bytes);
}

template <int MOST>
Ints first_sum(std::int32_t start) {
    return _mm512_set1_epi32(start);
}
template <int MOST>
Ints last_sum(Ints sum, std::int32_t) {
    return sum;
}
// What follows is not begun before: all else that would be in registers waits.
inline void keep_in_registers(Ints& values) { asm volatile("" : "+v"(values) : : "memory"); }
inline Vector to_floats(Ints values) { return _mm512_cvtepi32_ps(values); }
inline Vector load_halves(const void* source) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)source)); }

inline Vector load_bytes_as_floats(const std::uint8_t* source) {  // signed ones
    return to_floats(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)source)));
}

inline Bytes load_bytes(const std::uint8_t* source) { return _mm512_loadu_si512(source); }

// Of each four bytes the one at INDEX.
template <int INDEX>
Vector byte_as_float(Bytes bytes) {
    if (INDEX == 3) return to_floats(_mm512_srli_epi32(bytes, 24));
    if (INDEX > 0) bytes = _mm512_srli_epi32(bytes, 8 * INDEX);
    return to_floats(_mm512_and_si512(bytes, _mm512_set1_epi32(255)));
}
inline Bytes low_nibbles(Bytes bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes bytes) { return low_nibbles(_mm512_srli_epi16(bytes, 4)); }

inline Vector load_powers(const std::uint8_t* source) {  // of 2, their exponents with 127 added; 0: zero
    const __m512i exponents = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)source));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponents, 23));
}
inline Vector load_e4m3(const std::uint8_t* source) {  // without a sign: a float32's exponent counts from 120 less
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)source));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bytes, 20)) * repeat(0x1p120f);
}
inline Bytes twice_e2m1(Bytes nibbles) { return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(e2m1_table()), nibbles); }

// Whole numbers that are within int8.
inline void store_whole(std::int8_t* target, Vector values) {
    _mm_storeu_si128((__m128i*)target, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(values)));
}

#else

struct Ints {
    __m256i low, high;
};
struct Bytes {
    __m256i low, high;
};

constexpr int kVectorsAtOnce[] = {4, 2, 1, 1, 1, 1};

template <int BITS>
struct Fours {
    explicit Fours(const std::int8_t* inputs) : bytes(_mm256_set1_epi32(four_bytes(inputs))) {}
    __m256i plus(__m256i sum, __m256i weights) const {
#ifdef __AVXVNNI__
        return _mm256_dpbusd_avx_epi32(sum, weights, bytes);
#else
        static_assert(BITS == 4);  // two products fit into 16 bits: 2 x 15 x 127
        const __m256i twos = _mm256_maddubs_epi16(weights, bytes);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
#endif
    }
    __m256i bytes;
};

#ifndef __AVXVNNI__

template <>
constexpr bool kHasWideInputs<8> = true;

template <>
struct Fours<8> {  // two products do not, 2 x 255 x 127: weights become 16 bits, as inputs are, the even ones and the odd ones
    explicit Fours(const std::int8_t* inputs)
        : even(_mm256_set1_epi32(four_bytes(inputs))), odd(_mm256_set1_epi32(four_bytes(inputs + 4))) {}
    __m256i plus(__m256i sum, __m256i weights) const {
        const __m256i evens = _mm256_madd_epi16(_mm256_and_si256(weights, _mm256_set1_epi16(255)), even);
        const __m256i odds = _mm256_madd_epi16(_mm256_srli_epi16(weights, 8), odd);
        return _mm256_add_epi32(sum, _mm256_add_epi32(evens, odds));
    }
    __m256i even, odd;
};

#endif

// Whether the products of bytes up to MOST with a segment's inputs fit into 16 bits, two of each four in one sum.
#ifdef __AVXVNNI__
template <int MOST>
constexpr bool kFitsHalves = false;  // its instruction adds up four at once
#else
template <int MOST>
constexpr bool kFitsHalves = kSegment / 4 * 2 * MOST * 127 < 1 << 15;
#endif

// `sum` and four products more in each lane, of weights that are at most MOST.
template <int MOST, int BITS>
Ints dot(Ints sum, Bytes weights, const Fours<BITS>& inputs) {
    if constexpr (kFitsHalves<MOST>) {
        return {_mm256_add_epi16(sum.low, _mm256_maddubs_epi16(weights.low, inputs.bytes)),
                _mm256_add_epi16(sum.high, _mm256_maddubs_epi16(weights.high, inputs.bytes))};
    } else {
        return {inputs.plus(sum.low, weights.low), inputs.plus(sum.high, weights.high)};
    }
}

// What a segment's `dot`s begin with, and what they have added up to `start` in the end.
template <int MOST>
Ints first_sum(std::int32_t start) {
    const __m256i first = _mm256_set1_epi32(kFitsHalves<MOST> ? 0 : start);
    return {first, first};
}
template <int MOST>
Ints last_sum(Ints sum, std::int32_t start) {
    if (!kFitsHalves<MOST>) return sum;
    const __m256i first = _mm256_set1_epi32(start), ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(first, _mm256_madd_epi16(sum.low, ones)),
            _mm256_add_epi32(first, _mm256_madd_epi16(sum.high, ones))};
}

inline void keep_in_registers(Ints& values) { asm volatile("" : "+x"(values.low), "+x"(values.high) : : "memory"); }
inline Vector to_floats(Ints values) { return {_mm256_cvtepi32_ps(values.low), _mm256_cvtepi32_ps(values.high)}; }
inline Vector load_halves(const void* source) {
    const auto* halves = (const __m128i*)source;
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline Vector load_bytes_as_floats(const std::uint8_t* source) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)source);
    return to_floats({_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
}

inline Bytes load_bytes(const std::uint8_t* source) {
    return {_mm256_loadu_si256((const __m256i*)source), _mm256_loadu_si256((const __m256i*)(source + 32))};
}
template <int INDEX>
Vector byte_as_float(Bytes bytes) {
    const __m256i mask = _mm256_set1_epi32(255);
    return to_floats({_mm256_and_si256(_mm256_srli_epi32(bytes.low, 8 * INDEX), mask),
                      _mm256_and_si256(_mm256_srli_epi32(bytes.high, 8 * INDEX), mask)});
}

inline Bytes low_nibbles(Bytes bytes) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(bytes.low, mask), _mm256_and_si256(bytes.high, mask)};
}
inline Bytes high_nibbles(Bytes bytes) {
    return low_nibbles({_mm256_srli_epi16(bytes.low, 4), _mm256_srli_epi16(bytes.high, 4)});
}

inline Vector load_powers(const std::uint8_t* source) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)source);
    const auto power = [](__m128i eight) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(eight), 23)); };
    return {power(bytes), power(_mm_srli_si128(bytes, 8))};
}
inline Vector load_e4m3(const std::uint8_t* source) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)source);
    const auto part = [](__m128i eight) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(eight), 20)); };
    return Vector{part(bytes), part(_mm_srli_si128(bytes, 8))} * repeat(0x1p120f);
}
inline Bytes twice_e2m1(Bytes nibbles) {
    const __m256i table = _mm256_broadcastsi128_si256(e2m1_table());
    return {_mm256_shuffle_epi8(table, nibbles.low), _mm256_shuffle_epi8(table, nibbles.high)};
}

// 16 whole numbers in 16 bits each.
inline __m256i to_int16(Vector values) {
    const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(values.low), _mm256_cvtps_epi32(values.high));
    return _mm256_permute4x64_epi64(mixed, 0xd8);
}
inline void store_whole(std::int8_t* target, Vector values) {
    const __m256i words = to_int16(values);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i*)target, bytes);
}
inline void store_inputs(std::int8_t* target, Vector values, std::true_type /*is_wide*/) {
    const __m256i words = to_int16(values);
    _mm256_storeu_si256((__m256i*)target, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
}

#endif

#endif

inline void store_inputs(std::int8_t* target, Vector values, std::false_type) { store_whole(target, values); }
