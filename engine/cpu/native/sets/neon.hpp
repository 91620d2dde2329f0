// Vectors of 16 in NEON: four registers each, two to each eight. Elements' pairs are in neon_pairs.hpp or float32_pairs.hpp.
//
// Every operation gives the bits that sets/avx2.hpp gives, of NaN and infinity too.
#pragma once

#include "sets/lanes.hpp"

// Products of bfloat16, and of unsigned bytes with signed ones: the set is `neon_bf16`, else `neon`.
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8) && !defined(KVFERRY_FLOAT32)
#define KVFERRY_NEON_BF16
#endif

using Four = float32x4_t;  // + - * / are the compiler's

struct Eight {
    Four low, high;
};
struct Vector {  // 16 float32
    Eight low, high;
};
struct Words {  // 16 times 32 bits
    uint32x4_t part[4];
};

// --- four and eight -----------------------------------------------------------------------------------------

inline Four fma(Four a, Four b, Four c) { return vfmaq_f32(c, a, b); }
inline Four max(Four a, Four b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // of NaN and another the second, as min
inline Four min(Four a, Four b) { return vbslq_f32(vcltq_f32(a, b), a, b); }

inline Eight operator+(Eight a, Eight b) { return {a.low + b.low, a.high + b.high}; }
inline Eight operator-(Eight a, Eight b) { return {a.low - b.low, a.high - b.high}; }
inline Eight operator*(Eight a, Eight b) { return {a.low * b.low, a.high * b.high}; }
inline Eight operator/(Eight a, Eight b) { return {a.low / b.low, a.high / b.high}; }

inline Eight load_8(const float* source) { return {vld1q_f32(source), vld1q_f32(source + 4)}; }
inline Eight repeat_8(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
inline Eight repeat_8(const float* source) {
    const Four value = vld1q_dup_f32(source);
    return {value, value};
}
inline void store(float* target, Eight values) {
    vst1q_f32(target, values.low);
    vst1q_f32(target + 4, values.high);
}

inline Eight fma(Eight a, Eight b, Eight c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }
inline void add_product(Eight& sum, Eight a, Eight b) { sum = fma(a, b, sum); }
inline Eight fms(Eight a, Eight b, Eight c) { return {fma(a.low, b.low, -c.low), fma(a.high, b.high, -c.high)}; }
inline Eight max(Eight a, Eight b) { return {max(a.low, b.low), max(a.high, b.high)}; }
inline Eight min(Eight a, Eight b) { return {min(a.low, b.low), min(a.high, b.high)}; }
inline Eight nearest(Eight x) { return {vrndnq_f32(x.low), vrndnq_f32(x.high)}; }

// Lane i of the 8 is the sum of all lanes of v[i].
inline Eight sums_of_8(const Eight* v) {
    const auto halved = [](Four a, Four b) { return vzip1q_f32(a, b) + vzip2q_f32(a, b); };
    const auto sums_of_4 = [&](int i, auto half) {  // of halves of v[i], v[i + 2] and so on
        return halved(halved(half(v[i]), half(v[i + 4])), halved(half(v[i + 2]), half(v[i + 6])));
    };
    const auto low = [](Eight x) { return x.low; };
    const auto high = [](Eight x) { return x.high; };
    const Four even = sums_of_4(0, low) + sums_of_4(0, high), odd = sums_of_4(1, low) + sums_of_4(1, high);
    return {vzip1q_f32(even, odd), vzip2q_f32(even, odd)};
}

// --- sixteen ------------------------------------------------------------------------------------------------

inline Vector operator+(Vector a, Vector b) { return {a.low + b.low, a.high + b.high}; }
inline Vector operator-(Vector a, Vector b) { return {a.low - b.low, a.high - b.high}; }
inline Vector operator*(Vector a, Vector b) { return {a.low * b.low, a.high * b.high}; }
inline Vector operator/(Vector a, Vector b) { return {a.low / b.low, a.high / b.high}; }

inline Vector repeat(float value) { return {repeat_8(value), repeat_8(value)}; }
inline Vector fma(Vector a, Vector b, Vector c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }
inline Vector fms(Vector a, Vector b, Vector c) { return {fms(a.low, b.low, c.low), fms(a.high, b.high, c.high)}; }
inline Vector max(Vector a, Vector b) { return {max(a.low, b.low), max(a.high, b.high)}; }
inline Vector min(Vector a, Vector b) { return {min(a.low, b.low), min(a.high, b.high)}; }
inline Vector nearest(Vector x) { return {nearest(x.low), nearest(x.high)}; }

// Some of a vector's lanes by way of memory: it is seldom that they are not all.
template <class Value>
struct Part {
    Part() = default;
    Part(const Value* source, Lanes lanes) { std::copy(source + lanes.first, source + lanes.last, values + lanes.first); }
    void put(Value* target, Lanes lanes) const { std::copy(values + lanes.first, values + lanes.last, target + lanes.first); }
    Value values[16] = {};
};

inline Eight widen(uint16x8_t values) {
    const auto wide = [](uint16x4_t four) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(four), 16)); };
    return {wide(vget_low_u16(values)), wide(vget_high_u16(values))};
}

inline Vector load(const float* source) { return {load_8(source), load_8(source + 8)}; }
inline Vector load(const bf16* source) { return {widen(vld1q_u16(source)), widen(vld1q_u16(source + 8))}; }
template <class Value>
Vector load(const Value* source, Lanes lanes) {
    return is_all(lanes) ? load(source) : load(Part<Value>(source, lanes).values);
}

