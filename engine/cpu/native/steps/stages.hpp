// The stages of a step that are the same whoever shares out what: tokens in, their heads to places, attention, experts,
// and what the wanted tokens go on with. Each is called by all threads of a team, for its part.
#pragma once

#include <algorithm>
#include <vector>

#include "steps/state_stages.hpp"
#include "layers/step.hpp"
#include "machine/team.hpp"
#include "machine/vectors.hpp"
#include "steps/workspace.hpp"

class Stages {
public:
    explicit Stages(Workspace& workspace) : states(workspace), w_(workspace) {}

    // By one thread, before the others begin.
    void reset(const Step& step) {
        states.reset();
        if (long(parts_done_.size()) < step.num_splits) parts_done_ = std::vector<Counter>(step.num_splits);
        for (Counter& done : parts_done_) done.reset();
    }

    // Tokens' embeddings and rotations.
    void begin(const Step& step, const Team::Member& by) {
        const Range tokens = by.part(step.num_tokens);
        for (long token = tokens.first; step.first_layer() == 0 && token < tokens.last; token++) {
            embed(step.input_ids[token], w_.residual(token));
        }
        for (HeadMath& heads : w_.heads) {
            each(step, tokens, [&](const Row& row, long token) { heads.prepare(token, row.start + token - row.token); });
        }
    }

    // Own inputs of layers, if they have some, of a panel, whose tokens have begun, when all have met. `common`: what `by`
    // share; `self`: who of the step's threads this is.
    template <class By>
    void make_inputs(const Step& step, Range tokens, Panel& common, By& by, const Team::Member& self) {
        const LayerInputs& w = *w_.model.inputs;
        make_inputs(step, tokens, common, by, self, [&](long row) {
            return w.table + step.input_ids[tokens.first + row] * w_.model.num_layers * w.size;
        });
    }
    // The same of what `looked_up` says that the table has of each.
    template <class By, class LookedUp>
    void make_inputs(const Step& step, Range tokens, Panel& common, By& by, const Team::Member& self, LookedUp looked_up) {
        w_.residual_math.make_inputs(looked_up, w_.residual(tokens.first), tokens.last - tokens.first,
                                     step.slots_from(tokens.first), w_.inputs_of(tokens.first), w_.own(self).panel, common, by);
        by.meet();
    }

    // To K and V of `tokens`, a panel, in the pages, when all have met. `common`: what `by` share; `self`: who of the step's
    // threads this is. `squares_of(rows)`: of each of the panel's rows, over the ranks, once all have been projected, or null.
    template <class By, class SquaresOf>
    void project(const Step& step, std::size_t index, Range tokens, Panel& common, By& by, const Team::Member& self,
                 SquaresOf squares_of) {
        const Layer& layer = w_.layers[index];
        const Linear& qkv = layer.attention.qkv;
        const long stride = w_.strides.qkv, count = tokens.last - tokens.first;
        float* const projected = common.qkv.data();
        const Rows normed = w_.math.normalize(w_.residual(tokens.first), count, layer.input_norm, w_.own(self).panel,
                                              step.slots_from(tokens.first));
        if (layer.attention.latents != nullptr) return place_latents(step, index, tokens, normed, common, by, self);
        if (const StateLayer* state = layer.attention.state) {
            states.project(*state, tokens, normed, common, by);
            by.meet();
            if (!layer.attention.attends()) return;
        }
        w_.math.set(projected, stride, normed, qkv, by);
        w_.math.adapt(projected, stride, normed, qkv, common, by);
        by.meet();
        const Squares* const squares = squares_of(count);
        const Range mine = by.part(count);
        place(step, index, {tokens.first + mine.first, tokens.first + mine.last}, projected + mine.first * stride, self,
              squares == nullptr ? nullptr : squares + mine.first);
        by.meet();
    }
    // The same where nobody asks for more than this rank's squares.
    template <class By>
    void project(const Step& step, std::size_t index, Range tokens, Panel& common, By& by, const Team::Member& self) {
        project(step, index, tokens, common, by, self, [](long) -> const Squares* { return nullptr; });
    }

    // What `o` multiplies of some rows' attention, when all have met.
    template <class By>
    Rows values_of(const Layer& layer, const Rows& attended, Panel& common, By& by) const {
        const Latents* latents = layer.attention.latents;
        return latents == nullptr ? attended : w_.latent_math.answer(*latents, attended, common, by);
    }

