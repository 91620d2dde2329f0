// One token's attention by products of bfloat16: what of it depends on the registers there are.
//
// Keys are multiplied by pairs of dimensions, values by pairs of keys, in the order of `add_products`. Two keys' values stand
// side by side in the order of their dimensions, and so do the sums.
#pragma once

using Query = bf16;
using Weight = bf16;

constexpr bool kFetchesEvenly = false;  // nobody has measured it with this set
constexpr int kHeadsAtOnce = 4;
constexpr int kFewDimensions = 16;  // the least that `WeightedValues` takes
template <int HEADS>
constexpr int kManyDimensions = HEADS == 1 ? 64 : HEADS == 4 ? 16 : 32;  // sums of them stay in registers

inline void set_query(const bf16* query, int head_dim, Query* target) { std::copy_n(query, head_dim, target); }

// The weights as `WeightedValues` takes them, at `memory` or where they are.
inline const Weight* weights_to_add(const bf16* weights, long, float*) { return weights; }

// --- products with keys -----------------------------------------------------------------------------------

// scores[h * score_stride + i] = query h times key i of 16 keys; of those past `count`, times the last one.
template <int HEADS>
void score_16(const Query* queries, long query_stride, const bf16* keys, int head_dim, int count, float* scores,
              long score_stride, LinesAhead) {
    constexpr int kKeys = 4;
#pragma GCC unroll 1
    for (int first = 0; first < 16; first += kKeys) {
        const bf16* key[kKeys];
        Four sum[HEADS][kKeys];
#pragma GCC unroll 4
        for (int i = 0; i < kKeys; i++) {
            key[i] = keys + std::min(first + i, count - 1) * head_dim;
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sum[h][i] = vdupq_n_f32(0.0f);
        }
        for (int at = 0; at < head_dim; at += 8) {
            uint32x4_t part[HEADS];
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) part[h] = load_4_pairs(queries + h * query_stride + at);
#pragma GCC unroll 4
            for (int i = 0; i < kKeys; i++) {
                const uint32x4_t four = load_4_pairs(key[i] + at);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++) sum[h][i] = dot(sum[h][i], part[h], four);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
            const Four low = vpaddq_f32(sum[h][0], sum[h][1]), high = vpaddq_f32(sum[h][2], sum[h][3]);
            vst1q_f32(scores + h * score_stride + first, vpaddq_f32(low, high));
        }
    }
}

// --- weighted values --------------------------------------------------------------------------------------

// Sums of weighted values of HEADS heads and DIMENSIONS dimensions, in registers.
template <int HEADS, int DIMENSIONS>
class WeightedValues {
public:
    // What has been summed up, head h's at `sums + h * stride`, times the head's factor.
    WeightedValues(const float* sums, long stride, const float* factors, int head_dim, int) : head_dim_(head_dim) {
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 16
            for (int i = 0; i < kFours; i++) sum_[h][i] = vld1q_f32(sums + h * stride + 4 * i) * vdupq_n_f32(factors[h]);
        }
    }

    // Add a pair of keys' values; ALONE: the first key's. Head h's weights stand at `weights + h * stride`. Behind an odd
    // last key lies what an earlier owner left, which is not read: NaN does not vanish by a weight of zero.
    template <bool ALONE>
    [[gnu::always_inline]] void add(const bf16* values, const Weight* weights, long stride, LinesAhead&) {
        uint32x4_t weight[HEADS];
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
            std::uint32_t two;
            std::memcpy(&two, weights + h * stride, sizeof two);
            weight[h] = vdupq_n_u32(two);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kFours; i += 2) {
            const uint16x8_t one = vld1q_u16(values + 4 * i);
            const uint16x8_t other = ALONE ? vdupq_n_u16(0) : vld1q_u16(values + head_dim_ + 4 * i);
            const uint32x4_t lower = vreinterpretq_u32_u16(vzip1q_u16(one, other));
            const uint32x4_t upper = vreinterpretq_u32_u16(vzip2q_u16(one, other));
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) {
                sum_[h][i] = dot(sum_[h][i], weight[h], lower);
                sum_[h][i + 1] = dot(sum_[h][i + 1], weight[h], upper);
            }
        }
    }

    void store(float* sums, long stride) const {
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 16
            for (int i = 0; i < kFours; i++) vst1q_f32(sums + h * stride + 4 * i, sum_[h][i]);
        }
    }

private:
    static constexpr int kFours = DIMENSIONS / 4;

    Four sum_[HEADS][kFours];
    const int head_dim_;
};

// A head's sums, times `scale`, as elements in order.
inline void store_in_order(const float* sums, int head_dim, Vector scale, bf16* out) {
    for (int at = 0; at < head_dim; at += 16) store(out + at, load(sums + at) * scale);
}
