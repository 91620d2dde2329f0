// A small model of random weights for sets.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "sets_inputs.hpp"

struct Shape {
    long head_dim, inner, window = 0, chunk = 0;  // the last two: of keys that are seen; 0: all
    bool has_extras = false;  // norms of heads, sinks, a cap, biases, gelu
    bool has_int8_pages = false;
    long bits = 0;  // of weights in whole numbers; 0: elements
    bool has_latents = false;
    int states = -1;  // the kind of what the first and the last layer keep; beside delta nets attention has gates; -1: none
    bool is_beside = false;  // those layers attend as well
    bool has_one_norm = false;  // of mixer and feed-forward, which takes the mean off
    // The first layer has a window and narrow heads, the next wide ones whose values are keys, which the last one borrows; all
    // norm values, and have inputs of their own and factors.
    bool is_uneven = false;
};

constexpr long kTurned = 32, kNope = 48, kValue = 80, kAsking = 40;  // of latents: parts of heads, what queries are made of
constexpr long kKeyHeads = 2, kValueHeads = 4, kKeyDim = 32, kValueDim = 48, kConvolved = 4;  // of delta nets
constexpr long kStateHeads = 6, kStateDim = 32, kMambaDim = 48, kGroups = 2;  // of Mamba's layers
constexpr long kOwn = 32;  // of layers' own inputs
constexpr long kHidden = 96, kHeads = 4, kKvHeads = 2, kVocab = 100, kLayers = 2, kBlock = 16, kBlocks = 64;

// A model of random weights with pages for a few sequences.
class SmallModel {
public:
    explicit SmallModel(const Shape& shape) : shape_(shape), random_(5), layers_(shape.states < 0 && !shape.is_uneven ? kLayers : kLayers + 1) {
        const bool has_gates = shape.states == kDeltaNet, is_plain = shape.states == kMamba;
        const long d = shape.head_dim, num_q = has_gates ? 2 * kHeads : kHeads;
        for (Layer& layer : layers_) {
            layer = {};
            layer.factor = 1.0;
            const bool has_state = shape.states >= 0 && (&layer == &layers_.front() || &layer == &layers_.back());
            layer.input_norm = vector(kHidden, 1.0f), layer.mlp_norm = vector(kHidden, 1.0f);
            if (shape.has_latents) layer.attention.latents = latents();
            else if (has_state) layer.attention.state = state();
            if (!shape.has_latents && layer.attention.attends()) {
                layer.attention.qkv = linear((num_q + 2 * kKvHeads) * d, kHidden), layer.attention.num_made = 3;
            }
            const StateLayer* const state = layer.attention.attends() ? nullptr : layer.attention.state;
            const long mixed = state ? state->num_values : kHeads * (shape.has_latents ? kValue : d);
            layer.attention.o = linear(kHidden, mixed);
            if (is_plain && &layer == &layers_.front()) continue;  // a mixer alone
            layer.mlp.gate_up = linear((is_plain ? 1 : 2) * shape.inner, kHidden);
            layer.mlp.down = linear(kHidden, shape.inner);
            if (shape.has_one_norm) layer.is_fed_first = 1, layer.mlp_norm = layer.input_norm;
            layer.attention.sight = shape.chunk ? Sight{shape.chunk, 1} : Sight{shape.window, 0};
            if (!shape.has_extras) continue;
            layer.attention.q_norm = vector(d, 1.0f), layer.attention.k_norm = vector(d, 1.0f);
            layer.attention.sinks = vector(kHeads, 1.0f), layer.output_norm = vector(kHidden, 1.0f);
        }
        float frequency = 1.0f;
        for (long i = 0; i < d; i++, frequency *= 0.75f) frequencies_.push_back(frequency);
        const long token_bytes = shape.has_int8_pages ? d + 4 : d * long(sizeof(Element));
        model_.num_layers = long(layers_.size()), model_.has_gates = has_gates;
        model_.hidden_size = kHidden, model_.intermediate_size = shape.inner;
        model_.vocab_size = kVocab;
        Heads& heads = model_.heads[0];
        heads.num_qo = kHeads, heads.num_kv = kKvHeads, heads.dim = heads.rotary_dim = d;
        heads.rope_factor = heads.query_factor = 1.0, heads.inv_freq = frequencies_.data();
        model_.page_bytes = 2 * kKvHeads * kBlock * token_bytes, model_.block_size = kBlock;
        model_.has_int8_pages = shape.has_int8_pages, model_.is_gated = !is_plain;
        model_.activation = is_plain ? kSquaredRelu : shape.has_extras ? kGeluTanh : kSilu;
        model_.takes_mean_off = shape.has_one_norm;
        model_.norm_eps = 1e-6, model_.embedding_factor = 1.0;
        model_.mixed_factor = model_.fed_factor = model_.gate_factor = shape.is_beside ? 0.8 : 1.0;
        model_.score_cap = shape.has_extras ? 30.0 : 0.0;
        model_.embedding = vector(kVocab * kHidden, 1.0f);
        model_.final_norm = vector(kHidden, 1.0f), model_.head = linear(kVocab, kHidden).weight;
        model_.layers = layers_.data(), model_.num_ranks = 1, model_.num_tokens = kVocab;
        if (shape.has_latents) {
            heads.num_kv = kHeads, heads.rotary_dim = kTurned, heads.are_latents = 1;
            model_.page_bytes = kBlock * token_bytes;
        }
        if (shape.is_uneven) make_uneven();
        long states = 0;  // bytes
        for (StateLayer* state : stateful_) {
            const long first = states;
            states += (state->memory_at() + state->memory_size) * long(sizeof(float));
            state->state = runs(first, states);
        }
        const long num_pages = long(layers_.size()) + padded(states, model_.page_bytes) / model_.page_bytes;
        pages_.resize(num_pages * kBlocks * model_.page_bytes);
        for (std::size_t i = 0; i < layers_.size(); i++) {
            layers_[i].pages = page(long(i));
            layers_[i].head_step = kBlock * token_bytes, layers_[i].value_step = kKvHeads * layers_[i].head_step;
        }
        model_.state_pages = page(long(layers_.size()));
        if (shape.is_uneven) layers_[2].pages = layers_[1].pages;
    }

