// The Adam sweep; ops/adam.py.
#pragma once
#include "step.h"

namespace ISA {

struct Draws {  // random bits, from an element of a parameter on
    uint32_t v_key, p_key;
    Last last;
    uint32_t element;

    Draws after(int64_t elements) const { return {v_key, p_key, last, uint32_t(element + elements)}; }
    Random v() const { return Random(v_key, element, last); }
    Random p() const { return Random(p_key, element, last); }
};

// Decodes, computes and encodes a batch; a state's formats choose one.
using Work = void (*)(const Sweep&, int64_t row, int rows, Draws, int part);

// Counts values that are not zero and whose code is.
int64_t zeros(const Blocks& blocks, int64_t row, int rows, int n, const float* values) {
    alignas(64) float stored[BATCH];
    int64_t count = 0;
    blocks.decode(row, rows, n, power_of_two(127 + 60), stored);  // so large that only zero codes give zero
    for (int i = 0; i < rows * n; ++i) count += values[i] != 0 && stored[i] == 0;
    return count;
}

// Counts what a step lost; call it after the states have been encoded.
void count(const Sweep& sweep, const Batch& batch, int64_t row, int rows, Draws draws, StateCounts& counts) {
    const Format& v = sweep.v.f();
    counts.clamped += batch.clamped;
    counts.underflows += double(zeros(sweep.m, row, rows, sweep.n, batch.m));
    if (!sweep.stores_sqrt)
        counts.zeros += double(zeros(sweep.v, row, rows, sweep.n, batch.v));
    else if (v.rescued)
        counts.zeros += double(v.rescued(batch.g, draws.v(), batch.root_amax, UNIT, rows, sweep.n));
}

void decode_gradient(const Sweep& sweep, int64_t row, int rows, float* g) {
    if (!sweep.gradient_scales) return sweep.gradient.decode(row, rows, sweep.n, sweep.by.g, g);
    const uint8_t one = 127;
    for (int i = 0; i < rows; ++i)
        sweep.gradient.f().decode(sweep.gradient.at(row + i, sweep.n), &one,
                                  sweep.gradient_scales[row + i] * sweep.by.g, g + i * sweep.n, 1, sweep.n);
}

template <bool ROOT, bool QUOTIENT, bool COUNT>
void adam_of(Batch& batch, int rows, int n, const Scalars& s) {
    adam<ROOT, QUOTIENT, true, COUNT, Ready, Ready, Ready, Ready>({batch.g}, {batch.p}, {batch.m}, {batch.v},
                                                                  batch, rows, n, s);
}

// Computes a batch of any formats.
template <bool COUNT>
void compute(const Sweep& sweep, int64_t row, int rows, Batch& batch) {
    const int n = sweep.n;
    const Blocks& v = sweep.v;
    decode_gradient(sweep, row, rows, batch.g);
    read_masters(sweep.master, sweep.weights, row, rows, n, sweep.by.p, batch.p);
    sweep.m.decode(row, rows, n, sweep.by.m, batch.m);
    v.decode(row, rows, n, sweep.by.v, batch.v);
    constexpr auto by = [](bool root, bool quotient) {
        if (quotient) return root ? adam_of<true, true, COUNT> : adam_of<false, true, COUNT>;
        return root ? adam_of<true, false, COUNT> : adam_of<false, false, COUNT>;
    };
    by(sweep.root(), sweep.quotient())(batch, rows, n, sweep.scalars);
}

// Encodes a batch by its largest values; root_amax is that of v if v holds no root.
template <bool COUNT>
void keep(const Sweep& sweep, Batch& batch, int64_t row, int rows, Draws draws, int part) {
    const int n = sweep.n;
    const Blocks& v = sweep.v;
    if (sweep.quotient())
        sweep.m.f().encode_either_way(batch.m, draws.v(), batch.m_amax, 0, sweep.m.at(row, n),
                                      sweep.m.scale(row), rows, n);
    else
        sweep.m.encode(row, rows, n, batch.m, batch.m_amax, UNIT);
    if (sweep.root())
        v.f().encode_up(batch.g, draws.v(), batch.root_amax, UNIT, v.at(row, n), v.scale(row), rows, n);
    else
        v.encode(row, rows, n, batch.v, batch.root_amax, 2 * UNIT);
    if constexpr (COUNT) count(sweep, batch, row, rows, draws, sweep.counts[part]);
    Random random = draws.p();
    write_masters(batch.p, batch.p_amax, sweep.stochastic ? &random : nullptr, sweep.master, sweep.weights,
                  row, rows, n);
}

template <bool COUNT>
void sweep_by_pointer(const Sweep& sweep, int64_t row, int rows, Draws draws, int part) {
    Batch batch;
    compute<COUNT>(sweep, row, rows, batch);
    keep<COUNT>(sweep, batch, row, rows, draws, part);
}

template <typename F>
Reader<F> reader(const Blocks& blocks, int64_t row, int n, float factor) {
    return {blocks.at(row, n), blocks.scale(row), factor};
}
template <typename P>
auto master_reader(const Sweep& sweep, int64_t row) {
    if constexpr (split<P>)
        return SplitReader<P>{sweep.master.at(row, sweep.n), sweep.weights.at(row * sweep.n), sweep.by.p};
    else
        return reader<P>(sweep.master, row, sweep.n, sweep.by.p);
}

// Stores masters of a row and their weights as they are computed; stochastically if bits are lost.
template <typename P>
struct MasterWriter {
    char *codes, *weights;
    uint8_t* scales;
    float inverse = 1, scale = 1;

