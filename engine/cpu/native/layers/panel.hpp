// What is done to each token by itself: norms, products with weights, activation. Rows of tokens come in panels of at
// most kPanelRows, whose intermediate results stay near the core.
#pragma once

#include <vector>

#include "products/linear.hpp"
#include "layers/model.hpp"
#include "machine/vectors.hpp"

// How rows of each kind stand in memory: padded, so that whole vectors and tiles may be read and written.
struct Strides {
    explicit Strides(const Model& m)
        : hidden(padded(m.hidden_size, kTileColumns)), normed(of_inputs(m.hidden_size)), attended(of_inputs(mixed_size(m))),
          activated(of_inputs(std::max<long>(m.intermediate_size, m.input_size()))),
          qkv(padded(m.qkv_size(), kTileColumns)), gate_up(padded(std::max<long>(2 * m.intermediate_size, m.input_size()), kTileColumns)),
          narrowed(kMaxAdapterParts * m.adapter_rank), q_normed(m.latents() ? of_inputs(m.latents()->q_rank) : 0),
          asked(m.latents() ? of_inputs(m.heads[0].num_qo * m.latents()->asked_dim()) : 0),
          answered(m.latents() ? of_inputs(m.heads[0].num_qo * m.latents()->value_dim) : 0),
          projected(m.state() ? m.state()->projected_size() : 0), read_at(m.read_at()),
          thin(m.thin_size() ? of_inputs(m.thin_size()) : 0), thin_sums(padded(m.thin_size(), kTileColumns)),
          inputs(padded(m.num_layers * m.input_size(), kTileColumns)) {}
    const long hidden, normed, attended, activated, qkv, gate_up, narrowed;
    const long q_normed, asked, answered;  // of latents alone
    const long projected, read_at;         // of layers with states alone
    const long thin, thin_sums;            // of thinner rows that experts see alone, and of what they yield of these
    const long inputs;                     // of all layers, of their own

private:
    // What the widest mixer yields of a token.
    static long mixed_size(const Model& m) {
        return m.state() == nullptr ? m.qo_size() : std::max<long>(m.qo_size(), m.read_at() + m.state()->num_values);
    }

    // Whole lines, and an odd number of them: rows that lie an even number apart share few places of the near cache.
    static long of_inputs(long size) { return (padded(size, kTileInputs) / kTileInputs | 1) * kTileInputs; }
};

// Memory between the residual stream and itself. Padding stays zero.
struct Panel {
    explicit Panel(const Strides& s)
        : normed(kPanelRows * s.normed), activated(kPanelRows * s.activated), qkv(kPanelRows * s.qkv),
          gate_up(kPanelRows * s.gate_up), added(kPanelRows * s.hidden), narrowed(kPanelRows * s.narrowed),
          q_normed(kPanelRows * s.q_normed), asked(kPanelRows * s.asked), answered(kPanelRows * s.answered), inputs(kPanelRows * s.inputs) {}
    Lines<Element> normed, activated, narrowed;
    Lines<float> qkv, gate_up, added;
    Lines<Element> q_normed, asked, answered;
    Lines<float> inputs;
};

// A layer's own inputs of some tokens, `stride` from one to the next.
struct OwnRows {
    const Element* values;
    long stride;

    OwnRows from(long row) const { return {values + row * stride, stride}; }
};

class PanelMath {
public:
    // `is_exact`: a row's results are the same whatever others there are.
    PanelMath(const Model& model, const Strides& strides, bool is_exact) : m_(model), s_(strides), may_widen_(!is_exact) {}

    // From attention to a layer's end: x += o(attended), x += mlp(norm(x)), what is added normed where a layer has norms
    // for it; the second before the first where the layer says so; and then what it makes of `inputs`. `by`: who does it (team.hpp), one thread or several, each
    // with an `own` panel for what all of them compute, and one in `common`; all meet after each product.
    template <class By>
    void finish(const Layer& layer, float* x, const Rows& attended, const OwnRows& inputs, Panel& own, Panel& common,
                By& by) const {
        if (layer.is_fed_first) add_fed(layer, x, attended, own, common, by);
        add_mixed(x, attended, layer.attention, layer.mixed_norm, common, by);
        by.meet();
        if (!layer.is_fed_first && !layer.is_mixer_alone()) add_fed(layer, x, attended, own, common, by);
        if (layer.own_input.gate.weight.columns > 0) add_own(layer.own_input, x, attended, inputs, own, common, by);
        if (layer.factor == 1.0) return;
        const Range rows = by.part(attended.count);
        for (long row = rows.first; row < rows.last; row++) scale_row(x + row * s_.hidden, layer.factor);
        by.meet();
    }

