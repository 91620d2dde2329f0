// y = x W^T for W in whole numbers (integer_tiles.hpp), by inputs in whole numbers (integer_rows.hpp).
//
//     y = sum over groups of scale * a + minimum * b     a, b = sums over segments of s * sum(number * q), s * sum(q)
//
// Sums over a segment are whole numbers, so that their order is of no effect; what they are multiplied by is added up
// in order, each time with one rounding. A row's results are therefore the same bits whatever other rows, threads or
// instructions there are. A row that is not finite has results that are NaN, and no effect on others.
#pragma once

#include <algorithm>
#include <iterator>

#include "products/integer_rows.hpp"
#include "products/integer_tiles.hpp"
#include "products/integers.hpp"
#include "machine/team.hpp"

// One group of rows: weights are fetched so far ahead, as in linear.hpp. The best of 2 to 16 KiB on a Zen 4, one row and
// four: of bytes 8 KiB, which 4 take 8 % longer than; what holds twice as many numbers computes longer by each byte. To the
// second cache the best of 256 bytes to 16 KiB there: two rows 0.75 of the time, six of bytes 0.75, of half bytes 0.9.
template <Numbers NUMBERS, Near TO>
constexpr long bytes_ahead(int rows) {
    if (TO == Near::kSecond) return rows <= 2 ? 512 : 12288;
    return NUMBERS == kBytes ? 8192 : 4096;
}

template <Near TO>
inline void fetch(const std::uint8_t* at, int lines) {
#pragma GCC unroll 4
    for (int i = 0; i < lines; i++) fetch_line<TO>(at + 64 * i);
}

// Bytes of a row's inputs that a unit of 256 bytes is multiplied by.
template <Numbers NUMBERS>
constexpr long kUnitInputs = 32 / bits_of(NUMBERS) * kInputSize<bits_of(NUMBERS)>;

// A segment of so many rows: where its numbers and what belongs to them stand.
struct Segment {
    const std::int8_t* numbers;
    const std::int32_t* starts;
    const float* scales;
    long stride, segments;  // from row to row
};

// A group's scales and minima.
struct Factors {
    const std::uint8_t *scales, *minima, *bases;  // null where there are none; bases: of scales, then of minima
    long size;                                    // bytes of a scale or minimum
    bool are_floats;                              // of 8 bits, those that are multiplied by bases

    Vector scale(int vector) const { return read(scales, bases, vector); }
    Vector minimum(int vector) const { return read(minima, bases + 4 * kTileColumns, vector); }

private:
    Vector read(const std::uint8_t* factors, const std::uint8_t* bases, int vector) const {
        if (size == 4) return load((const float*)factors + 16 * vector);
        if (size == 2) return load_halves(factors + 32 * vector);
        if (bases == nullptr) return load_powers(factors + 16 * vector);
        const std::uint8_t* const bytes = factors + 16 * vector;
        return (are_floats ? load_e4m3(bytes) : load_bytes_as_floats(bytes)) * load((const float*)bases + 16 * vector);
    }
};

// A segment's place in its group, and the group.
struct Group {
    Factors factors;
    const float* sums;  // what the group's numbers mean in each row, `stride` apart
    long stride;
    bool is_first, is_last;  // segment
};

// sums [ROWS][64]: a group's minima times what its inputs add up to in each row, for one vector of 16 columns.
template <int ROWS>
inline void add_minima(const Group& group, int vector, float* sums) {
    const Vector minimum = group.factors.minimum(vector);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
        float* target = sums + row * kTileColumns + 16 * vector;
        store(target, fma(repeat(group.sums[row * group.stride]), minimum, load(target)));
    }
}

// sum [ROWS][VECTORS]: the products of ROWS rows' next inputs with 64 bytes each of VECTORS vectors of 16 columns.
template <Numbers NUMBERS, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void add_unit(const std::int8_t* inputs, long stride, const std::uint8_t* bytes,
                                            Ints* sum) {
#pragma GCC unroll 2
    for (int half = 0; half < 8 / bits_of(NUMBERS); half++, inputs += 4 * kInputSize<bits_of(NUMBERS)>) {
        Bytes weights[VECTORS];
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) {
            weights[i] = load_bytes(bytes + 64 * i);
            if (NUMBERS != kBytes) weights[i] = half == 0 ? low_nibbles(weights[i]) : high_nibbles(weights[i]);
            if (NUMBERS == kE2m1) weights[i] = twice_e2m1(weights[i]);
        }
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            const Fours<bits_of(NUMBERS)> fours(inputs + row * stride);
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; i++) {
                Ints& target = sum[row * VECTORS + i];
                target = dot<most_of(NUMBERS)>(target, weights[i], fours);
            }
        }
    }
}

