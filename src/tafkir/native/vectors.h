// Sixteen lanes at a time, in the compiler's own vectors: AVX-512 where there is, else two of AVX2 or four of NEON.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int8_t SignedBytes __attribute__((vector_size(16)));
typedef uint8_t EightBytes __attribute__((vector_size(8)));

template <class To, class From>
inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a copy of bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class Vector>
inline Vector load_as(const void* from) {
  Vector to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

inline Floats all(float x) { return Floats{} + x; }

// Of two vectors with groups of 2 x kHalf lanes each: first or second halves of the groups, those of `a` and `b` in turn.
template <int kHalf, bool kSecond, class Vector>
inline Vector halves(Vector a, Vector b) {
  Ints from;
  for (int lane = 0; lane < 16; lane++) {
    const int pair = lane / kHalf;
    from[lane] = (pair >> 1) * 2 * kHalf + lane % kHalf + (kSecond ? kHalf : 0) + (pair & 1 ? 16 : 0);
  }
  return __builtin_shuffle(a, b, from);
}

template <int kHalf, class Vector, class Join>
inline void fold(Vector* rows, Join join) {
  for (int i = 0; i < kHalf; i++)
    rows[i] = join(halves<kHalf, false>(rows[i], rows[i + kHalf]), halves<kHalf, true>(rows[i], rows[i + kHalf]));
}

// Lane i of the result joins the lanes of row i, halves to halves: always in the same order.
template <class Vector, class Join>
inline Vector join_rows(Vector* rows, Join join) {
  fold<8>(rows, join);
  fold<4>(rows, join);
  fold<2>(rows, join);
  fold<1>(rows, join);
  return rows[0];
}

// What E4M3 codes from 0 to 126 are worth; exact.
inline Floats e4m3_values(Words codes) {
  const Floats small = __builtin_convertvector(codes, Floats) * 0.001953125f;
  return codes < 8u ? small : bits_of<Floats>((codes << 20) + (120u << 23));
}

// Sixteen (eight) small integers, each widened to a lane. The compiler takes such conversions apart, so it is told how.
#ifdef __AVX512F__
inline Words wide_bytes(const void* from) { return (Words)_mm512_cvtepu8_epi32(load_as<__m128i>(from)); }
inline Ints wide_signed_bytes(const void* from) { return (Ints)_mm512_cvtepi8_epi32(load_as<__m128i>(from)); }
inline Words wide_halves(const void* from) { return (Words)_mm512_cvtepu16_epi32(load_as<__m256i>(from)); }
inline Longs wide_eight_bytes(const void* from) {
  return (Longs)_mm512_cvtepu8_epi64(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
}
#else
inline Words wide_bytes(const void* from) { return __builtin_convertvector(load_as<Bytes>(from), Words); }
inline Ints wide_signed_bytes(const void* from) { return __builtin_convertvector(load_as<SignedBytes>(from), Ints); }
inline Words wide_halves(const void* from) { return __builtin_convertvector(load_as<Halves>(from), Words); }
inline Longs wide_eight_bytes(const void* from) { return __builtin_convertvector(load_as<EightBytes>(from), Longs); }
#endif

inline Floats bfloat16_values(const void* from) { return bits_of<Floats>(wide_halves(from) << 16); }

}  // namespace
