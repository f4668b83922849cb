// One token times NVFP4 or INT8, whose codes are looked up or read many at a time.
//
// With VNNI the token goes in as whole numbers times a power of two (one for eight columns of NVFP4, one for all of
// INT8), each written with signed digits to the base 256. Products of digits and codes are exact, and so are their
// sums; codes become positive by adding a constant, and what that adds is known beforehand. A number keeps 22 bits
// beside the largest of its eight (INT8: 30 beside the largest of all), so that sums are as precise as float32's. See
// Ootomo, Ozaki and Yokota, arXiv 2306.11975.

#pragma once

#include "vectors.h"

namespace {

// 128 columns of NVFP4 at a time: a lane has eight codes of one block.
constexpr int64_t kTurn = 128;

// What E2M1 codes are worth, twice.
#define TAFKIR_E2M1_TWICE(zero) \
  zero, zero + 1, zero + 2, zero + 3, zero + 4, zero + 6, zero + 8, zero + 12, \
  zero, zero - 1, zero - 2, zero - 3, zero - 4, zero - 6, zero - 8, zero - 12

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define TAFKIR_DIGITS 1

// Columns of INT8 at a time, and digits of its numbers.
constexpr int64_t kInt8Step = 64, kInt8Digits = 4;
// What sums of NVFP4 are still to be multiplied by: codes count twice, scales a 2^8th.
constexpr float kNvfp4Factor = 128.0f;

inline Words magnitudes(const Floats& x) { return bits_of<Words>(x) & 0x7fffffffu; }

// The power of two that numbers up to `top` are a multiple of once they are divided by 2^`bits`; of what is not finite,
// infinity.
inline Floats unit_of(const Words& top, int bits) {
  const Floats least = all(1e-20f), found = bits_of<Floats>(top), most = top > bits_of<Words>(least) ? found : least;
  // The largest of signed digits is 127: a little less than half of the next power of two.
  return bits_of<Floats>(bits_of<Words>(most * 1.004f) & 0x7f800000u) * (1.0f / (1 << bits));
}

// Four numbers of each lane as digits, four bytes a lane, the highest first and so far `apart`. Returns their sum.
template <int kDigits>
inline Ints put_digits(const Floats* numbers, int64_t every, const Floats& inverse, char* to, int64_t apart) {
  Ints sum = {}, words[kDigits] = {};
  for (int i = 0; i < 4; i++) {
    Ints rest = (Ints)_mm512_cvtps_epi32((__m512)(numbers[i * every] * inverse));
    sum += rest;
    for (int d = kDigits - 1; d >= 0; d--) {
      const Ints digit = rest << 24 >> 24;
      words[d] |= (digit & 255) << (8 * i);
      rest = (rest - digit) >> 8;
    }
  }
  for (int d = 0; d < kDigits; d++) std::memcpy(to + d * apart, words + d, 64);
  return sum;
}

// Of 128 columns, 512 bytes: three digits of those whose codes stand low and high in a byte, what to add, the units.
inline void pack_nvfp4_token(const float* x, int64_t columns, void* packed) {
  char* to = static_cast<char*>(packed);
  for (int64_t c = 0; c < columns; c += kTurn, to += 4 * kTurn) {
    Floats numbers[8];
    Words top = {};
    for (int j = 0; j < 8; j++) {
      for (int lane = 0; lane < 16; lane++) numbers[j][lane] = x[c + 8 * lane + j];
      const Words size = magnitudes(numbers[j]);
      top = size > top ? size : top;
    }
    const Floats unit = unit_of(top, 22), inverse = 1.0f / unit;
    Ints sum = put_digits<3>(numbers, 2, inverse, to, 128);
    sum += put_digits<3>(numbers + 1, 2, inverse, to + 64, 128);
    sum *= -12;
    std::memcpy(to + 384, &sum, 64);
    std::memcpy(to + 448, &unit, 64);
  }
}

template <int kRows>
inline void nvfp4_rows(const uint8_t* const* codes, const uint8_t* const* scales, int64_t columns, const void* packed,
                       Floats* sums) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(TAFKIR_E2M1_TWICE(12)));
  // Two lanes a block. An E4M3 code seven places on is a number of half precision, 2^8 times as small.
  const __m256i places = _mm256_setr_epi16(-0x8000, -0x8000, -0x7fff, -0x7fff, -0x7ffe, -0x7ffe, -0x7ffd, -0x7ffd,
                                           -0x7ffc, -0x7ffc, -0x7ffb, -0x7ffb, -0x7ffa, -0x7ffa, -0x7ff9, -0x7ff9);
  const char* token = static_cast<const char*>(packed);
  Floats totals[kRows] = {};
  for (int64_t c = 0; c < columns; c += kTurn, token += 4 * kTurn) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const __m512i pairs = _mm512_loadu_si512(codes[r] + c / 2);
      __builtin_prefetch(codes[r] + c / 2 + kRows * columns / 2);
      const __m512i low = _mm512_permutexvar_epi8(pairs, table);
      const __m512i high = _mm512_permutexvar_epi8(_mm512_srli_epi16(pairs, 4), table);
      __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 3
      for (int d = 0; d < 3; d++) {
        if (d) sum = _mm512_slli_epi32(sum, 8);
        sum = _mm512_dpbusd_epi32(sum, low, _mm512_loadu_si512(token + 128 * d));
        sum = _mm512_dpbusd_epi32(sum, high, _mm512_loadu_si512(token + 128 * d + 64));
      }
      sum = _mm512_add_epi32(sum, _mm512_loadu_si512(token + 384));
      const __m256i bytes = _mm256_set1_epi64x(load_as<int64_t>(scales[r] + c / 16));
      const __m512 scale = _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_shuffle_epi8(bytes, places), 7));
      totals[r] += (Floats)_mm512_cvtepi32_ps(sum) * ((Floats)scale * load_as<Floats>(token + 448));
    }
  }
  for (int r = 0; r < kRows; r++) sums[r] = totals[r];
}

