// The inner loop by AMX tiles of bfloat16, 16 pairs of inputs at a time: up to 32 rows and 32 columns.
//
// A product of tiles sums up its 16 pairs' first products and their second ones, each in order, adds both and then what
// was there. So a row's sums do not depend on the other rows, but are not those of the other instruction sets.
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

// The sums of 16 rows at this place, in tiles FIRST and the next one: zeros if FRESH.
#define BEGIN_SUMS(FIRST, NEXT, place)              \
    if (FRESH) {                                    \
        CLEAR_TILE(FIRST);                          \
        CLEAR_TILE(NEXT);                           \
    } else {                                        \
        LOAD_TILE(FIRST, place, 4 * stride);        \
        LOAD_TILE(NEXT, (place) + 16, 4 * stride);  \
    }

// Rows are loaded past the nearest cache where weights are to stay in it.
template <bool FRESH, int PARTS, bool WIDE>
void add_tiles(const Element* x, long x_stride, const Element* weights, long pairs, float* sums, long stride,
               const Element* ahead) {
    constexpr int kLines = kTileLines<PARTS>;
    constexpr bool kNear = PARTS == 1;
    const Element* const lower_x = x + kTileRows * x_stride;
    float* const lower_sums = sums + kTileRows * stride;
    BEGIN_SUMS(0, 1, sums)
    if (WIDE) { BEGIN_SUMS(2, 3, lower_sums) }
    for (long pair = 0; pair < pairs; pair += kTilePairs, weights += kTilePairs * 2 * kPartColumns) {
        if (PARTS > 1) LOAD_TILE_ONCE(4, x + 2 * pair, 2 * x_stride);
        else LOAD_TILE(4, x + 2 * pair, 2 * x_stride);
        fetch<kLines, kNear, 0>(ahead);
        if (WIDE && PARTS > 1) LOAD_TILE_ONCE(5, lower_x + 2 * pair, 2 * x_stride);
        else if (WIDE) LOAD_TILE(5, lower_x + 2 * pair, 2 * x_stride);
        LOAD_TILE(6, weights, 4 * kPartColumns);
        fetch<kLines, kNear, 1>(ahead);
        LOAD_TILE(7, weights + 32, 4 * kPartColumns);
        ADD_PRODUCTS_OF_TILES(0, 4, 6);
        fetch<kLines, kNear, 2>(ahead);
        ADD_PRODUCTS_OF_TILES(1, 4, 7);
        if (WIDE) ADD_PRODUCTS_OF_TILES(2, 5, 6);
        fetch<kLines, kNear, 3>(ahead);
        if (WIDE) ADD_PRODUCTS_OF_TILES(3, 5, 7);
        ahead += kLines * kLine;
    }
    STORE_TILE(0, sums, 4 * stride);
    STORE_TILE(1, sums + 16, 4 * stride);
    if (WIDE) {
        STORE_TILE(2, lower_sums, 4 * stride);
        STORE_TILE(3, lower_sums + 16, 4 * stride);
    }
}

// sums [rows][stride], 32 of each row: the products of the rows' inputs with a part of a tile, `pairs` of them, a multiple
// of 16; added to what is there unless FRESH. One share of PARTS of a part is fetched from `ahead` on; 0: nothing.
template <bool FRESH, int PARTS>
void add_products(int rows, const Element* x, long x_stride, const Element* weights, long pairs, float* sums, long stride,
                  const Element* ahead) {
    asm volatile("" ::: "memory");  // compilers do not know that tiles are loaded from what was written before
    MatrixUnit::shape(rows);
    if (rows <= kTileRows) add_tiles<FRESH, PARTS, false>(x, x_stride, weights, pairs, sums, stride, ahead);
    else add_tiles<FRESH, PARTS, true>(x, x_stride, weights, pairs, sums, stride, ahead);
}
