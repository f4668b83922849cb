// Attention over a paged cache and matrix products, a token at a time: a token's sums never depend on what else is
// computed, so that a request's numbers are the same to the bit in every batch.

#include "shared.h"

namespace {

// Tokens of a block; keys of a block lie dim by dim, so that one multiply-add serves all of its tokens.
constexpr int64_t kBlock = 16;
// Query heads that read a block together.
constexpr int64_t kTile = 4;

typedef float Lanes __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

inline Lanes load(const float* from) {
  Lanes x;
  std::memcpy(&x, from, 64);
  return x;
}

inline Lanes load(const uint16_t* bfloat16) {
  Halves halves;
  std::memcpy(&halves, bfloat16, 32);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Lanes x;
  std::memcpy(&x, &words, 64);
  return x;
}

inline float wide(float x) { return x; }
inline float wide(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline float total(const Lanes& x) {
  float sum = 0.0f;
  for (int j = 0; j < kBlock; j++) sum += x[j];
  return sum;
}

template <typename T, int TILE>
void score_block(const float* q, const T* keys, int64_t dim, float scale, float* scores, int64_t stride) {
  Lanes sums[TILE] = {};
  for (int64_t i = 0; i < dim; i++) {
    const Lanes key = load(keys + i * kBlock);
#pragma GCC unroll 4
    for (int t = 0; t < TILE; t++) sums[t] += q[t * dim + i] * key;
  }
  for (int t = 0; t < TILE; t++) {
    const Lanes scaled = sums[t] * scale;
    std::memcpy(scores + t * stride, &scaled, 64);
  }
}

// Scores to weights that sum to one; what lies beyond `length`, up to the block's end, gets none.
void weigh(float* RESTRICT scores, int64_t length, int64_t padded) {
  float top = -INFINITY;
  for (int64_t j = 0; j < length; j++) top = std::max(top, scores[j]);
  for (int64_t j = length; j < padded; j++) scores[j] = -INFINITY;
  Lanes sums = {};
  for (int64_t b = 0; b < padded; b += kBlock) {
#pragma omp simd
    for (int64_t j = b; j < b + kBlock; j++) scores[j] = fast_exp(scores[j] - top);
    sums += load(scores + b);
  }
  const float factor = 1.0f / total(sums);
#pragma omp simd
  for (int64_t j = 0; j < padded; j++) scores[j] *= factor;
}

template <typename T, int TILE>
void add_values(const float* weights, int64_t stride, const T* values, int64_t count, int64_t dim, float* out) {
  int64_t i = 0;
  for (; i + kBlock <= dim; i += kBlock) {
    Lanes sums[TILE];
    for (int t = 0; t < TILE; t++) sums[t] = load(out + t * dim + i);
    for (int64_t j = 0; j < count; j++) {
      const Lanes value = load(values + j * dim + i);
#pragma GCC unroll 4
      for (int t = 0; t < TILE; t++) sums[t] += weights[t * stride + j] * value;
    }
    for (int t = 0; t < TILE; t++) std::memcpy(out + t * dim + i, &sums[t], 64);
  }
  for (; i < dim; i++)
    for (int t = 0; t < TILE; t++)
      for (int64_t j = 0; j < count; j++) out[t * dim + i] += weights[t * stride + j] * wide(values[j * dim + i]);
}

template <typename T, int TILE>
void attend_tile(const float* q, const T* keys, const T* values, const int64_t* table, int64_t block_numbers,
                 int64_t length, int64_t dim, float scale, float* scores, float* out) {
  const int64_t blocks = (length + kBlock - 1) / kBlock, padded = blocks * kBlock;
  for (int64_t b = 0; b < blocks; b++)
    score_block<T, TILE>(q, keys + table[b] * block_numbers, dim, scale, scores + b * kBlock, padded);
  for (int t = 0; t < TILE; t++) weigh(scores + t * padded, length, padded);
  std::fill(out, out + TILE * dim, 0.0f);
  for (int64_t b = 0; b < blocks; b++)
    add_values<T, TILE>(scores + b * kBlock, padded, values + table[b] * block_numbers,
                        std::min(kBlock, length - b * kBlock), dim, out);
}

template <typename T>
void paged_attention(int threads, const float* q, const T* k, const T* v, T* keys, T* values, const int64_t* tables,
                     const int64_t* rows, const int64_t* positions, int64_t tokens, int64_t heads, int64_t kv_heads,
                     int64_t dim, int64_t width, float scale, float* out) {
  const int64_t repeats = heads / kv_heads, head_numbers = dim * kBlock, block_numbers = kv_heads * head_numbers;
  for (int64_t n = 0; n < tokens; n++) {
    const int64_t block = tables[rows[n] * width + positions[n] / kBlock], place = positions[n] % kBlock;
    for (int64_t g = 0; g < kv_heads; g++) {
      const int64_t from = (n * kv_heads + g) * dim, to = block * block_numbers + g * head_numbers;
      for (int64_t i = 0; i < dim; i++) keys[to + i * kBlock + place] = k[from + i];
      std::copy(v + from, v + from + dim, values + to + place * dim);
    }
  }
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scores;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < tokens * kv_heads; item++) {
      const int64_t n = item / kv_heads, g = item % kv_heads, length = positions[n] + 1;
      scores.resize(std::max(scores.size(), (size_t)(kTile * (length + kBlock))));
      const int64_t* table = tables + rows[n] * width;
      const T *own_keys = keys + g * head_numbers, *own_values = values + g * head_numbers;
      for (int64_t r = 0; r < repeats; r += kTile) {
        const int64_t first = (n * heads + g * repeats + r) * dim;
        const auto run = [&](auto attend) {
          attend(q + first, own_keys, own_values, table, block_numbers, length, dim, scale, scores.data(), out + first);
        };
        switch (std::min(kTile, repeats - r)) {
          case 1: run(attend_tile<T, 1>); break;
          case 2: run(attend_tile<T, 2>); break;
          case 3: run(attend_tile<T, 3>); break;
          default: run(attend_tile<T, 4>);
        }
      }
    }
  }
}

