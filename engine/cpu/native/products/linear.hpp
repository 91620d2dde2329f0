// y = x W^T in elements with float32 sums, at the rate of the processor's multipliers where rows are many and of its
// memory where they are few.
//
// W lies in tiles (tiles.hpp). Attention packs keys and values the same way, so that there is one inner loop, which each
// instruction set has its own of: `add_products`, in sets/.
#pragma once

#include <algorithm>

#ifndef KVFERRY_FLOAT32  // whole numbers are multiplied by inputs in bfloat16 alone
#include "products/integer_linear.hpp"
#endif
#include "machine/team.hpp"
#include "machine/tiles.hpp"
#include "machine/vectors.hpp"

constexpr int kPairLines = 2 * kPartColumns / kLine;  // cache lines that a pair of inputs takes

// Of these a group of rows fetches one part of PARTS, for each pair that it multiplies; 0: none.
template <int PARTS>
constexpr int kFetchedLines = PARTS == 0 ? 0 : kPairLines / std::max(1, PARTS);

#if defined(__AMX_BF16__) || defined(KVFERRY_TILE_UNIT)
#include "sets/amx_products.hpp"
#elif defined(__AVX512BF16__)
#include "sets/avx512_products.hpp"
#elif defined(KVFERRY_NEON_BF16)
#include "sets/neon_products.hpp"
#else
#include "sets/widened_products.hpp"
#endif
#ifndef KVFERRY_FLOAT32
#include "products/widened_linear.hpp"
#endif

struct Rows {
    const Element* values;
    long stride;
    long count;
    const std::int32_t* slots = nullptr;  // of each row's adapter, below 0: none; null: no row has one
    bool may_widen = false;  // weights in whole numbers: results may be others with others beside them

    // `part` of them, from row `first` on.
    Rows from(long first, long part) const {
        return {values + first * stride, stride, part, slots == nullptr ? nullptr : slots + first,
                may_widen};
    }
};

// Groups of rows times a tile each. A row's sums do not depend on the other rows: they are added up in the same order
// whatever their number.
//
// Up to kRowsTogether rows are one group, which passes over a tile stretch by stretch: all of them multiply weights that are
// at their nearest, and what comes next is fetched as evenly as for a few rows. Of more rows the first group waits for a
// tile's weights and the others find them near; while these compute, the next tile comes.
class ElementProducts : public TileUnits<kPartColumns> {
public:
    static constexpr int kRows = kRowsTogether;  // of a group, at most

    ElementProducts(const Rows& x, const Tiles& w)
        : TileUnits(x.count, x.count <= kRowsTogether ? kRowsTogether : kRowsAtOnce), x_(x), w_(w) {}

    // sums [rows][stride], kColumns of each: of a unit of a tile
    void set(long index, long unit, float* sums, long stride = kColumns) const {
        const Range rows = this->rows(unit);
        const Element* const weights = w_.tile(index) + place_of(column(unit), w_.pairs);
        const Element* const next = weights + place_of(kColumns, w_.pairs);
        const int count = int(rows.last - rows.first);
        if constexpr (kRowsTogether > kRowsAtOnce) {
            if (count > 2 * kRowsAtOnce) return pass<4>(weights, sums, stride);
            if (count > kRowsAtOnce) return pass<2>(weights, sums, stride);
        }
        const auto add = [&]<int PARTS>(const Element* ahead) {
            const Element* x = x_.values + rows.first * x_.stride;
            add_products<true, PARTS>(count, x, x_.stride, weights, w_.pairs, sums, stride, ahead);
        };
        const auto part_of_next = [&](int parts) { return next + unit % groups_ % parts * ((next - weights) / parts); };
        if (groups_ == 1) add.template operator()<1>(weights + near_lines(count) * kLine);
        else if (groups_ < 4) add.template operator()<2>(part_of_next(2));
        else if (groups_ < kMostParts) add.template operator()<4>(part_of_next(4));
        else add.template operator()<kMostParts>(part_of_next(kMostParts));
    }

private:
    // Sums of all rows, in PARTS smaller groups, of which each fetches its part of a later stretch, pair by pair.
    template <int PARTS>
    void pass(const Element* weights, float* sums, long stride) const {
        const RowGroups groups(count_, (count_ + PARTS - 1) / PARTS);
        for (long first = 0; first < w_.pairs; first += kStretchPairs, weights += kStretchPairs * 2 * kTileColumns) {
            const long pairs = std::min(kStretchPairs, w_.pairs - first);
            const Element* ahead = weights + near_lines(kRowsAtOnce) * kLine;
            for (long group = 0; group < PARTS; group++, ahead += pairs * kFetchedLines<PARTS> * kLine) {
                const Range rows = groups.rows(group);
                const int count = int(rows.last - rows.first);
                const Element* x = x_.values + rows.first * x_.stride + 2 * first;
                float* const part = sums + rows.first * stride;
                if (first == 0) add_products<true, PARTS>(count, x, x_.stride, weights, pairs, part, stride, ahead);
                else add_products<false, PARTS>(count, x, x_.stride, weights, pairs, part, stride, ahead);
            }
        }
    }

