// Fused float32 kernels that mix residual streams (`tafkir.ops.hyper_connections`) and balance their maps
// (`tafkir.ops.sinkhorn`) on the CPU; the functions there are their references and fallbacks.
//
// Tokens go in blocks that stay in the second-level cache from the first look at their streams to the last. The same
// input and number of threads give the same bits; forward, the number of threads does not matter either.

#include <type_traits>

#include "shared.h"

namespace {

constexpr int64_t kLanes = 16;                // floats of a vector, and tokens of a Sinkhorn block
constexpr int64_t kBackwardFloats = 1 << 17;  // streams of a block, backward: three times as much stays in the cache

// Tokens x maps of a projection that registers sum at once.
#if defined(__AVX512F__)
constexpr int kTokens = 6, kMaps = 4;
#else
constexpr int kTokens = 1, kMaps = 4;
#endif
constexpr int64_t kProjectFloats = 512;  // of a token's streams that a projection looks at before it goes on to other maps

// Sixteen floats wherever they lie; a machine with narrower registers takes several.
typedef float Vec __attribute__((vector_size(64), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

inline float sum(Vec v) {
  float total = 0.0f;
  for (int64_t l = 0; l < kLanes; l++) total += v[l];
  return total;
}

// u = sum_j pre_j x_j. Not inlined: whoever reads again gets the same bits.
template <int n>
__attribute__((noinline)) void read_token(const float* RESTRICT x, const float* RESTRICT pre, int64_t d,
                                          float* RESTRICT u) {
#pragma omp simd
  for (int64_t k = 0; k < d; k++) {
    float total = 0.0f;
    for (int j = 0; j < n; j++) total += pre[j] * x[j * d + k];
    u[k] = total;
  }
}

// out_i = sum_j res_ij x_j + post_i y. Not inlined, either.
template <int n>
__attribute__((noinline)) void write_token(const float* RESTRICT x, const float* RESTRICT y, const float* RESTRICT post,
                 const float* RESTRICT res, int64_t d, float* RESTRICT out) {
#pragma omp simd
  for (int64_t k = 0; k < d; k++)
    for (int i = 0; i < n; i++) {
      float total = post[i] * y[k];
      for (int j = 0; j < n; j++) total += res[i * n + j] * x[j * d + k];
      out[i * d + k] = total;
    }
}

// `gx` may be `g`: a vector of all streams is read before any of it is written.
template <int n>
__attribute__((noinline)) void write_token_backward(const float* g, const float* x, const float* y, const float* post, const float* res,
                          int64_t d, float* gx, float* gy, float* gpost, float* gres) {
  Vec sums[n * n] = {}, post_sums[n] = {};
  float rest[n * n] = {}, post_rest[n] = {};
  int64_t k = 0;
  for (; k + kLanes <= d; k += kLanes) {
    Vec gi[n], dy = {};
    const Vec yk = load(y + k);
    for (int i = 0; i < n; i++) {
      gi[i] = load(g + i * d + k);
      dy += post[i] * gi[i];
      post_sums[i] += gi[i] * yk;
    }
    for (int j = 0; j < n; j++) {
      const Vec xj = load(x + j * d + k);
      Vec dx = {};
      for (int i = 0; i < n; i++) {
        dx += res[i * n + j] * gi[i];
        sums[i * n + j] += gi[i] * xj;
      }
      store(gx + j * d + k, dx);
    }
    store(gy + k, dy);
  }
  for (; k < d; k++) {
    float gi[n], dy = 0.0f;
    for (int i = 0; i < n; i++) {
      gi[i] = g[i * d + k];
      dy += post[i] * gi[i];
      post_rest[i] += gi[i] * y[k];
    }
    for (int j = 0; j < n; j++) {
      float dx = 0.0f;
      for (int i = 0; i < n; i++) {
        dx += res[i * n + j] * gi[i];
        rest[i * n + j] += gi[i] * x[j * d + k];
      }
      gx[j * d + k] = dx;
    }
    gy[k] = dy;
  }
  for (int i = 0; i < n; i++) gpost[i] = sum(post_sums[i]) + post_rest[i];
  for (int i = 0; i < n * n; i++) gres[i] = sum(sums[i]) + rest[i];
}

// total = grad_x + pre_j grad_u + norm x: what flows into the streams beside the projection's own part.
template <int n>
void gather_token(const float* RESTRICT gx, const float* RESTRICT gu, const float* RESTRICT x,
                  const float* RESTRICT pre, float norm, int64_t d, float* RESTRICT total) {
  for (int j = 0; j < n; j++) {
#pragma omp simd
    for (int64_t k = 0; k < d; k++)
      total[j * d + k] = gx[j * d + k] + pre[j] * gu[k] + norm * x[j * d + k];
  }
}

struct Shape {
  int64_t tokens, d;
};

// What a token's streams are projected by, and what keeps the norm and the gate from trouble.
struct Projection {
  const float *phi, *bias;
  float alpha, norm_eps, pre_eps;
};

// What the reading of tokens leaves behind.
struct Read {
  float *z, *u, *gate, *pre, *rstd;
};

template <int n>
constexpr int maps_of() {
  return n * n + 2 * n;
}

// z[t] = phi x_t for a few tokens in a row; the order of a token's sums does not depend on how many there are.
template <int n, int tokens>
void project_tokens(const float* x, const float* phi, int64_t width, float* z) {
  constexpr int maps = maps_of<n>();
  Vec sums[tokens * maps] = {};
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t first = 0; first < whole; first += kProjectFloats) {
    const int64_t last = std::min(whole, first + kProjectFloats);
    for (int m = 0; m < maps; m += kMaps) {
      Vec held[tokens][kMaps];
      for (int t = 0; t < tokens; t++)
        for (int i = 0; i < kMaps; i++) held[t][i] = sums[t * maps + m + i];
      for (int64_t k = first; k < last; k += kLanes) {
        Vec xs[tokens];
        for (int t = 0; t < tokens; t++) xs[t] = load(x + t * width + k);
        for (int i = 0; i < kMaps; i++) {
          const Vec row = load(phi + (m + i) * width + k);
          for (int t = 0; t < tokens; t++) held[t][i] += row * xs[t];
        }
      }
      for (int t = 0; t < tokens; t++)
        for (int i = 0; i < kMaps; i++) sums[t * maps + m + i] = held[t][i];
    }
  }
  for (int t = 0; t < tokens; t++)
    for (int m = 0; m < maps; m++) {
      float total = sum(sums[t * maps + m]);
      for (int64_t k = whole; k < width; k++) total += phi[m * width + k] * x[t * width + k];
      z[t * maps + m] = total;
    }
}

// Maps and inputs of tokens whose streams are in the cache. x_hat phi^T = (x phi^T) / r: the norm meets M numbers a
// token, not n D (arXiv 2512.24880, section 4.3.1).
template <int n, int tokens>
void read_tokens(const float* x, const Projection& by, int64_t d, int64_t first, const Read& out) {
  constexpr int maps = maps_of<n>();
  project_tokens<n, tokens>(x, by.phi, n * d, out.z + first * maps);
  for (int64_t t = first; t < first + tokens; t++, x += n * d) {
    float *z = out.z + t * maps, *gate = out.gate + t * n, *pre = out.pre + t * n;
    const float rstd = out.rstd[t] = 1.0f / std::sqrt(dot(x, x, n * d) / (float)(n * d) + by.norm_eps);
    for (int m = 0; m < maps; m++) z[m] *= rstd;
    for (int j = 0; j < n; j++) {
      gate[j] = sigmoid(by.alpha * z[j] + by.bias[j]);
      pre[j] = gate[j] + by.pre_eps;
    }
    read_token<n>(x, pre, d, out.u + t * d);
  }
}

// What a sublayer leaves for the streams: x [N, n, D], y [N, D], post [N, n], res [N, n, n].
struct Write {
  const float *x, *y, *post, *res;
};

// Writes where there is something to write (into `streams`), then reads; else reads only.
template <int n>
void write_and_read(int threads, const Write* write, float* streams, const Projection& by, Shape shape,
                    const Read& out) {
  const int64_t d = shape.d, width = n * d, blocks = (shape.tokens + kTokens - 1) / kTokens;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t first = b * kTokens, last = std::min(shape.tokens, first + kTokens);
    if (write)
      for (int64_t t = first; t < last; t++)
        write_token<n>(write->x + t * width, write->y + t * d, write->post + t * n, write->res + t * n * n, d,
                       streams + t * width);
    if (last - first == kTokens)
      read_tokens<n, kTokens>(streams + first * width, by, d, first, out);
    else
      for (int64_t t = first; t < last; t++) read_tokens<n, 1>(streams + t * width, by, d, t, out);
  }
}

// What flows into a reading from behind: of z, of u, and of the streams that it handed on.
struct Above {
  const float *z, *u, *x;
};

// What a reading needs to go back: its streams, and what it left behind.
struct Kept {
  const float *x, *phi;
  float alpha;
  const float *rstd, *z, *gate, *pre;
};

// Where the gradients of a writing go, beside that of its streams.
struct Written {
  float *y, *post, *res;
};

// From a reading back to its streams, and with `write` on to what was written: a block of tokens at a time, whose
// gradient (`out`) stays in the cache from its first sum to its last.
template <int n>
void write_and_read_backward(int threads, const Above& above, const Kept& kept, const Write* write, Shape shape,
                             float* out, float* grad_phi, float* grad_pre, const Written& written) {
  constexpr int maps = maps_of<n>();
  const int64_t d = shape.d, width = n * d, step = std::max<int64_t>(8, kBackwardFloats / width);
  const int64_t blocks = (shape.tokens + step - 1) / step, numbers = maps * width;
  const int wide = (int)width;
  std::vector<float> parts((threads - 1) * numbers);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; part++) {
    float* const mine = part ? parts.data() + (part - 1) * numbers : grad_phi;
    std::fill(mine, mine + numbers, 0.0f);
    const Scratch scratch(step * maps);
    float* const scaled = scratch.get();
    for (int64_t b = blocks * part / threads; b < blocks * (part + 1) / threads; b++) {
      const int64_t first = b * step, last = std::min(shape.tokens, first + step), count = last - first;
      for (int64_t t = first; t < last; t++) {
        const float *row = kept.x + t * width, *gu = above.u + t * d, *z = kept.z + t * maps;
        float *st = scaled + (t - first) * maps, *gp = grad_pre + t * n;
        std::copy(above.z + t * maps, above.z + (t + 1) * maps, st);
        for (int j = 0; j < n; j++) {
          gp[j] = dot(gu, row + j * d, d) * kept.gate[t * n + j] * (1.0f - kept.gate[t * n + j]);
          st[j] += kept.alpha * gp[j];
        }
        // d rstd = -rstd^3 x dx / P, and z already holds one rstd.
        const float rstd = kept.rstd[t], norm = -dot(st, z, maps) * rstd * rstd / (float)width;
        for (int m = 0; m < maps; m++) st[m] *= rstd;
        gather_token<n>(above.x + t * width, gu, row, kept.pre + t * n, norm, d, out + t * width);
      }
      gemm(false, false, (int)count, wide, maps, 1.0f, scaled, maps, kept.phi, wide, 1.0f, out + first * width, wide);
      gemm(true, false, maps, wide, (int)count, 1.0f, scaled, maps, kept.x + first * width, wide, 1.0f, mine, wide);
      if (write)
        for (int64_t t = first; t < last; t++)
          write_token_backward<n>(out + t * width, write->x + t * width, write->y + t * d, write->post + t * n,
                                  write->res + t * n * n, d, out + t * width, written.y + t * d,
                                  written.post + t * n, written.res + t * n * n);
    }
  }
  for (int part = 1; part < threads; part++)
    for (int64_t i = 0; i < numbers; i++) grad_phi[i] += parts[(part - 1) * numbers + i];
}

