// Where a layer's state lies in a block (models/parts/states.py): the states of all layers stand one behind another in the
// block's pages of states, whatever a page's size, so that one may begin in a page and end in another.
//
//     [how many tokens it is of] [the last tokens' rows, in the order of kinds] [each value head's memory: key_dim rows]
#pragma once

#include <algorithm>
#include <cstdint>

#include "model.hpp"

class StatePlace {
public:
    StatePlace(const Model& m, const DeltaNet& w, std::int32_t block)
        : block_(m.state_pages + block * m.page_bytes), stride_(m.state_page_stride),
          page_size_(m.page_bytes / long(sizeof(float))), first_(w.index * w.state_size()) {}

    // job(place, offset, count) for each part of `count` numbers of the state, from its number `at` on, that stands in one
    // page; `offset`: within the `count`.
    template <class Job>
    void each(long at, long count, Job job) const {
        for (long offset = 0; offset < count;) {
            const long number = first_ + at + offset, page = number / page_size_, within = number % page_size_;
            const long part = std::min(count - offset, page_size_ - within);
            job((float*)(block_ + page * stride_) + within, offset, part);
            offset += part;
        }
    }

    void read(long at, long count, float* target) const {
        each(at, count, [&](const float* place, long offset, long part) { std::copy_n(place, part, target + offset); });
    }

    void write(long at, long count, const float* source) const {
        each(at, count, [&](float* place, long offset, long part) { std::copy_n(source + offset, part, place); });
    }

    // Of how many tokens it is: as float32, as all of it.
    float num_tokens() const {
        float found;
        read(0, 1, &found);
        return found;
    }

private:
    char* const block_;
    const long stride_, page_size_, first_;
};
