// The model as the engine holds it: weights in tiles, all else in elements, and the pages. Nothing is owned here.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "attention/sight.hpp"
#include "products/adapters.hpp"
#include "products/integer_tiles.hpp"
#include "machine/tiles.hpp"
#include "machine/vectors.hpp"

// These are declared once more in engine/cpu/model.py, field by field.

// y = x W^T + b
struct Linear {
    Tiles weight;
    const Element* bias;          // null: none
    const Adapters* adapters;  // null: none
};

// Attention over latents (engine/nn/latent.py): of a token one vector is kept, which serves all heads as key and, but for
// its last numbers, which positions turn, as value. latents.hpp has what is computed.
struct Latents {
    Linear inputs;   // the latent, its turned part and, where there is q_norm, what queries are made of: of all ranks
    Linear queries;  // [heads][nope_dim + turned part], of what q_norm norms, or of the hidden state
    Tiles to_keys, to_values;  // W_K and W_V, head after head: each fills tiles of its own
    const Element *kv_norm, *q_norm;  // the second null: none
    std::int64_t kv_rank, nope_dim, value_dim, q_rank;
    std::int64_t is_interleaved;  // a turned pair's two numbers are neighbours among the products
    double norm_eps;

    long queries_at() const { return padded(inputs.weight.columns, kTileColumns); }  // behind the others' products
    long asked_dim() const { return padded(nope_dim, kTileInputs); }  // of a head, as W_K takes it
};

// Numbers of a layer's state that stand together in a block (engine/cpu/state_runs.py).
struct StateRun {
    std::int64_t at, size;  // in the state
    std::int64_t place;     // bytes from the block's first page of states
};

struct StateRuns {
    const StateRun *runs, *copies;  // all of the state, from its beginning to its end; what stands elsewhere besides
    std::int64_t num_runs, num_copies;
};

enum StateKind : std::int64_t { kDeltaNet, kMamba, kShortConvolution };

// What layers that keep a state, in place of keys and values or beside them, have in common: a convolution over the last few
// tokens' rows.
// states.hpp has where a state lies, convolution.hpp, delta_net.hpp and mamba.hpp what is computed.
struct StateLayer {
    Linear rows;   // a token's products; of a short convolution b, c and x, of Mamba's layers gates, what is convolved, steps
    Linear rates;  // of a delta net: of each value head what its strength and its decay are made of; else of no columns
    Linear out;    // the last product, where the layer attends beside it; else of no columns, and the layer's `o` is it
    const float* factors;           // of each of a token's products in `rows`; null: 1
    const float* convolution;       // [kernel_size][num_convolved], in the order of kinds
    const float* convolution_bias;  // null: none
    std::int64_t kind, kernel_size, num_convolved;
    std::int64_t num_values, memory_size;  // numbers that `o` multiplies; of all heads' memories
    std::int64_t num_rates;                // numbers of a token behind the products of `rows`
    StateRuns state;
    double out_factor;  // of what `out` yields, beside what `o` does

    long rates_at() const { return padded(rows.weight.columns, kTileColumns); }  // behind the others' products
    long projected_size() const { return rates_at() + padded(num_rates, kTileColumns); }
    // A state is one number, of how many tokens it is, the last tokens' rows and each head's memory.
    long inputs_size() const { return (kernel_size - 1) * num_convolved; }
    long memory_at() const { return 1 + inputs_size(); }
};

// A gated delta net (engine/nn/delta_net.py): `rows` has queries, keys and values, and gates, of all heads; or key head by
// key head all four.
struct DeltaNet : StateLayer {
    const float *forgetting, *rate_bias;  // of each value head
    const Element* norm;                  // of a value head
    std::int64_t num_key_heads, num_value_heads, key_dim, value_dim;
    std::int64_t is_grouped;  // the products of `rows` and `rates` stand key head by key head
    double norm_eps;

    long repeats() const { return num_value_heads / num_key_heads; }  // value heads of a key head
    long num_keys() const { return num_key_heads * key_dim; }
};

// A layer of Mamba's second kind (engine/nn/mamba.py): what is convolved are values, and what heads of a group are written
// and read by.
struct Mamba : StateLayer {
    const float *forgetting, *step_bias, *kept;  // of each head; the last one: how much of a value is yielded beside memory
    const float* norm;                           // [num_values]; null: none
    std::int64_t num_heads, head_dim, num_groups, state_dim;
    std::int64_t is_normed_first;  // gates come behind the norm, not before it
    std::int64_t num_normed;       // ranks whose heads are normed together; 1: each norms its own
    double norm_eps;
    double least_step, most_step;  // no limits: 0 and infinity

    long num_keys() const { return num_groups * state_dim; }
    long steps_at() const { return num_values + num_convolved; }
    long read_at() const { return is_normed_first ? num_values : 0; }  // in the places of values, or of gates
};

