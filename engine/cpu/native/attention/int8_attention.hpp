// One token's attention over pages of whole numbers, which are multiplied as such: half the bytes, no more arithmetic.
//
// Queries, and a tile's weights times the scales of their values, become whole numbers of 16 bits with a scale each: they
// lose less than bfloat16 would. Products of 16 by 8 bits add up in 32 without overflow: 256 keys or dimensions at most,
// 256 x 32767 x 127 < 2^31. Order of reading as in attention.hpp.
#pragma once

#include <algorithm>
#include <vector>

#include "attention/attention.hpp"
#include "attention/pages.hpp"
#include "sets/shorts.hpp"
#include "attention/softmax.hpp"
#include "machine/vectors.hpp"

class Int8Attention {
public:
    Int8Attention(int group, int kv_heads, int head_dim, float cap)
        : group_(group), head_dim_(head_dim), stride_(padded(head_dim, 32)), queries_(kv_heads * group * stride_),
          query_steps_(kv_heads * group), scores_(kv_heads * group * kStride), value_scales_(kv_heads * kStride),
          softmax_(kv_heads * group, head_dim, cap), weights_(kStride), scaled_(kStride), shorts_(scores_.size()),
          weight_steps_(query_steps_.size()), factors_(query_steps_.size()), sums_(queries_.size()) {}

    // As `Attention::attend`.
    void attend(const StoredPages& pages, int kv_heads, const Element* queries, long first, long last, const Element* sinks,
                Element* out) {
        const int heads = kv_heads * group_;
        for (int head = 0; head < heads; head++) set_query(head, queries + head * head_dim_);
        softmax_.reset(heads, sinks, heads);
        std::fill_n(sums_.begin(), heads * stride_, 0.0f);
        bool are_ahead = false;  // a tile's values are: fetched with those of the tile before
        const long stretch = stretch_of(pages.block_size);
        for (long begin = first / stretch * stretch; begin < last; begin += kTileKeys) {
            const Range seen{std::max(begin, first), std::min(begin + kTileKeys, last)};
            if (kFetchesEvenly) ahead_.set(pages, kv_heads, seen.last, std::min(seen.last + kTileKeys, last));
            score(pages, kv_heads, begin, seen.last, last, are_ahead);
            for (int head = 0; head < heads; head++) weigh(head, {seen.first - begin, seen.last - begin});
            for (int kv = 0; kv < kv_heads; kv++) {
                in_register_heads(kv * group_, group_, [&]<int HEADS>(int head) {
                    for (int at = 0; at < head_dim_; at += kShorts) add_values<HEADS>(pages, kv, begin, seen, head, at);
                });
            }
            are_ahead = kFetchesEvenly;
        }
        for (int head = 0; head < heads; head++) {
            const Vector scale = repeat(1.0f / softmax_.total(head));
            store_two_in_order(sums_.data() + head * stride_, head_dim_, scale, out + head * head_dim_);
        }
    }

private:
    static constexpr float kMost = 32767.0f;
    static constexpr long kStride = kTileKeys + 16;  // whole vectors are written at any multiple of 8

    void set_query(int head, const Element* query) {
        std::int16_t* const target = queries_.data() + head * stride_;
        const float step = step_of(query, head_dim_, kMost);
        const Vector inverse = repeat(inverse_of(step));
        for (long i = 0; i < head_dim_; i += 16) store_shorts(target + i, nearest(load(query + i) * inverse));
        query_steps_[head] = step;
    }

    // --- keys ---------------------------------------------------------------------------------------------------------

    // Of all heads with the keys [begin, end), a tile's; and the scales of their values, zero behind them. The token sees
    // keys up to `last`.
    void score(const StoredPages& pages, int kv_heads, long begin, long end, long last, bool are_ahead) {
        const long step = std::min(16L, pages.block_size);
        for (long key = begin; key < end; key += step) {
            const long count = std::min(step, end - key);
            for (int kv = 0; kv < kv_heads; kv++) {
                if (!kFetchesEvenly) pages.of_head(kv).fetch_ahead(key, last);
                char* const keys = pages.block(key) + kv * pages.heads;
                const Vector scales = load(pages.scale(keys, key), lanes(count));
                const LinesAhead ahead = keys_ahead(pages, kv, key, last);
                score_16(kv, pages.numbers(keys, key), scales, int(count), key - begin, ahead);
            }
            bring_values(pages, kv_heads, key, count, key - begin, are_ahead);
        }
    }

    // Keys some stretches behind this one, to be fetched while those from here on are multiplied; their scales are at once.
    LinesAhead keys_ahead(const StoredPages& pages, int kv, long key, long last) const {
        const long far = key + kStretchesAhead * stretch_of(pages.block_size);
        if (!kFetchesEvenly || far >= last) return LinesAhead(nullptr, false);
        char* const keys = pages.block(far) + kv * pages.heads;
        fetch_lines(pages.scale(keys, far), 64);
        return LinesAhead(pages.numbers(keys, far));
    }

    void score_16(int kv, const std::int8_t* keys, Vector key_scales, int count, long at, LinesAhead ahead) {
        in_register_heads(kv * group_, group_, [&]<int HEADS>(int head) {
            float* const scores = scores_.data() + head * kStride + at;
            multiply_16<HEADS>(queries_.data() + head * stride_, keys, count, scores, ahead);
            ahead = ahead.none();
            for (int h = 0; h < HEADS; h++) {
                float* const own = scores + h * kStride;
                store(own, load(own) * (key_scales * repeat(query_steps_[head + h])));
            }
        });
    }

