// What a layer does with a token's heads: norms and rotation, K and V to their pages, attention over these.
#pragma once

#include <vector>

#include "attention/attention.hpp"
#include "attention/exact_attention.hpp"
#include "attention/int8_attention.hpp"
#include "layers/model.hpp"
#include "attention/prompt_attention.hpp"
#include "layers/rotation.hpp"
#include "layers/step.hpp"
#include "machine/vectors.hpp"

// One thread's own.
struct HeadScratch {
    HeadScratch(const Model& m, const Heads& heads, bool is_exact)
        : attention(int(heads.group()), kv_heads_at_once(heads), int(heads.dim), float(m.score_cap)),
          int8_attention(int(heads.group()), kv_heads_at_once(heads), int(heads.dim), float(m.score_cap)),
          exact_attention(int(heads.group()), kv_heads_at_once(heads), int(heads.dim), float(m.score_cap)),
          prompt_attention(int(heads.group()), int(heads.dim), int(m.latents() ? m.latents()->kv_rank : heads.dim),
                           float(m.score_cap), is_exact),
          head(2 * heads.dim), row(heads.dim) {}
    Attention attention;
    Int8Attention int8_attention;
    ExactAttention exact_attention;
    PromptAttention prompt_attention;
    Lines<float> head;
    Lines<Element> row;  // on its way to whole numbers
};

// Sums of squares of a token's queries and of its keys.
struct Squares {
    float queries, keys;
};

// Of layers whose heads are of one kind.
class HeadMath {
public:
    HeadMath(const Model& model, const Heads& heads, bool is_exact) : m_(model), heads_(heads), is_exact_(is_exact) {}

    const Heads& heads() const { return heads_; }

    void reserve(long num_tokens) { rotation_.reserve(num_tokens); }

    void prepare(long token, long position) { rotation_.prepare(token, position); }

    Squares squares(const float* heads) const {
        return {sum_of_squares(heads, heads_.qo_size()), sum_of_squares(heads + heads_.qo_size(), heads_.kv_size())};
    }

    // A token's products to their places: K and V to their slots, queries to `queries`. `squares`: of all ranks' heads
    // where norms are of all together and ranks are several; else null.
    // `gates`: where those of queries go, if the model has them.
    void place(const Layer& layer, const Row& row, long token, const float* heads, const Squares* squares, Element* queries,
               Element* gates, HeadScratch& own) const {
        const AttentionBlock& attention = layer.attention;
        const long d = heads_.dim, qo = heads_.num_qo, kv = attention.num_made == 1 ? 0 : heads_.num_kv;
        const bool adds_up = attention.has_whole_norms && squares == nullptr;
        const Squares all = adds_up ? this->squares(heads) : squares ? *squares : Squares{};
        for (long head = 0; head < qo; head++, heads += d) {
            const Norm norm = this->norm(attention, attention.q_norm, heads, head, all.queries, qo);
            const float by = rotation_.query_factor(token);
            rotation_.turn(heads, norm.weight, norm.factor, token, by, own.head.data(), queries + head * d);
            if (!m_.has_gates) continue;
            heads += d;
            for (long i = 0; i < d; i += 16) store(gates + head * d + i, sigmoid(load(heads + i)));
        }
        for (long head = 0; head < kv; head++, heads += d) {
            const Norm norm = this->norm(attention, attention.k_norm, heads, head, all.keys, kv);
            const StoredPages pages = this->pages(layer, head, row);
            const long position = row.start + token - row.token;
            put(pages, position, 0, own, [&](Element* key) {
                rotation_.turn(heads, norm.weight, norm.factor, token, 1.0f, own.head.data(), key);
            });
            const float* const value = attention.num_made == 2 ? heads : heads + kv * d;
            put(pages, position, pages.values, own, [&](Element* target) {
                const Vector factor = repeat(attention.norms_values ? inverse_rms(value, d, float(m_.norm_eps)) : 1.0f);
                for (long i = 0; i < d; i += 16) store(target + i, load(value + i) * factor);
            });
        }
    }

    // The same of latents: what is kept to its slot, each head's turned part to `queries`, and what W_K takes of it to `asked`.
    void place_latent(const Layer& layer, const Row& row, long token, const float* products, Element* queries, Element* asked,
                      HeadScratch& own) const {
        const Latents& w = *layer.attention.latents;
        const long position = row.start + token - row.token, rank = w.kv_rank, nope = w.nope_dim;
        const auto turn = [&](const float* part, float by, Element* target) {
            if (w.is_interleaved) part = rotation_.by_halves(part, own.head.data());
            rotation_.turn_part(part, token, by, target);
        };
        put(pages(layer, 0, row), position, 0, own, [&](Element* kept) {
            const Vector factor = repeat(inverse_rms(products, rank, float(w.norm_eps)));
            for (long i = 0; i < rank; i += 16) store(kept + i, load(products + i) * factor * load(w.kv_norm + i));
            turn(products + rank, 1.0f, kept + rank);
        });
        const float* query = products + w.queries_at();
        const Vector growth = repeat(rotation_.query_growth(token));  // the model's factor is that of what W_K yields
        for (long head = 0; head < heads_.num_qo; head++, query += nope + heads_.rotary_dim) {
            for (long i = 0; i < nope; i += 16) store(asked + head * w.asked_dim() + i, load(query + i) * growth);
            turn(query + nope, rotation_.query_factor(token), queries + head * heads_.dim + rank);
        }
    }

