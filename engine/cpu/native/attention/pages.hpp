// A layer's pages, and how attention reads them: as elements, where they stand or in a copy that stays near.
//
//     elements   a head of a block is [block_size][head_dim] keys, its values are as many
//     int8       a head of a block is [block_size][head_dim] whole numbers, then [block_size] float32: what a token's
//                numbers are multiplied by (engine/nn/attention/int8_rows.py has the same for torch)
//
// Whole numbers are read from memory once for each tile of keys and widened into elements, which every query head and
// row then reads from the cache: it is memory that attention waits for.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <vector>

#include "products/integers.hpp"
#include "machine/tiles.hpp"
#include "machine/vectors.hpp"

constexpr long kTileKeys = 256;      // of tiles; a block size is a part of it, or some times as much
constexpr int kStretchesAhead = 2;  // fetched before they are needed

// Keys of a sequence that lie in a row whatever the block: attention goes on from one such stretch to the next. Models with
// states have blocks of many tiles, of which no more than a tile is to be near.
inline long stretch_of(long block_size) { return std::min(block_size, kTileKeys); }

// What numbers are multiples of where the largest by size shall be `most`; NaN where one is not finite, 0 where all are next
// to nothing.
template <class Number>
float step_of(const Number* numbers, long size, float most) {
    Vector largest = repeat(0.0f), nothing = repeat(0.0f);
    for (long i = 0; i < size; i += 16) {
        const Vector x = load(numbers + i);
        largest = max(largest, max(x, repeat(0.0f) - x));
        nothing = fma(x, repeat(0.0f), nothing);
    }
    const float step = max_of(largest) / most + sum_of(nothing);
    return step < FLT_MIN ? 0.0f : step;
}
inline float inverse_of(float step) { return step > 0.0f ? 1.0f / step : 0.0f; }

// Elements of a sequence's blocks, of one KV head and those after it.
struct Pages {
    const Element* keys;  // block 0's of this head; a block is [block_size][head_dim]
    long heads, values;   // from a block's keys to the next head's, and to its values
    long stride;          // from block to block
    const std::int32_t* blocks;
    long block_size, head_dim;
    bool are_near;  // copied just now: nothing is to be fetched

    const Element* key(long index) const {
        return keys + blocks[index / block_size] * stride + index % block_size * head_dim;
    }
    Pages of_head(int head) const {
        return {keys + head * heads, heads, values, stride, blocks, block_size, head_dim, are_near};
    }
};

// The same as they are stored. Sizes are in bytes.
struct StoredPages {
    char* first;       // block 0 of this layer and head
    long head_bytes;   // of a head's keys, or values, in a block
    long heads, values, stride;
    const std::int32_t* blocks;
    long block_size, head_dim;
    bool has_int8;

    StoredPages of_head(int head) const {
        return {first + head * heads, head_bytes, heads, values, stride, blocks, block_size, head_dim, has_int8};
    }
    char* block(long index) const { return first + blocks[index / block_size] * stride; }

    // Of elements alone.
    Pages elements() const {
        constexpr long kSize = sizeof(Element);
        return {(const Element*)first, heads / kSize, values / kSize, stride / kSize, blocks, block_size, head_dim, false};
    }

    std::int8_t* numbers(char* head, long index) const { return (std::int8_t*)head + index % block_size * head_dim; }
    float* scale(char* head, long index) const { return (float*)(head + block_size * head_dim) + index % block_size; }

    // At the first of a stretch's keys, fetch those of this head some stretches on: no processor guesses where they are.
    void fetch_ahead(long key, long last) const {
        const long stretch = stretch_of(block_size), ahead = key + kStretchesAhead * stretch;
        if (key % stretch != 0 || ahead >= last) return;
        fetch_lines(block(ahead) + ahead % block_size * row_bytes(), stretch * row_bytes());
        if (has_int8) fetch_lines(scale(block(ahead), ahead), stretch * sizeof(float));
    }
    long row_bytes() const { return head_dim * (has_int8 ? 1 : long(sizeof(Element))); }  // of a token's key or value, in numbers

