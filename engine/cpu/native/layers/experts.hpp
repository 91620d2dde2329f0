// The experts of a sparse layer: y += factor * sum of weight * expert(norm(x)) over those that a row chooses, and the shared
// one. Some models' gates see rows by a norm of their own.
//
//   each row:  norm -> gate -> its experts, in their order
//   slots:     what rows ask of experts, expert after expert, row after row: an expert's are rows of a product
//   together:  gate and up of all slots -> activation -> down, added to y expert after expert
//   thin:      some models' routed experts see rows that one product makes thinner, and another makes their sums wide again
//
// What an adapter has for an expert is added to the expert's own products, slot by slot.
//
// Threads share out rows, then the columns of all experts, and meet three times. An expert that no row chose is not
// read. A row's sums are those of its own experts in their order, whatever other rows there are.
#pragma once

#include <algorithm>
#include <vector>

#include "layers/expert_choice.hpp"
#include "layers/expert_slots.hpp"
#include "layers/panel.hpp"

class ExpertMath {
public:
    ExpertMath(const Model& model, const Strides& strides, const PanelMath& math)
        : s_(strides), math_(math), choice_(model, math) {}

    // What `by` (team.hpp) does of it; x may be y. `adapters`: the slot of each row's; null: no row has one. `common`: what
    // `by` share.
    template <class By>
    void add(const Experts& e, const float* x, float* y, float factor, long rows, ExpertMemory& all,
             ExpertScratch& own, Panel& common, By& by, const std::int32_t* adapters) const {
        const Range mine = by.part(rows);
        for (long first = mine.first; first < mine.last; first += kPanelRows) {
            const long count = std::min(kPanelRows, mine.last - first);
            Element* normed = all.normed.data() + first * s_.normed;
            math_.normalize(x + first * s_.hidden, count, e.gate_norm == nullptr ? e.norm : e.gate_norm, normed);
            const Rows inputs{normed, s_.normed, count};
            choice_.choose(e, inputs, all.chosen.data() + first * e.num_chosen, own);
            if (e.gate_norm != nullptr) math_.normalize(x + first * s_.hidden, count, e.norm, normed);
            if (e.shared_gate != nullptr) choice_.weigh_shared(e, inputs, all.shared.data() + first);
        }
        by.meet();
        const Grouping& grouping = own.grouping;
        own.grouping.set(e, all.chosen.data(), all.shared.data(), factor, rows, adapters);
        if (e.taken != nullptr && mine.first == 0 && mine.last > 0) count_taken(e, all.chosen.data(), rows);
        const bool are_thin = e.before.weight.columns > 0;
        if (are_thin) make_thin(e, rows, all, common, by, adapters);
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
            const bool is_thin = are_thin && slots.first < grouping.num_routed;
            float* const sums_of = is_thin ? all.thin_sums.data() : y;
            const long stride = is_thin ? s_.thin_sums : s_.hidden;
            const Rows inputs{all.activated.data() + slots.first * s_.activated, s_.activated, slots.count};
            multiply(inputs, down.weight, mine, [&](long index, long column, const float* sums) {
                const long slot = slots.first + index;
                const Vector weight = repeat(grouping.weight[slot]);
                float* const target = sums_of + grouping.row[slot] * stride + column;
                store(target, fma(with_bias(sums, down.bias, column, down.weight.columns), weight, load(target)));
            });
            if (adapters != nullptr) adapt_down(grouping, slots, mine.tiles, all, sums_of, stride);
        }
        by.meet();
        if (are_thin) add_wide(e, y, factor, rows, all, common, by, adapters);
    }

