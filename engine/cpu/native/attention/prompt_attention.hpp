// Attention of a stretch of a prompt over a sequence's pages, for one KV head and the query heads that share it; or of any
// tokens over latents, which all query heads share: a lone token's heads are as many rows as a tile is worth packing for.
//
// FlashAttention-2 (Dao 2023): keys in tiles, and for each few query rows the scores, the softmax's running maximum and
// sum, and the weighted values, all while the tile is near. Both products run in the inner loop of linear.hpp, for which
// a tile's keys and values are packed once and then read by every row. Probabilities are rounded to elements for the
// second product; their sum is not.
#pragma once

#include <algorithm>
#include <vector>

#include "attention/attention.hpp"
#include "attention/sight.hpp"
#include "products/linear.hpp"
#include "attention/softmax.hpp"
#include "machine/tiles.hpp"
#include "machine/vectors.hpp"

// 16 keys to a tile whose columns are keys: 16 pairs of dimensions from `at` on (perhaps 8 at the end of an odd head size).
inline void pack_keys(const Element* const* source, int head_dim, int at, Element* target) {
    pack_columns(source, at, head_dim, std::min(16, int(padded(head_dim, kProductInputs) - at) / 2), target);
}

class PromptAttention {
public:
    static constexpr long kRows = kSumsInRegisters ? 240 : 480;  // query rows, tokens x heads, that a tile is packed for
    static constexpr long kKeys = kTileKeys;

    // `value_dim`: of a head's value; of latents, where that is the beginning of its key, each call says how many heads there
    // are. `is_exact`: tiles begin at multiples of kKeys also behind a window, so that a token's result is the same whatever
    // tokens are attended with it.
    PromptAttention(int num_heads, int head_dim, int value_dim, float cap, bool is_exact)
        : is_exact_(is_exact), num_heads_(num_heads), head_dim_(head_dim), value_dim_(value_dim),
          inputs_(int(padded(head_dim, kProductInputs))), value_tiles_((value_dim + kTileColumns - 1) / kTileColumns),
          max_rows_(tokens_at_once(num_heads) * num_heads), queries_(max_rows_ * inputs_), keys_(kKeys * inputs_),
          values_(kKeys * value_tiles_ * kTileColumns), sums_(max_rows_ * value_tiles_ * kTileColumns),
          softmax_(max_rows_, head_dim, cap) {}

    // Query tokens of one call, at most.
    static long tokens_at_once(int num_heads) { return std::max(1L, kRows / num_heads); }

    // Queries of `tokens` tokens from `position` on, each [num_heads][head_dim] and `stride` from the next; so is `out`.
    // Token i sees the keys up to its own that `sight` tells.
    void attend(const StoredPages& stored, const Element* queries, long tokens, long position, Sight sight,
                const Element* sinks, Element* out, long stride) {
        const long first = sight.first_key(position);
        add_up(stored, queries, tokens, {is_exact_ ? first / kKeys * kKeys : first, position + tokens}, sight, sinks, stride);
        for (long row = 0; row < tokens * num_heads_; row++) {
            Element* target = out + row / num_heads_ * stride + row % num_heads_ * head_dim_;
            const Vector scale = repeat(1.0f / softmax_.total(row));
            for (int i = 0; i < value_dim_; i += 16) store(target + i, load(sums(row) + i) * scale);
        }
    }

    // The same over latents, of `heads` query heads of each token.
    void attend_latents(const StoredPages& stored, const Element* queries, int heads, long tokens, long position, Element* out,
                        long stride) {
        num_heads_ = heads;
        attend(stored, queries, tokens, position, {}, nullptr, out, stride);
    }

    // One token's with some of the latents to `part`: of each head its sums, its largest score and the sum of its weights.
    void attend_part(const StoredPages& stored, const Element* queries, int heads, Range keys, float* part) {
        num_heads_ = heads;
        add_up(stored, queries, 1, keys, {}, nullptr, 0);
        for (int head = 0; head < heads; head++, part += part_stride()) {
            std::copy_n(sums(head), value_dim_, part);
            part[part_stride() - 2] = softmax_.most(head);
            part[part_stride() - 1] = softmax_.total(head);
        }
    }

