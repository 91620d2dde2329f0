// Rotary position embeddings of a step's tokens: cosines and sines made once, used by every layer.
#pragma once

#include <cmath>
#include <vector>

#include "layers/model.hpp"
#include "machine/vectors.hpp"

class Rotation {
public:
    Rotation(const Model& model, const Heads& heads) : m_(model), heads_(heads) {}

    void reserve(long num_tokens) {
        if (!heads_.are_there()) return;
        if (long(query_growths_.size()) < num_tokens) query_growths_.resize(num_tokens);
        if (long(cos_.size()) < num_tokens * heads_.rotary_dim) cos_.resize(num_tokens * heads_.rotary_dim);
        if (long(sin_.size()) < num_tokens * heads_.rotary_dim) sin_.resize(num_tokens * heads_.rotary_dim);
    }

    // Cosines and signed sines of a token's position, rounded as the torch path rounds them.
    void prepare(long token, long position) {
        if (!heads_.are_there()) return;
        const long half = heads_.rotary_dim / 2;
        const float factor = float(heads_.rope_factor);
        float *cos = cos_.data() + token * heads_.rotary_dim, *sin = sin_.data() + token * heads_.rotary_dim;
        for (long i = 0; i < half; i++) {
            const float angle = float(position) * heads_.inv_freq[i];
            cos[i] = cos[i + half] = rounded(std::cos(angle) * factor);
            sin[i + half] = rounded(std::sin(angle) * factor);
            sin[i] = -sin[i + half];
        }
        const QueryGrowth& g = heads_.growth;
        query_growths_[token] = g.beta == 0 ? 1 : 1 + g.beta * std::log1p(double((position + g.shift) / g.len));
    }

    // Of a token's queries: the model's, and Llama 4's for its position.
    float query_factor(long token) const { return float(heads_.query_factor * query_growths_[token]); }

    // The latter alone.
    float query_growth(long token) const { return float(query_growths_[token]); }

    // One head, times `factor` and `norm`'s weights if these are not null, turned by its token's angles, times `by`; or
    // turned first, and then normed. `scratch` [2][head_dim].
    template <class Out>
    void turn(const float* head, const Element* norm, float factor, long token, float by, float* scratch, Out* out) const {
        const long d = heads_.dim;
        const Vector offset = repeat(float(m_.norm_offset));
        if (norm != nullptr && m_.norms_turned) {
            turn(head, nullptr, 1.0f, token, 1.0f, scratch, scratch);
            const Vector all = repeat(inverse_rms(scratch, d, float(m_.norm_eps)) * by);
            for (long i = 0; i < d; i += 16) store(out + i, load(scratch + i) * all * (load(norm + i) + offset));
            return;
        }
        if (norm != nullptr) {
            for (long i = 0; i < d; i += 16) store(scratch + i, load(head + i) * repeat(factor) * (load(norm + i) + offset));
            head = scratch;
        }
        turn_part(m_.has_neighbours ? by_halves(head, scratch + d) : head, token, by, out);
        for (long i = heads_.rotary_dim; i < d; i += 16) store(out + i, load(head + i) * repeat(by));
    }

    // First numbers of each turned pair before second ones, to `scratch`.
    const float* by_halves(const float* pairs, float* scratch) const {
        const long half = heads_.rotary_dim / 2;
        for (long i = 0; i < half; i++) scratch[i] = pairs[2 * i], scratch[half + i] = pairs[2 * i + 1];
        return scratch;
    }

    // The turned part of a head alone.
    template <class Out>
    void turn_part(const float* part, long token, float by, Out* out) const {
        const long turned = heads_.rotary_dim, half = turned / 2;
        const float *cos = cos_.data() + token * turned, *sin = sin_.data() + token * turned;
        const Eight scale = repeat_8(by);
        for (long i = 0; i < half; i += 8) {  // a half is a multiple of 8
            const Eight low = load_8(part + i), high = load_8(part + half + i);
            const Eight c = load_8(cos + i), s = load_8(sin + half + i);
            store(out + i, fms(low, c, high * s) * scale);
            store(out + half + i, fma(high, c, low * s) * scale);
        }
    }

private:
    const Model m_;
    const Heads heads_;
    Lines<float> cos_, sin_;  // [tokens][rotary_dim]
    std::vector<double> query_growths_;
};
