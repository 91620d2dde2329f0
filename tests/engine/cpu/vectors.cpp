// What functions of vectors make of the largest numbers: a line for each.
#include <cstdio>
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
}
