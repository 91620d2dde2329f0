// 16 whole numbers of 16 bits in NEON, in two registers. A pair is number i of both: there is no instruction that adds up
// products of neighbours. So two rows side by side are in order.
#pragma once

struct Shorts {
    int16x8_t one, other;
};
struct Sums {
    int32x4_t low, high;
};

constexpr int kShorts = 16;  // half as many sums
template <int HEADS>
constexpr int kKeysAtOnce = HEADS == 4 ? 2 : HEADS == 1 ? 8 : 4;  // sums of their products with HEADS queries stay in registers

inline Sums no_sums() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline Shorts load_shorts(const std::int16_t* source) { return {vld1q_s16(source), vld1q_s16(source + 8)}; }
inline Shorts load_shorts(const std::int8_t* source, Values) {
    return {vmovl_s8(vld1_s8(source)), vmovl_s8(vld1_s8(source + 8))};
}
inline Shorts repeat_two(const std::int16_t* source) { return {vld1q_dup_s16(source), vld1q_dup_s16(source + 1)}; }
inline Shorts lower_two(Shorts one, Shorts other) { return {one.one, other.one}; }
inline Shorts upper_two(Shorts one, Shorts other) { return {one.other, other.other}; }

inline Sums dot(Sums sum, Shorts a, Shorts b) {
    const auto add = [](Sums sum, int16x8_t a, int16x8_t b) {
        return Sums{vmlal_s16(sum.low, vget_low_s16(a), vget_low_s16(b)), vmlal_high_s16(sum.high, a, b)};
    };
    return add(add(sum, a.one, b.one), a.other, b.other);
}

// Whole numbers that are within int16.
inline void store_shorts(std::int16_t* target, Vector values) {
    const auto narrowed = [](Eight x) {
        return vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.low)), vqmovn_s32(vcvtnq_s32_f32(x.high)));
    };
    vst1q_s16(target, narrowed(values.low));
    vst1q_s16(target + 8, narrowed(values.high));
}

// Lane i of the 16 is the sum of all lanes of sums[i].
inline void store_totals(float* target, const Sums* sums) {
    for (int i = 0; i < 16; i += 4, sums += 4) {
        const auto four = [&](int i) { return vaddq_s32(sums[i].low, sums[i].high); };
        const int32x4_t totals = vpaddq_s32(vpaddq_s32(four(0), four(1)), vpaddq_s32(four(2), four(3)));
        vst1q_f32(target + i, vcvtq_f32_s32(totals));
    }
}

// target = target * factor + sums * step
inline void add_sums(float* target, Sums sums, float factor, float step) {
    const Eight floats{vcvtq_f32_s32(sums.low), vcvtq_f32_s32(sums.high)};
    store(target, fma(floats, repeat_8(step), load_8(target) * repeat_8(factor)));
}

// What sums of two rows side by side leave, times `scale`, as elements in order.
inline void store_two_in_order(const float* sums, int head_dim, Vector scale, Element* out) {
    for (int at = 0; at < head_dim; at += 16) store(out + at, load(sums + at) * scale);
}
