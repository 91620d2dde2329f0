// y = x W^T for W in whole numbers (integer_tiles.hpp) and many rows, where a matrix unit multiplies elements faster than
// vectors multiply whole numbers: a tile of weights becomes elements once for all rows of a panel.
//
// Inputs stay elements and weights are rounded to them. So results are others than those of few rows (integer_linear.hpp),
// and not for rows whose results shall be the same whatever others there are.
#pragma once

#include "products/integer_linear.hpp"
#include "machine/memory.hpp"

// Four inputs of 16 columns: two pairs.
inline void widen_four(Bytes bytes, Vector scale, Vector offset, Element* target) {
    const auto meant = [&](Vector number) { return fma(number, scale, offset); };
    store_pairs(target, to_pairs(meant(byte_as_float<0>(bytes)), meant(byte_as_float<1>(bytes))));
    store_pairs(target + 2 * kPartColumns, to_pairs(meant(byte_as_float<2>(bytes)), meant(byte_as_float<3>(bytes))));
}

// A tile as tiles.hpp has it, to w.inputs * 64 elements.
template <Numbers NUMBERS>
void widen(const IntegerTiles& w, const std::uint8_t* tile, Element* target) {
    Factors factors{nullptr, nullptr, nullptr, w.factor_size, w.is_e2m1 != 0};
    for (long group = 0; group < w.groups(); group++) {
        if (w.begins_span(group)) factors.bases = tile, tile += w.bases_size();
        factors.scales = tile, tile += w.factors_size();
        if (w.has_minima) factors.minima = factors.scales + w.scales_size();
        Vector scale[4], offset[4];  // number * scale + offset
        for (int i = 0; i < 4; i++) {
            scale[i] = factors.scale(i);
            offset[i] = scale[i] * repeat(-float(w.zero()));
            if (w.has_minima) offset[i] = offset[i] + factors.minimum(i);
        }
        for (long units = w.units(w.group); units > 0; units--) {
            for (int i = 0; i < 4; i++) {
                const Bytes bytes = load_bytes(tile + 64 * i);
                Element* const place = target + place_of(16 * i, w.inputs / 2);
                if (NUMBERS == kBytes) {
                    widen_four(bytes, scale[i], offset[i], place);
                    continue;
                }
                const Bytes low = low_nibbles(bytes), high = high_nibbles(bytes);
                widen_four(NUMBERS == kE2m1 ? twice_e2m1(low) : low, scale[i], offset[i], place);
                widen_four(NUMBERS == kE2m1 ? twice_e2m1(high) : high, scale[i], offset[i], place + 4 * kPartColumns);
            }
            tile += 4 * kTileColumns;
            target += (NUMBERS == kBytes ? 4 : 8) * kPartColumns;
        }
    }
}

// A thread's own: the last two tiles that it widened, as halves are multiplied side by side.
struct WidenedTiles {
    Lines<Element> memory[2];
    long index[2];
    int turn;
};

inline WidenedTiles& own_widened_tiles() {
    static thread_local WidenedTiles tiles;
    return tiles;
}

// As ElementProducts in linear.hpp.
class WidenedProducts : public TileUnits<kPartColumns> {
public:
    static constexpr int kRows = kRowsAtOnce;

    WidenedProducts(const Element* x, long stride, long count, const IntegerTiles& w)
        : TileUnits(count, kRows), x_(x), stride_(stride), w_(w) {
        for (int i = 0; i < 2; i++) {
            tiles_.index[i] = -1;
            if (long(tiles_.memory[i].size()) < w.inputs * kTileColumns) tiles_.memory[i].resize(w.inputs * kTileColumns);
        }
    }

    // Whether so many rows are multiplied so: fewer are done before a tile is widened.
    static bool is_for(const IntegerTiles& w, long count) {
        return !kSumsInRegisters && count > kRows && w.order == nullptr && w.inputs % kTileInputs == 0 && w.group % 8 == 0;
    }

    // Meanwhile the first groups of rows fetch the next tile, each as much as it multiplies at most.
    void set(long index, long unit, float* sums) {
        const Range range = rows(unit);
        const Element* const x = x_ + range.first * stride_;
        const Element* const weights = widened(index) + place_of(column(unit), w_.inputs / 2);
        const int count = int(range.last - range.first);
        const long part = w_.inputs * kColumns / kMostParts * long(sizeof(Element)), at = unit * part;
        if (at < w_.tile_size()) {
            const auto* const ahead = (const Element*)(w_.tile(index + 1) + at);
            add_products<true, kMostParts>(count, x, stride_, weights, w_.inputs / 2, sums, kColumns, ahead);
        } else {
            add_products<true, 0>(count, x, stride_, weights, w_.inputs / 2, sums, kColumns, nullptr);
        }
    }

private:
    const Element* widened(long index) {
        for (int i = 0; i < 2; i++) {
            if (tiles_.index[i] == index) return tiles_.memory[i].data();
        }
        const int turn = tiles_.turn ^= 1;
        tiles_.index[turn] = index;
        Element* const target = tiles_.memory[turn].data();
        const std::uint8_t* const tile = w_.tile(index);
        if (w_.bits == 8) widen<kBytes>(w_, tile, target);
        else if (w_.is_e2m1) widen<kE2m1>(w_, tile, target);
        else widen<kNibbles>(w_, tile, target);
        return target;
    }

    const Element* x_;
    const long stride_;
    const IntegerTiles& w_;
    WidenedTiles& tiles_ = own_widened_tiles();
};
