// The inner loop by products of bfloat16: BFMMLA, which multiplies two rows' four inputs by two columns' four weights, or
// BFDOT of a lone row, which multiplies a pair. The first is defined as two of the second, pair after pair (Arm's manual of
// the architecture, BFMMLA): a row's sums do not depend on the other rows, but are not those of other instruction sets.
#pragma once

constexpr int kRowsAtOnce = 6;         // their 24 sums of 16 columns, three inputs and two weights stay in registers
constexpr int kRowsTogether = kRowsAtOnce;  // it passes over stretches by itself
constexpr long kPanelRows = 60;        // a multiple of kRowsAtOnce
constexpr int kMostParts = 4;          // of the next tile, one of which a group of rows fetches
constexpr int kProductInputs = 16;     // inputs of a product are a multiple of it
constexpr bool kSumsInRegisters = true;  // pair by pair; else by the matrix unit, 16 pairs at a time
constexpr long kStretch = 64;          // pairs: their weights, 16 KiB, stay near from columns to columns

// One group of rows: weights are fetched so far ahead, as in sets/widened_products.hpp.
constexpr long near_lines(int rows) { return rows == 1 ? 64 : kPairLines * kStretch; }

struct MatrixUnit {  // there is none
    static bool may_run() { return true; }
};

// Four pairs of inputs, each by its lane.
template <int LANE>
Four dot_lane(Four sum, uint32x4_t weights, uint32x4_t inputs) {
    return vbfdotq_laneq_f32(sum, as_bfloat16(weights), as_bfloat16(inputs), LANE);
}

// As `add_products` below, of one row.
template <bool FRESH, int LINES>
void add_row(const bf16* x, const bf16* weights, long pairs, float* sums, const bf16* ahead) {
    Four sum[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sum[i] = FRESH ? vdupq_n_f32(0.0f) : vld1q_f32(sums + 4 * i);
    const auto add = [&]<int LANE>(uint32x4_t inputs) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int i = 0; i < LINES; i++) fetch_line(ahead + kLine * i);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) sum[i] = dot_lane<LANE>(sum[i], load_4_pairs(weights + 8 * i), inputs);
        weights += 2 * kTileColumns;
        ahead += LINES * kLine;
    };
    for (long pair = 0; pair < pairs; pair += 4) {
        const uint32x4_t inputs = load_4_pairs(x + 2 * pair);
        add.template operator()<0>(inputs);
        add.template operator()<1>(inputs);
        add.template operator()<2>(inputs);
        add.template operator()<3>(inputs);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) vst1q_f32(sums + 4 * i, sum[i]);
}

// Two rows' sums of two columns each, as BFMMLA has them: of one row, then of the other.
inline Four both(const float* one, const float* other) { return vcombine_f32(vld1_f32(one), vld1_f32(other)); }
inline void put_both(Four sums, float* one, float* other) {
    vst1_f32(one, vget_low_f32(sums));
    vst1_f32(other, vget_high_f32(sums));
}

