// What sets do lane by lane that have no quick way.
#pragma once

inline void store(Element* target, Vector one, Vector next) {  // side by side
    store(target, one);
    store(target + 16, next);
}

// Lane i of the result is what op(a, b) makes of all lanes of v[i].
template <class Op>
Vector across(const Vector* v, Op op) {
    alignas(64) float lanes[16], turned[16][16];
    for (int i = 0; i < 16; i++) {
        store(lanes, v[i]);
        for (int j = 0; j < 16; j++) turned[j][i] = lanes[j];
    }
    Vector all = load(turned[0]);
    for (int j = 1; j < 16; j++) all = op(all, load(turned[j]));
    return all;
}
