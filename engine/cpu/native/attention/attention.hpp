// One token's attention over a sequence's pages, for a few KV heads and the query heads that share them.
//
// Keys come in tiles: scores of all the heads, their softmax, then the values, weighted. Keys and values are read once,
// and it is their reading that takes the time: blocks are scattered, and no processor's own look-ahead follows. A head's
// keys are fetched while those of an earlier block are multiplied; all heads' at once would be waited for. Values are
// weighted head by head, a step from block to block; so those of a block are read in order behind its keys, and stay near.
// Where a set fetches evenly, some lines with each few products, the values of the next tile are fetched while a tile's are
// weighted; and with the last tile's what this thread attends to next: of that the first keys, and values.
// How scores are computed, and how sums of values stand in memory, is the instruction set's affair.
#pragma once

#include <algorithm>
#include <vector>

#include "attention/pages.hpp"
#include "attention/softmax.hpp"
#include "machine/tiles.hpp"
#include "machine/vectors.hpp"

#ifdef __AVX512BF16__
#include "sets/avx512_attention.hpp"
#elif defined(KVFERRY_NEON_BF16)
#include "sets/neon_attention.hpp"
#else
#include "sets/widened_attention.hpp"
#endif

constexpr long kNearValues = 64 << 10;  // of a tile, for all KV heads: they stay near while its keys are read

// Keys some way behind `key`, to be fetched while those from there on are multiplied.
inline LinesAhead keys_ahead(const Pages& pages, long key, long distance, long last) {
    if (!kFetchesEvenly || pages.are_near || key + distance >= last) return LinesAhead(pages.keys, false);
    return LinesAhead(pages.key(key + distance));
}

// job<HEADS>(head) for `count` heads from `head` on, so many at a time as registers hold.
template <class Job>
void in_register_heads(int head, int count, Job job) {
    for (const int end = head + count; head < end; head += kHeadsAtOnce) {
        switch (std::min(end - head, kHeadsAtOnce)) {
            case 1: job.template operator()<1>(head); break;
            case 2: job.template operator()<2>(head); break;
            case 3: job.template operator()<3>(head); break;
            default: job.template operator()<4>(head);
        }
    }
}

// What does not depend on how scores are computed.
class TokenAttention {
public:
    TokenAttention(int group, int kv_heads, int head_dim, float cap)
        : group_(group), head_dim_(head_dim), stride_(padded(head_dim, 32)), scores_(kv_heads * group * kScoreStride),
          softmax_(kv_heads * group, head_dim, cap), weights_(scores_.size()), widened_(scores_.size()),
          added_(kv_heads * group), factors_(added_.size()), sums_(added_.size() * stride_) {}

    // The results of a token's parts together: out [kv_heads * group][head_dim].
    void join(const float* parts, int num_parts, int kv_heads, Element* out) {
        const int heads = kv_heads * group_;
        for (int head = 0; head < heads; head++, parts += stride_ + 2) {
            const long next = heads * (stride_ + 2);
            float most = parts[stride_], total = 0.0f;
            for (int i = 1; i < num_parts; i++) most = std::max(most, parts[i * next + stride_]);
            float* const joined = sums(head);
            std::fill_n(joined, stride_, 0.0f);
            for (int i = 0; i < num_parts; i++) {
                const float* const part = parts + i * next;
                const float factor = softmax_.factor(part[stride_], most);
                for (long at = 0; at < stride_; at += 16) {
                    store(joined + at, fma(load(part + at), repeat(factor), load(joined + at)));
                }
                total += factor * part[stride_ + 1];
            }
            store_in_order(joined, head_dim_, repeat(1.0f / total), out + head * head_dim_);
        }
    }

protected:
    static constexpr long kScoreStride = kTileKeys + 16;  // whole vectors are written at any multiple of 8