    // The last token's logits where `tokens` come in steps of these sizes, by so many threads; a second sequence, of which
    // nothing is wanted, stands beside each step if `has_company`.
    std::vector<float> logits(const std::vector<long>& sizes, bool is_exact, int threads, bool has_company) {
        std::fill(pages_.begin(), pages_.end(), char(0));
        void* const decoder = kvferry_decoder_new(&model_, is_exact, threads, threads, nullptr, 0, 0);
        std::vector<float> hidden(padded(kHidden, kTileColumns)), logits(padded(kVocab, kTileColumns));
        const std::int32_t stop = 0;
        long start = 0;
        for (long size : sizes) {
            std::vector<std::int32_t> tokens, blocks, starts{std::int32_t(start)}, lengths{std::int32_t(size)};
            for (long i = start; i < start + size; i++) tokens.push_back(std::int32_t((i * 37 + 11) % kVocab));
            for (long i = 0; i <= (start + size - 1) / kBlock; i++) blocks.push_back(std::int32_t(i * 2 % 63));
            if (has_company) {
                for (long i = 0; i < 5; i++) tokens.push_back(std::int32_t(i));
                starts.push_back(0), lengths.push_back(5), blocks.push_back(63);
            }
            const auto wanted = std::int32_t(size - 1);
            kvferry_decoder_forward(decoder, int(starts.size()), tokens.data(), starts.data(), lengths.data(), blocks.data(), 1,
                                    &wanted, hidden.data(), nullptr, nullptr, &stop, nullptr, nullptr);
            start += size;
        }
        kvferry_decoder_logits(decoder, 1, hidden.data(), logits.data());
        kvferry_decoder_free(decoder);
        return logits;
    }

private:
    const Element* vector(long count, float most) {
        memory_.push_back(random_.elements(count + 32, most));
        return memory_.back().data();
    }