// How queries grow with their positions: 1 + beta * log(1 + (position + shift) / len).
struct QueryGrowth {
    double beta;  // 0: they do not
    std::int64_t len, shift;
};

// The heads of layers of one kind, and how positions turn them.
struct Heads {
    // Of latents each query head counts as a KV head, and dim is the size of what is kept. 0: no layer is of this kind.
    std::int64_t num_qo, num_kv, dim;
    std::int64_t rotary_dim;           // of a head: so many are turned, from its beginning on
    std::int64_t are_latents;
    double rope_factor, query_factor;  // of cosines and sines, of what asks keys
    QueryGrowth growth;
    const float* inv_freq;  // [rotary_dim / 2]

    bool are_there() const { return num_qo > 0; }
    long group() const { return num_qo / num_kv; }  // query heads of one KV head
    long qo_size() const { return num_qo * dim; }
    long kv_size() const { return num_kv * dim; }
};

// A layer is a mixer, attention over heads' keys and values or over latents or what keeps a state, and an MLP or experts, or
// the mixer alone (engine/nn/blocks.py).
struct AttentionBlock {
    Linear qkv, o;  // `o` is any mixer's last product; with `qkv` beside `state` attention's, and its bias that of both
    // What `qkv` makes. 3: queries, keys and values. 2: without values, which are the keys before these are normed and turned.
    // 1: queries, which ask another layer's keys.
    std::int64_t num_made;
    std::int64_t norms_values;  // without weights
    const Element *q_norm, *k_norm;  // of each head; null: none
    const Element* sinks;            // of the query heads: a score that no value goes with; null: none
    std::int64_t has_whole_norms;  // q_norm and k_norm are of all heads together, those of other ranks too
    Sight sight;
    const Latents* latents;        // in place of `qkv` and norms; null: none
    const StateLayer* state;       // in place of all but `o`, of its kind, or beside all; null: none

    bool attends() const { return state == nullptr || beside() != nullptr; }
    bool keeps() const { return state != nullptr || latents != nullptr || num_made > 1; }  // something for later tokens
    // The state beside keys and values; null: none is.
    const StateLayer* beside() const { return state == nullptr || state->out.weight.columns == 0 ? nullptr : state; }
};

enum Activation { kSilu, kGeluTanh, kSquaredRelu };

struct Mlp {
    Linear gate_up, down;  // the first of up alone where the model's have no gate
};

// What models/experts.py says of them.
struct Experts {
    Linear gate;
    const Element *norm, *gate_norm;  // of what experts see; of what the gate does, null: that
    const float* weights;  // what each expert yields is worth, besides what the gate says; null: 1
    Linear before, behind;  // make rows thinner for the routed ones, and their sums wide again; of no columns: nothing does
    const float* score_bias;  // null: none
    const Mlp* experts;  // this rank's, `count` of them, by their numbers
    const Mlp* shared;   // null: none
    const float* shared_gate;  // [hidden_size]: of the sigmoid that weighs the shared one; null: its weight is 1
    std::int64_t num_experts, num_chosen, count, num_groups, num_chosen_groups;
    std::int64_t is_sigmoid, is_normalised, scales_inputs;  // the last: weights are of what experts see, not of what they yield
    double scale;
    double limit, alpha;  // of clamped_silu, in place of the model's activation; limit 0: that
    std::int64_t* taken;  // how often each was chosen; null: nobody asks
    const std::int32_t* place;  // in `experts`; -1: not this rank's
    const std::int32_t *copies, *turn;  // how many ranks hold it, and which of them this one is; null: one each
};

// What a layer adds besides: of its own input of a token, times a gate of the residual stream (engine/nn/residual.py).
struct OwnInput {
    Linear gate, projection;  // of no columns: the layer has no such input
    const Element* norm;
};

// How all layers' own inputs of a token are made, of its embedding and of a row that is looked up.
struct LayerInputs {
    Linear made;           // [layers][size]
    const Element* norm;   // [size]
    const Element* table;  // [num_tokens][layers][size]
    std::int64_t size;
    std::int64_t first, num_own;         // those of a layer's numbers that this rank's gates are for
    std::int64_t first_token, num_tokens;  // the table's rows here
    double made_factor, table_factor;
};

struct Layer {
    const Element *input_norm, *mixed_norm;  // before attention, and of what it adds; null: none
    AttentionBlock attention;
    const Element *mlp_norm, *output_norm;  // the same of the feed-forward
    Mlp mlp;
    std::int64_t is_local;  // its heads are those of local layers
    std::int64_t is_fed_first;  // the feed-forward sees what the mixer sees: it is added first, as what is added is one sum
    const Experts* experts;  // in place of `mlp`, or beside it; null: it is there, or has no columns and is not
    const Element *mlp_behind, *experts_behind;  // norms of what both yield, where they are side by side; else null
    OwnInput own_input;
    double factor;  // of the residual stream behind the layer
    char* pages;  // block 0's of this layer, heads as in pages.hpp; the next block's is page_bytes further
    std::int64_t head_step, value_step;  // bytes from a head's keys in a block to the next head's, and to its values