    // What a layer's MLP makes of some rows to the panel of what is added, when all have met, as they have.
    template <class By>
    void set_fed(const Layer& layer, const float* x, const Rows& mixed, Panel& own, Panel& common, By& by) const {
        const Linear& down = layer.mlp.down;
        const Rows normed = normalize(x, mixed.count, layer.mlp_norm, own, mixed.slots);
        const Rows activated = feed_forward(layer.mlp, normed, common, by);
        set(common.added.data(), s_.hidden, activated, down, by);
        adapt(common.added.data(), s_.hidden, activated, down, common, by);
        by.meet();
    }

    // `fed` = what an MLP yields of one token and what the experts beside it do, both normed
    void add_beside(const Layer& layer, float* fed, const float* of_experts) const {
        const auto factor_of = [this](const float* y) { return inverse_rms(y, m_.hidden_size, float(m_.norm_eps)); };
        const Vector by = repeat(factor_of(fed)), by_other = repeat(factor_of(of_experts)), offset = repeat(float(m_.norm_offset));
        for (long i = 0; i < m_.hidden_size; i += 16) {
            const Lanes mask = lanes(m_.hidden_size - i);
            const Vector other = load(of_experts + i, mask) * by_other * (load(layer.experts_behind + i, mask) + offset);
            store(fed + i, fma(load(fed + i, mask) * by, load(layer.mlp_behind + i, mask) + offset, other), mask);
        }
    }

    // x *= factor of one token
    void scale_row(float* x, double factor) const {
        for (long i = 0; i < s_.hidden; i += 16) store(x + i, load(x + i) * repeat(float(factor)));
    }

    // Each layer's own input of tokens with these ids, whose residual stream is `x`, to `inputs`, a row behind the other; whole
    // when all have met.
    template <class By>
    void make_inputs(const std::int32_t* ids, const float* x, long rows, const std::int32_t* slots, Element* inputs, Panel& own,
                     Panel& common, By& by) const {
        const LayerInputs& w = *m_.inputs;
        const Rows embedded = normalize(x, rows, nullptr, own, slots);
        float* const made = common.inputs.data();
        set(made, s_.inputs, embedded, w.made, by);
        adapt(made, s_.inputs, embedded, w.made, common, by);
        by.meet();
        const Range mine = by.part(rows);
        const long all = m_.num_layers * w.size;
        for (long row = mine.first; row < mine.last; row++) {
            for (long at = 0; at < all; at += w.size) {
                make_input(made + row * s_.inputs + at, w.table + ids[row] * all + at, inputs + row * all + at);
            }
        }
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
        add_adapted(x, mixed, o, factor, common, by);
        if (beside == nullptr) return;
        by.meet();  // who is done takes others' columns: what they add to these comes first; and so with narrowed rows
        const Rows read{mixed.values + s_.read_at, mixed.stride, mixed.count, mixed.slots, mixed.may_widen};
        add_adapted(x, read, beside->out, factor * float(beside->out_factor), common, by);
    }

    // All of the feed-forward but the last product, whose inputs are returned.
    template <class By>
    Rows feed_forward(const Mlp& mlp, const Rows& normed, Panel& common, By& by) const {
        const Linear& gate_up = mlp.gate_up;
        const long inner = inner_of(mlp);
        const bool is_adapted = gate_up.adapters != nullptr && normed.slots != nullptr;
        if (!is_adapted && inner % kTileColumns == 0) {  // products of gate and up meet, and are never written
            with_activation([&](auto act) {
                if (m_.is_gated) set_gated(common.activated.data(), normed, gate_up, by, act);
                else set_activated(common.activated.data(), normed, gate_up, by, act);
            });
        } else {
            set(common.gate_up.data(), s_.gate_up, normed, gate_up, by);
            adapt(common.gate_up.data(), s_.gate_up, normed, gate_up, common, by);
            by.meet();
            const Range vectors = by.part(padded(inner, kTileInputs) / 16);
            activate(common.gate_up.data(), common.activated.data(), inner, normed.count, vectors);
        }
        by.meet();
        return {common.activated.data(), s_.activated, normed.count, normed.slots, normed.may_widen};
    }

