// softmax(Q K^T) V by integers, for AVX-512 VNNI: what attention would gain. Lanes are query rows: scores, maxima, scales, codes and sums of a row
// stay in its lane, so that nothing is ever reduced across lanes and codes are packed where vpdpbusd wants them.
#include <immintrin.h>
#include <x86intrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>

namespace {

constexpr int kWide = 4;  // keys of a tile of scores: few, so that stores hide
constexpr int kDeep = 7;  // channels of a tile of values: beyond some 16 sums GCC 12 spills
constexpr int32_t kReal = 0x4B400000;               // the bits of 1.5 * 2^23: with a whole number below 2^22 added, a float
constexpr int32_t kNever = static_cast<int32_t>(0xFF800000);  // -infinity: the score of no key
enum { kQuantKV, kQuantQ, kScores, kExp, kValues, kOut, kParts };

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t pieces(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t rounded(int64_t a, int64_t b) { return pieces(a, b) * b; }
inline __mmask16 mask_of(int64_t left) { return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1); }
inline __m512i spread(const void* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return _mm512_set1_epi32(four);
}

inline void add(__m512i& sums, __m512i codes, __m512i weights) { sums = _mm512_dpbusd_epi32(sums, codes, weights); }

// 16 x 16 numbers of 32 bits.
inline void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    t[2 * k] = _mm512_unpacklo_epi32(r[2 * k], r[2 * k + 1]);
    t[2 * k + 1] = _mm512_unpackhi_epi32(r[2 * k], r[2 * k + 1]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    r[4 * k] = _mm512_unpacklo_epi64(t[4 * k], t[4 * k + 2]);
    r[4 * k + 1] = _mm512_unpackhi_epi64(t[4 * k], t[4 * k + 2]);
    r[4 * k + 2] = _mm512_unpacklo_epi64(t[4 * k + 1], t[4 * k + 3]);
    r[4 * k + 3] = _mm512_unpackhi_epi64(t[4 * k + 1], t[4 * k + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    t[k] = _mm512_shuffle_i32x4(r[k], r[k + 4], 0x88);
    t[k + 4] = _mm512_shuffle_i32x4(r[k], r[k + 4], 0xDD);
    t[k + 8] = _mm512_shuffle_i32x4(r[k + 8], r[k + 12], 0x88);
    t[k + 12] = _mm512_shuffle_i32x4(r[k + 8], r[k + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    r[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88);
    r[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xDD);
    r[k + 4] = _mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0x88);
    r[k + 12] = _mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0xDD);
  }
}

// Least and greatest of each channel. Rows lie pages apart, where nothing is fetched ahead but what is asked for.
template <int kVectors>
void range(const float* x, int64_t rows, int64_t stride, int64_t channels, float* low, float* high) {
  constexpr int64_t kAhead = 8;
  __m512 less[kVectors], more[kVectors];
  const __mmask16 last = mask_of(channels - 16 * (kVectors - 1));
#pragma GCC unroll 10
  for (int n = 0; n < kVectors; ++n) less[n] = more[n] = _mm512_maskz_loadu_ps(n + 1 < kVectors ? 0xFFFF : last, x + 16 * n);
  for (int64_t row = 1; row < rows; ++row) {
    x += stride;
    const float* ahead = x + least(kAhead, rows - 1 - row) * stride;
#pragma GCC unroll 10
    for (int n = 0; n < kVectors; ++n) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead + 16 * n), _MM_HINT_T0);
      const __m512 value = n + 1 < kVectors ? _mm512_loadu_ps(x + 16 * n) : _mm512_maskz_loadu_ps(last, x + 16 * n);
      less[n] = _mm512_min_ps(less[n], value);
      more[n] = _mm512_max_ps(more[n], value);
    }
  }
#pragma GCC unroll 10
  for (int n = 0; n < kVectors; ++n) {
    _mm512_storeu_ps(low + 16 * n, less[n]);
    _mm512_storeu_ps(high + 16 * n, more[n]);
  }
}
void ranges(const float* x, int64_t rows, int64_t stride, int64_t channels, float* low, float* high) {
  using Range = void (*)(const float*, int64_t, int64_t, int64_t, float*, float*);
  static constexpr Range all[10] = {range<1>, range<2>, range<3>, range<4>, range<5>, range<6>, range<7>, range<8>, range<9>, range<10>};
  for (int64_t c = 0; c < channels; c += 160) {
    const int64_t left = least(channels - c, 160);
    all[pieces(left, 16) - 1](x + c, rows, stride, left, low + c, high + c);
  }
}

