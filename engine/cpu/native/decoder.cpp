// A step of a Llama-family decoder, all layers in one call: any mix of sequences' next tokens and stretches of prompts.
//
// Weights are elements or whole numbers, pages elements (vectors.hpp), sums and the residual stream float32. Used by one
// thread at a time, with helpers of its own, as many as the machine has to spare (cores.hpp).
//
//   forward: embedding -> layers: norm -> qkv -> rotate, write K and V -> attend -> o -> norm -> gate, up -> act -> down
//            where a layer keeps latents, in place of qkv and before o: latents.hpp; where it keeps a state, in place of all
//            between norm and o, or beside all of it: state_stages.hpp
//   logits:  norm -> head
//   draw:    logits -> tokens; report: logits -> log-probabilities
//
// Each way to share this out among threads is a class: few_tokens.hpp, many_tokens.hpp, several_ranks.hpp. What they share
// stands in stages.hpp and workspace.hpp.

#include <algorithm>
#include <chrono>
#include <exception>
#include <new>

#include "machine/cores.hpp"
#include "steps/few_tokens.hpp"
#include "steps/many_tokens.hpp"
#include "layers/model.hpp"
#include "steps/several_ranks.hpp"
#include "steps/stages.hpp"
#include "layers/step.hpp"
#include "products/strips.hpp"
#include "sampling/draws.hpp"
#include "steps/threads.hpp"
#include "steps/wanted_tokens.hpp"
#include "steps/workspace.hpp"

namespace {

constexpr std::chrono::seconds kLargePagesWithin{3};
enum { kStopped, kWhole, kForeignState, kNoMemory };  // how a step ends; declared once more in engine/cpu/decoder.py

class Decoder {
public:
    Decoder(const Model& model, bool is_exact, int max_threads, const Cores& cores)
        : w_(model, is_exact, max_threads), threads_(max_threads, cores), samplers_(max_threads) {
        const auto deadline = std::chrono::steady_clock::now() + kLargePagesWithin;
        use_large_pages(model.head, deadline);
        if (model.inputs != nullptr) use_large_pages(model.inputs->made.weight, deadline);
        for (const Layer& layer : w_.layers) {
            for (const Linear& w : {layer.attention.qkv, layer.attention.o}) use_large_pages(w.weight, deadline);
            if (const Latents* w = layer.attention.latents) {
                for (const Tiles& tiles : {w->inputs.weight, w->queries.weight, w->to_keys, w->to_values}) {
                    use_large_pages(tiles, deadline);
                }
            }
            if (const StateLayer* w = layer.attention.state) {
                for (const Linear& linear : {w->rows, w->rates, w->out}) use_large_pages(linear.weight, deadline);
            }
            for (const Linear& w : {layer.own_input.gate, layer.own_input.projection}) use_large_pages(w.weight, deadline);
            if (const Experts* e = layer.experts) {
                for (const Linear& w : {e->before, e->behind}) use_large_pages(w.weight, deadline);
            }
            each_mlp(layer, [&](const Mlp& mlp) {
                for (const Linear& w : {mlp.gate_up, mlp.down}) use_large_pages(w.weight, deadline);
            });
        }
    }

    long block_size() const { return w_.model.block_size; }
    int num_threads() const { return threads_.size(); }

    // Whether the state before each row is that of the tokens before it, in all layers that keep one. Else `found` gets of how
    // many tokens rows' are, in one of these layers.
    bool has_states(const std::vector<Row>& rows, float* found) const {
        for (const Layer& layer : w_.layers) {
            const StateLayer* state = layer.attention.state;
            if (state == nullptr) continue;
            bool are_own = true;
            for (std::size_t i = 0; i < rows.size(); i++) {
                const long start = rows[i].start;
                found[i] = start == 0 ? 0.0f : state_behind(w_.model, *state, rows[i], start).num_tokens();
                are_own = are_own && found[i] == float(start);
            }
            if (!are_own) return false;
        }
        return true;
    }

