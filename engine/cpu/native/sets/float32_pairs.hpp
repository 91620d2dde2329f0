// Pairs of float32: vectors of their first and of their second values, in memory one behind the other.
//
// 32 values that are loaded or stored are 16 pairs: value i and value 16 + i. Values that stand side by side are pairs
// where they are repeated, or have been transposed.
#pragma once

struct Pairs {  // 16 pairs
    Vector first, second;
};

inline Pairs load_pairs(const float* source) { return {load(source), load(source + 16)}; }
inline Pairs load_pairs(const float* source, Values values) {
    return {load(source, lanes(values)), load(source + 16, lanes(values - 16))};
}
inline void store_pairs(float* target, Pairs pairs) {
    store(target, pairs.first);
    store(target + 16, pairs.second);
}

inline Pairs repeat_pair(const float* source) { return {repeat(source[0]), repeat(source[1])}; }

// sum + a * b, both products of a pair, the second one first.
inline Vector dot(Vector sum, Pairs a, Pairs b) { return fma(a.first, b.first, fma(a.second, b.second, sum)); }

// 16 values of two rows side by side; a row that is null is zeros.
inline Pairs zip(const float* one, const float* other) {
    const auto row = [](const float* row) { return row == nullptr ? repeat(0.0f) : load(row); };
    return {row(one), row(other)};
}

// Of 16 rows' 32 values each: those of one row stand in one lane then, its neighbours as pairs.
inline void transpose_16(Pairs* v) {
    Words early[16], late[16];
    for (int i = 0; i < 16; i++) early[i] = words_of(v[i].first), late[i] = words_of(v[i].second);
    transpose_16(early);
    transpose_16(late);
    for (int i = 0; i < 8; i++) {
        v[i] = {meant_by(early[2 * i]), meant_by(early[2 * i + 1])};
        v[8 + i] = {meant_by(late[2 * i]), meant_by(late[2 * i + 1])};
    }
}
