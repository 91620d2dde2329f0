// The softmax of rows that see their keys tile by tile: running maximum and sum (Milakov & Gimelshein 2018), weights
// relative to the largest score so far. Weights are rounded to bfloat16; their sum is not.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "team.hpp"
#include "vectors.hpp"

class RunningSoftmax {
public:
    RunningSoftmax(long rows, int head_dim)
        : scale_(kLog2E / __builtin_sqrtf(float(head_dim))), most_(rows), total_(rows) {}

    void reset(long rows) {
        std::fill_n(most_.begin(), rows, -std::numeric_limits<float>::infinity());
        std::fill_n(total_.begin(), rows, 0.0f);
    }

    float total(long row) const { return total_[row]; }

    // A row's next `width` scores, products of queries and keys, to weights; zero outside of the keys that it sees.
    // Returns the factor for what it has summed up before. Never inlined: whoever calls it gets the same bits.
    [[gnu::noinline]] float weigh(long row, const float* scores, Range seen, long width, bf16* weights) {
        if (seen.first >= seen.last) {
            std::fill_n(weights, width, bf16(0));
            return 1.0f;
        }
        const bool all = seen.first == 0 && seen.last == width;
        const float here = all ? most<true>(scores, seen, width) : most<false>(scores, seen, width);
        const float largest = std::max(most_[row], here);
        const float total = all ? spread<true>(scores, seen, width, largest, weights)
                                : spread<false>(scores, seen, width, largest, weights);
        float factor = 1.0f;
        if (largest > most_[row]) {
            factor = _mm512_cvtss_f32(exp2(_mm512_set1_ps((most_[row] - largest) * scale_)));
            total_[row] *= factor;
            most_[row] = largest;
        }
        total_[row] += total;
        return factor;
    }

private:
    // The lanes at `at` that a row sees.
    static __mmask16 visible(Range seen, long at) {
        const __mmask16 before = seen.first <= at ? __mmask16(0) : lanes(seen.first - at);
        return (seen.last <= at ? __mmask16(0) : lanes(seen.last - at)) & ~before;
    }

    template <bool ALL>
    static float most(const float* scores, Range seen, long width) {
        __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (long i = 0; i < width; i += 16) {
            const __m512 values = _mm512_loadu_ps(scores + i);
            most = ALL ? _mm512_max_ps(most, values) : _mm512_mask_max_ps(most, visible(seen, i), most, values);
        }
        return _mm512_reduce_max_ps(most);
    }

    template <bool ALL>
    float spread(const float* scores, Range seen, long width, float largest, bf16* weights) const {
        const __m512 scale = _mm512_set1_ps(scale_), shift = _mm512_set1_ps(largest * scale_);
        __m512 total = _mm512_setzero_ps();
        for (long i = 0; i < width; i += 16) {
            __m512 weight = exp2_rough(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), scale, shift));
            if (!ALL) weight = _mm512_maskz_mov_ps(visible(seen, i), weight);
            total = _mm512_add_ps(total, weight);
            _mm256_storeu_si256((__m256i*)(weights + i), (__m256i)_mm512_cvtneps_pbh(weight));
        }
        return _mm512_reduce_add_ps(total);
    }

    const float scale_;
    std::vector<float> most_, total_;
};