    // False: it was stopped. With several ranks no step is, as all of them would have to know.
    bool forward(Step& step) {
        const long count = w_.model.num_layers, kept = w_.model.num_kept();
        if (kept == count || step.num_wanted == step.num_tokens) return run(step, {0, count});
        WantedTokens wanted(step, w_.strides.hidden);
        if (!run(wanted.before, {0, kept})) return false;
        if (step.num_wanted == 0) return true;
        w_.leave_only(wanted.tokens, wanted.hidden.data());
        return run(wanted.behind, {kept, count});
    }

    void logits(long rows, const float* hidden, float* logits) {
        const Tiles& head = w_.model.head;
        threads_.run([&](Team::Member& by) {
            for (long first = 0; first < rows; first += kPanelRows) {
                const Rows normed = w_.math.normalize(hidden + first * w_.strides.hidden, std::min(kPanelRows, rows - first),
                                                      w_.model.final_norm, w_.own(by).panel);
                multiply(normed, head, by, [&](long row, long column, const float* sums) {
                    store(logits + (first + row) * head.count() * kTileColumns + column, load(sums));
                });
            }
        });
        threads_.leave();
    }

    // job(sampler, row) for each row, of which one is too little to share out.
    template <class Job>
    void sample(long rows, Job job) {
        if (rows == 1) return job(samplers_[0], 0);
        threads_.run([&](Team::Member& by) { by.take(rows, 1, [&](long row, long) { job(samplers_[by.rank()], row); }); });
        threads_.leave();
    }

private:
    bool run(Step& step, Range layers) {
        step.layers = layers;
        plan_attention(step, w_.model, threads_.max_size(), w_.is_exact);
        w_.reserve(step);
        stages_.reset(step);
        bool is_whole = true;
        if (w_.model.sum_over_ranks != nullptr) {
            ranks_.forward(step);
        } else if (step.num_tokens <= ManyTokens::least(threads_.max_size())) {
            is_whole = few_.forward(step);
        } else {
            is_whole = many_.forward(step);
        }
        threads_.leave();
        return is_whole;
    }

    template <class Job>
    static void each_mlp(const Layer& layer, Job job) {
        if (layer.has_mlp()) job(layer.mlp);
        if (layer.experts == nullptr) return;
        for (long i = 0; i < layer.experts->count; i++) job(layer.experts->experts[i]);
        if (layer.experts->shared != nullptr) job(*layer.experts->shared);
    }

    Workspace w_;
    Threads threads_;
    std::vector<RowSampler> samplers_;  // of each rank
    Stages stages_{w_};
    FewTokens few_{w_, stages_, threads_};
    ManyTokens many_{w_, stages_, threads_, few_};
    SeveralRanks ranks_{w_, stages_, threads_};
};

}  // namespace

