// Pairs of bfloat16 in NEON: multiplied as they are where there is an instruction for it, else widened to float32.
#pragma once

using Pairs = Words;  // 16 pairs

inline Four evens(uint32x4_t pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)); }
inline Four odds(uint32x4_t pairs) { return vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000))); }

inline uint32x4_t load_4_pairs(const bf16* source) { return vreinterpretq_u32_u16(vld1q_u16(source)); }

// Of 8 pairs in memory.
inline Eight evens(const bf16* pairs) { return {evens(load_4_pairs(pairs)), evens(load_4_pairs(pairs + 8))}; }
inline Eight odds(const bf16* pairs) { return {odds(load_4_pairs(pairs)), odds(load_4_pairs(pairs + 8))}; }

// 16 values in order, from vectors of the even and the odd ones.
inline Vector interleaved(Eight evens, Eight odds) {
    return {{vzip1q_f32(evens.low, odds.low), vzip2q_f32(evens.low, odds.low)},
            {vzip1q_f32(evens.high, odds.high), vzip2q_f32(evens.high, odds.high)}};
}

inline Pairs load_pairs(const bf16* source) {
    return {load_4_pairs(source), load_4_pairs(source + 8), load_4_pairs(source + 16), load_4_pairs(source + 24)};
}
inline Pairs load_pairs(const bf16* source, Values values) {
    if (values == 32) return load_pairs(source);
    bf16 found[32] = {};
    std::copy_n(source, values, found);
    return load_pairs(found);
}
inline void store_pairs(bf16* target, Pairs pairs) {
    for (int i = 0; i < 4; i++) vst1q_u16(target + 8 * i, vreinterpretq_u16_u32(pairs.part[i]));
}

inline Pairs repeat_pair(const bf16* source) {
    std::uint32_t two;
    std::memcpy(&two, source, sizeof two);
    const uint32x4_t pair = vdupq_n_u32(two);
    return {pair, pair, pair, pair};
}

// sum + a * b. Widened: both products of a pair, the second one first, as on x86. By the instruction: both products are
// rounded and so is their sum, each to odd, before that is added; so are its results others.
#ifdef KVFERRY_NEON_BF16
inline bfloat16x8_t as_bfloat16(uint32x4_t pairs) { return vreinterpretq_bf16_u32(pairs); }
inline Four dot(Four sum, uint32x4_t a, uint32x4_t b) { return vbfdotq_f32(sum, as_bfloat16(a), as_bfloat16(b)); }
#else
inline Four dot(Four sum, uint32x4_t a, uint32x4_t b) { return fma(evens(a), evens(b), fma(odds(a), odds(b), sum)); }
#endif
inline Vector dot(Vector sum, const Pairs& a, const Pairs& b) {
    return {{dot(sum.low.low, a.part[0], b.part[0]), dot(sum.low.high, a.part[1], b.part[1])},
            {dot(sum.high.low, a.part[2], b.part[2]), dot(sum.high.high, a.part[3], b.part[3])}};
}

// 16 values of two rows side by side; a row that is null is zeros.
inline Pairs zip(const bf16* one, const bf16* other) {
    const auto eight = [](const bf16* row, int at) { return row == nullptr ? vdupq_n_u16(0) : vld1q_u16(row + at); };
    const auto lower = [](uint16x8_t a, uint16x8_t b) { return vreinterpretq_u32_u16(vzip1q_u16(a, b)); };
    const auto upper = [](uint16x8_t a, uint16x8_t b) { return vreinterpretq_u32_u16(vzip2q_u16(a, b)); };
    const uint16x8_t a = eight(one, 0), b = eight(other, 0), c = eight(one, 8), d = eight(other, 8);
    return {lower(a, b), upper(a, b), lower(c, d), upper(c, d)};
}

// The same of two vectors, as elements.
inline Pairs to_pairs(Vector one, Vector other) {
    bf16 rows[2][16];
    store(rows[0], one);
    store(rows[1], other);
    return zip(rows[0], rows[1]);
}
