// Products by the processor's matrix unit (AMX): its numbers are bfloat16, so an activation goes in as the sum of
// three of them (8 + 8 + 8 bits, float32's precision), or fewer where that is asked for, a stored weight as one that is
// exact. What scales a row of weights, or a part of it, comes after the sums. See Henry, Tang and Heinecke,
// arXiv 1904.06376.

#pragma once

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TAFKIR_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// 0: not used; tafkir_use_tiles sets it.
inline int& tiles_wanted() {
  static int wanted = 1;
  return wanted;
}

// Weight rows of a panel (two tiles), tokens of a tile, columns of a step, pieces of an activation at most.
constexpr int64_t kTileRows = 32, kTileTokens = 16, kStep = 32, kPieces = 3;

// How many pieces an activation goes in as; tafkir_tile_pieces sets it.
inline int64_t& pieces_wanted() {
  static int64_t wanted = kPieces;
  return wanted;
}

inline int64_t steps_of(int64_t columns) { return (columns + kStep - 1) / kStep; }

// Halves that `count` tokens of so many columns take once they are packed.
inline int64_t packed_size(int64_t count, int64_t columns) { return count * steps_of(columns) * kStep * kPieces; }

#ifdef TAFKIR_TILES

inline bool tiles_usable() {
  // The kernel saves a thread's tiles only for processes that have asked: ARCH_REQ_XCOMP_PERM, XTILEDATA.
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted && tiles_wanted();
}

// 32 numbers as bfloat16, and what they lose by it.
inline __m512i take_piece(Floats& first, Floats& second) {
  const __m512i piece = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  first -= bits_of<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(piece)), 16));
  second -= bits_of<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(piece, 1)), 16));
  return piece;
}

inline void load_columns(const float* row, int64_t c, int64_t columns, Floats& first, Floats& second) {
  first = load_as<Floats>(row + c);
  second = c + 16 < columns ? load_as<Floats>(row + c + 16) : Floats{};
}

// Up to sixteen tokens for the right-hand side: by step and piece, sixteen pairs of columns x `count` tokens.
inline void pack_tokens(const float* const* x, int64_t count, int64_t columns, int64_t pieces, uint16_t* to) {
  const __m512i places = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32((int)count));
  const int64_t piece = kStep * count;
  const auto put = [&](uint16_t* place, __m512i numbers) {
    if (count == 1)
      _mm512_storeu_si512(place, numbers);
    else
      _mm512_i32scatter_epi32(place, places, numbers, 4);
  };
  for (int64_t t = 0; t < count; t++)
    for (int64_t c = 0; c < columns; c += kStep) {
      Floats first, second;
      load_columns(x[t], c, columns, first, second);
      uint16_t* place = to + c * pieces * count + 2 * t;
      for (int64_t p = 0; p < pieces; p++)
        put(place + p * piece, take_piece(first, second));
    }
}

// Where the two tiles of a panel lie, in bytes: `start` + step * `step` + tile * `tile`, rows `row` apart.
struct Panel {
  const char* start;
  int64_t step, tile, row;
};

inline void configure(int64_t first, int64_t second) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  const int64_t tokens[8] = {first, first, second, second, kTileTokens, kTileTokens, first, second};
  for (int i = 0; i < 8; i++) {
    shape.bytes[i] = (uint16_t)(4 * std::max<int64_t>(1, tokens[i]));
    shape.rows[i] = 16;
  }
  _tile_loadconfig(&shape);
}

// Sums of some steps: tiles [16 rows, 16 tokens], those of the first tokens, then (kBoth) those of the second ones.
template <bool kBoth>
inline void sum_tiles(const Panel& panel, const uint16_t* x, int64_t first, const uint16_t* y, int64_t second,
                      int64_t pieces, int64_t from, int64_t to, bool fresh, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if (kBoth) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = from; k < to; k++) {
    const char* a = panel.start + k * panel.step;
    // Rows as they are stored: the processor does not guess the next panel's.
    if (fresh && panel.row != 64)
      for (int64_t r = 0; r < kTileRows; r++) __builtin_prefetch(a + 2 * panel.tile + r * panel.row);
    _tile_loadd(4, a, panel.row);
    _tile_loadd(5, a + panel.tile, panel.row);
    for (int64_t j = 0; j < pieces; j++) {
      _tile_loadd(6, x + (k * pieces + j) * kStep * first, 4 * first);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (kBoth) {
        _tile_loadd(7, y + (k * pieces + j) * kStep * second, 4 * second);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if (kBoth) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

template <int kHalf>
inline void swap_halves(Floats* rows) {
  for (int i = 0; i < 16; i++)
    if (!(i & kHalf)) {
      const Floats a = rows[i], b = rows[i + kHalf];
      rows[i] = halves<kHalf, false>(a, b);
      rows[i + kHalf] = halves<kHalf, true>(a, b);
    }
}

// A tile's sums, times `factors` of its rows, into (kAdd: onto) `count` tokens' outputs `stride` apart.
inline void put_tile(const float* sums, const Floats& factors, int64_t rows, int64_t count, bool add, float* out,
                     int64_t stride) {
  Floats turned[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) turned[i] = load_as<Floats>(sums + 16 * i);
  swap_halves<8>(turned);
  swap_halves<4>(turned);
  swap_halves<2>(turned);
  swap_halves<1>(turned);
  const __mmask16 mask = (__mmask16)((1u << std::min<int64_t>(16, rows)) - 1);
  for (int64_t t = 0; t < count; t++) {
    Floats value = turned[t] * factors;
    float* to = out + t * stride;
    if (add) value += (Floats)_mm512_maskz_loadu_ps(mask, to);
    _mm512_mask_storeu_ps(to, mask, (__m512)value);
  }
}

#else

inline bool tiles_usable() { return false; }

#endif

}  // namespace
