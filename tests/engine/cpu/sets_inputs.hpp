// Seeded inputs for sets.cpp, and how results are told.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

inline void put(const std::string& name, const float* values, long count) {
    std::printf("%s:", name.c_str());
    for (long i = 0; i < count; i++) {
        std::uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        std::printf(" %08x", bits);
    }
    std::printf("\n");
}

// What is promised of one library by itself.
inline void put_same(const std::string& name, bool is_same) { std::printf("%s: %s\n", name.c_str(), is_same ? "same" : "other"); }

inline Element element(float value) {
#ifdef KVFERRY_FLOAT32
    return value;
#else
    Element target[16];
    store(target, repeat(rounded(value)));
    return target[0];
#endif
}

class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 1) {}

    std::uint32_t bits() {
        state_ = state_ * 6364136223846793005 + 1442695040888963407;
        return std::uint32_t(state_ >> 33);
    }
    float between(float least, float most) { return least + (most - least) * (float(bits() & 0xffffff) / float(1 << 24)); }

    Lines<Element> elements(long count, float most) {
        Lines<Element> values(count);
        for (Element& value : values) value = element(between(-most, most));
        return values;
    }

private:
    std::uint64_t state_;
};

#ifndef KVFERRY_FLOAT32

// What integer_tiles.hpp says of whole numbers.
struct WholeKind {
    long bits, group, factor_size;
    bool has_minima = false, is_e2m1 = false;
    long span = 0;
};

// A matrix of them in tiles, and what holds it.
class WholeWeight {
public:
    explicit WholeWeight(const WholeKind& kind) : kind_(kind) {}

    Tiles make(Random& random, long columns, long inputs) {
        const auto [bits, group, factor_size, has_minima, is_e2m1, span] = kind_;
        const long groups = inputs / group;
        std::vector<std::uint8_t> numbers(columns * inputs * bits / 8);
        for (std::uint8_t& number : numbers) number = std::uint8_t(random.bits());
        const std::vector<std::uint8_t> scales = factors(random, columns * groups), minima = factors(random, columns * groups);
        std::vector<float> bases(2 * columns * (span ? groups / span : 0));
        for (float& base : bases) base = random.between(-0.01f, 0.01f);
        tiles_ = std::make_unique<IntegerTiles>(IntegerTiles{nullptr, nullptr, columns, inputs, bits, group, has_minima,
                                                             factor_size, span, is_e2m1});
        memory_.resize(kvferry_integers_size(tiles_.get()));
        const auto* const second = (const std::uint8_t*)(bases.data() + bases.size() / 2);
        const IntegerMatrix matrix{numbers.data(), {scales.data(), minima.data()}, {(const std::uint8_t*)bases.data(), second}};
        kvferry_pack_integers(tiles_.get(), &matrix, memory_.data());
        tiles_->memory = memory_.data();
        return {nullptr, columns, 0, tiles_.get()};
    }

private:
    std::vector<std::uint8_t> factors(Random& random, long count) const {
        const long factor_size = kind_.factor_size;
        std::vector<std::uint8_t> bytes(count * factor_size);
        for (long i = 0; i < count; i++) {
            const float value = random.between(-0.2f, 0.2f) / float(1 << kind_.bits);
            const std::uint16_t half = std::uint16_t(0x2000 + (random.bits() & 0x83ff));  // about 2^-7, either sign
            std::uint8_t byte = std::uint8_t(random.bits());
            if (kind_.is_e2m1) byte = std::uint8_t(kind_.span == 0 ? 118 + random.bits() % 6 : random.bits() % 127);
            if (factor_size == 4) std::memcpy(bytes.data() + 4 * i, &value, 4);
            if (factor_size == 2) std::memcpy(bytes.data() + 2 * i, &half, 2);
            if (factor_size == 1) bytes[i] = byte;
        }
        return bytes;
    }

    const WholeKind kind_;
    std::unique_ptr<IntegerTiles> tiles_;
    Lines<std::uint8_t> memory_;
};

#endif
