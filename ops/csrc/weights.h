// Weights of products, in tiles of 128 x 128; the functions of ops/products.py on a run of a matrix's
// elements.
#pragma once
#include <algorithm>

#include "blocks.h"

namespace ISA {

constexpr int TILE = 128;

struct Run {  // consecutive elements of a matrix
    int64_t first, count, columns;

    int64_t across() const { return (columns + TILE - 1) / TILE; }
    int64_t tile_row(int64_t element) const { return element / columns / TILE; }

    // Calls work(from, count) for each row of a tile, as far as it is in the run, whose elements begin at 0.
    template <typename Work>
    void rows_of(int64_t tile, Work work) const {
        const int64_t row = tile / across() * TILE, column = tile % across() * TILE;
        const int64_t end = std::min(column + TILE, columns);
        for (int64_t each = row; each < row + TILE; ++each) {
            const int64_t from = std::max(each * columns + column - first, int64_t(0));
            const int64_t to = std::min(each * columns + end - first, count);
            if (from < to) work(from, int(to - from));
        }
    }
    // Calls work(tile) for all that the run may reach. A tile is one thread's.
    template <typename Work>
    void in_parallel_tiles(int threads, Work work) const {
        if (!count) return;
        const int64_t begin = tile_row(first) * across(), end = (tile_row(first + count - 1) + 1) * across();
        in_parallel(end - begin, threads, [&](int64_t from, int64_t to, int) {
            for (int64_t tile = begin + from; tile < begin + to; ++tile) work(tile);
        });
    }
};

constexpr int in_vectors(int count) { return (count + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

// Elements that can be read in whole vectors: where they lie, or a copy with zeros behind them.
template <typename T>
const T* whole(const T* from, int count, T* padded) {
    if (count == in_vectors(count)) return from;
    std::fill_n(std::copy_n(from, count, padded), in_vectors(count) - count, T(0));
    return padded;
}

void find_exponents(const uint16_t* values, const Run& run, uint8_t* exponents, int threads) {
    run.in_parallel_tiles(threads, [&](int64_t tile) {
        u32 amax = {};
        bool reached = false;
        run.rows_of(tile, [&](int64_t from, int count) {
            alignas(64) uint16_t padded[TILE];
            const uint16_t* x = whole(values + from, count, padded);
            for (int i = 0; i < count; i += LANES) amax = larger(amax, widen(load<u16>(x + i)) & 0x7FFF);
            reached = true;
        });
        if (reached)
            exponents[tile] = std::max(exponents[tile], uint8_t(scale_of<E4M3>(largest(amax) << 16, 0).e));
    });
}

void encode_weight(const uint16_t* values, const Run& run, const uint8_t* exponents, char* codes,
                   int threads) {
    run.in_parallel_tiles(threads, [&](int64_t tile) {
        const int e = exponents[tile];
        const float inverse = power_of_two(e == 255 ? 0 : 254 - e);
        run.rows_of(tile, [&](int64_t from, int count) {
            alignas(64) uint16_t padded[TILE];
            alignas(64) char rounded[TILE];
            const uint16_t* x = whole(values + from, count, padded);
            char* to = x == padded ? rounded : codes + from;
            for (int i = 0; i < count; i += 2 * LANES)
                put<E4M3>(
                    to + i,
                    Pair{BF16::decode(load<u16>(x + i)), BF16::decode(load<u16>(x + i + LANES))} * inverse);
            if (to == rounded) std::copy_n(rounded, count, codes + from);
        });
    });
}

void decode_weight(const uint8_t* codes, const Run& run, const uint8_t* exponents, const Values& out,
                   int threads) {
    run.in_parallel_tiles(threads, [&](int64_t tile) {
        run.rows_of(tile, [&](int64_t from, int count) {
            alignas(64) uint8_t padded[TILE];
            alignas(64) float x[TILE];
            alignas(64) char rounded[4 * TILE];
            decode<E4M3, false>(whole(codes + from, count, padded), exponents + tile, 1.0f, x, 1,
                                in_vectors(count));
            const bool fits = count == in_vectors(count);
            write(x, in_vectors(count), fits ? out.at(from) : rounded, out.dtype);
            if (!fits) std::copy_n(rounded, count * out.itemsize(), out.at(from));
        });
    });
}

}  // namespace ISA
