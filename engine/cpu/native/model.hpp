// The model as the engine holds it: bfloat16 weights as oneDNN blocks them, and the pages. Nothing is owned here.
#pragma once

#include <sys/mman.h>

#include <chrono>
#include <vector>

#include "linear.hpp"
#include "vectors.hpp"

// Layer and Model are declared once more in engine/cpu/decoder.py, field by field.
struct Layer {
    const bf16 *qkv, *o, *gate_up, *down;                        // tiles
    const bf16 *qkv_bias, *o_bias, *gate_up_bias, *down_bias;    // null: none
    const bf16 *input_norm, *mlp_norm, *q_norm, *k_norm;         // of the heads: null: none
    std::int64_t window;                                         // 0: none
};

struct Model {
    std::int64_t num_layers, hidden_size, intermediate_size, num_qo_heads, num_kv_heads, head_dim, vocab_size;
    std::int64_t num_blocks, block_size;
    double norm_eps, rope_factor;
    const float* inv_freq;                        // [head_dim / 2]
    const bf16 *embedding, *final_norm, *head;    // rows, weight, tiles
    bf16* pages;                                  // [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]
    const Layer* layers;

    long qo_size() const { return num_qo_heads * head_dim; }
    long qkv_size() const { return (num_qo_heads + 2 * num_kv_heads) * head_dim; }

    Tiles head_tiles() const { return tiles(head, vocab_size, hidden_size); }
    Tiles qkv(const Layer& layer) const { return tiles(layer.qkv, qkv_size(), hidden_size); }
    Tiles o(const Layer& layer) const { return tiles(layer.o, hidden_size, qo_size()); }
    Tiles gate_up(const Layer& layer) const { return tiles(layer.gate_up, 2 * intermediate_size, hidden_size); }
    Tiles down(const Layer& layer) const { return tiles(layer.down, hidden_size, intermediate_size); }

    static Tiles tiles(const bf16* weights, long columns, long inputs) {
        return {weights, columns, padded(inputs, 32) / 2};
    }
};

// Ask for 2 MiB pages under the weights: a core reads them a tenth to a third faster. Where the kernel refuses, nothing
// changes; past the deadline it does so in its own time.
inline void use_large_pages(const Tiles& w, std::chrono::steady_clock::time_point deadline) {
    constexpr std::uintptr_t kLarge = 2 << 20;
    constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1: at once
    const auto address = std::uintptr_t(w.weights);
    for (auto page = address & ~(kLarge - 1); page < std::uintptr_t(w.tile(w.count())); page += kLarge) {
        madvise((void*)page, kLarge, MADV_HUGEPAGE);
        if (std::chrono::steady_clock::now() < deadline) madvise((void*)page, kLarge, kCollapse);
    }
}
