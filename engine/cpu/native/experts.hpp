// The experts of a sparse layer: y += sum of weight * expert(norm(x)) over those that a row chooses, and the shared one.
//
//   each row:  norm -> gate -> its experts, in their order
//   slots:     what rows ask of experts, expert after expert, row after row: an expert's are rows of a product
//   together:  gate and up of all slots -> activation -> down, added to y expert after expert
//
// Threads share out rows, then the columns of all experts, and meet three times. An expert that no row chose is not
// read. A row's sums are those of its own experts in their order, whatever other rows there are.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "panel.hpp"

struct Choice {
    std::int32_t expert;
    std::int32_t place;  // in this rank's experts; -1: another one's
    float weight;
};

constexpr long kSlotBytes = 32 << 20;  // what gate and up of all slots may take: more rows at once read weights less often

// Rows that go through experts at once.
inline long expert_rows(const Model& m, const Strides& s) {
    long chosen = 1;
    for (long i = 0; i < m.num_layers; i++) {
        if (m.layers[i].experts != nullptr) chosen = std::max<long>(chosen, m.layers[i].experts->num_chosen + 1);
    }
    return std::max<long>(kPanelRows, kSlotBytes / (chosen * s.gate_up * long(sizeof(float))));
}

// An expert's slots.
struct Slots {
    const GatedMlp* mlp;
    long first, count;
};

// Which experts the rows take: one thread's own copy.
class Grouping {
public:
    void set(const Experts& e, const Choice* chosen, long rows) {
        parts.clear();
        row.clear();
        weight.clear();
        starts_.assign(e.count + 1, 0);
        for (long i = 0; i < rows * e.num_chosen; i++) {
            if (chosen[i].place >= 0) starts_[chosen[i].place + 1]++;
        }
        for (long i = 0; i < e.count; i++) {
            starts_[i + 1] += starts_[i];
            if (starts_[i] < starts_[i + 1]) parts.push_back({e.experts + i, starts_[i], starts_[i + 1] - starts_[i]});
        }
        row.resize(starts_[e.count]);
        weight.resize(row.size());
        for (long i = 0; i < rows * e.num_chosen; i++) {
            const Choice& choice = chosen[i];
            if (choice.place < 0) continue;
            const long slot = starts_[choice.place]++;
            row[slot] = std::int32_t(i / e.num_chosen);
            weight[slot] = choice.weight;
        }
        if (e.shared == nullptr) return;
        parts.push_back({e.shared, long(row.size()), rows});
        for (long i = 0; i < rows; i++) {
            row.push_back(std::int32_t(i));
            weight.push_back(1.0f);
        }
    }

    std::vector<Slots> parts;  // of experts that a row takes, in order
    std::vector<std::int32_t> row;
    std::vector<float> weight;  // of each slot

private:
    std::vector<long> starts_;
};

// What threads share, for a number of rows.
struct ExpertMemory {
    void reserve(long rows, const Strides& s, long num_chosen) {
        const long slots = rows * (num_chosen + 1);
        if (long(chosen.size()) < rows * num_chosen) chosen.resize(rows * num_chosen);
        if (long(normed.size()) < rows * s.normed) normed.resize(rows * s.normed);
        if (long(gate_up.size()) < slots * s.gate_up) gate_up.resize(slots * s.gate_up);
        if (long(activated.size()) < slots * s.activated) activated.resize(slots * s.activated);
    }
    std::vector<Choice> chosen;
    Lines<Element> normed, activated;  // padding of `normed` stays zero
    Lines<float> gate_up;
};

// One thread's own.
struct ExpertScratch {
    Grouping grouping;
    Lines<Element> inputs;
    Lines<float> logits;
    std::vector<float> ranked, worth;
    std::vector<char> is_out;
};

class ExpertMath {
public:
    ExpertMath(const Model& model, const Strides& strides, const PanelMath& math) : m_(model), s_(strides), math_(math) {}

