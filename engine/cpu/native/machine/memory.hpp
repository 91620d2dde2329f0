// Memory that begins at a cache line: rows of whole lines are then read and written line by line, by AMX tiles twice as
// fast as across lines.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "machine/processor.hpp"

template <class Value>
struct LineAllocator {
    using value_type = Value;
    static constexpr std::align_val_t kAlignment{64};

    LineAllocator() = default;
    template <class Other>
    LineAllocator(const LineAllocator<Other>&) {}

    Value* allocate(std::size_t count) { return static_cast<Value*>(::operator new(count * sizeof(Value), kAlignment)); }
    void deallocate(Value* memory, std::size_t) { ::operator delete(memory, kAlignment); }

    template <class Other>
    bool operator==(const LineAllocator<Other>&) const {
        return true;
    }
};

constexpr std::uintptr_t kLargePage = 2 << 20;

// Ask for pages of 2 MiB where memory is about to be written for the first time. Where the kernel refuses, nothing changes.
inline void want_large_pages(const void* memory, std::size_t bytes) {
    const std::uintptr_t begin = std::uintptr_t(memory), first = (begin + kLargePage - 1) & ~(kLargePage - 1);
    if (first + kLargePage <= begin + bytes) madvise((void*)first, (begin + bytes - first) & ~(kLargePage - 1), MADV_HUGEPAGE);
}

// Ask for lines that will be read soon. Not by the compiler's own function: what calls nothing but that does nothing in a
// compiler's eyes, and is left out.
inline void fetch_lines(const void* from, std::size_t bytes) {
    for (std::size_t at = 0; at < bytes; at += 64) {
        const char* const line = (const char*)from + at;
#ifdef __ARM_NEON
        fetch_line<kLinesTo>(line);
#else
        if constexpr (kLinesTo == Near::kFirst) asm volatile("prefetcht0 %0" : : "m"(*line));
        else asm volatile("prefetcht1 %0" : : "m"(*line));
#endif
    }
}

// Have them near before long: by reading them for nothing, or where more are under way so, by asking for them.
inline void bring_lines(const void* from, std::size_t bytes) {
    if constexpr (kLinesTo == Near::kSecond) return fetch_lines(from, bytes);
    for (std::size_t at = 0; at < bytes; at += 64) ((const volatile char*)from)[at];
}

// Lines that are asked for some at a time, between other work: all at once they would hold up what that work loads.
class LinesAhead {
public:
    explicit LinesAhead(const void* from, bool are_wanted = true) : at_((const char*)from), step_(are_wanted ? 64 : 0) {}

    // LINES more. Where none are wanted, the same one again, which is near: a branch would cost more.
    template <int LINES>
    [[gnu::always_inline]] void fetch() {
#pragma GCC unroll 8
        for (int i = 0; i < LINES; i++, at_ += step_) fetch_lines(at_, 64);
    }
    void fetch_bytes(long bytes) {
        if (step_ == 0) return;
        fetch_lines(at_, bytes);
        at_ += bytes;
    }

    LinesAhead none() const { return LinesAhead(at_, false); }

private:
    const char* at_;
    long step_;
};

template <class Value>
using Lines = std::vector<Value, LineAllocator<Value>>;

// So many zeros, which take no memory until they are touched: the kernel has their pages back, and gives zeros again.
template <class Value>
Lines<Value> untouched(long size) {
    Lines<Value> zeros(size);
    const std::uintptr_t page = sysconf(_SC_PAGESIZE), begin = std::uintptr_t(zeros.data());
    const std::uintptr_t first = (begin + page - 1) / page * page, last = (begin + size * sizeof(Value)) / page * page;
    if (first < last) madvise((void*)first, last - first, MADV_DONTNEED);
    return zeros;
}