struct Desk {
  int64_t d, quads, deep, keys;  // channels; quads of them; channels of values and one of ones; keys, padded
  int8_t *k, *v;                 // [keys / 4][quads][4][4]; [keys / 4][deep][4]
  int32_t* first;                // what the sums of a key start from
  uint8_t *q, *rows, *codes;     // [quads][2][16][4]; [16][quads padded to 16][4]; [chunk / 4][2][16][4]
  int32_t* scores;               // [chunk][2][16]
  float* sums;                   // [deep][2][16]
  float *low, *high, *middle, *inverse, *balance, *v_middle, *v_scale;
  float k_scale;
};

// K less the middle of each channel's range, which changes no softmax; divided by `balance`, by which Q is multiplied.
void code_keys(Desk& desk, const float* k, int64_t rows, int64_t stride, bool balanced) {
  const int64_t d = desk.d, width = desk.quads * 4, wide = rounded(d, 16);
  ranges(k, rows, stride, d, desk.low, desk.high);
  const __m512 one = _mm512_set1_ps(1), half = _mm512_set1_ps(0.5f);
  __m512 most = _mm512_setzero_ps();
  for (int64_t c = 0; c < wide; c += 16) {  // beyond d, low and high are 0
    const __m512 low = _mm512_loadu_ps(desk.low + c), high = _mm512_loadu_ps(desk.high + c);
    const __m512 reach = _mm512_mul_ps(_mm512_sub_ps(high, low), half);
    const __mmask16 some = balanced ? _mm512_cmp_ps_mask(reach, _mm512_setzero_ps(), _CMP_GT_OQ) : 0;
    const __m512 root = _mm512_mask_sqrt_ps(one, some, reach);
    most = _mm512_max_ps(most, _mm512_div_ps(reach, root));
    _mm512_storeu_ps(desk.middle + c, _mm512_mul_ps(_mm512_add_ps(high, low), half));
    _mm512_storeu_ps(desk.balance + c, root);
  }
  const auto limit = static_cast<float>(least(127, ((1 << 22) - 1) / (127 * d)));  // scores below 2^22
  const float greatest = _mm512_reduce_max_ps(most), scale = greatest > 0 ? greatest / limit : 1;
  desk.k_scale = scale;
  for (int64_t c = 0; c < wide; c += 16)
    _mm512_storeu_ps(desk.inverse + c, _mm512_div_ps(one, _mm512_mul_ps(_mm512_loadu_ps(desk.balance + c), _mm512_set1_ps(scale))));
  for (int64_t row = 0; row < desk.keys; row += 4) {
    __m512i sum[4];
    for (__m512i& one : sum) one = _mm512_setzero_si512();
    int8_t* to = desk.k + row * width;
    for (int64_t c = 0; c < width; c += 16) {
      const __m512 middle = _mm512_loadu_ps(desk.middle + c), inverse = _mm512_loadu_ps(desk.inverse + c);
      __m512i four[4];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        const __mmask16 mask = row + n < rows ? mask_of(d - c) : 0;
        const __m512 x = _mm512_maskz_loadu_ps(mask, k + (row + n) * stride + c);
        four[n] = _mm512_maskz_cvtps_epi32(mask, _mm512_mul_ps(_mm512_sub_ps(x, middle), inverse));
        sum[n] = _mm512_add_epi32(sum[n], four[n]);
      }
      // by 128 bits: four channels of each of four keys
      const __m512i codes = _mm512_packs_epi16(_mm512_packs_epi32(four[0], four[1]), _mm512_packs_epi32(four[2], four[3]));
      _mm512_mask_storeu_epi32(to + c * 4, mask_of(width - c), codes);
    }
    for (int n = 0; n < 4; ++n)
      desk.first[row + n] = row + n < rows ? kReal - 128 * _mm512_reduce_add_epi32(sum[n]) : kNever;
  }
}

inline __m512i pack_signed(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm512_shuffle_epi8(_mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)), order);
}