    // x += (inputs W^T + bias) * factor, what adapters add too; whole when all have met
    template <class By>
    void add_adapted(float* x, const Rows& inputs, const Linear& w, float factor, Panel& common, By& by) const {
        add(x, inputs, w, by, factor);
        adapt(x, s_.hidden, inputs, w, common, by, factor);
    }

    // x += normed(inputs W^T + bias) * factor; whole when all have met
    template <class By>
    void add_normed(float* x, const Rows& inputs, const Linear& w, const Element* norm, float factor, Panel& common,
                    By& by) const {
        float* added = common.added.data();
        set(added, s_.hidden, inputs, w, by);
        adapt(added, s_.hidden, inputs, w, common, by);
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

    // y += `factor` times what the rows' adapters make of x, behind the linear's products; y is whole when all have met.
    template <class By>
    static void adapt(float* y, long stride, const Rows& x, const Linear& w, Panel& common, By& by, float factor = 1.0f) {
        if (w.adapters == nullptr || x.slots == nullptr) return;
        narrow_rows(x, *w.adapters, common.narrowed.data(), by);
        by.meet();
        add_widened(y, stride, x, *w.adapters, common.narrowed.data(), factor, by);
    }

    Rows normalize(const float* hidden, long rows, const Element* weight, Panel& panel,
                   const std::int32_t* slots = nullptr) const {
        return normalize(hidden, rows, weight, panel.normed.data(), slots);
    }

    Rows normalize(const float* hidden, long rows, const Element* weight, Element* normed,
                   const std::int32_t* slots = nullptr) const {
        for (long row = 0; row < rows; row++) {
            const float* x = hidden + row * s_.hidden;
            if (weight == nullptr) {  // as it is
                for (long i = 0; i < m_.hidden_size; i += 16) {
                    const Lanes mask = lanes(m_.hidden_size - i);
                    store(normed + row * s_.normed + i, load(x + i, mask), mask);
                }
                continue;
            }
            const float mean = m_.takes_mean_off ? mean_of(x, m_.hidden_size) : 0.0f;
            const float squares = sum_of_squares(x, m_.hidden_size, mean);
            const Vector factor = repeat(inverse_rms(squares, m_.hidden_size, float(m_.norm_eps))), off = repeat(mean);
            const Vector offset = repeat(float(m_.norm_offset));
            for (long i = 0; i < m_.hidden_size; i += 16) {
                const Lanes mask = lanes(m_.hidden_size - i);
                const Vector value = (load(x + i, mask) - off) * factor;
                store(normed + row * s_.normed + i, value * (load(weight + i, mask) + offset), mask);
            }
        }
        return {normed, s_.normed, rows, slots, may_widen_};
    }

    // y = x W^T + bias, what `by` takes of it
    template <class By>
    static void set(float* y, long stride, const Rows& x, const Linear& w, By& by) {
        if (w.bias == nullptr && w.weight.integers == nullptr) return put_products(x, w.weight, by, y, stride);
        multiply(x, w.weight, by, [&](long row, long column, const float* sums) {
            for (int i = 0; i < kTileColumns; i += 16) {
                store(y + row * stride + column + i, with_bias(sums + i, w.bias, column + i, w.weight.columns));
            }
        });
    }

    // y += (x W^T + bias) * factor, what `by` takes of it; y is the residual stream, or as wide
    template <class By>
    void add(float* y, const Rows& x, const Linear& w, By& by, float factor) const {
        multiply(x, w.weight, by, [&](long row, long column, const float* sums) {
            for (int i = 0; i < kTileColumns; i += 16) {
                float* target = y + row * s_.hidden + column + i;
                const Vector sum = with_bias(sums + i, w.bias, column + i, w.weight.columns);
                store(target, load(target) + sum * repeat(factor));
            }
        });
    }

    // act(x W^T + bias), what `by` takes of it; columns are whole tiles
    template <class By, class Function>
    void set_activated(Element* activated, const Rows& x, const Linear& w, By& by, Function act) const {
        multiply(x, w.weight, by, [&](long row, long column, const float* sums) {
            for (int i = 0; i < kTileColumns; i += 16) {
                store(activated + row * s_.activated + column + i,
                      act(with_bias(sums + i, w.bias, column + i, w.weight.columns)));
            }
        });
    }

    // act(gate) * up of x W^T + bias, what `by` takes of it; a half of the columns is whole tiles
    template <class By, class Function>
    void set_gated(Element* activated, const Rows& x, const Linear& w, By& by, Function act) const {
        const long columns = w.weight.columns, inner = columns / 2;
        multiply_halves(x, w.weight, by, [&](long row, long column, const float* gate, const float* up) {
            for (int i = 0; i < kTileColumns; i += 16) {
                const Vector gated = with_bias(gate + i, w.bias, column + i, columns);
                store(activated + row * s_.activated + column + i,
                      act(gated) * with_bias(up + i, w.bias, inner + column + i, columns));
            }
        });
    }

    // act(gate) * up, or act(up), `size` of them, with zeros to whole tiles: these vectors of each row
    void activate(const float* gate_up, Element* activated, long size, long rows, Range vectors) const {
        with_activation([&](auto act) {
            if (m_.is_gated) {
                activate(gate_up, activated, size, rows, vectors, [=](Vector gate, Vector up) { return act(gate) * up; });
                return;
            }
            for (long row = 0; row < rows; row++) {
                for (long i = vectors.first * 16; i < vectors.last * 16; i += 16) {
                    store(activated + row * s_.activated + i, act(load(gate_up + row * s_.gate_up + i, lanes(size - i))));
                }
            }
        });
    }

    // The same of experts, which may have an activation of their own.
    void activate(const Experts& e, const float* gate_up, Element* activated, long size, long rows, Range vectors) const {
        if (e.limit == 0.0) return activate(gate_up, activated, size, rows, vectors);
        const float alpha = float(e.alpha), limit = float(e.limit);
        activate(gate_up, activated, size, rows, vectors,
                 [=](Vector gate, Vector up) { return clamped_silu(gate, up, alpha, limit); });
    }

    template <class Function>
    void activate(const float* gate_up, Element* activated, long size, long rows, Range vectors, Function act) const {
        for (long row = 0; row < rows; row++) {
            const float *gate = gate_up + row * s_.gate_up, *up = gate + size;
            for (long i = vectors.first * 16; i < vectors.last * 16; i += 16) {
                const Lanes mask = lanes(size - i);
                store(activated + row * s_.activated + i, act(load(gate + i, mask), load(up + i, mask)));
            }
        }
    }

    // A rank's inner columns.
    long inner_of(const Mlp& mlp) const { return mlp.gate_up.weight.columns / (m_.is_gated ? 2 : 1); }

private:
    // x += mlp(norm(x)) of the rows beside `mixed`, whole; all have met.
    template <class By>
    void add_fed(const Layer& layer, float* x, const Rows& mixed, Panel& own, Panel& common, By& by) const {
        const Rows normed = normalize(x, mixed.count, layer.mlp_norm, own, mixed.slots);
        const Rows activated = feed_forward(layer.mlp, normed, common, by);
        if (layer.output_norm != nullptr) add_normed(x, activated, layer.mlp.down, layer.output_norm, fed_factor(), common, by);
        else add_adapted(x, activated, layer.mlp.down, fed_factor(), common, by);
        by.meet();
    }

    // One layer's of one token, of what the product has made of its embedding and of what was looked up.
    void make_input(float* made, const Element* looked_up, Element* input) const {
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
        const long count = mixed.count, size = m_.inputs->size;
        const Rows rows = normalize(x, count, nullptr, own, mixed.slots);
        float* const gates = common.gate_up.data();
        set(gates, s_.gate_up, rows, w.gate, by);
        adapt(gates, s_.gate_up, rows, w.gate, common, by);
        by.meet();
        const Range vectors = by.part(size / 16);
        with_activation([&](auto act) {
            for (long row = 0; row < count; row++) {
                for (long i = vectors.first * 16; i < vectors.last * 16; i += 16) {
                    store(common.activated.data() + row * s_.activated + i,
                          act(load(gates + row * s_.gate_up + i)) * load(inputs.from(row).values + i));
                }
            }
        });
        by.meet();
        const Rows gated{common.activated.data(), s_.activated, count, mixed.slots, may_widen_};
        add_normed(x, gated, w.projection, w.norm, 1.0f, common, by);
        by.meet();
    }

    // Calls job(act) with the model's activation.
    template <class Job>
    void with_activation(Job job) const {
        const Vector by = repeat(float(m_.gate_factor));
        if (m_.activation == kGeluTanh) job([=](Vector x) { return gelu_tanh(x * by); });
        else if (m_.activation == kSquaredRelu) job([=](Vector x) { return squared_relu(x * by); });
        else job([=](Vector x) { return silu(x * by); });
    }

    const Model m_;
    const Strides s_;
    const bool may_widen_;
};
