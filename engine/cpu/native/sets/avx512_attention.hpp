// One token's attention in AVX-512 with its bfloat16 products: what of it depends on the registers there are.
//
// Keys are multiplied by pairs of dimensions, values by pairs of keys. Two keys' values stand side by side as `lower_pairs`
// and `upper_pairs` leave them: of 32 dimensions the sums of 0..3, 8..11, 16..19 and 24..27 stand in one vector, the
// others in the next.
#pragma once

using Query = bf16;
using Weight = bf16;

// Whoever multiplies by keys or values also fetches as many lines of later ones.
#ifdef __AMX_BF16__
constexpr bool kFetchesEvenly = false;  // nobody has measured it there
#else
constexpr bool kFetchesEvenly = true;
#endif
template <int ELEMENTS>
constexpr int kLinesOf = ELEMENTS * int(sizeof(bf16)) / 64;
constexpr int kHeadsAtOnce = 4;
constexpr int kFewDimensions = 32;  // the least that `WeightedValues` takes
template <int HEADS>
constexpr int kManyDimensions = 64;  // sums of them stay in registers

inline void set_query(const bf16* query, int head_dim, Query* target) { std::copy_n(query, head_dim, target); }

// The weights as `WeightedValues` takes them, at `memory` or where they are.
inline const Weight* weights_to_add(const bf16* weights, long, float*) { return weights; }

// --- products with keys -----------------------------------------------------------------------------------

// Eight vectors' sums, each in two lanes: `sums_of_halves` adds these up. `v` is overwritten.
inline Vector halves_of_8(Vector* v) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // lane 4k + j: halves of v[i] (j even) and v[i + 4] (j odd)
        v[i] = _mm512_unpacklo_ps(v[i], v[i + 4]) + _mm512_unpackhi_ps(v[i], v[i + 4]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        v[i] = _mm512_unpacklo_ps(v[i], v[i + 2]) + _mm512_unpackhi_ps(v[i], v[i + 2]);
    }  // each 128-bit lane of v[i]: parts of i, i + 2, i + 4, i + 6 in the order of pairs
    return _mm512_shuffle_f32x4(v[0], v[1], 0x88) + _mm512_shuffle_f32x4(v[0], v[1], 0xdd);
}

// Lane i: the sum of the first (i < 8) or the second eight vectors' number i % 8.
inline Vector sums_of_halves(Vector first, Vector second) {
    const __m512 sums = _mm512_shuffle_f32x4(first, second, 0x88) + _mm512_shuffle_f32x4(first, second, 0xdd);
    const __m512i order = _mm512_set_epi32(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
    return _mm512_permutexvar_ps(order, sums);
}

// Lane i of the result is the sum of all lanes of v[i]. `v` is overwritten.
inline Vector sums_of_16(Vector* v) {
    const Vector first = halves_of_8(v);
    return sums_of_halves(first, halves_of_8(v + 8));
}

// The scores of HEADS heads with 16 keys, of which `count` are there. Keys are taken eight at a time, each by all the heads at
// once: so few products stand between two lines that a core looks far enough ahead to wait for many. HEAD_DIM 0: known at run
// time. A line is fetched with one of SHARE keys.
template <int HEADS, int SHARE, int HEAD_DIM, bool WHOLE>
void score_heads(const bf16* queries, long query_stride, const bf16* keys, int head_dim, int count, float* scores,
                 long score_stride, LinesAhead& ahead) {
    if (HEAD_DIM) head_dim = HEAD_DIM;
    Vector halves[HEADS][2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        Vector sums[HEADS][8];
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) sums[h][i] = repeat(0.0f);
        }
#pragma GCC unroll 8
        for (int at = 0; at < head_dim; at += 32) {
            const Values there = first_values(head_dim - at);
            Pairs parts[HEADS];
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) parts[h] = load_pairs(queries + h * query_stride + at);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const int row = WHOLE ? 8 * half + i : std::min(8 * half + i, count - 1);
                if (kFetchesEvenly && i % SHARE == 0) ahead.fetch<kLinesOf<32>>();
                const Pairs key = load_pairs(keys + row * head_dim + at, there);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++) sums[h][i] = dot(sums[h][i], parts[h], key);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) halves[h][half] = halves_of_8(sums[h]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++) store(scores + h * score_stride, sums_of_halves(halves[h][0], halves[h][1]));
}

