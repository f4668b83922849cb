// The passes between the matrix products of residual sublayers with a norm after them, rms(x + f(x)), in float32 and
// bfloat16: SwiGLU both ways, the norm along rows or columns both ways, RoPE on its way into heads. Sums are float32.

#include "shared.h"

namespace {

struct Half {
  uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(Half x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline void narrow(float x, float& out) { out = x; }

// Round to nearest, ties to even. What is no number stays so: the processor's own NaN and those of bfloat16 have zeros
// where the rounding adds.
inline void narrow(float x, Half& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out.bits = (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// 1 / (1 + e^-x) as precisely as the type holds it.
inline float logistic(float x, float) { return sigmoid(x); }

// To 9e-4, a quarter of what bfloat16 tells apart: 2^y by a cubic, and the division by two steps of Newton.
inline float logistic(float x, Half) {
  const float y = std::min(std::max(x * -1.44269504f, -64.0f), 64.0f);
  const float n = std::floor(y + 0.5f), f = y - n;
  const float p = 1.0f + f * (0.69314718f + f * (0.24022651f + f * 0.0555f));
  int32_t bits;
  std::memcpy(&bits, &p, 4);
  bits += (int32_t)n << 23;
  float d;
  std::memcpy(&d, &bits, 4);
  d += 1.0f;
  std::memcpy(&bits, &d, 4);
  bits = 0x7EF311C7 - bits;
  float r;
  std::memcpy(&r, &bits, 4);
  r *= 2.0f - d * r;
  return r * (2.0f - d * r);
}

// How many numbers one thread takes at a time, of rows however long.
constexpr int64_t kSpan = 1 << 13;
// Columns of a norm along columns that are worked on at a time: their sums stay in registers and the first cache.
constexpr int64_t kColumns = 256;

template <typename T>
void swiglu_span(const T* RESTRICT gate, const T* RESTRICT up, T* RESTRICT out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float g = widen(gate[i]);
    narrow(g * logistic(g, T{}) * widen(up[i]), out[i]);
  }
}

template <typename T>
void swiglu_backward_span(const T* RESTRICT grad, const T* RESTRICT gate, const T* RESTRICT up, T* RESTRICT to_gate,
                          T* RESTRICT to_up, T* RESTRICT hidden, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float d = widen(grad[i]), g = widen(gate[i]), u = widen(up[i]), s = logistic(g, T{}), silu = g * s;
    narrow(silu * u, hidden[i]);
    narrow(d * u * (s + silu - silu * s), to_gate[i]);
    narrow(d * silu, to_up[i]);
  }
}

template <typename T>
void swiglu(int threads, const T* x, int64_t rows, int64_t width, T* out) {
  const int64_t spans = (width + kSpan - 1) / kSpan;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < rows * spans; item++) {
    const int64_t r = item / spans, from = item % spans * kSpan, n = std::min(kSpan, width - from);
    const T* gate = x + 2 * r * width + from;
    swiglu_span(gate, gate + width, out + r * width + from, n);
  }
}

template <typename T>
void swiglu_backward(int threads, const T* grad, const T* x, int64_t rows, int64_t width, T* out, T* hidden) {
  const int64_t spans = (width + kSpan - 1) / kSpan;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < rows * spans; item++) {
    const int64_t r = item / spans, from = item % spans * kSpan, n = std::min(kSpan, width - from);
    const int64_t narrow_at = r * width + from, wide_at = 2 * r * width + from;
    swiglu_backward_span(grad + narrow_at, x + wide_at, x + wide_at + width, out + wide_at, out + wide_at + width,
                         hidden + narrow_at, n);
  }
}

template <typename T>
void norm_rows(int threads, const T* x, const T* update, float eps, int64_t n, int64_t d, T* out, float* rstd) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n; t++) {
    const T *RESTRICT a = x + t * d, *RESTRICT b = update + t * d;
    T* RESTRICT to = out + t * d;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; i++) {
      const float v = widen(a[i]) + widen(b[i]);
      sum += v * v;
    }
    const float r = 1.0f / std::sqrt(sum / (float)d + eps);
    rstd[t] = r;
