// What steps are computed with and in: the model, its mathematics, the tokens' rows, which threads share, and what each
// thread has for itself. Memory grows with the largest step and is kept for the next.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "layers/convolution.hpp"
#include "layers/delta_net.hpp"
#include "layers/experts.hpp"
#include "layers/heads.hpp"
#include "layers/latents.hpp"
#include "layers/mamba.hpp"
#include "layers/model.hpp"
#include "layers/panel.hpp"
#include "layers/step.hpp"
#include "machine/team.hpp"

// One thread's own.
struct ThreadSpace {
    ThreadSpace(const Strides& strides, int group, const Model& m, bool is_exact)
        : panel(strides), heads(m, group, is_exact), delta_net(m), mamba(m) {}
    Panel panel;
    HeadScratch heads;
    ConvolutionScratch convolution;
    DeltaScratch delta_net;
    MambaScratch mamba;
    ExpertScratch experts;
};

struct Workspace {
    Workspace(const Model& m, bool is_exact, int max_threads)
        : model(m), layers(m.layers, m.layers + m.num_layers), is_exact(is_exact), heads(m, is_exact) {
        for (int rank = 0; rank < max_threads; rank++) {
            threads.push_back(std::make_unique<ThreadSpace>(strides, heads.group(), model, is_exact));
        }
    }
    Workspace(const Workspace&) = delete;

    // Room for a step.
    void reserve(const Step& step) {
        const auto grow = [](auto& memory, long size) {
            if (long(memory.size()) < size) memory.resize(size);
        };
        grow(residuals, step.num_tokens * strides.hidden);
        grow(attended, step.num_tokens * strides.attended);
        grow(last_attended, step.num_wanted * strides.attended);
        grow(parts, step.split_memory);
        grow(projected, step.num_tokens * strides.projected);
        if (model.has_gates) grow(gates, step.num_tokens * strides.attended);
        heads.reserve(step.num_tokens);
        for (const Layer& layer : layers) {
            if (layer.experts == nullptr) continue;
            const long rows = std::min(rows_of_experts, std::max(step.num_tokens, step.num_wanted));
            const long narrowed = step.slots.empty() ? 0 : 2 * model.adapter_rank;  // of gate and up
            experts.reserve(rows, strides, layer.experts->num_chosen, narrowed);
        }
    }

    ThreadSpace& own(const Team::Member& by) { return *threads[by.rank()]; }

    float* residual(long token) { return residuals.data() + token * strides.hidden; }

    // What tokens' attention yielded, and that of the wanted ones in the last layer.
    Rows attended_rows(const Step& step) {
        return {attended.data(), strides.attended, step.num_tokens, step.slots_from(0), !is_exact};
    }
    Rows last_attended_rows(const Step& step) {
        return {last_attended.data(), strides.attended, step.num_wanted, step.last_slots_from(0), !is_exact};
    }

    const Model model;
    const std::vector<Layer> layers;
    const bool is_exact;
    const Strides strides{model};
    const PanelMath math{model, strides, is_exact};
    const ExpertMath expert_math{model, strides, math};
    const LatentMath latent_math{model, strides, math};
    const long rows_of_experts{expert_rows(model, strides)};  // that go through them at once
    HeadMath heads;
    Lines<float> residuals;
    Lines<Element> attended, last_attended;  // queries, then attention's result; padding stays zero
    Lines<float> parts;                  // of attention that is cut
    Lines<float> projected;  // a layer's products where it keeps a state, of all tokens
    Lines<Element> gates;    // of what heads attend to, in the places of queries
    Panel shared{strides};
    ExpertMemory experts;
    std::vector<std::unique_ptr<ThreadSpace>> threads;
};
