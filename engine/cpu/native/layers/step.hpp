// What one step computes: rows of tokens, and the attention they need cut into pieces, of which each thread
// takes its own part in order, and then what others have not begun.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layers/model.hpp"
#include "attention/prompt_attention.hpp"

// A sequence's part: `length` tokens from position `start` on, the packed tokens from `token` on. The last `drafted` of them
// may be wrong: no state behind them is left.
struct Row {
    long token, start, length;
    const std::int32_t* blocks;
    long drafted = 0;

    long known() const { return length - drafted; }
};

// Attention of `tokens` tokens of a row, from the row's token `first` on, for `kv_heads` KV heads from `kv_head` on; of
// latents, for so many query heads. One token's may be cut by its keys into parts, which are joined by whoever is done last.
struct Piece {
    const Row* row;
    long first, tokens;
    int kv_head, kv_heads;
    int part = 0, parts = 1;
    long split = 0, memory = 0;  // which of the step's cuts this is; where its first part leaves its sums

    long keys() const { return row->start + first + tokens; }
    long cost() const { return tokens * keys() * kv_heads / parts; }
};

// KV heads that one token attends to together, at most.
inline int kv_heads_at_once(const Heads& heads) {
    return int(std::clamp(kNearValues / (kTileKeys * long(heads.dim)), 1L, long(heads.num_kv)));
}

// Some of a model's layers, of some tokens. Pointers are the caller's. `wanted`: the packed tokens whose hidden states are asked
// for, grouped by nothing.
struct Step {
    long num_tokens;
    const std::int32_t* input_ids;  // [num_tokens]
    std::vector<Row> rows;
    long num_wanted;
    const std::int32_t* wanted;  // [num_wanted]
    float* hidden;               // [num_wanted][hidden_size padded to 64]
    void (*on_layer)(int);       // null: nobody asked
    Range layers;                // those that are computed; the first of all begins with embeddings
    const std::int32_t* stop;    // not 0: nobody wants the step any more, somebody says so while it runs
    std::vector<Piece> pieces[2];    // all attention of a layer, by whether it is a local one
    std::vector<Piece> last_pieces;  // that of the last layer: of the wanted tokens alone
    std::vector<const Row*> by_length;  // the longest one first: of layers with states, in which a row's tokens are one task
    long num_splits = 0, split_memory = 0;  // of pieces that are cut in one layer, at most
    std::vector<std::int32_t> slots, last_slots;  // of the adapters of all tokens, of the wanted ones; empty: none has one