    // scores[h * kStride + i] = query h times key i of 16 keys; of those past `count`, times the last one.
    template <int HEADS>
    void multiply_16(const std::int16_t* queries, const std::int8_t* keys, int count, float* scores,
                     LinesAhead ahead) const {
        constexpr int kKeys = kKeysAtOnce<HEADS>;
        Sums totals[HEADS][16];
#pragma GCC unroll 1
        for (int first = 0; first < 16; first += kKeys) {
            const std::int8_t* key[kKeys];
            Sums sums[kKeys][HEADS];
            ahead.fetch_bytes(kKeys * head_dim_);
#pragma GCC unroll 8
            for (int i = 0; i < kKeys; i++) {
                key[i] = keys + std::min(first + i, count - 1) * head_dim_;
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++) sums[i][h] = no_sums();
            }
            for (int at = 0; at < head_dim_; at += kShorts) {
                const Values there = first_values(head_dim_ - at);
#pragma GCC unroll 8
                for (int i = 0; i < kKeys; i++) {
                    const Shorts part = load_shorts(key[i] + at, there);
#pragma GCC unroll 4
                    for (int h = 0; h < HEADS; h++) sums[i][h] = dot(sums[i][h], part, load_shorts(queries + h * stride_ + at));
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < kKeys; i++) {
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++) totals[h][first + i] = sums[i][h];
            }
        }
        for (int h = 0; h < HEADS; h++) store_totals(scores + h * kStride, totals[h]);
    }

    // Numbers that shall be near, and their scales: in the order in which they stand behind the keys.
    void bring_values(const StoredPages& pages, int kv_heads, long key, long count, long at, bool are_ahead) {
        for (int kv = 0; kv < kv_heads; kv++) {
            char* const head = pages.block(key) + pages.values + kv * pages.heads;
            const std::int8_t* const values = pages.numbers(head, key);
            if (!are_ahead) bring_lines(values, count * head_dim_);
            store(value_scales_.data() + kv * kStride + at, load(pages.scale(head, key), lanes(count)));
        }
    }

    // --- values -------------------------------------------------------------------------------------------------------

    // A head's scores of a tile to whole weights, which have its values' scales in them.
    void weigh(int head, Range seen) {
        const long width = padded(seen.last, 16);
        factors_[head] = softmax_.weigh(head, scores_.data() + head * kStride, seen, width, weights_.data());
        const float* const scales = value_scales_.data() + head / group_ * kStride;
        for (long i = 0; i < width; i += 16) store(scaled_.data() + i, load(weights_.data() + i) * load(scales + i));
        const float step = weight_steps_[head] = step_of(scaled_.data(), width, kMost);
        const Vector inverse = repeat(inverse_of(step));
        std::int16_t* const target = shorts_.data() + head * kStride;
        for (long i = 0; i < width; i += 16) store_shorts(target + i, nearest(load(scaled_.data() + i) * inverse));
    }

    // kShorts dimensions from `at` on. Keys in pairs, of which a block has a whole number: a key before an odd first one and
    // one behind an odd last one have the weight zero, and whole numbers are never NaN.
    template <int HEADS>
    void add_values(const StoredPages& pages, int kv, long begin, Range seen, int head, int at) {
        const std::int16_t* const weights = shorts_.data() + head * kStride;
        const Values there = first_values(head_dim_ - at);
        Sums lower[HEADS], upper[HEADS];
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) lower[h] = upper[h] = no_sums();
        for (long key = seen.first & ~1L; key < seen.last;) {
            const long block_end = std::min(seen.last, (key / pages.block_size + 1) * pages.block_size);
            char* const head_values = pages.block(key) + pages.values + kv * pages.heads;
            const std::int8_t* values = pages.numbers(head_values, key) + at;
            ahead_.next(kShorts, values).fetch_bytes(kShorts * stretch_of(pages.block_size));
            for (; key < block_end; key += 2, values += 2 * head_dim_) {
                const Shorts one = load_shorts(values, there), other = load_shorts(values + head_dim_, there);
                const Shorts low = lower_two(one, other), high = upper_two(one, other);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++) {
                    const Shorts weight = repeat_two(weights + h * kStride + (key - begin));
                    lower[h] = dot(lower[h], weight, low);
                    upper[h] = dot(upper[h], weight, high);
                }
            }
        }
        for (int h = 0; h < HEADS; h++) {
            float* const sums = sums_.data() + (head + h) * stride_ + at;
            add_sums(sums, lower[h], factors_[head + h], weight_steps_[head + h]);
            add_sums(sums + kShorts / 2, upper[h], factors_[head + h], weight_steps_[head + h]);
        }
    }

    const int group_, head_dim_;
    const long stride_;  // from head to head of queries and sums
    ValuesAhead ahead_;
    Lines<std::int16_t> queries_;
    Lines<float> query_steps_, scores_, value_scales_;
    RunningSoftmax softmax_;
    Lines<Element> weights_;
    Lines<float> scaled_;
    Lines<std::int16_t> shorts_;  // weights of each head
    Lines<float> weight_steps_, factors_, sums_;
};