private:
    // Rows that routed experts see, and zeros where their sums will be, when all have met.
    template <class By>
    void make_thin(const Experts& e, long rows, ExpertMemory& all, Panel& common, By& by, const std::int32_t* adapters) const {
        const Rows normed{all.normed.data(), s_.normed, rows, adapters};
        for (long first = 0; first < rows; first += kPanelRows) {
            const Rows panel = normed.from(first, std::min(kPanelRows, rows - first));
            float* const target = all.thin_sums.data() + first * s_.thin_sums;
            math_.set(target, s_.thin_sums, panel, e.before, by);
            math_.adapt(target, s_.thin_sums, panel, e.before, common, by);
            by.meet();
        }
        take_sums(e, all, by.part(rows));
        by.meet();
    }

    // y += `factor` times what is made of the routed experts' sums, whole when all have met, as they have.
    template <class By>
    void add_wide(const Experts& e, float* y, float factor, long rows, ExpertMemory& all, Panel& common, By& by,
                  const std::int32_t* adapters) const {
        take_sums(e, all, by.part(rows));
        by.meet();
        const Rows sums{all.thin.data(), s_.thin, rows, adapters};
        for (long first = 0; first < rows; first += kPanelRows) {
            const Rows panel = sums.from(first, std::min(kPanelRows, rows - first));
            math_.add_adapted(y + first * s_.hidden, panel, e.behind, factor, common, by);
            by.meet();
        }
    }

    // Some rows' sums to elements, and zeros in their place.
    void take_sums(const Experts& e, ExpertMemory& all, Range rows) const {
        const long size = e.before.weight.columns;
        for (long row = rows.first; row < rows.last; row++) {
            float* const sums = all.thin_sums.data() + row * s_.thin_sums;
            for (long i = 0; i < size; i += 16) {
                const Lanes mask = lanes(size - i);
                store(all.thin.data() + row * s_.thin + i, load(sums + i, mask), mask);
            }
            std::fill_n(sums, s_.thin_sums, 0.0f);
        }
    }

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

    void adapt_down(const Grouping& grouping, const Slots& slots, Range tiles, ExpertMemory& all, float* y,
                    long stride) const {
        const Adapters* adapters = slots.mlp->down.adapters;
        const std::int32_t* of_slots = grouping.adapters_from(slots.first);
        if (!has_adapted(adapters, of_slots, slots.count)) return;
        constexpr long kStrips = kTileColumns / kStrip;
        const Range strips{tiles.first * kStrips, std::min(tiles.last * kStrips, num_strips(adapters->parts[0]))};
        widen_strips({nullptr, 0, slots.count, of_slots}, *adapters, 0, strips, narrowed(*adapters, slots.first, all),
                     [&](long row, long column, Lanes mask, Vector sums) {
                         const long slot = slots.first + row;
                         float* place = y + grouping.row[slot] * stride + column;
                         store(place, fma(sums, repeat(grouping.weight[slot]), load(place, mask)), mask);
                     });
    }

    Rows gather(const Grouping& grouping, const Slots& slots, const ExpertMemory& all, ExpertScratch& own) const {
        const std::int32_t* rows = grouping.row.data() + slots.first;
        const bool is_routed = slots.first < grouping.num_routed, is_weighed = is_routed && !grouping.seen.empty();
        const bool is_thin = is_routed && s_.thin > 0;
        const Element* const seen = is_thin ? all.thin.data() : all.normed.data();
        const long stride = is_thin ? s_.thin : s_.normed;
        if (!is_weighed && rows[slots.count - 1] - rows[0] + 1 == slots.count) {  // neighbours
            return {seen + rows[0] * stride, stride, slots.count};
        }
        if (long(own.inputs.size()) < slots.count * stride) own.inputs.resize(slots.count * stride);
        for (long i = 0; i < slots.count; i++) {
            Element* const input = own.inputs.data() + i * stride;
            std::copy_n(seen + rows[i] * stride, stride, input);
            if (!is_weighed) continue;
            const Vector by = repeat(grouping.seen[slots.first + i]);
            for (long at = 0; at < stride; at += 16) store(input + at, load(input + at) * by);
        }
        return {own.inputs.data(), stride, slots.count};
    }

    static void count_taken(const Experts& e, const Choice* chosen, long rows) {
        for (long i = 0; i < rows * e.num_chosen; i++) e.taken[chosen[i].expert]++;
    }

    const Strides& s_;
    const PanelMath& math_;
    const ExpertChoice choice_;
};
