// What a layer adds to the residual stream: what its mixer yields, its feed-forward, what it makes of its own input of a token,
// each normed where the model has norms behind; and the factor of all of it. As engine/nn/decoder.py and residual.py have it.
#pragma once

#include <cmath>

#include "layers/model.hpp"
#include "layers/panel.hpp"
#include "machine/vectors.hpp"

// A layer's own inputs of some tokens, `stride` from one to the next.
struct OwnRows {
    const Element* values;
    long stride;

    OwnRows from(long row) const { return {values + row * stride, stride}; }
};

class ResidualMath {
public:
    ResidualMath(const Model& model, const Strides& strides, const PanelMath& math) : m_(model), s_(strides), math_(math) {}

    // From attention to a layer's end: x += o(attended), x += mlp(norm(x)), what is added normed where a layer has norms
    // for it; the second before the first where the layer says so; and then what it makes of `inputs`. `by`: who does it
    // (team.hpp), one thread or several, each with an `own` panel for what all of them compute, and one in `common`; all meet
    // after each product.
    template <class By>
    void finish(const Layer& layer, float* x, const Rows& attended, const OwnRows& inputs, Panel& own, Panel& common,
                By& by) const {
        if (layer.is_fed_first) add_fed(layer, x, attended, own, common, by);
        add_mixed(x, attended, layer.attention, layer.mixed_norm, common, by);
        by.meet();
        if (!layer.is_fed_first && !layer.is_mixer_alone()) add_fed(layer, x, attended, own, common, by);
        if (layer.own_input.gate.weight.columns > 0) add_own(layer.own_input, x, attended, inputs, own, common, by);
        if (layer.factor == 1.0) return;
        scale(layer, x, by.part(attended.count));
        by.meet();
    }

    // What a layer's MLP makes of some rows to the panel of what is added, when all have met, as they have.
    template <class By>
    void set_fed(const Layer& layer, const float* x, const Rows& mixed, Panel& own, Panel& common, By& by) const {
        const Linear& down = layer.mlp.down;
        const Rows normed = math_.normalize(x, mixed.count, layer.mlp_norm, own, mixed.slots);
        const Rows activated = math_.feed_forward(layer.mlp, normed, common, by);
        math_.set(common.added.data(), s_.hidden, activated, down, by);
        math_.adapt(common.added.data(), s_.hidden, activated, down, common, by);
        by.meet();
    }

    // `fed` = what an MLP yields of one token and what the experts beside it do, both normed
    void add_beside(const Layer& layer, float* fed, const float* of_experts) const {
        const auto factor_of = [this](const float* y) { return inverse_rms(y, m_.hidden_size, float(m_.norm_eps)); };
        const Vector by = repeat(factor_of(fed)), by_other = repeat(factor_of(of_experts));
        const Vector offset = repeat(float(m_.norm_offset));
        for (long i = 0; i < m_.hidden_size; i += 16) {
            const Lanes mask = lanes(m_.hidden_size - i);
            const Vector other = load(of_experts + i, mask) * by_other * (load(layer.experts_behind + i, mask) + offset);
            store(fed + i, fma(load(fed + i, mask) * by, load(layer.mlp_behind + i, mask) + offset, other), mask);
        }
    }

    // x *= the layer's factor, of these rows
    void scale(const Layer& layer, float* x, Range rows) const {
        if (layer.factor == 1.0) return;
        const Vector by = repeat(float(layer.factor));
        for (long i = rows.first * s_.hidden; i < rows.last * s_.hidden; i += 16) store(x + i, load(x + i) * by);
    }

    // Each layer's own input of tokens whose residual stream is `x`, to `inputs`, a row behind the other; whole when all have
    // met. `looked_up(row)`: what the table has of a token.
    template <class By, class LookedUp>
    void make_inputs(LookedUp looked_up, const float* x, long rows, const std::int32_t* slots, Element* inputs, Panel& own,
                     Panel& common, By& by) const {
        const LayerInputs& w = *m_.inputs;
        const Rows embedded = math_.normalize(x, rows, nullptr, own, slots);
        float* const made = common.inputs.data();
        math_.set(made, s_.inputs, embedded, w.made, by);
        math_.adapt(made, s_.inputs, embedded, w.made, common, by);
        by.meet();
        const Range mine = by.part(rows);
        const long all = m_.num_layers * w.size;
        for (long row = mine.first; row < mine.last; row++) {
            for (long at = 0; at < all; at += w.size) {
                make_input(made + row * s_.inputs + at, looked_up(row) + at, inputs + row * all + at);
            }
        }
    }

