// A step by several ranks. Each has a part of the heads and of the inner columns: what o and down yield is summed over
// them, in float32. So a rank's threads meet there, and share out columns whatever the number of tokens.
#pragma once

#include <algorithm>
#include <vector>

#include "steps/stages.hpp"
#include "steps/threads.hpp"
#include "steps/workspace.hpp"

class SeveralRanks {
public:
    SeveralRanks(Workspace& workspace, Stages& stages, Threads& threads)
        : w_(workspace), stages_(stages), threads_(threads) {}

    void forward(const Step& step) {
        threads_.run([&](Team::Member& by) { stages_.begin(step, by); });
        if (step.first_layer() == 0) begin(step);
        for (std::size_t index = step.first_layer(); index <= step.last_layer(); index++) {
            const bool is_last = index == step.last_layer();
            threads_.run([&](Team::Member& by) {
                project(step, index, by);
                stages_.report(step, index, by);
                if (!is_last) stages_.mix(step, index, by);
            });
            if (!is_last) finish(w_.layers[index], w_.residual(0), w_.attended_rows(step), w_.own_rows(index));
        }
        if (!stages_.has_last(step)) return;
        threads_.run([&](Team::Member& by) { stages_.gather_last(step, by); });
        if (step.num_wanted == 0) return;
        finish(w_.layers[step.last_layer()], step.hidden, w_.last_attended_rows(step), w_.last_own_rows());
    }

private:
    template <class Job>
    static void each_panel(long rows, Job job) {
        for (long first = 0; first < rows; first += kPanelRows) job(first, std::min(kPanelRows, rows - first));
    }

    // What ranks have of tokens' embeddings and of layers' own inputs, together.
    void begin(const Step& step) {
        w_.model.sum_over_ranks(w_.residual(0), step.num_tokens * w_.strides.hidden);
        if (w_.model.inputs == nullptr) return;
        const LayerInputs& w = *w_.model.inputs;
        const long size = w_.model.num_layers * w.size;
        looked_up_.assign(step.num_tokens * size, 0.0f);
        for (long token = 0; token < step.num_tokens; token++) {
            const long row = step.input_ids[token] - w.first_token;
            if (row < 0 || row >= w.num_tokens) continue;
            for (long i = 0; i < size; i += 16) store(looked_up_.data() + token * size + i, load(w.table + row * size + i));
        }
        w_.model.sum_over_ranks(looked_up_.data(), step.num_tokens * size);
        threads_.run([&](Team::Member& by) {
            each_panel(step.num_tokens, [&](long first, long rows) {
                stages_.make_inputs(step, {first, first + rows}, w_.shared, by, by, [&](long row) {
                    return looked_up_.data() + (first + row) * size;
                });
            });
        });
    }

    // To K and V of all tokens in the pages.
    void project(const Step& step, std::size_t index, Team::Member& by) {
        const Layer& layer = w_.layers[index];
        each_panel(step.num_tokens, [&](long first, long rows) {
            stages_.project(step, index, {first, first + rows}, w_.shared, by, by, [&](long count) -> const Squares* {
                return layer.attention.has_whole_norms ? sum_squares(layer, count, by) : nullptr;
            });
        });
    }

    // Of a panel's projected rows, over the ranks.
    const Squares* sum_squares(const Layer& layer, long rows, Team::Member& by) {
        if (by.rank() == 0) {
            const float* projected = w_.shared.qkv.data();
            for (long row = 0; row < rows; row++) squares_[row] = w_.heads_of(layer).squares(projected + row * w_.strides.qkv);
            w_.model.sum_over_ranks(&squares_[0].queries, 2 * rows);
        }
        by.meet();
        return squares_;
    }

    // From attention to a layer's end: its two blocks in their order, what both add, and what it makes of its own inputs.
    void finish(const Layer& layer, float* x, const Rows& attended, const OwnRows& inputs) {
        const long rows = attended.count, size = rows * w_.strides.hidden;
        if (long(partials_.size()) < size) partials_.resize(size);
        const bool is_fed_first = layer.is_fed_first != 0;
        threads_.run([&](Team::Member& by) { compute(layer, is_fed_first, x, attended, by); });
        w_.model.sum_over_ranks(partial(0), size);
        threads_.run([&](Team::Member& by) {
            add_sums(layer, is_fed_first, x, rows, by);
            if (layer.is_mixer_alone()) return w_.residual_math.scale(layer, x, by.part(rows));
            by.meet();
            compute(layer, !is_fed_first, x, attended, by);
        });
        if (layer.is_mixer_alone()) return;
        w_.model.sum_over_ranks(partial(0), size);
        if (layer.are_beside()) w_.model.sum_over_ranks(w_.fed.data(), size);
        const bool has_own = layer.own_input.gate.weight.columns > 0;
        threads_.run([&](Team::Member& by) {
            add_sums(layer, !is_fed_first, x, rows, by);
            if (!has_own) return w_.residual_math.scale(layer, x, by.part(rows));  // those that this thread has added to
            by.meet();
            add_own(layer.own_input, x, attended, inputs, by);
        });
        if (!has_own) return;
        w_.model.sum_over_ranks(partial(0), size);
        threads_.run([&](Team::Member& by) {
            add_sums(x, nullptr, layer.own_input.norm, 1.0f, rows, by);
            w_.residual_math.scale(layer, x, by.part(rows));
        });
    }

