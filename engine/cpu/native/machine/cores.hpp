// How many threads a worker may use at this moment: its own part of the machine's cores, and the parts of those that
// are idle. A slot of shared memory for each worker says whether it computes, and when it last did; nobody waits for
// anybody.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

class Cores {
public:
    // What shared memory holds, zeros at first. Declared once more in common/cores.py, as its size.
    struct alignas(64) Slot {
        std::atomic<std::int64_t> worked_at_ns;  // on the machine's monotonic clock
        std::atomic<std::int64_t> threads;       // its own part
        std::atomic<std::int64_t> is_working;    // within a step
    };

    // `slots` null: alone, or on fixed threads.
    Cores(Slot* slots, int num_slots, int slot, int num_threads, int max_threads)
        : slots_(slots), num_slots_(num_slots), slot_(slot), num_threads_(num_threads), max_threads_(max_threads) {
        if (slots_ != nullptr) slots_[slot_].threads.store(num_threads);
    }

    // Threads for what comes now, of a step that has begun. Asked again for every layer of a prompt.
    int take() {
        if (slots_ == nullptr) return num_threads_;
        const std::int64_t now = mark(true);
        std::int64_t left = max_threads_;
        for (int i = 0; i < num_slots_; i++) {
            if (i != slot_ && is_busy(slots_[i], now)) left -= slots_[i].threads.load(std::memory_order_relaxed);
        }
        return int(std::max<std::int64_t>(num_threads_, left));
    }

    // The step is over.
    void leave() {
        if (slots_ != nullptr) mark(false);
    }

private:
    static constexpr std::int64_t kIdleAfterNs = 3'000'000;      // a decode worker's pause between steps is shorter
    static constexpr std::int64_t kGoneAfterNs = 2'000'000'000;  // of a worker that died within a step

    static bool is_busy(const Slot& slot, std::int64_t now) {
        const bool is_working = slot.is_working.load(std::memory_order_relaxed) != 0;
        return now - slot.worked_at_ns.load(std::memory_order_relaxed) < (is_working ? kGoneAfterNs : kIdleAfterNs);
    }

    std::int64_t mark(bool is_working) {
        const auto since = std::chrono::steady_clock::now().time_since_epoch();
        const std::int64_t now = std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
        slots_[slot_].worked_at_ns.store(now, std::memory_order_relaxed);
        slots_[slot_].is_working.store(is_working, std::memory_order_relaxed);
        return now;
    }

    Slot* const slots_;
    const int num_slots_, slot_, num_threads_, max_threads_;
};
