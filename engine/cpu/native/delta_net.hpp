// What a layer with a gated delta net does with a row's tokens (engine/nn/delta_net.py), of one key head and the value heads
// that share it, token by token. All of it is computed in float32.
//
//     convolve   a head's part of the last few tokens' rows -> query, key and values; silu; directions of the first two
//     memory     S = a S + k e, where e = b (v - a k S);  what is read is q S, of the new S
//     finish     norm of what was read, times silu of the gate -> what `o` multiplies
//
// A value head's memory is updated and asked by one pass over it for each token: while e of a token is added to a row of S,
// that row is multiplied by the next token's key and query. Columns of S do not meet, so that they are taken in panels that
// stay next to the core for many tokens. A token's numbers depend on the tokens before it alone, to the bit, however they
// came: at once or one by one.
#pragma once

#include <algorithm>
#include <cmath>

#include "model.hpp"
#include "panel.hpp"
#include "states.hpp"
#include "step.hpp"
#include "vectors.hpp"

constexpr long kMostConvolved = 16;  // tokens that a convolution sees
constexpr long kPanelColumns = 32;   // of a memory: with 128 keys a panel is 16 KiB, half of the nearest cache
constexpr long kDeltaTokens = 32;    // that are taken at once: their keys and queries stay near

// Numbers of a token that stand together: among its products, in the order of kinds, and in a thread's copy.
struct TokenPart {
    long product, kind, copy, size;
};

// One thread's own.
struct DeltaScratch {
    explicit DeltaScratch(const Model& m) {
        const DeltaNet* w = m.delta_net();
        if (w == nullptr) return;
        const long columns = padded(w->value_dim, kPanelColumns);
        inputs.resize((w->kernel_size - 1) * (2 * w->key_dim + w->repeats() * w->value_dim));
        queries.resize(kDeltaTokens * w->key_dim), keys.resize(kDeltaTokens * w->key_dim);
        values.resize(kDeltaTokens * columns), read.resize(kDeltaTokens * columns);
        memory.resize(w->repeats() * w->key_dim * columns);
    }
    Lines<float> inputs;         // [kernel_size - 1] earlier tokens' segments
    Lines<float> queries, keys;  // [kDeltaTokens][key_dim]
    Lines<float> values, read;   // [kDeltaTokens][value_dim padded to panels]; padding stays zero
    Lines<float> memory;         // [value heads][panels][key_dim][kPanelColumns]; the same
    float asked[kDeltaTokens], kept[kDeltaTokens], strength[kDeltaTokens];  // q k, a and b of each token
};

// One row of a panel: two vectors, whatever the set.
struct PanelRow {
    Vector low, high;

    static PanelRow zeros() { return {repeat(0.0f), repeat(0.0f)}; }
    static PanelRow of(const float* place) { return {load(place), load(place + 16)}; }
    void put(float* place) const { store(place, low), store(place + 16, high); }
    void add(const PanelRow& row, float factor) {
        const Vector by = repeat(factor);
        low = fma(row.low, by, low), high = fma(row.high, by, high);
    }
};

// All tokens of a row, of a key head and the value heads that share it: what one thread does by itself.
class DeltaPass {
public:
    // `projected`, `said`: of the row's first token, rows of these strides.
    DeltaPass(const Model& m, const DeltaNet& w, const Row& row, long head, const float* projected, long stride, Element* said,
              long said_stride, DeltaScratch& own)
        : m_(m), w_(w), row_(row), head_(head), projected_(projected), stride_(stride), said_(said), said_stride_(said_stride),
          own_(own) {
        const long d = w.key_dim, size = w.repeats() * w.value_dim, kinds = 2 * w.num_keys();
        const long group = head * (2 * d + 2 * size);  // where all of the key head's stands together
        const auto at = [&](long kind, long within) { return w.is_grouped ? group + within : kind; };
        query_ = {at(head * d, 0), head * d, 0, d};
        key_ = {at(w.num_keys() + head * d, d), w.num_keys() + head * d, d, d};
        value_ = {at(kinds + head * size, 2 * d), kinds + head * size, 2 * d, size};
        gates_ = at(w.num_convolved() + head * size, 2 * d + size);
        strengths_ = w.rates_at() + (w.is_grouped ? 2 : 1) * head * w.repeats();
        decays_ = strengths_ + (w.is_grouped ? w.repeats() : w.num_value_heads);
    }

