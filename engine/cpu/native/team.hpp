// Threads that run one function together: all of them, or the first few. A team of one has no thread of its own.
//
// Who waits spins for a few microseconds, which is how long a wait within a step lasts, and then sleeps in the kernel:
// between steps, and when the processor is shared, a waiting thread costs nothing.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

struct Range {
    long first, last;
};

// Rank's part of `count` things, the parts as equal as they can be.
inline Range share(long count, int rank, int size) { return {count * rank / size, count * (rank + 1) / size}; }

class Team {
public:
    explicit Team(int max_size) : max_size_(max_size), calls_(max_size) {
        for (int rank = 1; rank < max_size; rank++) threads_.emplace_back([this, rank] { serve(rank); });
    }

    ~Team() {
        job_ = nullptr;
        call(max_size_);
        for (std::thread& thread : threads_) thread.join();
    }

    int max_size() const { return max_size_; }

    // Of those who run now; within a job.
    int size() const { return size_; }

    // Calls job(rank) once per rank below `size`, rank 0 on the caller's thread; returns when all have.
    void run(int size, const std::function<void(int)>& job) {
        job_ = &job;
        size_ = std::min(size, max_size_);
        call(size_);
        job(0);
        barrier();
    }

    // Every rank calls it as often as every other, within a job.
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

private:
    static constexpr std::chrono::microseconds kSpin{30};

    struct alignas(64) Calls {
        std::atomic<std::uint32_t> count{0};
    };

    void call(int size) {
        for (int rank = 1; rank < size; rank++) {
            calls_[rank].count.fetch_add(1, std::memory_order_release);
            calls_[rank].count.notify_one();
        }
    }

    void serve(int rank) {
        for (std::uint32_t seen = 0;; seen++) {
            await(calls_[rank].count, seen);
            if (job_ == nullptr) return;
            (*job_)(rank);
            barrier();
        }
    }

    // Until `value` is no longer `old`.
    static void await(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
        const auto deadline = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 32; i++) {
                if (value.load(std::memory_order_acquire) != old) return;
                _mm_pause();
            }
        } while (std::chrono::steady_clock::now() < deadline);
        value.wait(old, std::memory_order_acquire);
    }

    const int max_size_;
    int size_ = 1;
    const std::function<void(int)>* job_ = nullptr;
    std::vector<Calls> calls_;  // of each rank
    alignas(64) std::atomic<std::uint32_t> arrived_{0};
    alignas(64) std::atomic<std::uint32_t> round_{0};
    std::vector<std::thread> threads_;
};
