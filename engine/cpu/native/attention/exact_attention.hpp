// One token's attention, to the bit what PromptAttention makes of it together with other tokens.
//
// A token's result is a matter of order alone: which keys stand in a tile, in which order products are added up, when the
// softmax's maximum moves. All of these are PromptAttention's. Keys are packed as there, 64 at a time, because lanes that
// are keys add up a key's dimensions in order; values are weighted as Attention does it, which is the same order.
#pragma once

#include "attention/attention.hpp"
#include "products/linear.hpp"
#include "attention/prompt_attention.hpp"
#include "attention/softmax.hpp"
#include "machine/vectors.hpp"

class ExactAttention : public TokenAttention {
public:
    ExactAttention(int group, int kv_heads, int head_dim, float cap)
        : TokenAttention(group, kv_heads, head_dim, cap), queries_(kv_heads * group * stride_),
          keys_(kPartColumns * head_dim) {}

    // As `Attention::attend`, for the token at `position`; what follows is not asked for.
    void attend(const StoredPages& stored, int kv_heads, const Element* queries, long position, Sight sight,
                const Element* sinks, Element* out) {
        for (int head = 0; head < kv_heads * group_; head++) {
            std::copy_n(queries + head * head_dim_, head_dim_, queries_.data() + head * stride_);
        }
        const long first = sight.first_key(position), last = position + 1;
        const long start = first / kTileKeys * kTileKeys;
        add_up(stored, kv_heads, start, first, last, sinks, {}, [&](const Pages& pages, long begin, long visible, long end) {
            long key = begin + (visible - begin) / kPartColumns * kPartColumns;
            for (; key < end; key += kPartColumns) {
                const long from = std::max(key, visible) / 16 * 16, to = std::min(end, key + kPartColumns);
                for (int kv = 0; kv < kv_heads; kv++) {
                    if (!kFetchesEvenly && !pages.are_near) {
                        for (long at = from; at < to; at += 16) stored.of_head(kv).fetch_ahead(at, last);
                    }
                    score(pages.of_head(kv), from, to, last, kv * group_, key - begin);
                }
                bring_values(pages, kv_heads, from, to);
            }
        });
        put(kv_heads, out);
    }

private:
    // Of the group of heads from `head` on, with the keys [first, end), which are some of a tile's columns from `at` on.
    void score(const Pages& pages, long first, long end, long last, int head, long at) {
        for (long key = first; key < end; key += 16) pack(pages, key, last, keys_.data() + key % kPartColumns * 2);
        for (const int end = head + group_; head < end; head += kRowsAtOnce) {
            add_products<true, 0>(std::min(end - head, kRowsAtOnce), queries_.data() + head * stride_, stride_,
                                  keys_.data(), head_dim_ / 2, scores(head) + at, kScoreStride, nullptr);
        }
    }

    // 16 keys from `key` on; past the last one, it again.
    void pack(const Pages& pages, long key, long last, Element* target) const {
        const Element* source[16];
        for (long i = 0; i < 16; i++) source[i] = pages.key(std::min(key + i, last - 1));
        LinesAhead ahead = keys_ahead(pages, key, kPartColumns, last);
        for (int at = 0; at < head_dim_; at += 32) {
            if (kFetchesEvenly) ahead.fetch<16 * 32 * sizeof(Element) / 64>();
            pack_keys(source, head_dim_, at, target + at * kPartColumns);
        }
    }

    Lines<Element> queries_;
    Lines<Element> keys_;  // a tile whose columns are keys
};
