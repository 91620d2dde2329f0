// A step of a Llama-family decoder, all layers in one call: any mix of sequences' next tokens and stretches of prompts.
//
// Weights and pages are bfloat16, sums and the residual stream float32. Used by one thread at a time, with helpers of
// its own, as many as the machine has to spare (cores.hpp).
//
//   forward: embedding -> layers: norm -> qkv -> rotate, write K and V -> attend -> o -> norm -> gate, up -> silu -> down
//   logits:  norm -> head
//
// Few tokens: the time goes into reading weights, so threads share out the weights' columns and meet after each product.
// Many: threads share out the tokens in panels, whose intermediate results stay near, and meet around attention alone.

#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "attention.hpp"
#include "cores.hpp"
#include "linear.hpp"
#include "model.hpp"
#include "prompt_attention.hpp"
#include "step.hpp"
#include "team.hpp"
#include "vectors.hpp"

namespace {

constexpr std::chrono::seconds kLargePagesWithin{3};
constexpr long kPanelRows = 60;     // of a panel; a multiple of kRowsAtOnce
constexpr long kFewRows = 60;       // up to here threads share out columns; no more than kPanelRows

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
    Decoder(const Model& model, int max_threads, const Cores& cores)
        : m_(model), layers_(model.layers, model.layers + model.num_layers), team_(max_threads), cores_(cores),
          group_(int(model.num_qo_heads / model.num_kv_heads)), hidden_stride_(padded(model.hidden_size, kTileColumns)),
          normed_stride_(padded(model.hidden_size, 32)), attended_stride_(padded(model.qo_size(), 32)),
          activated_stride_(padded(model.intermediate_size, 32)), qkv_stride_(padded(model.qkv_size(), kTileColumns)),
          gate_up_stride_(padded(2 * model.intermediate_size, kTileColumns)), counters_(2 * model.num_layers + 1) {
        for (int rank = 0; rank < max_threads; rank++) mine_.push_back(std::make_unique<Mine>(*this));
        const auto deadline = std::chrono::steady_clock::now() + kLargePagesWithin;
        use_large_pages(m_.head_tiles(), deadline);
        for (const Layer& layer : layers_) {
            for (const Tiles& w : {m_.qkv(layer), m_.o(layer), m_.gate_up(layer), m_.down(layer)}) {
                use_large_pages(w, deadline);
            }
        }
    }

    long block_size() const { return m_.block_size; }
    int num_threads() const { return team_.size(); }

    void forward(Step& step) {
        plan_attention(step, m_);
        reserve(step);
        if (step.num_tokens <= kFewRows) {
            team_.run(cores_.take(), [&](int rank) {
                begin(step, rank);
                team_.barrier();
                run_together(step, rank);
                run_last(step, rank);
            });
        } else {
            team_.run(cores_.take(), [&](int rank) { begin(step, rank); });
            for (std::size_t index = 0; index < layers_.size(); index++) {
                team_.run(cores_.take(), [&](int rank) { run_apart(step, index, rank); });
            }
            team_.run(cores_.take(), [&](int rank) { run_last(step, rank); });
        }
        cores_.mark();
    }

    void logits(long rows, const float* hidden, float* logits) {
        const Tiles head = m_.head_tiles();
        team_.run(cores_.take(), [&](int rank) {
            for (long first = 0; first < rows; first += kPanelRows) {
                const Rows normed = normalize(hidden + first * hidden_stride_, std::min(kPanelRows, rows - first),
                                              m_.final_norm, mine_[rank]->panel);
                multiply(normed, head, part(head, rank), [&](long row, long column, const float* sums) {
                    std::copy_n(sums, kTileColumns, logits + (first + row) * head.count() * kTileColumns + column);
                });
            }
        });
        cores_.mark();
    }

private:
    // What up to kPanelRows rows need between the residual stream and itself. Padding stays zero.
    struct Panel {
        explicit Panel(const Decoder& d)
            : normed(kPanelRows * d.normed_stride_), activated(kPanelRows * d.activated_stride_),
              qkv(kPanelRows * d.qkv_stride_), gate_up(kPanelRows * d.gate_up_stride_) {}
        std::vector<bf16> normed, activated;
        std::vector<float> qkv, gate_up;
    };

