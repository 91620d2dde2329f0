// A step of few tokens: the time goes into reading weights, or there are too few panels for each thread to have its own.
// Threads take tokens panel by panel together, share out the weights' columns, and meet after each product.
#pragma once

#include <algorithm>

#include "steps/stages.hpp"
#include "steps/threads.hpp"
#include "steps/workspace.hpp"

// Calls job(tokens) for panels of `count` tokens, as equal as whole groups of rows let them be.
template <class Job>
void each_panel(long count, Job job) {
    const long panels = (count + kPanelRows - 1) / kPanelRows;
    const long size = panels <= 1 ? count : ((count - 1) / panels / kRowsAtOnce + 1) * kRowsAtOnce;
    for (long first = 0; first < count; first += size) job(Range{first, std::min(first + size, count)});
}

class FewTokens {
public:
    FewTokens(Workspace& workspace, Stages& stages, Threads& threads) : w_(workspace), stages_(stages), threads_(threads) {}

    // False: it was stopped.
    bool forward(const Step& step) {
        if (step.num_tokens > kPanelRows) return forward_by_layers(step);
        is_stopped_ = false;
        threads_.run([&](Team::Member& by) {
            begin(step, by);
            for (std::size_t index = step.first_layer(); index <= step.last_layer() && !is_stopped_; index++) {
                compute(step, index, by);
                if (index % kLayersToStop == 0) agree_to_stop(step, by);
            }
            if (!is_stopped_) finish_last(step, by);
        });
        return !is_stopped_;
    }

    // The step's last layer from attention on, for the wanted tokens alone. Within a job, by all threads.
    void finish_last(const Step& step, Team::Member& by) {
        if (!stages_.has_last(step)) return;
        stages_.gather_last(step, by);
        by.meet();
        finish(w_.layers[step.last_layer()], step.hidden, w_.last_attended_rows(step), w_.last_own_rows(), by);
    }

private:
    // A longer step asks anew before each layer which cores are to spare.
    bool forward_by_layers(const Step& step) {
        threads_.run([&](Team::Member& by) { begin(step, by); });
        for (std::size_t index = step.first_layer(); index <= step.last_layer(); index++) {
            if (step.is_stopped()) return false;
            threads_.run([&](Team::Member& by) { compute(step, index, by); });
        }
        threads_.run([&](Team::Member& by) { finish_last(step, by); });
        return true;
    }

    // All that is there before the layers; all have met.
    void begin(const Step& step, Team::Member& by) {
        stages_.begin(step, by);
        by.meet();
        if (w_.model.inputs == nullptr || step.first_layer() > 0) return;
        each_panel(step.num_tokens, [&](Range tokens) { stages_.make_inputs(step, tokens, w_.shared, by, by); });
    }

    // All threads go on, or none: what one of them has seen is told between two meetings.
    void agree_to_stop(const Step& step, Team::Member& by) {
        by.meet();
        if (by.rank() == 0) is_stopped_ = step.is_stopped();
        by.meet();
    }

    // A layer; of the last one its keys and values alone.
    void compute(const Step& step, std::size_t index, Team::Member& by) {
        each_panel(step.num_tokens, [&](Range tokens) { stages_.project(step, index, tokens, w_.shared, by, by); });
        stages_.report(step, index, by);
        if (index == step.last_layer()) return;
        stages_.mix(step, index, by);
        by.meet();
        finish(w_.layers[index], w_.residual(0), w_.attended_rows(step), w_.own_rows(index), by);
    }

    // From attention to a layer's end.
    void finish(const Layer& layer, float* x, const Rows& attended, const OwnRows& inputs, Team::Member& by) {
        each_panel(attended.count, [&](Range tokens) {
            const Rows own = attended.from(tokens.first, tokens.last - tokens.first);
            const Rows part = stages_.values_of(layer, own, w_.shared, by);
            float* y = x + tokens.first * w_.strides.hidden;
            if (layer.experts == nullptr) {
                return w_.residual_math.finish(layer, y, part, inputs.from(tokens.first), w_.own(by).panel, w_.shared, by);
            }
            w_.residual_math.add_mixed(y, part, layer.attention, layer.mixed_norm, w_.shared, by);
            by.meet();
        });
        if (layer.experts == nullptr) return;
        stages_.add_sparse(layer, x, attended, by);
    }

    static constexpr std::size_t kLayersToStop = 4;  // to look once in so many: two more meetings each time

    Workspace& w_;
    Stages& stages_;
    Threads& threads_;
    bool is_stopped_ = false;
};
