// A step of a Llama-family decoder, all layers in one call: any mix of sequences' next tokens and stretches of prompts.
//
// Weights are elements or whole numbers, pages elements (vectors.hpp), sums and the residual stream float32. Used by one thread at a
// time, with helpers of its own, as many as the machine has to spare (cores.hpp).
//
//   forward: embedding -> layers: norm -> qkv -> rotate, write K and V -> attend -> o -> norm -> gate, up -> act -> down
//   logits:  norm -> head
//
// Few tokens: the time goes into reading weights, so threads share out the weights' columns and meet after each product.
// Many: threads take the tokens in panels, whose intermediate results stay near, and meet around attention alone.

#include <atomic>
#include <memory>
#include <vector>

#include "cores.hpp"
#include "experts.hpp"
#include "heads.hpp"
#include "linear.hpp"
#include "model.hpp"
#include "panel.hpp"
#include "step.hpp"
#include "team.hpp"
#include "vectors.hpp"

namespace {

constexpr std::chrono::seconds kLargePagesWithin{3};
constexpr long kFewRows = kPanelRows;  // up to here threads share out columns
// A multiple of kRowsAtOnce: as fast by row as a whole panel where weights come from near.
constexpr long kLeastPanelRows = kPanelRows / 3 / kRowsAtOnce * kRowsAtOnce;

// Takes numbers below `count` until none is left; every thread gets others.
class Counter {
public:
    void reset() { next_.store(0, std::memory_order_relaxed); }

    template <class Job>
    void take(long count, Job job) {
        for (long i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) job(i);
    }

private:
    alignas(64) std::atomic<long> next_{0};
};

class Decoder {
public:
    Decoder(const Model& model, bool is_exact, int max_threads, const Cores& cores)
        : m_(model), heads_(model, is_exact), layers_(model.layers, model.layers + model.num_layers), team_(max_threads), cores_(cores),
          counters_(2 * model.num_layers + 1) {
        for (int rank = 0; rank < max_threads; rank++) {
            mine_.push_back(std::make_unique<Mine>(strides_, heads_.group(), m_, is_exact));
        }
        const auto deadline = std::chrono::steady_clock::now() + kLargePagesWithin;
        use_large_pages(m_.head, deadline);
        for (const Layer& layer : layers_) {
            for (const Linear& w : {layer.attention.qkv, layer.attention.o}) use_large_pages(w.weight, deadline);
            each_mlp(layer, [&](const GatedMlp& mlp) {
                for (const Linear& w : {mlp.gate_up, mlp.down}) use_large_pages(w.weight, deadline);
            });
        }
    }

    long block_size() const { return m_.block_size; }
    int num_threads() const { return team_.size(); }

    void forward(Step& step) {
        plan_attention(step, m_, team_.max_size());
        reserve(step);
        if (m_.sum_over_ranks != nullptr) {
            forward_in_ranks(step);
        } else if (step.num_tokens <= kFewRows) {
            run([&](int rank) {
                begin(step, rank);
                team_.barrier();
                run_together(step, rank);
                run_last(step, rank);
            });
        } else {
            plan_panels(step.num_tokens);
            run([&](int rank) { begin(step, rank); });
            for (std::size_t index = 0; index < layers_.size(); index++) {
                const Layer& layer = layers_[index];
                run([&](int rank) { run_apart(step, index, rank); });
                if (layer.experts == nullptr || index + 1 == layers_.size()) continue;
                finish_sparse(layer, residual(0), {attended(0), strides_.attended, step.num_tokens, step.slots_from(0)});
            }
            const bool is_sparse = layers_.back().experts != nullptr && step.num_wanted > kFewRows;
            run([&](int rank) { is_sparse ? gather_last(step, rank) : run_last(step, rank); });
            if (is_sparse) {
                const Rows last{last_attended_.data(), strides_.attended, step.num_wanted, step.last_slots_from(0)};
                finish_sparse(layers_.back(), step.hidden, last);
            }
        }
        cores_.leave();
    }

