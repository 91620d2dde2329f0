// Whole numbers in NEON: products of four bytes at a time, added up in 32 bits.
//
// With unsigned bytes of weights by signed ones of inputs where there is an instruction for that. Where there is none but
// for signed bytes, those that may be above 127 become signed by taking 128 away: just what has been added to them, and
// what their segments' first sum is there to take away, with which they need not begin then.
#pragma once

struct Ints {
    int32x4_t part[4];
};
struct Bytes {  // four inputs of each of 16 columns
    uint8x16_t part[4];
};

constexpr int kVectorsAtOnce[] = {4, 2, 1, 1, 1, 1};  // sums of 16 columns that stay in registers, of one row to six

template <int BITS>
struct Fours {  // four inputs of a row, in each lane
    explicit Fours(const std::int8_t* inputs) : bytes(vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(inputs)))) {}
    int8x16_t bytes;
};

#ifdef KVFERRY_NEON_BF16
template <int MOST>
constexpr bool kBecomesSigned = false;

inline int32x4_t add_fours(int32x4_t sum, uint8x16_t weights, int8x16_t inputs) { return vusdotq_s32(sum, weights, inputs); }
#else
template <int MOST>
constexpr bool kBecomesSigned = MOST > 127;

inline int32x4_t add_fours(int32x4_t sum, uint8x16_t weights, int8x16_t inputs) {
    return vdotq_s32(sum, vreinterpretq_s8_u8(weights), inputs);
}
#endif

template <int MOST, int BITS>
Ints dot(Ints sum, Bytes weights, const Fours<BITS>& inputs) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const uint8x16_t four = kBecomesSigned<MOST> ? veorq_u8(weights.part[i], vdupq_n_u8(128)) : weights.part[i];
        sum.part[i] = add_fours(sum.part[i], four, inputs.bytes);
    }
    return sum;
}

template <int MOST>
Ints first_sum(std::int32_t start) {
    const int32x4_t first = vdupq_n_s32(kBecomesSigned<MOST> ? 0 : start);
    return {first, first, first, first};
}
template <int MOST>
Ints last_sum(Ints sum, std::int32_t) {
    return sum;
}
inline void keep_in_registers(Ints& values) {
    asm volatile("" : "+w"(values.part[0]), "+w"(values.part[1]), "+w"(values.part[2]), "+w"(values.part[3]) : : "memory");
}
inline Vector to_floats(Ints values) {
    const auto four = [&](int i) { return vcvtq_f32_s32(values.part[i]); };
    return {{four(0), four(1)}, {four(2), four(3)}};
}
inline Vector load_halves(const void* source) {
    const auto* const halves = (const std::uint16_t*)source;
    const auto four = [&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + 4 * i))); };
    return {{four(0), four(1)}, {four(2), four(3)}};
}

// 16 bytes in 32 bits each.
inline Bytes in_words(uint8x16_t bytes) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    const auto word = [](uint16x4_t four) { return vreinterpretq_u8_u32(vmovl_u16(four)); };
    return {word(vget_low_u16(low)), word(vget_high_u16(low)), word(vget_low_u16(high)), word(vget_high_u16(high))};
}
inline Vector load_bytes_as_floats(const std::uint8_t* source) {  // signed ones
    const Bytes bytes = in_words(vld1q_u8(source));
    const auto four = [&](int i) {
        return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(vreinterpretq_s32_u8(bytes.part[i]), 24), 24));
    };
    return {{four(0), four(1)}, {four(2), four(3)}};
}

inline Bytes load_bytes(const std::uint8_t* source) {
    return {vld1q_u8(source), vld1q_u8(source + 16), vld1q_u8(source + 32), vld1q_u8(source + 48)};
}

// Of each four bytes the one at INDEX.
template <int INDEX>
Vector byte_as_float(Bytes bytes) {
    const auto four = [&](int i) {
        const uint32x4_t whole = vshlq_n_u32(vreinterpretq_u32_u8(bytes.part[i]), 24 - 8 * INDEX);
        return vcvtq_f32_u32(vshrq_n_u32(whole, 24));
    };
    return {{four(0), four(1)}, {four(2), four(3)}};
}
inline Bytes low_nibbles(Bytes bytes) {
    const auto low = [&](int i) { return vandq_u8(bytes.part[i], vdupq_n_u8(15)); };
    return {low(0), low(1), low(2), low(3)};
}
inline Bytes high_nibbles(Bytes bytes) {
    const auto high = [&](int i) { return vshrq_n_u8(bytes.part[i], 4); };
    return {high(0), high(1), high(2), high(3)};
}

inline Vector load_powers(const std::uint8_t* source) {  // of 2, their exponents with 127 added; 0: zero
    const Bytes exponents = in_words(vld1q_u8(source));
    const auto four = [&](int i) {
        return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(exponents.part[i]), 23));
    };
    return {{four(0), four(1)}, {four(2), four(3)}};
}
inline Vector load_e4m3(const std::uint8_t* source) {  // without a sign: a float32's exponent counts from 120 less
    const Bytes bytes = in_words(vld1q_u8(source));
    const auto four = [&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(bytes.part[i]), 20)); };
    return Vector{{four(0), four(1)}, {four(2), four(3)}} * repeat(0x1p120f);
}
// By what 4 bits of e2m1 are: twice what they mean, and 12 more.
inline Bytes twice_e2m1(Bytes nibbles) {
    const uint8x16_t table = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    const auto twice = [&](int i) { return vqtbl1q_u8(table, nibbles.part[i]); };
    return {twice(0), twice(1), twice(2), twice(3)};
}

// Whole numbers that are within int8.
inline void store_whole(std::int8_t* target, Vector values) {
    const auto narrowed = [](Eight x) {
        return vqmovn_s16(vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.low)), vqmovn_s32(vcvtnq_s32_f32(x.high))));
    };
    vst1_s8(target, narrowed(values.low));
    vst1_s8(target + 8, narrowed(values.high));
}