    void run() {
        begin();
        for (long first = 0, last; first < row_.length; first = last) {
            const long block_end = ((row_.start + first) / m_.block_size + 1) * m_.block_size - row_.start;
            last = std::min({row_.length, first + kDeltaTokens, block_end});
            ask(first, last);
            for (long i = 0; i < w_.repeats(); i++) {
                value(i, first, last);
                remember(i, last - first);
                finish(i, first, last);
            }
            if (last == block_end || last == row_.length) leave(last);
        }
    }

private:
    long copy_size() const { return 2 * w_.key_dim + w_.repeats() * w_.value_dim; }
    long panels() const { return (w_.value_dim + kPanelColumns - 1) / kPanelColumns; }
    long columns() const { return panels() * kPanelColumns; }
    float* memory(long i) const { return own_.memory.data() + i * w_.key_dim * columns(); }
    long memory_at(long i) const { return 1 + w_.inputs_size() + (head_ * w_.repeats() + i) * w_.key_dim * w_.value_dim; }
    StatePlace place(long position) const { return {m_, w_.state, row_.blocks[position / m_.block_size]}; }

    // The state behind the tokens so far; zeros where there are none.
    void begin() {
        if (row_.start == 0) {
            std::fill(own_.inputs.begin(), own_.inputs.end(), 0.0f);
            std::fill(own_.memory.begin(), own_.memory.end(), 0.0f);
            return;
        }
        const StatePlace place = this->place(row_.start - 1);
        for (long i = 0; i < w_.kernel_size - 1; i++) {
            for (const TokenPart& part : {query_, key_, value_}) {
                place.read(1 + i * w_.num_convolved() + part.kind, part.size, own_.inputs.data() + i * copy_size() + part.copy);
            }
        }
        for (long i = 0; i < w_.repeats(); i++) {
            each_place(place, i, [](float* stored, float* near, long count) {
                if (count == kPanelColumns) store(near, load(stored)), store(near + 16, load(stored + 16));
                else std::copy_n(stored, count, near);
            });
        }
    }

    // The state behind the row's first `last` tokens to their block.
    void leave(long last) const {
        const StatePlace place = this->place(row_.start + last - 1);
        const float num_tokens = float(row_.start + last);
        if (head_ == 0) place.write(0, 1, &num_tokens);
        for (long i = 0; i < w_.kernel_size - 1; i++) {
            for (const TokenPart& part : {query_, key_, value_}) {
                place.write(1 + i * w_.num_convolved() + part.kind, part.size, input(part, last - w_.kernel_size + 1 + i));
            }
        }
        for (long i = 0; i < w_.repeats(); i++) {
            each_place(place, i, [](float* stored, float* near, long count) {
                if (count == kPanelColumns) store(stored, load(near)), store(stored + 16, load(near + 16));
                else std::copy_n(near, count, stored);
            });
        }
    }

    // job(stored, near, count) for each stretch of a value head's memory that stands together in the block and in a panel.
    template <class Job>
    void each_place(const StatePlace& place, long i, Job job) const {
        const long dv = w_.value_dim, panel_size = w_.key_dim * kPanelColumns;
        place.each(memory_at(i), w_.key_dim * dv, [&](float* stored, long offset, long part) {
            long key = offset / dv, column = offset % dv;
            for (const float* end = stored + part; stored < end;) {
                const long in_panel = column % kPanelColumns;
                const long count = std::min({kPanelColumns - in_panel, dv - column, long(end - stored)});
                job(stored, memory(i) + column / kPanelColumns * panel_size + key * kPanelColumns + in_panel, count);
                stored += count, column += count;
                if (column == dv) key++, column = 0;
            }
        });
    }

    // A segment of the row's `token`th token, below 0 of one before the row.
    const float* input(const TokenPart& part, long token) const {
        if (token >= 0) return projected_ + token * stride_ + part.product;
        return own_.inputs.data() + (w_.kernel_size - 1 + token) * copy_size() + part.copy;
    }

    // `size` numbers of a segment, from its number `at` on.
    void convolve(const TokenPart& part, long at, long size, long token, float* target) const {
        const float* inputs[kMostConvolved];
        const long count = w_.kernel_size;
        for (long i = 0; i < count; i++) inputs[i] = input(part, token - count + 1 + i) + at;
        const float* const weights = w_.convolution + part.kind + at;
        for (long column = 0; column < size; column += 16) {
            Vector sums = load(inputs[0] + column) * load(weights + column);
            for (long i = 1; i < count; i++) {
                sums = fma(load(inputs[i] + column), load(weights + i * w_.num_convolved() + column), sums);
            }
            store(target + column, silu(sums));
        }
    }

    // Tokens' queries and keys: directions, keys of length 1 and queries of length key_dim ** -0.5. And their products.
    void ask(long first, long last) {
        const long d = w_.key_dim;
        for (long i = 0; i < last - first; i++) {
            float *const query = own_.queries.data() + i * d, *const key = own_.keys.data() + i * d;
            convolve(query_, 0, d, first + i, query);
            convolve(key_, 0, d, first + i, key);
            const Vector by = repeat(direction(query, d) / __builtin_sqrtf(float(d))), by_key = repeat(direction(key, d));
            Vector sums = repeat(0.0f);
            for (long column = 0; column < d; column += 16) {
                const Vector asks = load(query + column) * by, shows = load(key + column) * by_key;
                store(query + column, asks), store(key + column, shows);
                sums = fma(asks, shows, sums);
            }
            own_.asked[i] = sum_of(sums);
        }
    }

