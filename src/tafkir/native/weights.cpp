// Whole weights to NVFP4 and FP8, from the bytes of a file to those of another: without torch, by `tafkir quantize`.
//
// Sixteen blocks of 16 values are taken at a time, so that their maxima, scales and errors fill vectors, too. Every
// result is bit for bit that of the torch code in ops/, so no product may be fused with a sum.

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "vectors.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kBlock = 16;
constexpr int64_t kBatch = 16;  // blocks
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr float kE2m1Max = 6.0f, kFp8Max = 448.0f;

enum Kind : int64_t { kFloat32 = 0, kBfloat16 = 1, kE8m0 = 2 };
enum Rule : int64_t { kMax = 0, kFourOverSix = 1, kMse = 2, kInverse = 3 };

inline Words all_words(uint32_t x) { return Words{} + x; }
inline Words size_bits(Floats x) { return bits_of<Words>(x) & 0x7fffffffu; }
inline Floats magnitude(Floats x) { return bits_of<Floats>(size_bits(x)); }

template <int64_t kKind>
inline Floats load(const void* values, int64_t block) {
  if (kKind == kBfloat16) return bfloat16_values(static_cast<const uint16_t*>(values) + block * kBlock);
  Floats out;
  std::memcpy(&out, static_cast<const float*>(values) + block * kBlock, sizeof out);
  return out;
}

// As integers, the bits of magnitudes are in the order of the numbers, with NaN above them all.
inline Words larger(Words a, Words b) { return a > b ? a : b; }

// E4M3 codes of numbers from 0 to 448, the nearest, ties to the even code.
inline Words e4m3_codes(Floats x) {
  const Words small = bits_of<Words>(x * 512.0f + 8388608.0f) - 0x4b000000u;
  const Words bits = bits_of<Words>(x);
  const Words normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - 960u;
  return x < 0.015625f ? small : normal;
}

// Clamped to what a scale may be: 2^-9, the smallest E4M3 number, to 448.
inline Words scale_codes(Floats wanted) {
  wanted = wanted < 0.001953125f ? all(0.001953125f) : wanted;
  return e4m3_codes(wanted > kFp8Max ? all(kFp8Max) : wanted);
}

// A block of zeros gets the scale one.
inline Floats one_for_zero(Floats wanted) { return wanted == 0.0f ? all(1.0f) : wanted; }