    void logits(long rows, const float* hidden, float* logits) {
        const Tiles& head = m_.head;
        run([&](int rank) {
            Team::Member by(team_, rank);
            for (long first = 0; first < rows; first += kPanelRows) {
                const Rows normed = math_.normalize(hidden + first * strides_.hidden,
                                                    std::min(kPanelRows, rows - first), m_.final_norm,
                                                    mine_[rank]->panel);
                multiply(normed, head, by, [&](long row, long column, const float* sums) {
                    std::copy_n(sums, kTileColumns, logits + (first + row) * head.count() * kTileColumns + column);
                });
            }
        });
        cores_.leave();
    }

private:
    // One thread's own memory.
    struct Mine {
        Mine(const Strides& strides, int group, const Model& m, bool is_exact)
            : panel(strides), heads(m, group, is_exact) {}
        Panel panel;
        HeadScratch heads;
        ExpertScratch experts;
    };

    template <class Job>
    static void each_mlp(const Layer& layer, Job job) {
        if (layer.experts == nullptr) return job(layer.mlp);
        for (long i = 0; i < layer.experts->count; i++) job(layer.experts->experts[i]);
        if (layer.experts->shared != nullptr) job(*layer.experts->shared);
    }

    template <class Job>
    void run(Job job) {
        team_.run(cores_.take(), [&](int rank) {
            [[maybe_unused]] const MatrixUnit unit;
            job(rank);
        });
    }

    float* partial(long row) { return partial_.data() + row * strides_.hidden; }
    float* residual(long token) { return residual_.data() + token * strides_.hidden; }
    Element* attended(long token) { return attended_.data() + token * strides_.attended; }

    void reserve(const Step& step) {
        const auto grow = [](auto& memory, long size) {
            if (long(memory.size()) < size) memory.resize(size);
        };
        grow(residual_, step.num_tokens * strides_.hidden);
        grow(attended_, step.num_tokens * strides_.attended);
        grow(last_attended_, step.num_wanted * strides_.attended);
        heads_.reserve(step.num_tokens);
        for (const Layer& layer : layers_) {
            if (layer.experts == nullptr) continue;
            const long rows = std::min(expert_rows_, std::max(step.num_tokens, step.num_wanted));
            expert_memory_.reserve(rows, strides_, layer.experts->num_chosen);
        }
        for (Counter& counter : counters_) counter.reset();
    }

    // Panels for threads to take one by one: whole ones as long as there is much to take, so that weights are read less
    // often, and small ones at last, so that threads end together though their cores be unequal.
    void plan_panels(long tokens) {
        panels_.clear();
        for (long first = 0; first < tokens;) {
            const long left = tokens - first, fair = left / (2 * team_.max_size()) / kRowsAtOnce * kRowsAtOnce;
            long size = team_.max_size() == 1 ? kPanelRows : std::clamp(fair, kLeastPanelRows, kPanelRows);
            if (left - size < kLeastPanelRows / 2) size = std::min(left, kPanelRows);
            panels_.push_back({first, first + size});
            first += size;
        }
    }

    void begin(const Step& step, int rank) {
        const Range tokens = share(step.num_tokens, rank, team_.size());
        for (long token = tokens.first; token < tokens.last; token++) embed(step.input_ids[token], residual(token));
        each(step, tokens, [&](const Row& row, long token) { heads_.prepare(token, row.start + token - row.token); });
    }

    void embed(std::int32_t token, float* x) const {
        std::fill_n(x, strides_.hidden, 0.0f);
        if (m_.sum_over_ranks != nullptr) token -= m_.first_token;
        if (m_.sum_over_ranks != nullptr && (token < 0 || token >= m_.num_tokens)) return;
        for (long i = 0; i < m_.hidden_size; i += 16) {
            const Lanes mask = lanes(m_.hidden_size - i);
            store(x + i, load(m_.embedding + token * m_.hidden_size + i, mask) * repeat(float(m_.embedding_factor)), mask);
        }
    }

    // --- the layers -------------------------------------------------------------------------------------
    // Both ways end with K and V of the last layer written: what only the wanted tokens need is left to run_last.