    // What `by` (team.hpp) does of it; x may be y.
    template <class By>
    void add(const Experts& e, const Element* norm, const float* x, float* y, long rows, ExpertMemory& all,
             ExpertScratch& own, By& by) const {
        const Range mine = by.part(rows);
        for (long first = mine.first; first < mine.last; first += kPanelRows) {
            const long count = std::min(kPanelRows, mine.last - first);
            Element* normed = all.normed.data() + first * s_.normed;
            math_.normalize(x + first * s_.hidden, count, norm, normed);
            choose(e, {normed, s_.normed, count}, all.chosen.data() + first * e.num_chosen, own);
        }
        by.meet();
        const Grouping& grouping = own.grouping;
        own.grouping.set(e, all.chosen.data(), rows);
        if (e.taken != nullptr && mine.first == 0 && mine.last > 0) count_taken(e, all.chosen.data(), rows);
        add_gate_up(grouping, all, own, by);
        by.meet();
        for (const Slots& slots : grouping.parts) {
            const long inner = slots.mlp->gate_up.weight.columns / 2;
            math_.activate(e, all.gate_up.data() + slots.first * s_.gate_up, all.activated.data() + slots.first * s_.activated,
                           inner, slots.count, by.part(padded(inner, kTileInputs) / 16));
        }
        by.meet();
        for (const Slots& slots : grouping.parts) {  // a column's sums are one thread's: what experts add is added in order
            const Linear& down = slots.mlp->down;
            Some mine{by.part(down.weight.count())};
            const Rows inputs{all.activated.data() + slots.first * s_.activated, s_.activated, slots.count};
            multiply(inputs, down.weight, mine, [&](long index, long column, const float* sums) {
                const long slot = slots.first + index;
                const Vector weight = repeat(grouping.weight[slot]);
                float* target = y + grouping.row[slot] * s_.hidden + column;
                for (int i = 0; i < kTileColumns; i += 16) {
                    const Vector values = with_bias(sums + i, down.bias, column + i, down.weight.columns);
                    store(target + i, fma(values, weight, load(target + i)));
                }
            });
        }
        by.meet();
    }

private:
    // The columns of gate and up of all experts, one after the other, are shared out in tiles.
    template <class By>
    void add_gate_up(const Grouping& grouping, ExpertMemory& all, ExpertScratch& own, const By& by) const {
        long total = 0, before = 0;
        for (const Slots& slots : grouping.parts) total += slots.mlp->gate_up.weight.count();
        const Range mine = by.part(total);
        for (const Slots& slots : grouping.parts) {
            const Linear& gate_up = slots.mlp->gate_up;
            const long count = gate_up.weight.count();
            Some some{{std::max(0L, mine.first - before), std::min(count, mine.last - before)}};
            before += count;
            if (some.tiles.first >= some.tiles.last) continue;
            const Rows inputs = gather(grouping, slots, all, own);
            math_.set(all.gate_up.data() + slots.first * s_.gate_up, s_.gate_up, inputs, gate_up, some);
        }
    }

    Rows gather(const Grouping& grouping, const Slots& slots, const ExpertMemory& all, ExpertScratch& own) const {
        const std::int32_t* rows = grouping.row.data() + slots.first;
        const Element* normed = all.normed.data();
        if (rows[slots.count - 1] - rows[0] + 1 == slots.count) {  // neighbours
            return {normed + rows[0] * s_.normed, s_.normed, slots.count};
        }
        if (long(own.inputs.size()) < slots.count * s_.normed) own.inputs.resize(slots.count * s_.normed);
        for (long i = 0; i < slots.count; i++) {
            std::copy_n(normed + rows[i] * s_.normed, s_.normed, own.inputs.data() + i * s_.normed);
        }
        return {own.inputs.data(), s_.normed, slots.count};
    }

    static void count_taken(const Experts& e, const Choice* chosen, long rows) {
        for (long i = 0; i < rows * e.num_chosen; i++) e.taken[chosen[i].expert]++;
    }

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
            for (long i = 0; i < count; i++) scores[i] = 1.0f / (1.0f + std::exp(-scores[i]));
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
        for (long i = 0; i < e.num_chosen; i++) chosen[i].weight *= factor;
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
    const Strides& s_;
    const PanelMath& math_;
};
