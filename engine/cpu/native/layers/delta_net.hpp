// What a layer with a gated delta net does with a row's tokens once they are convolved (engine/nn/delta_net.py), of one key
// head and the value heads that share it, token by token. All of it is computed in float32.
//
//     query, key   to directions
//     memory       S = a S + k e, where e = b (v - a k S);  what is read is q S, of the new S
//     finish       norm of what was read, times silu of the gate -> what `o` multiplies
//
// A value head's memory is updated and asked by one pass over it for each token: while e of a token is added to a row of S,
// that row is multiplied by the next token's key and query. A token's numbers depend on the tokens before it alone, to the
// bit, however they came: at once or one by one.
#pragma once

#include <algorithm>
#include <cmath>

#include "layers/head_memory.hpp"
#include "layers/model.hpp"
#include "layers/panel.hpp"
#include "layers/states.hpp"
#include "layers/step.hpp"
#include "machine/vectors.hpp"

constexpr long kDeltaTokens = 32;  // that are taken at once: their keys and queries stay near

// One thread's own.
struct DeltaScratch {
    explicit DeltaScratch(const Model& m) {
        if (m.state() == nullptr || m.state()->kind != kDeltaNet) return;
        const auto& w = static_cast<const DeltaNet&>(*m.state());
        const HeadMemory shape{w.key_dim, w.value_dim};
        queries.resize(kDeltaTokens * w.key_dim), keys.resize(kDeltaTokens * w.key_dim);
        values.resize(kDeltaTokens * shape.padded_columns()), read.resize(values.size());
        memory.resize(w.repeats() * shape.size());
    }
    Lines<float> queries, keys;  // [kDeltaTokens][key_dim]
    Lines<float> values, read;   // [kDeltaTokens][value_dim padded to panels]; padding stays zero
    Lines<float> memory;         // [value heads], in panels; the same
    float asked[kDeltaTokens], kept[kDeltaTokens], strength[kDeltaTokens];  // q k, a and b of each token
};

// All tokens of a row, of a key head and the value heads that share it: what one thread does by itself.
class DeltaPass {
public:
    // `projected`, `said`: of the row's first token, rows of these strides.
    DeltaPass(const Model& m, const DeltaNet& w, const Row& row, long head, const float* projected, long stride, Element* said,
              long said_stride, DeltaScratch& own)
        : m_(m), w_(w), row_(row), head_(head), projected_(projected), stride_(stride), said_(said), said_stride_(said_stride),
          own_(own) {
        const long d = w.key_dim, size = w.repeats() * w.value_dim;
        const long group = head * (2 * d + 2 * size);  // where all of the key head's stands together
        const auto at = [&](long kind, long within) { return w.is_grouped ? group + within : kind; };
        query_ = at(head * d, 0), key_ = at(w.num_keys() + head * d, d);
        value_ = at(2 * w.num_keys() + head * size, 2 * d);
        gates_ = at(w.num_convolved + head * size, 2 * d + size);
        strengths_ = w.rates_at() + (w.is_grouped ? 2 : 1) * head * w.repeats();
        decays_ = strengths_ + (w.is_grouped ? w.repeats() : w.num_value_heads);
    }

    void run() {
        begin();
        each_stretch(m_, row_, [&](long start, long end, bool is_left) {
            for (long first = start, last; first < end; first = last) {
                last = std::min(end, first + kDeltaTokens);
                ask(first, last);
                for (long i = 0; i < w_.repeats(); i++) {
                    value(i, first, last);
                    remember(i, last - first);
                    finish(i, first, last);
                }
            }
            if (is_left) leave(end);
        });
    }

private:
    long columns() const { return shape_.padded_columns(); }
    float* memory(long i) const { return own_.memory.data() + i * shape_.size(); }
    long memory_at(long i) const { return w_.memory_at() + (head_ * w_.repeats() + i) * w_.key_dim * w_.value_dim; }

    // The memories behind the tokens so far; zeros where there are none.
    void begin() {
        if (row_.start == 0) return std::fill(own_.memory.begin(), own_.memory.end(), 0.0f);
        const StatePlace place = state_behind(m_, w_, row_, row_.start);
        for (long i = 0; i < w_.repeats(); i++) shape_.read(place, memory_at(i), memory(i));
    }

    // Those behind the row's first `last` tokens to their block.
    void leave(long last) const {
        const StatePlace place = state_behind(m_, w_, row_, row_.start + last);
        for (long i = 0; i < w_.repeats(); i++) shape_.write(place, memory_at(i), memory(i));
    }

    // Tokens' queries and keys: directions, keys of length 1 and queries of length key_dim ** -0.5. And their products.
    void ask(long first, long last) {
        const long d = w_.key_dim;
        for (long i = 0; i < last - first; i++) {
            float *const query = own_.queries.data() + i * d, *const key = own_.keys.data() + i * d;
            const float* const product = projected_ + (first + i) * stride_;
            std::copy_n(product + query_, d, query), std::copy_n(product + key_, d, key);
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
            const float* const product = projected_ + token * stride_;
            std::copy_n(product + value_ + i * w_.value_dim, w_.value_dim, own_.values.data() + (token - first) * columns());
            const double rate = product[decays_ + i] + w_.rate_bias[head];
            const double forgotten = w_.forgetting[head] * (rate > kLarge ? rate : std::log1p(std::exp(rate)));
            own_.kept[token - first] = float(std::exp(-forgotten));
            own_.strength[token - first] = float(1.0 / (1.0 + std::exp(-double(product[strengths_ + i]))));
        }
    }

    // The memory of the `i`th value head after `count` tokens, and what each of them reads of it.
    void remember(long i, long count) const {
        for (long panel = 0; panel < shape_.panels(); panel++) {
            pass(memory(i) + panel * shape_.panel_size(), own_.values.data() + panel * kPanelColumns,
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
            if (token + 1 == count) return change_all(memory, by, error, key);
            const float *const next = key + d, *const asks = query + d;
            shown = asked = PanelRow::zeros();
            for (long row = 0; row < d; row++) {
                float* const place = memory + row * kPanelColumns;
                const PanelRow kept = change(place, place, by, error, key[row]);
                shown.add(kept, next[row]), asked.add(kept, asks[row]);
            }
            key = next, query = asks;
        }
    }

    void change_all(float* memory, Vector by, const PanelRow& error, const float* key) const {
        for (long row = 0; row < w_.key_dim; row++, memory += kPanelColumns) change(memory, memory, by, error, key[row]);
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
    long query_, key_, value_, gates_, strengths_, decays_;  // the key head's first ones, among a token's products
    const HeadMemory shape_{w_.key_dim, w_.value_dim};
};