inline Floats rounded_to_bfloat16(Floats x) {
  const Words bits = bits_of<Words>(x);
  return bits_of<Floats>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

inline float rounded_to_bfloat16(float x) {
  uint32_t bits = bits_of<uint32_t>(x);
  if ((bits & 0x7fffffffu) >= kInfinity) return x;
  return bits_of<float>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

// E2M1: below 1 the codes count halves; above, they are exponent and first bit of the mantissa. Ties go to even codes.
inline void encode(Floats x, float step, uint8_t* packed) {
  const Floats ratio = x / step;
  const Words bits = size_bits(ratio);
  const Words small = bits_of<Words>(bits_of<Floats>(bits) + 4194304.0f) - 0x4a800000u;
  Words large = ((bits + 0x1fffffu + (bits >> 22 & 1u)) >> 22) - 252u;
  large = large > 7u ? all_words(7u) : large;
  Words code = bits < 0x3f800000u ? small : large;
  code |= ratio < 0.0f ? all_words(8u) : Words{};
  const Longs pairs = bits_of<Longs>(code);
  const EightBytes bytes = __builtin_convertvector(pairs | pairs >> 28, EightBytes);
  std::memcpy(packed, &bytes, sizeof bytes);
}

// The squared errors of values under a step, or under one each.
template <class Step>
inline Floats errors_of(Floats size, Step step, Step inverse) {
  Floats ratio = size * inverse;
  ratio = ratio > kE2m1Max ? all(kE2m1Max) : ratio;
  // The spacing of E2M1 is 0.5 below 2, 1 below 4, then 2; adding 1.5 x 2^23 rounds to whole numbers, ties to even.
  const Floats per = ratio < 2.0f ? all(2.0f) : (ratio < 4.0f ? all(1.0f) : all(0.5f));
  const Floats spacing = ratio < 2.0f ? all(0.5f) : (ratio < 4.0f ? all(1.0f) : all(2.0f));
  const Floats magic = all(12582912.0f);
  const Floats rounded = ((ratio * per + magic) - magic) * spacing;
  const Floats off = size - rounded * step;
  return off * off;
}

template <int64_t kKind>
inline Floats block_maxima(const void* values, int64_t first) {
  Words rows[kBatch];
  for (int64_t i = 0; i < kBatch; i++) rows[i] = size_bits(load<kKind>(values, first + i));
  return bits_of<Floats>(join_rows(rows, larger));
}

// "Four over six": each block's maximum becomes 6 or, under a scale half as large again, 4, as its error says.
template <int64_t kKind>
inline Words four_over_six(const void* values, int64_t first, Floats amax, float total, float global) {
  if (total == 0.0f) return scale_codes(all(1.0f));
  const float unit = total / kE2m1Max;
  Words codes[2];
  Floats errors[2];
  for (int way = 0; way < 2; way++) {
    const Floats wanted = (way ? amax * 1.5f : amax) / kE2m1Max;
    codes[way] = scale_codes(one_for_zero(wanted) * 256.0f / unit);
    const Floats steps = e4m3_values(codes[way]) * global, inverses = 1.0f / steps;
    float step[kBatch], inverse[kBatch];
    std::memcpy(step, &steps, sizeof step);
    std::memcpy(inverse, &inverses, sizeof inverse);
    Floats rows[kBatch];
    for (int64_t i = 0; i < kBatch; i++)
      rows[i] = errors_of(magnitude(load<kKind>(values, first + i)), step[i], inverse[i]);
    errors[way] = join_rows(rows, [](Floats a, Floats b) { return a + b; });
  }
  return errors[1] < errors[0] ? codes[1] : codes[0];
}

template <int kHalf>
inline void swap_halves(Floats* rows) {
  for (int i = 0; i < 16; i++) {
    if (i & kHalf) continue;
    const Floats first = halves<kHalf, false>(rows[i], rows[i + kHalf]);
    rows[i + kHalf] = halves<kHalf, true>(rows[i], rows[i + kHalf]);
    rows[i] = first;
  }
}

// Row i, lane j becomes row j, lane i.
inline void transpose(Floats* rows) {
  swap_halves<8>(rows);
  swap_halves<4>(rows);
  swap_halves<2>(rows);
  swap_halves<1>(rows);
}

inline bool any(Ints lanes) {
  const Longs pairs = bits_of<Longs>(lanes);
  uint64_t found = 0;
  for (int i = 0; i < 8; i++) found |= pairs[i];
  return found != 0;
}

// The squared error of sixteen blocks, a lane each, under a step of its own; rows are summed halves to halves.
inline Floats block_errors(const Floats* sizes, Floats step) {
  const Floats inverse = 1.0f / step;
  Floats rows[16];
  for (int i = 0; i < 16; i++) rows[i] = errors_of(sizes[i], step, inverse);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) rows[i] = rows[i] + rows[i + half];
  return rows[0];
}

// The E4M3 scale of each block with the least squared error; of several, the smallest. As `tafkir_sweep_scales`.
template <int64_t kKind>
inline Words sweep(const void* values, int64_t first, float global) {
  Floats sizes[16];
  for (int64_t i = 0; i < kBatch; i++) sizes[i] = magnitude(load<kKind>(values, first + i));
  transpose(sizes);
  Words most = {};
  for (int i = 0; i < 16; i++) most = larger(most, bits_of<Words>(sizes[i]));
  const Floats amax = bits_of<Floats>(most);
  const auto steps = [global](Words codes) { return e4m3_values(codes) * global; };
  // The smallest scale under which nothing saturates: a guess, and what it is off by.
  Words low = scale_codes(amax / (kE2m1Max * global));
  for (Ints less; any(less = (low > 1u) & (kE2m1Max * steps(low - 1u) >= amax));) low -= bits_of<Words>(less) & 1u;
  for (Ints more; any(more = (low < 126u) & (kE2m1Max * steps(low) < amax));) low += bits_of<Words>(more) & 1u;
  Floats best = block_errors(sizes, steps(low));
  Words chosen = low;
  // Below it, what the largest value loses by saturation alone rules all smaller ones out sooner or later.
  Words k = low;
  for (;;) {
    k -= bits_of<Words>(Ints(k > 0u)) & 1u;
    const Floats step = steps(k > 0u ? k : low), lost = amax - kE2m1Max * step;
    const Ints open = (k > 0u) & (lost * lost <= best);
    if (!any(open)) break;
    const Floats error = block_errors(sizes, step);
    const Ints better = open & (error <= best);
    best = better ? error : best;
    chosen = better ? k : chosen;
  }
  // Above it, twice a scale that saturates nothing is never better than the scale: its grid is a part of the other.
  Words last = low + 7u;
  last = last > 15u ? last : all_words(15u);
  last = last < 126u ? last : all_words(126u);
  for (k = low + 1u;; k += 1u) {
    const Ints open = k <= last;
    if (!any(open)) break;
    const Floats error = block_errors(sizes, steps(open ? k : low));
    const Ints better = open & (error < best);
    best = better ? error : best;
    chosen = better ? k : chosen;
  }
  return chosen;
}

// As compressed-tensors: a sixth of the maximum in the weight's dtype, and 0.125 where the scale would round to 0.
template <int64_t kKind>
inline Words inverse_codes(Floats amax, float global) {
  Floats sixth = amax / kE2m1Max;
  if (kKind == kBfloat16) sixth = rounded_to_bfloat16(sixth);
  Floats wanted = global * sixth;
  wanted = wanted > kFp8Max ? all(kFp8Max) : wanted;
  const Words codes = e4m3_codes(wanted);
  return codes == 0u ? all_words(0x20u) : codes;
}

// Sixteen blocks, 128 bytes of codes.
template <int64_t kKind>
void quantize_batch(const void* values, int64_t first, int64_t rule, float total, float global, uint8_t* scale,
                    uint8_t* packed) {
  Words codes;
  if (rule == kMse) {
    codes = sweep<kKind>(values, first, global);
  } else {
    const Floats amax = block_maxima<kKind>(values, first);
    if (rule == kMax) codes = scale_codes(one_for_zero(amax / (kE2m1Max * global)));
    else if (rule == kInverse) codes = inverse_codes<kKind>(amax, global);
    else codes = four_over_six<kKind>(values, first, amax, total, global);
  }
  const Bytes narrow = __builtin_convertvector(codes, Bytes);
  std::memcpy(scale, &narrow, sizeof narrow);
  const Floats steps = rule == kInverse ? e4m3_values(codes) / global : e4m3_values(codes) * global;
  float step[kBatch];
  std::memcpy(step, &steps, sizeof step);
  for (int64_t i = 0; i < kBatch; i++) encode(load<kKind>(values, first + i), step[i], packed + i * kBlock / 2);
}

template <int64_t kKind>
void quantize_blocks(const void* values, int64_t blocks, int64_t rule, float total, float global, uint8_t* scale,
                     uint8_t* packed) {
  int64_t done = 0;
  for (; done + kBatch <= blocks; done += kBatch)
    quantize_batch<kKind>(values, done, rule, total, global, scale + done, packed + done * kBlock / 2);
  if (done == blocks) return;
  // What is left, filled up with zeros.
  constexpr int64_t kBytes = kBlock * (kKind == kBfloat16 ? 2 : 4);
  char rest[kBatch * kBytes] = {};
  uint8_t rest_scale[kBatch], rest_packed[kBatch * kBlock / 2];
  std::memcpy(rest, static_cast<const char*>(values) + done * kBytes, (blocks - done) * kBytes);
  quantize_batch<kKind>(rest, 0, rule, total, global, rest_scale, rest_packed);
  std::memcpy(scale + done, rest_scale, blocks - done);
  std::memcpy(packed + done * kBlock / 2, rest_packed, (blocks - done) * kBlock / 2);
}

// Signed E4M3 codes of numbers; beyond 448 saturated.
inline Bytes fp8_codes(Floats ratio) {
  Floats size = magnitude(ratio);
  size = size > kFp8Max ? all(kFp8Max) : size;
  return __builtin_convertvector(e4m3_codes(size) | (bits_of<Words>(ratio) >> 24 & 0x80u), Bytes);
}

// Up to sixteen values; the rest are zeros.
template <int64_t kKind>
inline Floats load_some(const void* values, int64_t at, int64_t count) {
  if (kKind == kBfloat16) {
    Halves half = {};
    std::memcpy(&half, static_cast<const uint16_t*>(values) + at, std::min(count, kBlock) * 2);
    return bits_of<Floats>(__builtin_convertvector(half, Words) << 16);
  }
  Floats out = {};
  std::memcpy(&out, static_cast<const float*>(values) + at, std::min(count, kBlock) * 4);
  return out;
}

// A rectangle of a matrix to E4M3 under one scale, amax / 448; one for zeros.
template <int64_t kKind>
float quantize_tile(const void* values, int64_t width, int64_t rows, int64_t columns, float tiny, uint8_t* codes) {
  Words most = {};
  for (int64_t row = 0; row < rows; row++)
    for (int64_t k = 0; k < columns; k += kBlock)
      most = larger(most, size_bits(load_some<kKind>(values, row * width + k, columns - k)));
  uint32_t top = 0;
  for (int lane = 0; lane < 16; lane++) top = std::max(top, (uint32_t)most[lane]);
  const float amax = bits_of<float>(top);
  float scale = amax / kFp8Max;
  if (!(tiny > 0.0f ? amax > 0.0f : scale > 0.0f)) scale = 1.0f;
  scale = std::max(scale, tiny);
  for (int64_t row = 0; row < rows; row++)
    for (int64_t k = 0; k < columns; k += kBlock) {
      const Bytes made = fp8_codes(load_some<kKind>(values, row * width + k, columns - k) / scale);
      std::memcpy(codes + row * width + k, &made, std::min(columns - k, kBlock));
    }
  return scale;
}

template <int64_t kKind>
void quantize_tiles(const void* values, int64_t rows, int64_t width, int64_t tile_rows, int64_t tile_columns,
                    float tiny, uint8_t* codes, float* scale) {
  constexpr int64_t kBytes = kKind == kBfloat16 ? 2 : 4;
  for (int64_t row = 0; row < rows; row += tile_rows)
    for (int64_t k = 0; k < width; k += tile_columns) {
      const int64_t at = row * width + k;
      *scale++ = quantize_tile<kKind>(static_cast<const char*>(values) + at * kBytes, width,
                                      std::min(tile_rows, rows - row), std::min(tile_columns, width - k), tiny,
                                      codes + at);
    }
}

}  // namespace

