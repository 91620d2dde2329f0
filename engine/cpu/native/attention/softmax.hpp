// The softmax of rows that see their keys tile by tile: running maximum and sum (Milakov & Gimelshein 2018), weights
// relative to the largest score so far. Weights are rounded to elements; their sum is not.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "machine/team.hpp"
#include "machine/vectors.hpp"

// What products of queries and keys come near to where scores are capped; 0: they are not.
inline float bound_of(float cap, int head_dim) { return cap * __builtin_sqrtf(float(head_dim)); }

class RunningSoftmax {
public:
    RunningSoftmax(long rows, int head_dim, float cap)
        : scale_(kLog2E / __builtin_sqrtf(float(head_dim))), bound_(bound_of(cap, head_dim)), most_(rows), total_(rows) {}

    // Rows are those of `num_heads` heads in turns. A head's sink has been seen before all keys; `sinks` null: there are none.
    void reset(long rows, const Element* sinks, int num_heads) {
        std::fill_n(most_.begin(), rows, -std::numeric_limits<float>::infinity());
        std::fill_n(total_.begin(), rows, sinks == nullptr ? 0.0f : 1.0f);
        for (long row = 0; sinks != nullptr && row < rows; row++) {
            most_[row] = widened(sinks[row % num_heads]) * (kLog2E / scale_);
        }
    }

    float total(long row) const { return total_[row]; }
    float most(long row) const { return most_[row]; }

    // What weights relative to the score `most` are multiplied by to be relative to the score `larger`.
    float factor(float most, float larger) const { return __builtin_exp2f((most - larger) * scale_); }

    // A row's next `width` scores, products of queries and keys, which it may change, to weights; zero outside of the keys that it sees.
    // Returns the factor for what it has summed up before. Never inlined: whoever calls it gets the same bits.
    [[gnu::noinline]] float weigh(long row, float* scores, Range seen, long width, Element* weights) {
        if (seen.first >= seen.last) {
            std::fill_n(weights, width, Element(0));
            return 1.0f;
        }
        for (long i = 0; bound_ != 0.0f && i < width; i += 16) store(scores + i, capped(load(scores + i), bound_));
        const bool all = seen.first == 0 && seen.last == width;
        const float here = all ? most<true>(scores, seen, width) : most<false>(scores, seen, width);
        const float largest = std::max(most_[row], here);
        const float total = all ? spread<true>(scores, seen, width, largest, weights)
                                : spread<false>(scores, seen, width, largest, weights);
        float factor = 1.0f;
        if (largest > most_[row]) {
            factor = lane_0(exp2(repeat((most_[row] - largest) * scale_)));
            total_[row] *= factor;
            most_[row] = largest;
        }
        total_[row] += total;
        return factor;
    }

private:
    // The lanes at `at` that a row sees.
    static Lanes visible(Range seen, long at) { return between(seen.first - at, seen.last - at); }

    // Results of four vectors in turns: none waits for the one before.
    static constexpr int kTurns = 4;

    // job(i, turn) for each 16 of `width`.
    template <class Job>
    [[gnu::always_inline]] static void in_turns(long width, Job job) {
        long first = 0;
        for (; first + 16 * kTurns <= width; first += 16 * kTurns) {
#pragma GCC unroll 4
            for (int turn = 0; turn < kTurns; turn++) job(first + 16 * turn, turn);
        }
#pragma GCC unroll 3
        for (int turn = 0; turn < kTurns - 1; turn++) {
            if (first + 16 * turn < width) job(first + 16 * turn, turn);
        }
    }

    template <bool ALL>
    static float most(const float* scores, Range seen, long width) {
        Vector most[kTurns];
        for (Vector& each : most) each = repeat(-std::numeric_limits<float>::infinity());
        in_turns(width, [&](long i, int turn) __attribute__((always_inline)) {
            const Vector larger = max(most[turn], load(scores + i));
            most[turn] = ALL ? larger : select(visible(seen, i), larger, most[turn]);
        });
        return max_of(max(max(most[0], most[1]), max(most[2], most[3])));
    }

    template <bool ALL>
    float spread(const float* scores, Range seen, long width, float largest, Element* weights) const {
        const Vector scale = repeat(scale_), shift = repeat(largest * scale_);
        Vector total[kTurns];
        for (Vector& each : total) each = repeat(0.0f);
        in_turns(width, [&](long i, int turn) __attribute__((always_inline)) {
            Vector weight = exp2_rough(fms(load(scores + i), scale, shift));
            if (!ALL) weight = select(visible(seen, i), weight, repeat(0.0f));
            total[turn] = total[turn] + weight;
            store(weights + i, weight);
        });
        return sum_of((total[0] + total[1]) + (total[2] + total[3]));
    }

    const float scale_, bound_;
    std::vector<float> most_, total_;
};