// TWOS twos of rows and 16 columns, at most a stretch of pairs. `inputs` [pairs / 2][TWOS][2 rows][4]. Of the last two
// maybe only one row is there, of `rows`.
template <int TWOS, int LINES>
void add_stretch(const bf16* inputs, const bf16* weights, long pairs, int rows, float* sums, long stride, bool is_fresh,
                 const bf16* ahead) {
    constexpr int kVectors = 8;  // of two columns
    Four sum[TWOS][kVectors];
    const auto second = [&](int two) { return std::min(2 * two + 1, rows - 1) * stride; };
#pragma GCC unroll 4
    for (int two = 0; two < TWOS; two++) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; i++) {
            const float* const first = sums + 2 * i;
            sum[two][i] = is_fresh ? vdupq_n_f32(0.0f) : both(first + 2 * two * stride, first + second(two));
        }
    }
    for (long pair = 0; pair < pairs; pair += 2, weights += 4 * kTileColumns, inputs += 8 * TWOS, ahead += 2 * LINES * kLine) {
#pragma GCC unroll 8
        for (int i = 0; i < 2 * LINES; i++) fetch_line<Near::kSecond>(ahead + kLine * i);
        uint32x4_t input[TWOS];
#pragma GCC unroll 4
        for (int two = 0; two < TWOS; two++) input[two] = load_4_pairs(inputs + 8 * two);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; i += 2) {  // four columns' pair and their next one: two columns' four inputs
            const uint32x4_t one = load_4_pairs(weights + 4 * i), next = load_4_pairs(weights + 2 * kTileColumns + 4 * i);
            const bfloat16x8_t lower = as_bfloat16(vzip1q_u32(one, next)), upper = as_bfloat16(vzip2q_u32(one, next));
#pragma GCC unroll 4
            for (int two = 0; two < TWOS; two++) {
                sum[two][i] = vbfmmlaq_f32(sum[two][i], as_bfloat16(input[two]), lower);
                sum[two][i + 1] = vbfmmlaq_f32(sum[two][i + 1], as_bfloat16(input[two]), upper);
            }
        }
    }
#pragma GCC unroll 4
    for (int two = 0; two < TWOS; two++) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; i++) {
            put_both(sum[two][i], sums + 2 * i + 2 * two * stride, sums + 2 * i + second(two));
        }
    }
}

// As `add_products`, of several rows. A row that would be the other of two is the last one once more.
template <int TWOS, bool FRESH, int LINES>
void add_rows(int rows, const bf16* x, long x_stride, const bf16* weights, long pairs, float* sums, long stride,
              const bf16* ahead) {
    constexpr int kColumns = 16, kPasses = kTileColumns / kColumns, kLines = LINES / kPasses;
    alignas(64) bf16 inputs[TWOS * 2 * 2 * kStretch];
    for (long first = 0; first < pairs; first += kStretch, weights += kStretch * 2 * kTileColumns) {
        const long count = std::min(kStretch, pairs - first);
        for (int row = 0; row < 2 * TWOS; row++) {
            const bf16* const source = x + std::min(row, rows - 1) * x_stride + 2 * first;
            for (long i = 0; i < count / 2; i++) vst1_u16(inputs + (i * TWOS * 2 + row) * 4, vld1_u16(source + 4 * i));
        }
        const bool is_fresh = FRESH && first == 0;
        for (int column = 0; column < kTileColumns; column += kColumns) {
            if (LINES >= kPasses || column == 0) {
                constexpr int kEach = LINES >= kPasses ? kLines : LINES;
                add_stretch<TWOS, kEach>(inputs, weights + 2 * column, count, rows, sums + column, stride, is_fresh, ahead);
                ahead += kEach * count * kLine;
            } else {
                add_stretch<TWOS, 0>(inputs, weights + 2 * column, count, rows, sums + column, stride, is_fresh, nullptr);
            }
        }
    }
}

// sums [rows][stride], 64 of each row: the products of the rows' inputs with one tile's weights, `pairs` of them, a multiple
// of 4, added up in order; added to what is there unless FRESH. One part of PARTS of a tile is fetched from `ahead` on; 0:
// nothing.
template <bool FRESH, int PARTS>
void add_products(int rows, const bf16* x, long x_stride, const bf16* weights, long pairs, float* sums, long stride,
                  const bf16* ahead) {
    constexpr int kLines = kFetchedLines<PARTS>;
    switch ((rows + 1) / 2) {
        case 1:
            if (rows == 1) return add_row<FRESH, kLines>(x, weights, pairs, sums, ahead);
            return add_rows<1, FRESH, kLines>(rows, x, x_stride, weights, pairs, sums, stride, ahead);
        case 2: return add_rows<2, FRESH, kLines>(rows, x, x_stride, weights, pairs, sums, stride, ahead);
        default: return add_rows<3, FRESH, kLines>(rows, x, x_stride, weights, pairs, sums, stride, ahead);
    }
}
