// A few tokens at a time through a decoder whose weights stay as they are stored: float32, bfloat16, INT8, FP8 or four
// bits. Activations and sums are float32. See tafkir.ops.packed and tafkir.models.decode_step.
//
// Every output is summed in one order, whatever the number of tokens and threads: sixteen lanes over the columns, then
// halves to halves. So a token's numbers do not depend on who else is in the batch.

#include "shared.h"
#include "vectors.h"

namespace {

enum Format : int64_t { kF32 = 0, kBf16 = 1, kInt8 = 2, kFp8 = 3, kNvfp4 = 4, kNvfp4Inverse = 5 };

constexpr int64_t kLanes = 16, kPanel = 16, kMany = 3;

}  // namespace

// As ops/packed.py lays it out. INT8 and FP8 have a float32 scale for each tile; NVFP4 an E4M3 one for each 16 columns,
// times `total` (or over it). Columns are a multiple of 16, and so are those of a tile.
struct Matrix {
  int64_t format, rows, columns, tile_rows, tile_columns;
  const void *codes, *scales;
  double total;
};

// One layer; what it has not is null. `experts_in` holds `expert_parts` matrices for each expert, `experts_out` one.
struct Layer {
  int64_t hidden, heads, kv_heads, head_dim, half, width, experts, active, groups, open_groups, sigmoid, normalise;
  int64_t qkv_parts, wide_parts, expert_parts;
  double eps, scaling;
  const float *attention_norm, *mlp_norm, *q_norm, *k_norm, *qkv_bias, *out_bias, *router_bias;
  const Matrix *qkv, *out, *wide, *down, *router, *experts_in, *experts_out;
};

extern "C" int tafkir_choose_experts(int threads, const float* scores, const float* bias, int64_t n, int64_t experts,
                                     int64_t groups, int64_t open_groups, int64_t active, int64_t* ids);

namespace {

// `kPerLine` columns stand in a line of the cache.
struct F32Row {
  static constexpr bool kCoded = false;
  static constexpr int64_t kPerLine = 16;
  const float* codes;
  Floats at(int64_t c) const { return load_as<Floats>(codes + c); }
};

struct Bf16Row {
  static constexpr bool kCoded = false;
  static constexpr int64_t kPerLine = 32;
  const uint16_t* codes;
  Floats at(int64_t c) const { return bfloat16_values(codes + c); }
};

struct Int8Row {
  static constexpr bool kCoded = true;
  static constexpr int64_t kPerLine = 64;
  const int8_t* codes;
  const float* steps;
  Floats at(int64_t c) const {
    return __builtin_convertvector(wide_signed_bytes(codes + c), Floats) * steps[c / kLanes];
  }
};

struct Fp8Row {
  static constexpr bool kCoded = true;
  static constexpr int64_t kPerLine = 64;
  const uint8_t* codes;
  const float* steps;
  Floats at(int64_t c) const {
    const Words bits = wide_bytes(codes + c);
    const Words sign = (bits & 0x80u) << 24;
    return bits_of<Floats>(bits_of<Words>(e4m3_values(bits & 0x7fu)) | sign) * steps[c / kLanes];
  }
};

// Two codes a byte, the first in the low half: each byte spreads over two lanes, which look their values up.
struct E2m1Row {
  static constexpr bool kCoded = true;
  static constexpr int64_t kPerLine = 128;
  const uint8_t* codes;
  const float* steps;
  Floats at(int64_t c) const {
    const Floats values = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
                           -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    const Longs pairs = wide_eight_bytes(codes + c / 2);
    const Ints index = bits_of<Ints>((pairs | pairs << 28) & 0x0000000f0000000full);
    return __builtin_shuffle(values, index) * steps[c / kLanes];
  }
};

// kRows x kTokens = 16 inner products; lane t * kRows + r is that of row r and token t. With kAhead, the codes of the
// next panel are asked for: the processor's own guess fails with so many rows at once.
template <int kRows, int kTokens, bool kAhead, class Row>
inline Floats products(const Row* rows, const float* const* x, int64_t columns) {
  Floats sums[16] = {};
  const int64_t ahead = kPanel * columns * 64 / Row::kPerLine;
  for (int64_t c = 0; c < columns; c += kLanes) {
    Floats w[kRows];
    if (kAhead && c % Row::kPerLine == 0)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++)
        __builtin_prefetch(reinterpret_cast<const char*>(rows[r].codes) + ahead + c * 64 / Row::kPerLine);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) w[r] = rows[r].at(c);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; t++) {
      const Floats v = load_as<Floats>(x[t] + c);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) sums[t * kRows + r] += w[r] * v;
    }
  }
  return join_rows(sums, [](Floats a, Floats b) { return a + b; });
}

