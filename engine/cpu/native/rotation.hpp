// Rotary position embeddings of a step's tokens: cosines and sines made once, used by every layer.
#pragma once

#include <cmath>
#include <vector>

#include "model.hpp"
#include "vectors.hpp"

class Rotation {
public:
    explicit Rotation(const Model& model) : m_(model) {}

    void reserve(long num_tokens) {
        if (long(cos_.size()) < num_tokens * m_.head_dim) cos_.resize(num_tokens * m_.head_dim);
        if (long(sin_.size()) < num_tokens * m_.head_dim) sin_.resize(num_tokens * m_.head_dim);
    }

    // Cosines and signed sines of a token's position, rounded as the torch path rounds them.
    void prepare(long token, long position) {
        const long half = m_.head_dim / 2;
        float *cos = cos_.data() + token * m_.head_dim, *sin = sin_.data() + token * m_.head_dim;
        for (long i = 0; i < half; i++) {
            const float angle = float(position) * m_.inv_freq[i];
            cos[i] = cos[i + half] = rounded(std::cos(angle) * float(m_.rope_factor));
            sin[i + half] = rounded(std::sin(angle) * float(m_.rope_factor));
            sin[i] = -sin[i + half];
        }
    }

    // One head, normalized if `norm` is not null, turned by its token's angles. `scratch` [head_dim].
    void turn(const float* head, const bf16* norm, long token, float* scratch, bf16* out) const {
        const long d = m_.head_dim, half = d / 2;
        if (norm != nullptr) {
            const Vector factor = repeat(inverse_rms(head, d, float(m_.norm_eps)));
            for (long i = 0; i < d; i += 16) store(scratch + i, load(head + i) * factor * load(norm + i));
            head = scratch;
        }
        const float *cos = cos_.data() + token * d, *sin = sin_.data() + token * d;
        for (long i = 0; i < half; i += 8) {  // a half is a multiple of 8
            const __m256 low = _mm256_loadu_ps(head + i), high = _mm256_loadu_ps(head + half + i);
            const __m256 c = _mm256_loadu_ps(cos + i), s = _mm256_loadu_ps(sin + half + i);
            store(out + i, _mm256_fmsub_ps(low, c, high * s));
            store(out + half + i, _mm256_fmadd_ps(high, c, low * s));
        }
    }

private:
    const Model m_;
    std::vector<float> cos_, sin_;  // [tokens][head_dim]
};
