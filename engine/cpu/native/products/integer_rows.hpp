// Rows of bfloat16 as whole numbers, a segment of up to 32 inputs of one group at a time, each with a scale.
//
//     s = max|x| / 127, q = x * (127 / max|x|) to the nearest whole number, ties to even
//
// Inputs of language models have outliers, a hundred times as large as others: a scale for a whole row would leave most
// of it a few bits.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "products/integer_tiles.hpp"
#include "products/integers.hpp"

// Rows of bfloat16 as whole numbers.
class IntegerRows {
public:
    // Rows are padded with zeros to 32 values.
    void set(const bf16* x, long x_stride, long count, const IntegerTiles& w) {
        const long behind = w.group % 16 == 0 ? 0 : 8;  // of a group's last segment, of which sixteens are written
        stride_ = padded(w.inputs + behind, 64) * (w.bits == 8 ? kInputSize<8> : kInputSize<4>);
        segments_ = w.groups() * w.segments();
        groups_ = w.groups();
        numbers_.resize(count * stride_);
        starts_.resize(count * segments_);
        scales_.resize(count * segments_);
        group_sums_.resize(count * groups_);
        for (long row = 0; row < count; row++) {
            const bf16* values = x + row * x_stride;
            if (w.order != nullptr) values = gathered(values, w);
            if (w.bits == 8) set_row<8>(row, values, w);
            else set_row<4>(row, values, w);
        }
    }

    long stride() const { return stride_; }  // bytes
    long segments() const { return segments_; }
    const std::int8_t* numbers(long row) const { return numbers_.data() + row * stride_; }  // kInputSize each
    const std::int32_t* starts(long row) const { return starts_.data() + row * segments_; }  // of each segment's sums
    const float* scales(long row) const { return scales_.data() + row * segments_; }
    const float* group_sums(long row) const { return group_sums_.data() + row * groups_; }  // of what numbers mean

private:
    static constexpr float kSmallest = 0x1p-100f;  // below it inputs are zero: 127 / x has to be finite

    // For weights of so many bits.
    template <int BITS>
    void set_row(long row, const bf16* x, const IntegerTiles& w) {
        std::int8_t* numbers = numbers_.data() + row * stride_;
        std::int32_t* starts = starts_.data() + row * segments_;
        float* scales = scales_.data() + row * segments_;
        for (long group = 0; group < groups_; group++) {
            float group_sum = 0;
            for (long at = group * w.group, end = at + w.group; at < end; at += kSegment, starts++, scales++) {
                const long size = std::min<long>(kSegment, end - at);
                std::int8_t* const target = numbers + at * kInputSize<BITS>;
                const Quantized segment = size == kSegment ? quantize<BITS>(x + at, kSegment, target)
                                                           : quantize<BITS>(x + at, size, target);
                *starts = -w.zero() * segment.sum;
                *scales = segment.scale;
                group_sum = __builtin_fmaf(float(segment.sum), segment.scale, group_sum);
            }
            group_sums_[row * groups_ + group] = group_sum;
        }
    }

    struct Quantized {
        std::int32_t sum;  // of the numbers
        float scale;
    };

    template <int BITS>
    [[gnu::always_inline]] static Quantized quantize(const bf16* x, long size, std::int8_t* numbers) {
        bf16 most = 0;  // of the magnitudes, which as bits are in order, infinity and NaN last
        for (long i = 0; i < size; i++) most = std::max<bf16>(most, x[i] & 0x7fff);
        const std::uint32_t bits = std::uint32_t(most) << 16;
        float largest;
        std::memcpy(&largest, &bits, sizeof largest);
        const bool is_finite = most < 0x7f80;
        if (!is_finite || largest < kSmallest) {
            std::fill_n(numbers, padded(size, 16) * kInputSize<BITS>, std::int8_t(0));
            return {0, is_finite ? 0.0f : std::numeric_limits<float>::quiet_NaN()};
        }
        const Vector factor = repeat(127.0f / largest);
        Vector sums = repeat(0.0f);  // whole numbers
        for (long i = 0; i < size; i += 16) {
            const Vector whole = nearest(load(x + i, lanes(size - i)) * factor);
            store_inputs(numbers + i * kInputSize<BITS>, whole, std::bool_constant<kHasWideInputs<BITS>>());
            sums = sums + whole;
        }
        return {std::int32_t(sum_of(sums)), largest / 127.0f};
    }

    const bf16* gathered(const bf16* x, const IntegerTiles& w) {
        gathered_.assign(padded(w.inputs, kSegment), 0);
        for (long i = 0; i < w.inputs; i++) gathered_[i] = x[w.order[i]];
        return gathered_.data();
    }

    long stride_ = 0, segments_ = 0, groups_ = 0;
    Lines<std::int8_t> numbers_;
    std::vector<std::int32_t> starts_;
    Lines<float> scales_, group_sums_;
    Lines<bf16> gathered_;
};

// A thread's own, of the product that it is at.
inline IntegerRows& own_rows() {
    static thread_local IntegerRows rows;
    return rows;
}
