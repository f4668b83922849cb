// Number formats: block maxima, E2M1 codes, the search for block scales, and what values become in NVFP4, over blocks
// of 16 values.
//
// One vector of 16 floats is one block. Every result is bit for bit that of the torch code in ops/, so no product may
// be fused with a sum, whatever the other files allow.

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <cstdint>
#include <cstring>
#include <limits>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kBlock = 16;
constexpr int kScales = 127;  // E4M3 numbers from 0 to 448

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

enum Kind : int64_t { kFloat32 = 0, kBfloat16 = 1 };

inline Floats as_floats(Words bits) {
  Floats out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline Words as_words(Floats values) {
  Words out;
  std::memcpy(&out, &values, sizeof out);
  return out;
}

inline Floats load(const void* values, int64_t kind, int64_t block) {
  if (kind == kBfloat16) {
    Halves half;
    std::memcpy(&half, static_cast<const uint16_t*>(values) + block * kBlock, sizeof half);
    return as_floats(__builtin_convertvector(half, Words) << 16);
  }
  Floats out;
  std::memcpy(&out, static_cast<const float*>(values) + block * kBlock, sizeof out);
  return out;
}

inline Floats magnitude(Floats x) { return as_floats(as_words(x) & 0x7fffffffu); }

template <int kShift, class Vector>
inline Vector shifted(Vector x) {
  const Ints from = {kShift,      kShift + 1,  kShift + 2,  kShift + 3,  kShift + 4,  kShift + 5,
                     kShift + 6,  kShift + 7,  kShift + 8,  kShift + 9,  kShift + 10, kShift + 11,
                     kShift + 12, kShift + 13, kShift + 14, kShift + 15};
  return __builtin_shuffle(x, from & 15);
}

// As integers, the bits of magnitudes are in the order of the numbers, with NaN above them all.
inline float largest(Floats size) {
  Words bits = as_words(size), other;
  other = shifted<8>(bits), bits = bits > other ? bits : other;
  other = shifted<4>(bits), bits = bits > other ? bits : other;
  other = shifted<2>(bits), bits = bits > other ? bits : other;
  other = shifted<1>(bits), bits = bits > other ? bits : other;
  return as_floats(bits)[0];
}

// Halves added to halves: the order in which the reference sums, too.
inline float tree_sum(Floats x) {
  x = x + shifted<8>(x);
  x = x + shifted<4>(x);
  x = x + shifted<2>(x);
  x = x + shifted<1>(x);
  return x[0];
}

// Seven comparisons; which of them are strict says to which side a tie goes (to the even code).
inline Ints codes_of(Floats size) {
  Ints code = -(size > 0.25f);
  code -= size >= 0.75f;
  code -= size > 1.25f;
  code -= size >= 1.75f;
  code -= size > 2.5f;
  code -= size >= 3.5f;
  code -= size > 5.0f;
  return code;
}

inline uint64_t squeeze(uint64_t nibbles) {
  uint64_t x = (nibbles | nibbles >> 4) & 0x00ff00ff00ff00ffull;
  x = (x | x >> 8) & 0x0000ffff0000ffffull;
  return (x | x >> 16) & 0xffffffffull;
}

// What the squared error of a block is under one step.
inline float error_of(Floats size, float step) {
  const float inverse = 1.0f / step;
  Floats ratio = size * inverse;
  ratio = ratio > 6.0f ? (Floats{} + 6.0f) : ratio;
  // The spacing of E2M1 is 0.5 below 2, 1 below 4, then 2; adding 1.5 x 2^23 rounds to whole numbers, ties to even.
  const Floats per = ratio < 2.0f ? (Floats{} + 2.0f) : (ratio < 4.0f ? (Floats{} + 1.0f) : (Floats{} + 0.5f));
  const Floats spacing = ratio < 2.0f ? (Floats{} + 0.5f) : (ratio < 4.0f ? (Floats{} + 1.0f) : (Floats{} + 2.0f));
  const Floats magic = Floats{} + 12582912.0f;
  const Floats rounded = ((ratio * per + magic) - magic) * spacing;
  const Floats off = size - rounded * step;
  return tree_sum(off * off);
}

inline float e4m3_value(int code) {
  const int exponent = code >> 3, mantissa = code & 7;
  if (exponent == 0) return mantissa * 0.001953125f;
  uint32_t bits = (uint32_t)(exponent + 120) << 23 | (uint32_t)mantissa << 20;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// The E4M3 number nearest to a positive one, between the smallest (2^-9) and 448; ties to the even code.
inline uint8_t e4m3_code(float x) {
  x = x < 0.001953125f ? 0.001953125f : x;
  x = x > 448.0f ? 448.0f : x;
  if (x < 0.015625f) return (uint8_t)(int)((x * 512.0f + 12582912.0f) - 12582912.0f);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits += 0x7ffffu + (bits >> 20 & 1);
  return (uint8_t)((bits >> 20) - (120 << 3));
}

inline void encode(Floats x, float step, uint8_t* packed) {
  const Floats ratio = x / step;
  Ints code = codes_of(magnitude(ratio));
  code |= -(ratio < 0.0f) << 3;
  const Bytes bytes = __builtin_convertvector(code, Bytes);
  uint64_t pair[2];
  std::memcpy(pair, &bytes, sizeof pair);
  const uint64_t word = squeeze(pair[0]) | squeeze(pair[1]) << 32;
  std::memcpy(packed, &word, 8);
}

}  // namespace

// Largest magnitude of each block.
EXPORT int tafkir_block_amax(int threads, const void* values, int64_t kind, int64_t blocks, float* amax) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < blocks; i++) amax[i] = largest(magnitude(load(values, kind, i)));
  return 0;
}