void code_values(Desk& desk, const float* v, int64_t rows, int64_t stride) {
  const int64_t d = desk.d;
  ranges(v, rows, stride, d, desk.low, desk.high);
  for (int64_t c = 0; c < d; c += 16) {
    const __m512 low = _mm512_loadu_ps(desk.low + c), high = _mm512_loadu_ps(desk.high + c);
    const __m512 reach = _mm512_sub_ps(high, low), one = _mm512_set1_ps(1);
    const __mmask16 some = _mm512_cmp_ps_mask(reach, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 scale = _mm512_mask_mul_ps(one, some, reach, _mm512_set1_ps(1.0f / 254));
    _mm512_storeu_ps(desk.v_middle + c, _mm512_mul_ps(_mm512_add_ps(high, low), _mm512_set1_ps(0.5f)));
    _mm512_storeu_ps(desk.v_scale + c, scale);
    _mm512_storeu_ps(desk.inverse + c, _mm512_div_ps(one, scale));
  }
  for (int64_t row = 0; row < desk.keys; row += 4) {
    int8_t* to = desk.v + row * desk.deep;
    for (int64_t c = 0; c < d; c += 16) {
      __m512i four[4];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        const __mmask16 mask = row + n < rows ? mask_of(d - c) : 0;
        const __m512 x = _mm512_maskz_loadu_ps(mask, v + (row + n) * stride + c);
        four[n] = _mm512_maskz_cvtps_epi32(mask, _mm512_mul_ps(_mm512_sub_ps(x, _mm512_loadu_ps(desk.v_middle + c)),
                                                               _mm512_loadu_ps(desk.inverse + c)));
      }
      _mm512_mask_storeu_epi32(to + c * 4, mask_of(d - c), pack_signed(four[0], four[1], four[2], four[3]));
    }
    std::memset(to + d * 4, 1, 4);
  }
}

// 16 rows of Q, or fewer: [quads][blocks][16][4], unsigned; and their scales.
__m512 code_queries(Desk& desk, const float* q, int64_t rows, int64_t stride, int64_t block, int64_t blocks) {
  const int64_t d = desk.d, wide = rounded(desk.quads, 16) * 4;
  float scales[16];
  for (int64_t row = 0; row < 16; ++row) {
    uint8_t* to = desk.rows + row * wide;
    scales[row] = 1;
    if (row >= rows) {
      std::memset(to, 128, static_cast<size_t>(wide));
      continue;
    }
    const float* x = q + row * stride;
    __m512 most = _mm512_setzero_ps();
    for (int64_t c = 0; c < d; c += 16)
      most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask_of(d - c), x + c),
                                                             _mm512_loadu_ps(desk.balance + c))));
    const float greatest = _mm512_reduce_max_ps(most);
    const float inverse = greatest > 0 ? 127 / greatest : 0;
    scales[row] = greatest / 127;
    for (int64_t c = 0; c < d; c += 16) {
      const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask_of(d - c), x + c), _mm512_loadu_ps(desk.balance + c));
      const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(y, _mm512_set1_ps(inverse)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c), _mm512_cvtepi32_epi8(_mm512_add_epi32(code, _mm512_set1_epi32(128))));
    }
  }
  for (int64_t quad = 0; quad < desk.quads; quad += 16) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) r[row] = _mm512_loadu_si512(desk.rows + row * wide + quad * 4);
    transpose(r);
    const int64_t some = least(16, desk.quads - quad);
    for (int64_t n = 0; n < some; ++n) _mm512_store_si512(desk.q + ((quad + n) * blocks + block) * 64, r[n]);
  }
  return _mm512_loadu_ps(scales);
}

// Scores of kKeys keys and kBlocks times 16 rows.
template <int kBlocks, int kKeys>
__attribute__((always_inline)) inline void score(const uint8_t* q, const int8_t* k, const int32_t* first, int64_t quads, int32_t* to, __m512i* most) {
  static_assert(kKeys % 4 == 0);
  __m512i sums[kKeys][kBlocks];
  const int64_t stride = quads * 16;
#pragma GCC unroll 16
  for (int key = 0; key < kKeys; ++key)
#pragma GCC unroll 2
    for (int n = 0; n < kBlocks; ++n) sums[key][n] = _mm512_set1_epi32(first[key]);
  const uint8_t* end = q + quads * kBlocks * 64;
  do {
    __m512i rows[kBlocks];
#pragma GCC unroll 2
    for (int n = 0; n < kBlocks; ++n) rows[n] = _mm512_load_si512(q + n * 64);
#pragma GCC unroll 16
    for (int key = 0; key < kKeys; ++key) {
      const __m512i four = spread(k + key / 4 * stride + key % 4 * 4);
#pragma GCC unroll 2
      for (int n = 0; n < kBlocks; ++n) add(sums[key][n], rows[n], four);
    }
    q += kBlocks * 64, k += 16;
  } while (q != end);
#pragma GCC unroll 16
  for (int key = 0; key < kKeys; ++key)
#pragma GCC unroll 2
    for (int n = 0; n < kBlocks; ++n) {
      _mm512_store_si512(to + (key * kBlocks + n) * 16, sums[key][n]);
      most[n] = _mm512_max_epi32(most[n], sums[key][n]);
    }
}

