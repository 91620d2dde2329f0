// How many threads a worker may use at this moment: its own part of the machine's cores, and the parts of those that
// are idle. A slot of shared memory for each worker says when it last computed; nobody waits for anybody.
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
    };

    // `slots` null: alone, or on fixed threads.
    Cores(Slot* slots, int num_slots, int slot, int num_threads, int max_threads)
        : slots_(slots), num_slots_(num_slots), slot_(slot), num_threads_(num_threads), max_threads_(max_threads) {
        if (slots_ != nullptr) slots_[slot_].threads.store(num_threads);
    }

    // Threads for what comes now. Asked again every few milliseconds of work, which also keeps the slot fresh.
    int take() {
        if (slots_ == nullptr) return num_threads_;
        const std::int64_t now = mark();
        std::int64_t left = max_threads_;
        for (int i = 0; i < num_slots_; i++) {
            const bool busy = i != slot_ && now - slots_[i].worked_at_ns.load(std::memory_order_relaxed) < kIdleAfterNs;
            if (busy) left -= slots_[i].threads.load(std::memory_order_relaxed);
        }
        return int(std::max<std::int64_t>(num_threads_, left));
    }

    // This worker computes, or did until now.
    std::int64_t mark() {
        const auto since = std::chrono::steady_clock::now().time_since_epoch();
        const std::int64_t now = std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
        if (slots_ != nullptr) slots_[slot_].worked_at_ns.store(now, std::memory_order_relaxed);
        return now;
    }

private:
    static constexpr std::int64_t kIdleAfterNs = 3'000'000;  // a decode worker's pause between two steps is shorter

    Slot* const slots_;
    const int num_slots_, slot_, num_threads_, max_threads_;
};
