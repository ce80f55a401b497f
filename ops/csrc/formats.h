// The formats: one decoder and one encoder to nearest per format, on a block of FP32 values in L1; the
// arithmetic is that of ops/blocks.py.
#pragma once
#include "lanes.h"

namespace ISA {

constexpr int BATCH = 256;  // elements per batch: their FP32 values stay in L1
constexpr int MAX_ROWS = BATCH / 32;

struct E4M3 {
    using Code = u8;
    static constexpr int exponent_bits = 4, mantissa_bits = 3, lost_codes = 2;
    // As a half, 2^8 smaller: its four exponent bits are the low four of the half's five.
    static constexpr int unit = 8;
    static f32 decode(u8 code) { return from_half(widen_signed((i8)code) << 7 & 0xBFFF); }
};

struct E5M2 {
    using Code = u8;
    static constexpr int exponent_bits = 5, mantissa_bits = 2, lost_codes = 1;
    static constexpr int unit = 0;
    static f32 decode(u8 code) { return from_half(widen_signed((i8)code) << 8); }
};

struct UE4M4 {  // the root of a second moment: no sign, no codes for inf or NaN
    using Code = u8;
    static constexpr int exponent_bits = 4, mantissa_bits = 4, lost_codes = 1;
    static constexpr int unit = 8;  // as a half, 2^8 smaller
    static f32 decode(u8 code) { return from_half(widen_signed((i8)code) << 6 & 0x3FC0); }
};

struct INT8 {  // integers: exp_avg over the root of exp_avg_sq
    using Code = u8;
    static constexpr int exponent_bits = 1, mantissa_bits = 6, lost_codes = 1;
    static constexpr int unit = 0;
    static f32 decode(u8 code) { return from_integer(widen_twice((i8)code)); }
};

struct FP16 {
    using Code = u16;
    static constexpr int exponent_bits = 5, mantissa_bits = 10, lost_codes = 1;
    static constexpr int unit = 0;
    static f32 decode(u16 code) { return from_half(code); }
    static u16 encode(f32 x) { return to_half(x); }
};

struct BF16 {
    using Code = u16;
    static constexpr int exponent_bits = 8, mantissa_bits = 7, lost_codes = 1;
    static constexpr int unit = 0;
    static f32 decode(u16 code) { return float_of(widen(code) << 16); }
    static u16 encode(f32 x) {
        u32 bits = bits_of(x), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        return low_half((bits & MAGNITUDE) > INFINITE ? u32{} + 0x7FC0 : rounded);
    }
};

struct FP32 {
    using Code = f32;
    static constexpr int exponent_bits = 8, mantissa_bits = 23, lost_codes = 1;
    static constexpr int unit = 0;
    static f32 decode(f32 code) { return code; }
    static f32 encode(f32 x) { return x; }
};

// Numbers of the formats, as in ops.cpu.kernels.FORMATS.
template <typename F>
constexpr int64_t number = -1;
template <>
constexpr int64_t number<FP32> = 0;
template <>
constexpr int64_t number<BF16> = 1;
template <>
constexpr int64_t number<FP16> = 2;
template <>
constexpr int64_t number<E4M3> = 3;
template <>
constexpr int64_t number<E5M2> = 4;
template <>
constexpr int64_t number<UE4M4> = 5;
template <>
constexpr int64_t number<INT8> = 8;

template <typename F>
constexpr int itemsize = int(sizeof(typename F::Code)) / LANES;
template <typename F>
constexpr bool scaled = F::exponent_bits < 8;
template <typename F>
constexpr int bias = (1 << (F::exponent_bits - 1)) - 1;
template <typename F>
constexpr int dropped = 23 - F::mantissa_bits;
template <typename F>
constexpr bool signs = true;  // whether it has a sign
template <>
constexpr bool signs<UE4M4> = false;
template <typename F>  // inf and NaN take the last exponent, or one code of it, or none
constexpr int max_exponent = bias<F> + (F::lost_codes == 2 || !signs<F> ? 1 : 0);
template <>
constexpr int max_exponent<INT8> = 6;
template <typename F>
constexpr uint32_t max_mantissa = (1u << 23) - (uint32_t(F::lost_codes) << dropped<F>);

template <typename F>
constexpr float largest_value() {
    double value = 2 - double(F::lost_codes) / (1 << F::mantissa_bits);
    for (int i = 0; i < max_exponent<F>; ++i) value *= 2;
    return float(value);
}

struct Rounded {
    u32 code;       // the low byte
    f32 magnitude;  // the decoded value without its sign
};

// Rounds to the nearest code, ties to even; values are in the range of an 8-bit format. Adding a number
// whose last place is the code's last place rounds. The low byte of the sum, with the exponent above it
// shifted down to it, is the code, because the number added includes a constant for that.
template <typename F>
inline Rounded nearest(f32 x) {
    constexpr int drop = dropped<F>, mantissa = F::mantissa_bits, smallest = 128 - bias<F>;
    constexpr uint32_t low = 0u - (uint32_t(smallest + drop) << mantissa);
    const u32 bits = bits_of(x), exponent = larger(bits & INFINITE, (u32{} + smallest) << 23);
    const f32 large = float_of(exponent + ((uint32_t(drop) << 23) + (low & 0xFF)));
    const f32 sum = absolute(x) + large;
    const u32 code = bits_of(sum) + (bits_of(sum) >> drop);
    return {pick(0x80, bits >> 24, code), sum - large};
}

struct Pair {  // 2 * LANES values, one after the other
    f32 a, b;
    Pair operator*(float x) const { return {a * x, b * x}; }
};
inline Pair load_two(const float* x) { return {load<f32>(x), load<f32>(x + LANES)}; }

// Rounds scaled values to nearest and stores their codes; returns the decoded values, without the sign for an
// 8-bit format.
template <typename F>
inline Pair put(char* to, Pair x) {
    if constexpr (itemsize<F> == 1) {
        const Rounded a = nearest<F>(x.a), b = nearest<F>(x.b);
        store_low_bytes(to, a.code, b.code);
        return {a.magnitude, b.magnitude};
    } else {
        const typename F::Code a = F::encode(x.a), b = F::encode(x.b);
        store(to, a);
        store(to + LANES * itemsize<F>, b);
        return {F::decode(a), F::decode(b)};
    }
}

inline uint32_t amax_of(const float* x, int n) {  // as bits
    u32 amax = {};
    for (int i = 0; i < n; i += LANES) amax = larger(amax, load<u32>(x + i) & MAGNITUDE);
    return largest(amax);
}

struct Scale {
    int e;          // its E8M0 byte
    float inverse;  // maps 2^unit times the values to the codes
};

// The scale of a block of zeros, with inf or NaN, or near the end of the range. Kept apart: a compiler that
// sees these minima among the rest moves the scalars into vectors and back, and waits.
__attribute__((noinline, cold)) inline Scale rare_scale(int exponent, int e, int unit) {
    if (exponent == 255) return {255, 0.0f};
    e = e < 1 ? 1 : e > 254 ? 254 : e;
    return {e, power_of_two(254 - unit - e < 0 ? 0 : 254 - unit - e)};
}

template <typename F>
inline Scale scale_of(uint32_t amax, int unit) {
    const int exponent = int(amax >> 23);
    const int e = exponent - (max_exponent<F> + unit) + ((amax & 0x7FFFFF) > max_mantissa<F>);
    if (e < 1 || e > 254 - unit || exponent == 255) return rare_scale(exponent, e, unit);
    return {e, power_of_two(254 - unit - e)};
}

// Returns the factor from 2^unit times the values to the codes; writes the scale.
template <typename F>
inline float scale_down(uint32_t amax, int unit, uint8_t* scale) {
    if constexpr (scaled<F>) {
        const Scale found = scale_of<F>(amax, unit);
        *scale = uint8_t(found.e);
        return found.inverse;
    } else {
        return power_of_two(127 - unit);
    }
}

// Reads the codes of a batch of blocks in place.
template <typename F>
struct Reader {
    const char* codes;
    const uint8_t* scales;
    float factor;

