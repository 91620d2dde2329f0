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
          qkv(padded(m.qkv_size(), kTileColumns)),
          gate_up(padded(std::max<long>(2 * m.intermediate_size, m.input_size()), kTileColumns)),
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

// Memory between the residual stream and itself. Padding stays zero. A thread may have one and never use it, or little of it.
struct Panel {
    explicit Panel(const Strides& s)
        : normed(rows<Element>(s.normed)), activated(rows<Element>(s.activated)), narrowed(rows<Element>(s.narrowed)),
          qkv(rows<float>(s.qkv)), gate_up(rows<float>(s.gate_up)), added(rows<float>(s.hidden)),
          q_normed(rows<Element>(s.q_normed)), asked(rows<Element>(s.asked)), answered(rows<Element>(s.answered)),
          inputs(rows<float>(s.inputs)) {}
    Lines<Element> normed, activated, narrowed;
    Lines<float> qkv, gate_up, added;
    Lines<Element> q_normed, asked, answered;
    Lines<float> inputs;

private:
    template <class Value>
    static Lines<Value> rows(long size) { return untouched<Value>(kPanelRows * size); }
};

class PanelMath {
public:
    // `is_exact`: a row's results are the same whatever others there are.
    PanelMath(const Model& model, const Strides& strides, bool is_exact) : m_(model), s_(strides), may_widen_(!is_exact) {}

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
            store(y + row * stride + column, with_bias(sums, w.bias, column, w.weight.columns));
        });
    }

    // y += (x W^T + bias) * factor, what `by` takes of it; y is the residual stream, or as wide
    template <class By>
    void add(float* y, const Rows& x, const Linear& w, By& by, float factor) const {
        multiply(x, w.weight, by, [&](long row, long column, const float* sums) {
            float* const target = y + row * s_.hidden + column;
            store(target, load(target) + with_bias(sums, w.bias, column, w.weight.columns) * repeat(factor));
        });
    }

    // act(x W^T + bias), what `by` takes of it; columns are whole tiles
    template <class By, class Function>
    void set_activated(Element* activated, const Rows& x, const Linear& w, By& by, Function act) const {
        multiply(x, w.weight, by, [&](long row, long column, const float* sums) {
            store(activated + row * s_.activated + column, act(with_bias(sums, w.bias, column, w.weight.columns)));
        });
    }

    // act(gate) * up of x W^T + bias, what `by` takes of it; a half of the columns is whole tiles
    template <class By, class Function>
    void set_gated(Element* activated, const Rows& x, const Linear& w, By& by, Function act) const {
        const long columns = w.weight.columns, inner = columns / 2;
        multiply_halves(x, w.weight, by, [&](long row, long column, const float* gate, const float* up) {
            const Vector gated = act(with_bias(gate, w.bias, column, columns));
            store(activated + row * s_.activated + column, gated * with_bias(up, w.bias, inner + column, columns));
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

    // Calls job(act) with the model's activation.
    template <class Job>
    void with_activation(Job job) const {
        const Vector by = repeat(float(m_.gate_factor));
        if (m_.activation == kGeluTanh) job([=](Vector x) { return gelu_tanh(x * by); });
        else if (m_.activation == kSquaredRelu) job([=](Vector x) { return squared_relu(x * by); });
        else job([=](Vector x) { return silu_rough(x * by); });
    }

    // A rank's inner columns.
    long inner_of(const Mlp& mlp) const { return mlp.gate_up.weight.columns / (m_.is_gated ? 2 : 1); }

private:
    const Model m_;
    const Strides s_;
    const bool may_widen_;
};
