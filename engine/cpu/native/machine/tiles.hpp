// The order in which the inner loop (linear.hpp) reads a matrix W [columns, inputs]; weights are packed here, keys and
// values in prompt_attention.hpp.
//
//     [columns / 64][inputs / 2][64 columns][2 inputs]    bfloat16; columns padded to 64, a weight's inputs to 32: zeros
//     [columns / 32][inputs / 2][32 columns][2 inputs]    the same for AMX
//     [columns / 64][inputs / 2][4][2 inputs][16 columns] float32
//
// A tile is 64 columns. In it, pair after pair of inputs, stand the 64 columns' two weights each, 256 bytes a pair.
// VDPBF16PS takes them as four vectors, each multiplied by one pair of a row's inputs that is broadcast; AVX2 widens them
// to float32 first. BFMMLA takes two columns' four weights, of a pair and the next one.
//
// AMX multiplies 32 columns at once. These are a part of a tile, whose weights stay in the nearest cache while all rows pass
// over them. An AMX tile is the same memory: 16 pairs of 16 columns are 16 rows of 64 bytes, 128 bytes apart; hence inputs in
// 32s.
#pragma once

#include <algorithm>

#include "machine/team.hpp"
#include "machine/vectors.hpp"

constexpr int kTileColumns = 64;
constexpr int kTileInputs = 32;
#if defined(__AMX_BF16__) || defined(KVFERRY_TILE_UNIT)
constexpr int kPartColumns = 32;
#else
constexpr int kPartColumns = kTileColumns;
#endif

// Where a column's first pair stands in a tile, or in some.
inline long place_of(long column, long pairs) {
    return column / kPartColumns * (2 * kPartColumns * pairs) + column % kPartColumns * 2;
}

inline long padded(long size, long multiple) { return (size + multiple - 1) / multiple * multiple; }

// A tile's units of work: so many of its columns, for a group of rows each. All groups' of the first columns come first: where
// columns are few, they stay near meanwhile.
template <int COLUMNS>
class TileUnits : public RowGroups {
public:
    static constexpr int kColumns = COLUMNS;
    static constexpr bool kColumnsStay = COLUMNS < kTileColumns;

    using RowGroups::RowGroups;

    long units() const { return kTileColumns / kColumns * groups_; }
    Range rows(long unit) const { return RowGroups::rows(unit % groups_); }
    long column(long unit) const { return unit / groups_ * kColumns; }
};

struct IntegerTiles;  // integer_tiles.hpp

struct Tiles {  // declared once more in engine/cpu/packing.py
    const Element* weights;
    std::int64_t columns, pairs;
    const IntegerTiles* integers;  // the weights where they are whole numbers: of the above `columns` alone; else null

    long count() const { return (columns + kTileColumns - 1) / kTileColumns; }
    const Element* tile(long index) const { return weights + index * pairs * 2 * kTileColumns; }
};

// Up to 32 inputs, from `at` on, of 16 columns to their `pairs` places in a tile. A column that is null is zeros, and so
// are inputs behind the last one.
inline void pack_columns(const Element* const* columns, long at, long inputs, int pairs, Element* target) {
    const Values left = first_values(inputs - at);
    Pairs v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = load_pairs(columns[i] + at, columns[i] == nullptr ? Values(0) : left);
    transpose_16(v);
    for (int pair = 0; pair < pairs; pair++) store_pairs(target + pair * 2 * kPartColumns, v[pair]);
}

// How many values a weight takes in tiles.
inline long tiled_size(long columns, long inputs) {
    return padded(columns, kTileColumns) * padded(inputs, kTileInputs);
}

// W as it is stored, row after row, to `target` of `tiled_size`.
inline Tiles pack(const Element* w, long columns, long inputs, Element* target) {
    const Tiles tiles{target, columns, padded(inputs, kTileInputs) / 2, nullptr};
    for (long first = 0; first < columns; first += kTileColumns) {
        const Element* rows[kTileColumns];
        for (long i = 0; i < kTileColumns; i++) rows[i] = first + i < columns ? w + (first + i) * inputs : nullptr;
        for (int i = 0; i < kTileColumns; i += 16) {
            Element* const place = target + place_of(first + i, tiles.pairs);
            for (long at = 0; at < inputs; at += kTileInputs) {
                pack_columns(rows + i, at, inputs, kTileInputs / 2, place + at * kPartColumns);
            }
        }
    }
    return tiles;
}
