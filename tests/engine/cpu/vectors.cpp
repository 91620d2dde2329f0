// What functions of vectors make of the largest numbers, a line for each, and whether the rough ones and those of several
// rows are what they say.
#include <cstdio>
#include <cmath>
#include <limits>

#include "machine/vectors.hpp"

int main() {
    const float inf = std::numeric_limits<float>::infinity();
    const auto each = [](const char* name, Vector (*function)(Vector), float x) {
        std::printf("%s %g: %g\n", name, double(x), double(lane_0(function(repeat(x)))));
    };
    for (float x : {inf, 3e38f, 200.0f}) each("exp2", [](Vector v) { return exp2(v); }, x);
    for (float x : {-inf, -3e38f}) each("exp2", [](Vector v) { return exp2(v); }, x);
    for (float x : {-inf, inf}) each("sigmoid", [](Vector v) { return sigmoid(v); }, x);
    for (float x : {-inf, inf}) each("tanh", [](Vector v) { return tanh(v); }, x);
    for (float x : {-3e38f, inf}) each("silu", [](Vector v) { return silu(v); }, x);
    for (float x : {-1e20f, inf}) each("gelu_tanh", [](Vector v) { return gelu_tanh(v); }, x);
    for (float x : {-3e38f, inf}) each("silu_rough", [](Vector v) { return silu_rough(v); }, x);
    float far_off = 0, gate_off = 0;
    for (float x = -120.0f; x <= 0.0f; x += 0.0371f) {
        far_off = std::max(far_off, std::fabs(lane_0(exp2_rough(repeat(x))) / std::exp2(x) - 1.0f));
    }
    for (float x = -30.0f; x <= 30.0f; x += 0.0371f) {
        gate_off = std::max(gate_off, std::fabs(lane_0(silu_rough(repeat(x))) * (1.0f + std::exp(-x)) / x - 1.0f));
    }
    std::printf("rough exp2, silu within 3e-4: %d %d\n", far_off < 3e-4f, gate_off < 3e-4f);
    Vector rows[16];
    alignas(64) float values[16], largest[16], sums[16];
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 16; j++) values[j] = float((7 * i + 5 * j) % 16 + 100 * i);  // each row has 0 to 15, and its hundred
        rows[i] = load(values);
    }
    store(largest, across(rows, [](Vector a, Vector b) { return max(a, b); }));
    store(sums, across(rows, [](Vector a, Vector b) { return a + b; }));
    int right = 0;
    for (int i = 0; i < 16; i++) right += largest[i] == 100 * i + 15 && sums[i] == 1600 * i + 120;
    std::printf("rows across: %d\n", right);
}
