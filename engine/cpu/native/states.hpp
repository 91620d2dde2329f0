// Where a layer's state lies in a block (models/parts/states.py): in runs, each in one page, of which Python tells the layer
// (engine/cpu/state_runs.py). Its numbers are known by their place in it, whatever runs they stand in:
//
//     [how many tokens it is of] [the last tokens' rows, in the order of kinds] [each value head's memory: key_dim rows]
#pragma once

#include <algorithm>
#include <cstdint>

#include "model.hpp"

class StatePlace {
public:
    StatePlace(const Model& m, const StateRuns& runs, std::int32_t block)
        : block_(m.state_pages + block * m.page_bytes), runs_(runs) {}

    // job(place, offset, count) for each part of `count` numbers of the state, from its number `at` on, that stands in one
    // run; `offset`: within the `count`.
    template <class Job>
    void each(long at, long count, Job job) const {
        const StateRun* run = std::upper_bound(runs_.runs, runs_.runs + runs_.num_runs, at,
                                               [](long number, const StateRun& one) { return number < one.at; }) - 1;
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

    // Of how many tokens it is: as float32, as all of it.
    float num_tokens() const {
        float found;
        read(0, 1, &found);
        return found;
    }

private:
    float* place_of(const StateRun& run) const { return (float*)(block_ + run.place); }

    char* const block_;
    const StateRuns& runs_;
};