template <int kBlocks>
void scores(const Desk& desk, int64_t from, int64_t count, __m512i* most) {
  const int64_t width = desk.quads * 4;
  __m512i best[kBlocks];
  for (int n = 0; n < kBlocks; ++n) best[n] = most[n];
  int64_t at = 0;
  const auto go = [&](auto wide) {
    constexpr int kKeys = decltype(wide)::value;
    for (; at + kKeys <= count; at += kKeys)
      score<kBlocks, kKeys>(desk.q, desk.k + (from + at) * width, desk.first + from + at, desk.quads,
                            desk.scores + at * kBlocks * 16, best);
  };
  go(std::integral_constant<int, kWide>());
  for (int n = 0; n < kBlocks; ++n) most[n] = best[n];
}

// 2^(-n / 32) times 255 * 256, to be shifted right.
struct Table {
  alignas(64) uint16_t powers[32];
  Table() {
    for (int n = 0; n < 32; ++n) powers[n] = static_cast<uint16_t>(std::lrint(255 * 256 * std::exp2(-n / 32.0)));
  }
} const table;

// Two vectors of distances from the top, in 32nd of a power of two, plus 7 powers, to codes in 16 bits.
inline __m512i codes_of(__m512i powers, __m512i low, __m512i high) {
  const __m512i far = _mm512_packs_epi32(low, high);  // what is not a number, or none at all, lands beyond 2^15: 0
  const __m512i shifted = _mm512_srlv_epi16(_mm512_permutexvar_epi16(far, powers), _mm512_srli_epi16(far, 5));
  return _mm512_avg_epu16(shifted, _mm512_setzero_si512());
}

// Codes of scores: 255 * 2^(7 - x / 32), x = score * times + plus, rounded.
template <int kBlocks>
void exponentials(const Desk& desk, int64_t count, const __m512* times, const __m512* plus) {
  const __m512i powers = _mm512_load_si512(table.powers);
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const int32_t* from = desk.scores;
  uint8_t* to = desk.codes;
  for (int64_t key = 0; key < count; key += 4, from += 4 * kBlocks * 16, to += kBlocks * 64) {
#pragma GCC unroll 2
    for (int n = 0; n < kBlocks; ++n) {
      __m512i x[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        x[k] = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_load_si512(from + (k * kBlocks + n) * 16)), times[n], plus[n]));
      const __m512i codes = _mm512_packus_epi16(codes_of(powers, x[0], x[1]), codes_of(powers, x[2], x[3]));
      _mm512_store_si512(to + n * 64, _mm512_shuffle_epi8(codes, order));
    }
  }
}

// sums = sums * alpha + codes * values * beta.
template <int kBlocks, int kCount>
__attribute__((always_inline)) inline void settle(const __m512i (*sums)[kBlocks], bool fresh, const __m512* alpha, const __m512* beta, float* to) {
#pragma GCC unroll 16
  for (int c = 0; c < kCount; ++c)
#pragma GCC unroll 2
    for (int n = 0; n < kBlocks; ++n) {
      float* place = to + (c * kBlocks + n) * 16;
      const __m512 more = _mm512_cvtepi32_ps(sums[c][n]);
      _mm512_store_ps(place, fresh ? more : _mm512_fmadd_ps(_mm512_load_ps(place), alpha[n], _mm512_mul_ps(more, beta[n])));
    }
}

