// One scale per tensor; ops/per_tensor.py. A first sweep finds the largest values; a second computes again
// and encodes.
#pragma once
#include <algorithm>
#include <vector>

#include "adam.h"
#include "reduction.h"

namespace ISA {

struct SameAmax {  // one amax for every row of a batch
    uint32_t rows[MAX_ROWS];

    explicit SameAmax(uint32_t amax) { std::fill_n(rows, MAX_ROWS, amax); }
};

// Returns the largest result of find(row, rows) over all batches, as bits.
template <typename Find>
uint32_t largest_in(int64_t blocks, int n, int threads, Find find) {
    std::vector<uint32_t> parts(size_t(threads), 0);
    in_parallel_batches(blocks, n, threads, [&](int64_t row, int rows, int part) {
        parts[size_t(part)] = std::max(parts[size_t(part)], find(row, rows));
    });
    return *std::max_element(parts.begin(), parts.end());
}

void quantize_tensor(const Values& values, int64_t count, const Blocks& out, int64_t blocks, int n,
                     int threads, GradientCounts* counts) {
    const uint32_t largest = largest_in(blocks, n, threads, [&](int64_t row, int rows) {
        alignas(64) float x[BATCH];
        read_rows(values, count, row, rows, n, x);
        return amax_of(x, rows * n);
    });
    if (counts && largest >= INFINITE) {  // the tensor is one block, and is not finite
        counts->not_finite += 1;
        counts = nullptr;
    }
    const SameAmax amax(largest);
    in_parallel_batches(blocks, n, threads, [&](int64_t row, int rows, int part) {
        alignas(64) float x[BATCH];
        read_rows(values, count, row, rows, n, x);
        out.encode(row, rows, n, x, amax.rows, 0);
        if (counts) measure(x, out, row, rows, n, counts[part]);
    });
}

void accumulate_tensor(const Blocks* pieces, int ranks, const Blocks& shard, bool overwrite, int64_t blocks,
                       int n, int threads, NormParts* parts) {
    const SameAmax amax(largest_in(blocks, n, threads, [&](int64_t row, int rows) {
        alignas(64) float total[BATCH];
        add_up(pieces, ranks, shard, overwrite, row, rows, n, total);
        return amax_of(total, rows * n);
    }));
    in_parallel_batches(blocks, n, threads, [&](int64_t row, int rows, int part) {
        alignas(64) float total[BATCH];
        add_up(pieces, ranks, shard, overwrite, row, rows, n, total);
        encode_and_measure(total, amax.rows, shard, row, rows, n, parts[part]);
    });
}

struct StateAmax {
    uint32_t p = 0, m = 0, v = 0;

    void take(const Batch& batch, bool root, int rows, int n) {
        p = std::max(p, *std::max_element(batch.p_amax, batch.p_amax + rows));
        m = std::max(m, *std::max_element(batch.m_amax, batch.m_amax + rows));
        v = std::max(v, root ? *std::max_element(batch.root_amax, batch.root_amax + rows)
                             : amax_of(batch.v, rows * n));
    }
    void take(const StateAmax& other) {
        p = std::max(p, other.p), m = std::max(m, other.m), v = std::max(v, other.v);
    }
    void give(Batch& batch) const {
        std::fill_n(batch.p_amax, MAX_ROWS, p);
        std::fill_n(batch.m_amax, MAX_ROWS, m);
        std::fill_n(batch.root_amax, MAX_ROWS, v);
    }
};

template <bool COUNT>
void step_tensor(const Sweep& sweep, const Segment& segment, int threads) {
    const int64_t first = segment.first_row, length = segment.last_row - first;
    std::vector<StateAmax> parts(static_cast<size_t>(threads));
    in_parallel_batches(length, sweep.n, threads, [&](int64_t row, int rows, int part) {
        Batch batch;
        compute<false>(sweep, first + row, rows, batch);
        parts[size_t(part)].take(batch, sweep.root(), rows, sweep.n);
    });
    StateAmax amax;
    for (const StateAmax& each : parts) amax.take(each);
    const Draws start = draws_of(sweep, segment);
    in_parallel_batches(length, sweep.n, threads, [&](int64_t row, int rows, int part) {
        Batch batch;
        compute<COUNT>(sweep, first + row, rows, batch);
        amax.give(batch);
        keep<COUNT>(sweep, batch, first + row, rows, start.after(row * sweep.n), part);
    });
}

void step_tensors(Sweep& sweep, int threads) {
    if (sweep.control[1] == 0) return;
    prepare(sweep);
    for (int64_t each = 0; each < sweep.segment_count; ++each)
        (sweep.counts ? step_tensor<true> : step_tensor<false>)(sweep, sweep.segments[each], threads);
}

}  // namespace ISA
