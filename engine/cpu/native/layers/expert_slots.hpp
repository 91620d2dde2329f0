// Which experts rows take, as slots: what rows ask of experts, expert after expert, row after row. And what is computed of
// them in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layers/model.hpp"
#include "layers/panel.hpp"

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
    const Mlp* mlp;
    long first, count;
};

// Which experts the rows take: one thread's own copy.
class Grouping {
public:
    // `shared`: each row's weight of the shared expert, which is 1 where it has no gate; `factor`: of all weights, but of
    // those of thinner rows. `adapters`: the slot of each row's; null: no row has one.
    void set(const Experts& e, const Choice* chosen, const float* shared, float factor, long rows,
             const std::int32_t* adapters) {
        const float routed = e.before.weight.columns > 0 ? 1.0f : factor;
        parts.clear();
        row.clear();
        weight.clear();
        seen.clear();
        adapter.clear();
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
        if (e.scales_inputs) seen.resize(row.size());
        for (long i = 0; i < rows * e.num_chosen; i++) {
            const Choice& choice = chosen[i];
            if (choice.place < 0) continue;
            const long slot = starts_[choice.place]++;
            row[slot] = std::int32_t(i / e.num_chosen);
            weight[slot] = e.scales_inputs ? routed : choice.weight * routed;
            if (e.scales_inputs) seen[slot] = choice.weight;
        }
        num_routed = long(row.size());
        if (e.shared != nullptr) {
            parts.push_back({e.shared, long(row.size()), rows});
            for (long i = 0; i < rows; i++) {
                row.push_back(std::int32_t(i));
                weight.push_back(e.shared_gate == nullptr ? factor : shared[i] * factor);
            }
        }
        if (adapters == nullptr) return;
        for (const std::int32_t i : row) adapter.push_back(adapters[i]);
    }

    // Of the slots from `first` on.
    const std::int32_t* adapters_from(long first) const { return adapter.empty() ? nullptr : adapter.data() + first; }

    std::vector<Slots> parts;  // of experts that a row takes, in order
    long num_routed = 0;       // slots of experts that rows choose, which come before the shared one's
    std::vector<std::int32_t> row;
    std::vector<float> weight;  // of each slot
    std::vector<float> seen;    // what an expert sees of a slot is multiplied by it, of those that rows choose; empty: 1
    std::vector<std::int32_t> adapter;  // the slot in the engine's adapters; empty: no row has one

private:
    std::vector<long> starts_;
};

// What threads share, for a number of rows.
struct ExpertMemory {
    // `narrowed_size`: what adapters make of a slot; 0: no row has one.
    void reserve(long rows, const Strides& s, long num_chosen, long narrowed_size) {
        const long slots = rows * (num_chosen + 1);
        if (long(chosen.size()) < rows * num_chosen) chosen.resize(rows * num_chosen);
        if (long(shared.size()) < rows) shared.resize(rows);
        if (long(normed.size()) < rows * s.normed) normed.resize(rows * s.normed);
        if (long(thin.size()) < rows * s.thin) thin.resize(rows * s.thin);
        if (long(thin_sums.size()) < rows * s.thin_sums) thin_sums.resize(rows * s.thin_sums);
        if (long(gate_up.size()) < slots * s.gate_up) gate_up.resize(slots * s.gate_up);
        if (long(activated.size()) < slots * s.activated) activated.resize(slots * s.activated);
        if (long(narrowed.size()) < slots * narrowed_size) narrowed.resize(slots * narrowed_size);
    }
    std::vector<Choice> chosen;
    std::vector<float> shared;  // each row's weight of the shared expert, where that has a gate
    Lines<Element> normed, thin, activated, narrowed;  // padding of the first two stays zero
    Lines<float> gate_up, thin_sums;
};

// One thread's own.
struct ExpertScratch {
    Grouping grouping;
    Lines<Element> inputs;
    Lines<float> logits;
    std::vector<float> ranked, worth;
    std::vector<char> is_out;
};