    // Their weights take 4 KiB. Twice as many are up to a twentieth slower, four times as many a third.
    static constexpr long kStretchPairs = 16;

    const Rows& x_;
    const Tiles& w_;
};

// y [rows][stride] = x W^T, of the tiles that `by` takes (team.hpp). For weights in elements.
template <class By>
void put_products(const Rows& x, const Tiles& w, By& by, float* y, long stride) {
    const ElementProducts products(x, w);
    by.take(w.count(), products.units(), [&](long index, long unit) {
        const long column = index * kTileColumns + products.column(unit);
        products.set(index, unit, y + products.rows(unit).first * stride + column, stride);
    });
}

// Calls job(row, column, at) for each 16 of a unit's sums, which stand `at` behind the first.
template <class Products, class Job>
void each_sixteen(const Products& products, long index, long unit, Job job) {
    const Range rows = products.rows(unit);
    const long first = index * kTileColumns + products.column(unit);
    for (long row = rows.first, at = 0; row < rows.last; row++) {
        for (long column = 0; column < products.kColumns; column += 16, at += 16) job(row, first + column, at);
    }
}

// Calls job(products) with the rows' products with the weights, whichever these are.
template <class Job>
void with_products(const Rows& x, const Tiles& w, Job job) {
#ifndef KVFERRY_FLOAT32
    if (w.integers != nullptr && x.may_widen && WidenedProducts::is_for(*w.integers, x.count)) {
        WidenedProducts products(x.values, x.stride, x.count, *w.integers);
        return job(products);
    }
    if (w.integers != nullptr) {
        IntegerProducts products(x.values, x.stride, x.count, *w.integers);
        return job(products);
    }
#endif
    ElementProducts products(x, w);
    job(products);
}

// The tiles that `by` takes, unit by unit: calls finish(row, column, sums) with each row's 16 sums from `column` on.
template <class By, class Finish>
void multiply(const Rows& x, const Tiles& w, By& by, Finish finish) {
    with_products(x, w, [&](auto& products) {
        by.take(w.count(), products.units(), [&](long index, long unit) {
            alignas(64) float sums[products.kRows * products.kColumns];
            products.set(index, unit, sums);
            each_sixteen(products, index, unit, [&](long row, long column, long at) { finish(row, column, sums + at); });
        });
    });
}

// The same of two halves of the columns side by side, each a whole number of tiles: finish(row, column, sums, others) with
// those of `column` of the first half and of the second.
template <class By, class Finish>
void multiply_halves(const Rows& x, const Tiles& w, By& by, Finish finish) {
    with_products(x, w, [&](auto& products) {
        const long half = w.count() / 2;
        constexpr bool kStay = products.kColumnsStay;
        const long together = kStay ? products.groups() : 1;  // groups, for which a half's columns stay near
        by.take(half, products.units() / together, [&](long index, long turn) {
            constexpr int kSize = products.kRows * products.kColumns, kGroups = kStay ? kPanelRows / products.kRows : 1;
            alignas(64) float sums[kGroups * kSize], others[kSize];
            const long first = turn * together;
            for (long i = 0; i < together; i++) products.set(index, first + i, sums + i * kSize);
            for (long i = 0; i < together; i++) {
                products.set(half + index, first + i, others);
                each_sixteen(products, index, first + i, [&](long row, long column, long at) {
                    finish(row, column, sums + i * kSize + at, others + at);
                });
            }
        });
    });
}

// 16 sums from `column` on, with the bias if there is one.
inline Vector with_bias(const float* sums, const Element* bias, long column, long columns) {
    const Vector values = load(sums);
    if (bias == nullptr || column >= columns) return values;
    return values + load(bias + column, lanes(columns - column));
}