    // A token's parts together.
    void join(const float* parts, int num_parts, int heads, Element* out) {
        for (int head = 0; head < heads; head++, parts += part_stride(), out += head_dim_) {
            const float* const ends = parts + part_stride() - 2;
            const long next = heads * part_stride();
            float most = ends[0], total = 0.0f;
            for (int i = 1; i < num_parts; i++) most = std::max(most, ends[i * next]);
            std::fill_n(sums(0), value_dim_, 0.0f);
            for (int i = 0; i < num_parts; i++) {
                const float factor = softmax_.factor(ends[i * next], most);
                for (int at = 0; at < value_dim_; at += 16) {
                    store(sums(0) + at, fma(load(parts + i * next + at), repeat(factor), load(sums(0) + at)));
                }
                total += factor * ends[i * next + 1];
            }
            const Vector scale = repeat(1.0f / total);
            for (int i = 0; i < value_dim_; i += 16) store(out + i, load(sums(0) + i) * scale);
        }
    }

private:
    static constexpr long kWeighed = RunningSoftmax::kTogether;
    static constexpr int kFetchedParts = 4;  // a line for each pair
    static constexpr long kAhead = 32;  // latents that come while others are packed: all heads' work is on what is near

    long part_stride() const { return padded(head_dim_, 32) + 2; }  // as step.hpp counts
    float* sums(long row) { return sums_.data() + row * value_tiles_ * kTileColumns; }

    // Attend with the last `tokens` tokens before the last key to `keys`, of which tiles begin at the first.
    void add_up(const StoredPages& stored, const Element* queries, long tokens, Range keys, Sight sight, const Element* sinks,
                long stride) {
        const long rows = tokens * num_heads_, position = keys.last - tokens;
        for (long row = 0; row < rows; row++) {
            const Element* query = queries + row / num_heads_ * stride + row % num_heads_ * head_dim_;
            std::copy_n(query, head_dim_, queries_.data() + row * inputs_);
        }
        softmax_.reset(rows, sinks, num_heads_);
        std::fill_n(sums_.begin(), rows * value_tiles_ * kTileColumns, 0.0f);
        for (long begin = keys.first; begin < keys.last; begin += kKeys) {
            const long count = std::min(kKeys, keys.last - begin);
            const Pages pages = near_.of(stored, 1, begin, begin + count);
            pack(pages, begin, count, keys.last);
            later_ = pages.values == 0 ? Later{pages, begin + count, std::min(begin + count + kKeys, keys.last)} : Later{};
            for (long row = 0; row < rows; row += kRowsAtOnce) {
                attend_rows(row, std::min(rows - row, long(kRowsAtOnce)), position, sight, begin, count);
            }
        }
    }

    // --- packing ----------------------------------------------------------------------------------------

    // Keys [begin, begin + count): tiles of 64 columns that are keys, pairs of inputs that are dimensions.
    // Values: tiles of 64 columns that are dimensions, pairs of inputs that are keys. Padding is zero.
    void pack(const Pages& pages, long begin, long count, long last) {
        const Element* source[kKeys];
        const long whole = padded(count, kTileColumns);
        for (long i = 0; i < count; i++) source[i] = pages.key(begin + i);
        for (long i = count; i < whole; i++) source[i] = nullptr;
        for (long key = 0; key < whole; key += 16) {
            Element* target = keys_.data() + place_of(key, inputs_ / 2);
            const Element* ahead[16];
            const int fetched = pages.values == 0 ? later_keys(pages, begin + key + kAhead, last, ahead) : 0;
            for (int at = 0; at < head_dim_; at += 32) {
                for (int i = 0; i < fetched; i++) fetch_lines(ahead[i] + at, 32 * sizeof(Element));
                pack_keys(source + key, head_dim_, at, target + at * kPartColumns);
            }
        }
        for (long key = 0; key < whole; key += 2) {
            for (int at = 0; at < value_dim_; at += 16) pack_values(pages.values, source + key, key, at);
        }
    }

    // Where 16 keys from `key` on stand, of those before the last; returns their number.
    static int later_keys(const Pages& pages, long key, long last, const Element** found) {
        const int count = int(std::clamp(last - key, 0L, 16L));
        for (int i = 0; i < count; i++) found[i] = pages.key(key + i);
        return count;
    }

    // 16 dimensions of two keys, side by side.
    void pack_values(long values, const Element* const* source, long key, int at) {
        Element* target = values_.data() + place_of(at, kKeys / 2) + key * kPartColumns;
        const auto row = [&](const Element* key) { return key == nullptr ? nullptr : key + values + at; };
        store_pairs(target, zip(row(source[0]), row(source[1])));
    }