    // One thread's own memory.
    struct Mine {
        explicit Mine(const Decoder& d)
            : panel(d), attention(d.group_, int(d.m_.head_dim)), prompt_attention(d.group_, int(d.m_.head_dim)),
              head(d.m_.head_dim) {}
        Panel panel;
        Attention attention;
        PromptAttention prompt_attention;
        std::vector<float> head;
    };

    Range part(const Tiles& w, int rank) const { return share(w.count(), rank, team_.size()); }
    float* residual(long token) { return residual_.data() + token * hidden_stride_; }
    bf16* attended(long token) { return attended_.data() + token * attended_stride_; }

    void reserve(const Step& step) {
        const auto grow = [](auto& memory, long size) {
            if (long(memory.size()) < size) memory.resize(size);
        };
        grow(residual_, step.num_tokens * hidden_stride_);
        grow(attended_, step.num_tokens * attended_stride_);
        grow(last_attended_, step.num_wanted * attended_stride_);
        grow(cos_, step.num_tokens * m_.head_dim);
        grow(sin_, step.num_tokens * m_.head_dim);
        for (Counter& counter : counters_) counter.reset();
    }

    void begin(const Step& step, int rank) {
        const Range tokens = share(step.num_tokens, rank, team_.size());
        for (long token = tokens.first; token < tokens.last; token++) embed(step.input_ids[token], residual(token));
        for (const Row& row : step.rows) prepare_rotations(row, tokens);
    }

    void embed(std::int32_t token, float* x) const {
        std::fill_n(x, hidden_stride_, 0.0f);
        for (long i = 0; i < m_.hidden_size; i += 16) {
            const __mmask16 mask = lanes(m_.hidden_size - i);
            _mm512_mask_storeu_ps(x + i, mask, load(m_.embedding + token * m_.hidden_size + i, mask));
        }
    }

    // Cosines and signed sines of the positions of a row's tokens that lie in `tokens`, rounded as the torch path does.
    void prepare_rotations(const Row& row, Range tokens) {
        const long half = m_.head_dim / 2, last = std::min(tokens.last, row.token + row.length);
        for (long token = std::max(tokens.first, row.token); token < last; token++) {
            float *cos = cos_.data() + token * m_.head_dim, *sin = sin_.data() + token * m_.head_dim;
            for (long i = 0; i < half; i++) {
                const float angle = float(row.start + token - row.token) * m_.inv_freq[i];
                cos[i] = cos[i + half] = rounded(std::cos(angle) * float(m_.rope_factor));
                sin[i + half] = rounded(std::sin(angle) * float(m_.rope_factor));
                sin[i] = -sin[i + half];
            }
        }
    }

    // --- the layers -------------------------------------------------------------------------------------
    // Both ways end with K and V of the last layer written: what only the wanted tokens need is left to run_last.

    void run_together(const Step& step, int rank) {
        const Range tokens = share(step.num_tokens, rank, team_.size());
        for (std::size_t index = 0; index < layers_.size(); index++) {
            const Layer& layer = layers_[index];
            const Rows normed = normalize(residual(0), step.num_tokens, layer.input_norm, mine_[rank]->panel);
            set(shared_.qkv.data(), qkv_stride_, normed, m_.qkv(layer), layer.qkv_bias, part(m_.qkv(layer), rank));
            team_.barrier();
            place(step, index, tokens, shared_.qkv.data() + tokens.first * qkv_stride_, *mine_[rank]);
            team_.barrier();
            report(step, index, rank);
            if (index + 1 == layers_.size()) return;
            attend(step.pieces, index, *mine_[rank]);
            team_.barrier();
            finish_together(layer, residual(0), attended(0), step.num_tokens, rank);
        }
    }

