// Stochastic rounding: a second encoder per format; ops/rounding.py.
#pragma once
#include "formats.h"

namespace ISA {

// The upper RANDOM_BITS of 32 hashed bits are used.
constexpr int RANDOM_BITS = 24;  // more than any format drops
constexpr int FEWER_BITS = 16;   // of the same 32, for a second draw
constexpr uint32_t SPREAD = 0x9E3779B9;
constexpr uint32_t APART = 0x361962EB;
constexpr uint32_t MULTIPLIERS[] = {0x21F0AAAD, 0xD35A2D97};

struct Last {  // the mixer's last step: the factor, and whether the word is made odd first
    uint32_t multiplier, odd;
};

template <typename T>
inline T mix_but_for_the_end(T x, Last last = {MULTIPLIERS[1], 0}) {
    x = (x ^ x >> 16) * MULTIPLIERS[0];
    return (x ^ x >> 15 | last.odd) * last.multiplier;
}

uint32_t key_of(uint32_t stream, int64_t parameter) {
    uint32_t word = mix_but_for_the_end(stream ^ uint32_t(parameter));
    return word ^ word >> 15;
}

struct Random {  // random bits of consecutive elements
    u32 index;
    Last last;

    Random(uint32_t key, uint32_t element, Last last) : last(last) {
        for (int i = 0; i < LANES; ++i) index[i] = (element + uint32_t(i)) * SPREAD + key;
    }
    u32 next_word() {
        const u32 word = mix_but_for_the_end(index, last);
        index += LANES * SPREAD;
        return word;
    }
    u32 next() { return upper(next_word()); }

    static u32 upper(u32 word) { return word >> (32 - RANDOM_BITS); }
    static u32 fewer(u32 word) { return (word + APART) >> (32 - FEWER_BITS); }
};

// Returns codes of |value|; `onto_codes` is the value on the scale of FP32's exponents. Noise as wide as the
// bits below the code is added, then these are cut.
template <typename F>
inline u32 round_stochastically(f32 value, f32 onto_codes, u32 random) {
    constexpr int drop = dropped<F>;
    u32 bits = bits_of(onto_codes) & MAGNITUDE;
    if constexpr (!scaled<F>) bits = value == value ? bits : u32{} + 0x7FC00000;
    return (bits + (random >> (RANDOM_BITS - drop))) >> drop;
}

template <typename F>
inline void store_codes(char* to, u32 a, u32 b) {
    if constexpr (itemsize<F> == 1)
        store_low_bytes(to, a, b);
    else
        store_low_halves(to, a, b);
}

struct Words {  // random words of a pair of values
    u32 a, b;

    explicit Words(Random& random) : a(random.next_word()), b(random.next_word()) {}
};

// Stores codes of non-negative values, rounded stochastically, never from non-zero to zero.
template <typename F>
inline void put_up(char* to, Pair x, float inverse, Words words) {
    const Pair codes = x * inverse * power_of_two(bias<F>);
    const u32 a = larger(round_stochastically<F>(x.a, codes.a, Random::upper(words.a)), u32{} + 1);
    const u32 b = larger(round_stochastically<F>(x.b, codes.b, Random::upper(words.b)), u32{} + 1);
    store_codes<F>(to, x.a == f32{} ? u32{} : a, x.b == f32{} ? u32{} : b);
}

// Returns the factor from values to integers, times 2^FEWER_BITS; inverse: of their scale.
inline float onto_fixed(float inverse) {
    const float factor = inverse * (1 << FEWER_BITS), most = power_of_two(254);
    return factor < most ? factor : most;
}

// Stores integers, rounded stochastically.
inline void put_whole(char* to, Pair x, float inverse, Words words) {
    const Pair fixed = x * inverse;
    const i32 a = to_integer(fixed.a) + (i32)Random::fewer(words.a);
    const i32 b = to_integer(fixed.b) + (i32)Random::fewer(words.b);
    store_low_bytes(to, (u32)a >> FEWER_BITS, (u32)b >> FEWER_BITS);
}

// Stores codes of values of either sign, rounded stochastically.
template <typename F>
inline void put_either_way(char* to, Pair x, float inverse, Words words) {
    const Pair codes = x * inverse * power_of_two(bias<F>);
    const u32 a = round_stochastically<F>(x.a, codes.a, Random::upper(words.a));
    const u32 b = round_stochastically<F>(x.b, codes.b, Random::upper(words.b));
    store_codes<F>(to, pick(0x8000, bits_of(x.a) >> 16, a), pick(0x8000, bits_of(x.b) >> 16, b));
}

using Put = void (*)(char* to, Pair x, float inverse, Words words);

// Returns the factor from 2^unit times the values to the input of rounding; writes the scale.
template <typename F>
inline float onto_codes(uint32_t amax, int unit, uint8_t* scale) {
    const float inverse = scale_down<F>(amax, unit, scale);
    return number<F> == number<INT8> ? onto_fixed(inverse) : inverse;
}

template <typename F, Put PUT>
void encode_noisily(const float* x, Random random, const uint32_t* amax, int unit, void* codes,
                    uint8_t* scales, int rows, int n) {
    char* to = static_cast<char*>(codes);
    for (int row = 0, i = 0; row < rows; ++row) {
        const float inverse = onto_codes<F>(amax[row], unit, scales + row);
        for (; i < (row + 1) * n; i += 2 * LANES)
            PUT(to + i * itemsize<F>, load_two(x + i), inverse, Words(random));
    }
}

template <typename F>
int64_t rescued(const float* x, Random random, const uint32_t* amax, int unit, int rows, int n) {
    u32 count = {};
    uint8_t scale;
    for (int row = 0, i = 0; row < rows; ++row) {
        const float inverse = scale_down<F>(amax[row], unit, &scale);
        for (; i < (row + 1) * n; i += LANES) {
            const f32 value = load<f32>(x + i) * inverse;
            const u32 code = round_stochastically<F>(value, value * power_of_two(bias<F>), random.next());
            count += (u32)((code == 0) & (value != f32{})) & 1;
        }
    }
    return total(count);
}

}  // namespace ISA