    // --- a few rows and a tile --------------------------------------------------------------------------

    // Latents of the next tile, which products of this one fetch, so many as they have pairs: packing alone would wait for
    // memory, and products leave it idle.
    struct Later {
        Pages pages{};
        long next = 0, last = 0;

        // Those of a block that come next; null: none are left.
        const Element* take(long pairs) {
            if (next >= last) return nullptr;
            const Element* const found = pages.key(next);
            const long count = std::max(1L, pairs * kFetchedLines<kFetchedParts> * kLine / pages.head_dim);
            next = std::min(next + count, (next / pages.block_size + 1) * pages.block_size);
            return found;
        }
    };

    template <bool FRESH>
    void multiply(long rows, const Element* x, long x_stride, const Element* weights, long pairs, float* sums, long stride) {
        const Element* const ahead = later_.take(pairs);
        if (ahead == nullptr) add_products<FRESH, 0>(int(rows), x, x_stride, weights, pairs, sums, stride, nullptr);
        else add_products<FRESH, kFetchedParts>(int(rows), x, x_stride, weights, pairs, sums, stride, ahead);
    }

    void attend_rows(long row, long rows, long position, Sight sight, long begin, long count) {
        const long first = position + row / num_heads_, last = position + (row + rows - 1) / num_heads_;
        const long visible = std::min(last + 1 - begin, count);  // to the last of the rows
        if (visible <= 0 || begin + count <= sight.first_key(first)) return;
        alignas(64) float scores[kRowsAtOnce * kKeys];
        alignas(64) Element weights[kRowsAtOnce * kKeys];
        const long width = padded(visible, kPartColumns);
        for (long key = 0; key < width; key += kPartColumns) {
            multiply<true>(rows, queries_.data() + row * inputs_, inputs_, keys_.data() + place_of(key, inputs_ / 2), inputs_ / 2,
                           scores + key, kKeys);
        }
        const Range first_seen = seen(first, sight, begin, count), last_seen = seen(last, sight, begin, count);
        const bool see_all = last_seen.first == 0 && first_seen.last >= width;
        for (long i = 0; i < rows; i += kWeighed) {
            const auto see = [&](long of) {
                return see_all ? Range{0, width} : seen(position + (row + i + of) / num_heads_, sight, begin, count);
            };
            weigh(row + i, std::min(rows - i, kWeighed), see, width, scores + i * kKeys, weights + i * kKeys);
        }
        for (long at = 0; at < value_dim_; at += kPartColumns) {
            multiply<false>(rows, weights, kKeys, values_.data() + place_of(at, kKeys / 2), width / 2, sums(row) + at,
                            value_tiles_ * kTileColumns);
        }
    }

    // The tile's keys that the token at `position` sees.
    static Range seen(long position, Sight sight, long begin, long count) {
        return {std::max(0L, sight.first_key(position) - begin), std::min(position + 1 - begin, count)};
    }

    // Scores to weights, of kWeighed rows or fewer.
    template <class See>
    void weigh(long row, long rows, See see, long width, float* scores, Element* weights) {
        alignas(64) float factors[kWeighed];
        if constexpr (kSumsInRegisters) {  // to the bit what ExactAttention has of a row
            for (long i = 0; i < rows; i++) {
                factors[i] = softmax_.weigh(row + i, scores + i * kKeys, see(i), width, weights + i * kKeys);
            }
        } else {
            softmax_.weigh_together(row, rows, see, width, scores, kKeys, weights, factors);
        }
        for (long i = 0; i < rows; i++) {
            if (factors[i] != 1.0f) scale(sums(row + i), factors[i]);
        }
    }

    void scale(float* sums, float factor) const {
        const Vector by = repeat(factor);
        for (int i = 0; i < value_tiles_ * kTileColumns; i += 16) store(sums + i, load(sums + i) * by);
    }

    const bool is_exact_;
    int num_heads_;  // of a token, in this call
    const int head_dim_, value_dim_, inputs_, value_tiles_;  // `inputs_`: a head's, padded as products want them
    const long max_rows_;
    Lines<Element> queries_, keys_, values_;  // of values, padding columns stay zero
    Lines<float> sums_;
    NearPages near_;
    RunningSoftmax softmax_;
    Later later_;
};
