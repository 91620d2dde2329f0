// The decode step of a Llama-family decoder: one token for each of a few sequences, all layers in one call.
//
// Weights and pages are bfloat16, sums and the residual stream float32. The weights are those of the engine, as oneDNN
// blocks them; nothing of the model is held here. Used by one thread at a time, with `num_threads - 1` helpers.
//
//   forward: embedding -> layers: norm -> qkv -> rotate, write K and V, attend -> o -> norm -> gate, up -> silu -> down
//   logits:  norm -> head

#include <sys/mman.h>

#include <chrono>
#include <cmath>
#include <memory>
#include <vector>

#include "attention.hpp"
#include "linear.hpp"
#include "team.hpp"
#include "vectors.hpp"

namespace {

constexpr std::chrono::seconds kLargePagesWithin{3};

// Layer and Model are declared once more in common/models/native_decoder.py, field by field.
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
};

// What one call is about. Pointers are the caller's.
struct Step {
    int rows;
    const std::int32_t* positions;      // [rows]
    std::vector<const std::int32_t*> blocks;  // each row's
    float* hidden;                      // [rows][hidden_stride]
};

// Ask for 2 MiB pages under the weights: a core reads them a tenth to a third faster. Where the kernel refuses, nothing
// changes; past the deadline it does so in its own time.
void use_large_pages(const Tiles& w, std::chrono::steady_clock::time_point deadline) {
    constexpr std::uintptr_t kLarge = 2 << 20;
    constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1: at once
    const auto address = std::uintptr_t(w.weights);
    for (auto page = address & ~(kLarge - 1); page < std::uintptr_t(w.tile(w.count())); page += kLarge) {
        madvise((void*)page, kLarge, MADV_HUGEPAGE);
        if (std::chrono::steady_clock::now() < deadline) madvise((void*)page, kLarge, kCollapse);
    }
}

class Decoder {
public:
    Decoder(const Model& model, int num_threads, int max_rows)
        : m_(model), layers_(model.layers, model.layers + model.num_layers), team_(num_threads),
          group_(int(model.num_qo_heads / model.num_kv_heads)), hidden_stride_(padded(model.hidden_size, kTileColumns)),
          qkv_stride_(padded(num_heads() * model.head_dim, kTileColumns)),
          gate_up_stride_(padded(2 * model.intermediate_size, kTileColumns)),
          attended_stride_(padded(model.num_qo_heads * model.head_dim, 32)),
          activated_stride_(padded(model.intermediate_size, 32)), normed_stride_(padded(model.hidden_size, 32)),
          cos_(max_rows * model.head_dim), sin_(max_rows * model.head_dim), qkv_(max_rows * qkv_stride_),
          gate_up_(max_rows * gate_up_stride_), attended_(max_rows * attended_stride_),
          activated_(max_rows * activated_stride_) {
        for (int rank = 0; rank < num_threads; rank++) {
            mine_.push_back(std::make_unique<Mine>(group_, int(m_.head_dim), max_rows * normed_stride_));
        }
        const auto deadline = std::chrono::steady_clock::now() + kLargePagesWithin;
        use_large_pages(head(), deadline);
        for (const Layer& layer : layers_) {
            for (const Tiles& w : {qkv(layer), o(layer), gate_up(layer), down(layer)}) use_large_pages(w, deadline);
        }
    }

    void forward(int rows, const std::int32_t* input_ids, const std::int32_t* positions, const std::int32_t* block_ids,
                 float* hidden) {
        Step step{rows, positions, {}, hidden};
        for (int row = 0; row < rows; row++) {
            step.blocks.push_back(block_ids);
            block_ids += positions[row] / m_.block_size + 1;
            embed(input_ids[row], hidden + row * hidden_stride_);
            prepare_rotation(positions[row], row);
        }
        team_.run([&](int rank) {
            for (std::size_t index = 0; index < layers_.size(); index++) run_layer(step, long(index), rank);
        });
    }

    void logits(int rows, const float* hidden, float* logits) {
        const Tiles head = this->head();
        team_.run([&](int rank) {
            multiply(normalize(rows, hidden, m_.final_norm, rank), head, part(head, rank),
                     [&](int row, long column, const float* sums) {
                         std::copy_n(sums, kTileColumns, logits + row * head.count() * kTileColumns + column);
                     });
        });
    }

private:
    // One thread's own memory.
    struct Mine {
        Mine(int num_heads, int head_dim, long normed_size)
            : attention(num_heads, head_dim), normed(normed_size), head(head_dim) {}
        Attention attention;
        std::vector<bf16> normed;
        std::vector<float> head;
    };

    long num_heads() const { return m_.num_qo_heads + 2 * m_.num_kv_heads; }

