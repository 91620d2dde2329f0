// One token's attention over a sequence's pages, for one KV head and the query heads that share it.
//
// Keys come in tiles: scores of all the heads, the softmax's running maximum and sum (Milakov & Gimelshein 2018), then
// the values, weighted. Keys and values are read once. Probabilities are rounded to bfloat16 where they weigh values, of
// which two are taken at a time; their sum is not.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vectors.hpp"

constexpr int kTileKeys = 128;  // a multiple of every block size
constexpr int kKeysAhead = 32;  // prefetched before they are needed

struct Pages {
    const bf16* keys;       // block 0 of this layer and head; a block is [block_size][head_dim]
    long values;            // from a block's keys to its values
    long stride;            // from block to block
    const std::int32_t* blocks;
    long block_size, head_dim;

    const bf16* key(long index) const {
        return keys + blocks[index / block_size] * stride + index % block_size * head_dim;
    }
};

// What does not depend on how scores become weights. TILE_KEYS: of a tile, a multiple of every block size.
template <int TILE_KEYS>
class TokenAttention {
public:
    TokenAttention(int num_heads, int head_dim)
        : num_heads_(num_heads), head_dim_(head_dim), query_stride_((head_dim + 31) / 32 * 32),
          queries_(num_heads * query_stride_), weights_(num_heads * kScoreStride), scores_(num_heads * kScoreStride),
          sums_(num_heads * query_stride_), factor_(num_heads) {}

    bf16* query(int head) { return queries_.data() + head * query_stride_; }

protected:
    static constexpr int kScoreStride = TILE_KEYS + 16;  // whole vectors are written at any multiple of 8

    float* scores(int head) { return scores_.data() + head * kScoreStride; }
    bf16* weights(int head) { return weights_.data() + head * kScoreStride; }
    float* sums(int head) { return sums_.data() + head * query_stride_; }

    void prefetch(const bf16* rows, int count) const {
        for (long at = 0; at < long(count) * head_dim_; at += 32) _mm_prefetch(rows + at, _MM_HINT_T1);
    }

    // --- values -----------------------------------------------------------------------------------------

    // Up to four heads and 64 dimensions at a time: their sums stay in registers.
    void add_values(const Pages& pages, long begin, long first, long last) {
        for (int head = 0; head < num_heads_; head += 4) {
            switch (num_heads_ - head) {
                case 1: add_values<1>(pages, begin, first, last, head); break;
                case 2: add_values<2>(pages, begin, first, last, head); break;
                case 3: add_values<3>(pages, begin, first, last, head); break;
                default: add_values<4>(pages, begin, first, last, head);
            }
        }
    }

    template <int HEADS>
    void add_values(const Pages& pages, long begin, long first, long last, int head) {
        int at = 0;
        for (; at + 64 <= head_dim_; at += 64) add_values<HEADS, 2>(pages, begin, first, last, head, at);
        for (; at < head_dim_; at += 32) add_values<HEADS, 1>(pages, begin, first, last, head, at);
    }

    // Two keys' values side by side, as `_mm512_unpacklo_epi16` and `hi` leave them: of 32 dimensions the sums of 0..3,
    // 8..11, 16..19 and 24..27 stand in one vector, the others in the next, until `finish`. A block has an even number of
    // keys. The key before an odd first one has the weight zero; behind an odd last one lies what an earlier owner left,
    // which is not read: NaN does not vanish by a weight of zero.
    template <int HEADS, int VECTORS>
    void add_values(const Pages& pages, long begin, long first, long last, int head, int at) {
        const __mmask32 mask = head_dim_ - at >= 32 ? __mmask32(-1) : __mmask32(0xffff);
        __m512 sum[HEADS][2 * VECTORS];
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 4
            for (int i = 0; i < 2 * VECTORS; i++) {
                const __m512 before = _mm512_loadu_ps(sums(head + h) + at + 16 * i);
                sum[h][i] = _mm512_mul_ps(before, _mm512_set1_ps(factor_[head + h]));
            }
        }
        const auto add = [&](long key, const bf16* values, __mmask32 other_mask) __attribute__((always_inline)) {
            __m512bh pair[2 * VECTORS];
#pragma GCC unroll 2
            for (int i = 0; i < VECTORS; i++) {
                const __m512i one = (__m512i)load_pairs(values + 32 * i, mask);
                const __m512i other = (__m512i)load_pairs(values + head_dim_ + 32 * i, other_mask);
                pair[2 * i] = (__m512bh)_mm512_unpacklo_epi16(one, other);
                pair[2 * i + 1] = (__m512bh)_mm512_unpackhi_epi16(one, other);
            }
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) {
                std::int32_t two;
                std::memcpy(&two, weights(head + h) + (key - begin), sizeof two);
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
                for (int i = 0; i < 2 * VECTORS; i++) sum[h][i] = _mm512_dpbf16_ps(sum[h][i], weight, pair[i]);
            }
        };
        const long whole = last & ~1L;
        for (long key = first & ~1L; key < whole;) {
            const long block_end = std::min(whole, (key / pages.block_size + 1) * pages.block_size);
            const bf16* values = pages.key(key) + pages.values + at;
            for (; key < block_end; key += 2, values += 2 * head_dim_) add(key, values, mask);
        }
        if (whole < last) add(whole, pages.key(whole) + pages.values + at, 0);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 4
            for (int i = 0; i < 2 * VECTORS; i++) _mm512_storeu_ps(sums(head + h) + at + 16 * i, sum[h][i]);
        }
    }

    // The result of a head, its dimensions in order.
    void finish(int head, float total, bf16* out) {
        const __m512i order = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
        const __m512i next = _mm512_add_epi32(order, _mm512_set1_epi32(8));
        const __m512 scale = _mm512_set1_ps(1.0f / total);
        for (int at = 0; at < head_dim_; at += 32) {
            const __m512 one = _mm512_loadu_ps(sums(head) + at), other = _mm512_loadu_ps(sums(head) + at + 16);
            store(out + at, _mm512_mul_ps(_mm512_permutex2var_ps(one, order, other), scale));
            if (at + 16 == head_dim_) break;
            store(out + at + 16, _mm512_mul_ps(_mm512_permutex2var_ps(one, next, other), scale));
        }
    }

    const int num_heads_, head_dim_, query_stride_;
    std::vector<bf16> queries_, weights_;
    std::vector<float> scores_, sums_, factor_;
};