#pragma omp simd
    for (int64_t i = 0; i < d; i++) narrow((widen(a[i]) + widen(b[i])) * r, to[i]);
  }
}

template <typename T>
void norm_columns(int threads, const T* x, const T* update, float eps, int64_t rows, int64_t n, T* out, float* rstd) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t from = 0; from < n; from += kColumns) {
    const int64_t count = std::min(kColumns, n - from);
    float sums[kColumns] = {};
    for (int64_t s = 0; s < rows; s++) {
      const T *RESTRICT a = x + s * n + from, *RESTRICT b = update + s * n + from;
#pragma omp simd
      for (int64_t i = 0; i < count; i++) {
        const float v = widen(a[i]) + widen(b[i]);
        sums[i] += v * v;
      }
    }
    for (int64_t i = 0; i < count; i++) sums[i] = 1.0f / std::sqrt(sums[i] / (float)rows + eps);
    std::copy(sums, sums + count, rstd + from);
    for (int64_t s = 0; s < rows; s++) {
      const T *RESTRICT a = x + s * n + from, *RESTRICT b = update + s * n + from;
      T* RESTRICT to = out + s * n + from;
#pragma omp simd
      for (int64_t i = 0; i < count; i++) narrow((widen(a[i]) + widen(b[i])) * sums[i], to[i]);
    }
  }
}

// Of the sum that was normed: rstd (g - out mean(g out)).
template <typename T>
void norm_rows_backward(int threads, const T* grad, const T* out, const float* rstd, int64_t n, int64_t d, T* to) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n; t++) {
    const T *RESTRICT g = grad + t * d, *RESTRICT y = out + t * d;
    T* RESTRICT dx = to + t * d;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; i++) sum += widen(g[i]) * widen(y[i]);
    const float r = rstd[t], mean = sum / (float)d;
#pragma omp simd
    for (int64_t i = 0; i < d; i++) narrow((widen(g[i]) - widen(y[i]) * mean) * r, dx[i]);
  }
}

template <typename T>
void norm_columns_backward(int threads, const T* grad, const T* out, const float* rstd, int64_t rows, int64_t n,
                           T* to) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t from = 0; from < n; from += kColumns) {
    const int64_t count = std::min(kColumns, n - from);
    float means[kColumns] = {};
    for (int64_t s = 0; s < rows; s++) {
      const T *RESTRICT g = grad + s * n + from, *RESTRICT y = out + s * n + from;
#pragma omp simd
      for (int64_t i = 0; i < count; i++) means[i] += widen(g[i]) * widen(y[i]);
    }
    for (int64_t i = 0; i < count; i++) means[i] /= (float)rows;
    for (int64_t s = 0; s < rows; s++) {
      const T *RESTRICT g = grad + s * n + from, *RESTRICT y = out + s * n + from;
      T* RESTRICT dx = to + s * n + from;
#pragma omp simd
      for (int64_t i = 0; i < count; i++) narrow((widen(g[i]) - widen(y[i]) * means[i]) * rstd[from + i], dx[i]);
    }
  }
}

// One head's numbers turned by its position's angles (forward: sign 1; back: -1), halves apart.
template <typename T>
inline void turn(const T* RESTRICT x, const float* RESTRICT cos, const float* RESTRICT sin, float sign, int64_t half,
                 T* RESTRICT out) {
#pragma omp simd
  for (int64_t j = 0; j < half; j++) {
    const float a = widen(x[j]), b = widen(x[half + j]), c = cos[j], s = sign * sin[j];
    narrow(a * c - b * s, out[j]);
    narrow(b * c + a * s, out[half + j]);
  }
}