// The products of ROWS rows with a segment, VECTORS vectors of 16 columns from vector `first` on: added up in
// parts [ROWS][64] to the group's end, then times its factors to what is in sums [ROWS][64]. `bytes`: numbers, 256
// bytes a unit. For each unit LINES cache lines from `ahead` on are fetched. Never inlined: beside other code the
// compiler runs out of registers.
template <Numbers NUMBERS, int ROWS, int VECTORS, int LINES, Near TO>
[[gnu::noinline]] void add_segment(const Segment& x, const Group& group, const std::uint8_t* bytes, long units,
                                   const std::uint8_t* ahead, int first, float* parts, float* sums) {
    const std::int8_t* inputs = x.numbers;
    const long stride = x.stride;
    bytes += 64 * first;
    Ints sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) sum[row][i] = first_sum<most_of(NUMBERS)>(x.starts[row * x.segments]);
    }
    for (; units > 0; units--, bytes += 4 * kTileColumns, ahead += 64 * LINES) {
        fetch<TO>(ahead, LINES);
        add_unit<NUMBERS, ROWS, VECTORS>(inputs, stride, bytes, sum[0]);
        inputs += kUnitInputs<NUMBERS>;
    }
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) {
        const auto each_row = [&](auto put) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; row++) {
                const int at = row * kTileColumns + 16 * (first + i);
                keep_in_registers(sum[row][i]);
                const Vector whole = to_floats(last_sum<most_of(NUMBERS)>(sum[row][i], x.starts[row * x.segments]));
                const Vector by = repeat(x.scales[row * x.segments]);
                put(at, group.is_first ? whole * by : fma(whole, by, load(parts + at)));
            }
        };
        if (!group.is_last) {
            each_row([&](int at, Vector part) __attribute__((always_inline)) { store(parts + at, part); });
            continue;
        }
        const Vector scale = group.factors.scale(first + i);
        each_row([&](int at, Vector part) __attribute__((always_inline)) {
            store(sums + at, fma(part, scale, load(sums + at)));
        });
        if (group.factors.minima != nullptr) add_minima<ROWS>(group, first + i, sums);
    }
}

// sums [ROWS][64]: the products of ROWS rows with one tile.
template <Numbers NUMBERS, int ROWS, int LINES, Near TO>
void integer_products(const IntegerRows& x, long row, const IntegerTiles& w, const std::uint8_t* tile,
                      const std::uint8_t* ahead, float* sums) {
    constexpr int kVectors = kVectorsAtOnce[ROWS - 1];
    alignas(64) float parts[ROWS * kTileColumns];
    const auto skip = [&](long size) {  // what the loop over numbers does not fetch
        for (long at = 0; LINES == 4 && at < size; at += 64, ahead += 64) fetch<TO>(ahead, 1);
        tile += size;
        return tile - size;
    };
    std::fill_n(sums, ROWS * kTileColumns, 0.0f);
    Segment segment{x.numbers(row), x.starts(row), x.scales(row), x.stride(), x.segments()};
    Group group{{nullptr, nullptr, nullptr, w.factor_size, w.is_e2m1 != 0}, x.group_sums(row), w.groups(), true, true};
    for (long index = 0; index < w.groups(); index++, group.sums++) {
        Factors& factors = group.factors;
        if (w.begins_span(index)) factors.bases = skip(w.bases_size());
        factors.scales = skip(w.factors_size());
        if (w.has_minima) factors.minima = factors.scales + w.scales_size();
        for (long at = 0; at < w.group; at += kSegment) {
            const long size = std::min<long>(kSegment, w.group - at), units = w.units(size);
            group.is_first = at == 0, group.is_last = at + size == w.group;
            add_segment<NUMBERS, ROWS, kVectors, LINES, TO>(segment, group, tile, units, ahead, 0, parts, sums);
            for (int first = kVectors; first < 4; first += kVectors) {
                add_segment<NUMBERS, ROWS, kVectors, 0, Near::kFirst>(segment, group, tile, units, nullptr, first, parts, sums);
            }
            tile += units * 4 * kTileColumns;
            ahead += units * 64 * LINES;
            segment.numbers += size * kInputSize<bits_of(NUMBERS)>, segment.starts++, segment.scales++;
        }
    }
}