// Sixteen tokens side by side: entry (i, j) of all of them is one row of lanes.
template <int n>
struct Lanes {
  float at[n * n][kLanes];

  void gather(const float* matrices, int64_t count) {
    for (int e = 0; e < n * n; e++)
      for (int64_t l = 0; l < kLanes; l++) at[e][l] = matrices[std::min(l, count - 1) * n * n + e];
  }
  void scatter(float* matrices, int64_t count) const {
    for (int e = 0; e < n * n; e++)
      for (int64_t l = 0; l < count; l++) matrices[l * n * n + e] = at[e][l];
  }
};

template <int n>
struct Vectors {
  float at[n][kLanes];
};

// softmax over entries base, base + stride, ...: their logarithms in `to`, or themselves.
template <int n>
inline void softmax_lanes(const Lanes<n>& from, int base, int stride, bool logarithm, Lanes<n>& to) {
  float top[kLanes], total[kLanes] = {};
  for (int64_t l = 0; l < kLanes; l++) top[l] = from.at[base][l];
  for (int i = 1; i < n; i++)
    for (int64_t l = 0; l < kLanes; l++) top[l] = std::max(top[l], from.at[base + i * stride][l]);
  for (int i = 0; i < n; i++)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; l++) {
      to.at[base + i * stride][l] = fast_exp(from.at[base + i * stride][l] - top[l]);
      total[l] += to.at[base + i * stride][l];
    }
  float shift[kLanes];
  for (int64_t l = 0; l < kLanes; l++) shift[l] = logarithm ? top[l] + std::log(total[l]) : 1.0f / total[l];
  for (int i = 0; i < n; i++)
    for (int64_t l = 0; l < kLanes; l++) {
      float& out = to.at[base + i * stride][l];
      out = logarithm ? from.at[base + i * stride][l] - shift[l] : out * shift[l];
    }
}