    void run_apart(const Step& step, std::size_t index, int rank) {
        const long groups = (step.num_tokens + kRowsAtOnce - 1) / kRowsAtOnce, size = team_.size();
        const long panels = (groups * kRowsAtOnce + kPanelRows * size - 1) / (kPanelRows * size) * size;
        const Layer& layer = layers_[index];
        Panel& panel = mine_[rank]->panel;
        counters_[2 * index].take(panels, [&](long i) {
            const Range range = share(groups, int(i), int(panels));
            const Range tokens{range.first * kRowsAtOnce, std::min(range.last * kRowsAtOnce, step.num_tokens)};
            const long count = tokens.last - tokens.first;
            if (index > 0) finish(layers_[index - 1], residual(tokens.first), attended(tokens.first), count, panel);
            const Rows normed = normalize(residual(tokens.first), count, layer.input_norm, panel);
            set(panel.qkv.data(), qkv_stride_, normed, m_.qkv(layer), layer.qkv_bias, all(m_.qkv(layer)));
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
        attend(step.last_pieces, index, *mine_[rank]);
        team_.barrier();
        const Range mine = share(step.num_wanted, rank, team_.size());
        for (long i = mine.first; i < mine.last; i++) {
            std::copy_n(residual(step.wanted[i]), hidden_stride_, step.hidden + i * hidden_stride_);
            std::copy_n(attended(step.wanted[i]), attended_stride_, last_attended_.data() + i * attended_stride_);
        }
        team_.barrier();
        if (step.num_wanted <= kFewRows) {
            finish_together(layers_[index], step.hidden, last_attended_.data(), step.num_wanted, rank);
            return;
        }
        counters_.back().take((step.num_wanted + kPanelRows - 1) / kPanelRows, [&](long panel) {
            const long first = panel * kPanelRows;
            finish(layers_[index], step.hidden + first * hidden_stride_, last_attended_.data() + first * attended_stride_,
                   std::min(kPanelRows, step.num_wanted - first), mine_[rank]->panel);
        });
    }

    void report(const Step& step, std::size_t index, int rank) const {
        if (rank == 0 && step.on_layer != nullptr) step.on_layer(int(index));
    }

    // From attention to the layer's end: x += o(attended), x += mlp(x). All rows together, a barrier after each product.
    void finish_together(const Layer& layer, float* x, const bf16* attended, long rows, int rank) {
        add(x, {attended, attended_stride_, rows}, m_.o(layer), layer.o_bias, part(m_.o(layer), rank));
        team_.barrier();
        const Rows normed = normalize(x, rows, layer.mlp_norm, mine_[rank]->panel);
        set(shared_.gate_up.data(), gate_up_stride_, normed, m_.gate_up(layer), layer.gate_up_bias,
            part(m_.gate_up(layer), rank));
        team_.barrier();
        activate(shared_, rows, share((m_.intermediate_size + 15) / 16, rank, team_.size()));
        team_.barrier();
        add(x, {shared_.activated.data(), activated_stride_, rows}, m_.down(layer), layer.down_bias,
            part(m_.down(layer), rank));
        team_.barrier();
    }

    // The same for one panel by one thread.
    void finish(const Layer& layer, float* x, const bf16* attended, long rows, Panel& panel) const {
        add(x, {attended, attended_stride_, rows}, m_.o(layer), layer.o_bias, all(m_.o(layer)));
        const Rows normed = normalize(x, rows, layer.mlp_norm, panel);
        set(panel.gate_up.data(), gate_up_stride_, normed, m_.gate_up(layer), layer.gate_up_bias, all(m_.gate_up(layer)));
        activate(panel, rows, {0, (m_.intermediate_size + 15) / 16});
        add(x, {panel.activated.data(), activated_stride_, rows}, m_.down(layer), layer.down_bias, all(m_.down(layer)));
    }

    // --- their parts ------------------------------------------------------------------------------------

    static Range all(const Tiles& w) { return {0, w.count()}; }

    Rows normalize(const float* hidden, long rows, const bf16* weight, Panel& panel) const {
        bf16* normed = panel.normed.data();
        for (long row = 0; row < rows; row++) {
            const float* x = hidden + row * hidden_stride_;
            const __m512 factor = _mm512_set1_ps(inverse_rms(x, m_.hidden_size, float(m_.norm_eps)));
            for (long i = 0; i < m_.hidden_size; i += 16) {
                const __mmask16 mask = lanes(m_.hidden_size - i);
                const __m512 values = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor);
                store(normed + row * normed_stride_ + i, _mm512_mul_ps(values, load(weight + i, mask)), mask);
            }
        }
        return {normed, normed_stride_, rows};
    }

    // y = x W^T + bias
    static void set(float* y, long stride, const Rows& x, const Tiles& w, const bf16* bias, Range part) {
        multiply(x, w, part, [&](long row, long column, const float* sums) {
            for (int i = 0; i < kTileColumns; i += 16) {
                _mm512_storeu_ps(y + row * stride + column + i, with_bias(sums + i, bias, column + i, w.columns));
            }
        });
    }

    // y += x W^T + bias
    void add(float* y, const Rows& x, const Tiles& w, const bf16* bias, Range part) const {
        multiply(x, w, part, [&](long row, long column, const float* sums) {
            for (int i = 0; i < kTileColumns; i += 16) {
                float* target = y + row * hidden_stride_ + column + i;
                const __m512 values = with_bias(sums + i, bias, column + i, w.columns);
                _mm512_storeu_ps(target, _mm512_add_ps(_mm512_loadu_ps(target), values));
            }
        });
    }

    void activate(Panel& panel, long rows, Range vectors) const {
        const long size = m_.intermediate_size;
        for (long row = 0; row < rows; row++) {
            const float *gate = panel.gate_up.data() + row * gate_up_stride_, *up = gate + size;
            for (long i = vectors.first * 16; i < std::min(size, vectors.last * 16); i += 16) {
                const __mmask16 mask = lanes(size - i);
                const __m512 values = silu(_mm512_maskz_loadu_ps(mask, gate + i));
                store(panel.activated.data() + row * activated_stride_ + i,
                      _mm512_mul_ps(values, _mm512_maskz_loadu_ps(mask, up + i)), mask);
            }
        }
    }

    // --- attention --------------------------------------------------------------------------------------

    Pages pages(std::size_t layer, long kv_head, const Row& row) const {
        const long head_size = m_.block_size * m_.head_dim;
        return {m_.pages + (long(layer) * m_.num_blocks * 2 * m_.num_kv_heads + kv_head) * head_size,
                m_.num_kv_heads * head_size, 2 * m_.num_kv_heads * head_size, row.blocks, m_.block_size, m_.head_dim};
    }

    // The products of `tokens` to their places: K and V to their slots, queries to where attention's result will be.
    void place(const Step& step, std::size_t index, Range tokens, const float* qkv, Mine& mine) {
        const Layer& layer = layers_[index];
        const long d = m_.head_dim;
        for (const Row& row : step.rows) {
            const long last = std::min(tokens.last, row.token + row.length);
            for (long token = std::max(tokens.first, row.token); token < last; token++) {
                const float* heads = qkv + (token - tokens.first) * qkv_stride_;
                for (long head = 0; head < m_.num_qo_heads; head++, heads += d) {
                    turn(heads, layer.q_norm, token, mine.head, attended(token) + head * d);
                }
                for (long head = 0; head < m_.num_kv_heads; head++, heads += d) {
                    const Pages pages = this->pages(index, head, row);
                    bf16* key = const_cast<bf16*>(pages.key(row.start + token - row.token));
                    turn(heads, layer.k_norm, token, mine.head, key);
                    const float* value = heads + m_.num_kv_heads * d;
                    for (long i = 0; i < d; i += 16) store(key + pages.values + i, _mm512_loadu_ps(value + i));
                }
            }
        }
    }

    // One head, normalized if the model does that, turned by its token's angles.
    void turn(const float* head, const bf16* norm, long token, std::vector<float>& scratch, bf16* out) const {
        const long d = m_.head_dim, half = d / 2;
        if (norm != nullptr) {
            const __m512 factor = _mm512_set1_ps(inverse_rms(head, d, float(m_.norm_eps)));
            for (long i = 0; i < d; i += 16) {
                const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(head + i), factor);
                _mm512_storeu_ps(scratch.data() + i, _mm512_mul_ps(values, load(norm + i)));
            }
            head = scratch.data();
        }
        const float *cos = cos_.data() + token * d, *sin = sin_.data() + token * d;
        for (long i = 0; i < half; i += 8) {  // a half is a multiple of 8
            const __m256 low = _mm256_loadu_ps(head + i), high = _mm256_loadu_ps(head + half + i);
            const __m256 c = _mm256_loadu_ps(cos + i), s = _mm256_loadu_ps(sin + half + i);
            const __m256 first = _mm256_fmsub_ps(low, c, _mm256_mul_ps(high, s));
            const __m256 second = _mm256_fmadd_ps(high, c, _mm256_mul_ps(low, s));
            _mm_storeu_si128((__m128i*)(out + i), (__m128i)_mm256_cvtneps_pbh(first));
            _mm_storeu_si128((__m128i*)(out + half + i), (__m128i)_mm256_cvtneps_pbh(second));
        }
    }

