// What one instruction set's library computes of seeded inputs, a line for each result: its name, then its values' bits.
// Two builds of it are compared, of another processor each. Nothing here is drawn from a library that may differ.
#include "decoder.cpp"

#include <cstdio>
#include <limits>
#include <string>

#include "sets_model.hpp"

namespace {

void functions() {
    std::vector<float> x;
    for (float large : {0.0f, 1e-40f, 1e-30f, 0.5f, 88.0f, 126.5f, 200.0f, 3e38f, std::numeric_limits<float>::infinity()}) {
        x.push_back(large), x.push_back(-large);
    }
    x.push_back(std::numeric_limits<float>::quiet_NaN());
    Random random(1);
    while (x.size() < 512) x.push_back(random.between(-20.0f, 20.0f));
    const auto each = [&](const char* name, auto function) {
        std::vector<float> y(x.size());
        for (std::size_t i = 0; i < x.size(); i += 16) store(y.data() + i, function(load(x.data() + i)));
        put(name, y.data(), long(y.size()));
    };
    each("exp2", [](Vector v) { return exp2(v); });
    each("exp2 rough", [](Vector v) { return exp2_rough(min(repeat(0.0f), v)); });
    each("softplus", [](Vector v) { return softplus(v); });
    each("silu", [](Vector v) { return silu(v); });
    each("gelu", [](Vector v) { return gelu_tanh(v); });
    each("capped", [](Vector v) { return capped(v, 30.0f); });
    each("clamped silu", [](Vector v) { return clamped_silu(v, v, 1.702f, 7.0f); });
    each("rounded", [](Vector v) {
        Element narrowed[16];
        store(narrowed, v);
        return load(narrowed);
    });
    each("largest and sum", [](Vector v) { return repeat(max_of(v)) + repeat(sum_of(v * repeat(0.25f))); });
    for (long size : {1, 15, 16, 17, 100}) {
        const float squares = sum_of_squares(x.data() + 32, size), factor = inverse_rms(x.data() + 32, size, 1e-6f);
        put("squares", &squares, 1);
        put("inverse rms", &factor, 1);
        std::vector<float> y(128, 7.0f);
        store(y.data() + 3, load(x.data() + 32, lanes(size)), between(size - 12, size));
        put("some lanes", y.data(), 32);
    }
}

// A row's products are to be the same bits, whatever its company.
void products() {
    Random random(2);
    for (long inputs : {32, 96, 352}) {
        const long columns = 150, padded_inputs = padded(inputs, kTileInputs), most = 61;
        const Lines<Element> weights = random.elements(columns * inputs, 1.0f);
        Lines<Element> tiles(tiled_size(columns, inputs)), x(most * padded_inputs);
        const Tiles w = pack(weights.data(), columns, inputs, tiles.data());
        for (long row = 0; row < most; row++) {
            for (long i = 0; i < inputs; i++) x[row * padded_inputs + i] = element(random.between(-2.0f, 2.0f));
        }
        std::vector<float> first;
        for (long rows : {1, 2, 3, 4, 5, 6, 7, 13, 61}) {
            std::vector<float> y(rows * padded(columns, kTileColumns));
            kvferry_multiply(&w, x.data(), padded_inputs, rows, 0, w.count(), false, y.data());
            put("product of " + std::to_string(rows) + " x " + std::to_string(inputs), y.data(), long(y.size()));
            if (rows == 1) first = y;
            put_same("row in company", std::equal(first.begin(), first.end(), y.begin()));
        }
    }
}

// The strips of adapters.
void strips() {
    Random random(3);
    const long pairs = 48, rows = 13;
    const Lines<Element> strip = random.elements(pairs * 2 * kStrip + kStripAhead, 1.0f), x = random.elements(rows * pairs * 2, 1.0f);
    std::vector<float> y(rows * kStrip);
    strip_products(x.data(), pairs * 2, rows, strip.data(), pairs, [&](long row, Vector sums) { store(y.data() + row * kStrip, sums); });
    put("strips", y.data(), long(y.size()));
}

#ifndef KVFERRY_FLOAT32

void integer_products(const WholeKind& kind, const char* name) {
    Random random(4);
    const long columns = 150, most = 61, inputs = kind.group * 3;
    WholeWeight weight(kind);
    const Tiles w = weight.make(random, columns, inputs);
    const long stride = padded(inputs, kTileInputs);
    Lines<Element> x(most * stride);
    for (long i = 0; i < most * stride; i++) x[i] = i % stride < inputs ? element(random.between(-2.0f, 2.0f)) : Element(0);
    for (long rows : {1, 2, 3, 4, 5, 6, 7, 61}) {
        std::vector<float> y(rows * padded(columns, kTileColumns));
        kvferry_multiply(&w, x.data(), stride, rows, 0, w.count(), false, y.data());
        put(name, y.data(), long(y.size()));
    }
}

void integers() {
    integer_products({8, 64, 4}, "int8");
    integer_products({8, 48, 2, true}, "int8 in halves with minima");
    integer_products({4, 32, 4}, "int4");
    integer_products({4, 24, 2, true}, "int4 in halves with minima");
    integer_products({4, 32, 1, false, true}, "e2m1");
    integer_products({4, 16, 1, false, true, 3}, "e2m1 over bases");
    integer_products({4, 32, 1, true, false, 3}, "int4 in bytes over bases");
}

#endif

void models() {
    const Shape plain{.head_dim = 32, .inner = 192}, odd{.head_dim = 80, .inner = 96, .window = 70, .has_extras = true};
    for (const auto& [shape, name] : {std::pair{plain, "plain"}, std::pair{odd, "odd"}}) {
        for (bool has_int8 : {false, true}) {
            Shape own = shape;
            own.has_int8_pages = has_int8;
            run_model(own, std::string(name) + (has_int8 ? " over int8 pages" : ""));
        }
    }
    run_model({.head_dim = 32, .inner = 192, .chunk = 40}, "chunks");
    run_model({.head_dim = 32, .inner = 192, .has_one_norm = true}, "blocks side by side");
    run_model({.head_dim = 32, .inner = 192, .window = 70, .has_extras = true, .is_uneven = true}, "heads of two sizes");
    run_model({.head_dim = 96, .inner = 192, .has_latents = true}, "latents");
    run_model({.head_dim = 32, .inner = 192, .states = kDeltaNet}, "delta nets");
    run_model({.head_dim = 32, .inner = 192, .states = kMamba}, "Mamba's layers");
    run_model({.head_dim = 32, .inner = 192, .states = kMamba, .is_beside = true}, "Mamba's layers beside attention");
    run_model({.head_dim = 32, .inner = 192, .states = kShortConvolution}, "short convolutions");
#ifndef KVFERRY_FLOAT32
    Shape whole = plain;
    whole.bits = 8;
    run_model(whole, "plain of int8");
    whole.bits = 4;
    run_model(whole, "plain of int4");
#endif
}

}  // namespace

int main() {
    functions();
    products();
    strips();
#ifndef KVFERRY_FLOAT32
    integers();
#endif
    models();
}