// joined [batch, length, 3, heads, dim] <-> parts [3, batch, heads, length, dim], queries and keys turned.
template <typename T>
void split_heads(int threads, const T* joined, const float* cos, const float* sin, int64_t batch, int64_t length,
                 int64_t heads, int64_t dim, T* parts) {
  const int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t bt = 0; bt < batch * length; bt++) {
    const int64_t b = bt / length, t = bt % length;
    for (int64_t part = 0; part < 3; part++)
      for (int64_t h = 0; h < heads; h++) {
        const T* from = joined + ((bt * 3 + part) * heads + h) * dim;
        T* to = parts + (((part * batch + b) * heads + h) * length + t) * dim;
        if (part < 2 && cos)
          turn(from, cos + t * half, sin + t * half, 1.0f, half, to);
        else
          std::copy(from, from + dim, to);
      }
  }
}

template <typename T>
void split_heads_backward(int threads, const T* const* grads, const float* cos, const float* sin, int64_t batch,
                          int64_t length, int64_t heads, int64_t dim, T* joined) {
  const int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t bt = 0; bt < batch * length; bt++) {
    const int64_t b = bt / length, t = bt % length;
    for (int64_t part = 0; part < 3; part++)
      for (int64_t h = 0; h < heads; h++) {
        const T* from = grads[part] + ((b * heads + h) * length + t) * dim;
        T* to = joined + ((bt * 3 + part) * heads + h) * dim;
        if (part < 2 && cos)
          turn(from, cos + t * half, sin + t * half, -1.0f, half, to);
        else
          std::copy(from, from + dim, to);
      }
  }
}

}  // namespace

// `half` says that the numbers are bfloat16; `columns` that the norm runs along columns.
#define BY_TYPE(half, call) \
  if (half) {               \
    using T = Half;         \
    call;                   \
  } else {                  \
    using T = float;        \
    call;                   \
  }                         \
  return 0

extern "C" {

int tafkir_wide_swiglu(int threads, int half, const void* x, int64_t rows, int64_t width, void* out) {
  BY_TYPE(half, swiglu(threads, (const T*)x, rows, width, (T*)out));
}

int tafkir_wide_swiglu_backward(int threads, int half, const void* grad, const void* x, int64_t rows, int64_t width,
                                void* out, void* hidden) {
  BY_TYPE(half, swiglu_backward(threads, (const T*)grad, (const T*)x, rows, width, (T*)out, (T*)hidden));
}

int tafkir_post_norm(int threads, int half, int columns, const void* x, const void* update, float eps, int64_t rows,
                     int64_t n, void* out, float* rstd) {
  if (columns) {
    BY_TYPE(half, norm_columns(threads, (const T*)x, (const T*)update, eps, rows, n, (T*)out, rstd));
  }
  BY_TYPE(half, norm_rows(threads, (const T*)x, (const T*)update, eps, rows, n, (T*)out, rstd));
}

int tafkir_post_norm_backward(int threads, int half, int columns, const void* grad, const void* out,
                              const float* rstd, int64_t rows, int64_t n, void* to) {
  if (columns) {
    BY_TYPE(half, norm_columns_backward(threads, (const T*)grad, (const T*)out, rstd, rows, n, (T*)to));
  }
  BY_TYPE(half, norm_rows_backward(threads, (const T*)grad, (const T*)out, rstd, rows, n, (T*)to));
}

// cos and sin [length, dim / 2], or null for none.
int tafkir_split_heads(int threads, int half, const void* joined, const float* cos, const float* sin, int64_t batch,
                       int64_t length, int64_t heads, int64_t dim, void* parts) {
  BY_TYPE(half, split_heads(threads, (const T*)joined, cos, sin, batch, length, heads, dim, (T*)parts));
}

int tafkir_split_heads_backward(int threads, int half, const void* dq, const void* dk, const void* dv,
                                const float* cos, const float* sin, int64_t batch, int64_t length, int64_t heads,
                                int64_t dim, void* joined) {
  const void* grads[3] = {dq, dk, dv};
  BY_TYPE(half, split_heads_backward(threads, (const T* const*)grads, cos, sin, batch, length, heads, dim, (T*)joined));
}

}  // extern "C"