// The output of some tokens: `out` + token * `stride` holds the rows of a matrix.
struct Output {
  float* out;
  int64_t stride, rows;
  template <int kRows, int kTokens>
  void put(const Floats& sums, int64_t row, int64_t token, int64_t tokens) const {
    const int64_t count = std::min<int64_t>(kRows, rows - row);
    for (int64_t t = 0; t < std::min<int64_t>(kTokens, tokens - token); t++)
      for (int64_t r = 0; r < count; r++) out[(token + t) * stride + row + r] = sums[t * kRows + r];
  }
};

// Sixteen rows of a matrix times n tokens.
template <class Row>
inline void panel(const Row* rows, int64_t first, const float* const* x, int64_t n, int64_t columns, const Output& to,
                  float* decoded) {
  if (n == 1) return to.put<16, 1>(products<16, 1, true>(rows, x, columns), first, 0, n);
  if (n < kMany) {
    for (int64_t r = 0; r < kPanel; r += 8) to.put<8, 2>(products<8, 2, true>(rows + r, x, columns), first + r, 0, n);
    return;
  }
  for (int64_t r = 0; r < kPanel && first + r < to.rows; r += 4) {
    F32Row plain[4];
    if (Row::kCoded)
      for (int i = 0; i < 4; i++) {
        float* place = decoded + i * columns;
        for (int64_t c = 0; c < columns; c += kLanes) {
          const Floats w = rows[r + i].at(c);
          std::memcpy(place + c, &w, sizeof w);
        }
        plain[i] = {place};
      }
    for (int64_t t = 0; t < n; t += 4) {
      const float* const four[4] = {x[t], x[std::min(t + 1, n - 1)], x[std::min(t + 2, n - 1)],
                                    x[std::min(t + 3, n - 1)]};
      const Floats sums = Row::kCoded ? products<4, 4, false>(plain, four, columns) : products<4, 4, false>(rows + r, four, columns);
      to.put<4, 4>(sums, first + r, t, n);
    }
  }
}

// What every code of a row is multiplied by, one number for each 16 columns.
void row_steps(const Matrix& m, int64_t row, float* steps) {
  const int64_t blocks = m.columns / kLanes;
  if (m.format == kInt8 || m.format == kFp8) {
    const int64_t tiles = (m.columns + m.tile_columns - 1) / m.tile_columns, per = m.tile_columns / kLanes;
    const float* from = static_cast<const float*>(m.scales) + row / m.tile_rows * tiles;
    for (int64_t tile = 0; tile < tiles; tile++)
      std::fill(steps + tile * per, steps + std::min(blocks, (tile + 1) * per), from[tile]);
    return;
  }
  const uint8_t* from = static_cast<const uint8_t*>(m.scales) + row * blocks;
  const float total = (float)m.total;
  int64_t b = 0;
  for (; b + kLanes <= blocks; b += kLanes) {
    const Floats scale = e4m3_values(wide_bytes(from + b));
    const Floats step = m.format == kNvfp4 ? scale * total : scale / total;
    std::memcpy(steps + b, &step, sizeof step);
  }
  for (; b < blocks; b++) {
    const float scale = e4m3_values(Words{} + from[b])[0];
    steps[b] = m.format == kNvfp4 ? scale * total : scale / total;
  }
}

// Memory of one thread, kept between calls.
float* thread_scratch(int64_t count) {
  thread_local std::vector<float> memory;
  if ((int64_t)memory.size() < count) memory.resize(count);
  return memory.data();
}

template <class Row, class Code>
void coded_panel(const Matrix& m, int64_t first, const float* const* x, int64_t n, const Output& to) {
  const int64_t blocks = m.columns / kLanes, per_byte = sizeof(Code) == 1 && m.format >= kNvfp4 ? 2 : 1;
  float* steps = thread_scratch(kPanel * blocks + 4 * m.columns);
  Row rows[kPanel];
  for (int64_t r = 0; r < kPanel; r++) {
    const int64_t row = std::min(first + r, m.rows - 1);
    row_steps(m, row, steps + r * blocks);
    rows[r] = {static_cast<const Code*>(m.codes) + row * m.columns / per_byte, steps + r * blocks};
  }
  panel(rows, first, x, n, m.columns, to, steps + kPanel * blocks);
}

