// Which experts rows take, and with which weights: as `Gate` and `Replicas` in engine/nn/experts.py choose.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "layers/expert_slots.hpp"
#include "layers/panel.hpp"

class ExpertChoice {
public:
    ExpertChoice(const Model& model, const PanelMath& math) : m_(model), math_(math) {}

    // `chosen`: of each row `num_chosen`, by their numbers.
    void choose(const Experts& e, const Rows& normed, Choice* chosen, ExpertScratch& own) const {
        const long stride = padded(e.num_experts, kTileColumns);
        own.logits.resize(kPanelRows * stride);
        Alone alone;
        math_.set(own.logits.data(), stride, normed, e.gate, alone);
        for (long row = 0; row < normed.count; row++) {
            choose_of_row(e, own.logits.data() + row * stride, chosen + row * e.num_chosen, own);
            if (e.copies != nullptr) share_out(e, normed.values + row * normed.stride, chosen + row * e.num_chosen);
        }
    }

    // How much of the shared expert each row takes: the sigmoid of its product with the gate.
    void weigh_shared(const Experts& e, const Rows& normed, float* weights) const {
        for (long row = 0; row < normed.count; row++) {
            const Element* const x = normed.values + row * normed.stride;
            Vector sums = repeat(0.0f);
            for (long i = 0; i < m_.hidden_size; i += 16) {
                const Lanes mask = lanes(m_.hidden_size - i);
                sums = fma(load(x + i, mask), load(e.shared_gate + i, mask), sums);
            }
            weights[row] = sigmoid(sum_of(sums));
        }
    }

private:
    // Of an expert that several ranks hold, one computes the row: as `Replicas` in engine/nn/experts.py does.
    void share_out(const Experts& e, const Element* normed, Choice* chosen) const {
        long positive = 0;
        for (long i = 0; i < m_.hidden_size; i++) positive += widened(normed[i]) > 0.0f;
        for (long i = 0; i < e.num_chosen; i++) {
            if (positive % e.copies[chosen[i].expert] != e.turn[chosen[i].expert]) chosen[i].place = -1;
        }
    }

    // As engine/nn/experts.py does; of equals the first. Whatever the logits are, each expert comes once.
    static void choose_of_row(const Experts& e, float* scores, Choice* chosen, ExpertScratch& own) {
        const long count = e.num_experts;
        if (e.is_sigmoid) {
            for (long i = 0; i < count; i++) scores[i] = sigmoid(scores[i]);
        } else {
            const float most = *std::max_element(scores, scores + count);
            float total = 0.0f;
            for (long i = 0; i < count; i++) total += scores[i] = std::exp(scores[i] - most);
            for (long i = 0; i < count; i++) scores[i] /= total;
        }
        own.ranked.assign(scores, scores + count);
        for (long i = 0; e.score_bias != nullptr && i < count; i++) own.ranked[i] += e.score_bias[i];
        own.is_out.assign(count, 0);
        if (e.num_groups > 1) leave_groups(e, own);
        float total = 0.0f;
        for (long i = 0; i < e.num_chosen; i++) {
            const long best = take_best(own.ranked, own.is_out);
            chosen[i] = {std::int32_t(best), e.place[best], scores[best]};
            total += scores[best];
        }
        const float factor = float(e.scale) / (e.is_normalised ? total + 1e-20f : 1.0f);
        for (long i = 0; i < e.num_chosen; i++) {
            chosen[i].weight *= e.weights == nullptr ? factor : factor * e.weights[chosen[i].expert];
        }
        std::sort(chosen, chosen + e.num_chosen, [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
    }

    // A group is worth its best expert or, with score biases, its best two.
    static void leave_groups(const Experts& e, ExpertScratch& own) {
        const long size = e.num_experts / e.num_groups;
        own.worth.resize(e.num_groups);
        for (long group = 0; group < e.num_groups; group++) {
            float best = -std::numeric_limits<float>::infinity(), second = best;
            for (long i = group * size; i < (group + 1) * size; i++) {
                const float value = own.ranked[i];
                if (value > best) second = best, best = value;
                else if (value > second) second = value;
            }
            own.worth[group] = e.score_bias == nullptr || size == 1 ? best : best + second;
        }
        std::vector<char> taken(e.num_groups, 0);
        for (long i = 0; i < e.num_chosen_groups; i++) take_best(own.worth, taken);
        for (long i = 0; i < e.num_experts; i++) own.is_out[i] = !taken[i / size];
    }

    static long take_best(const std::vector<float>& values, std::vector<char>& is_out) {
        long best = -1;
        for (long i = 0; i < long(values.size()); i++) {
            if (!is_out[i] && (best < 0 || values[i] > values[best])) best = i;
        }
        is_out[best] = 1;
        return best;
    }

    const Model& m_;
    const PanelMath& math_;
};
