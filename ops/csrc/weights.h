// Weights of products, in tiles of 128 x 128; the functions of ops/products.py on consecutive elements of
// a matrix. Whole rows are read in memory order: tile by tile, each row is another page, and twice as slow.
#pragma once
#include <algorithm>
#include <vector>

#include "blocks.h"

namespace ISA {

constexpr int TILE = 128;

struct Run {  // consecutive elements of a matrix
    int64_t first, count, columns;

    int64_t across() const { return (columns + TILE - 1) / TILE; }

    // Calls work(row, end) for each thread's part of the rows that the run touches.
    template <typename Work>
    void in_parallel_rows(int threads, Work work) const {
        if (!count) return;
        const int64_t begin = first / columns, end = (first + count - 1) / columns + 1;
        in_parallel(end - begin, threads,
                    [&](int64_t from, int64_t to, int) { work(begin + from, begin + to); });
    }
    // Calls work(tile, from, count) for the tiles of a row, as far as the run covers them; the run's elements
    // begin at 0.
    template <typename Work>
    void tiles_of(int64_t row, Work work) const {
        const int64_t start = row * columns - first;
        for (int64_t column = 0, tile = row / TILE * across(); column < columns; column += TILE, ++tile) {
            const int64_t from = std::max(start + column, int64_t(0));
            const int64_t to = std::min(start + std::min(column + TILE, columns), count);
            if (from < to) work(tile, from, int(to - from));
        }
    }
};

constexpr int in_vectors(int count) { return (count + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

// Returns elements that can be read in whole vectors: in place, or a copy padded with zeros.
template <typename T>
const T* whole(const T* from, int count, T* padded) {
    if (count == in_vectors(count)) return from;
    std::fill_n(std::copy_n(from, count, padded), in_vectors(count) - count, T(0));
    return padded;
}

struct Largest {         // of a tile's elements seen by a thread
    u32 magnitude = {};  // without the lower half of an FP32
    bool any = false;
};

void raise(uint8_t* exponent, uint8_t to) {  // several threads may update a tile
    uint8_t old = __atomic_load_n(exponent, __ATOMIC_RELAXED);
    while (old < to &&
           !__atomic_compare_exchange_n(exponent, &old, to, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

void find_exponents(const uint16_t* values, const Run& run, uint8_t* exponents, int threads) {
    run.in_parallel_rows(threads, [&](int64_t row, int64_t last) {
        while (row < last) {
            const int64_t tiles = row / TILE * run.across(), end = std::min((row / TILE + 1) * TILE, last);
            std::vector<Largest> found(size_t(run.across()));
            for (; row < end; ++row)
                run.tiles_of(row, [&](int64_t tile, int64_t from, int count) {
                    alignas(64) uint16_t padded[TILE];
                    const uint16_t* x = whole(values + from, count, padded);
                    u32 most = found[size_t(tile - tiles)].magnitude;
                    for (int i = 0; i < count; i += LANES)
                        most = larger(most, widen(load<u16>(x + i)) & 0x7FFF);
                    found[size_t(tile - tiles)] = {most, true};
                });
            for (int64_t tile = 0; tile < run.across(); ++tile)
                if (const Largest& each = found[size_t(tile)]; each.any)
                    raise(exponents + tiles + tile,
                          uint8_t(scale_of<E4M3>(largest(each.magnitude) << 16, 0).e));
        }
    });
}

void encode_weight(const uint16_t* values, const Run& run, const uint8_t* exponents, char* codes,
                   int threads) {
    run.in_parallel_rows(threads, [&](int64_t row, int64_t end) {
        for (; row < end; ++row)
            run.tiles_of(row, [&](int64_t tile, int64_t from, int count) {
                alignas(64) uint16_t padded[TILE];
                alignas(64) char rounded[TILE];
                const int e = exponents[tile];
                const float inverse = power_of_two(e == 255 ? 0 : 254 - e);
                const uint16_t* x = whole(values + from, count, padded);
                char* to = x == padded ? rounded : codes + from;
                for (int i = 0; i < count; i += 2 * LANES) {
                    const Pair pair = {BF16::decode(load<u16>(x + i)),
                                       BF16::decode(load<u16>(x + i + LANES))};
                    put<E4M3>(to + i, pair * inverse);
                }
                if (to == rounded) std::copy_n(rounded, count, codes + from);
            });
    });
}

void decode_weight(const uint8_t* codes, const Run& run, const uint8_t* exponents, const Values& out,
                   int threads) {
    run.in_parallel_rows(threads, [&](int64_t row, int64_t end) {
        for (; row < end; ++row)
            run.tiles_of(row, [&](int64_t tile, int64_t from, int count) {
                alignas(64) uint8_t padded[TILE];
                alignas(64) float x[TILE];
                alignas(64) char rounded[4 * TILE];
                const int vectors = in_vectors(count);
                decode<E4M3, false>(whole(codes + from, count, padded), exponents + tile, 1.0f, x, 1,
                                    vectors);
                write(x, vectors, count == vectors ? out.at(from) : rounded, out.dtype);
                if (count != vectors) std::copy_n(rounded, count * out.itemsize(), out.at(from));
            });
    });
}

}  // namespace ISA