template <class Row, class Code>
void plain_panel(const Matrix& m, int64_t first, const float* const* x, int64_t n, const Output& to) {
  Row rows[kPanel];
  for (int64_t r = 0; r < kPanel; r++)
    rows[r] = {static_cast<const Code*>(m.codes) + std::min(first + r, m.rows - 1) * m.columns};
  panel(rows, first, x, n, m.columns, to, nullptr);
}

void any_panel(const Matrix& m, int64_t first, const float* const* x, int64_t n, float* out, int64_t stride) {
  const Output to{out, stride, m.rows};
  switch (m.format) {
    case kF32: return plain_panel<F32Row, float>(m, first, x, n, to);
    case kBf16: return plain_panel<Bf16Row, uint16_t>(m, first, x, n, to);
    case kInt8: return coded_panel<Int8Row, int8_t>(m, first, x, n, to);
    case kFp8: return coded_panel<Fp8Row, uint8_t>(m, first, x, n, to);
    default: return coded_panel<E2m1Row, uint8_t>(m, first, x, n, to);
  }
}

inline int64_t panels(const Matrix& m) { return (m.rows + kPanel - 1) / kPanel; }

// The functions below run in every thread of a team: each takes its share, and all wait for the last.

void linear(const Matrix* parts, int64_t count, const float* const* x, int64_t n, float* out, int64_t stride) {
  for (int64_t p = 0; p < count; out += parts[p++].rows) {
    const Matrix& m = parts[p];
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < panels(m); i++) any_panel(m, i * kPanel, x, n, out, stride);
  }
#pragma omp barrier
}

void norm_rows(const float* x, const float* w, double eps, int64_t n, int64_t d, float* out) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < n; t++) {
    const float *RESTRICT row = x + t * d, scale = 1.0f / std::sqrt(dot(row, row, d) / (float)d + (float)eps);
    float* RESTRICT to = out + t * d;
#pragma omp simd
    for (int64_t i = 0; i < d; i++) to[i] = row[i] * scale * w[i];
  }
}

void add_rows(const float* RESTRICT y, const float* RESTRICT bias, int64_t n, int64_t d, float* RESTRICT x) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < n; t++) {
#pragma omp simd
    for (int64_t i = 0; i < d; i++) x[t * d + i] += bias ? y[t * d + i] + bias[i] : y[t * d + i];
  }
}

// w silu(gate) up of each row, in place of the gate.
void swiglu_rows(float* gate_up, const float* w, int64_t n, int64_t width) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < n; t++) {
    float *RESTRICT gate = gate_up + 2 * t * width, *RESTRICT up = gate + width;
    const float weight = w ? w[t] : 1.0f;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) gate[i] = weight * (gate[i] * sigmoid(gate[i])) * up[i];
  }
}

std::vector<const float*> row_pointers(const float* x, int64_t n, int64_t stride) {
  std::vector<const float*> rows(n);
  for (int64_t t = 0; t < n; t++) rows[t] = x + t * stride;
  return rows;
}

// One head: RMSNorm where there is a weight, then the rotation of its first 2 `half` numbers, in place.
void norm_rope_head(float* RESTRICT x, const float* w, double eps, const float* c, const float* s, int64_t dim,
                    int64_t half) {
  if (w) {
    const float scale = 1.0f / std::sqrt(dot(x, x, dim) / (float)dim + (float)eps);
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) x[i] = x[i] * scale * w[i];
  }
#pragma omp simd
  for (int64_t j = 0; j < half; j++) {
    const float first = x[j], second = x[half + j];
    x[j] = first * c[j] - second * s[j];
    x[half + j] = second * c[j] + first * s[j];
  }
}