// The same of kCount channels.
template <int kBlocks, int kCount>
void value(const uint8_t* codes, const int8_t* v, int64_t steps, int64_t stride, bool fresh, const __m512* alpha, const __m512* beta, float* to) {
  __m512i sums[kCount][kBlocks];
#pragma GCC unroll 16
  for (int c = 0; c < kCount; ++c)
#pragma GCC unroll 2
    for (int n = 0; n < kBlocks; ++n) sums[c][n] = _mm512_setzero_si512();
  const uint8_t* end = codes + steps * kBlocks * 64;
  do {
    __m512i rows[kBlocks];
#pragma GCC unroll 2
    for (int n = 0; n < kBlocks; ++n) rows[n] = _mm512_load_si512(codes + n * 64);
#pragma GCC unroll 16
    for (int c = 0; c < kCount; ++c) {
      const __m512i four = spread(v + c * 4);
#pragma GCC unroll 2
      for (int n = 0; n < kBlocks; ++n) add(sums[c][n], rows[n], four);
    }
    codes += kBlocks * 64, v += stride;
  } while (codes != end);
  settle<kBlocks, kCount>(sums, fresh, alpha, beta, to);
}
template <int kBlocks>
using Value = void (*)(const uint8_t*, const int8_t*, int64_t, int64_t, bool, const __m512*, const __m512*, float*);
template <int kBlocks>
Value<kBlocks> value_of(int64_t count) {
  static constexpr Value<kBlocks> all[kDeep] = {
      value<kBlocks, 1>, value<kBlocks, 2>, value<kBlocks, 3>, value<kBlocks, 4>, value<kBlocks, 5>, value<kBlocks, 6>, value<kBlocks, 7>};
  return all[count - 1];
}

inline __m512 power(__m512 x) {  // 2^x, x <= 0
  x = _mm512_max_ps(x, _mm512_set1_ps(-126));
  const __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(1.3333558e-3f);
  for (float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

struct Clock {
  double* to;
  uint64_t last;
  explicit Clock(double* to) : to(to), last(to ? __rdtsc() : 0) {}
  void mark(int part) {
    if (!to) return;
    const uint64_t now = __rdtsc();
    to[part] += static_cast<double>(now - last);
    last = now;
  }
};

// Up to kBlocks times 16 rows.
template <int kBlocks>
void attend_rows(Desk& desk, const float* q, float* out, int64_t rows, int64_t after, int64_t stride, float scale, int64_t chunk, Clock& clock) {
  const __m512i lowest = _mm512_set1_epi32(kReal - (1 << 22));
  __m512 times[kBlocks], plus[kBlocks], alpha[kBlocks], beta[kBlocks];
  __m512i most[kBlocks];
  for (int n = 0; n < kBlocks; ++n) {
    const __m512 scales = code_queries(desk, q + n * 16 * stride, rows - n * 16, stride, n, kBlocks);
    times[n] = _mm512_mul_ps(scales, _mm512_set1_ps(desk.k_scale * scale * 1.44269504f));
    most[n] = lowest;
  }
  for (int64_t row = rows; row < rows + after; ++row)  // which come next
    for (int64_t c = 0; c < desk.d; c += 16) _mm_prefetch(reinterpret_cast<const char*>(q + row * stride + c), _MM_HINT_T1);
  clock.mark(kQuantQ);
  const int64_t passes = pieces(desk.deep, kDeep), least_wide = desk.deep / passes, wider = desk.deep % passes;
  for (int64_t from = 0; from < desk.keys; from += chunk) {
    const int64_t count = least(chunk, desk.keys - from);
    __m512i best[kBlocks];
    for (int n = 0; n < kBlocks; ++n) best[n] = lowest;
    scores<kBlocks>(desk, from, count, best);
    clock.mark(kScores);
    __m512 steps[kBlocks];
    for (int n = 0; n < kBlocks; ++n) {
      const __m512i now = _mm512_max_epi32(most[n], best[n]);
      const __m512 top = _mm512_castsi512_ps(now), own = _mm512_castsi512_ps(best[n]);
      alpha[n] = power(_mm512_mul_ps(_mm512_sub_ps(_mm512_castsi512_ps(most[n]), top), times[n]));
      beta[n] = power(_mm512_mul_ps(_mm512_sub_ps(own, top), times[n]));
      most[n] = now;
      steps[n] = _mm512_mul_ps(times[n], _mm512_set1_ps(-32));
      plus[n] = _mm512_fnmadd_ps(own, steps[n], _mm512_set1_ps(7 * 32));
    }
    const int8_t* v = desk.v + from * desk.deep;
    exponentials<kBlocks>(desk, count, steps, plus);
    clock.mark(kExp);
    int64_t c = 0;
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t wide = least_wide + (pass < wider ? 1 : 0);
      value_of<kBlocks>(wide)(desk.codes, v + c * 4, count / 4, desk.deep * 4, from == 0, alpha, beta, desk.sums + c * kBlocks * 16);
      c += wide;
    }
    clock.mark(kValues);
  }
  for (int n = 0; n < kBlocks; ++n) {
    const int64_t used = least(16, rows - n * 16);
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1), _mm512_load_ps(desk.sums + (desk.d * kBlocks + n) * 16));
    for (int64_t c = 0; c < desk.d; c += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k)
        r[k] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(desk.sums + ((c + k) * kBlocks + n) * 16), inverse));
      transpose(r);
      const __m512 scales = _mm512_loadu_ps(desk.v_scale + c), middles = _mm512_loadu_ps(desk.v_middle + c);
      const __mmask16 mask = mask_of(desk.d - c);
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k)
        if (k < used)
          _mm512_mask_storeu_ps(out + (n * 16 + k) * stride + c, mask, _mm512_fmadd_ps(_mm512_castsi512_ps(r[k]), scales, middles));
    }
  }
  clock.mark(kOut);
}

}  // namespace