    static float direction(const float* x, long size) { return 1.0f / __builtin_sqrtf(sum_of_squares(x, size) + kSmall); }

    // Tokens' values for the `i`th value head, what it keeps of its memory, and how much of an error it corrects.
    void value(long i, long first, long last) {
        const long head = head_ * w_.repeats() + i;
        for (long token = first; token < last; token++) {
            convolve(value_, i * w_.value_dim, w_.value_dim, token, own_.values.data() + (token - first) * columns());
            const float* const product = projected_ + token * stride_;
            const double rate = product[decays_ + i] + w_.rate_bias[head];
            const double forgotten = w_.forgetting[head] * (rate > kLarge ? rate : std::log1p(std::exp(rate)));
            own_.kept[token - first] = float(std::exp(-forgotten));
            own_.strength[token - first] = float(1.0 / (1.0 + std::exp(-double(product[strengths_ + i]))));
        }
    }

    // The memory of the `i`th value head after `count` tokens, and what each of them reads of it.
    void remember(long i, long count) const {
        for (long panel = 0; panel < panels(); panel++) {
            pass(memory(i) + panel * w_.key_dim * kPanelColumns, own_.values.data() + panel * kPanelColumns,
                 own_.read.data() + panel * kPanelColumns, count);
        }
    }

    // The same of one panel.
    void pass(float* memory, const float* values, float* read, long count) const {
        const long d = w_.key_dim;
        const float *key = own_.keys.data(), *query = own_.queries.data();
        PanelRow shown = PanelRow::zeros(), asked = shown;  // k S and q S, of the memory before the token
        for (long row = 0; row < d; row++) {
            const PanelRow kept = PanelRow::of(memory + row * kPanelColumns);
            shown.add(kept, key[row]), asked.add(kept, query[row]);
        }
        for (long token = 0; token < count; token++, values += columns(), read += columns()) {
            const Vector by = repeat(own_.kept[token]), strength = repeat(own_.strength[token]);
            const PanelRow said = PanelRow::of(values);
            const PanelRow error{(said.low - shown.low * by) * strength, (said.high - shown.high * by) * strength};
            PanelRow result{asked.low * by, asked.high * by};
            result.add(error, own_.asked[token]);
            result.put(read);
            if (token + 1 == count) return change(memory, by, error, key);
            const float *const next = key + d, *const asks = query + d;
            shown = asked = PanelRow::zeros();
            for (long row = 0; row < d; row++) {
                const PanelRow kept = change(memory + row * kPanelColumns, by, error, key[row]);
                shown.add(kept, next[row]), asked.add(kept, asks[row]);
            }
            key = next, query = asks;
        }
    }

    static PanelRow change(float* place, Vector by, const PanelRow& error, float key) {
        const PanelRow found = PanelRow::of(place);
        PanelRow kept{found.low * by, found.high * by};
        kept.add(error, key);
        kept.put(place);
        return kept;
    }

    void change(float* memory, Vector by, const PanelRow& error, const float* key) const {
        for (long row = 0; row < w_.key_dim; row++) change(memory + row * kPanelColumns, by, error, key[row]);
    }

    // What was read, normed and gated, to the head's place in the rows that `o` multiplies.
    void finish(long i, long first, long last) const {
        const long dv = w_.value_dim;
        for (long token = first; token < last; token++) {
            const float* const read = own_.read.data() + (token - first) * columns();
            const float* const gates = projected_ + token * stride_ + gates_ + i * dv;
            Element* const target = said_ + token * said_stride_ + (head_ * w_.repeats() + i) * dv;
            const Vector factor = repeat(inverse_rms(read, dv, float(w_.norm_eps)));
            for (long column = 0; column < dv; column += 16) {
                const Vector normed = load(read + column) * factor * load(w_.norm + column);
                store(target + column, normed * silu(load(gates + column)));
            }
        }
    }

    static constexpr float kSmall = 1e-6f;  // is added to a square length before its root is divided by
    static constexpr double kLarge = 20.0;  // log(1 + e^x) is x, as float32 has it

    const Model& m_;
    const DeltaNet& w_;
    const Row& row_;
    const long head_;
    const float* const projected_;
    const long stride_;
    Element* const said_;
    const long said_stride_;
    DeltaScratch& own_;
    TokenPart query_, key_, value_;
    long gates_, strengths_, decays_;  // the key head's first ones, among a token's products
};
