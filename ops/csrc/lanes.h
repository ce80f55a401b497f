// Vectors of LANES 32-bit values: the compiler's own vector types, with operators, and the few
// instructions that operators do not cover. Included once per instruction set, whose name is ISA.
#pragma once
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace ISA {

#if defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using f32 = float __attribute__((vector_size(4 * LANES)));
using u32 = uint32_t __attribute__((vector_size(4 * LANES)));
using i32 = int32_t __attribute__((vector_size(4 * LANES)));
using u16 = uint16_t __attribute__((vector_size(2 * LANES)));
using u8 = uint8_t __attribute__((vector_size(LANES)));
using i8 = int8_t __attribute__((vector_size(LANES)));
constexpr int HALF_LANES = LANES / 2;
using f64 = double __attribute__((vector_size(8 * HALF_LANES)));

constexpr uint32_t SIGN = 0x80000000, MAGNITUDE = 0x7FFFFFFF, INFINITE = 0x7F800000;

template <typename T>
inline T load(const void* from) {
    T x;
    memcpy(&x, from, sizeof x);
    return x;
}
template <typename T>
inline void store(void* to, T x) {
    memcpy(to, &x, sizeof x);
}

template <typename To, typename From>
inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    return load<To>(&from);
}

inline i32 to_integer(f32 x) { return __builtin_convertvector(x, i32); }  // truncates
inline f32 from_integer(i32 x) { return __builtin_convertvector(x, f32); }

inline f64 doubles(const float* from) {  // loads HALF_LANES values
    using half = float __attribute__((vector_size(4 * HALF_LANES)));
    return __builtin_convertvector(load<half>(from), f64);
}

inline u32 bits_of(f32 x) { return (u32)x; }
inline f32 float_of(u32 x) { return (f32)x; }
inline f32 absolute(f32 x) { return float_of(bits_of(x) & MAGNITUDE); }

inline float power_of_two(int field) {  // 2^(field - 127); 255 gives inf, 0 gives 0
    return same_bits<float>(uint32_t(field) << 23);
}

#if defined(__AVX512BW__)