    float scale(int row) const { return scaled<F> ? power_of_two(scales[row]) * factor : factor; }
    f32 at(int i, float scale) const {  // LANES values of one row, from the i-th on
        f32 x = F::decode(load<typename F::Code>(codes + i * itemsize<F>));
        if constexpr (F::unit != 0) x = x * power_of_two(127 + F::unit);
        return x * scale;
    }
};

// Decodes `rows` blocks of n values each; writes to `out` or adds to it.
template <typename F, bool ADD>
void decode(const void* codes, const uint8_t* scales, float factor, float* out, int rows, int n) {
    const Reader<F> from = {static_cast<const char*>(codes), scales, factor};
    for (int row = 0, i = 0; row < rows; ++row) {
        const float scale = from.scale(row);
        for (; i < (row + 1) * n; i += LANES) {
            const f32 x = from.at(i, scale);
            store(out + i, ADD ? load<f32>(out + i) + x : x);
        }
    }
}

// amax: of each block, as bits.
template <typename F>
void encode(const float* x, const uint32_t* amax, int unit, void* codes, uint8_t* scales, int rows, int n) {
    char* to = static_cast<char*>(codes);
    for (int row = 0, i = 0; row < rows; ++row) {
        const float inverse = scale_down<F>(amax[row], unit, scales + row);
        for (; i < (row + 1) * n; i += 2 * LANES) put<F>(to + i * itemsize<F>, load_two(x + i) * inverse);
    }
}

// Sum of squares of a block, as in ops/exact.py. No addition rounds, so the order of additions is free.
template <typename Square>
inline double sum_of(const float* x, int n, Square square) {
    f64 sums[4] = {};
    for (int i = 0; i < n; i += 4 * HALF_LANES)
        for (int j = 0; j < 4; ++j) sums[j] += square(doubles(x + i + j * HALF_LANES));
    const f64 sum = sums[0] + sums[1] + (sums[2] + sums[3]);
    double total = 0;
    for (int i = 0; i < HALF_LANES; ++i) total += sum[i];
    return total;
}
inline double sum_of_squares(const float* x, int n) {
    return sum_of(x, n, [](f64 value) { return value * value; });
}
inline double sum_of_squares_on_a_grid(const float* x, int n) {  // NaN if a value is not finite
    const uint32_t largest = amax_of(x, n);
    if (largest >= INFINITE) return __builtin_nan("");
    const int64_t field = int64_t(same_bits<uint64_t>(double(same_bits<float>(largest))) >> 52);
    const int64_t exponent = (field < 1023 - 149 ? 1023 - 149 : field) - 1023;
    const double grid = same_bits<double>((2 * exponent + 9 + 1023) << 52 | int64_t(1) << 51);
    return sum_of(x, n, [grid](f64 value) { return value * value + grid - grid; });
}

// Encodes, and returns the sum of squares of each block as stored, without its scale.
template <typename F>
void encode_and_square(const float* x, const uint32_t* amax, void* codes, uint8_t* scales, double* squares,
                       int rows, int n) {
    alignas(64) float stored[BATCH];
    char* to = static_cast<char*>(codes);
    for (int row = 0, i = 0; row < rows; ++row) {
        const float inverse = scale_down<F>(amax[row], 0, scales + row);
        for (; i < (row + 1) * n; i += 2 * LANES) {
            const Pair each = put<F>(to + i * itemsize<F>, load_two(x + i) * inverse);
            store(stored + i, each.a);
            store(stored + i + LANES, each.b);
        }
        squares[row] =
            (number<F> == number<E4M3> ? sum_of_squares : sum_of_squares_on_a_grid)(stored + row * n, n);
    }
}

}  // namespace ISA