// M1 = T_r(T_c(exp(logits))) through logarithms, and the logarithm of T_c.
template <int n>
void first_iteration(const Lanes<n>& logits, Lanes<n>& log_columns, Lanes<n>& m1) {
  for (int j = 0; j < n; j++) softmax_lanes<n>(logits, j, n, true, log_columns);
  for (int i = 0; i < n; i++) softmax_lanes<n>(log_columns, i * n, 1, false, m1);
}

// The vectors that scale M1: columns[t] and rows[t + 1] of every iteration after the first; rows[0] is one.
template <int n>
void scalings(const Lanes<n>& m1, int64_t steps, Vectors<n>* columns, Vectors<n>* rows) {
  for (int i = 0; i < n; i++) std::fill(rows[0].at[i], rows[0].at[i] + kLanes, 1.0f);
  for (int64_t t = 0; t < steps; t++)
    for (int pass = 0; pass < 2; pass++) {
      const Vectors<n>& known = pass ? columns[t] : rows[t];
      Vectors<n>& out = pass ? rows[t + 1] : columns[t];
      for (int a = 0; a < n; a++) {
        float total[kLanes] = {};
        for (int b = 0; b < n; b++) {
          const float* m = m1.at[pass ? a * n + b : b * n + a];
#pragma omp simd
          for (int64_t l = 0; l < kLanes; l++) total[l] += m[l] * known.at[b][l];
        }
#pragma omp simd
        for (int64_t l = 0; l < kLanes; l++) out.at[a][l] = 1.0f / total[l];
      }
    }
}

