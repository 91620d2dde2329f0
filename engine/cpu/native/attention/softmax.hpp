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
        cap(scores, width);
        const float largest = std::max(most_[row], max_of(most(scores, seen, width)));
        const float total = sum_of(spread(scores, seen, width, largest * scale_, weights));
        float factor = 1.0f;
        if (largest > most_[row]) {
            factor = lane_0(exp2(repeat((most_[row] - largest) * scale_)));
            total_[row] *= factor;
            most_[row] = largest;
        }
        total_[row] += total;
        return factor;
    }

    static constexpr int kTogether = 16;

    // The same of so many rows or fewer, whose scores and weights are `stride` apart, the i-th of which sees see(i): what is
    // found across the lanes of a row is found for all of them at once. `factors`: kTogether.
    template <class See>
    void weigh_together(long row, long rows, See see, long width, float* scores, long stride, Element* weights,
                        float* factors) {
        const Lanes there = lanes(rows);
        const Vector most_before = load(most_.data() + row, there), scale = repeat(scale_);
        Vector found[kTogether];
        for (Vector& each : found) each = repeat(-std::numeric_limits<float>::infinity());
        for (long i = 0; i < rows; i++) {
            cap(scores + i * stride, width);
            if (const Range seen = see(i); seen.first < seen.last) found[i] = most(scores + i * stride, seen, width);
        }
        const Vector largest = max(most_before, across(found, [](Vector a, Vector b) { return max(a, b); }));
        const Vector factor = exp2((most_before - largest) * scale);  // NaN, of rows that have seen nothing, becomes 0
        store(factors, factor);
        alignas(64) float shifts[kTogether];
        store(shifts, largest * scale);
        for (Vector& each : found) each = repeat(0.0f);
        for (long i = 0; i < rows; i++) {
            const Range seen = see(i);
            if (seen.first < seen.last) found[i] = spread(scores + i * stride, seen, width, shifts[i], weights + i * stride);
            else std::fill_n(weights + i * stride, width, Element(0));
        }
        const Vector total = across(found, [](Vector a, Vector b) { return a + b; });
        store(total_.data() + row, fma(load(total_.data() + row, there), factor, total), there);
        store(most_.data() + row, largest, there);
    }

private:
    void cap(float* scores, long width) const {
        for (long i = 0; bound_ != 0.0f && i < width; i += 16) store(scores + i, capped(load(scores + i), bound_));
    }

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

    // The largest scores of those that a row sees.
    static Vector most(const float* scores, Range seen, long width) {
        return sees_all(seen, width) ? most<true>(scores, seen, width) : most<false>(scores, seen, width);
    }

    static bool sees_all(Range seen, long width) { return seen.first == 0 && seen.last == width; }

    template <bool ALL>
    static Vector most(const float* scores, Range seen, long width) {
        Vector most[kTurns];
        for (Vector& each : most) each = repeat(-std::numeric_limits<float>::infinity());
        in_turns(width, [&](long i, int turn) __attribute__((always_inline)) {
            const Vector larger = max(most[turn], load(scores + i));
            most[turn] = ALL ? larger : select(visible(seen, i), larger, most[turn]);
        });
        return max(max(most[0], most[1]), max(most[2], most[3]));
    }

    // The weights, and what they come to, relative to the largest score, which has been scaled.
    Vector spread(const float* scores, Range seen, long width, float largest, Element* weights) const {
        return sees_all(seen, width) ? spread<true>(scores, seen, width, largest, weights)
                                     : spread<false>(scores, seen, width, largest, weights);
    }

    template <bool ALL>
    Vector spread(const float* scores, Range seen, long width, float largest, Element* weights) const {
        const Vector scale = repeat(scale_), shift = repeat(largest);
        Vector total[kTurns];
        for (Vector& each : total) each = repeat(0.0f);
        const auto weigh = [&](long i, int turn) __attribute__((always_inline)) {
            Vector weight = exp2_rough(fms(load(scores + i), scale, shift));
            if (!ALL) weight = select(visible(seen, i), weight, repeat(0.0f));
            total[turn] = total[turn] + weight;
            return weight;
        };
        for (long i = 0; i < width; i += 16 * kTurns) {
#pragma GCC unroll 2
            for (int turn = 0; turn < kTurns; turn += 2) {
                const long at = i + 16 * turn;
                if (at >= width) break;
                const Vector one = weigh(at, turn);
                if (at + 16 < width) store(weights + at, one, weigh(at + 16, turn + 1));
                else store(weights + at, one);
            }
        }
        return (total[0] + total[1]) + (total[2] + total[3]);
    }

    const float scale_, bound_;
    std::vector<float> most_, total_;
};