extern "C" {

// Whether this process may use the instruction set that this library is compiled for; asked before anything else.
bool kvferry_may_run() { return MatrixUnit::may_run(); }

// How many values a weight of this shape takes in tiles, and it packed into so many. `Tiles` point to `target`.
long kvferry_tiled_size(long columns, long inputs) { return tiled_size(columns, inputs); }

Tiles kvferry_pack(const Element* weight, long columns, long inputs, Element* target) {
    want_large_pages(target, tiled_size(columns, inputs) * sizeof(Element));
    return pack(weight, columns, inputs, target);
}

// The same of whole numbers, whose description `w` says all but where `target` is.
long kvferry_integers_size(const IntegerTiles* w) { return w->count() * w->tile_size(); }

void kvferry_pack_integers(const IntegerTiles* w, const IntegerMatrix* matrix, std::uint8_t* target) {
    want_large_pages(target, w->count() * w->tile_size());
    pack_integers(*w, *matrix, target);
}

// An adapter's matrix to `strips` strips of `pairs` pairs of inputs.
void kvferry_write_strips(const StoredMatrix* matrix, long strips, long pairs, Element* target) {
    write_strips(*matrix, strips, pairs, target);
}

// `x` [rows][stride], padded with zeros to 32 inputs -> `y` [rows][columns padded to 64]: the tiles [first, last) alone.
void kvferry_multiply(const Tiles* w, const Element* x, long stride, long rows, long first, long last, bool may_widen,
                      float* y) {
    Some some{{first, last}};
    multiply({x, stride, rows, nullptr, may_widen}, *w, some, [&](long row, long column, const float* sums) {
        store(y + row * w->count() * kTileColumns + column, load(sums));
    });
}

// `slots`: this machine's workers in shared memory, this one being `slot`; null: always `num_threads`. Null is returned where the
// system gives no such threads, or no memory.
void* kvferry_decoder_new(const Model* model, bool is_exact, int num_threads, int max_threads, void* slots,
                          int num_slots, int slot) {
    try {
        return new Decoder(*model, is_exact, max_threads,
                           Cores(static_cast<Cores::Slot*>(slots), num_slots, slot, num_threads, max_threads));
    } catch (const std::exception&) {
        return nullptr;
    }
}

void kvferry_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

// `rows` rows, each `lengths[i]` tokens from position `starts[i]` on; their tokens packed in `input_ids`. `block_ids`:
// each row's blocks up to its last token's, row after row. `hidden` gets the states of the `wanted` packed tokens, each
// once. `on_layer(i)` is called when the keys and values of the i-th layer that has some are in the pages; null: nobody asked.
// `adapters`: the slot of each row's, below 0 for none; null: no row has one. `stop`: read while it runs; kStopped is
// returned where it was not 0. `drafted`: how many of each row's last tokens are a draft, behind which no state is left;
// null: none. `found`: gets of how many tokens rows' states are, where one is not its row's, and nothing else is done; null:
// states are taken as they are.
int kvferry_decoder_forward(void* decoder, int rows, const std::int32_t* input_ids, const std::int32_t* starts,
                             const std::int32_t* lengths, const std::int32_t* block_ids, int num_wanted,
                             const std::int32_t* wanted, float* hidden, void (*on_layer)(int),
                             const std::int32_t* adapters, const std::int32_t* stop, const std::int32_t* drafted, float* found) {
    auto* self = static_cast<Decoder*>(decoder);
    try {
        Step step{0, input_ids, {}, num_wanted, wanted, hidden, on_layer, {}, stop, {}, {}, {}};
        for (int row = 0; row < rows; row++) {
            const int guessed = drafted == nullptr ? 0 : drafted[row];
            step.rows.push_back({step.num_tokens, starts[row], lengths[row], block_ids, guessed});
            step.num_tokens += lengths[row];
            block_ids += (starts[row] + lengths[row] - 1) / self->block_size() + 1;
        }
        set_adapters(step, adapters);
        if (found != nullptr && !self->has_states(step.rows, found)) return kForeignState;
        return self->forward(step) ? kWhole : kStopped;
    } catch (const std::bad_alloc&) {  // of what a step needs before its threads begin
        return kNoMemory;
    }
}

// Those that the last part of the last step ran on.
int kvferry_decoder_num_threads(void* decoder) { return static_cast<Decoder*>(decoder)->num_threads(); }

// `hidden` [rows][hidden_size padded to 64] -> `logits` [rows][vocab_size padded to 64]
void kvferry_decoder_logits(void* decoder, int rows, const float* hidden, float* logits) {
    static_cast<Decoder*>(decoder)->logits(rows, hidden, logits);
}

// For each of `rows` rows of `size` logits.
void kvferry_decoder_draw(void* decoder, int rows, const Draw* draws, int size) {
    static_cast<Decoder*>(decoder)->sample(rows, [&](RowSampler& by, long row) { by.draw(draws[row], size); });
}

void kvferry_decoder_report(void* decoder, int rows, const Report* reports, int size) {
    static_cast<Decoder*>(decoder)->sample(rows, [&](RowSampler& by, long row) { by.report(reports[row], size); });
}
}
