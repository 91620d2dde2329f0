// One token's attention by float32, of AVX2 and NEON: what of it depends on the registers there are.
//
// Keys and values are widened once for all heads. Sums of a head are 8 lanes wide; of a token's weighted values the even
// dimensions of 16 stand before the odd ones, because that is how pairs are widened (float32: all in order). Keys are
// weighted in the order of `add_products`: of a pair the second, then the first.
#pragma once

using Query = float;   // queries and weights are widened before they are used again and again
using Weight = float;

constexpr int kHeadsAtOnce = 4;
constexpr int kFewDimensions = 16;  // the least that `WeightedValues` takes
template <int HEADS>
constexpr int kManyDimensions = HEADS == 1 ? 64 : HEADS == 4 ? 16 : 32;  // sums of them stay in registers

// Whoever multiplies by keys or values also fetches as many lines of later ones.
constexpr bool kFetchesEvenly = true;
template <int ELEMENTS>
constexpr int kLinesOf = ELEMENTS * int(sizeof(Element)) / 64;

// 16 elements, by eight, in the order in which they are cheapest to widen.
#ifdef KVFERRY_FLOAT32
inline Eight early(const float* source) { return load_8(source); }
inline Eight late(const float* source) { return load_8(source + 8); }
inline Vector in_order(Eight early, Eight late) { return {early, late}; }
#else
inline Eight early(const bf16* source) { return evens(source); }
inline Eight late(const bf16* source) { return odds(source); }
inline Vector in_order(Eight early, Eight late) { return interleaved(early, late); }
#endif

inline void set_query(const Element* query, int head_dim, Query* target) {
    for (int at = 0; at < head_dim; at += 16) {
        store(target + at, early(query + at));
        store(target + at + 8, late(query + at));
    }
}

// The weights as `WeightedValues` takes them, at `memory` or where they are.
inline const Weight* weights_to_add(const Element* weights, long count, float* memory) {
    for (long i = 0; i < count; i += 16) store(memory + i, load(weights + i));
    return memory;
}

// scores[h * score_stride + i] = query h times key i of 16 keys; of those past `count`, times the last one.
template <int HEADS>
void score_16(const Query* queries, long query_stride, const Element* keys, int head_dim, int count, float* scores,
              long score_stride, LinesAhead ahead) {
    constexpr int kKeys = HEADS == 4 ? 2 : HEADS == 1 ? 8 : 4;  // whose sums stay in registers
    Eight sums[HEADS][16];
#pragma GCC unroll 1
    for (int first = 0; first < 16; first += kKeys) {
        const Element* key[kKeys];
        Eight sum[kKeys][HEADS];
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; i++) {
            key[i] = keys + std::min(first + i, count - 1) * head_dim;
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sum[i][h] = repeat_8(0.0f);
        }
        for (int at = 0; at < head_dim; at += 16) {
            ahead.fetch<kLinesOf<kKeys * 16>>();
#pragma GCC unroll 8
            for (int i = 0; i < kKeys; i++) {
                const Eight part = late(key[i] + at);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++) sum[i][h] = fma(part, load_8(queries + h * query_stride + at + 8), sum[i][h]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < kKeys; i++) {
                const Eight part = early(key[i] + at);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++) sum[i][h] = fma(part, load_8(queries + h * query_stride + at), sum[i][h]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; i++) {
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sums[h][first + i] = sum[i][h];
        }
    }
    for (int h = 0; h < HEADS; h++) {
        store(scores + h * score_stride, sums_of_8(sums[h]));
        store(scores + h * score_stride + 8, sums_of_8(sums[h] + 8));
    }
}

// Sums of weighted values of HEADS heads and DIMENSIONS dimensions, in registers.
template <int HEADS, int DIMENSIONS>
class WeightedValues {
public:
    // What has been summed up, head h's at `sums + h * stride`, times the head's factor.
    WeightedValues(const float* sums, long stride, const float* factors, int head_dim, int) : head_dim_(head_dim) {
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; i++) {
                sum_[h][i] = load_8(sums + h * stride + 8 * i) * repeat_8(factors[h]);
            }
        }
    }

    // Add a pair of keys' values; ALONE: the first key's. Head h's weights stand at `weights + h * stride`.
    template <bool ALONE>
    [[gnu::always_inline]] void add(const Element* values, const Weight* weights, long stride, LinesAhead& ahead) {
        ahead.fetch<kLinesOf<2 * DIMENSIONS>>();
        if (!ALONE) add_one(values + head_dim_, weights + 1, stride);
        add_one(values, weights, stride);
    }

    void store(float* sums, long stride) const {
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; i++) ::store(sums + h * stride + 8 * i, sum_[h][i]);
        }
    }

private:
    static constexpr int kVectors = DIMENSIONS / 8;

    [[gnu::always_inline]] void add_one(const Element* values, const Weight* weights, long stride) {
        Eight weight[HEADS];
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) weight[h] = repeat_8(weights + h * stride);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; i += 2) {
            const Eight first = early(values + 8 * i);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sum_[h][i] = fma(weight[h], first, sum_[h][i]);
            const Eight second = late(values + 8 * i);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sum_[h][i + 1] = fma(weight[h], second, sum_[h][i + 1]);
        }
    }

    Eight sum_[HEADS][kVectors];
    const int head_dim_;
};

// A head's sums, times `scale`, as elements in order.
inline void store_in_order(const float* sums, int head_dim, Vector scale, Element* out) {
    for (int at = 0; at < head_dim; at += 16) {
        const Vector values = load(sums + at);
        store(out + at, in_order(values.low, values.high) * scale);
    }
}
