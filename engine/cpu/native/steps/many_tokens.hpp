// A step of many tokens: threads take them in panels, whose intermediate results stay near, and meet around attention
// alone: a panel goes from one layer's to the next one's at once. Experts between are computed by all threads together.
#pragma once

#include <algorithm>
#include <vector>

#include "steps/few_tokens.hpp"
#include "steps/stages.hpp"
#include "steps/threads.hpp"
#include "steps/workspace.hpp"

// A multiple of kRowsAtOnce: as fast by row as a whole panel where weights come from near.
constexpr long kLeastPanelRows = kPanelRows / 3 / kRowsAtOnce * kRowsAtOnce;

class ManyTokens {
public:
    // Fewer tokens make too few panels for so many threads to end together.
    static long least(int threads) { return std::max(kPanelRows, 3 * threads * kLeastPanelRows); }

    // `few`: finishes a step, of which few tokens are wanted as a rule.
    ManyTokens(Workspace& workspace, Stages& stages, Threads& threads, FewTokens& few)
        : w_(workspace), stages_(stages), threads_(threads), few_(few), panels_taken_(workspace.layers.size()) {}

    // False: it was stopped.
    bool forward(const Step& step) {
        plan(step.num_tokens);
        threads_.run([&](Team::Member& by) {
            stages_.begin(step, by);
            if (w_.model.inputs == nullptr || step.first_layer() > 0) return;
            by.meet();
            inputs_taken_.take(long(panels_.size()), [&](long i) {
                Alone alone;
                stages_.make_inputs(step, panels_[i], w_.own(by).panel, alone, by);
            });
        });
        for (std::size_t index = step.first_layer(); index <= step.last_layer(); index++) {
            if (step.is_stopped()) return false;
            threads_.run([&](Team::Member& by) { project_and_attend(step, index, by); });
            if (w_.layers[index].experts == nullptr || index == step.last_layer()) continue;
            finish_sparse(w_.layers[index], w_.residual(0), w_.attended_rows(step));
        }
        threads_.run([&](Team::Member& by) { few_.finish_last(step, by); });
        return true;
    }

private:
    // Panels for threads to take one by one: whole ones as long as there is much to take, so that weights are read less
    // often, and small ones at last, so that threads end together though their cores be unequal.
    void plan(long tokens) {
        const int threads = threads_.max_size();
        panels_.clear();
        for (long first = 0; first < tokens;) {
            const long left = tokens - first, fair = left / (2 * threads) / kRowsAtOnce * kRowsAtOnce;
            long size = threads == 1 ? kPanelRows : std::clamp(fair, kLeastPanelRows, kPanelRows);
            if (left - size < kLeastPanelRows / 2) size = std::min(left, kPanelRows);
            panels_.push_back({first, first + size});
            first += size;
        }
        for (Counter& taken : panels_taken_) taken.reset();
        inputs_taken_.reset();
    }

    // Ends with the layer's attention, or, in the last layer, with K and V alone: attention there is of the wanted tokens.
    void project_and_attend(const Step& step, std::size_t index, Team::Member& by) {
        panels_taken_[index].take(long(panels_.size()), [&](long i) {
            if (index > step.first_layer() && w_.layers[index - 1].experts == nullptr) finish(step, index - 1, panels_[i], by);
            Alone alone;
            stages_.project(step, index, panels_[i], w_.own(by).panel, alone, by);
        });
        by.meet();
        stages_.report(step, index, by);
        if (index < step.last_layer()) stages_.mix(step, index, by);
    }

    // From attention to a layer's end.
    void finish(const Step& step, std::size_t index, Range tokens, const Team::Member& by) {
        const Layer& layer = w_.layers[index];
        Panel& panel = w_.own(by).panel;
        Alone alone;
        const Rows own = w_.attended_rows(step).from(tokens.first, tokens.last - tokens.first);
        const Rows attended = stages_.values_of(layer, own, panel, alone);
        const OwnRows inputs = w_.own_rows(index).from(tokens.first);
        w_.residual_math.finish(layer, w_.residual(tokens.first), attended, inputs, panel, panel, alone);
    }

    // The same of a layer with experts, which threads do together.
    void finish_sparse(const Layer& layer, float* x, const Rows& attended) {
        threads_.run([&](Team::Member& by) {
            const Range mine = by.part(attended.count);
            Panel& panel = w_.own(by).panel;
            Alone alone;
            for (long first = mine.first; first < mine.last; first += kPanelRows) {
                const Rows own = attended.from(first, std::min(kPanelRows, mine.last - first));
                const Rows part = stages_.values_of(layer, own, panel, alone);
                w_.residual_math.add_mixed(x + first * w_.strides.hidden, part, layer.attention, layer.mixed_norm, panel, alone);
            }
            by.meet();
            stages_.add_sparse(layer, x, attended, by);
        });
    }

    Workspace& w_;
    Stages& stages_;
    Threads& threads_;
    FewTokens& few_;
    std::vector<Range> panels_;           // of the step's tokens
    std::vector<Counter> panels_taken_;  // in each layer
    Counter inputs_taken_;               // panels whose layers' own inputs are made
};
