// A few tokens at a time through a decoder whose weights stay as they are stored: float32, bfloat16, INT8, FP8 or four
// bits. Activations and sums are float32. See tafkir.ops.packed and tafkir.models.decode_step.
//
// With `tafkir_rows_alone`, every output is summed in one order, whatever the number of tokens and threads: sixteen
// lanes over the columns, then halves to halves, and a token's numbers do not depend on who else is in the batch.
// Without it, one token of NVFP4 or INT8, and several tokens of all but float32, have ways of their own, which differ
// in the order of sums alone.

#include "digits.h"
#include "shared.h"
#include "tiles.h"
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
extern "C" int tafkir_paged_attention(int threads, const float* q, const void* k, const void* v, void* keys,
                                      void* values, const int64_t* tables, const int64_t* rows,
                                      const int64_t* positions, int64_t bfloat16, int64_t tokens, int64_t heads,
                                      int64_t kv_heads, int64_t dim, int64_t width, float scale, float* out);

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

// kRows x kTokens = 16 inner products; lane t * kRows + r is that of row r and token t. The codes that stand kAhead
// rows further on are asked for (0: none): the processor's own guess fails with so many rows at once.
template <int kRows, int kTokens, int kAhead, class Row>
inline Floats products(const Row* rows, const float* const* x, int64_t columns) {
  Floats sums[16] = {};
  const int64_t ahead = kAhead * columns * 64 / Row::kPerLine;
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
  if (n == 1) return to.put<16, 1>(products<16, 1, kPanel>(rows, x, columns), first, 0, n);
  if (n < kMany) {
    for (int64_t r = 0; r < kPanel; r += 8) to.put<8, 2>(products<8, 2, kPanel>(rows + r, x, columns), first + r, 0, n);
    return;
  }
  for (int64_t r = 0; r < kPanel && first + r < to.rows; r += 4) {
    F32Row plain[4];
    if (Row::kCoded)
      for (int i = 0; i < 4; i++) {
        float* place = decoded + i * columns;
        for (int64_t c = 0; c < columns; c += kLanes) {
          const char* codes = reinterpret_cast<const char*>(rows[r + i].codes);
          if (c % Row::kPerLine == 0) __builtin_prefetch(codes + (4 * columns + c) * 64 / Row::kPerLine);
          const Floats w = rows[r + i].at(c);
          std::memcpy(place + c, &w, sizeof w);
        }
        plain[i] = {place};
      }
    for (int64_t t = 0; t < n; t += 4) {
      const float* const four[4] = {x[t], x[std::min(t + 1, n - 1)], x[std::min(t + 2, n - 1)],
                                    x[std::min(t + 3, n - 1)]};
      const Floats sums = Row::kCoded ? products<4, 4, 0>(plain, four, columns)
                          : t         ? products<4, 4, 0>(rows + r, four, columns)
                                      : products<4, 4, 4>(rows + r, four, columns);
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

// Whether the matrix unit can take it: scales must not change within a step.
inline bool fits_tiles(const Matrix& m) {
  return (m.format != kInt8 && m.format != kFp8) || m.tile_columns >= m.columns || m.tile_columns % kStep == 0;
}

#ifdef TAFKIR_TILES

// 32 rows as bfloat16 tiles, step by step; what scales all of a row, or of a long part of it, is left out.
template <class Row>
void decode_tiles(const Row* rows, int64_t columns, char* to) {
  const int64_t ahead = kTileRows * columns * 64 / Row::kPerLine;
  for (int64_t c = 0; c < columns; c += kStep, to += 2048)
    for (int64_t r = 0; r < kTileRows; r++) {
      if (c % Row::kPerLine == 0)
        __builtin_prefetch(reinterpret_cast<const char*>(rows[r].codes) + ahead + c * 64 / Row::kPerLine);
      Floats first = rows[r].at(c), second = c + 16 < columns ? rows[r].at(c + 16) : Floats{};
      _mm512_store_si512(to + r * 64, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
    }
}

template <class Row, class Code>
void coded_tiles(const Matrix& m, int64_t first, float* steps, char* to) {
  const int64_t blocks = m.columns / kLanes, per_byte = m.format >= kNvfp4 ? 2 : 1;
  Matrix unscaled = m;
  unscaled.total = 1.0;
  if (m.format < kNvfp4) std::fill(steps, steps + blocks, 1.0f);
  Row rows[kTileRows];
  for (int64_t r = 0; r < kTileRows; r++) {
    const int64_t row = std::min(first + r, m.rows - 1);
    float* own = m.format >= kNvfp4 ? steps + r * blocks : steps;
    if (m.format >= kNvfp4) row_steps(unscaled, row, own);
    rows[r] = {static_cast<const Code*>(m.codes) + row * m.columns / per_byte, own};
  }
  decode_tiles(rows, m.columns, to);
}

void plain_tiles(const Matrix& m, int64_t first, char* to) {
  Bf16Row rows[kTileRows];
  for (int64_t r = 0; r < kTileRows; r++)
    rows[r] = {static_cast<const uint16_t*>(m.codes) + std::min(first + r, m.rows - 1) * m.columns};
  decode_tiles(rows, m.columns, to);
}

// The tiles of 32 rows: where they are stored, or decoded into this thread's memory.
Panel panel_of(const Matrix& m, int64_t first, char* memory, float* steps) {
  const int64_t wide = m.columns * 2;
  if (m.format == kBf16 && first + kTileRows <= m.rows && m.columns % kStep == 0)
    return {static_cast<const char*>(m.codes) + first * wide, 2 * kStep, 16 * wide, wide};
  switch (m.format) {
    case kBf16: plain_tiles(m, first, memory); break;
    case kInt8: coded_tiles<Int8Row, int8_t>(m, first, steps, memory); break;
    case kFp8: coded_tiles<Fp8Row, uint8_t>(m, first, steps, memory); break;
    default: coded_tiles<E2m1Row, uint8_t>(m, first, steps, memory);
  }
  return {memory, 2048, 1024, 64};
}

// What the sums of sixteen rows are multiplied by, in the part of the columns that `part` counts.
inline Floats tile_factors(const Matrix& m, int64_t first, int64_t part, int64_t parts) {
  if (m.format == kInt8 || m.format == kFp8) {
    Floats factors;
    for (int64_t r = 0; r < 16; r++)
      factors[r] = static_cast<const float*>(m.scales)[std::min(first + r, m.rows - 1) / m.tile_rows * parts + part];
    return factors;
  }
  return all(m.format == kNvfp4 ? (float)m.total : m.format == kNvfp4Inverse ? (float)(1.0 / m.total) : 1.0f);
}

// 32 rows of a matrix times n tokens, packed sixteen by sixteen.
void tile_panel(const Matrix& m, int64_t first, const uint16_t* packed, int64_t n, float* out, int64_t stride) {
  const int64_t steps = steps_of(m.columns), blocks = m.columns / kLanes, pieces = pieces_wanted();
  float* memory = thread_scratch(16 + 1024 + steps * 512 + kTileRows * blocks);
  memory += (64 - (uintptr_t)memory % 64) % 64 / sizeof(float);
  float *sums = memory, *scales = memory + 1024 + steps * 512;
  const Panel panel = panel_of(m, first, reinterpret_cast<char*>(memory + 1024), scales);
  const bool tiled = m.format == kInt8 || m.format == kFp8;
  const int64_t width = tiled ? std::min(m.tile_columns, m.columns) : m.columns;
  const int64_t parts = (m.columns + width - 1) / width;
  for (int64_t t = 0; t < n; t += 2 * kTileTokens) {
    const int64_t some = std::min(kTileTokens, n - t), more = std::min(kTileTokens, n - t - some);
    const uint16_t *x = packed + packed_size(t, m.columns), *y = packed + packed_size(t + some, m.columns);
    configure(some, more);
    for (int64_t p = 0; p < parts; p++) {
      const int64_t from = p * width / kStep, to = p + 1 == parts ? steps : (p + 1) * width / kStep;
      if (more)
        sum_tiles<true>(panel, x, some, y, more, pieces, from, to, t == 0, sums);
      else
        sum_tiles<false>(panel, x, some, y, more, pieces, from, to, t == 0, sums);
      for (int64_t half = 0; half < 2 && first + 16 * half < m.rows; half++) {
        const int64_t row = first + 16 * half;
        const Floats factors = tile_factors(m, row, p, parts);
        put_tile(sums + 256 * half, factors, m.rows - row, some, p > 0, out + t * stride + row, stride);
        if (more)
          put_tile(sums + 512 + 256 * half, factors, m.rows - row, more, p > 0, out + (t + some) * stride + row,
                   stride);
      }
    }
  }
}

inline void release_tiles() { _tile_release(); }

#else

void pack_tokens(const float* const*, int64_t, int64_t, int64_t, uint16_t*) {}
void tile_panel(const Matrix&, int64_t, const uint16_t*, int64_t, float*, int64_t) {}
void release_tiles() {}

#endif

inline int64_t tile_panels(const Matrix& m) { return (m.rows + kTileRows - 1) / kTileRows; }

void turned_panel(const Matrix& m, int64_t first, const void* packed, float* out) {
  const float total = (m.format == kNvfp4 ? (float)m.total : (float)(1.0 / m.total)) * kNvfp4Factor;
  constexpr int kRows = 4;
  for (int64_t row = first; row < std::min(first + kTileRows, m.rows); row += kPanel) {
    Floats sums[kPanel];
    for (int64_t r = 0; r < kPanel; r += kRows) {
      const uint8_t *codes[kRows], *scales[kRows];
      for (int i = 0; i < kRows; i++) {
        const int64_t at = std::min(row + r + i, m.rows - 1) * m.columns;
        codes[i] = static_cast<const uint8_t*>(m.codes) + at / 2;
        scales[i] = static_cast<const uint8_t*>(m.scales) + at / 16;
      }
      nvfp4_rows<kRows>(codes, scales, m.columns, packed, sums + r);
    }
    const Floats joined = join_rows(sums, [](Floats a, Floats b) { return a + b; }) * total;
    for (int64_t r = 0; r < std::min(kPanel, m.rows - row); r++) out[row + r] = joined[r];
  }
}

// INT8 with one scale a row, which is applied to the sum.
struct UnscaledRow {
  static constexpr bool kCoded = true;
  static constexpr int64_t kPerLine = 64;
  const int8_t* codes;
  Floats at(int64_t c) const { return __builtin_convertvector(wide_signed_bytes(codes + c), Floats); }
};

void unscaled_panel(const Matrix& m, int64_t first, const float* x, const void* packed, float* out) {
  for (int64_t row = first; row < std::min(first + kTileRows, m.rows); row += kPanel) {
    UnscaledRow rows[kPanel];
    for (int64_t r = 0; r < kPanel; r++)
      rows[r] = {static_cast<const int8_t*>(m.codes) + std::min(row + r, m.rows - 1) * m.columns};
    Floats sums;
    if (has_int8_digits(m.columns)) {
      Floats lanes[kPanel];
      for (int64_t r = 0; r < kPanel; r += 4) {
        const int8_t* const codes[4] = {rows[r].codes, rows[r + 1].codes, rows[r + 2].codes, rows[r + 3].codes};
        int8_rows<4>(codes, m.columns, packed, lanes + r);
      }
      sums = join_rows(lanes, [](Floats a, Floats b) { return a + b; });
    } else {
      sums = products<16, 1, kPanel>(rows, &x, m.columns);
    }
    for (int64_t r = 0; r < std::min(kPanel, m.rows - row); r++)
      out[row + r] = sums[r] * static_cast<const float*>(m.scales)[(row + r) / m.tile_rows];
  }
}

// How matrices meet so many tokens.
enum Way { kPlain, kTurned, kUnscaled, kTiles };

inline bool& rows_alone() {
  thread_local bool alone = false;
  return alone;
}

// What a call knows on the thread that began it: which ways are open, and memory for packed tokens.
class Packed {
 public:
  Packed(int64_t n, int64_t columns)
      : alone_(rows_alone()), tiles_(tiles_usable()), memory_(packed_size(n, columns) / 2) {}
  uint16_t* at(int64_t n, int64_t columns) const {
    return reinterpret_cast<uint16_t*>(memory_.get()) + packed_size(n, columns);
  }
  bool has_tiles() const { return tiles_ && !alone_; }

  Way way(const Matrix* parts, int64_t count, int64_t n) const {
    if (alone_) return kPlain;
    bool nvfp4 = true, int8 = true, tiles = tiles_;
    for (int64_t p = 0; p < count; p++) {
      const Matrix& m = parts[p];
      nvfp4 &= m.format >= kNvfp4 && m.columns % kTurn == 0;
      int8 &= m.format == kInt8 && m.tile_columns >= m.columns;
      tiles &= m.format != kF32 && fits_tiles(m) && n > kTileTokens / 2;
    }
    return tiles ? kTiles : n > 1 ? kPlain : nvfp4 ? kTurned : int8 ? kUnscaled : kPlain;
  }

 private:
  bool alone_, tiles_;
  Scratch memory_;
};

void pack(Way way, const float* const* x, int64_t n, int64_t columns, uint16_t* to) {
  if (way == kTurned) return pack_nvfp4_token(x[0], columns, to);
  if (way == kUnscaled && has_int8_digits(columns)) return pack_int8_token(x[0], columns, to);
  if (way == kTiles) pack_tokens(x, n, columns, pieces_wanted(), to);
}

// Thirty-two rows of a matrix times n tokens.
void double_panel(Way way, const Matrix& m, int64_t first, const float* const* x, const uint16_t* packed, int64_t n,
                  float* out, int64_t stride) {
  if (way == kTiles) return tile_panel(m, first, packed, n, out, stride);
  if (way == kTurned) return turned_panel(m, first, packed, out);
  if (way == kUnscaled) return unscaled_panel(m, first, x[0], packed, out);
  for (int64_t row = first; row < std::min(first + kTileRows, m.rows); row += kPanel)
    any_panel(m, row, x, n, out, stride);
}

// The functions below run in every thread of a team: each takes its share, and all wait for the last.

void linear(const Matrix* parts, int64_t count, const float* const* x, int64_t n, float* out, int64_t stride,
            const Packed& packed) {
  const int64_t columns = parts[0].columns;
  const Way way = packed.way(parts, count, n);
  if (way != kPlain) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < n; t += kTileTokens)
      pack(way, x + t, std::min(kTileTokens, n - t), columns, packed.at(t, columns));
  }
  // Packed tokens that stay in a core's cache while the weights pass by.
  const int64_t some = way == kTiles ? std::max<int64_t>(32, (768 << 10) / (6 * columns) / 32 * 32) : n;
  for (int64_t t = 0; t < n; t += some) {
    const int64_t now = std::min(some, n - t);
    float* to = out + t * stride;
    for (int64_t p = 0; p < count; to += parts[p++].rows) {
      const Matrix& m = parts[p];
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < tile_panels(m); i++)
        double_panel(way, m, i * kTileRows, x + t, packed.at(t, columns), now, to, stride);
    }
  }
  if (way == kTiles) release_tiles();
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
                   int64_t stride, const Packed& packed) {
  const int64_t each = tile_panels(matrices[0]), columns = matrices[0].columns, busy = (int64_t)pairs.busy.size();
#pragma omp for schedule(dynamic, 4)
  for (int64_t b = 0; b < busy; b++) {
    const int64_t expert = pairs.busy[b], from = pairs.starts[expert], end = pairs.starts[expert + 1];
    const Way way = packed.way(matrices + expert * parts, parts, end - from);
    for (int64_t first = from; first < end; first += kTileTokens)
      pack(way, x + first, std::min(kTileTokens, end - first), columns, packed.at(first, columns));
  }
#pragma omp for schedule(dynamic, 2) nowait
  for (int64_t item = 0; item < busy * parts * each; item++) {
    const int64_t expert = pairs.busy[item / (parts * each)], part = item / each % parts;
    const int64_t first = pairs.starts[expert], count = pairs.starts[expert + 1] - first;
    const Matrix& m = matrices[expert * parts + part];
    double_panel(packed.way(matrices + expert * parts, parts, count), m, item % each * kTileRows, x + first,
                 packed.at(first, columns), count, out + first * stride + part * m.rows, stride);
  }
  if (packed.has_tiles()) release_tiles();
#pragma omp barrier
}

// The routed experts of normed tokens, added to `x`: [n, hidden] both.
void add_experts(const Layer& layer, const float* normed, int64_t n, const int64_t* ids, const float* weights,
                 const Pairs& pairs, float* hidden, float* y, float* x, const Packed& packed) {
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
  expert_linear(pairs, layer.experts_in, layer.expert_parts, in.data(), hidden, 2 * width, packed);
  swiglu_rows(hidden, sorted.data(), count, width);
  expert_linear(pairs, layer.experts_out, 1, out.data(), y, d, packed);
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

// --- drafts: MTP layers as a chain, see tafkir.models.draft_chain -----------------------------------------------------

// Layers that draft for a decoder. `joined` reads both normed inputs side by side.
struct DraftLayer {
  const float *enorm, *hnorm, *norm;
  const Matrix* joined;
  const Layer* block;
};

struct Drafting {
  int64_t depth, chained, post_norm, hidden_first, head_parts;
  const DraftLayer* layers;
  const Matrix *head, *embedding;
};

// What a sequence has at one depth: blocks of keys and values, how many of their rows hold for good, and states that
// are to be read again (one in a chain, else as many as the depth).
struct DraftTrack {
  void *keys, *values;
  float* carried;
  int64_t cached, num_carried;
};

namespace {

void embed(const Matrix& table, const int64_t* ids, int64_t n, float* out) {
  for (int64_t t = 0; t < n; t++)
    for (int64_t c = 0; c < table.columns; c += kLanes) {
      const int64_t at = ids[t] * table.columns;
      const Floats x = table.format == kF32 ? F32Row{static_cast<const float*>(table.codes) + at}.at(c)
                                            : Bf16Row{static_cast<const uint16_t*>(table.codes) + at}.at(c);
      std::memcpy(out + t * table.columns + c, &x, sizeof x);
    }
}

// The number that a request's stream has for a draw: ops/sampling.py, `uniform`.
double uniform_of(uint64_t key, uint64_t draw) {
  uint64_t z = key + (draw + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// As ops/sampling.py draws: top-k, then top-p over what is left, then the inverse of the distribution in order of ids.
int64_t draw_token(float* logits, int64_t vocab, float temperature, int64_t top_k, float top_p, double u) {
  const int64_t best = std::max_element(logits, logits + vocab) - logits;
  if (temperature == 0.0f) return best;
  const float top = logits[best];
  for (int64_t v = 0; v < vocab; v++) logits[v] = fast_exp((logits[v] - top) / temperature);
  if ((top_k > 0 && top_k < vocab) || top_p < 1.0f) {
    std::vector<int64_t> order(vocab);
    for (int64_t v = 0; v < vocab; v++) order[v] = v;
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    });
    const int64_t count = top_k > 0 ? std::min(top_k, vocab) : vocab;
    double mass = 0.0, before = 0.0;
    for (int64_t i = 0; i < count; i++) mass += logits[order[i]];
    for (int64_t i = 0; i < vocab; i++) {
      const double weight = logits[order[i]];
      if (i && (i >= count || (top_p < 1.0f && before >= top_p * mass))) logits[order[i]] = 0.0f;
      before += weight;
    }
  }
  double total = 0.0, sum = 0.0;
  for (int64_t v = 0; v < vocab; v++) total += logits[v];
  for (int64_t v = 0; v < vocab; v++)
    if ((sum += logits[v]) > u * total) return v;
  return best;
}

}  // namespace

extern "C" {

// out [n, rows of all parts] = x [n, columns] times the parts' rows.
int tafkir_packed_linear(int threads, const Matrix* parts, int64_t count, const float* x, int64_t n, int64_t stride,
                         float* out) {
  const auto rows = row_pointers(x, n, parts[0].columns);
  const Packed packed(n, parts[0].columns);
#pragma omp parallel num_threads(threads)
  linear(parts, count, rows.data(), n, out, stride, packed);
  return 0;
}

// From now on, what this thread calls sums each token in one order (1), or as is fastest (0).
int tafkir_rows_alone(int, int64_t alone) {
  rows_alone() = alone != 0;
  return 0;
}

// Whether products go through the matrix unit; `use` is 0 or 1 to forbid or allow that, -1 to ask.
int tafkir_use_tiles(int, int64_t use) {
  if (use >= 0) tiles_wanted() = (int)use;
  return tiles_usable();
}

// Activations go into the matrix unit as so many bfloat16 numbers from now on, 1 to 3.
int tafkir_tile_pieces(int, int64_t pieces) {
  pieces_wanted() = pieces;
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
  const Packed packed(n, d);
#pragma omp parallel num_threads(threads)
  {
    norm_rows(x, layer.attention_norm, layer.eps, n, d, normed);
    linear(layer.qkv, layer.qkv_parts, rows.data(), n, qkv, all_heads * dim, packed);
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
  const int64_t widest_in = std::max(std::max(d, layer.heads * layer.head_dim), std::max(dense, layer.width));
  const Packed packed(std::max(n, count), widest_in);
#pragma omp parallel num_threads(threads)
  {
    linear(layer.out, 1, attended_rows.data(), n, wide, d, packed);
    add_rows(wide, layer.out_bias, n, d, x);
    norm_rows(x, layer.mlp_norm, layer.eps, n, d, normed);
    if (layer.experts) {
      linear(layer.router, 1, normed_rows.data(), n, wide, layer.experts, packed);
#pragma omp single
      {
        route(layer, n, wide, ids, weights);
        pairs.emplace_back(ids, count, layer.experts);
      }
      add_experts(layer, normed, n, ids, weights, pairs[0], hidden, y, x, packed);
    }
    if (layer.wide_parts) {
      linear(layer.wide, layer.wide_parts, normed_rows.data(), n, wide, 2 * dense, packed);
      swiglu_rows(wide, nullptr, n, dense);
      linear(layer.down, 1, wide_rows.data(), n, normed, d, packed);
      add_rows(normed, nullptr, n, d, x);
    }
  }
  return 0;
}

// All layers for n tokens that attend to a paged cache (paged.cpp); x [n, D] becomes what the last one gives.
// `keys` and `values` are addresses by layer; ids [layers, n, A] gets the experts of the layers that have some.
int tafkir_decode_layers(int threads, const Layer* layers, int64_t count, float* x, int64_t n, const float* cos,
                         const float* sin, void* const* keys, void* const* values, const int64_t* tables,
                         const int64_t* rows, const int64_t* positions, int64_t width, int64_t* ids) {
  const int64_t heads = layers->heads, kv = layers->kv_heads, dim = layers->head_dim;
  const Scratch scratch(n * dim * 2 * (heads + kv));
  float *q = scratch.get(), *k = q + n * heads * dim, *v = k + n * kv * dim, *attended = v + n * kv * dim;
  const float scale = (float)(1.0 / std::sqrt((double)dim));
  for (int64_t i = 0; i < count; i++) {
    const Layer* layer = layers + i;
    tafkir_decode_qkv(threads, layer, x, n, cos, sin, q, k, v);
    tafkir_paged_attention(threads, q, k, v, keys[i], values[i], tables, rows, positions, 0, n, heads, kv, dim, width,
                           scale, attended);
    tafkir_decode_mlp(threads, layer, attended, n, x, ids);
    if (layer->experts) ids += n * layer->active;
  }
  return 0;
}

// Up to `most` tokens after the newest one of a sequence. `states` [n, D] are the decoder's of its newest tokens but the
// last, whose last one stands at `position`; `tokens` the n that follow each of them, with room for what is drafted.
// cos and sin are tables by position. Draws `first_draw` and the following ones of the stream `key` are the numbers.
int tafkir_draft(int threads, const Drafting* drafting, DraftTrack* tracks, const float* states, int64_t n,
                 int64_t position, int64_t most, const float* cos, const float* sin, int64_t* tokens, float temperature,
                 int64_t top_k, float top_p, int64_t key, int64_t first_draw) {
  const Layer& first = *drafting->layers->block;
  const int64_t d = first.hidden, half = first.half;
  int64_t vocab = 0;
  for (int64_t p = 0; p < drafting->head_parts; p++) vocab += drafting->head[p].rows;
  const int64_t longest = n + most + 1;
  const Scratch scratch(longest * 6 * d + vocab);
  float *in = scratch.get(), *x = in + longest * d, *hidden = x + longest * d, *both = hidden + longest * d;
  float *normed = both + longest * 2 * d, *logits = normed + longest * d;
  std::vector<int64_t> table, rows(longest), places(longest), ids(longest * std::max<int64_t>(1, first.active));
  const float* outputs = states;
  int64_t count = n, end = 0;
  for (int64_t ahead = 0; ahead < most; ahead++) {
    const int64_t depth = std::min(ahead, drafting->depth - 1);
    const DraftLayer& layer = drafting->layers[depth];
    DraftTrack& track = tracks[depth];
    int64_t start = end;
    if (ahead == depth) {
      const int64_t fresh = drafting->chained ? count : n, before = track.num_carried;
      std::memmove(in + before * d, drafting->chained ? outputs : states, fresh * d * sizeof(float));
      std::memcpy(in, track.carried, before * d * sizeof(float));
      count = before + fresh;
      start = track.cached;
      track.cached += std::max<int64_t>(0, count - depth);
      // Its last `depth` rows stand on drafts and are read again; in a chain the layer before makes all but one anew.
      track.num_carried = depth > count ? 0 : drafting->chained ? std::min<int64_t>(1, depth) : depth;
      std::memcpy(track.carried, in + (count - depth) * d, track.num_carried * d * sizeof(float));
    } else {
      std::memmove(in, outputs + (count - 1) * d, d * sizeof(float));
      count = 1;
    }
    end = start + count;
    // Both inputs, normed, side by side.
    embed(*drafting->embedding, tokens + n + ahead - count, count, x);
    norm_rows(x, layer.enorm, first.eps, count, d, normed);
    norm_rows(in, layer.hnorm, first.eps, count, d, hidden);
    for (int64_t t = 0; t < count; t++) {
      std::memcpy(both + 2 * t * d, (drafting->hidden_first ? hidden : normed) + t * d, d * sizeof(float));
      std::memcpy(both + (2 * t + 1) * d, (drafting->hidden_first ? normed : hidden) + t * d, d * sizeof(float));
    }
    tafkir_packed_linear(threads, layer.joined, 1, both, count, d, x);
    const int64_t last = position + ahead - depth, width = (end + 15) / 16;
    for (int64_t b = (int64_t)table.size(); b < width; b++) table.push_back(b);
    for (int64_t t = 0; t < count; t++) places[t] = start + t;
    tafkir_decode_layers(threads, layer.block, 1, x, count, cos + (last - count + 1) * half,
                         sin + (last - count + 1) * half, &track.keys, &track.values, table.data(), rows.data(),
                         places.data(), width, ids.data());
    norm_rows(x, layer.norm, first.eps, count, d, hidden);
    outputs = drafting->post_norm ? hidden : x;
    tafkir_packed_linear(threads, drafting->head, drafting->head_parts, hidden + (count - 1) * d, 1, vocab, logits);
    tokens[n + ahead] = draw_token(logits, vocab, temperature, top_k, top_p, uniform_of(key, first_draw + ahead));
  }
  // Layers that had no turn go on without the rows that they miss.
  for (int64_t depth = most; depth < drafting->depth; depth++) tracks[depth].num_carried = 0;
  return 0;
}

}  // extern "C"
