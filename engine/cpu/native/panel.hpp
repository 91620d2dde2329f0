// What is done to each token by itself: norms, products with weights, activation. Rows of tokens come in panels of at
// most kPanelRows, whose intermediate results stay near the core.
#pragma once

#include <vector>

#include "linear.hpp"
#include "model.hpp"
#include "vectors.hpp"

// How rows of each kind stand in memory: padded, so that whole vectors and tiles may be read and written.
struct Strides {
    explicit Strides(const Model& m)
        : hidden(padded(m.hidden_size, kTileColumns)), normed(padded(m.hidden_size, 32)),
          attended(padded(m.qo_size(), 32)), activated(padded(m.intermediate_size, 32)),
          qkv(padded(m.qkv_size(), kTileColumns)), gate_up(padded(2 * m.intermediate_size, kTileColumns)) {}
    const long hidden, normed, attended, activated, qkv, gate_up;
};

// Memory between the residual stream and itself. Padding stays zero.
struct Panel {
    explicit Panel(const Strides& s)
        : normed(kPanelRows * s.normed), activated(kPanelRows * s.activated), qkv(kPanelRows * s.qkv),
          gate_up(kPanelRows * s.gate_up) {}
    std::vector<bf16> normed, activated;
    std::vector<float> qkv, gate_up;
};

class PanelMath {
public:
    PanelMath(const Model& model, const Strides& strides) : m_(model), s_(strides) {}

    // From attention to a layer's end: x += o(attended), x += mlp(norm(x)). By one thread: `part` is all of what it is
    // asked about, `meet` does nothing. By several, each with an `own` panel for what all of them compute, and one in
    // `common`: `part(count)` is this one's of so many tiles or vectors, and all meet after each product.
    template <class Part, class Meet>
    void finish(const Layer& layer, float* x, const bf16* attended, long rows, Panel& own, Panel& common, Part part,
                Meet meet) const {
        const Linear& o = layer.attention.o;
        add(x, {attended, s_.attended, rows}, o, part(o.weight.count()));
        meet();
        feed_forward(layer.mlp, x, normalize(x, rows, layer.mlp_norm, own), common, part, meet);
    }

    template <class Part, class Meet>
    void feed_forward(const GatedMlp& mlp, float* x, const Rows& normed, Panel& common, Part part, Meet meet) const {
        set(common.gate_up.data(), s_.gate_up, normed, mlp.gate_up, part(mlp.gate_up.weight.count()));
        meet();
        activate(common, normed.count, part((m_.intermediate_size + 15) / 16));
        meet();
        add(x, {common.activated.data(), s_.activated, normed.count}, mlp.down, part(mlp.down.weight.count()));
        meet();
    }

    void finish(const Layer& layer, float* x, const bf16* attended, long rows, Panel& panel) const {
        finish(layer, x, attended, rows, panel, panel, [](long count) { return Range{0, count}; }, [] {});
    }

    Rows normalize(const float* hidden, long rows, const bf16* weight, Panel& panel) const {
        bf16* normed = panel.normed.data();
        for (long row = 0; row < rows; row++) {
            const float* x = hidden + row * s_.hidden;
            const Vector factor = repeat(inverse_rms(x, m_.hidden_size, float(m_.norm_eps)));
            for (long i = 0; i < m_.hidden_size; i += 16) {
                const Lanes mask = lanes(m_.hidden_size - i);
                store(normed + row * s_.normed + i, load(x + i, mask) * factor * load(weight + i, mask), mask);
            }
        }
        return {normed, s_.normed, rows};
    }

    // y = x W^T + bias, the columns of these tiles
    static void set(float* y, long stride, const Rows& x, const Linear& w, Range part) {
        multiply(x, w.weight, part, [&](long row, long column, const float* sums) {
            for (int i = 0; i < kTileColumns; i += 16) {
                store(y + row * stride + column + i, with_bias(sums + i, w.bias, column + i, w.weight.columns));
            }
        });
    }

    // y += x W^T + bias; y is the residual stream
    void add(float* y, const Rows& x, const Linear& w, Range part) const {
        multiply(x, w.weight, part, [&](long row, long column, const float* sums) {
            for (int i = 0; i < kTileColumns; i += 16) {
                float* target = y + row * s_.hidden + column + i;
                store(target, load(target) + with_bias(sums + i, w.bias, column + i, w.weight.columns));
            }
        });
    }

    // silu(gate) * up, these vectors of each row
    void activate(Panel& panel, long rows, Range vectors) const {
        const long size = m_.intermediate_size;
        for (long row = 0; row < rows; row++) {
            const float *gate = panel.gate_up.data() + row * s_.gate_up, *up = gate + size;
            for (long i = vectors.first * 16; i < std::min(size, vectors.last * 16); i += 16) {
                const Lanes mask = lanes(size - i);
                store(panel.activated.data() + row * s_.activated + i, silu(load(gate + i, mask)) * load(up + i, mask), mask);
            }
        }
    }

private:
    const Model m_;
    const Strides s_;
};
