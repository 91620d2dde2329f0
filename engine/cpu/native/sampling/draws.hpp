// Draws a row's tokens from its logits, and tells of log-probabilities, in a few passes over the row. The rules are those of
// engine/sampling/draws.py; sums are float64 in an order of their own, so that every instruction set finds the same tokens.
//
//   allowed: -inf in place of the logits of tokens that may not come
//   weigh:   e^((logit - largest) / temperature)
//   keep:    zeros in place of the weights that min-p, top-k and top-p leave out
//   find:    the first token whose cumulative weight exceeds a share of the whole
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "machine/vectors.hpp"

// What is drawn from a row; declared once more in engine/cpu/described.py.
struct Draw {
    const float* logits;           // [vocabulary]
    const std::uint32_t* allowed;  // a bit for each token: it may come; null: all may
    const double* uniforms;        // [count] of [0, 1)
    std::int32_t* tokens;          // [count] get what is drawn; all -1 where the logits are no distribution
    double top_p;
    float temperature, min_p;
    std::int32_t count, top_k;  // 0: all tokens
};

// What is told of a row; declared once more in engine/cpu/described.py.
struct Report {
    const float* logits;  // [vocabulary]
    std::int32_t* best;   // [count] get the tokens of the largest logits, in their order, of equal ones the first
    double* total;        // gets the logarithm of the sum of all e^logit; NaN where the logits are no distribution
    std::int32_t* rank;   // gets how many tokens are as likely as `token`, itself among them; null: nobody asked
    std::int32_t count, token;
};

class RowSampler {
public:
    void draw(const Draw& row, long size) {
        weights_.resize(size);
        const float* logits = row.allowed == nullptr ? row.logits : allowed(row, size);
        const float most = largest(logits, size);
        if (!std::isfinite(most / row.temperature)) {
            std::fill_n(row.tokens, row.count, -1);
            return;
        }
        weigh(logits, size, most, row.temperature);
        if (const float least = least_kept(row); least > 0.0f) {
            for (float& weight : weights_) weight = weight >= least ? weight : 0.0f;
            add_up();
        }
        for (long i = 0; i < row.count; i++) row.tokens[i] = std::int32_t(find(row.uniforms[i]));
    }

    void report(const Report& row, long size) {
        weights_.resize(size);
        const float most = largest(row.logits, size);
        if (std::isfinite(most)) weigh(row.logits, size, most, 1.0f);
        *row.total = std::isfinite(most) ? double(most) + std::log(total()) : std::numeric_limits<double>::quiet_NaN();
        find_best(row, size);
        if (row.rank != nullptr) *row.rank = rank_of(row, size);
    }

private:
    static constexpr float kNever = -std::numeric_limits<float>::infinity();
    static constexpr long kBlock = 256;

