// One token's attention over a sequence's pages, for one KV head and the query heads that share it.
//
// Keys come in tiles: scores of all the heads, the softmax's running maximum and sum (Milakov & Gimelshein 2018), then
// the values, weighted. Keys and values are read once. Probabilities are rounded to elements where they weigh values, of
// which two are taken at a time; their sum is not.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "softmax.hpp"
#include "vectors.hpp"

constexpr int kTileKeys = 128;  // a multiple of every block size
constexpr int kKeysAhead = 32;  // prefetched before they are needed

struct Pages {
    const Element* keys;       // block 0 of this layer and head; a block is [block_size][head_dim]
    long values;            // from a block's keys to its values
    long stride;            // from block to block
    const std::int32_t* blocks;
    long block_size, head_dim;

    const Element* key(long index) const {
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

    Element* query(int head) { return queries_.data() + head * query_stride_; }

protected:
    static constexpr int kScoreStride = TILE_KEYS + 16;  // whole vectors are written at any multiple of 8

    float* scores(int head) { return scores_.data() + head * kScoreStride; }
    Element* weights(int head) { return weights_.data() + head * kScoreStride; }
    float* sums(int head) { return sums_.data() + head * query_stride_; }

    void prefetch(const Element* rows, int count) const {
        for (long at = 0; at < long(count) * head_dim_; at += kLine) _mm_prefetch(rows + at, _MM_HINT_T1);
    }

    // --- values -----------------------------------------------------------------------------------------

    // A few heads and up to 64 dimensions at a time: their sums stay in registers.
    void add_values(const Pages& pages, long begin, long first, long last) {
        for (int head = 0; head < num_heads_; head += kHeadsAtOnce) {
            switch (std::min(num_heads_ - head, kHeadsAtOnce)) {
                case 1: add_values<1>(pages, begin, first, last, head); break;
                case 2: add_values<2>(pages, begin, first, last, head); break;
                case 3: add_values<3>(pages, begin, first, last, head); break;
                default: add_values<4>(pages, begin, first, last, head);
            }
        }
    }

    template <int HEADS>
    void add_values(const Pages& pages, long begin, long first, long last, int head) {
        constexpr int kWide = 32 * kWideValues;
        int at = 0;
        for (; at + kWide <= head_dim_; at += kWide) {
            add_values<HEADS, kWideValues>(pages, begin, first, last, head, at);
        }
        for (; at < head_dim_; at += 32) add_values<HEADS, 1>(pages, begin, first, last, head, at);
    }

    // Two keys' values side by side, as `lower_pairs` and `upper_pairs` leave them: of 32 dimensions the sums of 0..3,
    // 8..11, 16..19 and 24..27 stand in one vector, the others in the next, until `finish`. A block has an even number of
    // keys. The key before an odd first one has the weight zero; behind an odd last one lies what an earlier owner left,
    // which is not read: NaN does not vanish by a weight of zero.
    template <int HEADS, int VECTORS>
    void add_values(const Pages& pages, long begin, long first, long last, int head, int at) {
        const Values there = first_values(head_dim_ - at), none = first_values(0);
        Vector sum[HEADS][2 * VECTORS];
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 4
            for (int i = 0; i < 2 * VECTORS; i++) {
                sum[h][i] = load(sums(head + h) + at + 16 * i) * repeat(factor_[head + h]);
            }
        }
        const auto add = [&](long key, const Element* values, Values other_there) __attribute__((always_inline)) {
            Pairs pair[2 * VECTORS];
#pragma GCC unroll 2
            for (int i = 0; i < VECTORS; i++) {
                const Pairs one = load_pairs(values + 32 * i, there);
                const Pairs other = load_pairs(values + head_dim_ + 32 * i, other_there);
                pair[2 * i] = lower_pairs(one, other);
                pair[2 * i + 1] = upper_pairs(one, other);
            }
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) {
                const Pairs weight = repeat_pair(weights(head + h) + (key - begin));
#pragma GCC unroll 4
                for (int i = 0; i < 2 * VECTORS; i++) sum[h][i] = dot(sum[h][i], weight, pair[i]);
            }
        };
        const long whole = last & ~1L;
        for (long key = first & ~1L; key < whole;) {
            const long block_end = std::min(whole, (key / pages.block_size + 1) * pages.block_size);
            const Element* values = pages.key(key) + pages.values + at;
            for (; key < block_end; key += 2, values += 2 * head_dim_) add(key, values, there);
        }
        if (whole < last) add(whole, pages.key(whole) + pages.values + at, none);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 4
            for (int i = 0; i < 2 * VECTORS; i++) store(sums(head + h) + at + 16 * i, sum[h][i]);
        }
    }

    // The result of a head, its dimensions in order.
    void finish(int head, float total, Element* out) {
        const Vector scale = repeat(1.0f / total);
        for (int at = 0; at < head_dim_; at += 32) {
            const Vector lower = load(sums(head) + at), upper = load(sums(head) + at + 16);
            store(out + at, in_order<0>(lower, upper) * scale);
            if (at + 16 == head_dim_) break;
            store(out + at + 16, in_order<1>(lower, upper) * scale);
        }
    }

    const int num_heads_, head_dim_, query_stride_;
    std::vector<Element> queries_, weights_;
    std::vector<float> scores_, sums_, factor_;
};