// q: [batch][queries][heads][d], k and v: [batch][keys][heads][d], out: [batch][queries][heads][d].
extern "C" int attend(const float* q, const float* k, const float* v, float* out, int64_t batch, int64_t queries, int64_t keys,
                      int64_t heads, int64_t d, float scale, int64_t chunk, int balanced, double* profile) {
  Desk desk;
  desk.d = d, desk.quads = pieces(d, 4), desk.deep = d + 1, desk.keys = rounded(keys, 4);
  chunk = least(rounded(chunk, 4), desk.keys);
  const int64_t wide = rounded(d, 16) + 64;
  const auto size = [](int64_t bytes) { return rounded(bytes, 64) + 64; };
  const int64_t sizes[] = {size(desk.keys * desk.quads * 4), size(desk.keys * desk.deep), size(desk.keys * 4),
                           size(desk.quads * 128), size(16 * rounded(desk.quads, 16) * 4), size(chunk * 32), size(chunk * 128),
                           size((desk.deep + 16) * 128), size(wide * 4 * 7)};
  int64_t all = 0;
  for (int64_t bytes : sizes) all += bytes;
  auto* room = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(all)));
  if (!room) return 1;
  uint8_t* place[9];
  int64_t at = 0;
  for (int n = 0; n < 9; at += sizes[n++]) place[n] = room + at;
  desk.k = reinterpret_cast<int8_t*>(place[0]), desk.v = reinterpret_cast<int8_t*>(place[1]);
  desk.first = reinterpret_cast<int32_t*>(place[2]);
  desk.q = place[3], desk.rows = place[4], desk.codes = place[5];
  desk.scores = reinterpret_cast<int32_t*>(place[6]), desk.sums = reinterpret_cast<float*>(place[7]);
  float** floats[] = {&desk.low, &desk.high, &desk.middle, &desk.inverse, &desk.balance, &desk.v_middle, &desk.v_scale};
  for (int n = 0; n < 7; ++n) *floats[n] = reinterpret_cast<float*>(place[8]) + n * wide;
  std::memset(desk.rows, 128, static_cast<size_t>(sizes[4]));
  std::memset(desk.sums, 0, static_cast<size_t>(sizes[7]));
  const int64_t stride = heads * d;
  Clock clock(profile);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      code_keys(desk, k + b * keys * stride + h * d, keys, stride, balanced != 0);
      code_values(desk, v + b * keys * stride + h * d, keys, stride);
      clock.mark(kQuantKV);
      const float* from = q + b * queries * stride + h * d;
      float* to = out + b * queries * stride + h * d;
      for (int64_t row = 0; row < queries; row += 32) {
        const int64_t rows = least(32, queries - row);
        (rows > 16 ? attend_rows<2> : attend_rows<1>)(desk, from + row * stride, to + row * stride, rows, least(queries - row - rows, 32), stride, scale, chunk, clock);
      }
    }
  std::free(room);
  return 0;
}
