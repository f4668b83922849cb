// Fused float32 kernels of the training step on the CPU. Each computes what a torch function in `tafkir.ops` computes;
// that function is its reference and its fallback. Loops are written for the compiler to vectorise.
//
// Threads split rows, documents or experts; sums over rows are taken in blocks of a fixed size and in a fixed order.
// So the same input and number of threads give the same bits. Where no matrix product is called (attention and experts
// do), the number does not matter either; a BLAS may sum in another order for another number.

#include "shared.h"

Sgemm blas_sgemm = nullptr;

namespace {

constexpr int64_t kRowBlock = 256;  // rows whose weight gradients are summed before they meet those of other rows

// Sixteen running maxima: the compiler does not reorder a maximum, because of NaN.
inline float row_max(const float* x, int64_t n) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, x[0]);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; j++) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  for (int64_t half = kLanes / 2; half; half /= 2)
    for (int64_t j = 0; j < half; j++) lanes[j] = lanes[j + half] > lanes[j] ? lanes[j + half] : lanes[j];
  float top = lanes[0];
  for (; i < n; i++) top = x[i] > top ? x[i] : top;
  return top;
}

// dx = rstd (w g - x_hat mean(w g x_hat)) with x_hat = rstd x; adds g x_hat to dw.
inline void norm_row_backward(const float* RESTRICT g, const float* RESTRICT x, const float* RESTRICT w, float rstd,
                              float* RESTRICT dx, float* RESTRICT dw, int64_t d) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; i++) {
    const float t = g[i] * x[i] * rstd;
    dw[i] += t;
    sum += t * w[i];
  }
  const float mean = sum / (float)d;
#pragma omp simd
  for (int64_t i = 0; i < d; i++) dx[i] = rstd * (w[i] * g[i] - x[i] * rstd * mean);
}

void sum_blocks(const std::vector<float>& parts, int64_t blocks, int64_t d, float* out) {
  std::fill(out, out + d, 0.0f);
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t i = 0; i < d; i++) out[i] += parts[b * d + i];
}

struct Rope {
  const float *cos, *sin;
  int64_t half;
};

// Rotate one head (tafkir.ops.rope); `sign` -1 turns back.
inline void rotate_row(const float* RESTRICT x, const Rope& rope, int64_t token, float sign, float* RESTRICT out,
                       int64_t head_dim) {
  const float *c = rope.cos + token * rope.half, *s = rope.sin + token * rope.half;
#pragma omp simd
  for (int64_t j = 0; j < rope.half; j++) {
    const float first = x[j], second = x[rope.half + j], sine = sign * s[j];
    out[j] = first * c[j] - second * sine;
    out[rope.half + j] = second * c[j] + first * sine;
  }
  for (int64_t j = 2 * rope.half; j < head_dim; j++) out[j] = x[j];
}

// The softmax of rows [first, last) of one head's causal scores, in place; what lies to the right becomes zero.
void causal_softmax(float* scores, int64_t ld, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    float* RESTRICT row = scores + i * ld;
    // Whole rows, so that no loop has a ragged end: e^x of what is hidden is exactly zero.
    std::fill(row + i + 1, row + last, -1e30f);
    const float top = row_max(row, last);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < last; j++) sum += row[j] = fast_exp(row[j] - top);
    const float scale = 1.0f / sum;
#pragma omp simd
    for (int64_t j = 0; j < last; j++) row[j] *= scale;
  }
}

// Through the softmax: grad = P (grad - sum(P grad)) row by row, in place.
void softmax_backward(const float* weights, float* grad, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i++) {
    const float* RESTRICT p = weights + i * ld;
    float* RESTRICT g = grad + i * columns;
    const float mean = dot(p, g, columns);
#pragma omp simd
    for (int64_t j = 0; j < columns; j++) g[j] = p[j] * (g[j] - mean);
  }
}

// Through w silu(gate) up: what the down projection reads, d gate_up in place of gate_up, and d w (returned).
inline float swiglu_row_backward(float* RESTRICT gate_up, float* RESTRICT grad, float w, int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; i++) {
    const float gate = gate_up[i], up = gate_up[width + i], s = sigmoid(gate), silu = gate * s, g = grad[i] * w;
    sum += grad[i] * silu * up;
    grad[i] = w * silu * up;
    gate_up[i] = g * up * (s + silu - silu * s);
    gate_up[width + i] = g * silu;
  }
  return sum;
}

