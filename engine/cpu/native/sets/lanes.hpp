// Some of a vector's 16 lanes, and the first of 32 elements, where there are no registers for masks.
#pragma once

struct Lanes {  // some of 16
    int first, last;
};
using Values = int;  // the first few of 32 elements

inline Lanes between(long first, long last) {  // within 16, whatever the ends
    return {int(std::clamp(first, 0L, 16L)), int(std::clamp(last, 0L, 16L))};
}
inline Lanes lanes(long left) { return between(0, left); }  // those that hold values when `left` remain
inline Values first_values(long left) { return Values(std::min(left, 32L)); }
inline bool is_all(Lanes lanes) { return lanes.first == 0 && lanes.last == 16; }