    // Queries are read where the result is then written.
    void attend(const std::vector<Piece>& pieces, std::size_t index, Mine& mine) {
        counters_[2 * index + 1].take(long(pieces.size()), [&](long i) {
            const Piece& piece = pieces[i];
            const Row& row = *piece.row;
            const Pages pages = this->pages(index, piece.kv_head, row);
            const long window = layers_[index].window, position = row.start + piece.first;
            bf16* heads = attended(row.token + piece.first) + piece.kv_head * group_ * m_.head_dim;
            if (piece.tokens > 1) {
                mine.prompt_attention.attend(pages, heads, piece.tokens, position, window, heads, attended_stride_);
                return;
            }
            for (int head = 0; head < group_; head++) {
                std::copy_n(heads + head * m_.head_dim, m_.head_dim, mine.attention.query(head));
            }
            const long first = window == 0 ? 0 : std::max(0L, position + 1 - window);
            mine.attention.attend(pages, first, position + 1, heads);
        });
    }

    const Model m_;
    const std::vector<Layer> layers_;
    Team team_;
    Cores cores_;
    const int group_;  // query heads of one KV head
    const long hidden_stride_, normed_stride_, attended_stride_, activated_stride_, qkv_stride_, gate_up_stride_;
    std::vector<Counter> counters_;  // a layer's panels and its attention, and the last panels
    std::vector<float> residual_, cos_, sin_;
    std::vector<bf16> attended_, last_attended_;  // queries, then attention's result; padding stays zero
    Panel shared_{*this};
    std::vector<std::unique_ptr<Mine>> mine_;
};

}  // namespace

