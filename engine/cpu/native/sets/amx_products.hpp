// The inner loop by AMX tiles of bfloat16, 16 pairs of inputs at a time: 32 rows and 32 columns, or up to 16 rows and all 64.
//
// A product of tiles sums up its 16 pairs' first products and their second ones, each in order, adds both and then what
// was there. So a row's sums do not depend on the other rows, nor on which of the two ways it goes, but are not those of
// the other instruction sets.
#pragma once

#include "sets/tile_unit.hpp"

constexpr int kRowsAtOnce = 32;
constexpr int kRowsTogether = kRowsAtOnce;
constexpr long kPanelRows = 256;       // a multiple of kRowsAtOnce
constexpr int kMostParts = 8;          // of the next tile, one of which a group of rows fetches
constexpr int kProductInputs = 32;     // inputs of a product are a multiple of it
constexpr bool kSumsInRegisters = false;  // pair by pair; else by the matrix unit, 16 pairs at a time
constexpr int kTileRows = 16;
constexpr int kTilePairs = 16;
template <int PARTS>
constexpr int kTileLines = PARTS == 0 ? 0 : kTilePairs * kPairLines / std::max(1, PARTS);  // fetched beside 16 pairs

// One group of rows: weights are fetched so far ahead, 8 KiB.
constexpr long near_lines(int) { return 128; }

// A thread's use of the unit, which is given back at its end: a thread that sleeps has no tiles to be saved.
class MatrixUnit {
public:
    MatrixUnit() = default;
    MatrixUnit(const MatrixUnit&) = delete;
    ~MatrixUnit() {
        if (rows_ != 0) RELEASE_TILES();
        rows_ = 0;
    }

    static bool may_run() { return may_use_tiles(); }

    // Tiles 0 to 3 for sums, 4 and 5 for inputs, 6 and 7 for weights, of up to 32 rows.
    static void shape(int rows) {
        if (rows == rows_) return;
        struct alignas(64) {
            std::uint8_t palette = 1, start = 0, none[14] = {};
            std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {};
        } shape;
        const bool is_wide = rows > kTileRows;
        const int first = std::min(rows, kTileRows), second = is_wide ? rows - kTileRows : first;
        const int of_tiles[8] = {first, first, second, second, first, second, kTilePairs, kTilePairs};
        for (int tile = 0; tile < 8; tile++) shape.rows[tile] = std::uint8_t(of_tiles[tile]);
        asm volatile("" ::: "memory");
        SHAPE_TILES(&shape);
        rows_ = rows;
    }

private:
    static inline thread_local int rows_ = 0;  // of the shape that is in force; 0: none
};

// A quarter of LINES lines from `ahead` on, between two loads of tiles: those that are asked for one behind the other
// without a pause are lost on processors that have a dozen places to note what is on its way.
template <int LINES, bool NEAR, int QUARTER>
void fetch(const Element* ahead) {
    constexpr auto kHint = NEAR ? _MM_HINT_T0 : _MM_HINT_T1;
#pragma GCC unroll 16
    for (int i = LINES * QUARTER / 4; i < LINES * (QUARTER + 1) / 4; i++) {
        _mm_prefetch((const char*)(ahead + kLine * i), kHint);
    }
}

// The four tiles of sums at these places, rows `stride` apart: zeros if FRESH.
template <bool FRESH>
void begin_sums(const float* a, const float* b, const float* c, const float* d, long stride) {
    if (FRESH) {
        CLEAR_TILE(0);
        CLEAR_TILE(1);
        CLEAR_TILE(2);
        CLEAR_TILE(3);
    } else {
        LOAD_TILE(0, a, 4 * stride);
        LOAD_TILE(1, b, 4 * stride);
        LOAD_TILE(2, c, 4 * stride);
        LOAD_TILE(3, d, 4 * stride);
    }
}

inline void store_sums(float* a, float* b, float* c, float* d, long stride) {
    STORE_TILE(0, a, 4 * stride);
    STORE_TILE(1, b, 4 * stride);
    STORE_TILE(2, c, 4 * stride);
    STORE_TILE(3, d, 4 * stride);
}