template <int HEADS, int SHARE>
void score_heads(const bf16* queries, long query_stride, const bf16* keys, int head_dim, int count, float* scores,
                 long score_stride, LinesAhead& ahead) {
    const auto score = [&]<int HEAD_DIM, bool WHOLE>() {
        score_heads<HEADS, SHARE, HEAD_DIM, WHOLE>(queries, query_stride, keys, head_dim, count, scores, score_stride, ahead);
    };
    if (count < 16) score.template operator()<0, false>();
    else if (head_dim == 64) score.template operator()<64, true>();
    else if (head_dim == 128) score.template operator()<128, true>();
    else score.template operator()<0, true>();
}

// scores[h * score_stride + i] = query h times key i of 16 keys; of those past `count`, times the last one.
template <int HEADS>
void score_16(const Query* queries, long query_stride, const bf16* keys, int head_dim, int count, float* scores,
              long score_stride, LinesAhead ahead) {
    if constexpr (HEADS <= 3) {  // their 24 sums, three queries and a key stay in registers
        score_heads<HEADS, 1>(queries, query_stride, keys, head_dim, count, scores, score_stride, ahead);
    } else {
        for (int h = 0; h < HEADS; h += 2) {
            score_heads<2, HEADS / 2>(queries + h * query_stride, query_stride, keys, head_dim, count,
                                      scores + h * score_stride, score_stride, ahead);
        }
    }
}

// --- weighted values --------------------------------------------------------------------------------------

// Values of two rows side by side. Of 32 those at 0..3, 8..11, 16..19 and 24..27; `upper_pairs`: the others.
inline Pairs lower_pairs(Pairs one, Pairs other) { return _mm512_unpacklo_epi16(one, other); }
inline Pairs upper_pairs(Pairs one, Pairs other) { return _mm512_unpackhi_epi16(one, other); }

// The first (HALF 0) or last 16 of 32 in order, from vectors of the lower and the upper ones.
template <int HALF>
Vector in_order(Vector lower, Vector upper) {
    const __m512i order = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    return _mm512_permutex2var_ps(lower, _mm512_add_epi32(order, _mm512_set1_epi32(8 * HALF)), upper);
}

// Sums of weighted values of HEADS heads and DIMENSIONS dimensions, in registers.
template <int HEADS, int DIMENSIONS>
class WeightedValues {
public:
    // What has been summed up, head h's at `sums + h * stride`, times the head's factor. Of the values, `left` are there.
    WeightedValues(const float* sums, long stride, const float* factors, int head_dim, int left)
        : head_dim_(head_dim), there_(first_values(left)) {
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 4
            for (int i = 0; i < 2 * kPairs; i++) sum_[h][i] = load(sums + h * stride + 16 * i) * repeat(factors[h]);
        }
    }

    // Add a pair of keys' values; ALONE: the first key's. Head h's weights stand at `weights + h * stride`. Behind an odd
    // last key lies what an earlier owner left, which is not read: NaN does not vanish by a weight of zero.
    template <bool ALONE>
    [[gnu::always_inline]] void add(const bf16* values, const Weight* weights, long stride, LinesAhead& ahead) {
        if (kFetchesEvenly) ahead.fetch<kLinesOf<2 * DIMENSIONS>>();
        Pairs pair[2 * kPairs];
#pragma GCC unroll 2
        for (int i = 0; i < kPairs; i++) {
            const Pairs one = load_pairs(values + 32 * i, there_);
            const Pairs other = load_pairs(values + head_dim_ + 32 * i, ALONE ? first_values(0) : there_);
            pair[2 * i] = lower_pairs(one, other);
            pair[2 * i + 1] = upper_pairs(one, other);
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
            const Pairs weight = repeat_pair(weights + h * stride);
#pragma GCC unroll 4
            for (int i = 0; i < 2 * kPairs; i++) sum_[h][i] = dot(sum_[h][i], weight, pair[i]);
        }
    }

    void store(float* sums, long stride) const {
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 4
            for (int i = 0; i < 2 * kPairs; i++) ::store(sums + h * stride + 16 * i, sum_[h][i]);
        }
    }

private:
    static constexpr int kPairs = DIMENSIONS / 32;

    Vector sum_[HEADS][2 * kPairs];
    const int head_dim_;
    const Values there_;
};

// A head's sums, times `scale`, as elements in order.
inline void store_in_order(const float* sums, int head_dim, Vector scale, bf16* out) {
    for (int at = 0; at < head_dim; at += 32) {
        const Vector lower = load(sums + at), upper = load(sums + at + 16);
        store(out + at, in_order<0>(lower, upper) * scale);
        if (at + 16 == head_dim) break;
        store(out + at + 16, in_order<1>(lower, upper) * scale);
    }
}
