// Seeded inputs and a small model for sets.cpp, and how results are told.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

inline void put(const std::string& name, const float* values, long count) {
    std::printf("%s:", name.c_str());
    for (long i = 0; i < count; i++) {
        std::uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        std::printf(" %08x", bits);
    }
    std::printf("\n");
}

// What is promised of one library by itself.
inline void put_same(const std::string& name, bool is_same) { std::printf("%s: %s\n", name.c_str(), is_same ? "same" : "other"); }

inline Element element(float value) {
#ifdef KVFERRY_FLOAT32
    return value;
#else
    Element target[16];
    store(target, repeat(rounded(value)));
    return target[0];
#endif
}

class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 1) {}

    std::uint32_t bits() {
        state_ = state_ * 6364136223846793005 + 1442695040888963407;
        return std::uint32_t(state_ >> 33);
    }
    float between(float least, float most) { return least + (most - least) * (float(bits() & 0xffffff) / float(1 << 24)); }

    Lines<Element> elements(long count, float most) {
        Lines<Element> values(count);
        for (Element& value : values) value = element(between(-most, most));
        return values;
    }

private:
    std::uint64_t state_;
};

#ifndef KVFERRY_FLOAT32

// What integer_tiles.hpp says of whole numbers.
struct WholeKind {
    long bits, group, factor_size;
    bool has_minima = false, is_e2m1 = false;
    long span = 0;
};

// A matrix of them in tiles, and what holds it.
class WholeWeight {
public:
    explicit WholeWeight(const WholeKind& kind) : kind_(kind) {}

    Tiles make(Random& random, long columns, long inputs) {
        const auto [bits, group, factor_size, has_minima, is_e2m1, span] = kind_;
        const long groups = inputs / group;
        std::vector<std::uint8_t> numbers(columns * inputs * bits / 8);
        for (std::uint8_t& number : numbers) number = std::uint8_t(random.bits());
        const std::vector<std::uint8_t> scales = factors(random, columns * groups), minima = factors(random, columns * groups);
        std::vector<float> bases(2 * columns * (span ? groups / span : 0));
        for (float& base : bases) base = random.between(-0.01f, 0.01f);
        tiles_ = std::make_unique<IntegerTiles>(IntegerTiles{nullptr, nullptr, columns, inputs, bits, group, has_minima,
                                                             factor_size, span, is_e2m1});
        memory_.resize(kvferry_integers_size(tiles_.get()));
        const auto* const second = (const std::uint8_t*)(bases.data() + bases.size() / 2);
        const IntegerMatrix matrix{numbers.data(), {scales.data(), minima.data()}, {(const std::uint8_t*)bases.data(), second}};
        kvferry_pack_integers(tiles_.get(), &matrix, memory_.data());
        tiles_->memory = memory_.data();
        return {nullptr, columns, 0, tiles_.get()};
    }

private:
    std::vector<std::uint8_t> factors(Random& random, long count) const {
        const long factor_size = kind_.factor_size;
        std::vector<std::uint8_t> bytes(count * factor_size);
        for (long i = 0; i < count; i++) {
            const float value = random.between(-0.2f, 0.2f) / float(1 << kind_.bits);
            const std::uint16_t half = std::uint16_t(0x2000 + (random.bits() & 0x83ff));  // about 2^-7, either sign
            const std::uint8_t byte = kind_.is_e2m1 ? std::uint8_t(118 + random.bits() % 6) : std::uint8_t(random.bits());
            if (factor_size == 4) std::memcpy(bytes.data() + 4 * i, &value, 4);
            if (factor_size == 2) std::memcpy(bytes.data() + 2 * i, &half, 2);
            if (factor_size == 1) bytes[i] = byte;
        }
        return bytes;
    }

    const WholeKind kind_;
    std::unique_ptr<IntegerTiles> tiles_;
    Lines<std::uint8_t> memory_;
};

#endif

struct Shape {
    long head_dim, inner, window = 0;
    bool has_extras = false;  // norms of heads, sinks, a cap, biases, gelu
    bool has_int8_pages = false;
    long bits = 0;  // of weights in whole numbers; 0: elements
    bool has_latents = false;
    bool has_states = false;  // in the first and the last layer, gates of attention in the others
};

constexpr long kTurned = 32, kNope = 48, kValue = 80, kAsking = 40;  // of latents: parts of heads, what queries are made of
constexpr long kKeyHeads = 2, kValueHeads = 4, kKeyDim = 32, kValueDim = 48, kConvolved = 4;  // of delta nets
constexpr long kHidden = 96, kHeads = 4, kKvHeads = 2, kVocab = 100, kLayers = 2, kBlock = 16, kBlocks = 64;