    void run_together(const Step& step, int rank) {
        Team::Member by(team_, rank);
        const Range tokens = by.part(step.num_tokens);
        for (std::size_t index = 0; index < layers_.size(); index++) {
            const Layer& layer = layers_[index];
            const Linear& qkv = layer.attention.qkv;
            const Rows normed = math_.normalize(residual(0), step.num_tokens, layer.input_norm, mine_[rank]->panel,
                                                step.slots_from(0));
            math_.set(shared_.qkv.data(), strides_.qkv, normed, qkv, by);
            math_.adapt(shared_.qkv.data(), strides_.qkv, normed, qkv, shared_, by);
            team_.barrier();
            place(step, index, tokens, shared_.qkv.data() + tokens.first * strides_.qkv, *mine_[rank]);
            team_.barrier();
            report(step, index, rank);
            if (index + 1 == layers_.size()) return;
            attend(step.pieces, index, *mine_[rank]);
            team_.barrier();
            finish_together(layer, residual(0), {attended(0), strides_.attended, step.num_tokens, step.slots_from(0)}, rank);
        }
    }

    void run_apart(const Step& step, std::size_t index, int rank) {
        const Layer& layer = layers_[index];
        Panel& panel = mine_[rank]->panel;
        Alone alone;
        counters_[2 * index].take(long(panels_.size()), [&](long i) {
            const Range tokens = panels_[i];
            const long count = tokens.last - tokens.first;
            float* x = residual(tokens.first);
            const std::int32_t* slots = step.slots_from(tokens.first);
            if (index > 0 && layers_[index - 1].experts == nullptr) {
                math_.finish(layers_[index - 1], x, {attended(tokens.first), strides_.attended, count, slots}, panel, panel, alone);
            }
            const Rows normed = math_.normalize(x, count, layer.input_norm, panel, slots);
            const Linear& qkv = layer.attention.qkv;
            math_.set(panel.qkv.data(), strides_.qkv, normed, qkv, alone);
            math_.adapt(panel.qkv.data(), strides_.qkv, normed, qkv, panel, alone);
            place(step, index, tokens, panel.qkv.data(), *mine_[rank]);
        });
        team_.barrier();
        report(step, index, rank);
        if (index + 1 < layers_.size()) attend(step.pieces, index, *mine_[rank]);
    }

    // The rest of the last layer, for the wanted tokens alone.
    void run_last(const Step& step, int rank) {
        if (step.num_wanted == 0) return;
        const std::size_t index = layers_.size() - 1;
        gather_last(step, rank);
        team_.barrier();
        if (step.num_wanted <= kFewRows) {
            const Rows last{last_attended_.data(), strides_.attended, step.num_wanted, step.last_slots_from(0)};
            finish_together(layers_[index], step.hidden, last, rank);
            return;
        }
        Panel& panel = mine_[rank]->panel;
        Alone alone;
        counters_.back().take((step.num_wanted + kPanelRows - 1) / kPanelRows, [&](long i) {
            const long first = i * kPanelRows;
            const Rows last{last_attended_.data() + first * strides_.attended, strides_.attended,
                            std::min(kPanelRows, step.num_wanted - first), step.last_slots_from(first)};
            math_.finish(layers_[index], step.hidden + first * strides_.hidden, last, panel, panel, alone);
        });
    }

    // The last attention, and what the wanted tokens go on with.
    void gather_last(const Step& step, int rank) {
        attend(step.last_pieces, layers_.size() - 1, *mine_[rank]);
        team_.barrier();
        const Range mine = share(step.num_wanted, rank, team_.size());
        for (long i = mine.first; i < mine.last; i++) {
            std::copy_n(residual(step.wanted[i]), strides_.hidden, step.hidden + i * strides_.hidden);
            std::copy_n(attended(step.wanted[i]), strides_.attended, last_attended_.data() + i * strides_.attended);
        }
    }

    // --- by several ranks -------------------------------------------------------------------------------
    // Each has a part of the heads and of the inner columns: what o and down yield is summed over them, in float32. So the
    // threads meet there, and share out columns whatever the number of tokens.

