// A step in two where a model's last layers keep nothing for later tokens: all tokens through the layers before these, and
// the wanted ones, of a prompt its last, through the rest. Their results are the same.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layers/step.hpp"
#include "machine/vectors.hpp"

struct WantedTokens {
    // `stride`: from row to row of hidden states.
    WantedTokens(const Step& step, long stride)
        : order(step.num_wanted), tokens(step.wanted, step.wanted + step.num_wanted),
          hidden(std::max(1L, step.num_wanted) * stride), before(step), behind(step) {
        std::sort(tokens.begin(), tokens.end());
        for (long i = 0; i < step.num_wanted; i++) {
            order[i] = std::int32_t(std::lower_bound(tokens.begin(), tokens.end(), step.wanted[i]) - tokens.begin());
        }
        before.wanted = tokens.data(), before.hidden = hidden.data();
        behind.num_tokens = step.num_wanted, behind.wanted = order.data(), behind.on_layer = nullptr;
        behind.rows.clear();
        for (const Row& row : step.rows) add_stretches(row);
        if (step.slots.empty()) return;
        behind.slots.clear();
        for (const std::int32_t token : tokens) behind.slots.push_back(step.slots[token]);
        before.last_slots = behind.slots;
    }
    WantedTokens(const WantedTokens&) = delete;

    std::vector<std::int32_t> order, tokens;  // where each wanted one stands among them; they, in order
    Lines<float> hidden;                      // between both
    Step before, behind;

private:
    // Wanted tokens of a row that are neighbours are a row of the rest.
    void add_stretches(const Row& row) {
        auto token = std::lower_bound(tokens.begin(), tokens.end(), row.token);
        while (token != tokens.end() && *token < row.token + row.length) {
            const auto first = token;
            while (token != tokens.end() && *token == *first + (token - first) && *token < row.token + row.length) token++;
            const long start = row.start + *first - row.token;
            behind.rows.push_back({long(first - tokens.begin()), start, long(token - first), row.blocks});
        }
    }
};