// The experts of each token with their weights; `logits` become scores.
void route(const Layer& layer, int64_t n, float* logits, int64_t* ids, float* weights) {
  const int64_t experts = layer.experts, active = layer.active;
  for (int64_t t = 0; t < n; t++) {
    float* row = logits + t * experts;
    if (layer.sigmoid) {
      for (int64_t e = 0; e < experts; e++) row[e] = sigmoid(row[e]);
      continue;
    }
    float top = row[0], sum = 0.0f;
    for (int64_t e = 1; e < experts; e++) top = row[e] > top ? row[e] : top;
    for (int64_t e = 0; e < experts; e++) sum += row[e] = fast_exp(row[e] - top);
    for (int64_t e = 0; e < experts; e++) row[e] /= sum;
  }
  // Of scores that are not finite any choice will do: what comes out of them is not finite either, and is refused.
  if (tafkir_choose_experts(1, logits, layer.router_bias, n, experts, layer.groups, layer.open_groups, active, ids))
    for (int64_t i = 0; i < n * active; i++) ids[i] = i % active;
  for (int64_t t = 0; t < n; t++) {
    float sum = 1e-20f;
    for (int64_t a = 0; a < active; a++) sum += weights[t * active + a] = logits[t * experts + ids[t * active + a]];
    const float scale = (float)layer.scaling / (layer.normalise ? sum : 1.0f);
    for (int64_t a = 0; a < active; a++) weights[t * active + a] *= scale;
  }
}

// Pairs of a token and one of its experts, expert by expert.
struct Pairs {
  std::vector<int64_t> order, starts, busy;
  Pairs(const int64_t* ids, int64_t count, int64_t experts) : order(count), starts(experts + 1, 0) {
    for (int64_t p = 0; p < count; p++) starts[ids[p] + 1]++;
    for (int64_t e = 0; e < experts; e++) {
      if (starts[e + 1]) busy.push_back(e);
      starts[e + 1] += starts[e];
    }
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t p = 0; p < count; p++) order[next[ids[p]]++] = p;
  }
};

// For each busy expert the product of its pairs' rows with its matrices: `x` in the order of the pairs, sorted.
void expert_linear(const Pairs& pairs, const Matrix* matrices, int64_t parts, const float* const* x, float* out,
                   int64_t stride) {
  const int64_t each = panels(matrices[0]);
#pragma omp for schedule(dynamic, 4)
  for (int64_t item = 0; item < (int64_t)pairs.busy.size() * parts * each; item++) {
    const int64_t expert = pairs.busy[item / (parts * each)], part = item / each % parts;
    const int64_t first = pairs.starts[expert], count = pairs.starts[expert + 1] - first;
    const Matrix& m = matrices[expert * parts + part];
    any_panel(m, item % each * kPanel, x + first, count, out + first * stride + part * m.rows, stride);
  }
}

// The routed experts of normed tokens, added to `x`: [n, hidden] both.
void add_experts(const Layer& layer, const float* normed, int64_t n, const int64_t* ids, const float* weights,
                 const Pairs& pairs, float* hidden, float* y, float* x) {
  const int64_t d = layer.hidden, width = layer.width, active = layer.active, count = n * active;
  std::vector<const float*> in(count), out(count);
  std::vector<float> sorted(count);
  std::vector<int64_t> place(count);
  for (int64_t i = 0; i < count; i++) {
    in[i] = normed + pairs.order[i] / active * d;
    out[i] = hidden + i * 2 * width;
    sorted[i] = weights[pairs.order[i]];
    place[pairs.order[i]] = i;
  }
  expert_linear(pairs, layer.experts_in, layer.expert_parts, in.data(), hidden, 2 * width);
  swiglu_rows(hidden, sorted.data(), count, width);
  expert_linear(pairs, layer.experts_out, 1, out.data(), y, d);
#pragma omp for schedule(static)
  for (int64_t t = 0; t < n; t++)
    for (int64_t a = 0; a < active; a++) {
      const float* RESTRICT from = y + place[t * active + a] * d;
      float* RESTRICT to = x + t * d;
#pragma omp simd
      for (int64_t i = 0; i < d; i++) to[i] += from[i];
    }
}

}  // namespace

extern "C" {

// out [n, rows of all parts] = x [n, columns] times the parts' rows.
int tafkir_packed_linear(int threads, const Matrix* parts, int64_t count, const float* x, int64_t n, int64_t stride,
                         float* out) {
  const auto rows = row_pointers(x, n, parts[0].columns);
#pragma omp parallel num_threads(threads)
  linear(parts, count, rows.data(), n, out, stride);
  return 0;
}

// What a matrix is worth: out [rows, columns], float32 (for many tokens, whose product a BLAS computes).
int tafkir_packed_values(int threads, const Matrix* matrix, float* out) {
  const Matrix& m = *matrix;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < m.rows; r++) {
    float* steps = thread_scratch(m.columns / kLanes);
    if (m.format >= kInt8) row_steps(m, r, steps);
    for (int64_t c = 0; c < m.columns; c += kLanes) {
      const int64_t at = r * m.columns;
      Floats values;
      switch (m.format) {
        case kF32: values = F32Row{static_cast<const float*>(m.codes) + at}.at(c); break;
        case kBf16: values = Bf16Row{static_cast<const uint16_t*>(m.codes) + at}.at(c); break;
        case kInt8: values = Int8Row{static_cast<const int8_t*>(m.codes) + at, steps}.at(c); break;
        case kFp8: values = Fp8Row{static_cast<const uint8_t*>(m.codes) + at, steps}.at(c); break;
        default: values = E2m1Row{static_cast<const uint8_t*>(m.codes) + at / 2, steps}.at(c);
      }
      std::memcpy(out + at + c, &values, sizeof values);
    }
  }
  return 0;
}