    // Attend to the keys [first, last), in tiles from `begin` on, and to the heads' sinks unless null.
    // score(pages, begin, first, last) leaves scores of the keys of one tile.
    template <class Score>
    void add_up(const StoredPages& stored, int kv_heads, long begin, long first, long last, const Element* sinks,
                const Upcoming& next, Score score) {
        const int heads = kv_heads * group_;
        softmax_.reset(heads, sinks, heads);
        std::fill_n(sums_.begin(), heads * stride_, 0.0f);
        values_from_ = kFetchesEvenly && next_.is(stored, begin) ? ahead_.reached() : begin;
        next_ = next;
        for (; begin < last; begin += kTileKeys) {
            const long end = std::min(begin + kTileKeys, last), visible = std::max(begin, first);
            const long width = padded(end - begin, 16);
            const Pages pages = near_.of(stored, kv_heads, begin, end);
            fetch_next(stored, kv_heads, end, last);
            score(pages, begin, visible, end);
            for (int head = 0; head < heads; head++) {
                Element* weights = weights_.data() + head * kScoreStride;
                factors_[head] = softmax_.weigh(head, scores(head), {visible - begin, end - begin}, width, weights);
                added_[head] = weights_to_add(weights, width, widened_.data() + head * kScoreStride);
            }
            for (int kv = 0; kv < kv_heads; kv++) add_values(pages.of_head(kv), begin, visible, end, kv * group_);
            values_from_ = ahead_.reached();
        }
    }

    // What was added up: out [kv_heads * group][head_dim].
    void put(int kv_heads, Element* out) {
        for (int head = 0; head < kv_heads * group_; head++) {
            store_in_order(sums(head), head_dim_, repeat(1.0f / softmax_.total(head)), out + head * head_dim_);
        }
    }

    // What was added up of some of the keys, to `part`, `part_size` numbers.
    void put_part(int kv_heads, float* part) {
        for (int head = 0; head < kv_heads * group_; head++, part += stride_ + 2) {
            std::copy_n(sums(head), stride_, part);
            part[stride_] = softmax_.most(head);
            part[stride_ + 1] = softmax_.total(head);
        }
    }

    float* scores(int head) { return scores_.data() + head * kScoreStride; }

    // The values of keys [first, last), block by block, that have not been asked for.
    void bring_values(const Pages& pages, int kv_heads, long first, long last) const {
        if (pages.are_near) return;
        first = std::max(first, values_from_);
        for (long end; first < last; first = end) {
            end = std::min(last, (first / pages.block_size + 1) * pages.block_size);
            const Element* values = pages.key(first) + pages.values;
            for (int kv = 0; kv < kv_heads; kv++, values += pages.heads) {
                bring_lines(values, (end - first) * head_dim_ * sizeof(Element));
            }
        }
    }

    const int group_, head_dim_;
    const long stride_;  // from head to head of what is as long as a query

    Upcoming next_;

private:
    // The values that are fetched with those of a tile that ends at key `end`.
    void fetch_next(const StoredPages& stored, int kv_heads, long end, long last) {
        if (!kFetchesEvenly || stored.has_int8) return ahead_.set(stored, kv_heads, end, 0);
        if (end < last) return ahead_.set(stored, kv_heads, end, std::min(end + kTileKeys, last));
        const long first = next_.kv_heads > 0 ? next_.start() : 0;
        ahead_.set(next_.kv_heads > 0 ? next_.pages : stored, next_.kv_heads, first, std::min(first + kTileKeys, next_.last));
    }

    float* sums(int head) { return sums_.data() + head * stride_; }

    void add_values(const Pages& pages, long begin, long first, long last, int head) {
        in_register_heads(head, group_, [&]<int HEADS>(int head) { add_values<HEADS>(pages, begin, first, last, head); });
    }

    template <int HEADS>
    void add_values(const Pages& pages, long begin, long first, long last, int head) {
        constexpr int kMany = kManyDimensions<HEADS>;
        int at = 0;
        for (; at + kMany <= head_dim_; at += kMany) add_values<HEADS, kMany>(pages, begin, first, last, head, at);
        for (; at < head_dim_; at += kFewDimensions) {
            add_values<HEADS, kFewDimensions>(pages, begin, first, last, head, at);
        }
    }

    // DIMENSIONS from `at` on. Keys in pairs, of which a block has a whole number. The key before an odd first one has the
    // weight zero.
    template <int HEADS, int DIMENSIONS>
    void add_values(const Pages& pages, long begin, long first, long last, int head, int at) {
        WeightedValues<HEADS, DIMENSIONS> added(sums(head) + at, stride_, factors_.data() + head, head_dim_, head_dim_ - at);
        const Weight* const weights = added_[head];
        const long whole = last & ~1L;
        for (long key = first & ~1L; key < whole;) {
            const long block_end = std::min(whole, (key / pages.block_size + 1) * pages.block_size);
            const Element* values = pages.key(key) + pages.values + at;
            LinesAhead ahead = ahead_.next(DIMENSIONS * sizeof(Element), values);
            for (; key < block_end; key += 2, values += 2 * head_dim_) {
                added.template add<false>(values, weights + (key - begin), kScoreStride, ahead);
            }
        }
        if (whole < last) {
            const Element* const values = pages.key(whole) + pages.values + at;
            LinesAhead none(values, false);
            added.template add<true>(values, weights + (whole - begin), kScoreStride, none);
        }
        added.store(sums(head) + at, stride_);
    }

