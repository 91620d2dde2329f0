// One token's attention, to the bit what PromptAttention makes of it together with other tokens.
//
// A token's result is a matter of order alone: which keys stand in a tile, in which order products are added up, when the
// softmax's maximum moves. All of these are PromptAttention's. Keys are packed as there, 64 at a time, because lanes that
// are keys add up a key's dimensions in order; values are weighted as Attention does it, which is the same order.
#pragma once

#include "attention.hpp"
#include "linear.hpp"
#include "prompt_attention.hpp"
#include "softmax.hpp"
#include "vectors.hpp"

class ExactAttention : public TokenAttention<PromptAttention::kKeys> {
public:
    ExactAttention(int num_heads, int head_dim, float cap)
        : TokenAttention(num_heads, head_dim), keys_(kTileColumns * head_dim), softmax_(num_heads, head_dim, cap) {}

    // Attend with the queries, which are at `position`; the result is out [num_heads][head_dim].
    void attend(const Pages& pages, long position, long window, const Element* sinks, Element* out) {
        constexpr long kKeys = PromptAttention::kKeys;
        const long first = PromptAttention::first_key(position, window), last = position + 1;
        softmax_.reset(num_heads_, sinks, num_heads_);
        std::fill(sums_.begin(), sums_.end(), 0.0f);
        for (long begin = first / kKeys * kKeys; begin < last; begin += kKeys) {
            const long end = std::min(begin + kKeys, last), visible = std::max(begin, first);
            score(pages, begin, visible, end, last);
            for (int head = 0; head < num_heads_; head++) {
                factor_[head] = softmax_.weigh(head, scores(head), {visible - begin, end - begin},
                                               padded(end - begin, kTileColumns), weights(head));
            }
            add_values(pages, begin, visible, end);
        }
        for (int head = 0; head < num_heads_; head++) finish(head, softmax_.total(head), out + head * head_dim_);
    }

private:
    void score(const Pages& pages, long begin, long first, long end, long last) {
        for (long key = begin + (first - begin) / kTileColumns * kTileColumns; key < end; key += kTileColumns) {
            for (long i = std::max(key, first) / 16 * 16; i < std::min(end, key + kTileColumns); i += 16) {
                pack(pages, i, last, keys_.data() + (i - key) * 2);
            }
            for (int head = 0; head < num_heads_; head += kRowsAtOnce) {
                add_products<true, 0>(std::min(num_heads_ - head, kRowsAtOnce), query(head), query_stride_,
                                      keys_.data(), head_dim_ / 2, scores(head) + (key - begin), kScoreStride, nullptr);
            }
        }
    }

    // 16 keys from `key` on; past the last one, it again. Pages are scattered: the processor is told what comes next.
    void pack(const Pages& pages, long key, long last, Element* target) const {
        const Element* source[16];
        const long step = std::min(16L, pages.block_size);
        for (long i = 0; i < 16; i += step) {
            const long start = std::min(key + i, last - 1);
            const Element* keys = pages.key(start);
            const long count = std::min(step, last - start);
            prefetch(keys + pages.values, int(count));
            if (start + kKeysAhead < last) prefetch(pages.key(start + kKeysAhead), int(step));
            for (long j = 0; j < step; j++) source[i + j] = keys + std::min(j, count - 1) * head_dim_;
        }
        for (int at = 0; at < head_dim_; at += 32) pack_keys(source, head_dim_, at, target + at * kTileColumns);
    }

    std::vector<Element> keys_;  // a tile whose columns are keys
    RunningSoftmax softmax_;
};