// The same of one row, all of whose sums stay in registers: it waits for nothing but the weights.
template <Numbers NUMBERS, Near TO>
void integer_products_of_one(const IntegerRows& x, const IntegerTiles& w, const std::uint8_t* tile, float* sums) {
    const std::int8_t* inputs = x.numbers(0);
    const std::int32_t* start = x.starts(0);
    const float *by = x.scales(0), *group_sum = x.group_sums(0);
    Factors factors{nullptr, nullptr, nullptr, w.factor_size, w.is_e2m1 != 0};
    const auto skip = [&](long size) {
        for (long at = 0; at < size; at += 64) fetch<TO>(tile + bytes_ahead<NUMBERS, TO>(1) + at, 1);
        tile += size;
        return tile - size;
    };
    Vector total[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) total[i] = repeat(0.0f);
    for (long group = 0; group < w.groups(); group++, group_sum++) {
        if (w.begins_span(group)) factors.bases = skip(w.bases_size());
        factors.scales = skip(w.factors_size());
        Vector part[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) part[i] = repeat(0.0f);
        for (long at = 0; at < w.group; at += kSegment, start++, by++) {
            Ints sum[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sum[i] = first_sum<most_of(NUMBERS)>(*start);
            const std::uint8_t* end = tile + w.units(std::min<long>(kSegment, w.group - at)) * 4 * kTileColumns;
            for (; tile < end; tile += 4 * kTileColumns) {
                fetch<TO>(tile + bytes_ahead<NUMBERS, TO>(1), 4);
                add_unit<NUMBERS, 1, 4>(inputs, 0, tile, sum);
                inputs += kUnitInputs<NUMBERS>;
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                part[i] = fma(to_floats(last_sum<most_of(NUMBERS)>(sum[i], *start)), repeat(*by), part[i]);
            }
        }
        inputs -= w.units(w.group) * kUnitInputs<NUMBERS> - w.group * kInputSize<bits_of(NUMBERS)>;  // padding
        if (w.has_minima) factors.minima = factors.scales + w.scales_size();
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            total[i] = fma(part[i], factors.scale(i), total[i]);
            if (w.has_minima) total[i] = fma(repeat(*group_sum), factors.minimum(i), total[i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) store(sums + 16 * i, total[i]);
}

template <Numbers NUMBERS, int LINES, Near TO>
void integer_products(int rows, const IntegerRows& x, long row, const IntegerTiles& w, const std::uint8_t* tile,
                      const std::uint8_t* ahead, float* sums) {
    switch (rows) {
        case 2: return integer_products<NUMBERS, 2, LINES, TO>(x, row, w, tile, ahead, sums);
        case 3: return integer_products<NUMBERS, 3, LINES, TO>(x, row, w, tile, ahead, sums);
        case 4: return integer_products<NUMBERS, 4, LINES, TO>(x, row, w, tile, ahead, sums);
        case 5: return integer_products<NUMBERS, 5, LINES, TO>(x, row, w, tile, ahead, sums);
        default: return integer_products<NUMBERS, 6, LINES, TO>(x, row, w, tile, ahead, sums);
    }
}

// One group of rows waits for the weights, others find them near: while these compute, a part of the next tile comes.
template <Numbers NUMBERS, Near TO>
void products_of_group(Range rows, long index, long groups, const IntegerRows& x, const IntegerTiles& w,
                      const std::uint8_t* tile, float* sums) {
    const int count = int(rows.last - rows.first);
    if (count == 1) return integer_products_of_one<NUMBERS, TO>(x, w, tile, sums);
    const auto multiply = [&]<int LINES, Near LINES_TO>(const std::uint8_t* ahead) {
        integer_products<NUMBERS, LINES, LINES_TO>(count, x, rows.first, w, tile, ahead, sums);
    };
    const auto part_of_next = [&](long parts) { return tile + w.tile_size() + index % parts * w.tile_size() / parts; };
    if (groups == 1) multiply.template operator()<4, TO>(tile + bytes_ahead<NUMBERS, TO>(count));
    else if (groups < 4) multiply.template operator()<2, Near::kSecond>(part_of_next(2));
    else multiply.template operator()<1, Near::kSecond>(part_of_next(4));
}

// As ElementProducts in linear.hpp. Rows become whole numbers where the first of them are wanted.
class IntegerProducts : public TileUnits<kTileColumns> {
public:
    static constexpr int kRows = std::size(kVectorsAtOnce);

    IntegerProducts(const bf16* x, long stride, long count, const IntegerTiles& w)
        : TileUnits(count, kRows), x_(x), stride_(stride), w_(w),
          set_(kIsZen4 ? products_of<Near::kSecond>(w) : products_of<Near::kFirst>(w)) {}

    void set(long index, long group, float* sums) {
        if (!has_rows_) rows_.set(x_, stride_, count_, w_);
        has_rows_ = true;
        set_(rows(group), group, groups_, rows_, w_, w_.tile(index), sums);
    }

private:
    using Set = void (*)(Range, long, long, const IntegerRows&, const IntegerTiles&, const std::uint8_t*, float*);

    template <Near TO>
    static Set products_of(const IntegerTiles& w) {
        if (w.bits == 8) return products_of_group<kBytes, TO>;
        return w.is_e2m1 ? products_of_group<kE2m1, TO> : products_of_group<kNibbles, TO>;
    }

    const bf16* x_;
    const long stride_;
    const IntegerTiles& w_;
    const Set set_;
    IntegerRows& rows_ = own_rows();
    bool has_rows_ = false;
};