// The first half of a layer: norm, projection, per-head norms and rotation. x [n, D]; q [n, H, K], k and v [n, G, K].
int tafkir_decode_qkv(int threads, const Layer* layer_, const float* x, int64_t n, const float* cos, const float* sin,
                      float* q, float* k, float* v) {
  const Layer& layer = *layer_;
  const int64_t d = layer.hidden, dim = layer.head_dim, heads = layer.heads, kv = layer.kv_heads, all_heads = heads + 2 * kv;
  const Scratch scratch(n * (d + all_heads * dim));
  float *normed = scratch.get(), *qkv = normed + n * d;
  const auto rows = row_pointers(normed, n, d);
#pragma omp parallel num_threads(threads)
  {
    norm_rows(x, layer.attention_norm, layer.eps, n, d, normed);
    linear(layer.qkv, layer.qkv_parts, rows.data(), n, qkv, all_heads * dim);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < n * all_heads; item++) {
      const int64_t t = item / all_heads, h = item % all_heads;
      float* from = qkv + item * dim;
      if (layer.qkv_bias)
        for (int64_t i = 0; i < dim; i++) from[i] += layer.qkv_bias[h * dim + i];
      if (h < heads + kv)
        norm_rope_head(from, h < heads ? layer.q_norm : layer.k_norm, layer.eps, cos + t * layer.half,
                       sin + t * layer.half, dim, layer.half);
      float* to = h < heads ? q + (t * heads + h) * dim
                  : h < heads + kv ? k + (t * kv + h - heads) * dim : v + (t * kv + h - heads - kv) * dim;
      std::memcpy(to, from, dim * sizeof(float));
    }
  }
  return 0;
}

// The second half: the output projection of `attended` [n, H, K], and the dense or sparse feed-forward block, each
// added to x [n, D]. Writes the experts of every token, ids [n, A], where there are any.
int tafkir_decode_mlp(int threads, const Layer* layer_, const float* attended, int64_t n, float* x, int64_t* ids) {
  const Layer& layer = *layer_;
  const int64_t d = layer.hidden, count = n * layer.active;
  const int64_t dense = layer.wide_parts ? layer.down->columns : 0, widest = std::max(d, std::max(layer.experts, 2 * dense));
  const Scratch scratch(n * (d + widest) + count * (2 * layer.width + d + 1));
  float *normed = scratch.get(), *wide = normed + n * d, *hidden = wide + n * widest;
  float *y = hidden + count * 2 * layer.width, *weights = y + count * d;
  const auto attended_rows = row_pointers(attended, n, layer.heads * layer.head_dim);
  const auto normed_rows = row_pointers(normed, n, d), wide_rows = row_pointers(wide, n, 2 * dense);
  std::vector<Pairs> pairs;
#pragma omp parallel num_threads(threads)
  {
    linear(layer.out, 1, attended_rows.data(), n, wide, d);
    add_rows(wide, layer.out_bias, n, d, x);
    norm_rows(x, layer.mlp_norm, layer.eps, n, d, normed);
    if (layer.experts) {
      linear(layer.router, 1, normed_rows.data(), n, wide, layer.experts);
#pragma omp single
      {
        route(layer, n, wide, ids, weights);
        pairs.emplace_back(ids, count, layer.experts);
      }
      add_experts(layer, normed, n, ids, weights, pairs[0], hidden, y, x);
    }
    if (layer.wide_parts) {
      linear(layer.wide, layer.wide_parts, normed_rows.data(), n, wide, 2 * dense);
      swiglu_rows(wide, nullptr, n, dense);
      linear(layer.down, 1, wide_rows.data(), n, normed, d);
      add_rows(normed, nullptr, n, d, x);
    }
  }
  return 0;
}

}  // extern "C"
