// Attention of a stretch of a prompt over a sequence's pages, for one KV head and the query heads that share it.
//
// FlashAttention-2 (Dao 2023): keys in tiles, and for each few query rows the scores, the softmax's running maximum and
// sum, and the weighted values, all while the tile is near. Both products run in the inner loop of linear.hpp, for which
// a tile's keys and values are packed once and then read by every row. Probabilities are rounded to elements for the
// second product; their sum is not.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.hpp"
#include "linear.hpp"
#include "softmax.hpp"
#include "tiles.hpp"
#include "vectors.hpp"

// 16 keys to a tile whose columns are keys: 16 pairs of dimensions from `at` on (perhaps 8 at the end of an odd head size).
inline void pack_keys(const Element* const* source, int head_dim, int at, Element* target) {
    pack_columns(source, at, head_dim, std::min(16, int(padded(head_dim, kProductInputs) - at) / 2), target);
}

class PromptAttention {
public:
    static constexpr long kRows = 240;  // query rows, tokens x heads, that a tile is packed for
    static constexpr long kKeys = kTileKeys;

    // `is_exact`: tiles begin at multiples of kKeys also behind a window, so that a token's result is the same whatever
    // tokens are attended with it.
    PromptAttention(int num_heads, int head_dim, float cap, bool is_exact)
        : is_exact_(is_exact), num_heads_(num_heads), head_dim_(head_dim), inputs_(int(padded(head_dim, kProductInputs))),
          value_tiles_((head_dim + kTileColumns - 1) / kTileColumns), max_tokens_(tokens_at_once(num_heads)),
          queries_(rows() * inputs_), keys_(kKeys * inputs_), values_(kKeys * value_tiles_ * kTileColumns),
          sums_(rows() * value_tiles_ * kTileColumns), softmax_(rows(), head_dim, cap) {}

    // Query tokens of one call, at most.
    static long tokens_at_once(int num_heads) { return std::max(1L, kRows / num_heads); }

    // Queries of `tokens` tokens from `position` on, each [num_heads][head_dim] and `stride` from the next; so is `out`.
    // Token i sees the keys up to its own, `window` of them at most (0: all).
    void attend(const StoredPages& stored, const Element* queries, long tokens, long position, long window, const Element* sinks,
                Element* out, long stride) {
        const long rows = tokens * num_heads_;
        for (long row = 0; row < rows; row++) {
            const Element* query = queries + row / num_heads_ * stride + row % num_heads_ * head_dim_;
            std::copy_n(query, head_dim_, queries_.data() + row * inputs_);
        }
        softmax_.reset(rows, sinks, num_heads_);
        std::fill_n(sums_.begin(), rows * value_tiles_ * kTileColumns, 0.0f);
        const long last = position + tokens;
        const long first = first_key(position, window);
        for (long begin = is_exact_ ? first / kKeys * kKeys : first; begin < last; begin += kKeys) {
            const long count = std::min(kKeys, last - begin);
            pack(near_.of(stored, 1, begin, begin + count), begin, count);
            for (long row = 0; row < rows; row += kRowsAtOnce) {
                attend_rows(row, std::min(rows - row, long(kRowsAtOnce)), position, window, begin, count);
            }
        }
        for (long row = 0; row < rows; row++) {
            Element* target = out + row / num_heads_ * stride + row % num_heads_ * head_dim_;
            const Vector scale = repeat(1.0f / softmax_.total(row));
            for (int i = 0; i < head_dim_; i += 16) store(target + i, load(sums(row) + i) * scale);
        }
    }

    static long first_key(long position, long window) { return window == 0 ? 0 : std::max(0L, position + 1 - window); }

private:
    long rows() const { return max_tokens_ * num_heads_; }
    float* sums(long row) { return sums_.data() + row * value_tiles_ * kTileColumns; }

    // --- packing ----------------------------------------------------------------------------------------

    // Keys [begin, begin + count): tiles of 64 columns that are keys, pairs of inputs that are dimensions.
    // Values: tiles of 64 columns that are dimensions, pairs of inputs that are keys. Padding is zero.
    void pack(const Pages& pages, long begin, long count) {
        const Element* source[kKeys];
        const long whole = padded(count, kTileColumns);
        for (long i = 0; i < count; i++) source[i] = pages.key(begin + i);
        for (long i = count; i < whole; i++) source[i] = nullptr;
        for (long key = 0; key < whole; key += 16) {
            Element* target = keys_.data() + key / kTileColumns * (inputs_ * kTileColumns) + key % kTileColumns * 2;
            for (int at = 0; at < head_dim_; at += 32) pack_keys(source + key, head_dim_, at, target + at * kTileColumns);
        }
        for (long key = 0; key < whole; key += 2) {
            for (int at = 0; at < head_dim_; at += 16) pack_values(pages.values, source + key, key, at);
        }
    }

    // 16 dimensions of two keys, side by side.
    void pack_values(long values, const Element* const* source, long key, int at) {
        Element* target = values_.data() + at / kTileColumns * (kKeys * kTileColumns) + key * kTileColumns +
                       at % kTileColumns * 2;
        const auto row = [&](const Element* key) { return key == nullptr ? nullptr : key + values + at; };
        store_pairs(target, zip(row(source[0]), row(source[1])));
    }

    // --- a few rows and a tile --------------------------------------------------------------------------

    void attend_rows(long row, long rows, long position, long window, long begin, long count) {
        const long first = position + row / num_heads_, last = position + (row + rows - 1) / num_heads_;
        const long visible = std::min(last + 1 - begin, count);  // to the last of the rows
        if (visible <= 0 || begin + count <= first_key(first, window)) return;
        alignas(64) float scores[kRowsAtOnce * kKeys];
        alignas(64) Element weights[kRowsAtOnce * kKeys];
        const long width = padded(visible, kTileColumns);
        for (long key = 0; key < width; key += kTileColumns) {
            add_products<true, 0>(int(rows), queries_.data() + row * inputs_, inputs_, keys_.data() + key * inputs_,
                                  inputs_ / 2, scores + key, kKeys, nullptr);
        }
        for (long i = 0; i < rows; i++) {
            const long at = position + (row + i) / num_heads_;
            const Range seen{std::max(0L, first_key(at, window) - begin), std::min(at + 1 - begin, count)};
            const float factor = softmax_.weigh(row + i, scores + i * kKeys, seen, width, weights + i * kKeys);
            if (factor != 1.0f) scale(sums(row + i), factor);
        }
        for (int tile = 0; tile < value_tiles_; tile++) {
            add_products<false, 0>(int(rows), weights, kKeys, values_.data() + tile * (kKeys * kTileColumns), width / 2,
                                   sums(row) + tile * kTileColumns, value_tiles_ * kTileColumns, nullptr);
        }
    }

    void scale(float* sums, float factor) const {
        const Vector by = repeat(factor);
        for (int i = 0; i < value_tiles_ * kTileColumns; i += 16) store(sums + i, load(sums + i) * by);
    }

    const bool is_exact_;
    const int num_heads_, head_dim_, inputs_, value_tiles_;  // `inputs_`: a head's, padded as products want them
    const long max_tokens_;
    Lines<Element> queries_, keys_, values_;  // of values, padding columns stay zero
    Lines<float> sums_;
    NearPages near_;
    RunningSoftmax softmax_;
};