    // This rank's part of the feed-forward, or of what is mixed.
    void compute(const Layer& layer, bool is_fed, const float* x, const Rows& attended, Team::Member& by) {
        if (!is_fed) return add_attended(layer, attended, by);
        if (layer.has_mlp()) add_mlp(layer, x, attended, by);
        if (layer.experts == nullptr) return;
        float* const to = layer.are_beside() ? w_.fed.data() : partial(0);
        stages_.add_experts(layer, x, to, 1.0f, attended.count, by, attended.slots);
    }

    // x += what the ranks' sums of the feed-forward, or of what is mixed, are. Biases are added once, to the sums.
    void add_sums(const Layer& layer, bool is_fed, float* x, long rows, const Team::Member& by) {
        if (!is_fed) return add_sums(x, layer.attention.o.bias, layer.mixed_norm, w_.residual_math.mixed_factor(), rows, by);
        if (layer.are_beside()) add_beside(layer, rows, by);
        const Element* bias = layer.experts == nullptr ? layer.mlp.down.bias : nullptr;
        add_sums(x, bias, layer.output_norm, w_.residual_math.fed_factor(), rows, by);
    }

    // This rank's part of o(attended), and of what is beside it.
    void add_attended(const Layer& layer, const Rows& attended, Team::Member& by) {
        const Linear o = without_bias(layer.attention.o);
        each_panel(attended.count, [&](long first, long count) {
            const Rows panel = stages_.values_of(layer, attended.from(first, count), w_.shared, by);
            w_.residual_math.add_mixed(partial(first), panel, o, layer.attention.beside(), 1.0f, w_.shared, by);
            // The next panel's narrowed rows, or values, take the place of these.
            if (attended.slots != nullptr || layer.attention.latents != nullptr) by.meet();
        });
    }

    // The ranks' sums of an MLP, and of the experts beside it, to one sum of both.
    void add_beside(const Layer& layer, long rows, const Team::Member& by) {
        const Range mine = by.part(rows);
        for (long row = mine.first; row < mine.last; row++) {
            float* const of_experts = w_.fed.data() + row * w_.strides.hidden;
            w_.residual_math.add_beside(layer, partial(row), of_experts);
            std::fill_n(of_experts, w_.strides.hidden, 0.0f);
        }
    }

    // This rank's part of what a layer makes of its own inputs.
    void add_own(const OwnInput& own, const float* x, const Rows& attended, const OwnRows& inputs, Team::Member& by) {
        const Linear projection = without_bias(own.projection);
        each_panel(attended.count, [&](long first, long count) {
            const Rows rows = attended.from(first, count);
            const Rows gated = w_.residual_math.gated_inputs(own, x + first * w_.strides.hidden, rows, inputs.from(first),
                                                             w_.own(by).panel, w_.shared, by);
            w_.math.add_adapted(partial(first), gated, projection, 1.0f, w_.shared, by);
            by.meet();
        });
    }

    // This rank's part of mlp(norm(x)).
    void add_mlp(const Layer& layer, const float* x, const Rows& attended, Team::Member& by) {
        const Mlp mlp{layer.mlp.gate_up, without_bias(layer.mlp.down)};
        each_panel(attended.count, [&](long first, long count) {
            const Rows normed = w_.math.normalize(x + first * w_.strides.hidden, count, layer.mlp_norm, w_.own(by).panel,
                                                  attended.from(first, count).slots);
            const Rows activated = w_.math.feed_forward(mlp, normed, w_.shared, by);
            w_.math.add_adapted(partial(first), activated, mlp.down, 1.0f, w_.shared, by);
            by.meet();
        });
    }

    // x += (the ranks' sums + bias) * factor, normed if `norm` is not null; the sums are zero afterwards.
    void add_sums(float* x, const Element* bias, const Element* norm, float factor, long rows, const Team::Member& by) {
        const Range mine = by.part(rows);
        for (long row = mine.first; row < mine.last; row++) {
            for (long i = 0; i < w_.strides.hidden; i += 16) {
                store(partial(row) + i, with_bias(partial(row) + i, bias, i, w_.model.hidden_size));
            }
            w_.residual_math.add_row(x + row * w_.strides.hidden, partial(row), norm, factor);
            std::fill_n(partial(row), w_.strides.hidden, 0.0f);
        }
    }

    static Linear without_bias(const Linear& w) { return {w.weight, nullptr, w.adapters}; }

    float* partial(long row) { return partials_.data() + row * w_.strides.hidden; }

    Workspace& w_;
    Stages& stages_;
    Threads& threads_;
    Lines<float> partials_;  // this rank's part of sums; zero between them
    std::vector<float> looked_up_;  // of layers' own inputs of a step's tokens
    Squares squares_[kPanelRows];
};