    void begin_row(int row, uint32_t amax) {
        if constexpr (!split<P>) {
            inverse = scale_down<P>(amax, 0, scales + row);
            if constexpr (scaled<P>) scale = power_of_two(scales[row]);
        }
    }
    void put(int i, Pair x, Random& random) const {
        char *code = codes + i * itemsize<P>, *weight = weights + 2 * i;
        if constexpr (split<P>) {
            put_split<P>(code, weight, x);
        } else {
            const Pair stored = rounded(code, x, random) * scale;
            store_low_halves(weight, to_weight(stored.a), to_weight(stored.b));
        }
    }

  private:
    Pair rounded(char* code, Pair x, Random& random) const {
        if constexpr (dropped<P> == 0) return ISA::put<P>(code, x * inverse);
        put_either_way<P>(code, x, inverse, Words(random));
        return {P::decode(load<typename P::Code>(code)),
                P::decode(load<typename P::Code>(code + LANES * itemsize<P>))};
    }
};

// The formats of a shipped level, with BF16 weights: the loops that compute also read and write codes.
template <typename G, typename P, typename M, typename V>
void sweep_in_place(const Sweep& sweep, int64_t row, int rows, Draws draws, int) {
    constexpr bool ROOT = dropped<V> != 0, QUOTIENT = number<M> == number<INT8>;
    Batch batch;
    const int n = sweep.n;
    adam<ROOT, QUOTIENT, scaled<P>>(reader<G>(sweep.gradient, row, n, sweep.by.g),
                                    master_reader<P>(sweep, row), reader<M>(sweep.m, row, n, sweep.by.m),
                                    reader<V>(sweep.v, row, n, sweep.by.v), batch, rows, n, sweep.scalars);
    MasterWriter<P> masters = {sweep.master.at(row, n), sweep.weights.at(row * n), sweep.master.scale(row)};
    char *m = sweep.m.at(row, n), *v = sweep.v.at(row, n);
    uint8_t *m_scales = sweep.m.scale(row), *v_scales = sweep.v.scale(row);
    Random of_v = draws.v(), of_p = draws.p();
    for (int each = 0, i = 0; each < rows; ++each) {
        masters.begin_row(each, batch.p_amax[each]);
        const float m_inverse = onto_codes<M>(batch.m_amax[each], QUOTIENT ? 0 : UNIT, m_scales + each);
        const float v_inverse = scale_down<V>(batch.root_amax[each], ROOT ? UNIT : 2 * UNIT, v_scales + each);
        for (; i < (each + 1) * n; i += 2 * LANES) {
            masters.put(i, load_two(batch.p + i), of_p);
            if constexpr (ROOT) {
                const Words words(of_v);
                if constexpr (QUOTIENT)
                    put_whole(m + i, load_two(batch.m + i), m_inverse, words);
                else
                    put<M>(m + i * itemsize<M>, load_two(batch.m + i) * m_inverse);
                put_up<V>(v + i * itemsize<V>, load_two(batch.g + i), v_inverse, words);
            } else {
                put<M>(m + i * itemsize<M>, load_two(batch.m + i) * m_inverse);
                put<V>(v + i * itemsize<V>, load_two(batch.v + i) * v_inverse);
            }
        }
    }
}

template <typename P, typename M, typename V>
bool holds(const Sweep& sweep) {
    return sweep.master.is<P>() && sweep.m.is<M>() && sweep.v.is<V>();
}

template <typename G>
Work with_gradient(const Sweep& sweep) {
    if (sweep.weights.dtype != number<BF16>) return sweep_by_pointer<false>;
    if (sweep.stochastic) {
        if (holds<FP16, INT8, FP16>(sweep)) return sweep_in_place<G, FP16, INT8, FP16>;    // O2
        if (holds<FP16, INT8, UE4M4>(sweep)) return sweep_in_place<G, FP16, INT8, UE4M4>;  // O3
        if (holds<FP16, E4M3, FP16>(sweep)) return sweep_in_place<G, FP16, E4M3, FP16>;    // FP8-LM's formats
        return sweep_by_pointer<false>;
    }
    if (holds<FP32, FP32, FP32>(sweep)) return sweep_in_place<G, FP32, FP32, FP32>;          // O1
    if (holds<SPLIT16, INT8, UE4M4>(sweep)) return sweep_in_place<G, SPLIT16, INT8, UE4M4>;  // O2+
    if (holds<SPLIT16, E4M3, UE4M4>(sweep)) return sweep_in_place<G, SPLIT16, E4M3, UE4M4>;
    return sweep_by_pointer<false>;
}

Work work_of(const Sweep& sweep) {
    if (sweep.counts) return sweep_by_pointer<true>;
    if (sweep.gradient.is<FP32>()) return with_gradient<FP32>(sweep);
    if (sweep.gradient.is<BF16>()) return with_gradient<BF16>(sweep);
    if (sweep.gradient.is<E4M3>()) return with_gradient<E4M3>(sweep);
    return sweep_by_pointer<false>;
}

Draws draws_of(const Sweep& sweep, const Segment& segment) {
    return {key_of(sweep.v_stream, segment.parameter),
            key_of(sweep.p_stream, segment.parameter),
            {sweep.multiplier, sweep.odd},
            uint32_t(segment.first_element)};
}

// Sweeps rows first to last of all segments, one segment after the other.
void adam_rows(const Sweep& sweep, int64_t first, int64_t last, int part) {
    const Work work = work_of(sweep);
    int64_t seen = 0;  // rows of the segments so far
    for (int64_t each = 0; each < sweep.segment_count && seen < last; ++each) {
        const Segment& segment = sweep.segments[each];
        const int64_t length = segment.last_row - segment.first_row;
        const Draws start = draws_of(sweep, segment);
        const int64_t from = first > seen ? first - seen : 0,
                      to = last < seen + length ? last - seen : length;
        in_batches(from, to, sweep.n, [&](int64_t row, int rows) {
            work(sweep, segment.first_row + row, rows, start.after(row * sweep.n), part);
        });
        seen += length;
    }
}

void prepare(Sweep& sweep) {
    const Scalars& s = sweep.scalars;
    const float unit = power_of_two(127 + UNIT);
    sweep.by = {sweep.control[0] * unit, s.decoupled ? s.decay : 1.0f,
                sweep.quotient() ? s.quotient_beta : s.beta1 * unit,
                sweep.root() ? unit * s.root_beta2 : unit * unit * s.beta2};
}

void adam_step(Sweep& sweep, int threads) {
    if (sweep.control[1] == 0) return;
    prepare(sweep);
    int64_t rows = 0;
    for (int64_t each = 0; each < sweep.segment_count; ++each)
        rows += sweep.segments[each].last_row - sweep.segments[each].first_row;
    in_parallel(rows, threads,
                [&](int64_t first, int64_t last, int part) { adam_rows(sweep, first, last, part); });
}

}  // namespace ISA
