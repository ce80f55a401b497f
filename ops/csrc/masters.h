// Masters, and the weights that are written with them; ops/masters.py.
#pragma once
#include "blocks.h"

namespace ISA {

// A split master's upper half is a BF16 weight; the code is the stored part of its lower half.
struct SPLIT16 {
    using Code = u16;
    static constexpr int dropped = 0;
    static i32 low(u16 code) { return (i32)(widen(code) << 16) >> 16; }
};
struct SPLIT8 {
    using Code = u8;
    static constexpr int dropped = 8;
    static i32 low(u8 code) { return (i32)(widen(widen_signed((i8)code)) << 16) >> 8; }
};

template <>
constexpr int64_t number<SPLIT16> = 6;
template <>
constexpr int64_t number<SPLIT8> = 7;

template <typename F>
constexpr bool split = number<F> == number<SPLIT16> || number<F> == number<SPLIT8>;
template <>
constexpr bool scaled<SPLIT16> = false;
template <>
constexpr bool scaled<SPLIT8> = false;

// A Reader of split masters, in place.
template <typename S>
struct SplitReader {
    const char *codes, *weights;
    float factor;

    float scale(int) const { return factor; }
    f32 at(int i, float scale) const {  // the lower half is a signed number
        const i32 low = S::low(load<typename S::Code>(codes + i * itemsize<S>));
        const u32 high = widen(load<u16>(weights + 2 * i)) << 16;
        const i32 borrowed = (low >> 31) & (high << 1 == 0);  // zero has nothing to borrow from
        return float_of(high + (u32)(low & ~borrowed)) * scale;
    }
};

constexpr uint32_t HALF_CODE = 0x8000;  // of BF16

inline u32 to_weight(f32 x) {  // adds half a code and truncates
    return x == x ? (bits_of(x) + HALF_CODE) >> 16 : u32{} + 0x7FC0;
}

void write_weights(const float* p, int count, char* to, int64_t dtype) {
    if (dtype != number<BF16>) return write(p, count, to, dtype);
    for (int i = 0; i < count; i += 2 * LANES)
        store_low_halves(to + 2 * i, to_weight(load<f32>(p + i)), to_weight(load<f32>(p + i + LANES)));
}

// noise: random bits below the stored part.
template <typename S>
inline void put_split(char* codes, char* weights, Pair x, u32 noise_a, u32 noise_b) {
    constexpr uint32_t keep = ~0u << S::dropped;
    u32 a = x.a == x.a ? bits_of(x.a) : u32{} + 0x7FC00000,
        b = x.b == x.b ? bits_of(x.b) : u32{} + 0x7FC00000;
    if constexpr (S::dropped != 0) a = a + noise_a & keep, b = b + noise_b & keep;
    store_low_halves(weights, (a + HALF_CODE) >> 16, (b + HALF_CODE) >> 16);
    store_codes<S>(codes, a >> S::dropped, b >> S::dropped);
}

template <typename S>
inline void put_split(char* codes, char* weights, Pair x) {
    constexpr uint32_t half = S::dropped ? 1u << (S::dropped - 1) : 0;
    put_split<S>(codes, weights, x, u32{} + half, u32{} + half);
}

template <typename S>
void read_split(const char* codes, const char* weights, float factor, float* out, int count) {
    const SplitReader<S> from = {codes, weights, factor};
    for (int i = 0; i < count; i += LANES) store(out + i, from.at(i, factor));
}

template <typename S>
void write_split(const float* p, Random* random, char* codes, char* weights, int count) {
    for (int i = 0; i < count; i += 2 * LANES) {
        char *code = codes + i * itemsize<S>, *weight = weights + 2 * i;
        if (!random)
            put_split<S>(code, weight, load_two(p + i));
        else {
            constexpr int cut = RANDOM_BITS - S::dropped;
            const u32 a = random->next() >> cut, b = random->next() >> cut;
            put_split<S>(code, weight, load_two(p + i), a, b);
        }
    }
}

// Decodes masters of any format; weights: of the same rows.
void read_masters(const Blocks& master, const Values& weights, int64_t row, int rows, int n, float factor,
                  float* out) {
    if (master.is<SPLIT16>())
        read_split<SPLIT16>(master.at(row, n), weights.at(row * n), factor, out, rows * n);
    else if (master.is<SPLIT8>())
        read_split<SPLIT8>(master.at(row, n), weights.at(row * n), factor, out, rows * n);
    else
        master.decode(row, rows, n, factor, out);
}

// Rounds `p` into masters, to nearest without `random`, and the weights from the stored masters.
// Overwrites p.
void write_masters(float* p, const uint32_t* amax, Random* random, const Blocks& master,
                   const Values& weights, int64_t row, int rows, int n) {
    char *codes = master.at(row, n), *to = weights.at(row * n);
    if (master.is<SPLIT16>()) return write_split<SPLIT16>(p, random, codes, to, rows * n);
    if (master.is<SPLIT8>()) return write_split<SPLIT8>(p, random, codes, to, rows * n);
    if (random)
        master.f().encode_either_way(p, *random, amax, 0, codes, master.scale(row), rows, n);
    else
        master.encode(row, rows, n, p, amax, 0);
    master.decode(row, rows, n, 1.0f, p);
    write_weights(p, rows * n, to, weights.dtype);
}

}  // namespace ISA