class Attention : public TokenAttention<kTileKeys> {
public:
    Attention(int num_heads, int head_dim)
        : TokenAttention(num_heads, head_dim), most_(num_heads), total_(num_heads) {}

    // Attend with the queries over the keys [first, last); the result is out [num_heads][head_dim].
    void attend(const Pages& pages, long first, long last, bf16* out) {
        std::fill(most_.begin(), most_.end(), -std::numeric_limits<float>::infinity());
        std::fill(total_.begin(), total_.end(), 0.0f);
        std::fill(sums_.begin(), sums_.end(), 0.0f);
        for (long begin = first / pages.block_size * pages.block_size; begin < last; begin += kTileKeys) {
            const long end = std::min(begin + kTileKeys, last), visible = std::max(begin, first);
            score(pages, begin, end, last);
            for (int head = 0; head < num_heads_; head++) weigh(head, visible - begin, end - begin);
            add_values(pages, begin, visible, end);
        }
        for (int head = 0; head < num_heads_; head++) finish(head, total_[head], out + head * head_dim_);
    }

private:
    // --- scores -----------------------------------------------------------------------------------------

    // Pages are scattered, so that the processor cannot guess what comes next: it is told.
    void score(const Pages& pages, long begin, long end, long last) {
        const long step = std::min(16L, pages.block_size);
        for (long key = begin; key < end; key += step) {
            const bf16* keys = pages.key(key);
            const int count = int(std::min(step, end - key));
            prefetch(keys + pages.values, count);
            if (key + kKeysAhead < last) prefetch(pages.key(key + kKeysAhead), int(step));
            for (int head = 0; head < num_heads_; head++) {
                _mm512_storeu_ps(scores(head) + (key - begin), dots(query(head), keys, count));
            }
        }
    }

    __m512 dots(const bf16* query, const bf16* keys, int count) const {
        if (count < 16) return dots<0, false>(query, keys, count);
        if (head_dim_ == 64) return dots<64, true>(query, keys, count);
        if (head_dim_ == 128) return dots<128, true>(query, keys, count);
        return dots<0, true>(query, keys, count);
    }

    // Lane i: the query with key i; past `count`, with the last key. HEAD_DIM 0: known at run time.
    template <int HEAD_DIM, bool WHOLE>
    __m512 dots(const bf16* query, const bf16* keys, int count) const {
        const int head_dim = HEAD_DIM ? HEAD_DIM : head_dim_;
        __m512 sum[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int at = 0; at < head_dim; at += 32) {
            const __mmask32 mask = head_dim - at >= 32 ? __mmask32(-1) : __mmask32(0xffff);
            const __m512bh part = load_pairs(query + at);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const int row = WHOLE ? i : std::min(i, count - 1);
                sum[i] = _mm512_dpbf16_ps(sum[i], part, load_pairs(keys + row * head_dim + at, mask));
            }
        }
        return sums_of_16(sum);
    }

    // --- softmax ----------------------------------------------------------------------------------------

    // Scores [first, last) of the tile to weights relative to the largest score so far.
    void weigh(int head, long first, long last) {
        float* scores = this->scores(head);
        const __m512 scale = _mm512_set1_ps(kLog2E / __builtin_sqrtf(float(head_dim_)));
        const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        __m512 most = none;
        for (long i = first / 16 * 16; i < last; i += 16) {
            const __mmask16 mask = lanes(last - i) & __mmask16(first > i ? 0xffffu << (first - i) : 0xffffu);
            const __m512 values = _mm512_mask_mul_ps(none, mask, _mm512_loadu_ps(scores + i), scale);
            _mm512_storeu_ps(scores + i, values);
            most = _mm512_max_ps(most, values);
        }
        const float largest = std::max(most_[head], _mm512_reduce_max_ps(most));
        __m512 total = _mm512_setzero_ps();
        for (long i = first / 16 * 16; i < last; i += 16) {
            const __m512 weight = exp2(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(largest)));
            store(weights(head) + i, weight);
            total = _mm512_add_ps(total, weight);
        }
        factor_[head] = _mm512_cvtss_f32(exp2(_mm512_set1_ps(most_[head] - largest)));
        most_[head] = largest;
        total_[head] = total_[head] * factor_[head] + _mm512_reduce_add_ps(total);
    }

    std::vector<float> most_, total_;
};