// M1 diag-scaled by rows and columns; with `other`, that matrix entry by entry instead of M1.
template <int n>
void scale(const Lanes<n>& matrix, const Vectors<n>& rows, const Vectors<n>& columns, Lanes<n>& out) {
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++)
#pragma omp simd
      for (int64_t l = 0; l < kLanes; l++)
        out.at[i * n + j][l] = matrix.at[i * n + j][l] * rows.at[i][l] * columns.at[j][l];
}

// Backward through one scaling v_a = 1 / sum_b M1[a, b] w_b (or of M1's transpose): adds to M1's gradient and to w's.
template <int n>
void scaling_backward(const Lanes<n>& m1, bool transposed, const Vectors<n>& v, const Vectors<n>& w,
                      const Vectors<n>& grad_v, Lanes<n>& grad_m1, Vectors<n>& grad_w) {
  for (int a = 0; a < n; a++) {
    float below[kLanes];
    for (int64_t l = 0; l < kLanes; l++) below[l] = -grad_v.at[a][l] * v.at[a][l] * v.at[a][l];
    for (int b = 0; b < n; b++) {
      const int e = transposed ? b * n + a : a * n + b;
#pragma omp simd
      for (int64_t l = 0; l < kLanes; l++) {
        grad_m1.at[e][l] += below[l] * w.at[b][l];
        grad_w.at[b][l] += m1.at[e][l] * below[l];
      }
    }
  }
}