    NearPages near_;
    ValuesAhead ahead_;
    long values_from_ = 0;  // the first key whose values were not fetched with those of the tile before
    Lines<float> scores_;
    RunningSoftmax softmax_;
    Lines<Element> weights_;
    Lines<float> widened_;
    std::vector<const Weight*> added_;  // of each head, kScoreStride from the next
    Lines<float> factors_, sums_;
};

class Attention : public TokenAttention {
public:
    Attention(int group, int kv_heads, int head_dim, float cap)
        : TokenAttention(group, kv_heads, head_dim, cap), queries_(kv_heads * group * stride_) {}

    // Attend with queries [kv_heads * group][head_dim] over the keys [first, last), and the heads' sinks unless null; the
    // result is as large as they, and may be where they are. `next`: what follows.
    void attend(const StoredPages& stored, int kv_heads, const Element* queries, long first, long last, const Element* sinks,
                const Upcoming& next, Element* out) {
        add(stored, kv_heads, queries, first, last, sinks, next);
        put(kv_heads, out);
    }

    // The same for some of the keys.
    void attend_part(const StoredPages& stored, int kv_heads, const Element* queries, long first, long last,
                     const Element* sinks, const Upcoming& next, float* part) {
        add(stored, kv_heads, queries, first, last, sinks, next);
        put_part(kv_heads, part);
    }

private:
    void add(const StoredPages& stored, int kv_heads, const Element* queries, long first, long last, const Element* sinks,
             const Upcoming& next) {
        for (int head = 0; head < kv_heads * group_; head++) {
            set_query(queries + head * head_dim_, head_dim_, queries_.data() + head * stride_);
        }
        const long stretch = stretch_of(stored.block_size), start = first / stretch * stretch;
        const long step = std::min(16L, stored.block_size), distance = kStretchesAhead * stretch;
        const long behind = std::max(start, padded(last, step) - distance);  // from here on keys of the next are fetched
        add_up(stored, kv_heads, start, first, last, sinks, next, [&](const Pages& pages, long begin, long, long end) {
            for (long key = begin; key < end; key += step) {
                for (int kv = 0; kv < kv_heads; kv++) {
                    if (!kFetchesEvenly && !pages.are_near) stored.of_head(kv).fetch_ahead(key, last);
                    const Pages head = pages.of_head(kv);
                    const LinesAhead ahead =
                        key < behind ? keys_ahead(head, key, distance, last) : next_keys(key - behind, kv);
                    score(head, begin, key, end, kv * group_, ahead);
                    if (kLinesTo == Near::kSecond) bring_values(head, 1, key, std::min(key + step, end));
                }
                if (kLinesTo == Near::kFirst) bring_values(pages, kv_heads, key, std::min(key + step, end));
            }
        });
    }

    // A head's keys of what is next, from the one at `at` on.
    LinesAhead next_keys(long at, int head) const {
        const bool are_there = kFetchesEvenly && head < next_.kv_heads && next_.start() + at < next_.last;
        if (!are_there) return LinesAhead(queries_.data(), false);
        return LinesAhead(next_.pages.elements().of_head(head).key(next_.start() + at));
    }

    // Of the group of heads from `head` on, with up to 16 keys from `key` on.
    void score(const Pages& pages, long begin, long key, long last, int head, LinesAhead ahead) {
        const Element* keys = pages.key(key);
        const int count = int(std::min({16L, pages.block_size, last - key}));
        in_register_heads(head, group_, [&]<int HEADS>(int head) {
            score_16<HEADS>(queries_.data() + head * stride_, stride_, keys, head_dim_, count, scores(head) + (key - begin),
                            kScoreStride, ahead);
            ahead = ahead.none();
        });
    }

    Lines<Query> queries_;
};
