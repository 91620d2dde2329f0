// Elements in memory, float32 in registers: what the decoder does with vectors of 16, written once for all instruction
// sets. The loads, stores and operations themselves are those of one set, in sets/.
//
// An element is what weights, keys, values and inputs of products are stored as: bfloat16, or float32 where the library
// is compiled for that (KVFERRY_FLOAT32), with vectors of AVX2 or NEON.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine/memory.hpp"
#include "machine/processor.hpp"

using bf16 = std::uint16_t;

#ifdef KVFERRY_FLOAT32
using Element = float;
#else
using Element = bf16;
#endif

#ifdef __ARM_NEON
#include "sets/neon.hpp"
#include "sets/across.hpp"
#elif defined(__AVX512BF16__) && !defined(KVFERRY_FLOAT32)
#include "sets/avx512.hpp"
#else
#include "sets/avx2.hpp"
#include "sets/across.hpp"
#endif

#ifdef KVFERRY_FLOAT32
#include "sets/float32_pairs.hpp"
#elif defined(__ARM_NEON)
#include "sets/neon_pairs.hpp"
#elif !defined(__AVX512BF16__)
#include "sets/avx2_pairs.hpp"
#endif

constexpr int kLine = 64 / sizeof(Element);  // elements of a cache line

constexpr float kLog2E = 1.44269504f;

// What an element means, and a value to an element's precision, ties to even; of finite values.
#ifdef KVFERRY_FLOAT32
inline float widened(float value) { return value; }
inline float rounded(float value) { return value; }
#else
inline float widened(bf16 value) {
    const std::uint32_t bits = std::uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline float rounded(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}
#endif

// 2^x: the fraction by a polynomial of degree 6 (relative error 2e-7), the whole part by the exponent. 2^-inf = 0,
// 2^inf = inf: a gate far below 0 asks for it.
inline Vector exp2(Vector x) {
    x = min(max(x, repeat(-200.0f)), repeat(200.0f));
    const Vector whole = nearest(x);
    const Vector r = x - whole;
    Vector y = repeat(1.54035304e-4f);
    y = fma(y, r, repeat(1.33335581e-3f));
    y = fma(y, r, repeat(9.61812911e-3f));
    y = fma(y, r, repeat(5.55041087e-2f));
    y = fma(y, r, repeat(2.40226507e-1f));
    y = fma(y, r, repeat(6.93147181e-1f));
    y = fma(y, r, repeat(1.0f));
    return times_power(y, whole);
}

// 2^x for x <= 0, to what is left of it in an element: in bfloat16 a polynomial of degree 3 (relative error 1e-4), and
// 2^-125 for all that is less. NaN stays.
#ifdef KVFERRY_FLOAT32
inline Vector exp2_rough(Vector x) { return exp2(x); }
#elif defined(__AMX_BF16__)
inline Vector exp2_rough(Vector x) {  // Intel's cores find the fraction in one instruction, and the power of its floor
    x = max(repeat(-125.0f), x);
    const Vector r = above_floor(x);
    Vector y = repeat(7.80242800e-2f);
    y = fma(y, r, repeat(2.26067270e-1f));
    y = fma(y, r, repeat(6.95833630e-1f));
    y = fma(y, r, repeat(9.99925190e-1f));
    return times_power(y, x);
}
#else
inline Vector exp2_rough(Vector x) {
    x = max(repeat(-125.0f), x);
    const Vector whole = nearest(x);
    const Vector r = x - whole;
    Vector y = repeat(5.51716600e-2f);
    y = fma(y, r, repeat(2.42611120e-1f));
    y = fma(y, r, repeat(6.93260990e-1f));
    y = fma(y, r, repeat(9.99928070e-1f));
    return times_normal_power(y, whole);
}
#endif

inline Vector silu(Vector x) {
    const Vector one = repeat(1.0f);
    return x / (one + exp2(x * repeat(-kLog2E)));
}

// The same to what is left of it in an element, where that is found sooner.
#if defined(__AMX_BF16__)
inline Vector silu_rough(Vector x) { return x * nearly_inverse(repeat(1.0f) + exp2_rough(x * repeat(-kLog2E))); }
#else
inline Vector silu_rough(Vector x) { return silu(x); }
#endif

inline Vector sigmoid(Vector x) {
    const Vector one = repeat(1.0f);
    return one / (one + exp2(x * repeat(-kLog2E)));
}
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// log(1 + e^x), by the series of atanh where e^-|x| is added to 1: nothing is lost where it is small.
inline Vector softplus(Vector x) {
    const Vector zero = repeat(0.0f), part = exp2(max(x, zero - x) * repeat(-kLog2E));
    const Vector w = part / (part + repeat(2.0f)), square = w * w;  // w is at most 1 / 3
    Vector y = repeat(1.0f / 15);
    for (int power = 13; power > 0; power -= 2) y = fma(y, square, repeat(1.0f / float(power)));
    return fma(w + w, y, max(zero, x));
}

// gate * sigmoid(alpha * gate) * (up + 1) of both within the limit, the gate from above alone; NaN stays
inline Vector clamped_silu(Vector gate, Vector up, float alpha, float limit) {
    const Vector one = repeat(1.0f);
    gate = min(repeat(limit), gate);
    up = max(repeat(-limit), min(repeat(limit), up));
    return gate / (one + exp2(gate * repeat(-alpha * kLog2E))) * (up + one);
}

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
inline Vector gelu_tanh(Vector x) {
    const Vector one = repeat(1.0f), u = x * fma(x * x, repeat(0.0356774081f), repeat(0.797884561f));
    return x / (one + exp2(u * repeat(-2.0f * kLog2E)));
}

inline Vector squared_relu(Vector x) {
    const Vector above = max(repeat(0.0f), x);  // NaN stays
    return above * above;
}

inline Vector tanh(Vector x) {
    const Vector one = repeat(1.0f);
    return one - repeat(2.0f) / (one + exp2(x * repeat(2.0f * kLog2E)));
}

// What comes near to +-bound and is x where that is small.
inline Vector capped(Vector x, float bound) { return repeat(bound) * tanh(x * repeat(1.0f / bound)); }

// The sum of the squares of x - off.
inline float sum_of_squares(const float* x, long size, float off = 0.0f) {
    const Vector by = repeat(off);
    Vector squares = repeat(0.0f);
    for (long i = 0; i < size; i += 16) {
        const Lanes mask = lanes(size - i);
        const Vector v = select(mask, load(x + i, mask) - by, repeat(0.0f));
        squares = fma(v, v, squares);
    }
    return sum_of(squares);
}

inline float mean_of(const float* x, long size) {
    Vector sums = repeat(0.0f);
    for (long i = 0; i < size; i += 16) sums = sums + load(x + i, lanes(size - i));
    return sum_of(sums) / float(size);
}

// 1 / rms(x), as a factor.
inline float inverse_rms(float squares, long size, float eps) { return 1.0f / __builtin_sqrtf(squares / float(size) + eps); }
inline float inverse_rms(const float* x, long size, float eps) { return inverse_rms(sum_of_squares(x, size), size, eps); }