template <int n>
void sinkhorn_block_backward(const Lanes<n>& logits, const Lanes<n>& grad, int64_t steps, Vectors<n>* columns,
                             Vectors<n>* rows, Lanes<n>& out) {
  Lanes<n> log_columns, m1, grad_m1;
  first_iteration<n>(logits, log_columns, m1);
  grad_m1 = grad;
  if (steps) {
    scalings<n>(m1, steps, columns, rows);
    scale<n>(grad, rows[steps], columns[steps - 1], grad_m1);
    Vectors<n> grad_rows = {}, grad_columns = {};
    for (int i = 0; i < n; i++)
      for (int j = 0; j < n; j++)
        for (int64_t l = 0; l < kLanes; l++) {
          const float scaled = grad.at[i * n + j][l] * m1.at[i * n + j][l];
          grad_rows.at[i][l] += scaled * columns[steps - 1].at[j][l];
          grad_columns.at[j][l] += scaled * rows[steps].at[i][l];
        }
    for (int64_t t = steps; t-- > 0;) {
      scaling_backward<n>(m1, false, rows[t + 1], columns[t], grad_rows, grad_m1, grad_columns);
      grad_rows = {};
      scaling_backward<n>(m1, true, columns[t], rows[t], grad_columns, grad_m1, grad_rows);
      grad_columns = {};
    }
  }
  // Through the row softmax, then through the column softmax of which log_columns is the logarithm.
  float row_sum[n][kLanes] = {}, column_sum[n][kLanes] = {};
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++)
      for (int64_t l = 0; l < kLanes; l++) {
        grad_m1.at[i * n + j][l] *= m1.at[i * n + j][l];
        row_sum[i][l] += grad_m1.at[i * n + j][l];
      }
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++)
      for (int64_t l = 0; l < kLanes; l++) {
        grad_m1.at[i * n + j][l] -= m1.at[i * n + j][l] * row_sum[i][l];
        column_sum[j][l] += grad_m1.at[i * n + j][l];
      }
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++)
#pragma omp simd
      for (int64_t l = 0; l < kLanes; l++)
        out.at[i * n + j][l] = grad_m1.at[i * n + j][l] - fast_exp(log_columns.at[i * n + j][l]) * column_sum[j][l];
}

// Forward, or with `grad` backward.
template <int n>
void sinkhorn(int threads, const float* logits, const float* grad, int64_t tokens, int64_t iters, float* out) {
  const int64_t steps = iters - 1, blocks = (tokens + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t first = b * kLanes * n * n, count = std::min(kLanes, tokens - b * kLanes);
    std::vector<Vectors<n>> columns(steps), rows(steps + 1);
    Lanes<n> given, result;
    given.gather(logits + first, count);
    if (grad) {
      Lanes<n> above;
      above.gather(grad + first, count);
      sinkhorn_block_backward<n>(given, above, steps, columns.data(), rows.data(), result);
    } else {
      Lanes<n> log_columns;
      first_iteration<n>(given, log_columns, result);
      if (steps) {
        scalings<n>(result, steps, columns.data(), rows.data());
        scale<n>(result, rows[steps], columns[steps - 1], result);
      }
    }
    result.scatter(out + first, count);
  }
}

// Run the instance for a number of streams; two and four are compiled.
template <class Run>
int for_streams(int64_t n, Run run) {
  if (n == 2)
    run(std::integral_constant<int, 2>{});
  else if (n == 4)
    run(std::integral_constant<int, 4>{});
  else
    return 1;
  return 0;
}

}  // namespace

extern "C" {

// x [N, n, D] and pre [N, n] to u [N, D].
int tafkir_read_streams(int threads, const float* x, const float* pre, int64_t tokens, int64_t n, int64_t d,
                        float* u) {
  return for_streams(n, [&](auto streams) {
    constexpr int kStreams = decltype(streams)::value;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) read_token<kStreams>(x + t * kStreams * d, pre + t * kStreams, d, u + t * d);
  });
}

// x [N, n, D], y [N, D], post [N, n], res [N, n, n] to out [N, n, D].
int tafkir_write_streams(int threads, const float* x, const float* y, const float* post, const float* res,
                         int64_t tokens, int64_t n, int64_t d, float* out) {
  return for_streams(n, [&](auto streams) {
    constexpr int kStreams = decltype(streams)::value;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++)
      write_token<kStreams>(x + t * kStreams * d, y + t * d, post + t * kStreams, res + t * kStreams * kStreams, d,
                            out + t * kStreams * d);
  });
}

int tafkir_write_streams_backward(int threads, const float* grad, const float* x, const float* y, const float* post,
                                  const float* res, int64_t tokens, int64_t n, int64_t d, float* gx, float* gy,
                                  float* gpost, float* gres) {
  return for_streams(n, [&](auto streams) {
    constexpr int kStreams = decltype(streams)::value;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
      const int64_t wide = t * kStreams * d, square = t * kStreams * kStreams;
      write_token_backward<kStreams>(grad + wide, x + wide, y + t * d, post + t * kStreams, res + square, d, gx + wide,
                                     gy + t * d, gpost + t * kStreams, gres + square);
    }
  });
}

