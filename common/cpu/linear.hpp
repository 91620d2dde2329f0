// y = x W^T for few rows of x: every weight is read from memory once, for all rows.
//
// W [columns, inputs] lies in tiles of 64 columns. Within a tile, pair after pair of inputs, stand the 64 columns' two
// weights each: four vectors, each multiplied by one pair of a row's inputs that is broadcast.
#pragma once

#include <algorithm>

#include "team.hpp"
#include "vectors.hpp"

constexpr int kTileColumns = 64;
constexpr int kMaxRows = 64;
constexpr int kRowsAtOnce = 6;     // their 24 sums and a pair's four vectors stay in registers
constexpr long kPairsAtOnce = 16;  // 4 KiB of weights: still near for the next rows, the next 4 KiB on the way
constexpr long kPrefetchBytes = 4096;

inline long padded(long size, long multiple) { return (size + multiple - 1) / multiple * multiple; }

struct Tiles {
    const bf16* weights;
    long columns, pairs;  // pairs of inputs; a last odd one, and the columns of the last tile, are padded with zeros

    long count() const { return (columns + kTileColumns - 1) / kTileColumns; }
    const bf16* tile(long index) const { return weights + index * pairs * 2 * kTileColumns; }
};

struct Rows {
    const bf16* values;
    long stride;
    int count;
};

// Add the products of ROWS rows' inputs with one tile's weights, `pairs` of them, to `sums` [ROWS][64].
template <int ROWS>
void add_products(const bf16* x, long stride, const bf16* weights, long pairs, float* sums) {
    __m512 sum[ROWS][4];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[row][i] = _mm512_load_ps(sums + row * kTileColumns + 16 * i);
    }
    for (long pair = 0; pair < pairs; pair++, weights += 2 * kTileColumns) {
        __m512bh weight[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            _mm_prefetch((const char*)(weights + 32 * i) + kPrefetchBytes, _MM_HINT_T0);
            weight[i] = load_pairs(weights + 32 * i);
        }
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            std::int32_t inputs;
            std::memcpy(&inputs, x + row * stride + 2 * pair, sizeof inputs);
            const __m512bh input = (__m512bh)_mm512_set1_epi32(inputs);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sum[row][i] = _mm512_dpbf16_ps(sum[row][i], input, weight[i]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) _mm512_store_ps(sums + row * kTileColumns + 16 * i, sum[row][i]);
    }
}

inline void add_products(int rows, const bf16* x, long stride, const bf16* weights, long pairs, float* sums) {
    switch (rows) {
        case 1: return add_products<1>(x, stride, weights, pairs, sums);
        case 2: return add_products<2>(x, stride, weights, pairs, sums);
        case 3: return add_products<3>(x, stride, weights, pairs, sums);
        case 4: return add_products<4>(x, stride, weights, pairs, sums);
        case 5: return add_products<5>(x, stride, weights, pairs, sums);
        default: return add_products<6>(x, stride, weights, pairs, sums);
    }
}

// The tiles [part.first, part.last): calls finish(row, column, sums) with each row's 64 sums from `column` on.
// A row's sums do not depend on the other rows: they are added up in the same order whatever their number.
template <class Finish>
void multiply(const Rows& x, const Tiles& w, Range part, Finish finish) {
    alignas(64) float sums[kMaxRows * kTileColumns];
    const int groups = (x.count + kRowsAtOnce - 1) / kRowsAtOnce;
    const long step = groups == 1 ? w.pairs : kPairsAtOnce;
    for (long index = part.first; index < part.last; index++) {
        std::fill_n(sums, x.count * kTileColumns, 0.0f);
        for (long pair = 0; pair < w.pairs; pair += step) {
            const bf16* weights = w.tile(index) + pair * 2 * kTileColumns;
            for (int group = 0; group < groups; group++) {
                const Range rows = share(x.count, group, groups);
                const bf16* inputs = x.values + rows.first * x.stride + 2 * pair;
                add_products(int(rows.last - rows.first), inputs, x.stride, weights, std::min(step, w.pairs - pair),
                             sums + rows.first * kTileColumns);
            }
        }
        for (int row = 0; row < x.count; row++) finish(row, index * kTileColumns, sums + row * kTileColumns);
    }
}

// 16 sums from `column` on, with the bias if there is one.
inline __m512 with_bias(const float* sums, const bf16* bias, long column, long columns) {
    const __m512 values = _mm512_load_ps(sums);
    if (bias == nullptr || column >= columns) return values;
    return _mm512_add_ps(values, load(bias + column, lanes(columns - column)));
}
