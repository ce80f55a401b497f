// The sum of the ranks' gradients; ops/reduction.py.
#pragma once
#include "blocks.h"

namespace ISA {

struct Figures {
    double squares, not_finite;
};

// Sum of squares of a block: sixteen sums whatever the width of the lanes, so that every instruction set
// finds the same one.
float squares_of(const float* x, int n) {
    constexpr int SUMS = 16;
    f32 sums[SUMS / LANES] = {};
    for (int i = 0; i < n; i += SUMS)
        for (int j = 0; j < SUMS / LANES; ++j) {
            f32 each = load<f32>(x + i + j * LANES);
            sums[j] += each * each;
        }
    float total = 0;
    for (int j = 0; j < SUMS; ++j) total += sums[j / LANES][j % LANES];
    return total;
}

// Of blocks as stored; squares are added without their scale.
void add_figures(const Blocks& shard, int64_t row, int rows, int n, Figures& sum) {
    alignas(64) float x[BATCH];
    uint8_t ones[MAX_ROWS];
    memset(ones, 127, sizeof ones);
    shard.f().decode(shard.at(row, n), ones, 1.0f, x, rows, n);
    for (int i = 0; i < rows; ++i) {
        const double squares = squares_of(x + i * n, n);
        const int e = shard.scales ? shard.scales[row + i] : 127;
        if (e == 255 || squares - squares != 0)
            sum.not_finite += 1;
        else  // times 4^(e - 127)
            sum.squares += squares * double(power_of_two(e)) * double(power_of_two(e));
    }
}

void accumulate(const Blocks* pieces, int ranks, const Blocks& shard, bool fresh, int64_t blocks, int n,
                int threads, Figures* figures) {
    in_parallel_batches(blocks, n, threads, [&](int64_t row, int rows, int part) {
        alignas(64) float total[BATCH], x[BATCH];
        pieces[0].decode(row, rows, n, 1.0f, total);
        for (int rank = 1; rank < ranks + !fresh; ++rank) {
            (rank < ranks ? pieces[rank] : shard).decode(row, rows, n, 1.0f, x);
            for (int i = 0; i < rows * n; i += LANES)
                store(total + i, load<f32>(total + i) + load<f32>(x + i));
        }
        shard.encode(row, rows, n, total);
        add_figures(shard, row, rows, n, figures[part]);
    });
}

}  // namespace ISA