// Of 64 columns four digits; then what each digit's sums begin with, and the unit.
inline void pack_int8_token(const float* x, int64_t columns, void* packed) {
  char* to = static_cast<char*>(packed);
  Words tops = {};
  for (int64_t c = 0; c < columns; c += 16) {
    const Words size = magnitudes(load_as<Floats>(x + c));
    tops = size > tops ? size : tops;
  }
  uint32_t top = 0;
  for (int lane = 0; lane < 16; lane++) top = tops[lane] > top ? tops[lane] : top;
  const Floats unit = unit_of(Words{} + top, 30), inverse = 1.0f / unit;
  Ints begins[kInt8Digits] = {};
  for (int64_t c = 0; c < columns; c += kInt8Step, to += 4 * kInt8Step) {
    Floats numbers[4];
    for (int j = 0; j < 4; j++)
      for (int lane = 0; lane < 16; lane++) numbers[j][lane] = x[c + 4 * lane + j];
    put_digits<kInt8Digits>(numbers, 1, inverse, to, 64);
    for (int d = 0; d < kInt8Digits; d++)
      begins[d] = (Ints)_mm512_dpbusd_epi32((__m512i)begins[d], _mm512_set1_epi8(-128),
                                            _mm512_loadu_si512(to + 64 * d));
  }
  for (int d = 0; d < kInt8Digits; d++) {
    const Ints begin = -begins[d];
    std::memcpy(to + 64 * d, &begin, 64);
  }
  std::memcpy(to + 64 * kInt8Digits, &unit, 64);
}

template <int kRows>
inline void int8_rows(const int8_t* const* codes, int64_t columns, const void* packed, Floats* sums) {
  const char* token = static_cast<const char*>(packed);
  const char* extra = token + 4 * columns;
  __m512i totals[kRows][kInt8Digits];
  for (int r = 0; r < kRows; r++)
    for (int d = 0; d < kInt8Digits; d++) totals[r][d] = _mm512_loadu_si512(extra + 64 * d);
  for (int64_t c = 0; c < columns; c += kInt8Step, token += 4 * kInt8Step) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const __m512i code = _mm512_xor_si512(_mm512_loadu_si512(codes[r] + c), _mm512_set1_epi8(-128));
      __builtin_prefetch(codes[r] + c + kRows * columns);
#pragma GCC unroll 4
      for (int d = 0; d < kInt8Digits; d++)
        totals[r][d] = _mm512_dpbusd_epi32(totals[r][d], code, _mm512_loadu_si512(token + 64 * d));
    }
  }
  const Floats unit = load_as<Floats>(extra + 64 * kInt8Digits);
  for (int r = 0; r < kRows; r++) {
    Floats sum = {};
    for (int d = 0; d < kInt8Digits; d++) sum = sum * 256.0f + (Floats)_mm512_cvtepi32_ps(totals[r][d]);
    sums[r] = sum * unit;
  }
}

// What an INT8 token adds to its digits has room where columns are many.
inline bool has_int8_digits(int64_t columns) { return columns % kInt8Step == 0 && columns >= 192; }

#else

constexpr float kNvfp4Factor = 1.0f;

// In the order in which shifts bring codes to where a permutation looks.
inline void pack_nvfp4_token(const float* x, int64_t columns, void* packed) {
  float* to = static_cast<float*>(packed);
  for (int64_t c = 0; c < columns; c += kTurn)
    for (int64_t j = 0; j < 8; j++)
      for (int64_t lane = 0; lane < 16; lane++) to[c + j * 16 + lane] = x[c + 8 * lane + j];
}

template <int kRows>
inline void nvfp4_rows(const uint8_t* const* codes, const uint8_t* const* scales, int64_t columns, const void* packed,
                       Floats* sums) {
  const Floats values = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
                         -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  const float* x = static_cast<const float*>(packed);
  for (int r = 0; r < kRows; r++) sums[r] = Floats{};
  for (int64_t c = 0; c < columns; c += kTurn)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const Words words = load_as<Words>(codes[r] + c / 2);
      __builtin_prefetch(codes[r] + c / 2 + kRows * columns / 2);
      Floats even = {}, odd = {};
#pragma GCC unroll 4
      for (int j = 0; j < 8; j += 2) {
        even += __builtin_shuffle(values, bits_of<Ints>(words >> (4 * j))) * load_as<Floats>(x + c + j * 16);
        odd += __builtin_shuffle(values, bits_of<Ints>(words >> (4 * j + 4))) * load_as<Floats>(x + c + j * 16 + 16);
      }
      const Longs pairs = wide_eight_bytes(scales[r] + c / 16);
      sums[r] += (even + odd) * e4m3_values(bits_of<Words>(pairs | pairs << 32));
    }
}

inline bool has_int8_digits(int64_t) { return false; }
inline void pack_int8_token(const float*, int64_t, void*) {}
template <int kRows>
inline void int8_rows(const int8_t* const*, int64_t, const void*, Floats*) {}

#endif

}  // namespace
