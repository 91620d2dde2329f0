// The order in which the inner loop of integer_linear.hpp reads a matrix of whole numbers W [columns, inputs], with a
// scale, and maybe a minimum, for each group of a column's inputs:
//
//     w[column, i] = number[column, i] * scale[column, i / group] + minimum[column, i / group]
//
//     [columns / 64][groups] of: 64 scales, 64 minima if there are any, then the group's numbers
//         8 bits   [inputs / 4][64 columns][4 inputs]    a byte each: the number + 128
//         4 bits   [inputs / 8][64 columns][4 bytes]     byte b: input b low, 4 + b high; the number, + 8 if signed
//         e2m1     as 4 bits: a sign, an exponent of 2 and a binary place, as in MXFP4; multiplied as twice what they mean
//
// Scales and minima are float32 or, where that says exactly the same, half precision, or a byte: so many times a base
// that some groups share. These bases, 64 float32 for scales and 64 for minima, stand before the first of such groups.
// A byte without bases is the exponent of a power of 2, with 127 added; of e2m1 one with a base is an e4m3 from 0 on.
//
// What is added to numbers makes bytes unsigned; it is taken away again by the sum of a group's inputs. Padding is
// zeros: columns to 64, a group to 8 inputs.
#pragma once

#include <cstdint>
#include <cstring>

#include "products/integers.hpp"
#include "machine/tiles.hpp"

enum Numbers { kBytes, kNibbles, kE2m1 };

constexpr int bits_of(Numbers numbers) { return numbers == kBytes ? 8 : 4; }
constexpr int most_of(Numbers numbers) { return numbers == kBytes ? 255 : numbers == kNibbles ? 15 : 24; }  // as multiplied

struct IntegerTiles {  // declared once more in engine/cpu/packing.py
    const std::uint8_t* memory;
    const std::int32_t* order;  // input i of a column is multiplied by input order[i] of a row; null: by input i
    std::int64_t columns, inputs, bits, group;  // `group`: inputs of one
    std::int64_t has_minima, factor_size;       // bytes of a scale or minimum: 4, 2 or 1
    std::int64_t span;                          // groups that share a base; 0: there is none
    std::int64_t is_e2m1;                       // what 4 bits are

    long groups() const { return inputs / group; }
    long segments() const { return (group + kSegment - 1) / kSegment; }  // of a group
    long units(long inputs) const { return padded(inputs, 8) * bits / 32; }  // of 256 bytes, that so many are
    std::int32_t zero() const { return bits == 8 ? 128 : is_e2m1 ? 12 : has_minima ? 0 : 8; }  // what was added to numbers
    long scales_size() const { return kTileColumns * factor_size; }
    long factors_size() const { return scales_size() * (1 + has_minima); }
    long group_size() const { return factors_size() + units(group) * 4 * kTileColumns; }
    long bases_size() const { return kTileColumns * 4 * (1 + has_minima); }
    bool begins_span(long group) const { return span != 0 && group % span == 0; }
    long tile_size() const { return groups() * group_size() + (span != 0 ? groups() / span * bases_size() : 0); }
    long count() const { return (columns + kTileColumns - 1) / kTileColumns; }
    const std::uint8_t* tile(long index) const { return memory + index * tile_size(); }
};

// A matrix of whole numbers as engine/nn/grouped.py has it, row after row.
struct IntegerMatrix {  // declared once more in engine/cpu/packing.py
    const std::uint8_t* numbers;
    const std::uint8_t* factors[2];  // scales and minima [columns][groups], in so many bytes as the tiles say
    const std::uint8_t* bases[2];    // theirs [columns][groups / span], if there are any
};

// Four bytes that hold eight numbers, input 2 i in the low half of byte i, as a tile has them.
inline std::uint32_t by_halves(std::uint32_t bytes) {
    const std::uint32_t even = bytes & 0x0f0f0f0f, odd = bytes >> 4 & 0x0f0f0f0f;
    const std::uint32_t e = (even | even >> 12) & 0xffff, o = (odd | odd >> 12) & 0xffff;  // 0, 4, 2, 6; 1, 5, 3, 7
    return (e & 0xff) | (o & 0xff) << 8 | (e & 0xff00) << 8 | (o & 0xff00) << 16;
}

// Up to 64 columns of `of_each` values of `size` bytes each, from value `at` on, side by side.
inline std::uint8_t* put_column(const std::uint8_t* values, long size, long columns, long of_each, long at,
                                std::uint8_t* target) {
    for (long i = 0; i < columns; i++) std::memcpy(target + i * size, values + (i * of_each + at) * size, size);
    return target + kTileColumns * size;
}

// The matrix to `target` of w.count() * w.tile_size() bytes.
inline void pack_integers(const IntegerTiles& w, const IntegerMatrix& matrix, std::uint8_t* target) {
    const long row_size = w.inputs * w.bits / 8, group_bytes = w.group * w.bits / 8, groups = w.groups();
    std::memset(target, 0, w.count() * w.tile_size());
    for (long first = 0; first < w.columns; first += kTileColumns) {
        const long columns = std::min<long>(kTileColumns, w.columns - first);
        for (long group = 0; group < groups; group++) {
            for (int i = 0; i <= w.has_minima && w.begins_span(group); i++) {
                const long spans = groups / w.span;
                target = put_column(matrix.bases[i] + first * spans * 4, 4, columns, spans, group / w.span, target);
            }
            for (int i = 0; i <= w.has_minima; i++) {
                const std::uint8_t* factors = matrix.factors[i] + first * groups * w.factor_size;
                target = put_column(factors, w.factor_size, columns, groups, group, target);
            }
            for (long i = 0; i < columns; i++) {
                const std::uint8_t* row = matrix.numbers + (first + i) * row_size + group * group_bytes;
                for (long at = 0; at < group_bytes; at += 4) {
                    std::uint32_t four = 0;
                    std::memcpy(&four, row + at, std::min<long>(4, group_bytes - at));
                    four = w.bits == 8 ? four ^ 0x80808080 : by_halves(four);
                    std::memcpy(target + at * kTileColumns + 4 * i, &four, sizeof four);
                }
            }
            target += w.units(w.group) * 4 * kTileColumns;
        }
    }
}