class Attention : public TokenAttention<kTileKeys> {
public:
    Attention(int num_heads, int head_dim, float cap)
        : TokenAttention(num_heads, head_dim), bound_(bound_of(cap, head_dim)), most_(num_heads), total_(num_heads) {}

    // Attend with the queries over the keys [first, last), and the heads' sinks unless null; the result is
    // out [num_heads][head_dim].
    void attend(const Pages& pages, long first, long last, const Element* sinks, Element* out) {
        std::fill(most_.begin(), most_.end(), -std::numeric_limits<float>::infinity());
        std::fill(total_.begin(), total_.end(), sinks == nullptr ? 0.0f : 1.0f);
        for (int head = 0; sinks != nullptr && head < num_heads_; head++) most_[head] = widened(sinks[head]) * kLog2E;
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
            const Element* keys = pages.key(key);
            const int count = int(std::min(step, end - key));
            prefetch(keys + pages.values, count);
            if (key + kKeysAhead < last) prefetch(pages.key(key + kKeysAhead), int(step));
            for (int head = 0; head < num_heads_; head++) {
                store(scores(head) + (key - begin), dots(query(head), keys, count));
            }
        }
    }

    Vector dots(const Element* query, const Element* keys, int count) const {
        if (count < 16) return dots<0, false>(query, keys, count);
        if (head_dim_ == 64) return dots<64, true>(query, keys, count);
        if (head_dim_ == 128) return dots<128, true>(query, keys, count);
        return dots<0, true>(query, keys, count);
    }

    // Lane i: the query with key i; past `count`, with the last key. HEAD_DIM 0: known at run time.
    template <int HEAD_DIM, bool WHOLE>
    Vector dots(const Element* query, const Element* keys, int count) const {
        const int head_dim = HEAD_DIM ? HEAD_DIM : head_dim_;
        Vector sums[16];
#pragma GCC unroll 4
        for (int first = 0; first < 16; first += kDotsAtOnce) {
            Vector sum[kDotsAtOnce];
#pragma GCC unroll 16
            for (int i = 0; i < kDotsAtOnce; i++) sum[i] = repeat(0.0f);
#pragma GCC unroll 8
            for (int at = 0; at < head_dim; at += 32) {
                const Values there = first_values(head_dim - at);
                const Pairs part = load_pairs(query + at);
#pragma GCC unroll 16
                for (int i = 0; i < kDotsAtOnce; i++) {
                    const int row = WHOLE ? first + i : std::min(first + i, count - 1);
                    sum[i] = dot(sum[i], part, load_pairs(keys + row * head_dim + at, there));
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < kDotsAtOnce; i++) sums[first + i] = sum[i];
        }
        return sums_of_16(sums);
    }

    // --- softmax ----------------------------------------------------------------------------------------

    // Scores [first, last) of the tile to weights relative to the largest score so far.
    void weigh(int head, long first, long last) {
        float* scores = this->scores(head);
        const Vector scale = repeat(kLog2E / __builtin_sqrtf(float(head_dim_)));
        const Vector none = repeat(-std::numeric_limits<float>::infinity());
        Vector most = none;
        for (long i = first / 16 * 16; i < last; i += 16) {
            Vector values = load(scores + i);
            if (bound_ != 0.0f) values = capped(values, bound_);
            values = select(between(first - i, last - i), values * scale, none);
            store(scores + i, values);
            most = max(most, values);
        }
        const float largest = std::max(most_[head], max_of(most));
        Vector total = repeat(0.0f);
        for (long i = first / 16 * 16; i < last; i += 16) {
            const Vector weight = exp2(load(scores + i) - repeat(largest));
            store(weights(head) + i, weight);
            total = total + weight;
        }
        factor_[head] = lane_0(exp2(repeat(most_[head] - largest)));
        most_[head] = largest;
        total_[head] = total_[head] * factor_[head] + sum_of(total);
    }

    const float bound_;
    std::vector<float> most_, total_;
};