    // A layer's keys and values are in the pages; those with states alone count in no page of their own.
    void report(const Step& step, std::size_t index, const Team::Member& by) const {
        if (by.rank() != 0 || step.on_layer == nullptr || !w_.layers[index].attention.attends()) return;
        const auto first = w_.layers.begin();
        step.on_layer(int(std::count_if(first, first + long(index), [](const Layer& layer) {
            return layer.attention.attends();
        })));
    }

    // Tokens meet those before them. Queries are read where the result is then written.
    void mix(const Step& step, std::size_t index, Team::Member& by) {
        mix(step, step.pieces[w_.layers[index].kind()], index, by);
    }
    void mix(const Step& step, const std::vector<Piece>& pieces, std::size_t index, Team::Member& by) {
        const Layer& layer = w_.layers[index];
        if (layer.attention.state != nullptr) states.mix(step, index, by);
        if (!layer.attention.attends()) return;
        const Heads& kind = w_.heads_of(layer).heads();
        const Range mine = by.part(long(pieces.size()));
        by.take(long(pieces.size()), 1, [&](long i, long) {
            const Piece& piece = pieces[i];
            const bool has_next = i >= mine.first && i + 1 < mine.last;  // unless another thread is done and takes it
            const Piece* const next = has_next ? &pieces[i + 1] : nullptr;
            const long first = piece.row->token + piece.first, of_kv_head = kind.group() * kind.dim;
            Element* const heads = attended(first) + piece.kv_head * of_kv_head;
            if (!attend(piece, next, layer, heads, w_.own(by).heads_of(layer)) || !w_.model.has_gates) return;
            multiply(heads, gates(first) + piece.kv_head * of_kv_head, piece.tokens, piece.kv_heads * of_kv_head);
        });
    }

    // Whether there is anything to do in the step's last layer behind its products.
    bool has_last(const Step& step) const {
        return step.num_wanted > 0 || w_.layers[step.last_layer()].attention.state != nullptr;
    }

    // The step's last mixer, and what the wanted tokens go on with. A state is behind all tokens, whoever is wanted.
    void gather_last(const Step& step, Team::Member& by) {
        mix(step, step.last_pieces, step.last_layer(), by);
        by.meet();
        const long size = w_.strides.attended;
        const Range mine = by.part(step.num_wanted);
        for (long i = mine.first; i < mine.last; i++) {
            std::copy_n(w_.residual(step.wanted[i]), w_.strides.hidden, step.hidden + i * w_.strides.hidden);
            std::copy_n(attended(step.wanted[i]), size, w_.last_attended.data() + i * size);
            const OwnRows inputs = w_.own_rows(step.last_layer()).from(step.wanted[i]);
            std::copy_n(inputs.values, w_.model.input_size(), w_.last_own_inputs.data() + i * w_.model.input_size());
        }
    }

    // x += what a sparse layer's feed-forward makes of these rows, normed where the layer has norms for it, and then all of it
    // times the layer's factor; whole when all have met, as they have. `rows`: those that have been mixed.
    void add_sparse(const Layer& layer, float* x, const Rows& rows, Team::Member& by) {
        const long stride = w_.strides.hidden;
        const float factor = w_.residual_math.fed_factor();
        if (layer.output_norm == nullptr) {
            add_experts(layer, x, x, factor, rows.count, by, rows.slots);
            if (layer.factor == 1.0) return;
            w_.residual_math.scale(layer, x, by.part(rows.count));
            return by.meet();
        }
        add_experts(layer, x, w_.fed.data(), 1.0f, rows.count, by, rows.slots);
        for (long first = 0; first < rows.count; first += kPanelRows) {
            const Rows panel = rows.from(first, std::min(kPanelRows, rows.count - first));
            float* const y = x + first * stride;
            if (layer.has_mlp()) w_.residual_math.set_fed(layer, y, panel, w_.own(by).panel, w_.shared, by);
            const Range mine = by.part(panel.count);
            for (long row = mine.first; row < mine.last; row++) {
                float *const fed = w_.fed.data() + (first + row) * stride, *const own = w_.shared.added.data() + row * stride;
                if (layer.has_mlp()) w_.residual_math.add_beside(layer, own, fed);
                w_.residual_math.add_row(y + row * stride, layer.has_mlp() ? own : fed, layer.output_norm, factor);
                std::fill_n(fed, stride, 0.0f);
            }
            w_.residual_math.scale(layer, y, mine);
            by.meet();
        }
    }

