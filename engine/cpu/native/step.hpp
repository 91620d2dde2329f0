// What one step computes: rows of tokens, and the attention they need cut into pieces that threads take one by one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "model.hpp"
#include "prompt_attention.hpp"

// A sequence's part: `length` tokens from position `start` on, the packed tokens from `token` on.
struct Row {
    long token, start, length;
    const std::int32_t* blocks;
};

// Attention of `tokens` tokens of a row, from the row's token `first` on, for one KV head.
struct Piece {
    const Row* row;
    long first, tokens, kv_head;

    long cost() const { return tokens * (row->start + first + tokens); }
};

// Pointers are the caller's. `wanted`: the packed tokens whose hidden states are asked for, grouped by nothing.
struct Step {
    long num_tokens;
    const std::int32_t* input_ids;  // [num_tokens]
    std::vector<Row> rows;
    long num_wanted;
    const std::int32_t* wanted;  // [num_wanted]
    float* hidden;               // [num_wanted][hidden_size padded to 64]
    void (*on_layer)(int);       // null: nobody asked
    std::vector<Piece> pieces;       // all attention of a layer
    std::vector<Piece> last_pieces;  // that of the last layer: of the wanted tokens alone
    std::vector<std::int32_t> slots, last_slots;  // of the adapters of all tokens, of the wanted ones; empty: none has one

    const std::int32_t* slots_from(long token) const { return slots.empty() ? nullptr : slots.data() + token; }
    const std::int32_t* last_slots_from(long row) const { return last_slots.empty() ? nullptr : last_slots.data() + row; }
};

// `adapters`: the slot of each row's; null: no row has one.
inline void set_adapters(Step& step, const std::int32_t* adapters) {
    if (adapters == nullptr) return;
    for (std::size_t row = 0; row < step.rows.size(); row++) {
        step.slots.insert(step.slots.end(), step.rows[row].length, adapters[row]);
    }
    for (long i = 0; i < step.num_wanted; i++) step.last_slots.push_back(step.slots[step.wanted[i]]);
}

inline void add_pieces(std::vector<Piece>& pieces, const Row& row, Range tokens, const Model& model) {
    const long at_once = PromptAttention::tokens_at_once(int(model.num_qo_heads / model.num_kv_heads));
    for (long kv_head = 0; kv_head < model.num_kv_heads; kv_head++) {
        for (long first = tokens.first; first < tokens.last; first += at_once) {
            pieces.push_back({&row, first, std::min(at_once, tokens.last - first), kv_head});
        }
    }
}

// The dearest first, so that threads end together.
inline void sort_pieces(std::vector<Piece>& pieces) {
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.cost() > b.cost(); });
}

// Fills both lists of pieces from the rows and the wanted tokens.
inline void plan_attention(Step& step, const Model& model) {
    for (const Row& row : step.rows) add_pieces(step.pieces, row, {0, row.length}, model);
    std::vector<std::int32_t> wanted(step.wanted, step.wanted + step.num_wanted);
    std::sort(wanted.begin(), wanted.end());
    std::size_t next = 0;
    for (const Row& row : step.rows) {
        while (next < wanted.size() && wanted[next] < row.token + row.length) {  // stretches of neighbours
            const long first = wanted[next] - row.token;
            long last = first;
            while (next < wanted.size() && wanted[next] == row.token + last && last < row.length) next++, last++;
            add_pieces(step.last_pieces, row, {first, last}, model);
        }
    }
    sort_pieces(step.pieces);
    sort_pieces(step.last_pieces);
}