// To bfloat16, ties to even.
#ifdef KVFERRY_NEON_BF16
inline uint16x8_t narrow(Eight values) {
    return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(values.low), values.high));
}
#else
inline uint16x4_t narrow(Four values) {
    const uint32x4_t bits = vreinterpretq_u32_f32(values), kept = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(kept, vdupq_n_u32(1));
    const uint32x4_t near = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t nan = vorrq_u32(kept, vdupq_n_u32(0x40)), is_number = vceqq_f32(values, values);
    return vmovn_u32(vbslq_u32(is_number, vshrq_n_u32(near, 16), nan));
}
inline uint16x8_t narrow(Eight values) { return vcombine_u16(narrow(values.low), narrow(values.high)); }
#endif

inline void store(bf16* target, Eight values) { vst1q_u16(target, narrow(values)); }
template <class Value>
void store(Value* target, Vector values) {
    store(target, values.low);
    store(target + 8, values.high);
}
template <class Value>
void store(Value* target, Vector values, Lanes lanes) {
    if (is_all(lanes)) return store(target, values);
    Part<Value> part;
    store(part.values, values);
    part.put(target, lanes);
}

inline Vector select(Lanes lanes, Vector values, Vector others) {
    const int32x4_t index = {0, 1, 2, 3};
    const auto four = [&](int at, Four values, Four others) {
        const int32x4_t first = vdupq_n_s32(lanes.first - at), last = vdupq_n_s32(lanes.last - at);
        return vbslq_f32(vandq_u32(vcgeq_s32(index, first), vcltq_s32(index, last)), values, others);
    };
    return {{four(0, values.low.low, others.low.low), four(4, values.low.high, others.low.high)},
            {four(8, values.high.low, others.high.low), four(12, values.high.high, others.high.high)}};
}

// y * 2^whole in two factors, so that denormals and infinity are reached as by one.
inline Four times_power(Four y, Four whole) {
    const int32x4_t power = vcvtnq_s32_f32(min(max(whole, vdupq_n_f32(-250.0f)), vdupq_n_f32(250.0f)));
    const int32x4_t half = vshrq_n_s32(power, 1), bias = vdupq_n_s32(127);
    const auto factor = [&](int32x4_t power) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(power, bias), 23)); };
    return y * factor(half) * factor(vsubq_s32(power, half));
}
// The same where neither y nor the result is a denormal.
inline Four times_normal_power(Four y, Four whole) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(y), vshlq_n_s32(vcvtnq_s32_f32(whole), 23)));
}
inline Vector times_power(Vector y, Vector whole) {
    return {{times_power(y.low.low, whole.low.low), times_power(y.low.high, whole.low.high)},
            {times_power(y.high.low, whole.high.low), times_power(y.high.high, whole.high.high)}};
}
inline Vector times_normal_power(Vector y, Vector whole) {
    return {{times_normal_power(y.low.low, whole.low.low), times_normal_power(y.low.high, whole.low.high)},
            {times_normal_power(y.high.low, whole.high.low), times_normal_power(y.high.high, whole.high.high)}};
}

inline float lane_0(Vector x) { return vgetq_lane_f32(x.low.low, 0); }
inline float max_of(Vector x) {
    const Eight eight = max(x.low, x.high);
    const Four four = max(eight.low, eight.high), two = max(four, vextq_f32(four, four, 2));
    return vgetq_lane_f32(max(two, vextq_f32(two, two, 1)), 0);
}
inline float sum_of(Vector x) {  // halves, quarters and so on: the order is every set's
    const Eight eight = x.low + x.high;
    const Four four = eight.low + eight.high, two = four + vextq_f32(four, four, 2);
    return vgetq_lane_f32(two, 0) + vgetq_lane_f32(two, 1);
}

// --- bits ---------------------------------------------------------------------------------------------------

// A vector's bits, and the vector that bits are.
inline Words words_of(Vector x) {
    return {vreinterpretq_u32_f32(x.low.low), vreinterpretq_u32_f32(x.low.high), vreinterpretq_u32_f32(x.high.low),
            vreinterpretq_u32_f32(x.high.high)};
}
inline Vector meant_by(Words x) {
    const auto four = [&](int i) { return vreinterpretq_f32_u32(x.part[i]); };
    return {{four(0), four(1)}, {four(2), four(3)}};
}

// Lane j of v[i] and lane i of v[j] change places.
inline void transpose_16(Words* v) {
    Words turned[16];
    for (int row = 0; row < 4; row++) {
        for (int column = 0; column < 4; column++) {  // four rows of one part each are four columns
            const auto of = [&](int i) { return v[4 * row + i].part[column]; };
            const auto twos = [](uint32x4_t x) { return vreinterpretq_u64_u32(x); };
            const uint64x2_t a = twos(vtrn1q_u32(of(0), of(1))), b = twos(vtrn1q_u32(of(2), of(3)));  // columns 0 and 2
            const uint64x2_t c = twos(vtrn2q_u32(of(0), of(1))), d = twos(vtrn2q_u32(of(2), of(3)));
            Words* const target = turned + 4 * column;
            target[0].part[row] = vreinterpretq_u32_u64(vtrn1q_u64(a, b));
            target[1].part[row] = vreinterpretq_u32_u64(vtrn1q_u64(c, d));
            target[2].part[row] = vreinterpretq_u32_u64(vtrn2q_u64(a, b));
            target[3].part[row] = vreinterpretq_u32_u64(vtrn2q_u64(c, d));
        }
    }
    std::copy_n(turned, 16, v);
}