// x [N, n, D], phi [n^2 + 2 n, n D], bias [n], alpha [1] to z [N, n^2 + 2 n], u [N, D], gate and pre [N, n], rstd [N].
int tafkir_project_and_read(int threads, const float* x, const float* phi, const float* bias, const float* alpha,
                            float norm_eps, float pre_eps, int64_t tokens, int64_t n, int64_t d, float* z, float* u,
                            float* gate, float* pre, float* rstd) {
  const Projection by{phi, bias, *alpha, norm_eps, pre_eps};
  return for_streams(n, [&](auto streams) {
    constexpr int kStreams = decltype(streams)::value;
    // Streams that are only read are not touched.
    write_and_read<kStreams>(threads, nullptr, const_cast<float*>(x), by, {tokens, d}, {z, u, gate, pre, rstd});
  });
}

// The writing of one sublayer (to `out`) and the reading of the next.
int tafkir_write_and_read(int threads, const float* x, const float* y, const float* post, const float* res,
                          const float* phi, const float* bias, const float* alpha, float norm_eps, float pre_eps,
                          int64_t tokens, int64_t n, int64_t d, float* out, float* z, float* u, float* gate,
                          float* pre, float* rstd) {
  const Projection by{phi, bias, *alpha, norm_eps, pre_eps};
  const Write write{x, y, post, res};
  return for_streams(n, [&](auto streams) {
    constexpr int kStreams = decltype(streams)::value;
    write_and_read<kStreams>(threads, &write, out, by, {tokens, d}, {z, u, gate, pre, rstd});
  });
}

// To the gradients of x (`total`), phi, and of what pre's sigmoid takes.
int tafkir_project_and_read_backward(int threads, const float* grad_z, const float* grad_u, const float* grad_x,
                                     const float* x, const float* phi, const float* alpha, const float* rstd,
                                     const float* z, const float* gate, const float* pre, int64_t tokens, int64_t n,
                                     int64_t d, float* total, float* grad_phi, float* grad_pre) {
  const Kept kept{x, phi, *alpha, rstd, z, gate, pre};
  return for_streams(n, [&](auto streams) {
    constexpr int kStreams = decltype(streams)::value;
    write_and_read_backward<kStreams>(threads, {grad_z, grad_u, grad_x}, kept, nullptr, {tokens, d}, total, grad_phi,
                                      grad_pre, {});
  });
}

// `out` are the streams that were written and read; gx, gy, gpost and gres belong to what was written.
int tafkir_write_and_read_backward(int threads, const float* grad_z, const float* grad_u, const float* grad_out,
                                   const float* out, const float* phi, const float* alpha, const float* rstd,
                                   const float* z, const float* gate, const float* pre, const float* x,
                                   const float* y, const float* post, const float* res, int64_t tokens, int64_t n,
                                   int64_t d, float* gx, float* gy, float* gpost, float* gres, float* grad_phi,
                                   float* grad_pre) {
  const Kept kept{out, phi, *alpha, rstd, z, gate, pre};
  const Write write{x, y, post, res};
  return for_streams(n, [&](auto streams) {
    constexpr int kStreams = decltype(streams)::value;
    write_and_read_backward<kStreams>(threads, {grad_z, grad_u, grad_out}, kept, &write, {tokens, d}, gx, grad_phi,
                                      grad_pre, {gy, gpost, gres});
  });
}

// logits [N, n, n] to the doubly stochastic [N, n, n].
int tafkir_sinkhorn(int threads, const float* logits, int64_t tokens, int64_t n, int64_t iters, float* out) {
  return for_streams(n, [&](auto streams) {
    constexpr int kStreams = decltype(streams)::value;
    sinkhorn<kStreams>(threads, logits, nullptr, tokens, iters, out);
  });
}

int tafkir_sinkhorn_backward(int threads, const float* logits, const float* grad, int64_t tokens, int64_t n,
                             int64_t iters, float* out) {
  return for_streams(n, [&](auto streams) {
    constexpr int kStreams = decltype(streams)::value;
    sinkhorn<kStreams>(threads, logits, grad, tokens, iters, out);
  });
}

}  // extern "C"