    // A token's key or value to its place among whole numbers; `head`: of its block. What is not finite makes all of it NaN.
    void put(char* head, long index, const Element* row) const {
        const float step = step_of(row, head_dim, 127.0f);
        const Vector inverse = repeat(inverse_of(step));
        std::int8_t* const target = numbers(head, index);
        for (long i = 0; i < head_dim; i += 16) store_whole(target + i, nearest(load(row + i) * inverse));
        *scale(head, index) = step;
    }
};

// What a thread attends to next, as far as it can tell: the keys [first, last) of a sequence.
struct Upcoming {
    StoredPages pages{};
    int kv_heads = 0;  // 0: it cannot
    long first = 0, last = 0;

    long start() const { return first / stretch_of(pages.block_size) * stretch_of(pages.block_size); }
    bool is(const StoredPages& others, long begin) const {
        return kv_heads > 0 && pages.first == others.first && pages.blocks == others.blocks && start() == begin;
    }
};

// The values of keys [first, last), stretch by stretch, fetched piece by piece while earlier ones are weighted.
class ValuesAhead {
public:
    void set(const StoredPages& pages, int kv_heads, long first, long last) {
        pages_ = pages;
        stretch_ = stretch_of(pages.block_size);
        first_ = first / stretch_ * stretch_;
        last_ = last;
        heads_ = kv_heads;
        head_ = 0;
        at_ = 0;
    }

    // The next `bytes` of each key; none where all have been asked for, but `near` again.
    LinesAhead next(long bytes, const void* near) {
        if (first_ >= last_) return LinesAhead(near, false);
        const long row = first_ % pages_.block_size * pages_.row_bytes();
        const char* const values = pages_.block(first_) + pages_.values + head_ * pages_.heads + row + at_;
        at_ += bytes * stretch_;
        if (at_ >= stretch_ * pages_.row_bytes()) {
            at_ = 0;
            if (++head_ == heads_) {
                head_ = 0;
                first_ += stretch_;
            }
        }
        return LinesAhead(values);
    }

    // The first key whose values have not all been asked for.
    long reached() const { return first_; }

private:
    StoredPages pages_{};
    long stretch_ = 0, first_ = 0, last_ = 0, heads_ = 0, head_ = 0, at_ = 0;
};

// One thread's copy of a tile: the elements that whole numbers mean.
class NearPages {
public:
    // The keys [begin, end) and their values, kTileKeys at most, of `kv_heads` heads; until the next call.
    Pages of(const StoredPages& stored, int kv_heads, long begin, long end) {
        if (!stored.has_int8) return stored.elements();
        const Pages near = room(stored, kv_heads, end);
        for (long first = begin, next; first < end; first = next) {
            next = std::min(end, (first / stored.block_size + 1) * stored.block_size);
            for (int part = 0; part < 2; part++) {
                for (int head = 0; head < kv_heads; head++) {
                    const long at = part * stored.values + head * stored.heads;
                    Element* const rows = const_cast<Element*>(near.of_head(head).key(first)) + part * near.values;
                    if (next < end) fetch_lines(stored.block(next) + at, stored.head_bytes);
                    widen(stored, stored.block(first) + at, first, next, rows);
                }
            }
        }
        return near;
    }

private:
    // Blocks take turns at as many places as a tile's keys may lie in.
    Pages room(const StoredPages& stored, int kv_heads, long end) {
        const long places = kTileKeys / stored.block_size + 1, head_size = stored.block_size * stored.head_dim;
        const long size = places * 2 * kv_heads * head_size;
        if (long(memory_.size()) < size) memory_.resize(size);
        for (long block = long(place_of_.size()); block * stored.block_size < end; block++) {
            place_of_.push_back(std::int32_t(block % places));
        }
        return {memory_.data(), head_size, kv_heads * head_size, 2 * kv_heads * head_size, place_of_.data(), stored.block_size,
                stored.head_dim, true};
    }

    static void widen(const StoredPages& stored, char* head, long first, long last, Element* target) {
        for (; first < last; first++, target += stored.head_dim) {
            const auto* const numbers = (const std::uint8_t*)stored.numbers(head, first);
            const Vector scale = repeat(*stored.scale(head, first));
            for (long i = 0; i < stored.head_dim; i += 16) store(target + i, load_bytes_as_floats(numbers + i) * scale);
        }
    }

    Lines<Element> memory_;
    std::vector<std::int32_t> place_of_;  // of each block of a sequence
};