inline f32 square_root(f32 x) { return (f32)_mm512_sqrt_ps((__m512)x); }
inline f32 at_most(f32 x, f32 bound) { return (f32)_mm512_min_ps((__m512)bound, (__m512)x); }  // NaN stays
inline u32 larger(u32 a, u32 b) { return (u32)_mm512_max_epu32((__m512i)a, (__m512i)b); }
inline u32 pick(uint32_t mask, u32 ones, u32 zeros) {  // bit by bit
    return (u32)_mm512_ternarylogic_epi32(_mm512_set1_epi32(int(mask)), (__m512i)ones, (__m512i)zeros, 0xCA);
}
inline u32 widen(u16 x) { return (u32)_mm512_cvtepu16_epi32((__m256i)x); }
inline u16 widen_signed(i8 x) { return (u16)_mm256_cvtepi8_epi16((__m128i)x); }
inline i32 widen_twice(i8 x) { return (i32)_mm512_cvtepi8_epi32((__m128i)x); }
inline u16 low_half(u32 x) { return (u16)_mm512_cvtepi32_epi16((__m512i)x); }
inline void store_low_halves(void* to, u32 a, u32 b) {
    alignas(64) static const uint16_t EVEN[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                  22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                  44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16((__m512i)a, _mm512_load_si512(EVEN), (__m512i)b));
}
inline u8 low_byte(u32 x) { return (u8)_mm512_cvtepi32_epi8((__m512i)x); }
inline f32 from_half(u16 x) { return (f32)_mm512_cvtph_ps((__m256i)x); }
inline u16 to_half(f32 x) { return (u16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
inline uint32_t largest(u32 x) { return _mm512_reduce_max_epu32((__m512i)x); }

#elif defined(__AVX2__)

inline f32 square_root(f32 x) { return (f32)_mm256_sqrt_ps((__m256)x); }
inline f32 at_most(f32 x, f32 bound) { return (f32)_mm256_min_ps((__m256)bound, (__m256)x); }  // NaN stays
inline u32 larger(u32 a, u32 b) { return (u32)_mm256_max_epu32((__m256i)a, (__m256i)b); }
inline u32 pick(uint32_t mask, u32 ones, u32 zeros) { return (ones & mask) | (zeros & ~mask); }
inline u32 widen(u16 x) { return (u32)_mm256_cvtepu16_epi32((__m128i)x); }
inline u16 widen_signed(i8 x) { return (u16)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)&x)); }
inline i32 widen_twice(i8 x) { return (i32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)&x)); }
inline u16 low_half(u32 x) {
    const __m256i pick = _mm256_set1_epi64x(0x0D0C090805040100);
    __m256i halves = _mm256_shuffle_epi8((__m256i)x, pick);
    return (u16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
}
inline void store_low_halves(void* to, u32 a, u32 b) {
    store(to, low_half(a));
    store(static_cast<char*>(to) + 2 * LANES, low_half(b));
}
inline u8 low_byte(u32 x) {
    const __m256i pick = _mm256_set1_epi32(0x0C080400);
    __m256i bytes = _mm256_shuffle_epi8((__m256i)x, pick);
    __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    return (u8)_mm_cvtsi128_si64(both);
}
inline f32 from_half(u16 x) { return (f32)_mm256_cvtph_ps((__m128i)x); }
inline u16 to_half(f32 x) { return (u16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
inline uint32_t largest(u32 x) {
    uint32_t most = 0;
    for (int i = 0; i < LANES; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

#else

inline f32 square_root(f32 x) {
    for (int i = 0; i < LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
}
inline f32 at_most(f32 x, f32 bound) { return bound < x ? bound : x; }  // NaN stays
inline u32 larger(u32 a, u32 b) { return a > b ? a : b; }
inline u32 pick(uint32_t mask, u32 ones, u32 zeros) { return (ones & mask) | (zeros & ~mask); }
inline u32 widen(u16 x) { return __builtin_convertvector(x, u32); }
inline u16 widen_signed(i8 x) {
    using i16 = int16_t __attribute__((vector_size(2 * LANES)));
    return (u16) __builtin_convertvector(x, i16);
}
inline i32 widen_twice(i8 x) { return __builtin_convertvector(x, i32); }
inline u16 low_half(u32 x) { return __builtin_convertvector(x, u16); }
inline void store_low_halves(void* to, u32 a, u32 b) {
    store(to, low_half(a));
    store(static_cast<char*>(to) + 2 * LANES, low_half(b));
}
inline u8 low_byte(u32 x) { return __builtin_convertvector(x, u8); }
inline f32 from_half(u16 x) {
    u32 code = widen(x), magnitude = code & 0x7FFF;
    f32 finite = float_of(magnitude << 13) * power_of_two(127 + 112);
    u32 bits = magnitude >= 0x7C00 ? magnitude << 13 | INFINITE : bits_of(finite);
    return float_of(bits | (code & 0x8000) << 16);
}
inline u16 to_half(f32 x) {
    u32 bits = bits_of(x), magnitude = bits & MAGNITUDE;
    // Adding a number whose last place is the half's last place rounds as the half would.
    u32 exponent = larger(magnitude & INFINITE, (u32{} + 113) << 23);
    f32 rounded = float_of(magnitude) + float_of(exponent + (13 << 23));
    u32 code = bits_of(rounded) + (bits_of(rounded) >> 13) + 2048;
    code = magnitude >= 0x477FF000 ? u32{} + 0x7C00 : code & 0x7FFF;  // 65520 and more
    code = magnitude > INFINITE ? u32{} + 0x7E00 : code;
    return low_half(code | (bits >> 16 & 0x8000));
}
inline uint32_t largest(u32 x) {
    uint32_t most = 0;
    for (int i = 0; i < LANES; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

#endif

inline uint32_t total(u32 x) {
    uint32_t sum = 0;
    for (int i = 0; i < LANES; ++i) sum += x[i];
    return sum;
}
inline void store_low_bytes(void* to, u32 a, u32 b) {
    store(to, low_byte(a));
    store(static_cast<char*>(to) + LANES, low_byte(b));
}

}  // namespace ISA