inline void swiglu_row(const float* RESTRICT gate_up, float w, float* RESTRICT out, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; i++) out[i] = w * (gate_up[i] * sigmoid(gate_up[i])) * gate_up[width + i];
}

inline bool all_finite(const float* x, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; i++) finite &= std::isfinite(x[i]);
  return finite;
}

// Indices of the `count` largest of finite values, best first, the lower index where they are equal; takes them out.
inline void take_best(float* values, int64_t n, int64_t count, int64_t* out) {
  for (int64_t c = 0; c < count; c++) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
      if (values[i] > values[best]) best = i;
    out[c] = best;
    values[best] = -INFINITY;
  }
}

}  // namespace

extern "C" {

void tafkir_use_sgemm(void* sgemm) { blas_sgemm = (Sgemm)sgemm; }

int tafkir_rms_norm(int threads, const float* x, const float* w, float eps, int64_t n, int64_t d, float* out,
                     float* rstd) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n; t++) {
    const float* RESTRICT row = x + t * d;
    float* RESTRICT to = out + t * d;
    const float r = 1.0f / std::sqrt(dot(row, row, d) / (float)d + eps);
    rstd[t] = r;
#pragma omp simd
    for (int64_t i = 0; i < d; i++) to[i] = row[i] * r * w[i];
  }
  return 0;
}

int tafkir_rms_norm_backward(int threads, const float* grad, const float* x, const float* w, const float* rstd,
                              int64_t n, int64_t d, float* dx, float* dw) {
  const int64_t blocks = (n + kRowBlock - 1) / kRowBlock;
  std::vector<float> parts(blocks * d, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t t = b * kRowBlock; t < std::min(n, (b + 1) * kRowBlock); t++)
      norm_row_backward(grad + t * d, x + t * d, w, rstd[t], dx + t * d, parts.data() + b * d, d);
  sum_blocks(parts, blocks, d, dw);
  return 0;
}

// qkv [N, H + 2G, K] to q [N, H, K], k and v [N, G, K]; rstd [N, H + G].
int tafkir_split_norm_rope(int threads, const float* qkv, const float* q_weight, const float* k_weight, float eps,
                            const float* cos, const float* sin, int64_t n, int64_t heads, int64_t kv_heads,
                            int64_t head_dim, int64_t half, float* q, float* k, float* v, float* rstd) {
  const Rope rope{cos, sin, half};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n; t++) {
    std::vector<float> buffer(head_dim);
    float* RESTRICT normed = buffer.data();
    const float* row = qkv + t * (heads + 2 * kv_heads) * head_dim;
    for (int64_t h = 0; h < heads + kv_heads; h++) {
      const float* RESTRICT x = row + h * head_dim;
      const float* RESTRICT w = h < heads ? q_weight : k_weight;
      const float r = 1.0f / std::sqrt(dot(x, x, head_dim) / (float)head_dim + eps);
      rstd[t * (heads + kv_heads) + h] = r;
#pragma omp simd
      for (int64_t i = 0; i < head_dim; i++) normed[i] = x[i] * r * w[i];
      float* to = h < heads ? q + (t * heads + h) * head_dim : k + (t * kv_heads + h - heads) * head_dim;
      rotate_row(normed, rope, t, 1.0f, to, head_dim);
    }
    std::memcpy(v + t * kv_heads * head_dim, row + (heads + kv_heads) * head_dim, kv_heads * head_dim * 4);
  }
  return 0;
}

int tafkir_split_norm_rope_backward(int threads, const float* dq, const float* dk, const float* dv, const float* qkv,
                                     const float* q_weight, const float* k_weight, const float* rstd,
                                     const float* cos, const float* sin, int64_t n, int64_t heads, int64_t kv_heads,
                                     int64_t head_dim, int64_t half, float* dqkv, float* dq_weight,
                                     float* dk_weight) {
  const Rope rope{cos, sin, half};
  const int64_t blocks = (n + kRowBlock - 1) / kRowBlock, normed = heads + kv_heads;
  std::vector<float> q_parts(blocks * head_dim, 0.0f), k_parts(blocks * head_dim, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    std::vector<float> turned(head_dim);
    for (int64_t t = b * kRowBlock; t < std::min(n, (b + 1) * kRowBlock); t++) {
      const int64_t row = t * (normed + kv_heads) * head_dim;
      for (int64_t h = 0; h < normed; h++) {
        const bool is_q = h < heads;
        const float* g = is_q ? dq + (t * heads + h) * head_dim : dk + (t * kv_heads + h - heads) * head_dim;
        rotate_row(g, rope, t, -1.0f, turned.data(), head_dim);
        norm_row_backward(turned.data(), qkv + row + h * head_dim, is_q ? q_weight : k_weight, rstd[t * normed + h],
                          dqkv + row + h * head_dim, (is_q ? q_parts : k_parts).data() + b * head_dim, head_dim);
      }
      std::memcpy(dqkv + row + normed * head_dim, dv + t * kv_heads * head_dim, kv_heads * head_dim * 4);
    }
  }
  sum_blocks(q_parts, blocks, head_dim, dq_weight);
  sum_blocks(k_parts, blocks, head_dim, dk_weight);
  return 0;
}