// The largest magnitude of `count` numbers, joined with `*amax`; NaN above all. float32 or bfloat16.
EXPORT int tafkir_weight_amax(const void* values, int64_t kind, int64_t count, float* amax) {
  Words most = {};
  int64_t i = 0;
  if (kind == kBfloat16) {
    // Two numbers a lane: without their signs, the upper one orders the whole word, and the lower one is shifted up.
    const uint16_t* half = static_cast<const uint16_t*>(values);
    Words low = {};
    for (; i + 32 <= count; i += 32) {
      Words pair;
      std::memcpy(&pair, half + i, sizeof pair);
      most = larger(most, pair & 0x7fff0000u);
      low = larger(low, pair << 16 & 0x7fff0000u);
    }
    most = larger(most, low);
    for (; i < count; i += kBlock) most = larger(most, size_bits(load_some<kBfloat16>(values, i, count - i)));
  } else {
    for (; i < count; i += kBlock) most = larger(most, size_bits(load_some<kFloat32>(values, i, count - i)));
  }
  uint32_t top = bits_of<uint32_t>(*amax);
  for (int lane = 0; lane < 16; lane++) top = std::max(top, (uint32_t)most[lane]);
  *amax = bits_of<float>(top);
  return 0;
}

// The global scale of a weight whose largest magnitude is `total`; by kInverse one to divide by.
EXPORT int tafkir_global_scale(int64_t kind, int64_t rule, float total, float* global) {
  const float tiny = std::numeric_limits<float>::min(), top = rule == kFourOverSix ? 256.0f : kFp8Max;
  *global = 1.0f;
  if (total == 0.0f) return 0;
  *global = std::max(total / (kE2m1Max * top), tiny);
  if (rule != kInverse) return 0;
  // Torch divides a number by a tensor as the number times the tensor's reciprocal, each rounded to its dtype.
  float inverse = kind == kBfloat16 ? rounded_to_bfloat16(total) : total;
  inverse = 1.0f / std::max(inverse, tiny);
  if (kind == kBfloat16) inverse = rounded_to_bfloat16(inverse);
  inverse *= kE2m1Max * kFp8Max;
  if (kind == kBfloat16) inverse = rounded_to_bfloat16(inverse);
  *global = std::isfinite(inverse) ? inverse : 1.0f / *global;
  return 0;
}

