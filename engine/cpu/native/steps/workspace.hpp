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
#include "layers/residual.hpp"
#include "layers/step.hpp"
#include "machine/team.hpp"

// One thread's own.
struct ThreadSpace {
    ThreadSpace(const Strides& strides, const Model& m, bool is_exact) : panel(strides), delta_net(m), mamba(m) {
        for (const Heads& own : m.heads) {
            heads.push_back(own.are_there() ? std::make_unique<HeadScratch>(m, own, is_exact) : nullptr);
        }
    }
    HeadScratch& heads_of(const Layer& layer) { return *heads[layer.kind()]; }
    Panel panel;
    std::vector<std::unique_ptr<HeadScratch>> heads;  // of each kind
    ConvolutionScratch convolution;
    DeltaScratch delta_net;
    MambaScratch mamba;
    ExpertScratch experts;
};

struct Workspace {
    Workspace(const Model& m, bool is_exact, int max_threads)
        : model(m), layers(m.layers, m.layers + m.num_layers), is_exact(is_exact) {
        for (int rank = 0; rank < max_threads; rank++) {
            threads.push_back(std::make_unique<ThreadSpace>(strides, model, is_exact));
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
        grow(own_inputs, step.num_tokens * model.num_layers * model.input_size());
        grow(last_own_inputs, step.num_wanted * model.input_size());
        if (model.has_gates) grow(gates, step.num_tokens * strides.attended);
        for (HeadMath& own : heads) own.reserve(step.num_tokens);
        for (const Layer& layer : layers) {
            if (layer.experts == nullptr) continue;
            if (layer.output_norm != nullptr) grow(fed, std::max(step.num_tokens, step.num_wanted) * strides.hidden);
            const long rows = std::min(rows_of_experts, std::max(step.num_tokens, step.num_wanted));
            const long narrowed = step.slots.empty() ? 0 : 2 * model.adapter_rank;  // of gate and up
            experts.reserve(rows, strides, layer.experts->num_chosen, narrowed);
        }
    }

    HeadMath& heads_of(const Layer& layer) { return heads[layer.kind()]; }

    ThreadSpace& own(const Team::Member& by) { return *threads[by.rank()]; }

    float* residual(long token) { return residuals.data() + token * strides.hidden; }

    // What tokens' attention yielded, and that of the wanted ones in the last layer.
    Rows attended_rows(const Step& step) {
        return {attended.data(), strides.attended, step.num_tokens, step.slots_from(0), !is_exact};
    }
    Rows last_attended_rows(const Step& step) {
        return {last_attended.data(), strides.attended, step.num_wanted, step.last_slots_from(0), !is_exact};
    }

    // A token's own input of each layer, one behind the other.
    Element* inputs_of(long token) { return own_inputs.data() + token * model.num_layers * model.input_size(); }

    // A layer's own inputs of all tokens, and the last one's of the wanted tokens.
    OwnRows own_rows(std::size_t index) const {
        return {own_inputs.data() + long(index) * model.input_size(), model.num_layers * model.input_size()};
    }
    OwnRows last_own_rows() const { return {last_own_inputs.data(), model.input_size()}; }

    // Make these tokens, in order, the only ones: their residual streams are `hidden`'s rows.
    void leave_only(const std::vector<std::int32_t>& tokens, const float* hidden) {
        std::copy_n(hidden, long(tokens.size()) * strides.hidden, residuals.data());
        const long size = model.num_layers * model.input_size();
        for (std::size_t i = 0; i < tokens.size(); i++) std::copy_n(inputs_of(tokens[i]), size, inputs_of(long(i)));
    }

    const Model model;
    const std::vector<Layer> layers;
    const bool is_exact;
    const Strides strides{model};
    const PanelMath math{model, strides, is_exact};
    const ResidualMath residual_math{model, strides, math};
    const ExpertMath expert_math{model, strides, math};
    const LatentMath latent_math{model, strides, math};
    const long rows_of_experts{expert_rows(model, strides)};  // that go through them at once
    HeadMath heads[2]{{model, model.heads[0], is_exact}, {model, model.heads[1], is_exact}};
    Lines<float> residuals;
    Lines<Element> attended, last_attended;  // queries, then attention's result; padding stays zero
    Lines<float> fed;    // what experts yield, where norms are behind them; zero between layers
    Lines<float> parts;                  // of attention that is cut
    Lines<float> projected;  // a layer's products where it keeps a state, of all tokens
    Lines<Element> own_inputs, last_own_inputs;  // of layers that have some
    Lines<Element> gates;    // of what heads attend to, in the places of queries
    Panel shared{strides};
    ExpertMemory experts;
    std::vector<std::unique_ptr<ThreadSpace>> threads;
};
