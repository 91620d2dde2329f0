// y = x W^T in bfloat16 with float32 sums, at the rate of the processor's multipliers where rows are many and of its
// memory where they are few.
//
// W lies in tiles (tiles.hpp). Attention packs keys and values the same way, so that there is one inner loop.
#pragma once

#include <algorithm>

#include "team.hpp"
#include "tiles.hpp"
#include "vectors.hpp"

constexpr int kRowsAtOnce = 6;         // their 24 sums, a pair's four vectors and one input stay in registers
constexpr int kLine = 32;              // values of a cache line
constexpr long kNearLines = 64;        // one group of rows: weights are fetched so far ahead, 4 KiB

struct Rows {
    const bf16* values;
    long stride;
    long count;
};

// sums [ROWS][stride], 64 of each row: the products of ROWS rows' inputs with one tile's weights, `pairs` of them, added
// up in order; added to what is there unless FRESH. For each pair LINES cache lines from `ahead` on are fetched.
template <int ROWS, bool FRESH, int LINES>
void add_products(const bf16* x, long x_stride, const bf16* weights, long pairs, float* sums, long stride,
                  const bf16* ahead) {
    constexpr auto kHint = LINES == 4 ? _MM_HINT_T0 : _MM_HINT_T1;
    __m512 sum[ROWS][4];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            sum[row][i] = FRESH ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + row * stride + 16 * i);
        }
    }
    for (long pair = 0; pair < pairs; pair++, weights += 2 * kTileColumns, ahead += LINES * kLine) {
        __m512bh weight[4];
#pragma GCC unroll 4
        for (int i = 0; i < LINES; i++) _mm_prefetch((const char*)(ahead + kLine * i), kHint);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) weight[i] = load_pairs(weights + 32 * i);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            std::int32_t inputs;
            std::memcpy(&inputs, x + row * x_stride + 2 * pair, sizeof inputs);
            const __m512bh input = (__m512bh)_mm512_set1_epi32(inputs);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sum[row][i] = _mm512_dpbf16_ps(sum[row][i], input, weight[i]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) _mm512_storeu_ps(sums + row * stride + 16 * i, sum[row][i]);
    }
}

template <bool FRESH, int LINES>
void add_products(int rows, const bf16* x, long x_stride, const bf16* weights, long pairs, float* sums, long stride,
                  const bf16* ahead) {
    switch (rows) {
        case 1: return add_products<1, FRESH, LINES>(x, x_stride, weights, pairs, sums, stride, ahead);
        case 2: return add_products<2, FRESH, LINES>(x, x_stride, weights, pairs, sums, stride, ahead);
        case 3: return add_products<3, FRESH, LINES>(x, x_stride, weights, pairs, sums, stride, ahead);
        case 4: return add_products<4, FRESH, LINES>(x, x_stride, weights, pairs, sums, stride, ahead);
        case 5: return add_products<5, FRESH, LINES>(x, x_stride, weights, pairs, sums, stride, ahead);
        default: return add_products<6, FRESH, LINES>(x, x_stride, weights, pairs, sums, stride, ahead);
    }
}

// The tiles [part.first, part.last): calls finish(row, column, sums) with each row's 64 sums from `column` on.
// A row's sums do not depend on the other rows: they are added up in the same order whatever their number.
//
// The first group of rows waits for the weights, the others find them near. While these compute, the next tile comes.
template <class Finish>
void multiply(const Rows& x, const Tiles& w, Range part, Finish finish) {
    alignas(64) float sums[kRowsAtOnce * kTileColumns];
    const long groups = (x.count + kRowsAtOnce - 1) / kRowsAtOnce;
    for (long index = part.first; index < part.last; index++) {
        const bf16 *weights = w.tile(index), *next = w.tile(index + 1);
        for (long group = 0; group < groups; group++) {
            const Range rows = share(x.count, int(group), int(groups));
            const bf16* inputs = x.values + rows.first * x.stride;
            const int count = int(rows.last - rows.first);
            if (groups == 1) {
                add_products<true, 4>(count, inputs, x.stride, weights, w.pairs, sums, kTileColumns,
                                      weights + kNearLines * kLine);
            } else if (groups < 4) {
                add_products<true, 2>(count, inputs, x.stride, weights, w.pairs, sums, kTileColumns,
                                      next + (group & 1) * w.pairs * 2 * kLine);
            } else {
                add_products<true, 1>(count, inputs, x.stride, weights, w.pairs, sums, kTileColumns,
                                      next + (group & 3) * w.pairs * kLine);
            }
            for (long row = rows.first; row < rows.last; row++) {
                finish(row, index * kTileColumns, sums + (row - rows.first) * kTileColumns);
            }
        }
    }
}

// 16 sums from `column` on, with the bias if there is one.
inline __m512 with_bias(const float* sums, const bf16* bias, long column, long columns) {
    const __m512 values = _mm512_load_ps(sums);
    if (bias == nullptr || column >= columns) return values;
    return _mm512_add_ps(values, load(bias + column, lanes(columns - column)));
}