    void make_uneven() {
        const long wide = 2 * shape_.head_dim;
        Heads &heads = model_.heads[0], &narrow = model_.heads[1];
        narrow = heads;
        heads.num_kv = kKvHeads / 2, heads.dim = heads.rotary_dim = wide;
        for (std::size_t i = 0; i < layers_.size(); i++) {
            Layer& layer = layers_[i];
            layer.attention.norms_values = 1, layer.factor = 0.7;
            layer.own_input = {linear(kOwn, kHidden), linear(kHidden, kOwn), vector(kHidden, 1.0f)};
            if ((layer.is_local = i == 0)) continue;
            layer.attention.sight = {};
            layer.attention.num_made = i == 1 ? 2 : 1;
            layer.attention.qkv = linear((kHeads + (i == 1)) * wide, kHidden);
            layer.attention.o = linear(kHidden, kHeads * wide);
            layer.attention.q_norm = vector(wide, 1.0f), layer.attention.k_norm = vector(wide, 1.0f);
        }
        const long num = long(layers_.size()) * kOwn;
        inputs_ = {linear(num, kHidden), vector(kOwn, 1.0f), vector(kVocab * num, 1.0f), kOwn, 0, kOwn, 0, kVocab, 0.1, 2.0};
        model_.inputs = &inputs_;
    }

    const Latents* latents() {
        const long d = shape_.head_dim, rank = d - kTurned;
        latents_.push_back(std::make_unique<Latents>());
        Latents& made = *latents_.back();
        made.inputs = linear(d + kAsking, kHidden), made.queries = linear(kHeads * (kNope + kTurned), kAsking);
        made.to_keys = linear(kHeads * padded(rank, kTileColumns), kNope).weight;
        made.to_values = linear(kHeads * padded(kValue, kTileColumns), rank).weight;
        made.kv_norm = vector(rank, 1.0f), made.q_norm = vector(kAsking, 1.0f);
        made.kv_rank = rank, made.nope_dim = kNope, made.value_dim = kValue, made.q_rank = kAsking;
        made.is_interleaved = 1, made.norm_eps = 1e-6;
        return &made;
    }

    const StateLayer* state() {
        if (shape_.states == kDeltaNet) return &delta_net();
        if (shape_.states == kMamba) return &mamba();
        convolutions_.push_back(std::make_unique<StateLayer>());
        StateLayer& made = *convolutions_.back();
        made.num_values = kHidden, made.rows = linear(3 * kHidden, kHidden);
        return &with_convolution(made, kHidden);
    }

    // The second one's products stand key head by key head.
    const StateLayer& delta_net() {
        nets_.push_back(std::make_unique<DeltaNet>());
        DeltaNet& made = *nets_.back();
        made.num_key_heads = kKeyHeads, made.num_value_heads = kValueHeads, made.key_dim = kKeyDim, made.value_dim = kValueDim;
        made.is_grouped = !stateful_.empty(), made.norm_eps = 1e-6;
        made.num_rates = 2 * kValueHeads;
        made.num_values = kValueHeads * kValueDim, made.memory_size = made.num_values * kKeyDim;
        const long convolved = 2 * made.num_keys() + made.num_values;
        made.rows = linear(convolved + made.num_values, kHidden), made.rates = linear(2 * kValueHeads, kHidden);
        made.norm = vector(kValueDim, 1.0f);
        with_convolution(made, convolved);
        made.forgetting = floats(kValueHeads, 0.01f, 2.0f), made.rate_bias = floats(kValueHeads, -1.0f, 1.0f);
        return made;
    }

