// A step of few tokens: the time goes into reading weights, so threads share out the weights' columns and meet after each
// product.
#pragma once

#include "stages.hpp"
#include "threads.hpp"
#include "workspace.hpp"

constexpr long kFewRows = kPanelRows;  // up to here threads share out columns

class FewTokens {
public:
    FewTokens(Workspace& workspace, Stages& stages, Threads& threads) : w_(workspace), stages_(stages), threads_(threads) {}

    void forward(const Step& step) {
        threads_.run([&](Team::Member& by) {
            stages_.begin(step, by);
            by.meet();
            for (std::size_t index = 0; index < w_.layers.size(); index++) {
                project(step, index, by);
                if (index + 1 == w_.layers.size()) break;
                stages_.attend(step.pieces, index, by);
                by.meet();
                finish(w_.layers[index], w_.residual(0), w_.attended_rows(step), by);
            }
            finish_last(step, by);
        });
    }

    // The last layer from attention on, for the wanted tokens alone, which are few. Within a job, by all threads.
    void finish_last(const Step& step, Team::Member& by) {
        if (step.num_wanted == 0) return;
        stages_.gather_last(step, by);
        by.meet();
        finish(w_.layers.back(), step.hidden, w_.last_attended_rows(step), by);
    }

private:
    // To K and V of all tokens in the pages.
    void project(const Step& step, std::size_t index, Team::Member& by) {
        const Layer& layer = w_.layers[index];
        const Linear& qkv = layer.attention.qkv;
        const long stride = w_.strides.qkv;
        float* projected = w_.shared.qkv.data();
        const Rows normed =
            w_.math.normalize(w_.residual(0), step.num_tokens, layer.input_norm, w_.own(by).panel, step.slots_from(0));
        w_.math.set(projected, stride, normed, qkv, by);
        w_.math.adapt(projected, stride, normed, qkv, w_.shared, by);
        by.meet();
        const Range tokens = by.part(step.num_tokens);
        stages_.place(step, index, tokens, projected + tokens.first * stride, by);
        by.meet();
        stages_.report(step, index, by);
    }

    // From attention to a layer's end.
    void finish(const Layer& layer, float* x, const Rows& attended, Team::Member& by) {
        if (layer.experts == nullptr) return w_.math.finish(layer, x, attended, w_.own(by).panel, w_.shared, by);
        const Linear& o = layer.attention.o;
        w_.math.add(x, attended, o, by, 1.0f);
        w_.math.adapt(x, w_.strides.hidden, attended, o, w_.shared, by);
        by.meet();
        stages_.add_experts(layer, x, x, attended.count, by);
    }

    Workspace& w_;
    Stages& stages_;
    Threads& threads_;
};
