// Where a layer's state lies in a block (models/parts/states.py): in runs, each in one page, of which Python tells the layer
// (engine/cpu/state_runs.py). Its numbers are known by their place in it, whatever runs they stand in:
//
//     [how many tokens it is of] [the last tokens' rows, in the order of kinds] [each head's memory, a matrix, row by row]
#pragma once

#include <algorithm>
#include <cstdint>

#include "layers/model.hpp"
#include "layers/step.hpp"

class StatePlace {
public:
    StatePlace(const Model& m, const StateRuns& runs, std::int32_t block)
        : block_(m.state_pages + block * m.page_bytes), runs_(runs) {}

    // job(place, offset, count) for each part of `count` numbers of the state, from its number `at` on, that stands in one
    // run; `offset`: within the `count`.
    template <class Job>
    void each(long at, long count, Job job) const {
        const StateRun* run = run_of(at);
        for (long offset = 0; offset < count; run++) {
            const long within = at + offset - run->at, part = std::min(count - offset, long(run->size) - within);
            job(place_of(*run) + within, offset, part);
            offset += part;
        }
    }

    void read(long at, long count, float* target) const {
        each(at, count, [&](const float* place, long offset, long part) { std::copy_n(place, part, target + offset); });
    }

    void write(long at, long count, const float* source) const {
        each(at, count, [&](float* place, long offset, long part) { std::copy_n(source + offset, part, place); });
        for (const StateRun* copy = runs_.copies; copy < runs_.copies + runs_.num_copies; copy++) {
            const long first = std::max(at, long(copy->at)), last = std::min(at + count, long(copy->at + copy->size));
            if (first < last) std::copy(source + first - at, source + last - at, place_of(*copy) + first - copy->at);
        }
    }

    // Where `count` numbers from `at` on stand, if they do in one run; else null. Nothing of them stands elsewhere besides.
    float* whole(long at, long count) const {
        const StateRun& run = *run_of(at);
        return at + count > run.at + run.size ? nullptr : place_of(run) + at - run.at;
    }

    // Of how many tokens it is: as float32, as all of it.
    float num_tokens() const {
        float found;
        read(0, 1, &found);
        return found;
    }

private:
    const StateRun* run_of(long at) const {
        const auto is_before = [](long number, const StateRun& run) { return number < run.at; };
        return std::upper_bound(runs_.runs, runs_.runs + runs_.num_runs, at, is_before) - 1;
    }

    float* place_of(const StateRun& run) const { return (float*)(block_ + run.place); }

    char* const block_;
    const StateRuns& runs_;
};

// The block with the state behind a row's first tokens, before position `position`.
inline StatePlace state_behind(const Model& m, const StateLayer& w, const Row& row, long position) {
    return {m, w.state, row.blocks[(position - 1) / m.block_size]};
}

// Calls job(first, last, is_left) for stretches of a row's new tokens, each within a block; at the ends of those that are no
// draft a state is left.
template <class Job>
void each_stretch(const Model& m, const Row& row, Job job) {
    const long known = row.known();
    for (long first = 0, last; first < row.length; first = last) {
        const long block_end = ((row.start + first) / m.block_size + 1) * m.block_size - row.start;
        last = std::min(first < known ? known : row.length, block_end);
        job(first, last, last <= known);
    }
}