    // y += `factor` times a sparse layer's experts of norm(x). Threads share out columns whatever the number of rows: each
    // expert has a few of them.
    // `adapters`: the slot of each row's; null: no row has one.
    void add_experts(const Layer& layer, const float* x, float* y, float factor, long rows, Team::Member& by,
                     const std::int32_t* adapters) {
        for (long first = 0; first < rows; first += w_.rows_of_experts) {
            const long count = std::min(w_.rows_of_experts, rows - first), at = first * w_.strides.hidden;
            ExpertScratch& own = w_.own(by).experts;
            const std::int32_t* of_rows = adapters == nullptr ? nullptr : adapters + first;
            w_.expert_math.add(*layer.experts, x + at, y + at, factor, count, w_.experts, own, w_.shared, by,
                               of_rows);
        }
    }

    StateStages states;  // of layers that keep one

private:
    // The products of `tokens` to their places: K and V to their slots, queries to where attention's result will be.
    // `squares`: of each token of them, over the ranks; null: nobody asks for more than this rank's.
    void place(const Step& step, std::size_t index, Range tokens, const float* qkv, const Team::Member& by,
               const Squares* squares) {
        const Layer& layer = w_.layers[index];
        HeadScratch& own = w_.own(by).heads_of(layer);
        each(step, tokens, [&](const Row& row, long token) {
            const long i = token - tokens.first;
            const Squares* all = squares == nullptr ? nullptr : squares + i;
            w_.heads_of(layer).place(layer, row, token, qkv + i * w_.strides.qkv, all, attended(token), gates(token), own);
        });
    }

    // Products and places of a panel with latents, to what attention takes, when all have met. `common`: what `by` share;
    // `self`: who of the step's threads this is.
    template <class By>
    void place_latents(const Step& step, std::size_t index, Range tokens, const Rows& normed, Panel& common, By& by,
                       const Team::Member& self) {
        const Layer& layer = w_.layers[index];
        const Latents& latents = *layer.attention.latents;
        ThreadSpace& own = w_.own(self);
        w_.latent_math.project(latents, normed, own.panel, common, by);
        by.meet();
        const Range mine = by.part(normed.count);
        each(step, {tokens.first + mine.first, tokens.first + mine.last}, [&](const Row& row, long token) {
            const long i = token - tokens.first;
            w_.heads_of(layer).place_latent(layer, row, token, common.qkv.data() + i * w_.strides.qkv, attended(token),
                                  common.asked.data() + i * w_.strides.asked, own.heads_of(layer));
        });
        by.meet();
        w_.latent_math.ask(latents, normed.count, common, attended(tokens.first), by);
        by.meet();
    }

    Element* attended(long token) { return w_.attended.data() + token * w_.strides.attended; }
    Element* gates(long token) { return w_.model.has_gates ? w_.gates.data() + token * w_.strides.attended : nullptr; }

    // False: other parts of the piece are still to come.
    bool attend(const Piece& piece, const Piece* next, const Layer& layer, Element* heads, HeadScratch& own) {
        const HeadMath& math = w_.heads_of(layer);
        if (piece.parts == 1) {
            math.attend(layer, piece, next, heads, w_.strides.attended, own);
            return true;
        }
        float* const memory = w_.parts.data() + piece.memory;
        math.attend_part(layer, piece, next, heads, memory, own);
        if (!parts_done_[piece.split].is_last(piece.parts)) return false;
        parts_done_[piece.split].reset();
        math.join(piece, memory, heads, own);
        return true;
    }

    // Numbers of some tokens times their gates.
    void multiply(Element* values, const Element* gates, long tokens, long count) const {
        for (long token = 0; token < tokens; token++, values += w_.strides.attended, gates += w_.strides.attended) {
            for (long i = 0; i < count; i += 16) store(values + i, load(values + i) * load(gates + i));
        }
    }

    // A rank has the rows of its part of the vocabulary, and zeros in place of the others.
    void embed(std::int32_t token, float* x) const {
        const Model& m = w_.model;
        std::fill_n(x, w_.strides.hidden, 0.0f);
        if (m.sum_over_ranks != nullptr) token -= m.first_token;
        if (m.sum_over_ranks != nullptr && (token < 0 || token >= m.num_tokens)) return;
        for (long i = 0; i < m.hidden_size; i += 16) {
            const Lanes mask = lanes(m.hidden_size - i);
            store(x + i, load(m.embedding + token * m.hidden_size + i, mask) * repeat(float(m.embedding_factor)), mask);
        }
    }

    // job(row, token) for each packed token of `tokens`.
    template <class Job>
    static void each(const Step& step, Range tokens, Job job) {
        for (const Row& row : step.rows) {
            const long last = std::min(tokens.last, row.token + row.length);
            for (long token = std::max(tokens.first, row.token); token < last; token++) job(row, token);
        }
    }

    Workspace& w_;
    std::vector<Counter> parts_done_;    // of each piece that is cut
};