    std::size_t first_layer() const { return std::size_t(layers.first); }
    std::size_t last_layer() const { return std::size_t(layers.last) - 1; }
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

// Query heads of a piece of several tokens over latents, at most: fewer heads of more tokens fill a tile's rows as well,
// and better where there are many heads.
constexpr long kLatentHeads = 40;
constexpr long kLeastLatentHeads = 8;  // of a lone token: fewer are multiplied sooner than latents are packed for them

// The same of latents, which are packed once for all heads of a piece.
inline void add_latent_pieces(std::vector<Piece>& pieces, const Row& row, Range tokens, const Heads& heads) {
    const long count = tokens.last - tokens.first;
    const RowGroups by_heads(heads.num_qo, count == 1 ? PromptAttention::kRows : kLatentHeads);
    for (long group = 0; group < by_heads.groups(); group++) {
        const Range own = by_heads.rows(group);
        const int num_heads = int(own.last - own.first);
        const RowGroups parts(count, PromptAttention::tokens_at_once(num_heads));
        for (long part = 0; part < parts.groups(); part++) {
            const Range mine = parts.rows(part);
            pieces.push_back({&row, tokens.first + mine.first, mine.last - mine.first, int(own.first), num_heads});
        }
    }
}

// A row's tokens in pieces as equal as they can be.
inline void add_pieces(std::vector<Piece>& pieces, const Row& row, Range tokens, const Heads& heads) {
    if (heads.are_latents) return add_latent_pieces(pieces, row, tokens, heads);
    const long at_once = PromptAttention::tokens_at_once(int(heads.group()));
    const int parts = int((tokens.last - tokens.first - 1) / at_once) + 1;
    for (int kv_head = 0; kv_head < heads.num_kv; kv_head++) {
        for (int part = 0; part < parts; part++) {
            const Range mine = share(tokens.last - tokens.first, part, parts);
            pieces.push_back({&row, tokens.first + mine.first, mine.last - mine.first, kv_head, 1});
        }
    }
}

constexpr long kLeastPartKeys = 512;  // fewer are attended to sooner than parts are joined
constexpr long kLeastPartLatents = kTileKeys;  // all heads' products take many times as long as a head's

// What a part of a piece leaves: for each of its query heads the sums of values, the largest score and the sum of weights.
inline long part_size(const Heads& heads, int kv_heads) {
    return kv_heads * heads.group() * (padded(heads.dim, 32) + 2);
}

// Pieces of more than half of a thread's part of all are cut by their keys, so that threads end together.
inline void cut_pieces(std::vector<Piece>& pieces, Step& step, const Heads& heads, int threads, long all) {
    std::vector<Piece> cut;
    const long least = heads.are_latents ? kLeastPartLatents : kLeastPartKeys;
    long splits = 0, memory = 0;
    for (const Piece& piece : pieces) {
        const long wanted = (piece.cost() * 2 * threads + all - 1) / std::max(all, 1L);
        const int parts = piece.tokens > 1 ? 1 : int(std::min(wanted, piece.keys() / least));
        if (parts <= 1) {
            cut.push_back(piece);
            continue;
        }
        for (int part = 0; part < parts; part++) {
            cut.push_back(piece);
            cut.back().part = part, cut.back().parts = parts, cut.back().split = splits, cut.back().memory = memory;
        }
        splits++, memory += parts * part_size(heads, piece.kv_heads);
    }
    pieces = std::move(cut);
    step.num_splits = std::max(step.num_splits, splits), step.split_memory = std::max(step.split_memory, memory);
}

// A lone token's pieces over latents that are more than a thread's part of all, and not cut by keys, are split by heads.
inline void split_heads(std::vector<Piece>& pieces, int threads, long all) {
    std::vector<Piece> split;
    for (const Piece& piece : pieces) {
        const long wanted = (piece.cost() * threads + all - 1) / std::max(all, 1L), most = piece.kv_heads / kLeastLatentHeads;
        const int parts = piece.tokens > 1 || piece.parts > 1 ? 1 : int(std::max(1L, std::min(wanted, most)));
        for (int part = 0; part < parts; part++) {
            const Range heads = share(piece.kv_heads, part, parts);
            split.push_back(piece);
            split.back().kv_head += int(heads.first), split.back().kv_heads = int(heads.last - heads.first);
        }
    }
    pieces = std::move(split);
}

// Several KV heads of one token become a piece, whose keys are read faster than head by head, as long as no thread has
// more than its part of all by that, or it may be cut. The dearest come first, so that threads end together.
inline void share_pieces(std::vector<Piece>& pieces, Step& step, const Heads& heads, int threads, bool may_cut) {
    long all = 0;
    for (const Piece& piece : pieces) all += piece.cost();
    const int most = heads.are_latents ? 0 : kv_heads_at_once(heads);  // of latents a piece has all that it can
    std::size_t kept = 0;
    for (const Piece& piece : pieces) {
        Piece* last = kept == 0 ? nullptr : &pieces[kept - 1];
        const bool is_next = last != nullptr && piece.tokens == 1 && last->row == piece.row && last->first == piece.first;
        const bool is_long = may_cut && piece.keys() >= 2 * kLeastPartKeys;
        if (is_next && last->kv_heads < most && (is_long || last->cost() * threads < all)) {
            last->kv_heads++;
        } else {
            pieces[kept++] = piece;
        }
    }
    pieces.resize(kept);
    if (may_cut) cut_pieces(pieces, step, heads, threads, all);
    if (heads.are_latents) split_heads(pieces, threads, all);
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.cost() > b.cost(); });
}

// Fills both lists of pieces from the rows and the wanted tokens. Where a token's pieces are cut its result depends on who
// shares the step and its threads, by roundings.
inline void plan_attention(Step& step, const Model& model, int threads, bool is_exact) {
    for (const Row& row : step.rows) step.by_length.push_back(&row);
    std::stable_sort(step.by_length.begin(), step.by_length.end(),
                     [](const Row* a, const Row* b) { return a->length > b->length; });
    const bool may_cut = threads > 1 && !is_exact && !model.has_int8_pages;
    for (int is_local = 0; is_local < 2; is_local++) {
        const Heads& heads = model.heads[is_local];
        if (!heads.are_there()) continue;
        for (const Row& row : step.rows) add_pieces(step.pieces[is_local], row, {0, row.length}, heads);
        share_pieces(step.pieces[is_local], step, heads, threads, may_cut);
    }
    const Heads& heads = model.heads_of(model.layers[step.last_layer()]);
    std::vector<std::int32_t> wanted(step.wanted, step.wanted + step.num_wanted);
    std::sort(wanted.begin(), wanted.end());
    std::size_t next = 0;
    for (const Row& row : step.rows) {
        while (next < wanted.size() && wanted[next] < row.token + row.length) {  // stretches of neighbours
            const long first = wanted[next] - row.token;
            long last = first;
            while (next < wanted.size() && wanted[next] == row.token + last && last < row.length) next++, last++;
            add_pieces(step.last_pieces, row, {first, last}, heads);
        }
    }
    share_pieces(step.last_pieces, step, heads, threads, may_cut);
}
