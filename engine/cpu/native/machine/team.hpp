// Threads that run one function together: all of them, or the first few. A team of one has no thread of its own.
//
// Work is shared out in equal parts. Cores are not equal: some processors have small ones, and what is rented is often half
// a core, beside another's load. So who is done with his part of a product takes what others have not begun.
//
// Who waits spins for a few microseconds, which is how long a wait within a step lasts, and then sleeps in the kernel:
// between steps, and when the processor is shared, a waiting thread costs nothing.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "machine/processor.hpp"

struct Range {
    long first, last;
};

// Rank's part of `count` things, the parts as equal as they can be.
inline Range share(long count, int rank, int size) { return {count * rank / size, count * (rank + 1) / size}; }

// So many rows in groups of `most` or fewer, as equal as they can be.
class RowGroups {
public:
    RowGroups(long count, long most) : count_(count), groups_((count + most - 1) / most) {}

    long groups() const { return groups_; }
    Range rows(long group) const { return share(count_, int(group), int(groups_)); }

protected:
    const long count_, groups_;
};

// Some of a product's tiles, by one thread.
struct Some {
    Range tiles;
    template <class Job>
    void take(long, long groups, Job job) const {
        for (long index = tiles.first; index < tiles.last; index++) {
            for (long group = 0; group < groups; group++) job(index, group);
        }
    }
};

// All of a job's things, by one thread.
struct Alone {
    static Range part(long count) { return {0, count}; }
    template <class Job>
    static void take(long count, long groups, Job job) { Some{part(count)}.take(count, groups, job); }
    static void meet() {}
};

// Takes numbers below `count` until none is left; every thread gets others.
class Counter {
public:
    void reset() { next_.store(0, std::memory_order_relaxed); }

    template <class Job>
    void take(long count, Job job) {
        for (long i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) job(i);
    }

    // Counts one of `count` things that are done: all that was written for them is seen by whom it tells of the last.
    bool is_last(long count) { return next_.fetch_add(1, std::memory_order_acq_rel) + 1 == count; }

private:
    alignas(64) std::atomic<long> next_{0};
};

class Team {
public:
    class Member;

    explicit Team(int max_size) : max_size_(max_size), calls_(max_size), taken_(max_size) {
        try {
            for (int rank = 1; rank < max_size; rank++) threads_.emplace_back([this, rank] { serve(rank); });
        } catch (...) {  // no more threads for this process
            end();
            throw;
        }
    }

    ~Team() { end(); }

    int max_size() const { return max_size_; }

    // Of those who run now; within a job.
    int size() const { return size_; }

    // Calls job(member) once per rank below `size`, rank 0 on the caller's thread; returns when all have.
    void run(int size, const std::function<void(Member&)>& job);

private:
    // Those that were started.
    void end() {
        job_ = nullptr;
        call(int(threads_.size()) + 1);
        for (std::thread& thread : threads_) thread.join();
    }

    void barrier() {
        const int size = size_;  // who has arrived may find it changed
        if (size == 1) return;
        const std::uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == std::uint32_t(size)) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.fetch_add(1, std::memory_order_release);
            round_.notify_all();
        } else {
            await(round_, round);
        }
    }

    static constexpr std::chrono::microseconds kSpin{30};

    struct alignas(64) Calls {
        std::atomic<std::uint32_t> count{0};
    };

    // What has been taken of a rank's part in one round of taking, which is the `round`-th of this team.
    struct alignas(64) Taken {
        static constexpr int kBits = 20;  // of a number of things; above them stands the round's
        std::atomic<std::uint64_t> state{0};
        std::uint64_t round = 0;  // that the rank is in
    };

    // The next of `count` things of a rank's part in a round; -1: all have been taken. Who is in a later round has seen
    // that of this one.
    long next_of(int rank, std::uint64_t round, long count) {
        std::atomic<std::uint64_t>& state = taken_[rank].state;
        std::uint64_t seen = state.load(std::memory_order_relaxed);
        for (;;) {
            const std::uint64_t at = seen >> Taken::kBits;
            const long number = at < round ? 0 : long(seen & ((1u << Taken::kBits) - 1));
            if (at > round || number >= count) return -1;
            const std::uint64_t next = round << Taken::kBits | std::uint64_t(number + 1);
            if (state.compare_exchange_weak(seen, next, std::memory_order_relaxed)) return number;
        }
    }

    void call(int size) {
        for (int rank = 1; rank < size; rank++) {
            calls_[rank].count.fetch_add(1, std::memory_order_release);
            calls_[rank].count.notify_one();
        }
    }

    void serve(int rank);

    // Until `value` is no longer `old`.
    static void await(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
        const auto deadline = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 32; i++) {
                if (value.load(std::memory_order_acquire) != old) return;
                relax();
            }
        } while (std::chrono::steady_clock::now() < deadline);
        value.wait(old, std::memory_order_acquire);
    }

    const int max_size_;
    int size_ = 1;
    const std::function<void(Member&)>* job_ = nullptr;
    std::uint64_t first_round_ = 0;  // of the job
    std::vector<Calls> calls_;  // of each rank
    std::vector<Taken> taken_;
    alignas(64) std::atomic<std::uint32_t> arrived_{0};
    alignas(64) std::atomic<std::uint32_t> round_{0};
    std::vector<std::thread> threads_;
};

// One rank within a job. All ranks call `take` and `meet` in the same order.
class Team::Member {
public:
    Member(Team& team, int rank) : team_(team), rank_(rank) {}
    Member(const Member&) = delete;

    int rank() const { return rank_; }

    // This rank's of so many things, which cost the same.
    Range part(long count) const { return share(count, rank_, team_.size()); }

    // job(index, group) for some of `count` things in `groups` groups each: this rank's own, then others'. Nothing that
    // another's are needed for, or which they may still change, is done until all have met.
    template <class Job>
    void take(long count, long groups, Job job) {
        const std::uint64_t round = ++team_.taken_[rank_].round;
        for (int i = 0; i < team_.size(); i++) {
            const int rank = (rank_ + i) % team_.size();
            const Range range = share(count * groups, rank, team_.size());
            for (long at; (at = team_.next_of(rank, round, range.last - range.first)) >= 0;) {
                job((range.first + at) / groups, (range.first + at) % groups);
            }
        }
    }

    // Every rank calls it as often as every other.
    void meet() { team_.barrier(); }

private:
    Team& team_;
    const int rank_;
};

inline void Team::run(int size, const std::function<void(Member&)>& job) {
    job_ = &job;
    size_ = std::min(size, max_size_);
    first_round_ = taken_[0].round;
    call(size_);
    Member first(*this, 0);
    [&]() noexcept { job(first); }();  // others are in it: what it throws ends the process, as what they throw does
    barrier();
}

inline void Team::serve(int rank) {
    Member by(*this, rank);
    for (std::uint32_t seen = 0;; seen++) {
        await(calls_[rank].count, seen);
        if (job_ == nullptr) return;
        taken_[rank].round = first_round_;
        (*job_)(by);
        barrier();
    }
}