// Eight bytes a block: the codes of value / step, the even one in the low nibble.
EXPORT int tafkir_encode_e2m1(int threads, const void* values, int64_t kind, int64_t blocks, const float* steps,
                              uint8_t* packed) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < blocks; i++) encode(load(values, kind, i), steps[i], packed + i * 8);
  return 0;
}

// Block maxima, their E4M3 scales under a global scale, and the codes, in one pass.
EXPORT int tafkir_quantize_nvfp4(int threads, const void* values, int64_t kind, int64_t blocks, float global_scale,
                                 uint8_t* scale, uint8_t* packed) {
  const float unit = 6.0f * global_scale;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < blocks; i++) {
    const Floats x = load(values, kind, i);
    const float wanted = largest(magnitude(x)) / unit;
    scale[i] = e4m3_code(wanted == 0.0f ? 1.0f : wanted);
    encode(x, e4m3_value(scale[i]) * global_scale, packed + i * 8);
  }
  return 0;
}

// 1 where the second step has the smaller squared error, else 0.
EXPORT int tafkir_pick_step(int threads, const void* values, int64_t kind, int64_t blocks, const float* first,
                            const float* second, uint8_t* picked) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < blocks; i++) {
    const Floats size = magnitude(load(values, kind, i));
    picked[i] = error_of(size, second[i]) < error_of(size, first[i]);
  }
  return 0;
}

// The E4M3 scale of each block with the least squared error; of several, the smallest.
EXPORT int tafkir_sweep_scales(int threads, const void* values, int64_t kind, int64_t blocks, float global_scale,
                               uint8_t* scale) {
  float steps[kScales];
  for (int k = 0; k < kScales; k++) steps[k] = e4m3_value(k) * global_scale;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < blocks; i++) {
    const Floats size = magnitude(load(values, kind, i));
    const float amax = largest(size);
    int low = 1, high = kScales - 1;  // the smallest scale under which nothing saturates
    while (low < high) {
      const int middle = (low + high) / 2;
      if (6.0f * steps[middle] >= amax) high = middle;
      else low = middle + 1;
    }
    float best = error_of(size, steps[low]);
    int chosen = low;
    // Below it, what the largest value loses by saturation alone rules all smaller ones out sooner or later.
    for (int k = low - 1; k >= 1; k--) {
      const float lost = amax - 6.0f * steps[k];
      if (lost * lost > best) break;
      const float error = error_of(size, steps[k]);
      if (error <= best) best = error, chosen = k;
    }
    // Above it, twice a scale that saturates nothing is never better than the scale: its grid is a part of the other.
    const int last = low + 7 > 15 ? low + 7 : 15;
    for (int k = low + 1; k <= last && k < kScales; k++) {
      const float error = error_of(size, steps[k]);
      if (error < best) best = error, chosen = k;
    }
    scale[i] = (uint8_t)chosen;
  }
  return 0;
}

namespace {

// What the values of a block are worth as codes under a step.
inline Floats rounded(Floats x, float step) {
  Floats ratio = magnitude(x) / step;
  ratio = ratio > 6.0f ? (Floats{} + 6.0f) : ratio;
  const Floats per = ratio < 2.0f ? (Floats{} + 2.0f) : (ratio < 4.0f ? (Floats{} + 1.0f) : (Floats{} + 0.5f));
  const Floats spacing = ratio < 2.0f ? (Floats{} + 0.5f) : (ratio < 4.0f ? (Floats{} + 1.0f) : (Floats{} + 2.0f));
  const Floats magic = Floats{} + 12582912.0f;
  const Floats size = ((ratio * per + magic) - magic) * spacing * step;
  return as_floats(as_words(size) | (x < 0.0f ? (Words{} + 0x80000000u) : Words{}));
}

// E4M3 of "four over six", in the order of operations of the reference.
inline float static_scale(float amax, float total) {
  const float wanted = amax / 6.0f;
  return e4m3_value(e4m3_code((wanted == 0.0f ? 1.0f : wanted) * 256.0f / (total / 6.0f)));
}

}  // namespace

// Matrices of `blocks` blocks each, with a global scale of their own, to what they are in NVFP4. `rule` 0 scales a
// block by its maximum; 1 is "four over six", for which `totals` are the maxima of the matrices. Returns a sum: 1 where
// a value lies beyond the cell of its last code (more than 7 steps), 2 where one is not finite.
EXPORT int tafkir_round_nvfp4(int threads, const void* values, int64_t kind, int64_t matrices, int64_t blocks,
                              const float* totals, const float* globals, int64_t rule, float* out) {
  int clipped = 0, broken = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : clipped, broken)
  for (int64_t i = 0; i < matrices * blocks; i++) {
    const float global = globals[i / blocks], total = totals[i / blocks];
    const Floats x = load(values, kind, i);
    const float amax = largest(magnitude(x));
    float step;
    if (rule == 0) {
      const float wanted = amax / (6.0f * global);
      step = e4m3_value(e4m3_code(wanted == 0.0f ? 1.0f : wanted)) * global;
    } else if (total == 0.0f) {
      step = global;
    } else {
      const float six = static_scale(amax, total) * global, four = static_scale(amax * 1.5f, total) * global;
      const Floats size = magnitude(x);
      step = error_of(size, four) < error_of(size, six) ? four : six;
    }
    broken |= !(amax <= std::numeric_limits<float>::max());
    clipped |= amax > 7.0f * step;
    const Floats y = rounded(x, step);
    std::memcpy(out + i * kBlock, &y, sizeof y);
  }
  return clipped + 2 * broken;
}
