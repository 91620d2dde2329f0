// The experts of a sparse layer: y += factor * sum of weight * expert(norm(x)) over those that a row chooses, and the shared
// one.
//
//   each row:  norm -> gate -> its experts, in their order
//   slots:     what rows ask of experts, expert after expert, row after row: an expert's are rows of a product
//   together:  gate and up of all slots -> activation -> down, added to y expert after expert
//
// What an adapter has for an expert is added to the expert's own products, slot by slot.
//
// Threads share out rows, then the columns of all experts, and meet three times. An expert that no row chose is not
// read. A row's sums are those of its own experts in their order, whatever other rows there are.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "layers/expert_slots.hpp"
#include "layers/panel.hpp"

class ExpertMath {
public:
    ExpertMath(const Model& model, const Strides& strides, const PanelMath& math) : m_(model), s_(strides), math_(math) {}

    // What `by` (team.hpp) does of it; x may be y. `adapters`: the slot of each row's; null: no row has one.
    template <class By>
    void add(const Experts& e, const Element* norm, const float* x, float* y, float factor, long rows, ExpertMemory& all,
             ExpertScratch& own, By& by, const std::int32_t* adapters) const {
        const Range mine = by.part(rows);
        for (long first = mine.first; first < mine.last; first += kPanelRows) {
            const long count = std::min(kPanelRows, mine.last - first);
            Element* normed = all.normed.data() + first * s_.normed;
            math_.normalize(x + first * s_.hidden, count, norm, normed);
            const Rows inputs{normed, s_.normed, count};
            choose(e, inputs, all.chosen.data() + first * e.num_chosen, own);
            if (e.shared_gate != nullptr) weigh_shared(e, inputs, all.shared.data() + first);
        }
        by.meet();
        const Grouping& grouping = own.grouping;
        own.grouping.set(e, all.chosen.data(), all.shared.data(), factor, rows, adapters);
        if (e.taken != nullptr && mine.first == 0 && mine.last > 0) count_taken(e, all.chosen.data(), rows);
        add_gate_up(grouping, all, own, by);
        if (adapters != nullptr) narrow(grouping, &Mlp::gate_up, all, own, by);
        by.meet();
        for (const Slots& slots : grouping.parts) {
            const long inner = math_.inner_of(*slots.mlp);
            const Range vectors = by.part(padded(inner, kTileInputs) / 16);
            if (adapters != nullptr) adapt_gate_up(grouping, slots, vectors, all);
            math_.activate(e, all.gate_up.data() + slots.first * s_.gate_up, all.activated.data() + slots.first * s_.activated,
                           inner, slots.count, vectors);
        }
        by.meet();
        if (adapters != nullptr && has_adapted_down(grouping)) {
            narrow(grouping, &Mlp::down, all, own, by);
            by.meet();
        }
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
            if (adapters != nullptr) adapt_down(grouping, slots, mine.tiles, all, y);
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

    // x A^T of slots that are shared out, of gate and up or of down.
    template <class By>
    void narrow(const Grouping& grouping, Linear Mlp::*which, ExpertMemory& all, ExpertScratch& own,
                const By& by) const {
        const Range mine = by.part(long(grouping.row.size()));
        for (const Slots& slots : grouping.parts) {
            const long first = std::max(slots.first, mine.first), last = std::min(slots.first + slots.count, mine.last);
            if (first >= last) continue;
            const Slots some{slots.mlp, first, last - first};
            const Adapters* adapters = (slots.mlp->*which).adapters;
            if (!has_adapted(adapters, grouping.adapters_from(first), some.count)) continue;
            Rows inputs = which == &Mlp::down
                              ? Rows{all.activated.data() + first * s_.activated, s_.activated, some.count}
                              : gather(grouping, some, all, own);
            inputs.slots = grouping.adapters_from(first);
            narrow_rows(inputs, *adapters, narrowed(*adapters, first, all), Alone());
        }
    }

    static Element* narrowed(const Adapters& adapters, long slot, ExpertMemory& all) {
        return all.narrowed.data() + slot * adapters.num_parts * adapters.max_rank;
    }

    // To what is activated next: these vectors of gate's and of up's columns.
    void adapt_gate_up(const Grouping& grouping, const Slots& slots, Range vectors, ExpertMemory& all) const {
        const Adapters* adapters = slots.mlp->gate_up.adapters;
        const std::int32_t* of_slots = grouping.adapters_from(slots.first);
        if (!has_adapted(adapters, of_slots, slots.count)) return;
        float* const y = all.gate_up.data() + slots.first * s_.gate_up;
        const Element* inputs = narrowed(*adapters, slots.first, all);
        for (long index = 0; index < adapters->num_parts; index++) {
            const Range strips{vectors.first, std::min(vectors.last, num_strips(adapters->parts[index]))};
            widen_strips({nullptr, 0, slots.count, of_slots}, *adapters, index, strips, inputs,
                         [&](long row, long column, Lanes mask, Vector sums) {
                             float* place = y + row * s_.gate_up + column;
                             store(place, load(place, mask) + sums, mask);
                         });
        }
    }

    bool has_adapted_down(const Grouping& grouping) const {
        return std::any_of(grouping.parts.begin(), grouping.parts.end(), [&](const Slots& slots) {
            return has_adapted(slots.mlp->down.adapters, grouping.adapters_from(slots.first), slots.count);
        });
    }

    void adapt_down(const Grouping& grouping, const Slots& slots, Range tiles, ExpertMemory& all, float* y) const {
        const Adapters* adapters = slots.mlp->down.adapters;
        const std::int32_t* of_slots = grouping.adapters_from(slots.first);
        if (!has_adapted(adapters, of_slots, slots.count)) return;
        constexpr long kStrips = kTileColumns / kStrip;
        const Range strips{tiles.first * kStrips, std::min(tiles.last * kStrips, num_strips(adapters->parts[0]))};
        widen_strips({nullptr, 0, slots.count, of_slots}, *adapters, 0, strips, narrowed(*adapters, slots.first, all),
                     [&](long row, long column, Lanes mask, Vector sums) {
                         const long slot = slots.first + row;
                         float* place = y + grouping.row[slot] * s_.hidden + column;
                         store(place, fma(sums, repeat(grouping.weight[slot]), load(place, mask)), mask);
                     });
    }

    Rows gather(const Grouping& grouping, const Slots& slots, const ExpertMemory& all, ExpertScratch& own) const {
        const std::int32_t* rows = grouping.row.data() + slots.first;
        const Element* normed = all.normed.data();
        const bool is_weighed = slots.first < long(grouping.seen.size());  // not the shared one's
        if (!is_weighed && rows[slots.count - 1] - rows[0] + 1 == slots.count) {  // neighbours
            return {normed + rows[0] * s_.normed, s_.normed, slots.count};
        }
        if (long(own.inputs.size()) < slots.count * s_.normed) own.inputs.resize(slots.count * s_.normed);
        for (long i = 0; i < slots.count; i++) {
            Element* const input = own.inputs.data() + i * s_.normed;
            std::copy_n(normed + rows[i] * s_.normed, s_.normed, input);
            if (!is_weighed) continue;
            const Vector by = repeat(grouping.seen[slots.first + i]);
            for (long at = 0; at < s_.normed; at += 16) store(input + at, load(input + at) * by);
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