// Causal attention within documents. `weights` keeps every head's softmax: document d's H blocks of T x T from
// weight_starts[d] on. Queries go in blocks of `step`, so that little above the diagonal is computed.
int tafkir_attention(int threads, const float* q, const float* k, const float* v, const int64_t* bounds,
                      const int64_t* weight_starts, int64_t docs, int64_t heads, int64_t kv_heads, int64_t head_dim,
                      int64_t step, float* out, float* weights) {
  const float scale = 1.0f / std::sqrt((float)head_dim);
  const int ldq = (int)(heads * head_dim), ldk = (int)(kv_heads * head_dim), kd = (int)head_dim;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < docs * heads; item++) {
    const int64_t doc = item / heads, h = item % heads, g = h / (heads / kv_heads);
    const int64_t start = bounds[doc], length = bounds[doc + 1] - start;
    float* p = weights + weight_starts[doc] + h * length * length;
    const float *qh = q + start * ldq + h * head_dim, *kh = k + start * ldk + g * head_dim;
    const float* vh = v + start * ldk + g * head_dim;
    for (int64_t i = 0; i < length; i += step) {
      const int64_t end = std::min(length, i + step);
      const int rows = (int)(end - i), seen = (int)end, ldp = (int)length;
      gemm(false, true, rows, seen, kd, scale, qh + i * ldq, ldq, kh, ldk, 0.0f, p + i * length, ldp);
      causal_softmax(p, length, i, end);
      gemm(false, false, rows, kd, seen, 1.0f, p + i * length, ldp, vh, ldk, 0.0f,
           out + (start + i) * ldq + h * head_dim, ldq);
    }
  }
  return 0;
}

int tafkir_attention_backward(int threads, const float* grad, const float* q, const float* k, const float* v,
                               const float* weights, const int64_t* bounds, const int64_t* weight_starts,
                               int64_t docs, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t step,
                               float* dq, float* dk, float* dv) {
  const float scale = 1.0f / std::sqrt((float)head_dim);
  const int ldq = (int)(heads * head_dim), ldk = (int)(kv_heads * head_dim), kd = (int)head_dim;
  const int64_t repeats = heads / kv_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < docs * kv_heads; item++) {
    const int64_t doc = item / kv_heads, g = item % kv_heads, start = bounds[doc], length = bounds[doc + 1] - start;
    const int ldp = (int)length;
    const float *kh = k + start * ldk + g * head_dim, *vh = v + start * ldk + g * head_dim;
    float *dkh = dk + start * ldk + g * head_dim, *dvh = dv + start * ldk + g * head_dim;
    const Scratch scratch(std::min(step, length) * length);
    float* ds = scratch.get();
    for (int64_t r = 0; r < repeats; r++) {
      const int64_t h = g * repeats + r;
      const float* p = weights + weight_starts[doc] + h * length * length;
      const float *qh = q + start * ldq + h * head_dim, *gh = grad + start * ldq + h * head_dim;
      // The last block sees every key: it goes first and, for the first head, overwrites.
      for (int64_t i = (length - 1) / step * step; i >= 0; i -= step) {
        const int rows = (int)(std::min(length, i + step) - i), seen = (int)(i + rows);
        const float beta = r == 0 && i + step >= length ? 0.0f : 1.0f;
        const float *pi = p + i * length, *gi = gh + i * ldq;
        gemm(true, false, seen, kd, rows, 1.0f, pi, ldp, gi, ldq, beta, dvh, ldk);
        gemm(false, true, rows, seen, kd, 1.0f, gi, ldq, vh, ldk, 0.0f, ds, seen);
        softmax_backward(pi, ds, length, rows, seen);
        gemm(false, false, rows, kd, seen, scale, ds, seen, kh, ldk, 0.0f,
             dq + (start + i) * ldq + h * head_dim, ldq);
        gemm(true, false, seen, kd, rows, scale, ds, seen, qh + i * ldq, ldq, beta, dkh, ldk);
      }
    }
  }
  return 0;
}

