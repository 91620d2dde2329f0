// What layers that keep a state do first: each number of a token's row is convolved over the last few tokens, by itself, in
// float32 (engine/nn/convolution.py). Then comes silu, or, of a short convolution, which is all of its layer:
//
//     c * convolution(b * x), of a token's products b, c and x
//
// Threads take a row's columns in strips. Products' places are where the results stand then: tokens are taken from the last
// one to the first, so that each finds those before it as they were.
#pragma once

#include <algorithm>
#include <vector>

#include "layers/model.hpp"
#include "layers/states.hpp"
#include "layers/step.hpp"
#include "machine/vectors.hpp"

constexpr long kMostConvolved = 16;  // tokens that a convolution sees
constexpr long kStripColumns = 128;

// Columns that stand together among a token's products and in the order of kinds.
struct ColumnStrip {
    long product, kind, size;
};

inline std::vector<ColumnStrip> column_strips(const StateLayer& w) {
    std::vector<ColumnStrip> strips;
    const auto add = [&](long product, long kind, long size) {
        for (long at = 0; at < size; at += kStripColumns) {
            strips.push_back({product + at, kind + at, std::min(kStripColumns, size - at)});
        }
    };
    if (w.kind == kMamba) {
        add(w.num_values, 0, w.num_convolved);
    } else if (w.kind == kDeltaNet && static_cast<const DeltaNet&>(w).is_grouped) {
        const auto& net = static_cast<const DeltaNet&>(w);
        const long d = net.key_dim, size = net.repeats() * net.value_dim;
        for (long head = 0; head < net.num_key_heads; head++) {
            const long group = head * (2 * d + 2 * size);  // where all of the key head's stands together
            add(group, head * d, d), add(group + d, net.num_keys() + head * d, d);
            add(group + 2 * d, 2 * net.num_keys() + head * size, size);
        }
    } else {
        add(0, 0, w.num_convolved);
    }
    return strips;
}

// One thread's own.
struct ConvolutionScratch {
    Lines<float> earlier = Lines<float>(kMostConvolved * kStripColumns);  // of tokens before the row's
};

// All tokens of a row, of a strip: what one thread does by itself.
class ConvolutionPass {
public:
    // `projected`: of the row's first token, rows of this stride; `said`: the same of what `o` multiplies.
    ConvolutionPass(const Model& m, const StateLayer& w, const Row& row, const ColumnStrip& strip, float* projected,
                    long stride, Element* said, long said_stride, ConvolutionScratch& own)
        : m_(m), w_(w), row_(row), strip_(strip), projected_(projected), stride_(stride), said_(said),
          said_stride_(said_stride), earlier_(own.earlier.data()) {}

    void run() const {
        const bool is_short = w_.kind == kShortConvolution;
        begin();
        if (is_short) multiply();
        leave();
        if (is_short) {
            convolve([&](long token, long column, Vector sums) {
                const long at = strip_.kind + column;
                const Vector c = load(projected_ + token * stride_ + w_.num_convolved + at);
                store(said_ + token * said_stride_ + at, c * sums);
            });
        } else {
            convolve([&](long token, long column, Vector sums) {
                store(projected_ + token * stride_ + strip_.product + column, silu(sums));
            });
        }
    }

private:
    // Earlier tokens' rows; zeros where there are none.
    void begin() const {
        const long count = w_.kernel_size - 1;
        if (row_.start == 0) return (void)std::fill_n(earlier_, count * kStripColumns, 0.0f);
        const StatePlace place = state_behind(m_, w_, row_, row_.start);
        for (long i = 0; i < count; i++) {
            place.read(1 + i * w_.num_convolved + strip_.kind, strip_.size, earlier_ + i * kStripColumns);
        }
    }

    // b x of a short convolution, to b's place.
    void multiply() const {
        for (long token = 0; token < row_.length; token++) {
            float* const b = projected_ + token * stride_ + strip_.product;
            const float* const x = b + 2 * w_.num_convolved;
            for (long i = 0; i < strip_.size; i += 16) store(b + i, load(b + i) * load(x + i));
        }
    }

    // The last tokens' rows, to each block that the row ends in or leaves.
    void leave() const {
        each_stretch(m_, row_, [&](long, long last, bool is_left) {
            if (!is_left) return;
            const StatePlace place = state_behind(m_, w_, row_, row_.start + last);
            const float num_tokens = float(row_.start + last);
            if (strip_.kind == 0) place.write(0, 1, &num_tokens);
            for (long i = 0; i < w_.kernel_size - 1; i++) {
                const float* const inputs = input(last - w_.kernel_size + 1 + i);
                place.write(1 + i * w_.num_convolved + strip_.kind, strip_.size, inputs);
            }
        });
    }

    // finish(token, column, sums) of each vector of columns.
    template <class Finish>
    void convolve(Finish finish) const {
        const long count = w_.kernel_size;
        const float* const weights = w_.convolution + strip_.kind;
        const float* const bias = w_.convolution_bias == nullptr ? nullptr : w_.convolution_bias + strip_.kind;
        for (long token = row_.length - 1; token >= 0; token--) {
            const float* inputs[kMostConvolved];
            for (long i = 0; i < count; i++) inputs[i] = input(token - count + 1 + i);
            for (long column = 0; column < strip_.size; column += 16) {
                Vector sums = load(inputs[0] + column) * load(weights + column);
                for (long i = 1; i < count; i++) {
                    sums = fma(load(inputs[i] + column), load(weights + i * w_.num_convolved + column), sums);
                }
                finish(token, column, bias == nullptr ? sums : sums + load(bias + column));
            }
        }
    }

    // The strip of the row's `token`th token, below 0 of one before the row.
    const float* input(long token) const {
        if (token >= 0) return projected_ + token * stride_ + strip_.product;
        return earlier_ + (w_.kernel_size - 1 + token) * kStripColumns;
    }

    const Model& m_;
    const StateLayer& w_;
    const Row& row_;
    const ColumnStrip& strip_;
    float* const projected_;
    const long stride_;
    Element* const said_;
    const long said_stride_;
    float* const earlier_;
};