    static Tiles tiles(const bf16* weights, long columns, long inputs) {
        return {weights, columns, padded(inputs, 32) / 2};
    }

    Tiles head() const { return tiles(m_.head, m_.vocab_size, m_.hidden_size); }
    Tiles qkv(const Layer& layer) const { return tiles(layer.qkv, num_heads() * m_.head_dim, m_.hidden_size); }
    Tiles o(const Layer& layer) const { return tiles(layer.o, m_.hidden_size, m_.num_qo_heads * m_.head_dim); }
    Tiles gate_up(const Layer& layer) const { return tiles(layer.gate_up, 2 * m_.intermediate_size, m_.hidden_size); }
    Tiles down(const Layer& layer) const { return tiles(layer.down, m_.hidden_size, m_.intermediate_size); }

    Range part(const Tiles& w, int rank) const { return share(w.count(), rank, team_.size()); }

    void embed(std::int32_t token, float* x) const {
        std::fill_n(x, hidden_stride_, 0.0f);
        for (long i = 0; i < m_.hidden_size; i += 16) {
            const __mmask16 mask = lanes(m_.hidden_size - i);
            _mm512_mask_storeu_ps(x + i, mask, load(m_.embedding + token * m_.hidden_size + i, mask));
        }
    }

    // Cosines and signed sines of a row's position, rounded as the torch path rounds them.
    void prepare_rotation(std::int32_t position, int row) {
        const long half = m_.head_dim / 2;
        float *cos = cos_.data() + row * m_.head_dim, *sin = sin_.data() + row * m_.head_dim;
        for (long i = 0; i < half; i++) {
            const float angle = float(position) * m_.inv_freq[i];
            cos[i] = cos[i + half] = rounded(std::cos(angle) * float(m_.rope_factor));
            sin[i + half] = rounded(std::sin(angle) * float(m_.rope_factor));
            sin[i] = -sin[i + half];
        }
    }

    // --- a layer ----------------------------------------------------------------------------------------

    void run_layer(const Step& step, long index, int rank) {
        const Layer& layer = layers_[index];
        const Rows attended{attended_.data(), attended_stride_, step.rows};
        const Rows activated{activated_.data(), activated_stride_, step.rows};

        set(qkv_.data(), qkv_stride_, normalize(step.rows, step.hidden, layer.input_norm, rank), qkv(layer),
            layer.qkv_bias, rank);
        team_.barrier();
        const Range pairs = share(step.rows * m_.num_kv_heads, rank, team_.size());
        for (long pair = pairs.first; pair < pairs.last; pair++) {
            attend(step, layer, index, int(pair / m_.num_kv_heads), pair % m_.num_kv_heads, *mine_[rank]);
        }
        team_.barrier();
        add(step.hidden, hidden_stride_, attended, o(layer), layer.o_bias, rank);
        team_.barrier();
        set(gate_up_.data(), gate_up_stride_, normalize(step.rows, step.hidden, layer.mlp_norm, rank), gate_up(layer),
            layer.gate_up_bias, rank);
        team_.barrier();
        activate(step.rows, rank);
        team_.barrier();
        add(step.hidden, hidden_stride_, activated, down(layer), layer.down_bias, rank);
        team_.barrier();
    }