    // `heads`: the first of the piece's queries, `stride` from token to token; the result takes their place. `next`: the piece
    // that follows; null: nobody knows.
    void attend(const Layer& layer, const Piece& piece, const Piece* next, Element* heads, long stride, HeadScratch& own) const {
        const Row& row = *piece.row;
        const StoredPages pages = this->pages(layer, piece.kv_head, row);
        const Sight sight = layer.attention.sight;
        const long position = row.start + piece.first;
        if (layer.attention.latents != nullptr) {
            PromptAttention& attention = own.prompt_attention;
            return attention.attend_latents(pages, heads, piece.kv_heads, piece.tokens, position, heads, stride);
        }
        const Element* sinks = this->sinks(layer, piece.kv_head);
        if (piece.tokens == 1 && !is_exact_) {
            const long first = sight.first_key(position);
            if (pages.has_int8) {
                own.int8_attention.attend(pages, piece.kv_heads, heads, first, position + 1, sinks, heads);
            } else {
                own.attention.attend(pages, piece.kv_heads, heads, first, position + 1, sinks, upcoming(layer, next), heads);
            }
        } else if (piece.tokens == 1 && kSumsInRegisters) {
            own.exact_attention.attend(pages, piece.kv_heads, heads, position, sight, sinks, heads);
        } else {  // also where no vector adds up as the matrix unit does
            for (int kv = 0; kv < piece.kv_heads; kv++, heads += heads_.group() * heads_.dim) {
                const Element* own_sinks = sinks == nullptr ? nullptr : sinks + kv * heads_.group();
                own.prompt_attention.attend(pages.of_head(kv), heads, piece.tokens, position, sight, own_sinks, heads, stride);
            }
        }
    }

    // A part of a piece to `memory`, where all of its parts stand.
    void attend_part(const Layer& layer, const Piece& piece, const Piece* next, const Element* queries, float* memory,
                     HeadScratch& own) const {
        const StoredPages pages = this->pages(layer, piece.kv_head, *piece.row);
        const Range keys = keys_of(layer, piece);
        const Element* sinks = piece.part > 0 ? nullptr : this->sinks(layer, piece.kv_head);
        memory += piece.part * part_size(heads_, piece.kv_heads);
        if (layer.attention.latents != nullptr) {
            return own.prompt_attention.attend_part(pages, queries, piece.kv_heads, keys, memory);
        }
        own.attention.attend_part(pages, piece.kv_heads, queries, keys.first, keys.last, sinks, upcoming(layer, next), memory);
    }

    // All parts' results to `out`.
    void join(const Piece& piece, const float* memory, Element* out, HeadScratch& own) const {
        if (heads_.are_latents) return own.prompt_attention.join(memory, piece.parts, piece.kv_heads, out);
        own.attention.join(memory, piece.parts, piece.kv_heads, out);
    }

private:
    // Of a lone token's piece, or its part.
    static Range keys_of(const Layer& layer, const Piece& piece) {
        const long last = piece.keys(), first = layer.attention.sight.first_key(last - 1);
        if (piece.parts == 1) return {first, last};
        const long start = first / kTileKeys * kTileKeys;
        const Range tiles = share((last - start + kTileKeys - 1) / kTileKeys, piece.part, piece.parts);
        return {std::max(first, start + tiles.first * kTileKeys), std::min(last, start + tiles.last * kTileKeys)};
    }

    // A piece that is attended to as elements, token by token.
    Upcoming upcoming(const Layer& layer, const Piece* piece) const {
        if (piece == nullptr || piece->tokens > 1 || m_.has_int8_pages) return {};
        const Range keys = keys_of(layer, *piece);
        return {pages(layer, piece->kv_head, *piece->row), piece->kv_heads, keys.first, keys.last};
    }

    struct Norm {
        const Element* weight;  // null: none
        float factor;
    };

    Norm norm(const AttentionBlock& attention, const Element* weight, const float* values, long head, float squares,
              long num_heads) const {
        const float eps = float(m_.norm_eps);
        if (weight == nullptr) return {nullptr, 1.0f};
        if (!attention.has_whole_norms) return {weight, inverse_rms(values, heads_.dim, eps)};
        return {weight + head * heads_.dim, inverse_rms(squares, num_heads * heads_.dim * m_.num_ranks, eps)};
    }

    // Of the query heads that ask a KV head's keys; null: none.
    const Element* sinks(const Layer& layer, long kv_head) const {
        return layer.attention.sinks == nullptr ? nullptr : layer.attention.sinks + kv_head * heads_.group();
    }

    // Of latents, which are one head's key and value, whichever head asks.
    StoredPages pages(const Layer& layer, long kv_head, const Row& row) const {
        const long token_bytes = m_.has_int8_pages ? heads_.dim + sizeof(float) : heads_.dim * sizeof(Element);
        const long head_bytes = m_.block_size * token_bytes, d = heads_.dim;
        if (heads_.are_latents) return {layer.pages, head_bytes, 0, 0, m_.page_bytes, row.blocks, m_.block_size, d, false};
        return {layer.pages + kv_head * layer.head_step, head_bytes, layer.head_step, layer.value_step, m_.page_bytes,
                row.blocks, m_.block_size, d, m_.has_int8_pages != 0};
    }

    // write(target) writes a token's key or value, which is `part` bytes behind the block's keys, to its place.
    template <class Write>
    static void put(const StoredPages& pages, long position, long part, HeadScratch& own, Write write) {
        char* const head = pages.block(position) + part;
        if (!pages.has_int8) return write((Element*)head + position % pages.block_size * pages.head_dim);
        write(own.row.data());
        pages.put(head, position, own.row.data());
    }

    const Model m_;
    const Heads heads_;
    const bool is_exact_;  // a token's results do not depend on what is computed beside it, or how its prompt was cut
    Rotation rotation_{m_, heads_};
};