// A tile of products: each is sixteen partial sums along the inner dim, then their sum, then what is left of it.
template <typename T, int ROWS, int COLUMNS>
void product_tile(const float* x, const T* w, int64_t inner, int64_t outer, float* out) {
  Lanes sums[ROWS][COLUMNS] = {};
  int64_t i = 0;
  for (; i + kBlock <= inner; i += kBlock) {
    Lanes weight[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) weight[c] = load(w + c * inner + i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      const Lanes row = load(x + r * inner + i);
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; c++) sums[r][c] += row * weight[c];
    }
  }
  for (int r = 0; r < ROWS; r++) {
    for (int c = 0; c < COLUMNS; c++) {
      float sum = total(sums[r][c]);
      for (int64_t j = i; j < inner; j++) sum = std::fma(x[r * inner + j], wide(w[c * inner + j]), sum);
      out[r * outer + c] = sum;
    }
  }
}

template <typename T, int COLUMNS>
void product_rows(const float* x, const T* w, int64_t rows, int64_t inner, int64_t outer, float* out) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) product_tile<T, 4, COLUMNS>(x + m * inner, w, inner, outer, out + m * outer);
  for (; m < rows; m++) product_tile<T, 1, COLUMNS>(x + m * inner, w, inner, outer, out + m * outer);
}

template <typename T>
void row_linear(int threads, const float* x, const T* w, int64_t rows, int64_t inner, int64_t outer, float* out) {
  // Rows that stay in a core's cache while all weights pass by.
  const int64_t step = std::max<int64_t>(4, (int64_t)(1 << 16) / inner / 4 * 4), columns = (outer + 3) / 4;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < columns; c++) {
    const int64_t n = 4 * c;
    for (int64_t m = 0; m < rows; m += step) {
      const int64_t count = std::min(step, rows - m);
      if (n + 4 <= outer)
        product_rows<T, 4>(x + m * inner, w + n * inner, count, inner, outer, out + m * outer + n);
      else
        for (int64_t last = n; last < outer; last++)
          product_rows<T, 1>(x + m * inner, w + last * inner, count, inner, outer, out + m * outer + last);
    }
  }
}

}  // namespace

extern "C" {

// Put each token's key and value at its place, then let it attend to all places of its row up to its own. Keys are
// [blocks, kv heads, dim, 16], values [blocks, kv heads, 16, dim]; `tables` names the blocks of each row, `width` a row.
int tafkir_paged_attention(int threads, const float* q, const void* k, const void* v, void* keys, void* values,
                           const int64_t* tables, const int64_t* rows, const int64_t* positions, int64_t bfloat16,
                           int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t width, float scale,
                           float* out) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    paged_attention<T>(threads, q, (const T*)k, (const T*)v, (T*)keys, (T*)values, tables, rows, positions, tokens,
                       heads, kv_heads, dim, width, scale, out);
  };
  if (bfloat16)
    run(uint16_t{});
  else
    run(0.0f);
  return 0;
}

// x W^T in float32, x [rows, inner], W [outer, inner]; every number is the same sum whatever the number of rows.
int tafkir_row_linear(int threads, const float* x, const void* w, int64_t bfloat16, int64_t rows, int64_t inner,
                      int64_t outer, float* out) {
  if (bfloat16)
    row_linear(threads, x, (const uint16_t*)w, rows, inner, outer, out);
  else
    row_linear(threads, x, (const float*)w, rows, inner, outer, out);
  return 0;
}
}