// Block scales (a byte each) and packed codes (eight bytes a block) under a global scale.
EXPORT int tafkir_quantize_weight(const void* values, int64_t kind, int64_t blocks, int64_t rule, float total,
                                  float global, uint8_t* scale, uint8_t* packed) {
  if (kind == kBfloat16) quantize_blocks<kBfloat16>(values, blocks, rule, total, global, scale, packed);
  else quantize_blocks<kFloat32>(values, blocks, rule, total, global, scale, packed);
  return 0;
}

// E4M3 codes and float32 scales, one for each tile; `tiny` is the least scale. Returns 0.
EXPORT int tafkir_quantize_tiles(const void* values, int64_t kind, int64_t rows, int64_t width, int64_t tile_rows,
                                 int64_t tile_columns, float tiny, uint8_t* codes, float* scale) {
  if (kind == kBfloat16)
    quantize_tiles<kBfloat16>(values, rows, width, tile_rows, tile_columns, tiny, codes, scale);
  else
    quantize_tiles<kFloat32>(values, rows, width, tile_rows, tile_columns, tiny, codes, scale);
  return 0;
}

// Scales as float32: from float32, bfloat16 or E8M0. Returns 1 where one is negative or not finite.
EXPORT int tafkir_widen_scales(const void* stored, int64_t kind, int64_t count, float* scale) {
  bool bad = false;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    if (kind == kBfloat16) bits = (uint32_t)static_cast<const uint16_t*>(stored)[i] << 16;
    else if (kind == kFloat32) std::memcpy(&bits, static_cast<const char*>(stored) + i * 4, 4);
    else {
      const uint32_t code = static_cast<const uint8_t*>(stored)[i];
      bits = code == 0 ? 0x00400000u : code == 255 ? 0x7fc00000u : code << 23;
    }
    bad |= bits >= kInfinity && bits != 0x80000000u;
    std::memcpy(scale + i, &bits, 4);
  }
  return bad;
}