    void forward_in_ranks(const Step& step) {
        run([&](int rank) { begin(step, rank); });
        m_.sum_over_ranks(residual(0), step.num_tokens * strides_.hidden);
        for (std::size_t index = 0; index < layers_.size(); index++) {
            const bool is_last = index + 1 == layers_.size();
            run([&](int rank) {
                project_by_panels(step, index, rank);
                report(step, index, rank);
                if (!is_last) attend(step.pieces, index, *mine_[rank]);
            });
            if (!is_last) finish_in_ranks(layers_[index], residual(0), attended(0), step.num_tokens, step.slots_from(0));
        }
        if (step.num_wanted == 0) return;
        run([&](int rank) { gather_last(step, rank); });
        finish_in_ranks(layers_.back(), step.hidden, last_attended_.data(), step.num_wanted, step.last_slots_from(0));
    }

    template <class Job>
    static void each_panel(long rows, Job job) {
        for (long first = 0; first < rows; first += kPanelRows) job(first, std::min(kPanelRows, rows - first));
    }

    void project_by_panels(const Step& step, std::size_t index, int rank) {
        const Layer& layer = layers_[index];
        const Linear& qkv = layer.attention.qkv;
        Team::Member by(team_, rank);
        each_panel(step.num_tokens, [&](long first, long rows) {
            const Rows normed = math_.normalize(residual(first), rows, layer.input_norm, mine_[rank]->panel,
                                                step.slots_from(first));
            math_.set(shared_.qkv.data(), strides_.qkv, normed, qkv, by);
            math_.adapt(shared_.qkv.data(), strides_.qkv, normed, qkv, shared_, by);
            team_.barrier();
            const Range mine = by.part(rows);
            const Squares* squares = layer.attention.has_whole_norms ? sum_squares(rows, rank) + mine.first : nullptr;
            place(step, index, {first + mine.first, first + mine.last}, shared_.qkv.data() + mine.first * strides_.qkv,
                  *mine_[rank], squares);
            team_.barrier();
        });
    }

    // Of a panel's projected rows, over the ranks.
    const Squares* sum_squares(long rows, int rank) {
        if (rank == 0) {
            for (long row = 0; row < rows; row++) squares_[row] = heads_.squares(shared_.qkv.data() + row * strides_.qkv);
            m_.sum_over_ranks(&squares_[0].queries, 2 * rows);
        }
        team_.barrier();
        return squares_;
    }

    void finish_in_ranks(const Layer& layer, float* x, const Element* attended, long rows, const std::int32_t* slots) {
        const Linear o{layer.attention.o.weight, nullptr, layer.attention.o.adapters};  // biases are added once, to the sums
        const GatedMlp mlp{layer.mlp.gate_up, {layer.mlp.down.weight, nullptr, layer.mlp.down.adapters}};
        const auto slots_from = [&](long row) { return slots == nullptr ? nullptr : slots + row; };
        const Element* bias = layer.experts == nullptr ? layer.mlp.down.bias : nullptr;
        if (long(partial_.size()) < rows * strides_.hidden) partial_.resize(rows * strides_.hidden);
        run([&](int rank) {
            Team::Member by(team_, rank);
            each_panel(rows, [&](long first, long count) {
                const Rows panel{attended + first * strides_.attended, strides_.attended, count, slots_from(first)};
                math_.add(partial(first), panel, o, by, 1.0f);
                math_.adapt(partial(first), strides_.hidden, panel, o, shared_, by);
                if (slots != nullptr) team_.barrier();  // the next panel's narrowed rows take the place of these
            });
        });
        m_.sum_over_ranks(partial(0), rows * strides_.hidden);
        run([&](int rank) {
            Team::Member by(team_, rank);
            add_sums(x, layer.attention.o.bias, layer.mixed_norm, rows, rank);
            team_.barrier();
            if (layer.experts != nullptr) return add_experts(layer, x, partial(0), rows, rank);
            each_panel(rows, [&](long first, long count) {
                Panel& own = mine_[rank]->panel;
                const Rows normed =
                    math_.normalize(x + first * strides_.hidden, count, layer.mlp_norm, own, slots_from(first));
                const Rows activated = math_.feed_forward(mlp, normed, shared_, by);
                math_.add(partial(first), activated, mlp.down, by, 1.0f);
                math_.adapt(partial(first), strides_.hidden, activated, mlp.down, shared_, by);
                team_.barrier();
            });
        });
        m_.sum_over_ranks(partial(0), rows * strides_.hidden);
        run([&](int rank) { add_sums(x, bias, layer.output_norm, rows, rank); });
    }