    const StateLayer& mamba() {
        mambas_.push_back(std::make_unique<Mamba>());
        Mamba& made = *mambas_.back();
        made.num_heads = kStateHeads, made.head_dim = kMambaDim, made.num_groups = kGroups, made.state_dim = kStateDim;
        made.num_values = kStateHeads * kMambaDim, made.memory_size = made.num_values * kStateDim, made.num_rates = kStateHeads;
        made.norm_eps = 1e-6, made.num_normed = 1;
        const long convolved = made.num_values + 2 * made.num_keys();
        made.rows = linear(made.num_values + convolved + kStateHeads, kHidden);
        with_convolution(made, convolved);
        made.convolution_bias = floats(convolved, -0.5f, 0.5f);
        made.forgetting = floats(kStateHeads, 0.01f, 2.0f), made.step_bias = floats(kStateHeads, -1.0f, 1.0f);
        made.kept = floats(kStateHeads, -1.0f, 1.0f), made.norm = floats(made.num_values, 0.5f, 1.5f);
        if (!shape_.is_beside) return made;
        made.out = linear(kHidden, made.num_values), made.out_factor = 0.7, made.is_normed_first = 1;
        made.factors = floats(made.rows.weight.columns, 0.3f, 0.9f);
        return made;
    }

    const StateLayer& with_convolution(StateLayer& made, long convolved) {
        stateful_.push_back(&made);
        made.kind = shape_.states, made.kernel_size = kConvolved, made.num_convolved = convolved;
        made.convolution = floats(kConvolved * convolved, -1.0f, 1.0f);
        return made;
    }

    const float* floats(long count, float least, float most) {
        floats_.emplace_back(count);
        for (float& value : floats_.back()) value = random_.between(least, most);
        return floats_.back().data();
    }

    // A state in the bytes [first, last) of a block's pages of states.
    StateRuns runs(long first, long last) {
        runs_.emplace_back();
        for (long at = 0; first < last;) {
            const long page = first / model_.page_bytes, within = first % model_.page_bytes;
            const long size = std::min(last - first, model_.page_bytes - within);
            runs_.back().push_back({at, size / long(sizeof(float)), page * kBlocks * model_.page_bytes + within});
            at += size / long(sizeof(float)), first += size;
        }
        return {runs_.back().data(), nullptr, long(runs_.back().size()), 0};
    }

    char* page(long index) { return pages_.data() + index * kBlocks * model_.page_bytes; }

    Linear linear(long columns, long inputs) {
#ifndef KVFERRY_FLOAT32
        if (shape_.bits != 0) {
            whole_.push_back(std::make_unique<WholeWeight>(WholeKind{shape_.bits, 32, 4}));
            return {whole_.back()->make(random_, columns, inputs), nullptr, nullptr};
        }
#endif
        const Element* const weights = vector(columns * inputs, 0.15f);
        memory_.emplace_back(tiled_size(columns, inputs));
        const Tiles tiles = pack(weights, columns, inputs, memory_.back().data());
        return {tiles, shape_.has_extras ? vector(columns, 0.5f) : nullptr, nullptr};
    }

    const Shape shape_;
    Random random_;
    std::vector<Lines<Element>> memory_;
#ifndef KVFERRY_FLOAT32
    std::vector<std::unique_ptr<WholeWeight>> whole_;
#endif
    std::vector<std::unique_ptr<Latents>> latents_;
    std::vector<StateLayer*> stateful_;
    std::vector<std::unique_ptr<DeltaNet>> nets_;
    std::vector<std::unique_ptr<Mamba>> mambas_;
    std::vector<std::unique_ptr<StateLayer>> convolutions_;
    std::vector<std::vector<float>> floats_;
    std::vector<std::vector<StateRun>> runs_;
    std::vector<float> frequencies_;
    LayerInputs inputs_{};
    std::vector<Layer> layers_;
    Lines<char> pages_;
    Model model_{};
};

// A prompt at once, and cut, token by token at the end: over more keys than a tile of attention has.
inline void run_model(const Shape& shape, const std::string& name) {
    SmallModel model(shape);
    const std::vector<long> whole{270}, cut{70, 3, 170, 25, 1, 1};
    const std::vector<float> exact = model.logits(whole, true, 1, false);
    put("exact logits of " + name, exact.data(), kVocab);
    put_same("cut, by three threads and in company, " + name, model.logits(cut, true, 3, true) == exact);
    const std::vector<float> fast = model.logits(cut, false, 1, false);
    put("fast logits of " + name, fast.data(), kVocab);
}
