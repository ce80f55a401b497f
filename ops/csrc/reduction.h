// The sum of the ranks' gradients; ops/reduction.py.
#pragma once
#include "blocks.h"

namespace ISA {

struct Figures {
    double squares, not_finite;
};

// The sum of the ranks' pieces of a batch, and of what the shard holds.
void add_up(const Blocks* pieces, int ranks, const Blocks& shard, bool fresh, int64_t row, int rows, int n,
            float* total) {
    pieces[0].decode(row, rows, n, 1.0f, total);
    for (int rank = 1; rank < ranks; ++rank) pieces[rank].add(row, rows, n, total);
    if (!fresh) shard.add(row, rows, n, total);
}

void encode_and_figure(const float* total, const uint32_t* amax, const Blocks& shard, int64_t row, int rows,
                       int n, Figures& figures) {
    float squares[MAX_ROWS];
    shard.f().encode_and_square(total, amax, shard.at(row, n), shard.scale(row), squares, rows, n);
    for (int i = 0; i < rows; ++i) {
        const int e = shard.scales ? shard.scales[row + i] : 127;
        if (e == 255 || squares[i] - squares[i] != 0)
            figures.not_finite += 1;
        else  // times 4^(e - 127)
            figures.squares += double(squares[i]) * double(power_of_two(e)) * double(power_of_two(e));
    }
}

void accumulate(const Blocks* pieces, int ranks, const Blocks& shard, bool fresh, int64_t blocks, int n,
                int threads, Figures* figures) {
    in_parallel_batches(blocks, n, threads, [&](int64_t row, int rows, int part) {
        alignas(64) float total[BATCH];
        uint32_t amax[MAX_ROWS];
        add_up(pieces, ranks, shard, fresh, row, rows, n, total);
        for (int i = 0; i < rows; ++i) amax[i] = amax_of(total + i * n, n);
        encode_and_figure(total, amax, shard, row, rows, n, figures[part]);
    });
}

}  // namespace ISA
