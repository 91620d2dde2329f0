// A head's memory beside the core that changes it: a matrix, whose columns do not meet, in panels of columns that stay near for
// many tokens.
#pragma once

#include <algorithm>

#include "layers/states.hpp"
#include "machine/vectors.hpp"

constexpr long kPanelColumns = 32;  // with 128 rows a panel is 16 KiB, half of the nearest cache

// One row of a panel: two vectors, whatever the set.
struct PanelRow {
    Vector low, high;

    static PanelRow zeros() { return {repeat(0.0f), repeat(0.0f)}; }
    static PanelRow of(const float* place) { return {load(place), load(place + 16)}; }
    // Of a panel with so many columns, 16 or more: zeros in place of those that it lacks.
    static PanelRow of(const float* place, long columns) {
        return {load(place), columns < kPanelColumns ? repeat(0.0f) : load(place + 16)};
    }
    void put(float* place) const { store(place, low), store(place + 16, high); }
    void put(float* place, long columns) const {
        store(place, low);
        if (columns >= kPanelColumns) store(place + 16, high);
    }
    void add(const PanelRow& row, float factor) {
        const Vector by = repeat(factor);
        low = fma(row.low, by, low), high = fma(row.high, by, high);
    }
    PanelRow times(Vector by) const { return {low * by, high * by}; }
    PanelRow times(const PanelRow& by) const { return {low * by.low, high * by.high}; }
};

// A row of a memory, times `by`, and what a token writes to it; it is left in `to`, which may be where it comes from.
inline PanelRow change(const float* from, float* to, Vector by, const PanelRow& written, float key) {
    PanelRow kept = PanelRow::of(from).times(by);
    kept.add(written, key);
    kept.put(to);
    return kept;
}

// How a memory of [rows][columns], the columns whole vectors, stands in panels, and goes to blocks and back.
struct HeadMemory {
    long rows, columns;

    long panels() const { return (columns + kPanelColumns - 1) / kPanelColumns; }
    long padded_columns() const { return panels() * kPanelColumns; }
    long size() const { return rows * padded_columns(); }
    long panel_size() const { return rows * kPanelColumns; }
    long columns_of(long panel) const { return std::min(kPanelColumns, columns - panel * kPanelColumns); }

    // From number `at` of a state on.
    void read(const StatePlace& place, long at, float* memory) const {
        each(place, at, memory, [](float* stored, float* near, long count) {
            if (count == kPanelColumns) PanelRow::of(stored).put(near);
            else std::copy_n(stored, count, near);
        });
    }

    void write(const StatePlace& place, long at, float* memory) const {
        each(place, at, memory, [](float* stored, float* near, long count) {
            if (count == kPanelColumns) PanelRow::of(near).put(stored);
            else std::copy_n(near, count, stored);
        });
    }

private:
    // job(stored, near, count) for each stretch that stands together in the block and in a panel.
    template <class Job>
    void each(const StatePlace& place, long at, float* memory, Job job) const {
        place.each(at, rows * columns, [&](float* stored, long offset, long part) {
            long row = offset / columns, column = offset % columns;
            for (const float* end = stored + part; stored < end;) {
                const long in_panel = column % kPanelColumns;
                const long count = std::min({kPanelColumns - in_panel, columns - column, long(end - stored)});
                job(stored, memory + column / kPanelColumns * panel_size() + row * kPanelColumns + in_panel, count);
                stored += count, column += count;
                if (column == columns) row++, column = 0;
            }
        });
    }
};