    // x += the ranks' sums + bias, normed if `norm` is not null; the sums are zero afterwards.
    void add_sums(float* x, const Element* bias, const Element* norm, long rows, int rank) {
        const Range mine = share(rows, rank, team_.size());
        for (long row = mine.first; row < mine.last; row++) {
            for (long i = 0; i < strides_.hidden; i += 16) {
                store(partial(row) + i, with_bias(partial(row) + i, bias, i, m_.hidden_size));
            }
            math_.add_row(x + row * strides_.hidden, partial(row), norm);
            std::fill_n(partial(row), strides_.hidden, 0.0f);
        }
    }

    void report(const Step& step, std::size_t index, int rank) const {
        if (rank == 0 && step.on_layer != nullptr) step.on_layer(int(index));
    }

    // --- experts ----------------------------------------------------------------------------------------
    // Threads share out their columns whatever the number of tokens: each expert has a few of them.

    void add_experts(const Layer& layer, const float* x, float* y, long rows, int rank) {
        Team::Member by(team_, rank);
        for (long first = 0; first < rows; first += expert_rows_) {
            const long count = std::min(expert_rows_, rows - first), at = first * strides_.hidden;
            ExpertScratch& own = mine_[rank]->experts;
            expert_math_.add(*layer.experts, layer.mlp_norm, x + at, y + at, count, expert_memory_, own, by);
        }
    }

    void finish_sparse(const Layer& layer, float* x, const Rows& attended) {
        const long rows = attended.count;
        run([&](int rank) {
            const Range mine = share(rows, rank, team_.size());
            const Linear& o = layer.attention.o;
            Alone alone;
            for (long first = mine.first; first < mine.last; first += kPanelRows) {
                const Rows part{attended.values + first * strides_.attended, strides_.attended,
                                std::min(kPanelRows, mine.last - first),
                                attended.slots == nullptr ? nullptr : attended.slots + first};
                math_.add(x + first * strides_.hidden, part, o, alone, 1.0f);
                math_.adapt(x + first * strides_.hidden, strides_.hidden, part, o, mine_[rank]->panel, alone);
            }
            team_.barrier();
            add_experts(layer, x, x, rows, rank);
        });
    }

    void finish_together(const Layer& layer, float* x, const Rows& attended, int rank) {
        Team::Member by(team_, rank);
        if (layer.experts == nullptr) return math_.finish(layer, x, attended, mine_[rank]->panel, shared_, by);
        const Linear& o = layer.attention.o;
        math_.add(x, attended, o, by, 1.0f);
        math_.adapt(x, strides_.hidden, attended, o, shared_, by);
        by.meet();
        add_experts(layer, x, x, attended.count, rank);
    }

    // --- attention --------------------------------------------------------------------------------------

    // The products of `tokens` to their places: K and V to their slots, queries to where attention's result will be.
    // `squares`: of each token of them, over the ranks; null: nobody asks for more than this rank's.
    void place(const Step& step, std::size_t index, Range tokens, const float* qkv, Mine& mine,
               const Squares* squares = nullptr) {
        each(step, tokens, [&](const Row& row, long token) {
            const long i = token - tokens.first;
            heads_.place(layers_[index], row, token, qkv + i * strides_.qkv, squares == nullptr ? nullptr : squares + i,
                         attended(token), mine.heads);
        });
    }

    // job(row, token) for each packed token of `tokens`.
    template <class Job>
    static void each(const Step& step, Range tokens, Job job) {
        for (const Row& row : step.rows) {
            const long last = std::min(tokens.last, row.token + row.length);
            for (long token = std::max(tokens.first, row.token); token < last; token++) job(row, token);
        }
    }

    // Queries are read where the result is then written.
    void attend(const std::vector<Piece>& pieces, std::size_t index, Mine& mine) {
        counters_[2 * index + 1].take(long(pieces.size()), [&](long i) {
            const Piece& piece = pieces[i];
            Element* heads = attended(piece.row->token + piece.first) + piece.kv_head * heads_.group() * m_.head_dim;
            heads_.attend(layers_[index], piece, heads, strides_.attended, mine.heads);
        });
    }

