// The inner loop by float32, of AVX2 and NEON, in the order of sets/avx512_products.hpp: of a pair the second product, then
// the first.
//
// Registers hold the sums of one row and 64 columns, of three and 32, or of five and 16. Inputs are widened once for all
// columns, a stretch of pairs at a time; weights where they are multiplied, once for all rows.
#pragma once

#include <numeric>

constexpr int kRowsAtOnce = 5;         // a sixth leaves no register for weights: 65 GFLOP/s where five have 90
constexpr int kRowsTogether = 2 * kRowsAtOnce;  // a step of eight takes 0.80 of that of two groups (Zen 3, two threads)
constexpr long kPanelRows = 60;        // a multiple of kRowsAtOnce
constexpr int kMostParts = 4;          // of the next tile, one of which a group of rows fetches
constexpr int kProductInputs = 16;     // inputs of a product are a multiple of it
constexpr bool kSumsInRegisters = true;  // pair by pair; else by the matrix unit, 16 pairs at a time
constexpr long kStretch = 128 / sizeof(Element);  // pairs: their weights, 16 KiB, stay near from columns to columns; more spill

// One group of rows: weights are fetched so far ahead, 1 KiB for one row, or 4 in float32, and 16 KiB for several, which
// pass over a stretch again and again. Four times as much takes a lone row of bfloat16 a tenth longer (Zen 3, one thread).
constexpr long near_lines(int rows) { return rows == 1 ? (sizeof(Element) == 2 ? 16 : 64) : 256; }

struct MatrixUnit {  // there is none
    static bool may_run() { return true; }
};

// 8 columns' first or second weights of a pair, of `eight` 0 or 1 from 16 columns on.
#ifdef KVFERRY_FLOAT32
inline Eight first_weights(const float* pairs, int eight) { return load_8(pairs + 8 * eight); }
inline Eight second_weights(const float* pairs, int eight) { return load_8(pairs + 16 + 8 * eight); }
#else
inline Eight first_weights(const bf16* pairs, int eight) { return evens(pairs + 16 * eight); }
inline Eight second_weights(const bf16* pairs, int eight) { return odds(pairs + 16 * eight); }
#endif

constexpr int kPairsAtOnce = 4;  // share what is fetched beside them; a number of pairs is a multiple of it

// As `add_products` below, of COLUMNS columns and at most a stretch of pairs, with LINES fetched beside kPairsAtOnce of them.
// `inputs` [ROWS][2 * kStretch]. Never inlined: beside other code the compiler runs out of registers.
template <int ROWS, int COLUMNS, int LINES>
[[gnu::noinline]] void add_stretch(const float* inputs, const Element* weights, long pairs, float* sums, long stride,
                                   bool is_fresh, const Element* ahead) {
    constexpr Near kNear = COLUMNS == kTileColumns ? Near::kFirst : Near::kSecond;
    constexpr int kVectors = COLUMNS / 8;
    Eight sum[ROWS][kVectors];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; i++) {
            sum[row][i] = is_fresh ? repeat_8(0.0f) : load_8(sums + row * stride + 8 * i);
        }
    }
    // Two vectors of columns at a time: an input is broadcast once for both.
    const auto add = [&](const float* inputs, int i, Eight one, Eight other) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            const Eight input = repeat_8(inputs + row * 2 * kStretch);
            if (ROWS <= 2) {
                sum[row][i] = fma(input, one, sum[row][i]);
                sum[row][i + 1] = fma(input, other, sum[row][i + 1]);
            } else {
                add_product(sum[row][i], input, one);
                add_product(sum[row][i + 1], input, other);
            }
        }
    };
    constexpr int kTurns = kPairsAtOnce / std::gcd(kPairsAtOnce, LINES);  // pairs until a whole number has been fetched
    constexpr auto lines_before = [](int turn) { return turn * LINES / kPairsAtOnce; };
    for (long pair = 0; pair < pairs; pair += kTurns, ahead += lines_before(kTurns) * kLine) {
#pragma GCC unroll 4
        for (int turn = 0; turn < kTurns; turn++, weights += 2 * kTileColumns, inputs += 2) {
#pragma GCC unroll 8
            for (int i = lines_before(turn); i < lines_before(turn + 1); i++) fetch_line<kNear>(ahead + kLine * i);
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; i += 2) {
                const Element* source = weights + 16 * i;
                const float* from = inputs;
                if (ROWS > 2) asm volatile("" : "+r"(from));  // and inputs once more for every two vectors
                add(from + 1, i, second_weights(source, 0), second_weights(source, 1));
                asm("" : "+r"(source));  // read again: there is no register to keep them in
                add(from, i, first_weights(source, 0), first_weights(source, 1));
            }
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; i++) store(sums + row * stride + 8 * i, sum[row][i]);
    }
}

// A stretch of pairs and all columns, in passes that share out evenly what is fetched ahead, LINES beside a pair: more than
// memory gives would hold up some, and memory would be idle beside others.
template <int ROWS, int LINES>
void add_stretch(const float* inputs, const Element* weights, long pairs, float* sums, long stride, bool is_fresh,
                 const Element* ahead) {
    constexpr int kColumns = ROWS == 1 ? 64 : ROWS <= 3 ? 32 : 16, kPasses = kTileColumns / kColumns;
    constexpr int kLines = kPairsAtOnce * LINES / kPasses;
    for (int column = 0; column < kTileColumns; column += kColumns, ahead += kLines * pairs / kPairsAtOnce * kLine) {
        add_stretch<ROWS, kColumns, kLines>(inputs, weights + 2 * column, pairs, sums + column, stride, is_fresh, ahead);
    }
}

// sums [rows][stride], 64 of each row: the products of the rows' inputs with one tile's weights, `pairs` of them, added
// up in order; added to what is there unless FRESH. One part of PARTS of a tile is fetched from `ahead` on; 0: nothing.
template <bool FRESH, int PARTS>
void add_products(int rows, const Element* x, long x_stride, const Element* weights, long pairs, float* sums, long stride,
                  const Element* ahead) {
    constexpr int kLines = kFetchedLines<PARTS>;
    // One group of bfloat16 waits less for memory by shorter stretches; of float32 these would be too few pairs.
    constexpr long kStep = PARTS == 1 && sizeof(Element) == 2 ? kStretch / 4 : kStretch;
    alignas(32) float inputs[kRowsAtOnce * 2 * kStretch];
    for (long first = 0; first < pairs; first += kStep) {
        const long count = std::min(kStep, pairs - first);
        for (int row = 0; row < rows; row++) {
            for (long i = 0; i < 2 * count; i += 16) {
                store(inputs + row * 2 * kStretch + i, load(x + row * x_stride + 2 * first + i));
            }
        }
        const auto add = [&]<int ROWS>() {
            add_stretch<ROWS, kLines>(inputs, weights + first * 2 * kTileColumns, count, sums, stride, FRESH && first == 0,
                                     ahead + first * kLines * kLine);
        };
        switch (rows) {
            case 1: add.template operator()<1>(); break;
            case 2: add.template operator()<2>(); break;
            case 3: add.template operator()<3>(); break;
            case 4: add.template operator()<4>(); break;
            default: add.template operator()<5>();
        }
    }
}