// value = code x scale of its block, in float32, rounded to bfloat16. `rows` from row `first` of the matrix on, whose
// scales have `scale_columns` a row. Returns 1 where a value is not finite.
EXPORT int tafkir_fp8_to_bfloat16(const uint8_t* codes, const float* scales, int64_t first, int64_t rows,
                                  int64_t width, int64_t block_rows, int64_t block_columns, int64_t scale_columns,
                                  uint16_t* out) {
  Words most = {};
  for (int64_t row = 0; row < rows; row++) {
    const float* scale = scales + (first + row) / block_rows * scale_columns;
    for (int64_t block = 0; block < scale_columns; block++) {
      const int64_t end = std::min(width, (block + 1) * block_columns);
      for (int64_t k = block * block_columns; k < end; k += kBlock) {
        const int64_t count = std::min(kBlock, end - k);
        Bytes narrow = {};
        std::memcpy(&narrow, codes + row * width + k, count);
        const Words code = __builtin_convertvector(narrow, Words), size = code & 0x7fu;
        Words bits = bits_of<Words>(e4m3_values(size) * scale[block]);
        bits = size == 0x7fu ? all_words(0x7fc00000u) : bits;
        bits = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        most = larger(most, bits);
        bits |= code << 8 & 0x8000u;
        const Halves half = __builtin_convertvector(bits, Halves);
        std::memcpy(out + row * width + k, &half, count * 2);
      }
    }
  }
  uint32_t top = 0;
  for (int lane = 0; lane < 16; lane++) top = std::max(top, (uint32_t)most[lane]);
  return top >= kInfinity >> 16;
}
