// What a layer does with latents around attention (engine/nn/latent.py), in rows of a panel.
//
//     inputs    hidden state -> latent, its part that is turned, and what queries are made of, where that is little
//     queries   -> of each head what asks latents, nope_dim numbers, and what is turned
//     ask       W_K of each head: nope_dim numbers -> kv_rank, which are multiplied by latents
//     answer    W_V of each head: its weighted sum of latents -> value_dim
//
// W_K and W_V of all heads are one row of tiles each, so that threads share them out like a linear's: a head's tiles are
// multiplied by its own inputs.
#pragma once

#include "products/linear.hpp"
#include "layers/model.hpp"
#include "layers/panel.hpp"
#include "machine/vectors.hpp"

// The tiles that `by` takes of heads that have so many each; a head's inputs stand `step` behind those of the one before.
// Calls finish(row, head, column, sums) with each row's 16 sums from the head's `column` on.
template <class By, class Finish>
void multiply_heads(const Rows& x, long step, const Tiles& w, long tiles_of_head, By& by, Finish finish) {
    by.take(w.count(), ElementProducts(x, w).units(), [&](long index, long unit) {
        const long head = index / tiles_of_head;
        const Rows own{x.values + head * step, x.stride, x.count};
        const ElementProducts products(own, w);
        alignas(64) float sums[products.kRows * products.kColumns];
        products.set(index, unit, sums);
        each_sixteen(products, index % tiles_of_head, unit,
                     [&](long row, long column, long at) { finish(row, head, column, sums + at); });
    });
}

class LatentMath {
public:
    LatentMath(const Model& model, const Strides& strides, const PanelMath& math) : m_(model), s_(strides), math_(math) {}

    // The products that tokens are placed of, to `common.qkv`: inputs, and queries behind them. `own`: for what all of `by`
    // compute.
    template <class By>
    void project(const Latents& w, const Rows& normed, Panel& own, Panel& common, By& by) const {
        float *const inputs = common.qkv.data(), *const queries = inputs + w.queries_at();
        math_.set(inputs, s_.qkv, normed, w.inputs, by);
        math_.adapt(inputs, s_.qkv, normed, w.inputs, common, by);
        if (w.q_norm != nullptr || normed.slots != nullptr) by.meet();  // narrowed rows of the one are read before the other's
        const Rows asking = w.q_norm == nullptr ? normed : norm_asking(w, normed, inputs, own.q_normed.data());
        math_.set(queries, s_.qkv, asking, w.queries, by);
        math_.adapt(queries, s_.qkv, asking, w.queries, common, by);
    }

    // What `common.asked` has of each head to what is multiplied by latents, in the rows of `queries`.
    template <class By>
    void ask(const Latents& w, long rows, Panel& common, Element* queries, By& by) const {
        const Vector factor = repeat(float(m_.heads[0].query_factor));
        const auto finish = [&](long row, long head, long column, const float* sums) {
            if (column >= w.kv_rank) return;
            store(queries + row * s_.attended + head * m_.heads[0].dim + column, load(sums) * factor);
        };
        multiply_heads({common.asked.data(), s_.asked, rows}, w.asked_dim(), w.to_keys, tiles_of_head(w.to_keys), by, finish);
    }

    // Sums of latents to the heads' values, when all have met.
    template <class By>
    Rows answer(const Latents& w, const Rows& attended, Panel& common, By& by) const {
        const auto finish = [&](long row, long head, long column, const float* sums) {
            if (column >= w.value_dim) return;
            store(common.answered.data() + row * s_.answered + head * w.value_dim + column, load(sums));
        };
        multiply_heads(attended, m_.heads[0].dim, w.to_values, tiles_of_head(w.to_values), by, finish);
        by.meet();
        return {common.answered.data(), s_.answered, attended.count, attended.slots, attended.may_widen};
    }

private:
    long tiles_of_head(const Tiles& w) const { return w.count() / m_.heads[0].num_qo; }

    // Of rows' products the part that queries are made of, normed.
    Rows norm_asking(const Latents& w, const Rows& rows, const float* products, Element* target) const {
        for (long row = 0; row < rows.count; row++) {
            const float* const x = products + row * s_.qkv + m_.heads[0].dim;
            const Vector factor = repeat(inverse_rms(x, w.q_rank, float(w.norm_eps)));
            for (long i = 0; i < w.q_rank; i += 16) {
                const Lanes mask = lanes(w.q_rank - i);
                store(target + row * s_.q_normed + i, load(x + i, mask) * factor * load(w.q_norm + i, mask), mask);
            }
        }
        return {target, s_.q_normed, rows.count, rows.slots, rows.may_widen};
    }

    const Model& m_;
    const Strides& s_;
    const PanelMath& math_;
};
