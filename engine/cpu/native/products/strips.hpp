// Matrices of an adapter in the form in which a step reads them (adapters.hpp): strips of 16 columns, zeros beyond.
#pragma once

#include "products/adapters.hpp"
#include "machine/vectors.hpp"

// One as its file has it: [columns][inputs]. Declared once more in engine/cpu/adapters.py.
struct StoredMatrix {
    const void* values;
    std::int64_t is_float32;  // else elements
    std::int64_t columns, inputs;
    std::int64_t stride;  // values from one column to the next
    double scale;         // that each is taken times
};

// Where a pair's two inputs of one column stand in its 32 values (load_pairs).
constexpr int place_in_pair(int column, int input) {
    return sizeof(Element) == sizeof(float) ? input * kStrip + column : 2 * column + input;
}

// Up to 16 columns to one strip of `pairs` pairs, whole sixteens of inputs. Each input is rounded to an element, ties to even.
template <class Value>
void write_strip(const Value* values, long stride, long columns, long inputs, Vector scale, long pairs, Element* strip) {
    constexpr int kInputs = 16;  // at once
    alignas(64) Element found[kStrip][kInputs];
    std::fill_n(&found[0][0], kStrip * kInputs, Element(0));
    for (long first = 0; first < 2 * pairs; first += kInputs, strip += kInputs * kStrip) {
        for (long column = 0; column < columns; column++) {
            const Value* source = values + column * stride + std::min(first, inputs);  // an end, if none is left
            store(found[column], load(source, lanes(inputs - first)) * scale);
        }
        for (int pair = 0; pair < kInputs / 2; pair++) {
            for (int column = 0; column < kStrip; column++) {
                for (int input = 0; input < 2; input++) {
                    strip[2 * kStrip * pair + place_in_pair(column, input)] = found[column][2 * pair + input];
                }
            }
        }
    }
}

template <class Value>
void write_strips(const StoredMatrix& matrix, const Value* values, long strips, long pairs, Element* target) {
    const Vector scale = repeat(float(matrix.scale));
    for (long strip = 0; strip < strips; strip++) {
        const long first = std::min<long>(strip * kStrip, matrix.columns);
        const long columns = std::min<long>(kStrip, matrix.columns - first);
        write_strip(values + first * matrix.stride, matrix.stride, columns, matrix.inputs, scale, pairs,
                    target + strip * kStrip * 2 * pairs);
    }
}

inline void write_strips(const StoredMatrix& matrix, long strips, long pairs, Element* target) {
    if (matrix.is_float32) return write_strips(matrix, (const float*)matrix.values, strips, pairs, target);
    write_strips(matrix, (const Element*)matrix.values, strips, pairs, target);
}