    int kind() const { return is_local != 0; }  // of its heads
    bool has_mlp() const { return mlp.down.weight.columns > 0; }
    bool are_beside() const { return experts != nullptr && has_mlp(); }  // experts beside an MLP
    bool is_mixer_alone() const { return experts == nullptr && !has_mlp(); }
};

struct Model {
    std::int64_t num_layers, hidden_size, intermediate_size, vocab_size;  // the third: of the widest MLP, dense or an expert's
    Heads heads[2];  // of layers that are not local, of those that are
    std::int64_t page_bytes, block_size;
    std::int64_t has_int8_pages;                      // in place of elements
    std::int64_t has_neighbours;                      // a turned pair's two numbers are neighbours among the products
    std::int64_t norms_turned;                        // norms of heads come after their turn, not before it
    std::int64_t has_gates;                           // numbers behind each head's query gate what it attends to
    std::int64_t activation, is_gated;                // of MLPs; it is of a gate, which up is multiplied by, or of up
    std::int64_t takes_mean_off;                      // norms do before all else, but those of heads and of latents
    double norm_eps, norm_offset;                     // a norm's weights mean so much more
    double embedding_factor;          // of what enters the residual stream
    double mixed_factor, fed_factor;  // of what mixers and what feed-forwards add to it
    double gate_factor;               // of what comes to an MLP's activation
    double score_cap;                 // what scores come near to and never reach; 0: none
    const Element *embedding, *final_norm;  // rows, weight
    const LayerInputs* inputs;  // null: layers have none of their own
    Tiles head;
    const Layer* layers;
    // A rank's part of a model has parts of the heads, of the inner columns and of the vocabulary. Null: this is all of it.
    void (*sum_over_ranks)(float* values, std::int64_t count);  // in place; called by one thread
    std::int64_t num_ranks;
    std::int64_t first_token, num_tokens;                       // the embedding's rows here
    std::int64_t adapter_rank;                                  // of each part of a linear at most, in whole strips; 0: none
    char* state_pages;  // block 0's first page of states; the next block's is page_bytes further

    const Heads& heads_of(const Layer& layer) const { return heads[layer.kind()]; }
    // Of the widest layer's heads.
    long qo_size() const { return std::max(heads[0].qo_size(), heads[1].qo_size()); }
    long qkv_size() const {
        if (latents() != nullptr) return latents()->queries_at() + latents()->queries.weight.columns;
        const auto size = [this](const Heads& own) { return (1 + has_gates) * own.qo_size() + 2 * own.kv_size(); };
        return std::max(size(heads[0]), size(heads[1]));
    }
    const Latents* latents() const { return layers[0].attention.latents; }  // of one shape in all layers; null: none
    const StateLayer* state() const {  // of one kind and shape in all layers that have one; null: none has
        for (const Layer* layer = layers; layer < layers + num_layers; layer++) {
            if (layer->attention.state != nullptr) return layer->attention.state;
        }
        return nullptr;
    }
    // Numbers of a thinner row that routed experts see, in all layers that have some; 0: none is.
    long thin_size() const {
        long size = 0;
        for (const Layer* layer = layers; layer < layers + num_layers; layer++) {
            if (layer->experts != nullptr) size = std::max<long>(size, layer->experts->before.weight.columns);
        }
        return size;
    }
    // Layers up to the last one that keeps something: those behind it matter to the wanted tokens alone.
    long num_kept() const {
        long count = num_layers;
        while (count > 1 && !layers[count - 1].attention.keeps()) count--;
        return count;
    }
    long input_size() const { return inputs == nullptr ? 0 : inputs->size; }
    // Where what states yield stands in a token's row of what mixers yield: behind attention's, where that is beside it.
    long read_at() const { return state() != nullptr && state()->out.weight.columns > 0 ? qo_size() : 0; }
};

// Have 2 MiB pages under the weights: a core reads them a tenth to a third faster. They were asked for before these were packed
// (`want_large_pages`); what is left at the edges, or was touched before, is collapsed, past the deadline in the kernel's own
// time. Where the kernel refuses, nothing changes.
inline void use_large_pages(const Tiles& w, std::chrono::steady_clock::time_point deadline) {
    constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1: at once
    const auto address = std::uintptr_t(w.integers ? (const void*)w.integers->memory : w.weights);
    const auto end = std::uintptr_t(w.integers ? (const void*)w.integers->tile(w.count()) : w.tile(w.count()));
    for (auto page = address & ~(kLargePage - 1); page < end; page += kLargePage) {
        madvise((void*)page, kLargePage, MADV_HUGEPAGE);
        if (std::chrono::steady_clock::now() < deadline) madvise((void*)page, kLargePage, kCollapse);
    }
}