int tafkir_swiglu(int threads, const float* gate_up, int64_t n, int64_t width, float* out) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n; t++) swiglu_row(gate_up + 2 * t * width, 1.0f, out + t * width, width);
  return 0;
}

int tafkir_swiglu_backward(int threads, const float* grad, const float* gate_up, int64_t n, int64_t width,
                            float* out) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n; t++) {
    const float *RESTRICT g = grad + t * width, *RESTRICT x = gate_up + 2 * t * width;
    float* RESTRICT to = out + 2 * t * width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
      const float s = sigmoid(x[i]), silu = x[i] * s;
      to[i] = g[i] * x[width + i] * (s + silu - silu * s);
      to[width + i] = g[i] * silu;
    }
  }
  return 0;
}

// The experts of each token: see tafkir.ops.routing. Returns 1 where a score or a group's score is not finite.
int tafkir_choose_experts(int threads, const float* scores, const float* bias, int64_t n, int64_t experts,
                           int64_t groups, int64_t open_groups, int64_t active, int64_t* ids) {
  const int64_t size = experts / groups;
  int strange = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : strange)
  for (int64_t t = 0; t < n; t++) {
    std::vector<float> biased(experts), group_scores(groups);
    std::vector<int64_t> chosen(open_groups);
    for (int64_t e = 0; e < experts; e++) biased[e] = scores[t * experts + e] + (bias ? bias[e] : 0.0f);
    if (!all_finite(biased.data(), experts)) {
      strange = 1;
      continue;
    }
    if (open_groups < groups) {
      for (int64_t g = 0; g < groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t e = g * size; e < (g + 1) * size; e++) {
          second = std::max(second, std::min(first, biased[e]));
          first = std::max(first, biased[e]);
        }
        group_scores[g] = size > 1 ? first + second : first;
      }
      if (!all_finite(group_scores.data(), groups)) {
        strange = 1;
        continue;
      }
      take_best(group_scores.data(), groups, open_groups, chosen.data());
      // take_best leaves -infinity where it took: the others are closed.
      for (int64_t e = 0; e < experts; e++)
        if (group_scores[e / size] != -INFINITY) biased[e] = -INFINITY;
    }
    take_best(biased.data(), experts, active, ids + t * active);
  }
  return strange;
}

// Sort the N * A pairs by expert, stable: order [P] (pair in sorted place), inverse [P], starts [E + 1].
// Returns 1 for an expert that is not there.
int tafkir_sort_pairs(const int64_t* ids, int64_t pairs, int64_t experts, int64_t* order, int64_t* inverse,
                       int64_t* starts) {
  std::fill(starts, starts + experts + 1, 0);
  for (int64_t p = 0; p < pairs; p++) {
    if (ids[p] < 0 || ids[p] >= experts) return 1;
    starts[ids[p] + 1]++;
  }
  for (int64_t e = 0; e < experts; e++) starts[e + 1] += starts[e];
  std::vector<int64_t> next(starts, starts + experts);
  for (int64_t p = 0; p < pairs; p++) {
    const int64_t place = next[ids[p]]++;
    order[place] = p;
    inverse[p] = place;
  }
  return 0;
}

static void sum_pairs(int threads, const float* y, const int64_t* inverse, int64_t n, int64_t active, int64_t d,
                      float* out) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n; t++) {
    float* RESTRICT to = out + t * d;
    std::memcpy(to, y + inverse[t * active] * d, d * 4);
    for (int64_t a = 1; a < active; a++) {
      const float* RESTRICT from = y + inverse[t * active + a] * d;
#pragma omp simd
      for (int64_t i = 0; i < d; i++) to[i] += from[i];
    }
  }
}

static void gather(const float* x, const int64_t* order, int64_t count, int64_t active, int64_t d, float* out) {
  for (int64_t p = 0; p < count; p++) std::memcpy(out + p * d, x + order[p] / active * d, d * 4);
}

