// y = x W^T in elements with float32 sums, at the rate of the processor's multipliers where rows are many and of its
// memory where they are few.
//
// W lies in tiles (tiles.hpp). Attention packs keys and values the same way, so that there is one inner loop, which each
// instruction set has its own of: `add_products`, in sets/.
#pragma once

#include <algorithm>

#ifndef KVFERRY_FLOAT32  // whole numbers are multiplied by inputs in bfloat16 alone
#include "integer_linear.hpp"
#endif
#include "team.hpp"
#include "tiles.hpp"
#include "vectors.hpp"

constexpr int kPairLines = 2 * kTileColumns / kLine;  // cache lines that a tile's pair of inputs takes

#if defined(__AMX_BF16__) || defined(KVFERRY_TILE_UNIT)
#include "sets/amx_products.hpp"
#elif defined(__AVX512BF16__)
#include "sets/avx512_products.hpp"
#else
#include "sets/avx2_products.hpp"
#endif

struct Rows {
    const Element* values;
    long stride;
    long count;
    const std::int32_t* slots = nullptr;  // of each row's adapter, below 0: none; null: no row has one

    // `part` of them, from row `first` on.
    Rows from(long first, long part) const {
        return {values + first * stride, stride, part, slots == nullptr ? nullptr : slots + first};
    }
};

// The tiles that `by` takes (team.hpp), in groups of rows: calls finish(row, column, sums) with each row's 64 sums from
// `column` on. A row's sums do not depend on the other rows: they are added up in the same order whatever their number.
//
// The first group of rows waits for the weights, the others find them near. While these compute, the next tile comes.
template <class By, class Finish>
void multiply(const Rows& x, const Tiles& w, By& by, Finish finish) {
#ifndef KVFERRY_FLOAT32
    if (w.integers != nullptr) return multiply_integers(x.values, x.stride, x.count, *w.integers, by, finish);
#endif
    const long groups = (x.count + kRowsAtOnce - 1) / kRowsAtOnce;
    by.take(w.count(), groups, [&](long index, long group) {
        alignas(64) float sums[kRowsAtOnce * kTileColumns];
        const Element *weights = w.tile(index), *next = w.tile(index + 1);
        const Range rows = share(x.count, int(group), int(groups));
        const Element* inputs = x.values + rows.first * x.stride;
        const int count = int(rows.last - rows.first);
        if (groups == 1) {
            add_products<true, kPairLines>(count, inputs, x.stride, weights, w.pairs, sums, kTileColumns,
                                           weights + near_lines(count) * kLine);
        } else if (groups < 4) {
            add_products<true, kPairLines / 2>(count, inputs, x.stride, weights, w.pairs, sums, kTileColumns,
                                               next + (group & 1) * w.pairs * (kPairLines / 2) * kLine);
        } else {
            add_products<true, kPairLines / 4>(count, inputs, x.stride, weights, w.pairs, sums, kTileColumns,
                                               next + (group & 3) * w.pairs * (kPairLines / 4) * kLine);
        }
        for (long row = rows.first; row < rows.last; row++) {
            finish(row, index * kTileColumns, sums + (row - rows.first) * kTileColumns);
        }
    });
}

// 16 sums from `column` on, with the bias if there is one.
inline Vector with_bias(const float* sums, const Element* bias, long column, long columns) {
    const Vector values = load(sums);
    if (bias == nullptr || column >= columns) return values;
    return values + load(bias + column, lanes(columns - column));
}
