// AMX's tiles in plain C++, as Intel's manual describes them: shapes, zeroed rests, products of bfloat16 with two sums for
// each place, fused multiply-add, denormals taken and given as zero. What the processor refuses ends the process.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

struct EmulatedTile {
    int rows = 0, bytes = 0;  // 0: no shape
    unsigned char data[16][64] = {};
};
inline thread_local EmulatedTile emulated_tiles[8];

inline EmulatedTile& emulated_tile(int number) {
    if (emulated_tiles[number].rows == 0) __builtin_trap();
    return emulated_tiles[number];
}

inline void shape_tiles(const void* shape) {
    const auto* bytes = static_cast<const unsigned char*>(shape);
    if (bytes[0] != 1 || bytes[1] != 0) __builtin_trap();
    for (int i = 0; i < 8; i++) {
        std::uint16_t row_bytes;
        std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
        const int rows = bytes[48 + i];
        if (rows > 16 || row_bytes > 64 || (rows == 0) != (row_bytes == 0)) __builtin_trap();
        emulated_tiles[i] = {};
        emulated_tiles[i].rows = rows;
        emulated_tiles[i].bytes = row_bytes;
    }
}

inline void release_tiles() {
    for (EmulatedTile& tile : emulated_tiles) tile = {};
}

inline void clear_tile(int number) { std::memset(emulated_tile(number).data, 0, sizeof EmulatedTile::data); }

inline void load_tile(int number, const void* source, long stride) {
    EmulatedTile& tile = emulated_tile(number);
    std::memset(tile.data, 0, sizeof tile.data);
    for (int row = 0; row < tile.rows; row++) {
        std::memcpy(tile.data[row], static_cast<const char*>(source) + row * stride, tile.bytes);
    }
}

inline void store_tile(int number, void* target, long stride) {
    const EmulatedTile& tile = emulated_tile(number);
    for (int row = 0; row < tile.rows; row++) {
        std::memcpy(static_cast<char*>(target) + row * stride, tile.data[row], tile.bytes);
    }
}

inline float flushed(float value) { return std::fabs(value) < FLT_MIN ? std::copysign(0.0f, value) : value; }

inline float widened(const unsigned char* bf16) {
    const std::uint32_t bits = std::uint32_t(bf16[0]) << 16 | std::uint32_t(bf16[1]) << 24;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return flushed(value);
}

inline void add_products_of_tiles(int sums, int inputs, int weights) {
    EmulatedTile &c = emulated_tile(sums), &a = emulated_tile(inputs), &b = emulated_tile(weights);
    if (sums == inputs || sums == weights || inputs == weights) __builtin_trap();
    if (c.rows != a.rows || c.bytes != b.bytes || a.bytes != 4 * b.rows) __builtin_trap();
    float weight[2][16][16] = {};
    for (int k = 0; k < b.rows; k++) {
        for (int n = 0; n < c.bytes / 4; n++) {
            for (int i = 0; i < 2; i++) weight[i][k][n] = widened(b.data[k] + 4 * n + 2 * i);
        }
    }
    for (int m = 0; m < c.rows; m++) {
        float total[2][16] = {}, row[16];
        for (int k = 0; k < b.rows; k++) {
            for (int i = 0; i < 2; i++) {
                const float input = widened(a.data[m] + 4 * k + 2 * i);
                for (int n = 0; n < 16; n++) total[i][n] = flushed(std::fma(input, weight[i][k][n], total[i][n]));
            }
        }
        std::memcpy(row, c.data[m], sizeof row);
        for (int n = 0; n < 16; n++) row[n] = flushed(flushed(row[n]) + flushed(total[0][n] + total[1][n]));
        std::memcpy(c.data[m], row, c.bytes);
    }
}

inline bool may_use_tiles() { return true; }

#define SHAPE_TILES(shape) shape_tiles(shape)
#define RELEASE_TILES() release_tiles()
#define CLEAR_TILE(tile) clear_tile(tile)
#define LOAD_TILE(tile, source, stride) load_tile(tile, source, stride)
#define LOAD_TILE_ONCE(tile, source, stride) load_tile(tile, source, stride)
#define STORE_TILE(tile, target, stride) store_tile(tile, target, stride)
#define ADD_PRODUCTS_OF_TILES(sums, inputs, weights) add_products_of_tiles(sums, inputs, weights)
