// Blocks and values in memory, and the conversions between them; ops/blocks.py.
#pragma once
#include "rounding.h"

namespace ISA {

// A format as a table of functions: formats are combined by pointer, and no product of formats is compiled.
using Encode = void (*)(const float* x, Random random, const uint32_t* amax, int unit, void* codes,
                        uint8_t* scales, int rows, int n);

struct Format {
    void (*decode)(const void* codes, const uint8_t* scales, float factor, float* out, int rows, int n);
    void (*add)(const void* codes, const uint8_t* scales, float factor, float* out, int rows, int n);
    void (*encode)(const float* x, const uint32_t* amax, int unit, void* codes, uint8_t* scales, int rows,
                   int n);
    void (*encode_and_square)(const float* x, const uint32_t* amax, void* codes, uint8_t* scales,
                              double* squares, int rows, int n);
    Encode encode_up, encode_either_way;
    // How many values encode_up would round to zero if it did not prevent that.
    int64_t (*rescued)(const float* x, Random random, const uint32_t* amax, int unit, int rows, int n);
    float max;
    int itemsize;
};

// Unused functions of a format are null.
template <typename F>
constexpr Format by_pointer() {
    Format all = {};
    all.decode = decode<F, false>;
    all.add = decode<F, true>;
    all.itemsize = itemsize<F>;
    all.max = largest_value<F>();
    if constexpr (number<F> == number<INT8>) {
        all.encode_either_way = encode_noisily<F, put_whole>;
    } else {
        if constexpr (signs<F>) all.encode = encode<F>, all.encode_and_square = encode_and_square<F>;
        if constexpr (dropped<F> != 0) all.encode_up = encode_noisily<F, put_up<F>>, all.rescued = rescued<F>;
        if constexpr (dropped<F> != 0 && itemsize<F> == 2)
            all.encode_either_way = encode_noisily<F, put_either_way<F>>;
    }
    return all;
}
constexpr Format beside_weights(int itemsize) {  // split masters; masters.h
    Format all = {};
    all.itemsize = itemsize;
    return all;
}
// Indexed by number.
constexpr Format FORMATS[] = {by_pointer<FP32>(), by_pointer<BF16>(), by_pointer<FP16>(),
                              by_pointer<E4M3>(), by_pointer<E5M2>(), by_pointer<UE4M4>(),
                              beside_weights(2),  beside_weights(1),  by_pointer<INT8>()};

struct Blocks {  // as ops.blocks.Blocks: codes [blocks, n], scales [blocks] or null
    char* codes;
    uint8_t* scales;
    int64_t format;

    template <typename F>
    bool is() const {
        return format == number<F>;
    }
    const Format& f() const { return FORMATS[format]; }
    char* at(int64_t row, int n) const { return codes + row * n * f().itemsize; }
    uint8_t* scale(int64_t row) const { return scales ? scales + row : nullptr; }

    void decode(int64_t row, int rows, int n, float factor, float* out) const {
        f().decode(at(row, n), scale(row), factor, out, rows, n);
    }
    void add(int64_t row, int rows, int n, float* out) const {
        f().add(at(row, n), scale(row), 1.0f, out, rows, n);
    }
    void encode(int64_t row, int rows, int n, const float* x, const uint32_t* amax, int unit) const {
        f().encode(x, amax, unit, at(row, n), scale(row), rows, n);
    }
    void encode(int64_t row, int rows, int n, const float* x) const {
        uint32_t amax[MAX_ROWS];
        for (int i = 0; i < rows; ++i) amax[i] = amax_of(x + i * n, n);
        encode(row, rows, n, x, amax, 0);
    }
};

struct Values {  // a tensor in the model's dtype
    char* data;
    int64_t dtype;  // as Blocks::format

