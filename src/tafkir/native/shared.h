// What the kernels' files share: torch's matrix product, exponentials, scratch memory, inner products.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__GNUC__)
#define RESTRICT __restrict__
#else
#define RESTRICT
#endif

using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);

// Torch's; `tafkir_use_sgemm` sets it.
extern __attribute__((visibility("hidden"))) Sgemm blas_sgemm;

namespace {

// Row-major C[M,N] = alpha op(A) op(B) + beta C by the BLAS of torch, which is column-major: the transposed product.
inline void gemm(bool ta, bool tb, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                 int ldb, float beta, float* c, int ldc) {
  blas_sgemm(tb ? "T" : "N", ta ? "T" : "N", &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &ldc);
}

// e^x to 1 ulp or so (Cephes' polynomial); inlined, so that loops over it vectorise. 0 below -87.3.
inline float fast_exp(float x) {
  const float low = -87.3f;
  const float y = std::min(std::max(x, low), 88.3f);
  const float n = std::floor(y * 1.44269504088896341f + 0.5f);
  const float r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return x < low ? 0.0f : p * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// 64-byte aligned, as torch's tensors are: the last bit of a BLAS's sums may depend on where its operands begin.
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<float*>(::operator new(count * sizeof(float), kAlign))) {}
  ~Scratch() { ::operator delete(data_, kAlign); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  float* data_;
};

inline float dot(const float* RESTRICT x, const float* RESTRICT y, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
  return sum;
}

}  // namespace
