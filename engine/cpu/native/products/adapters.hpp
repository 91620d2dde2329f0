// Adapters beside a linear (engine/nn/adapters.py): y += (x A^T) B^T for the rows that have one, by their slots.
//
// Both matrices lie in strips of 16 columns, pair after pair of inputs as in a tile, so that all of what is read is used, whatever the
// rank; a row's sums are added up in the same order whatever rows stand beside it.
#pragma once

#include <cstdint>

#include "products/linear.hpp"
#include "machine/vectors.hpp"

constexpr int kStrip = 16;         // columns; ranks are whole ones
constexpr int kStripRows = 6;      // whose two sums each stay in registers
constexpr long kStripAhead = 2048;  // values: matrices are fetched so far ahead. Less is late, more fetches what is not read
constexpr long kMaxAdapterParts = 3;  // of one linear: queries, keys and values

// One module's share in a linear: what all slots have for it. Declared once more in engine/cpu/adapters.py.
struct AdapterPart {
    const Element* const* down;      // each slot's A: [rank / 16][pairs][16][2]
    const Element* const* up;        // each slot's B: [outputs / 16][rank / 2][16][2]
    const std::int32_t* ranks;    // each slot's, in whole strips; 0: it does not adapt this module
    std::int64_t first, outputs;  // columns of the linear
    std::int64_t pairs;           // of the linear's inputs
};

struct Adapters {
    AdapterPart parts[kMaxAdapterParts];
    std::int64_t num_parts;
    std::int64_t max_rank;  // whole strips
};

// job(first, last, slot) for each stretch of neighbours with one adapter.
template <class Job>
void each_run(const Rows& x, Job job) {
    for (long first = 0, last; first < x.count; first = last) {
        for (last = first + 1; last < x.count && x.slots[last] == x.slots[first];) last++;
        if (x.slots[first] >= 0) job(first, last, long(x.slots[first]));
    }
}

// The products of some rows with one strip; `pairs` is even.
template <int ROWS, class Finish>
void strip_products(const Element* x, long stride, const Element* strip, long pairs, long row, Finish finish) {
    Vector even[ROWS], odd[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) even[i] = odd[i] = repeat(0.0f);
    for (long pair = 0; pair < pairs; pair += 2, strip += 4 * kStrip) {
        const Pairs one = load_pairs(strip), other = load_pairs(strip + 2 * kStrip);
#pragma GCC unroll 4
        for (int at = 0; at < 4 * kStrip; at += kLine) fetch_line(strip + kStripAhead + at);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const Element* inputs = x + i * stride + 2 * pair;
            even[i] = dot(even[i], repeat_pair(inputs), one);
            odd[i] = dot(odd[i], repeat_pair(inputs + 2), other);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) finish(row + i, even[i] + odd[i]);
}

// finish(row, sums) for each of `rows` rows.
template <class Finish>
void strip_products(const Element* x, long stride, long rows, const Element* strip, long pairs, Finish finish) {
    const long groups = (rows + kStripRows - 1) / kStripRows;
    for (long group = 0; group < groups; group++) {
        const Range part = share(rows, int(group), int(groups));
        const long row = part.first;
        const Element* first = x + row * stride;
        switch (part.last - part.first) {
            case 1: strip_products<1>(first, stride, strip, pairs, row, finish); break;
            case 2: strip_products<2>(first, stride, strip, pairs, row, finish); break;
            case 3: strip_products<3>(first, stride, strip, pairs, row, finish); break;
            case 4: strip_products<4>(first, stride, strip, pairs, row, finish); break;
            case 5: strip_products<5>(first, stride, strip, pairs, row, finish); break;
            default: strip_products<6>(first, stride, strip, pairs, row, finish);
        }
    }
}

// x A^T to `narrowed` [rows][parts][max_rank]: this thread's of all runs' strips.
template <class By>
void narrow_rows(const Rows& x, const Adapters& adapters, Element* narrowed, const By& by) {
    const auto each_strip = [&](auto job) {
        each_run(x, [&](long first, long last, long slot) {
            for (long index = 0; index < adapters.num_parts; index++) {
                for (long at = 0; at < adapters.parts[index].ranks[slot]; at += kStrip) job(first, last, slot, index, at);
            }
        });
    };
    long count = 0, next = 0;
    each_strip([&](auto...) { count++; });
    const Range mine = by.part(count);
    const long stride = adapters.num_parts * adapters.max_rank;
    each_strip([&](long first, long last, long slot, long index, long at) {
        const long number = next++;
        if (number < mine.first || number >= mine.last) return;
        const AdapterPart& part = adapters.parts[index];
        const Element* strip = part.down[slot] + at * 2 * part.pairs;
        Element* target = narrowed + first * stride + index * adapters.max_rank + at;
        strip_products(x.values + first * x.stride, x.stride, last - first, strip, part.pairs,
                       [&](long row, Vector sums) { store(target + row * stride, sums); });
    });
}

// Strips of a part's columns.
inline long num_strips(const AdapterPart& part) { return (part.outputs + kStrip - 1) / kStrip; }

// finish(row, column, mask, sums) with narrowed B^T of these strips of one part, for all rows that have it.
template <class Finish>
void widen_strips(const Rows& x, const Adapters& adapters, long index, Range strips, const Element* narrowed,
                  Finish finish) {
    const AdapterPart& part = adapters.parts[index];
    const long stride = adapters.num_parts * adapters.max_rank;
    each_run(x, [&](long first, long last, long slot) {
        const long rank = part.ranks[slot];
        if (rank == 0) return;
        const Element* inputs = narrowed + first * stride + index * adapters.max_rank;
        for (long strip = strips.first; strip < strips.last; strip++) {
            const Lanes mask = lanes(part.outputs - strip * kStrip);
            strip_products(inputs, stride, last - first, part.up[slot] + strip * kStrip * rank, rank / 2,
                           [&](long row, Vector sums) { finish(first + row, part.first + strip * kStrip, mask, sums); });
        }
    });
}

// y += `factor` narrowed B^T: this thread's strips of the columns, for all rows.
template <class By>
void add_widened(float* y, long y_stride, const Rows& x, const Adapters& adapters, const Element* narrowed, float factor,
                 const By& by) {
    const Vector times = repeat(factor);
    long count = 0, before = 0;
    for (long index = 0; index < adapters.num_parts; index++) count += num_strips(adapters.parts[index]);
    const Range mine = by.part(count);
    for (long index = 0; index < adapters.num_parts; index++) {
        const long own = num_strips(adapters.parts[index]);
        const Range strips{std::max(0L, mine.first - before), std::min(own, mine.last - before)};
        before += own;
        if (strips.first >= strips.last) continue;
        widen_strips(x, adapters, index, strips, narrowed, [&](long row, long column, Lanes mask, Vector sums) {
            float* place = y + row * y_stride + column;
            store(place, load(place, mask) + times * sums, mask);
        });
    }
}

// Whether a row has something for this linear. Slots of a step's rows are filled before it, and change not while it runs.
inline bool has_adapted(const Adapters* adapters, const std::int32_t* slots, long rows) {
    if (adapters == nullptr || slots == nullptr) return false;
    for (long row = 0; row < rows; row++) {
        for (long index = 0; slots[row] >= 0 && index < adapters->num_parts; index++) {
            if (adapters->parts[index].ranks[slots[row]] > 0) return true;
        }
    }
    return false;
}