    int itemsize() const { return FORMATS[dtype].itemsize; }
    char* at(int64_t element) const { return data + element * itemsize(); }
};

void read(const char* from, int64_t dtype, float* x, int count) {
    if (dtype == number<FP16>)  // a half without a scale
        for (int i = 0; i < count; i += LANES) store(x + i, from_half(load<u16>(from + 2 * i)));
    else
        FORMATS[dtype].decode(from, nullptr, 1.0f, x, 1, count);
}

void write(const float* x, int count, char* to, int64_t dtype) {
    const uint32_t amax = 0;
    if (dtype == number<FP16>)
        for (int i = 0; i < count; i += LANES) store(to + 2 * i, to_half(load<f32>(x + i)));
    else
        FORMATS[dtype].encode(x, &amax, 0, to, nullptr, 1, count);
}

// Calls work(row, rows) for batches of the rows.
template <typename Work>
void in_batches(int64_t first, int64_t last, int n, Work work) {
    const int64_t batch = BATCH / n;
    for (int64_t row = first; row < last; row += batch)
        work(row, int(last - row < batch ? last - row : batch));
}

// Calls work(first, last, part): a thread's part is rows first to last.
template <typename Work>
void in_parallel(int64_t rows, int threads, Work work) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) work(rows * part / threads, rows * (part + 1) / threads, part);
}
template <typename Work>
void in_parallel_batches(int64_t rows, int n, int threads, Work work) {
    in_parallel(rows, threads, [&](int64_t first, int64_t last, int part) {
        in_batches(first, last, n, [&](int64_t row, int count) { work(row, count, part); });
    });
}

struct GradientCounts {  // ops/health.py
    double underflows, saturated, not_finite, signal, noise;
};

// Counts how values were encoded, in double precision, on measured steps only.
void measure(const float* x, const Blocks& out, int64_t row, int rows, int n, GradientCounts& counts) {
    alignas(64) float decoded[BATCH];
    out.decode(row, rows, n, 1.0f, decoded);
    for (int each = 0, i = 0; each < rows; ++each, i = each * n) {
        if (amax_of(x + i, n) >= INFINITE) {
            counts.not_finite += 1;
            continue;
        }
        const float largest = out.f().max * (out.scales ? power_of_two(out.scales[row + each]) : 1.0f);
        for (; i < (each + 1) * n; ++i) {
            const double error = double(x[i]) - double(decoded[i]);
            counts.underflows += x[i] != 0 && decoded[i] == 0;
            counts.saturated += (decoded[i] < 0 ? -decoded[i] : decoded[i]) == largest;
            counts.signal += double(x[i]) * double(x[i]);
            counts.noise += error * error;
        }
    }
}

// Reads FP32 values of rows of a parameter, with zeros after its end.
void read_rows(const Values& values, int64_t count, int64_t row, int rows, int n, float* x) {
    alignas(64) char padded[BATCH * 4];
    const char* from = values.at(row * n);
    const int64_t left = count - row * n;
    if (left < rows * n) {
        memset(padded, 0, size_t(rows * n * values.itemsize()));
        if (left > 0) memcpy(padded, from, size_t(left * values.itemsize()));
        from = padded;
    }
    read(from, values.dtype, x, rows * n);
}

// counts: one per thread, or null.
void quantize(const Values& values, int64_t count, const Blocks& out, int64_t blocks, int n, int threads,
              GradientCounts* counts) {
    in_parallel_batches(blocks, n, threads, [&](int64_t row, int rows, int part) {
        alignas(64) float x[BATCH];
        read_rows(values, count, row, rows, n, x);
        out.encode(row, rows, n, x);
        if (counts) measure(x, out, row, rows, n, counts[part]);
    });
}

void dequantize(const Blocks& blocks, const Values& out, int64_t count, int n, int threads) {
    in_parallel_batches((count + n - 1) / n, n, threads, [&](int64_t row, int rows, int) {
        alignas(64) float x[BATCH];
        alignas(64) char whole[BATCH * 4];
        blocks.decode(row, rows, n, 1.0f, x);
        const int64_t left = count - row * n;
        if (left >= rows * n) return write(x, rows * n, out.at(row * n), out.dtype);
        write(x, rows * n, whole, out.dtype);
        memcpy(out.at(row * n), whole, size_t(left * out.itemsize()));
    });
}

}  // namespace ISA
