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

// Attention of `tokens` tokens of a row, from the row's token `first` on, for `kv_heads` KV heads from `kv_head` on.
struct Piece {
    const Row* row;
    long first, tokens;
    int kv_head, kv_heads;

    long cost() const { return tokens * (row->start + first + tokens) * kv_heads; }
};

// KV heads that one token attends to together, at most.
inline int kv_heads_at_once(const Model& model) {
    return int(std::clamp(kNearValues / (kTileKeys * long(model.head_dim)), 1L, long(model.num_kv_heads)));
}

// Pointers are the caller's. `wanted`: the packed tokens whose hidden states are asked for, grouped by nothing.
struct Step {
    long num_tokens;
    const std::int32_t* input_ids;  // [num_tokens]
    std::vector<Row> rows;
    long num_wanted;
    const std::int32_t* wanted;  // [num_wanted]
    float* hidden;               // [num_wanted][hidden_size padded to 64]
    void (*on_layer)(int);       // null: nobody asked
    const std::int32_t* stop;    // not 0: nobody wants the step any more, somebody says so while it runs
    std::vector<Piece> pieces;       // all attention of a layer
    std::vector<Piece> last_pieces;  // that of the last layer: of the wanted tokens alone
    std::vector<std::int32_t> slots, last_slots;  // of the adapters of all tokens, of the wanted ones; empty: none has one

    bool is_stopped() const { return __atomic_load_n(stop, __ATOMIC_RELAXED) != 0; }

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

// A row's tokens in pieces as equal as they can be.
inline void add_pieces(std::vector<Piece>& pieces, const Row& row, Range tokens, const Model& model) {
    const long at_once = PromptAttention::tokens_at_once(int(model.num_qo_heads / model.num_kv_heads));
    const int parts = int((tokens.last - tokens.first - 1) / at_once) + 1;
    for (int kv_head = 0; kv_head < model.num_kv_heads; kv_head++) {
        for (int part = 0; part < parts; part++) {
            const Range mine = share(tokens.last - tokens.first, part, parts);
            pieces.push_back({&row, tokens.first + mine.first, mine.last - mine.first, kv_head, 1});
        }
    }
}

// Several KV heads of one token become a piece, whose keys are read faster than head by head, as long as no thread has
// more than its part of all by that. The dearest come first, so that threads end together.
inline void share_pieces(std::vector<Piece>& pieces, const Model& model, int threads) {
    long all = 0;
    for (const Piece& piece : pieces) all += piece.cost();
    const int most = kv_heads_at_once(model);
    std::size_t kept = 0;
    for (const Piece& piece : pieces) {
        Piece* last = kept == 0 ? nullptr : &pieces[kept - 1];
        const bool is_next = last != nullptr && piece.tokens == 1 && last->row == piece.row && last->first == piece.first;
        if (is_next && last->kv_heads < most && last->cost() * threads < all) {
            last->kv_heads++;
        } else {
            pieces[kept++] = piece;
        }
    }
    pieces.resize(kept);
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.cost() > b.cost(); });
}

// Fills both lists of pieces from the rows and the wanted tokens.
inline void plan_attention(Step& step, const Model& model, int threads) {
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
    share_pieces(step.pieces, model, threads);
    share_pieces(step.last_pieces, model, threads);
}
