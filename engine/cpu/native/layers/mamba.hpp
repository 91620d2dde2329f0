// What a layer of Mamba's second kind does with a row's tokens once they are convolved (engine/nn/mamba.py), of one head, token
// by token. All of it is computed in float32.
//
//     step t     softplus of what is projected and a bias, within the model's limits: of each token and head
//     memory     S = exp(-A t) S + B (t x);  what is read is C S + D x, of the new S; then times silu of the gate
//     norm       of what the heads of a group have read: by whoever, once all have; or before the gates; or none
//
// A lone token changes a memory where it lies, in one pass. More of them take it in panels of columns, which stay next to the
// core. There a token's pass is as many operations as it would have in products of chunks, whose triangles are added to what
// they spare. A token's numbers depend on the tokens before it alone, to the bit, however they came.
#pragma once

#include <algorithm>

#include "layers/head_memory.hpp"
#include "layers/model.hpp"
#include "layers/states.hpp"
#include "layers/step.hpp"
#include "machine/vectors.hpp"

// Tokens' steps, in place of what they are made of, and behind all products what is left of each head's memory.
inline void take_steps(const Mamba& w, float* projected, long stride, long count) {
    const Vector least = repeat(float(w.least_step)), most = repeat(float(w.most_step));
    for (long token = 0; token < count; token++, projected += stride) {
        float *const steps = projected + w.steps_at(), *const kept = projected + w.rates_at();
        for (long head = 0; head < w.num_heads; head += 16) {
            const Lanes mask = lanes(w.num_heads - head);
            const Vector asked = softplus(load(steps + head, mask) + load(w.step_bias + head, mask));
            const Vector step = min(most, max(least, asked));  // NaN stays
            store(steps + head, step, mask);
            store(kept + head, exp2(step * load(w.forgetting + head, mask) * repeat(-kLog2E)), mask);
        }
    }
}

// What the heads of a group have read of a token, normed and then times gates, if it is so; else gates are in it. `squares`:
// of it and what other ranks' heads have read, which are normed with it; null: by itself.
inline void norm_group(const Mamba& w, const float* read, const float* gates, const float* norm, long size, Element* said,
                       const float* squares) {
    const float eps = float(w.norm_eps);
    const float by = squares == nullptr ? inverse_rms(read, size, eps) : inverse_rms(*squares, size * w.num_normed, eps);
    const Vector factor = repeat(by);
    for (long i = 0; i < size; i += 16) {
        const Vector normed = load(read + i) * factor * load(norm + i);
        store(said + i, w.is_normed_first ? normed * silu(load(gates + i)) : normed);
    }
}

// What heads have read of some tokens, where `MambaPass` left it, normed in groups -> what `o` or `out` multiplies.
// `squares`: of each token over the ranks, where their heads are normed together; else null.
inline void say(const Mamba& w, const float* projected, long stride, Element* said, long said_stride, Range tokens,
                const float* squares) {
    const long size = w.num_values / w.num_groups;
    for (long token = tokens.first; token < tokens.last; token++) {
        const float* const gates = projected + token * stride;
        const float* const read = gates + w.read_at();
        Element* const own = said + token * said_stride;
        if (w.norm == nullptr) {
            for (long i = 0; i < w.num_values; i += 16) store(own + i, load(read + i));
            continue;
        }
        for (long first = 0; first < w.num_values; first += size) {
            norm_group(w, read + first, gates + first, w.norm + first, size, own + first,
                       squares == nullptr ? nullptr : squares + token);
        }
    }
}

// One thread's own.
struct MambaScratch {
    explicit MambaScratch(const Model& m) {
        if (m.state() == nullptr || m.state()->kind != kMamba) return;
        const auto& w = static_cast<const Mamba&>(*m.state());
        memory.resize(HeadMemory{w.state_dim, w.head_dim}.size());
    }
    Lines<float> memory;
};

// All tokens of a row, of one head: what one thread does by itself.
class MambaPass {
public:
    // `projected`: of the row's first token, convolved and with steps, rows of this stride.
    MambaPass(const Model& m, const Mamba& w, const Row& row, long head, float* projected, long stride, MambaScratch& own)
        : m_(m), w_(w), row_(row), projected_(projected), stride_(stride), memory_(own.memory.data()),
          at_(w.memory_at() + head * w.state_dim * w.head_dim), gates_(head * w.head_dim), values_(w.num_values + gates_),
          writes_(2 * w.num_values + head / (w.num_heads / w.num_groups) * w.state_dim), reads_(writes_ + w.num_keys()),
          step_(w.steps_at() + head), kept_(w.rates_at() + head), skip_(w.kept[head]) {}

    void run() const {
        if (row_.length == 1 && row_.start > 0 && change_in_place()) return;
        if (row_.start == 0) std::fill_n(memory_, shape_.size(), 0.0f);
        else shape_.read(state_behind(m_, w_, row_, row_.start), at_, memory_);
        each_stretch(m_, row_, [&](long first, long last, bool is_left) {
            for (long panel = 0; panel < shape_.panels(); panel++) {
                float* const memory = memory_ + panel * shape_.panel_size();
                for (long token = first; token < last; token++) pass(token, panel, memory, memory, kPanelColumns);
            }
            if (is_left) shape_.write(state_behind(m_, w_, row_, row_.start + last), at_, memory_);
        });
    }

private:
    // A lone token's pass, from block to block. False: the memory stands in two pages, or in parts of panels.
    bool change_in_place() const {
        const long size = w_.state_dim * w_.head_dim;
        const float* const from = state_behind(m_, w_, row_, row_.start).whole(at_, size);
        float* const to = state_behind(m_, w_, row_, row_.start + 1).whole(at_, size);
        if (from == nullptr || to == nullptr || w_.head_dim % kPanelColumns != 0) return false;
        for (long panel = 0; panel < shape_.panels(); panel++) {
            pass(0, panel, from + panel * kPanelColumns, to + panel * kPanelColumns, w_.head_dim);
        }
        return true;
    }

    // What the row's `token`th token does with a panel of a memory, which it leaves in `to`: rows of this stride.
    void pass(long token, long panel, const float* from, float* to, long stride) const {
        float* const product = projected_ + token * stride_;
        const long column = panel * kPanelColumns, columns = shape_.columns_of(panel);
        const float *const written = product + writes_, *const asked = product + reads_;
        const Vector by = repeat(product[kept_]);
        const PanelRow value = PanelRow::of(product + values_ + column, columns);
        const PanelRow said = value.times(repeat(product[step_]));
        PanelRow read = PanelRow::zeros();
        for (long row = 0; row < w_.state_dim; row++, from += stride, to += stride) {
            read.add(change(from, to, by, said, written[row]), asked[row]);
        }
        read.add(value, skip_);
        if (w_.is_normed_first) return read.put(product + values_ + column, columns);
        const PanelRow gates = PanelRow::of(product + gates_ + column, columns);
        read.times(PanelRow{silu(gates.low), silu(gates.high)}).put(product + gates_ + column, columns);
    }

    const Model& m_;
    const Mamba& w_;
    const Row& row_;
    float* const projected_;
    const long stride_;
    float* const memory_;
    const long at_;                                              // in a state
    const long gates_, values_, writes_, reads_, step_, kept_;  // among a token's products
    const float skip_;
    const HeadMemory shape_{w_.state_dim, w_.head_dim};
};
