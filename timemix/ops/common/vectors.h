/* Vectors of WIDTH float32 numbers, as wide as the processor's registers, and loads of weights of any format. */

#ifndef TIMEMIX_VECTORS_H
#define TIMEMIX_VECTORS_H

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "ops/common/types.h"

#if defined(__AVX512F__)
#define WIDTH 16
#else
#define WIDTH 8
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
typedef int8_t bytes __attribute__((vector_size(WIDTH)));
typedef int32_t integers __attribute__((vector_size(4 * WIDTH)));

/* x[0] to x[WIDTH - 1]. */
INLINE vec vector_at(const float *x) {
    vec y;
    memcpy(&y, x, sizeof y);
    return y;
}

INLINE void put_vector(float *x, vec y) { memcpy(x, &y, sizeof y); }

/* The sum of the elements. */
INLINE float total(vec x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m512 all = (__m512)x;
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), (__m256)_mm512_extractf64x4_pd((__m512d)all, 1));
#else
    const __m256 half = (__m256)x;
#endif
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
#else
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += x[i];
    return sum;
#endif
}

/* weights[at] to weights[at + WIDTH - 1] as float32.

   Intrinsics are used if available. For __builtin_convertvector, compilers emit two conversions, each of half a
   register. */
INLINE vec load_vector(const void *weights, int64_t at, enum type type) {
    if (type == FLOAT32) {
        vec x;
        memcpy(&x, (const float *)weights + at, sizeof x);
        return x;
    }
    if (type == BFLOAT16) {
        halves x;
        memcpy(&x, (const uint16_t *)weights + at, sizeof x);
#if defined(__AVX512F__)
        return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#elif defined(__AVX2__)
        return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16);
#else
        return (vec)(__builtin_convertvector(x, words) << 16);
#endif
    }
    bytes x;
    memcpy(&x, (const int8_t *)weights + at, sizeof x);
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)x)));
#else
    return __builtin_convertvector(__builtin_convertvector(x, integers), vec);
#endif
}

/* The kind of a register of 16 bytes in an asm statement; otherwise memory. */
#if defined(__x86_64__)
#define REGISTER "+x"
#elif defined(__aarch64__)
#define REGISTER "+w"
#else
#define REGISTER "+m"
#endif

/* sum + a x. -ffast-math allows the compiler to merge several additions, in an order that depends on the surrounding
   code. The intrinsics of AVX prevent this, and so does an asm statement that can change the sum. */
INLINE vec multiply_add(vec a, float x, vec sum) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(x), (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(x), (__m256)sum);
#else
    typedef float half __attribute__((vector_size(2 * WIDTH)));
    half halves[2];
    sum += a * x;
    memcpy(halves, &sum, sizeof sum);
    __asm__("" : REGISTER(halves[0]), REGISTER(halves[1]));
    memcpy(&sum, halves, sizeof sum);
    return sum;
#endif
}

/* The values of the codes of INT4, equal to LEVELS in models/quantize.py. */
static const int8_t LEVELS[16] = {-127, -100, -79, -63, -49, -36, -24, -12, 0, 11, 23, 36, 50, 65, 83, 106};

/* A vector of words of 8 codes, unpacked for level_of(). AVX-512 selects from 16 float32 numbers by the lowest 4 bits
   of a word. Without AVX-512, the 8 codes become 8 bytes LEVELS[code], in one word for codes 0, 2, 4, 6 and in one word
   for codes 1, 3, 5, 7. */
#if defined(__AVX512F__)
typedef words unpacked;

INLINE unpacked unpack_codes(words codes) { return codes; }

INLINE vec level_of(unpacked codes, int i) {
    const __m512 levels = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)LEVELS)));
    return (vec)_mm512_permutexvar_ps((__m512i)(codes >> 4 * i), levels);
}
#else
typedef struct {
    words even, odd;
} unpacked;

/* LEVELS of each byte, which is 0 to 15 */
INLINE words look_up(words codes) {
#if defined(__AVX2__)
    const __m256i levels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)LEVELS));
    return (words)_mm256_shuffle_epi8(levels, (__m256i)codes);
#else
    uint8_t code[4 * WIDTH];
    memcpy(code, &codes, sizeof code);
    for (int n = 0; n < 4 * WIDTH; n++) code[n] = (uint8_t)LEVELS[code[n]];
    memcpy(&codes, code, sizeof code);
    return codes;
#endif
}

INLINE unpacked unpack_codes(words codes) {
    return (unpacked){look_up(codes & 0x0f0f0f0f), look_up(codes >> 4 & 0x0f0f0f0f)};
}

/* The two shifts extend the sign of a byte to the word. */
INLINE vec level_of(unpacked levels, int i) {
    const integers whole = (integers)(i % 2 ? levels.odd : levels.even) << (24 - i / 2 * 8) >> 24;
#if defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps((__m256i)whole);
#else
    return __builtin_convertvector(whole, vec);
#endif
}
#endif

#endif