    static std::uint32_t bits_of(float value) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        return bits;
    }

    // The logits, in the weights' place, of which they become the weights.
    const float* allowed(const Draw& row, long size) {
        for (long first = 0; first < size; first += 32) {
            const std::uint32_t word = row.allowed[first / 32];
            const float* logits = row.logits + first;
            const long count = std::min(32L, size - first);
            if (word == 0) {
                std::fill_n(&weights_[first], count, kNever);
            } else if (word == ~std::uint32_t(0)) {
                std::copy_n(logits, count, &weights_[first]);
            } else {
                for (long i = 0; i < count; i++) weights_[first + i] = word >> i & 1 ? logits[i] : kNever;
            }
        }
        return weights_.data();
    }

    // NaN where one is among them.
    static float largest(const float* logits, long size) {
        Vector most[4];
        for (Vector& each : most) each = repeat(kNever);
        long i = 0;
        for (; i + 64 <= size; i += 64) {
#pragma GCC unroll 4
            for (int turn = 0; turn < 4; turn++) most[turn] = max(most[turn], load(logits + i + 16 * turn));
        }
        float found = max_of(max(max(most[0], most[1]), max(most[2], most[3])));
        for (; i < size; i++) found = std::max(found, logits[i]);
        std::uint32_t most_bits = 0;
        for (i = 0; i < size; i++) most_bits = std::max(most_bits, bits_of(logits[i]) & 0x7fffffff);
        return most_bits > 0x7f800000 ? std::numeric_limits<float>::quiet_NaN() : found;
    }

    // Of logits without NaN, of which none is above `most`.
    void weigh(const float* logits, long size, float most, float temperature) {
        const Vector shift = repeat(most), scale = repeat(kLog2E / temperature);
        long i = 0;
        for (; i + 16 <= size; i += 16) store(&weights_[i], exp2((load(logits + i) - shift) * scale));
        if (i < size) {
            float rest[16];
            std::fill_n(rest, 16, kNever);
            std::copy(logits + i, logits + size, rest);
            store(rest, exp2((load(rest) - shift) * scale));
            std::copy_n(rest, size - i, &weights_[i]);
        }
        add_up();
    }

    // The sums of the weights up to each block's end.
    void add_up() {
        const float* weights = weights_.data();
        const long size = long(weights_.size());
        sums_.clear();
        double before = 0.0;
        for (long first = 0; first < size; first += kBlock) {
            double lanes[16] = {};
            const long end = std::min(first + kBlock, size);
            long i = first;
            for (; i + 16 <= end; i += 16) {
                for (int lane = 0; lane < 16; lane++) lanes[lane] += double(weights[i + lane]);
            }
            for (; i < end; i++) lanes[i % 16] += double(weights[i]);
            for (int half = 8; half > 0; half /= 2) {
                for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
            }
            sums_.push_back(before += lanes[0]);
        }
    }

    double total() const { return sums_.back(); }

    // The least weight that no filter leaves out; those that are equal to it stay, too. 0: all stay.
    float least_kept(const Draw& row) {
        const bool has_top_k = row.top_k > 0 && row.top_k < long(weights_.size());
        float least = std::max(row.min_p, 0.0f);  // the largest weight is 1
        if (!has_top_k && row.top_p >= 1.0) return least;
        double mass = total();  // that top-p is a share of
        if (least > 0.0f) {
            mass = count(least).sum;
        } else {
            for (const double floor : {1e-3, 1e-5, 0.0}) {  // as there: most of a vocabulary need not be looked at
                const Bucket taken = count(float(floor * mass));
                if (has_top_k ? taken.number >= row.top_k : taken.sum >= row.top_p * mass) break;
            }
        }
        if (has_top_k) {
            least = std::max(least, least_of(least, {row.top_k, std::numeric_limits<double>::infinity()}));
            if (row.top_p >= 1.0) return least;
            mass = count(least).sum;
        }
        return std::max(least, least_of(least, {std::numeric_limits<long>::max(), row.top_p * mass}));
    }

    // How many weights, and their sum.
    struct Bucket {
        long number = 0;
        double sum = 0.0;
    };

    // What is yet to be taken: so many weights, or such a sum.
    struct Left {
        long number;
        double sum;

        bool ends_with(long more, double weight) {
            number -= more;
            sum -= weight;
            return number <= 0 || sum <= 0.0;
        }
    };

    // Weights stand in buckets by their size, parts of an octave: where a filter ends is in one, and no other need be sorted.
    static constexpr int kBucketBits = 17;
    static constexpr long kBuckets = (0x3f800000 >> kBucketBits) + 1;  // of weights up to 1

    static long bucket_of(float weight) { return long(bits_of(weight) >> kBucketBits); }

    // Puts those that are no less, and not 0, into their buckets; returns what all have.
    Bucket count(float least) {
        buckets_.assign(kBuckets, {});
        Bucket all;
        for (const float weight : weights_) {
            if (weight < least || weight == 0.0f) continue;
            for (Bucket* bucket : {&buckets_[bucket_of(weight)], &all}) {
                bucket->number++;
                bucket->sum += double(weight);
            }
        }
        return all;
    }

    // The last weight that is taken, from the largest on, of those in buckets and no less than `least`; 0: all are.
    float least_of(float least, Left left) {
        for (long index = kBuckets - 1; index >= 0; index--) {
            Left before = left;
            if (!left.ends_with(buckets_[index].number, buckets_[index].sum)) continue;
            inside_.clear();
            for (const float weight : weights_) {
                if (weight >= least && bucket_of(weight) == index) inside_.push_back(weight);
            }
            std::sort(inside_.begin(), inside_.end(), std::greater<float>());
            for (const float weight : inside_) {
                if (before.ends_with(1, double(weight))) return weight;
            }
            return inside_.empty() ? 0.0f : inside_.back();
        }
        return 0.0f;
    }

    long find(double uniform) const {
        const double point = std::min(uniform * total(), std::nextafter(total(), 0.0));
        const long block = std::upper_bound(sums_.begin(), sums_.end(), point) - sums_.begin();
        const long first = block * kBlock, end = std::min(first + kBlock, long(weights_.size()));
        double sum = block == 0 ? 0.0 : sums_[block - 1];
        long last = first;  // that has a weight
        for (long i = first; i < end; i++) {
            if (weights_[i] == 0.0f) continue;
            last = i;
            if ((sum += double(weights_[i])) > point) break;
        }
        return last;
    }

    static void find_best(const Report& row, long size) {
        long found = 0;
        float least = kNever;
        for (long first = 0; first < size && row.count > 0; first += 16) {
            const long end = std::min(first + 16, size);
            if (end - first == 16 && !(max_of(load(row.logits + first)) > least)) continue;
            for (long i = first; i < end; i++) {
                if (!(row.logits[i] > least)) continue;
                long at = found < row.count ? found++ : found - 1;
                for (; at > 0 && row.logits[row.best[at - 1]] < row.logits[i]; at--) row.best[at] = row.best[at - 1];
                row.best[at] = std::int32_t(i);
                if (found == row.count) least = row.logits[row.best[found - 1]];
            }
        }
        for (std::int32_t i = 0; found < row.count; i++) {  // what is left has no weight
            if (std::find(row.best, row.best + found, i) == row.best + found) row.best[found++] = i;
        }
    }

    // By the log-probabilities that are told, of which some are equal where logits are not. 0: there are none.
    static std::int32_t rank_of(const Report& row, long size) {
        const double total = *row.total;
        const float own = float(double(row.logits[row.token]) - total);
        std::int32_t rank = 0;
        for (long i = 0; i < size; i++) rank += float(double(row.logits[i]) - total) >= own;
        return rank;
    }

    std::vector<float> weights_, inside_;
    std::vector<double> sums_;
    std::vector<Bucket> buckets_;
};