template <bool FRESH, int PARTS>
void add_few_rows(const Element* x, long x_stride, const Element* weights, long pairs, float* sums, long stride,
                  const Element* ahead) {
    constexpr int kLines = kTileLines<PARTS>;
    constexpr bool kNear = PARTS == 1;
    begin_sums<FRESH>(sums, sums + 16, sums + 32, sums + 48, stride);
    for (long pair = 0; pair < pairs; pair += kTilePairs, weights += kTilePairs * 2 * kTileColumns) {
        LOAD_TILE(4, x + 2 * pair, 2 * x_stride);
        fetch<kLines, kNear, 0>(ahead);
        LOAD_TILE(6, weights, 4 * kTileColumns);
        ADD_PRODUCTS_OF_TILES(0, 4, 6);
        fetch<kLines, kNear, 1>(ahead);
        LOAD_TILE(7, weights + 32, 4 * kTileColumns);
        ADD_PRODUCTS_OF_TILES(1, 4, 7);
        fetch<kLines, kNear, 2>(ahead);
        LOAD_TILE(6, weights + 64, 4 * kTileColumns);
        ADD_PRODUCTS_OF_TILES(2, 4, 6);
        fetch<kLines, kNear, 3>(ahead);
        LOAD_TILE(7, weights + 96, 4 * kTileColumns);
        ADD_PRODUCTS_OF_TILES(3, 4, 7);
        ahead += kLines * kLine;
    }
    store_sums(sums, sums + 16, sums + 32, sums + 48, stride);
}

template <bool FRESH, int PARTS>
void add_many_rows(const Element* x, long x_stride, const Element* weights, long pairs, float* sums, long stride,
                   const Element* ahead) {
    constexpr int kLines = kTileLines<PARTS> / 2;
    constexpr bool kNear = PARTS == 1;
    const Element* lower_x = x + kTileRows * x_stride;
    for (int half = 0; half < 2; half++, weights += kTileColumns, sums += 32) {
        float* lower_sums = sums + kTileRows * stride;
        begin_sums<FRESH>(sums, sums + 16, lower_sums, lower_sums + 16, stride);
        const Element* tile = weights;
        for (long pair = 0; pair < pairs; pair += kTilePairs, tile += kTilePairs * 2 * kTileColumns) {
            LOAD_TILE(4, x + 2 * pair, 2 * x_stride);
            fetch<kLines, kNear, 0>(ahead);
            LOAD_TILE(5, lower_x + 2 * pair, 2 * x_stride);
            LOAD_TILE(6, tile, 4 * kTileColumns);
            fetch<kLines, kNear, 1>(ahead);
            LOAD_TILE(7, tile + 32, 4 * kTileColumns);
            ADD_PRODUCTS_OF_TILES(0, 4, 6);
            fetch<kLines, kNear, 2>(ahead);
            ADD_PRODUCTS_OF_TILES(1, 4, 7);
            ADD_PRODUCTS_OF_TILES(2, 5, 6);
            fetch<kLines, kNear, 3>(ahead);
            ADD_PRODUCTS_OF_TILES(3, 5, 7);
            ahead += kLines * kLine;
        }
        store_sums(sums, sums + 16, lower_sums, lower_sums + 16, stride);
    }
}

// sums [rows][stride], 64 of each row: the products of the rows' inputs with one tile's weights, `pairs` of them, a
// multiple of 16; added to what is there unless FRESH. One part of PARTS of a tile is fetched from `ahead` on; 0: nothing.
template <bool FRESH, int PARTS>
void add_products(int rows, const Element* x, long x_stride, const Element* weights, long pairs, float* sums, long stride,
                  const Element* ahead) {
    asm volatile("" ::: "memory");  // compilers do not know that tiles are loaded from what was written before
    MatrixUnit::shape(rows);
    if (rows <= kTileRows) {
        add_few_rows<FRESH, PARTS>(x, x_stride, weights, pairs, sums, stride, ahead);
    } else {
        add_many_rows<FRESH, PARTS>(x, x_stride, weights, pairs, sums, stride, ahead);
    }
}