    // act(gate(x)) * inputs of the rows beside `mixed`, of this rank's numbers of an input; whole, as all have met.
    template <class By>
    Rows gated_inputs(const OwnInput& w, const float* x, const Rows& mixed, const OwnRows& inputs, Panel& own, Panel& common,
                      By& by) const {
        const long count = mixed.count, size = m_.inputs->num_own, first = m_.inputs->first;
        const Rows rows = math_.normalize(x, count, nullptr, own, mixed.slots);
        float* const gates = common.gate_up.data();
        math_.set(gates, s_.gate_up, rows, w.gate, by);
        math_.adapt(gates, s_.gate_up, rows, w.gate, common, by);
        by.meet();
        const Range vectors = by.part(size / 16);
        math_.with_activation([&](auto act) {
            for (long row = 0; row < count; row++) {
                for (long i = vectors.first * 16; i < vectors.last * 16; i += 16) {
                    store(common.activated.data() + row * s_.activated + i,
                          act(load(gates + row * s_.gate_up + i)) * load(inputs.from(row).values + first + i));
                }
            }
        });
        by.meet();
        return {common.activated.data(), s_.activated, count, mixed.slots, rows.may_widen};
    }

    float mixed_factor() const { return float(m_.mixed_factor); }
    float fed_factor() const { return float(m_.fed_factor); }

    // x += what a layer's mixer yields of some rows, normed if `norm` is not null, or what both do that are side by side; whole
    // when all have met.
    template <class By>
    void add_mixed(float* x, const Rows& mixed, const AttentionBlock& w, const Element* norm, Panel& common, By& by) const {
        if (norm != nullptr) return add_normed(x, mixed, w.o, norm, mixed_factor(), common, by);
        add_mixed(x, mixed, w.o, w.beside(), mixed_factor(), common, by);
    }

    // The same times `factor` in place of the model's, without norms. `beside`: null: nothing is.
    template <class By>
    void add_mixed(float* x, const Rows& mixed, const Linear& o, const StateLayer* beside, float factor, Panel& common,
                   By& by) const {
        math_.add_adapted(x, mixed, o, factor, common, by);
        if (beside == nullptr) return;
        by.meet();  // who is done takes others' columns: what they add to these comes first; and so with narrowed rows
        const Rows read{mixed.values + s_.read_at, mixed.stride, mixed.count, mixed.slots, mixed.may_widen};
        math_.add_adapted(x, read, beside->out, factor * float(beside->out_factor), common, by);
    }

    // x += normed(inputs W^T + bias) * factor; whole when all have met
    template <class By>
    void add_normed(float* x, const Rows& inputs, const Linear& w, const Element* norm, float factor, Panel& common,
                    By& by) const {
        float* added = common.added.data();
        math_.set(added, s_.hidden, inputs, w, by);
        math_.adapt(added, s_.hidden, inputs, w, common, by);
        by.meet();
        const Range rows = by.part(inputs.count);
        for (long row = rows.first; row < rows.last; row++) {
            add_row(x + row * s_.hidden, added + row * s_.hidden, norm, factor);
        }
    }

    // x += y * added of one token, normed if `norm` is not null
    void add_row(float* x, const float* y, const Element* norm, float added) const {
        const Vector by = repeat(added), offset = repeat(float(m_.norm_offset));
        const Vector factor = norm == nullptr ? by : repeat(inverse_rms(y, m_.hidden_size, float(m_.norm_eps)));
        for (long i = 0; i < m_.hidden_size; i += 16) {
            const Lanes mask = lanes(m_.hidden_size - i);
            Vector value = load(y + i, mask) * factor;
            if (norm != nullptr) value = value * (load(norm + i, mask) + offset) * by;
            store(x + i, load(x + i, mask) + value, mask);
        }
    }

private:
    // x += mlp(norm(x)) of the rows beside `mixed`, whole; all have met.
    template <class By>
    void add_fed(const Layer& layer, float* x, const Rows& mixed, Panel& own, Panel& common, By& by) const {
        const Rows normed = math_.normalize(x, mixed.count, layer.mlp_norm, own, mixed.slots);
        const Rows activated = math_.feed_forward(layer.mlp, normed, common, by);
        if (layer.output_norm != nullptr) add_normed(x, activated, layer.mlp.down, layer.output_norm, fed_factor(), common, by);
        else math_.add_adapted(x, activated, layer.mlp.down, fed_factor(), common, by);
        by.meet();
    }

    // One layer's of one token, of what the product has made of its embedding and of what was looked up.
    template <class Number>
    void make_input(float* made, const Number* looked_up, Element* input) const {
        const LayerInputs& w = *m_.inputs;
        for (long i = 0; i < w.size; i += 16) store(made + i, load(made + i) * repeat(float(w.made_factor)));
        const Vector factor = repeat(inverse_rms(made, w.size, float(m_.norm_eps))), offset = repeat(float(m_.norm_offset));
        const Vector by = repeat(float(w.table_factor)), half = repeat(float(M_SQRT1_2));
        for (long i = 0; i < w.size; i += 16) {
            const Vector normed = load(made + i) * factor * (load(w.norm + i) + offset);
            store(input + i, fma(load(looked_up + i), by, normed) * half);
        }
    }

    // x += normed(projection(act(gate(x)) * inputs)) of the rows beside `mixed`, whole; all have met.
    template <class By>
    void add_own(const OwnInput& w, float* x, const Rows& mixed, const OwnRows& inputs, Panel& own, Panel& common, By& by) const {
        add_normed(x, gated_inputs(w, x, mixed, inputs, own, common, by), w.projection, w.norm, 1.0f, common, by);
        by.meet();
    }

    const Model m_;
    const Strides& s_;
    const PanelMath& math_;
};