    const Model m_;
    HeadMath heads_;
    const std::vector<Layer> layers_;
    const Strides strides_{m_};
    const PanelMath math_{m_, strides_};
    const ExpertMath expert_math_{m_, strides_, math_};
    const long expert_rows_{expert_rows(m_, strides_)};
    Team team_;
    Cores cores_;
    std::vector<Range> panels_;      // of a step's tokens, where threads share these out
    std::vector<Counter> counters_;  // a layer's panels and its attention, and the last panels
    std::vector<float> residual_;
    std::vector<float> partial_;  // this rank's part of sums; zero between them
    std::vector<Element> attended_, last_attended_;  // queries, then attention's result; padding stays zero
    Panel shared_{strides_};
    Squares squares_[kPanelRows];
    ExpertMemory expert_memory_;
    std::vector<std::unique_ptr<Mine>> mine_;
};

}  // namespace

extern "C" {

// Whether this process may use the instruction set that this library is compiled for; asked before anything else.
bool kvferry_may_run() { return MatrixUnit::may_run(); }

// How many values a weight of this shape takes in tiles, and it packed into so many. `Tiles` point to `target`.
long kvferry_tiled_size(long columns, long inputs) { return tiled_size(columns, inputs); }

Tiles kvferry_pack(const Element* weight, long columns, long inputs, Element* target) {
    return pack(weight, columns, inputs, target);
}

// The same of whole numbers, whose description `w` says all but where `target` is.
long kvferry_integers_size(const IntegerTiles* w) { return w->count() * w->tile_size(); }

void kvferry_pack_integers(const IntegerTiles* w, const IntegerMatrix* matrix, std::uint8_t* target) {
    pack_integers(*w, *matrix, target);
}

// `x` [rows][stride], padded with zeros to 32 inputs -> `y` [rows][columns padded to 64]: the tiles [first, last) alone.
void kvferry_multiply(const Tiles* w, const Element* x, long stride, long rows, long first, long last, float* y) {
    Some some{{first, last}};
    multiply({x, stride, rows}, *w, some, [&](long row, long column, const float* sums) {
        std::copy_n(sums, kTileColumns, y + row * w->count() * kTileColumns + column);
    });
}

// `slots`: this machine's workers in shared memory, this one being `slot`; null: always `num_threads`.
void* kvferry_decoder_new(const Model* model, bool is_exact, int num_threads, int max_threads, void* slots,
                          int num_slots, int slot) {
    return new Decoder(*model, is_exact, max_threads,
                       Cores(static_cast<Cores::Slot*>(slots), num_slots, slot, num_threads, max_threads));
}

void kvferry_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

// `rows` rows, each `lengths[i]` tokens from position `starts[i]` on; their tokens packed in `input_ids`. `block_ids`:
// each row's blocks up to its last token's, row after row. `hidden` gets the states of the `wanted` packed tokens, each
// once. `on_layer(i)` is called when layer i's keys and values are in the pages; null: nobody asked. `adapters`: the slot
// of each row's, below 0 for none; null: no row has one.
void kvferry_decoder_forward(void* decoder, int rows, const std::int32_t* input_ids, const std::int32_t* starts,
                             const std::int32_t* lengths, const std::int32_t* block_ids, int num_wanted,
                             const std::int32_t* wanted, float* hidden, void (*on_layer)(int),
                             const std::int32_t* adapters) {
    Step step{0, input_ids, {}, num_wanted, wanted, hidden, on_layer, {}, {}, {}, {}};
    auto* self = static_cast<Decoder*>(decoder);
    for (int row = 0; row < rows; row++) {
        step.rows.push_back({step.num_tokens, starts[row], lengths[row], block_ids});
        step.num_tokens += lengths[row];
        block_ids += (starts[row] + lengths[row] - 1) / self->block_size() + 1;
    }
    set_adapters(step, adapters);
    self->forward(step);
}

// Those that the last part of the last step ran on.
int kvferry_decoder_num_threads(void* decoder) { return static_cast<Decoder*>(decoder)->num_threads(); }

// `hidden` [rows][hidden_size padded to 64] -> `logits` [rows][vocab_size padded to 64]
void kvferry_decoder_logits(void* decoder, int rows, const float* hidden, float* logits) {
    static_cast<Decoder*>(decoder)->logits(rows, hidden, logits);
}
}
