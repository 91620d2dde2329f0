// The inner loop by VDPBF16PS: a tile's pairs are multiplied as they lie, each by one pair of a row's inputs that is
// broadcast.
#pragma once

constexpr int kRowsAtOnce = 6;         // their 24 sums, a pair's four vectors and one input stay in registers
constexpr int kRowsTogether = 24;      // more are multiplied no sooner stretch by stretch than tile by tile
constexpr long kPanelRows = 60;        // a multiple of kRowsAtOnce
constexpr int kMostParts = 4;          // of the next tile, one of which a group of rows fetches
constexpr int kProductInputs = 16;     // inputs of a product are a multiple of it
constexpr bool kSumsInRegisters = true;  // pair by pair; else by the matrix unit, 16 pairs at a time

// One group of rows: weights are fetched so far ahead, 8 KiB; 4 take up to 6 % longer.
constexpr long near_lines(int) { return 128; }
// On a Zen 4 to the second cache, and so far ahead: a lone row takes 0.88 of the time, six 0.95. Where they come 4 KiB ahead
// three rows and more take up to half as long again.
constexpr long near_lines_of_zen4(int rows) { return rows <= 2 ? 32 : 12; }

struct MatrixUnit {  // there is none
    static bool may_run() { return true; }
};

// sums [ROWS][stride], 64 of each row: the products of ROWS rows' inputs with one tile's weights, `pairs` of them, added
// up in order; added to what is there unless FRESH. One part of PARTS of a tile is fetched from `ahead` on; 0: nothing.
template <int ROWS, bool FRESH, int PARTS, Near TO>
void add_products(const Element* x, long x_stride, const Element* weights, long pairs, float* sums, long stride,
                  const Element* ahead) {
    constexpr int LINES = kFetchedLines<PARTS>;
    Vector sum[ROWS][4];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[row][i] = FRESH ? repeat(0.0f) : load(sums + row * stride + 16 * i);
    }
    for (long pair = 0; pair < pairs; pair++, weights += 2 * kTileColumns, ahead += LINES * kLine) {
        Pairs weight[4];
#pragma GCC unroll 4
        for (int i = 0; i < LINES; i++) fetch_line<TO>(ahead + kLine * i);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) weight[i] = load_pairs(weights + 32 * i);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            const Pairs input = repeat_pair(x + row * x_stride + 2 * pair);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sum[row][i] = dot(sum[row][i], input, weight[i]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) store(sums + row * stride + 16 * i, sum[row][i]);
    }
}

template <bool FRESH, int PARTS, Near TO>
void add_rows(int rows, const Element* x, long x_stride, const Element* weights, long pairs, float* sums, long stride,
              const Element* ahead) {
    switch (rows) {
        case 1: return add_products<1, FRESH, PARTS, TO>(x, x_stride, weights, pairs, sums, stride, ahead);
        case 2: return add_products<2, FRESH, PARTS, TO>(x, x_stride, weights, pairs, sums, stride, ahead);
        case 3: return add_products<3, FRESH, PARTS, TO>(x, x_stride, weights, pairs, sums, stride, ahead);
        case 4: return add_products<4, FRESH, PARTS, TO>(x, x_stride, weights, pairs, sums, stride, ahead);
        case 5: return add_products<5, FRESH, PARTS, TO>(x, x_stride, weights, pairs, sums, stride, ahead);
        default: return add_products<6, FRESH, PARTS, TO>(x, x_stride, weights, pairs, sums, stride, ahead);
    }
}

template <bool FRESH, int PARTS>
void add_products(int rows, const Element* x, long x_stride, const Element* weights, long pairs, float* sums, long stride,
                  const Element* ahead) {
    if (PARTS == 1 && kIsZen4) {
        ahead -= (near_lines(rows) - near_lines_of_zen4(rows)) * kLine;
        return add_rows<FRESH, PARTS, Near::kSecond>(rows, x, x_stride, weights, pairs, sums, stride, ahead);
    }
    constexpr Near TO = PARTS == 1 ? Near::kFirst : Near::kSecond;
    add_rows<FRESH, PARTS, TO>(rows, x, x_stride, weights, pairs, sums, stride, ahead);
}