// A model of random weights with pages for a few sequences.
class SmallModel {
public:
    explicit SmallModel(const Shape& shape) : shape_(shape), random_(5), layers_(shape.has_states ? kLayers + 1 : kLayers) {
        const long d = shape.head_dim, num_q = shape.has_states ? 2 * kHeads : kHeads;
        for (Layer& layer : layers_) {
            layer = {};
            const bool has_state = shape.has_states && (&layer == &layers_.front() || &layer == &layers_.back());
            layer.input_norm = vector(kHidden, 1.0f), layer.mlp_norm = vector(kHidden, 1.0f);
            if (shape.has_latents) layer.attention.latents = latents();
            else if (has_state) layer.attention.delta_net = delta_net(long(nets_.size()));
            else layer.attention.qkv = linear((num_q + 2 * kKvHeads) * d, kHidden);
            const long mixed = has_state ? kValueHeads * kValueDim : kHeads * (shape.has_latents ? kValue : d);
            layer.attention.o = linear(kHidden, mixed);
            layer.mlp.gate_up = linear(2 * shape.inner, kHidden), layer.mlp.down = linear(kHidden, shape.inner);
            layer.attention.window = shape.window;
            if (!shape.has_extras) continue;
            layer.attention.q_norm = vector(d, 1.0f), layer.attention.k_norm = vector(d, 1.0f);
            layer.attention.sinks = vector(kHeads, 1.0f), layer.output_norm = vector(kHidden, 1.0f);
        }
        float frequency = 1.0f;
        for (long i = 0; i < d / 2; i++, frequency *= 0.75f) frequencies_.push_back(frequency);
        const long token_bytes = shape.has_int8_pages ? d + 4 : d * long(sizeof(Element));
        model_.num_layers = long(layers_.size()), model_.has_gates = shape.has_states;
        model_.hidden_size = kHidden, model_.intermediate_size = shape.inner;
        model_.num_qo_heads = kHeads, model_.num_kv_heads = kKvHeads, model_.head_dim = d, model_.vocab_size = kVocab;
        model_.page_bytes = 2 * kKvHeads * kBlock * token_bytes, model_.block_size = kBlock;
        model_.has_int8_pages = shape.has_int8_pages, model_.rotary_dim = d, model_.has_gelu = shape.has_extras;
        model_.norm_eps = 1e-6, model_.rope_factor = model_.local_rope_factor = 1.0;
        model_.embedding_factor = model_.added_factor = model_.query_factor = 1.0;
        model_.score_cap = shape.has_extras ? 30.0 : 0.0;
        model_.inv_freq = frequencies_.data(), model_.embedding = vector(kVocab * kHidden, 1.0f);
        model_.final_norm = vector(kHidden, 1.0f), model_.head = linear(kVocab, kHidden).weight;
        model_.layers = layers_.data(), model_.num_ranks = 1, model_.num_tokens = kVocab;
        if (shape.has_latents) {
            model_.num_kv_heads = kHeads, model_.rotary_dim = kTurned;
            model_.page_bytes = kBlock * token_bytes;
        }
        const long state_bytes = nets_.empty() ? 0 : state_size(*nets_[0]) * long(sizeof(float));
        for (std::size_t i = 0; i < nets_.size(); i++) nets_[i]->state = runs(long(i) * state_bytes, long(i + 1) * state_bytes);
        const long states = long(nets_.size()) * state_bytes;
        const long num_pages = long(layers_.size()) + padded(states, model_.page_bytes) / model_.page_bytes;
        pages_.resize(num_pages * kBlocks * model_.page_bytes);
        for (std::size_t i = 0; i < layers_.size(); i++) layers_[i].pages = page(long(i));
        model_.state_pages = page(long(layers_.size()));
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
                                    &wanted, hidden.data(), nullptr, nullptr, &stop, nullptr);
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

    // The second one's products stand key head by key head.
    const DeltaNet* delta_net(long index) {
        nets_.push_back(std::make_unique<DeltaNet>());
        DeltaNet& made = *nets_.back();
        made.num_key_heads = kKeyHeads, made.num_value_heads = kValueHeads, made.key_dim = kKeyDim, made.value_dim = kValueDim;
        made.kernel_size = kConvolved, made.is_grouped = index, made.norm_eps = 1e-6;
        made.rows = linear(made.num_convolved() + made.num_values(), kHidden), made.rates = linear(2 * kValueHeads, kHidden);
        made.norm = vector(kValueDim, 1.0f);
        const auto floats = [&](long count, float least, float most) {
            floats_.emplace_back(count);
            for (float& value : floats_.back()) value = random_.between(least, most);
            return floats_.back().data();
        };
        made.convolution = floats(kConvolved * made.num_convolved(), -1.0f, 1.0f);
        made.forgetting = floats(kValueHeads, 0.01f, 2.0f), made.rate_bias = floats(kValueHeads, -1.0f, 1.0f);
        return &made;
    }

    static long state_size(const DeltaNet& net) { return 1 + net.inputs_size() + net.num_values() * net.key_dim; }

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
    std::vector<std::unique_ptr<DeltaNet>> nets_;
    std::vector<std::vector<float>> floats_;
    std::vector<std::vector<StateRun>> runs_;
    std::vector<float> frequencies_;
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