extern "C" {

// `slots`: this machine's workers in shared memory, this one being `slot`; null: always `num_threads`.
void* kvferry_decoder_new(const Model* model, int num_threads, int max_threads, void* slots, int num_slots, int slot) {
    return new Decoder(*model, max_threads,
                       Cores(static_cast<Cores::Slot*>(slots), num_slots, slot, num_threads, max_threads));
}

void kvferry_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

// `rows` rows, each `lengths[i]` tokens from position `starts[i]` on; their tokens packed in `input_ids`. `block_ids`:
// each row's blocks up to its last token's, row after row. `hidden` gets the states of the `wanted` packed tokens, each
// once. `on_layer(i)` is called when layer i's keys and values are in the pages; null: nobody asked.
void kvferry_decoder_forward(void* decoder, int rows, const std::int32_t* input_ids, const std::int32_t* starts,
                             const std::int32_t* lengths, const std::int32_t* block_ids, int num_wanted,
                             const std::int32_t* wanted, float* hidden, void (*on_layer)(int)) {
    Step step{0, input_ids, {}, num_wanted, wanted, hidden, on_layer, {}, {}};
    auto* self = static_cast<Decoder*>(decoder);
    for (int row = 0; row < rows; row++) {
        step.rows.push_back({step.num_tokens, starts[row], lengths[row], block_ids});
        step.num_tokens += lengths[row];
        block_ids += (starts[row] + lengths[row] - 1) / self->block_size() + 1;
    }
    self->forward(step);
}

// Those that the last part of the last step ran on.
int kvferry_decoder_num_threads(void* decoder) { return static_cast<Decoder*>(decoder)->num_threads(); }

// `hidden` [rows][hidden_size padded to 64] -> `logits` [rows][vocab_size padded to 64]
void kvferry_decoder_logits(void* decoder, int rows, const float* hidden, float* logits) {
    static_cast<Decoder*>(decoder)->logits(rows, hidden, logits);
}
}
