// The sum of the ranks' gradients; ops/reduction.py.
#pragma once
#include "blocks.h"

namespace ISA {

struct NormParts {  // the digits of ops/exact.py, and blocks that are not finite
    static constexpr int DIGIT_BITS = 24, DIGITS = 27, POSITION = 1023 + 52 - 13 * DIGIT_BITS;
    int64_t digits[DIGITS], not_finite;

    void add(double square) {  // square: of a block; inf or NaN if it is not finite
        if (square - square != 0) return void(++not_finite);
        if (square == 0) return;
        const uint64_t bits = same_bits<uint64_t>(square), hidden = uint64_t(1) << 52;
        uint64_t significand = (bits & (hidden - 1)) | hidden;
        int position = int(bits >> 52) - POSITION;
        if (position < 0) significand >>= position > -63 ? -position : 63, position = 0;
        const auto shifted = static_cast<unsigned __int128>(significand) << position % DIGIT_BITS;
        int64_t* digit = digits + position / DIGIT_BITS;
        for (int each = 0; each < 4; ++each)  // 53 bits, shifted by up to 23
            digit[each] += int64_t(shifted >> each * DIGIT_BITS) & ((1 << DIGIT_BITS) - 1);
    }
};

// Adds the ranks' pieces of a batch, and the contents of the shard.
void add_up(const Blocks* pieces, int ranks, const Blocks& shard, bool overwrite, int64_t row, int rows,
            int n, float* total) {
    pieces[0].decode(row, rows, n, 1.0f, total);
    for (int rank = 1; rank < ranks; ++rank) pieces[rank].add(row, rows, n, total);
    if (!overwrite) shard.add(row, rows, n, total);
}

void encode_and_measure(const float* total, const uint32_t* amax, const Blocks& shard, int64_t row, int rows,
                        int n, NormParts& parts) {
    double squares[MAX_ROWS];
    shard.f().encode_and_square(total, amax, shard.at(row, n), shard.scale(row), squares, rows, n);
    for (int i = 0; i < rows; ++i) {
        const double scale = shard.scales ? power_of_two(shard.scales[row + i]) : 1.0f;
        parts.add(squares[i] * scale * scale);  // 0 * inf is NaN
    }
}

void accumulate(const Blocks* pieces, int ranks, const Blocks& shard, bool overwrite, int64_t blocks, int n,
                int threads, NormParts* parts) {
    in_parallel_batches(blocks, n, threads, [&](int64_t row, int rows, int part) {
        alignas(64) float total[BATCH];
        uint32_t amax[MAX_ROWS];
        add_up(pieces, ranks, shard, overwrite, row, rows, n, total);
        for (int i = 0; i < rows; ++i) amax[i] = amax_of(total + i * n, n);
        encode_and_measure(total, amax, shard, row, rows, n, parts[part]);
    });
}

}  // namespace ISA