// The routed experts: gate_up_P [P, 2I] is kept for the backward, y_P [P, D] is scratch.
int tafkir_experts(int threads, const float* x, const float* w_in, const float* w_out, const float* weights,
                    const int64_t* order, const int64_t* inverse, const int64_t* starts, int64_t n, int64_t active,
                    int64_t experts, int64_t d, int64_t width, float* gate_up, float* y, float* out) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t e = 0; e < experts; e++) {
    const int64_t first = starts[e], count = starts[e + 1] - first;
    if (!count) continue;
    const Scratch scratch(count * std::max(d, width));
    float *rows = scratch.get(), *hidden = gate_up + first * 2 * width;
    gather(x, order + first, count, active, d, rows);
    gemm(false, true, (int)count, (int)(2 * width), (int)d, 1.0f, rows, (int)d, w_in + e * 2 * width * d, (int)d,
         0.0f, hidden, (int)(2 * width));
    for (int64_t p = 0; p < count; p++)
      swiglu_row(hidden + 2 * p * width, weights[order[first + p]], rows + p * width, width);
    gemm(false, true, (int)count, (int)d, (int)width, 1.0f, rows, (int)width, w_out + e * d * width, (int)width, 0.0f,
         y + first * d, (int)d);
  }
  sum_pairs(threads, y, inverse, n, active, d, out);
  return 0;
}

// d x, d w_in, d w_out and d weights [N, A]; dx_P [P, D] is scratch.
int tafkir_experts_backward(int threads, const float* grad, const float* x, const float* w_in, const float* w_out,
                             const float* weights, const int64_t* order, const int64_t* inverse,
                             const int64_t* starts, int64_t n, int64_t active, int64_t experts, int64_t d,
                             int64_t width, const float* gate_up, float* dx_pairs, float* dx, float* dw_in,
                             float* dw_out, float* dweights) {
  const int di = (int)d, wi = (int)width, w2 = (int)(2 * width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t e = 0; e < experts; e++) {
    const int64_t first = starts[e], count = starts[e + 1] - first;
    const int c = (int)count;
    float *din = dw_in + e * 2 * width * d, *dout = dw_out + e * d * width;
    if (!count) {
      std::fill(din, din + 2 * width * d, 0.0f);
      std::fill(dout, dout + d * width, 0.0f);
      continue;
    }
    const Scratch scratch(count * (d + 3 * width));
    float *rows = scratch.get(), *dh = rows + count * d, *hidden = dh + count * width;
    std::memcpy(hidden, gate_up + first * 2 * width, count * 2 * width * 4);
    gather(grad, order + first, count, active, d, rows);
    gemm(false, false, c, wi, di, 1.0f, rows, di, w_out + e * d * width, wi, 0.0f, dh, wi);
    for (int64_t p = 0; p < count; p++) {
      const int64_t pair = order[first + p];
      dweights[pair] = swiglu_row_backward(hidden + 2 * p * width, dh + p * width, weights[pair], width);
    }
    gemm(true, false, di, wi, c, 1.0f, rows, di, dh, wi, 0.0f, dout, wi);
    gather(x, order + first, count, active, d, rows);
    gemm(true, false, w2, di, c, 1.0f, hidden, w2, rows, di, 0.0f, din, di);
    gemm(false, false, c, di, w2, 1.0f, hidden, w2, w_in + e * 2 * width * d, di, 0.0f, dx_pairs + first * d, di);
  }
  sum_pairs(threads, dx_pairs, inverse, n, active, d, dx);
  return 0;
}

// In place of each row's logits: softmax minus one-hot where the gradient is asked for. `logprobs` comes with the
// targets' logits and leaves with their log-probabilities.
int tafkir_softmax_minus_onehot(int threads, float* logits, const int64_t* targets, int64_t n, int64_t vocab,
                                int64_t with_grad, float* logprobs) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n; t++) {
    float* RESTRICT row = logits + t * vocab;
    const float top = row_max(row, vocab);
    float sum = 0.0f;
    if (!with_grad) {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < vocab; i++) sum += fast_exp(row[i] - top);
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < vocab; i++) sum += row[i] = fast_exp(row[i] - top);
      const float scale = 1.0f / sum;
#pragma omp simd
      for (int64_t i = 0; i < vocab; i++) row[i] *= scale;
      row[targets[t]] -= 1.0f;
    }
    logprobs[t] = logprobs[t] - top - std::log(sum);
  }
  return 0;
}

}  // extern "C"