    // Every thread normalizes all rows for itself: that is quicker than to wait for each other once more.
    Rows normalize(int rows, const float* hidden, const bf16* weight, int rank) {
        bf16* normed = mine_[rank]->normed.data();
        for (int row = 0; row < rows; row++) {
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

    // y = x W^T + bias, this rank's columns
    void set(float* y, long stride, const Rows& x, const Tiles& w, const bf16* bias, int rank) const {
        multiply(x, w, part(w, rank), [&](int row, long column, const float* sums) {
            for (int i = 0; i < kTileColumns; i += 16) {
                _mm512_storeu_ps(y + row * stride + column + i, with_bias(sums + i, bias, column + i, w.columns));
            }
        });
    }

    // y += x W^T + bias
    void add(float* y, long stride, const Rows& x, const Tiles& w, const bf16* bias, int rank) const {
        multiply(x, w, part(w, rank), [&](int row, long column, const float* sums) {
            for (int i = 0; i < kTileColumns; i += 16) {
                float* target = y + row * stride + column + i;
                const __m512 values = with_bias(sums + i, bias, column + i, w.columns);
                _mm512_storeu_ps(target, _mm512_add_ps(_mm512_loadu_ps(target), values));
            }
        });
    }

    void activate(int rows, int rank) {
        const long size = m_.intermediate_size;
        const Range vectors = share((size + 15) / 16, rank, team_.size());
        for (int row = 0; row < rows; row++) {
            const float *gate = gate_up_.data() + row * gate_up_stride_, *up = gate + size;
            for (long i = vectors.first * 16; i < std::min(size, vectors.last * 16); i += 16) {
                const __mmask16 mask = lanes(size - i);
                const __m512 values = silu(_mm512_maskz_loadu_ps(mask, gate + i));
                store(activated_.data() + row * activated_stride_ + i,
                      _mm512_mul_ps(values, _mm512_maskz_loadu_ps(mask, up + i)), mask);
            }
        }
    }

    // --- attention --------------------------------------------------------------------------------------

    // One row and KV head: K and V into their slot, then the query heads that share it.
    void attend(const Step& step, const Layer& layer, long index, int row, long kv_head, Mine& mine) {
        const long d = m_.head_dim, position = step.positions[row], head_size = m_.block_size * d;
        const Pages pages{m_.pages + (index * m_.num_blocks * 2 * m_.num_kv_heads + kv_head) * head_size,
                          m_.num_kv_heads * head_size, 2 * m_.num_kv_heads * head_size, step.blocks[row],
                          m_.block_size, d};
        const float* heads = qkv_.data() + row * qkv_stride_;
        bf16* key = const_cast<bf16*>(pages.key(position));
        turn(heads + (m_.num_qo_heads + kv_head) * d, layer.k_norm, row, mine.head, key);
        const float* value = heads + (m_.num_qo_heads + m_.num_kv_heads + kv_head) * d;
        for (long i = 0; i < d; i += 16) store(key + pages.values + i, _mm512_loadu_ps(value + i));
        for (int head = 0; head < group_; head++) {
            turn(heads + (kv_head * group_ + head) * d, layer.q_norm, row, mine.head, mine.attention.query(head));
        }
        const long first = layer.window == 0 ? 0 : std::max(0L, position + 1 - layer.window);
        bf16* out = attended_.data() + row * attended_stride_ + kv_head * group_ * d;
        mine.attention.attend(pages, first, position + 1, out);
    }

    // One head, normalized if the model does that, turned by its row's angles.
    void turn(const float* head, const bf16* norm, int row, std::vector<float>& scratch, bf16* out) const {
        const long d = m_.head_dim, half = d / 2;
        if (norm != nullptr) {
            const __m512 factor = _mm512_set1_ps(inverse_rms(head, d, float(m_.norm_eps)));
            for (long i = 0; i < d; i += 16) {
                const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(head + i), factor);
                _mm512_storeu_ps(scratch.data() + i, _mm512_mul_ps(values, load(norm + i)));
            }
            head = scratch.data();
        }
        const float *cos = cos_.data() + row * d, *sin = sin_.data() + row * d;
        for (long i = 0; i < half; i += 8) {  // a half is a multiple of 8
            const __m256 low = _mm256_loadu_ps(head + i), high = _mm256_loadu_ps(head + half + i);
            const __m256 c = _mm256_loadu_ps(cos + i), s = _mm256_loadu_ps(sin + half + i);
            const __m256 first = _mm256_fmsub_ps(low, c, _mm256_mul_ps(high, s));
            const __m256 second = _mm256_fmadd_ps(high, c, _mm256_mul_ps(low, s));
            _mm_storeu_si128((__m128i*)(out + i), (__m128i)_mm256_cvtneps_pbh(first));
            _mm_storeu_si128((__m128i*)(out + half + i), (__m128i)_mm256_cvtneps_pbh(second));
        }
    }

    const Model m_;
    const std::vector<Layer> layers_;
    Team team_;
    const int group_;  // query heads of one KV head
    const long hidden_stride_, qkv_stride_, gate_up_stride_, attended_stride_, activated_stride_, normed_stride_;
    std::vector<float> cos_, sin_, qkv_, gate_up_;
    std::vector<bf16> attended_, activated_;  // their padding stays zero
    std::vector<std::unique_ptr<Mine>> mine_;
};

}  // namespace

extern "C" {

void* kvferry_decoder_new(const Model* model, int num_threads, int max_rows) {
    return new Decoder(*model, num_threads, max_rows);
}

void kvferry_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

// At most `max_rows` rows, no more than kMaxRows. `positions`: of the tokens. `block_ids`: each row's blocks up to its
// token's, row after row.
void kvferry_decoder_forward(void* decoder, int rows, const std::int32_t* input_ids, const std::int32_t* positions,
                             const std::int32_t* block_ids, float* hidden) {
    static_cast<Decoder*>(decoder)->forward(rows, input_ids, positions, block_ids, hidden);
}

// `hidden` [rows][hidden_size padded to 64] -> `logits` [rows][vocab_size padded to 64]
void kvferry_decoder_logits(void* decoder, int rows, const float* hidden, float* logits) {
    static_cast<Decoder*>(decoder)->logits(rows, hidden, logits);
}
}
