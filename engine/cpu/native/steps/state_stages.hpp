// What all threads of a team do where a layer keeps a state, each for its part: products in, convolution, memories.
#pragma once

#include <vector>

#include "layers/convolution.hpp"
#include "layers/delta_net.hpp"
#include "layers/mamba.hpp"
#include "layers/step.hpp"
#include "machine/team.hpp"
#include "steps/workspace.hpp"

class StateStages {
public:
    explicit StateStages(Workspace& workspace)
        : w_(workspace), strips_(w_.layers.size()), convolved_(w_.layers.size()), remembered_(w_.layers.size()) {
        for (std::size_t index = 0; index < w_.layers.size(); index++) {
            if (const StateLayer* layer = layer_of(index)) strips_[index] = column_strips(*layer);
        }
    }

    // By one thread, before the others begin.
    void reset() {
        for (Counter& taken : convolved_) taken.reset();
        for (Counter& taken : remembered_) taken.reset();
    }

    // Products of a panel to the step's. Whole when all have met.
    template <class By>
    void project(const StateLayer& layer, Range tokens, const Rows& normed, Panel& common, By& by) {
        const auto put = [&](float* target, const Linear& w) {
            w_.math.set(target, w_.strides.projected, normed, w, by);
            w_.math.adapt(target, w_.strides.projected, normed, w, common, by);
        };
        put(projected(tokens.first), layer.rows);
        if (layer.factors != nullptr) {
            by.meet();
            const Range mine = by.part(normed.count);
            multiply(layer, {tokens.first + mine.first, tokens.first + mine.last});
        }
        if (layer.rates.weight.columns == 0) return;
        if (normed.slots != nullptr) by.meet();  // narrowed rows of the one are read before the other's
        put(projected(tokens.first) + layer.rates_at(), layer.rates);
    }

    // From products to what `o` multiplies, and to the state behind each row. Threads take the longest rows first.
    void mix(const Step& step, std::size_t index, Team::Member& by) {
        const StateLayer& layer = *layer_of(index);
        convolve(step, layer, index, by);
        if (layer.kind == kShortConvolution) return;
        by.meet();
        if (layer.kind == kDeltaNet) return remember(step, static_cast<const DeltaNet&>(layer), index, by);
        const auto& mamba = static_cast<const Mamba&>(layer);
        remember(step, mamba, index, by);
        by.meet();
        const Range tokens = by.part(step.num_tokens);
        const float* const squares = mamba.num_normed > 1 ? sum_squares(mamba, step.num_tokens, by) : nullptr;
        say(mamba, projected(0), w_.strides.projected, read(0), w_.strides.attended, tokens, squares);
    }

private:
    const StateLayer* layer_of(std::size_t index) const { return w_.layers[index].attention.state; }
    float* projected(long token) { return w_.projected.data() + token * w_.strides.projected; }
    Element* read(long token) { return w_.attended.data() + token * w_.strides.attended + w_.strides.read_at; }

    // Of what all ranks' heads have read of each token.
    const float* sum_squares(const Mamba& mamba, long tokens, Team::Member& by) {
        if (by.rank() == 0) {
            if (long(squares_.size()) < tokens) squares_.resize(tokens);
            for (long token = 0; token < tokens; token++) {
                squares_[token] = sum_of_squares(projected(token) + mamba.read_at(), mamba.num_values);
            }
            w_.model.sum_over_ranks(squares_.data(), tokens);
        }
        by.meet();
        return squares_.data();
    }

    // Some tokens' products times their factors.
    void multiply(const StateLayer& layer, Range tokens) {
        const long columns = layer.rows.weight.columns;
        for (long token = tokens.first; token < tokens.last; token++) {
            float* const products = projected(token);
            for (long i = 0; i < columns; i += 16) {
                const Lanes mask = lanes(columns - i);
                store(products + i, load(products + i, mask) * load(layer.factors + i, mask), mask);
            }
        }
    }

    // Each row's strips of columns, and what else is made of its products before memories are changed.
    void convolve(const Step& step, const StateLayer& layer, std::size_t index, const Team::Member& by) {
        const std::vector<ColumnStrip>& strips = strips_[index];
        const long count = long(strips.size()), stride = w_.strides.projected, parts = layer.kind == kMamba ? count + 1 : count;
        convolved_[index].take(long(step.by_length.size()) * parts, [&](long i) {
            const Row& row = *step.by_length[i / parts];
            float* const products = projected(row.token);
            if (i % parts == count) return take_steps(static_cast<const Mamba&>(layer), products, stride, row.length);
            ConvolutionPass(w_.model, layer, row, strips[i % parts], products, stride, read(row.token), w_.strides.attended,
                            w_.own(by).convolution).run();
        });
    }

    // Each key head's by itself.
    void remember(const Step& step, const DeltaNet& net, std::size_t index, const Team::Member& by) {
        const long heads = net.num_key_heads;
        remembered_[index].take(long(step.by_length.size()) * heads, [&](long i) {
            const Row& row = *step.by_length[i / heads];
            DeltaPass(w_.model, net, row, i % heads, projected(row.token), w_.strides.projected, read(row.token),
                      w_.strides.attended, w_.own(by).delta_net).run();
        });
    }

    // Each head's by itself.
    void remember(const Step& step, const Mamba& mamba, std::size_t index, const Team::Member& by) {
        const long heads = mamba.num_heads;
        remembered_[index].take(long(step.by_length.size()) * heads, [&](long i) {
            const Row& row = *step.by_length[i / heads];
            MambaPass(w_.model, mamba, row, i % heads, projected(row.token), w_.strides.projected, w_.own(by).mamba).run();
        });
    }

    Workspace& w_;
    std::vector<float> squares_;  // of tokens, where heads of several ranks are normed together
    std::vector<std::vector<ColumnStrip>> strips_;      // of each layer
    std::vector<Counter> convolved_, remembered_;  // of each layer
};
