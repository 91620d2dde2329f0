// Which keys a token sees: all up to its own, or the last of them.
#pragma once

#include <algorithm>
#include <cstdint>

// Declared once more in engine/cpu/described.py.
struct Sight {
    std::int64_t size;       // of a window that ends with the token, itself included, or of chunks; 0: it sees all
    std::int64_t in_chunks;  // it begins anew with each `size` tokens of a sequence

    long first_key(long position) const {
        if (size == 0) return 0;
        return in_chunks ? position / size * size : std::max(0L, position + 1 - long(size));
    }
};
