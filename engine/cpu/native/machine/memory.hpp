// Memory that begins at a cache line: rows of whole lines are then read and written line by line, by AMX tiles twice as
// fast as across lines.
#pragma once

#include <cstddef>
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
