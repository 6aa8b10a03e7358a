// As attend_avx512vnni.cpp, for AVX2: vpmaddubsw, to which codes of rows are 7 bits, so that pairs of products fit 16; 8 rows a vector.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

constexpr int kLane = 8, kDeep = 4;
constexpr int32_t kReal = 0x4B400000, kNever = static_cast<int32_t>(0xFF800000);
constexpr float kRounder = 12582912.0f;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t pieces(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline __m256i read(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }
inline void write(void* to, __m256i x) { _mm256_store_si256(static_cast<__m256i*>(to), x); }
inline __m256i spread(const void* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return _mm256_set1_epi32(four);
}
inline void add(__m256i& sums, __m256i codes, __m256i weights) {
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, weights), _mm256_set1_epi16(1)));
}
inline int32_t whole(float x) {
  const float y = x + kRounder;
  int32_t bits;
  std::memcpy(&bits, &y, 4);
  return bits - kReal;
}

template <class T>
struct Room {
  T* at;
  explicit Room(int64_t n) : at(static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>((n * int64_t(sizeof(T)) + 127) / 64 * 64)))) {}
  ~Room() { std::free(at); }
  operator T*() const { return at; }
};

struct Desk {
  int64_t d, quads, deep, keys, chunk;
  Room<int8_t> k, v;
  Room<int32_t> first, scores;
  Room<uint8_t> q, codes;
  Room<float> sums, low, high, middle, inverse, balance, v_middle, v_scale, line;
  float k_scale = 1;
  Desk(int64_t d, int64_t keys, int64_t chunk)
      : d(d), quads(pieces(d, 4)), deep(d + 1), keys(pieces(keys, 4) * 4), chunk(chunk), k(this->keys * quads * 4), v(this->keys * deep),
        first(this->keys), scores(chunk * 16), q(quads * 64), codes(chunk * 16), sums(deep * 16), low(d + 8), high(d + 8), middle(d + 8),
        inverse(d + 8), balance(d + 8), v_middle(d + 8), v_scale(d + 8), line(d + 8) {
    for (float* x : {middle.at, inverse.at, balance.at, v_middle.at, line.at}) std::memset(x, 0, static_cast<size_t>(d + 8) * 4);
  }
};

void ranges(const float* __restrict x, int64_t rows, int64_t stride, int64_t d, float* __restrict low, float* __restrict high) {
  std::memcpy(low, x, static_cast<size_t>(d) * 4);
  std::memcpy(high, x, static_cast<size_t>(d) * 4);
  for (int64_t row = 1; row < rows; ++row) {
    x += stride;
    for (int64_t c = 0; c < d; ++c) {
      low[c] = x[c] < low[c] ? x[c] : low[c];
      high[c] = x[c] > high[c] ? x[c] : high[c];
    }
  }
}

// Eight channels, or those that are left: (x - middle) * inverse, rounded; 0 beyond.
inline __m256i some(int64_t left) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(least(left, 8))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i coded(const float* x, int64_t left, __m256 middle, __m256 inverse) {
  const __m256 read = left >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, some(left));
  const __m256i codes = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(read, middle), inverse));
  return left >= 8 ? codes : _mm256_and_si256(codes, some(left));
}
inline void keep(void* to, __m256i codes, int64_t left) {
  if (left >= 8)
    _mm256_storeu_si256(static_cast<__m256i*>(to), codes);
  else
    std::memcpy(to, &codes, static_cast<size_t>(left * 4));
}
inline int32_t all(__m256i x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4E));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0xB1));
  return _mm_cvtsi128_si32(y);
}

void code_keys(Desk& desk, const float* k, int64_t rows, int64_t stride) {
  const int64_t d = desk.d, width = desk.quads * 4;
  ranges(k, rows, stride, d, desk.low, desk.high);
  float most = 0;
  for (int64_t c = 0; c < d; ++c) {
    const float half = (desk.high[c] - desk.low[c]) * 0.5f;
    desk.middle[c] = (desk.high[c] + desk.low[c]) * 0.5f;
    desk.balance[c] = half > 0 ? std::sqrt(half) : 1;
    const float reach = half / desk.balance[c];
    most = reach > most ? reach : most;
  }
  const auto limit = static_cast<float>(least(127, ((1 << 22) - 1) / (63 * d)));
  desk.k_scale = most > 0 ? most / limit : 1;
  for (int64_t c = 0; c < d; ++c) desk.inverse[c] = 1 / (desk.balance[c] * desk.k_scale);
  for (int64_t row = 0; row < desk.keys; row += 4) {
    __m256i sum[4] = {};
    for (int64_t c = 0; c < width; c += 8) {
      const __m256 middle = _mm256_loadu_ps(desk.middle + c), inverse = _mm256_loadu_ps(desk.inverse + c);
      __m256i four[4];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        four[n] = row + n < rows ? coded(k + (row + n) * stride + c, d - c, middle, inverse) : _mm256_setzero_si256();
        sum[n] = _mm256_add_epi32(sum[n], four[n]);
      }
      const __m256i codes = _mm256_packs_epi16(_mm256_packs_epi32(four[0], four[1]), _mm256_packs_epi32(four[2], four[3]));
      keep(desk.k + row * width + c * 4, codes, width - c);
    }
    for (int n = 0; n < 4; ++n) desk.first[row + n] = row + n < rows ? kReal - 64 * all(sum[n]) : kNever;
  }
}

void code_values(Desk& desk, const float* v, int64_t rows, int64_t stride) {
  const int64_t d = desk.d;
  ranges(v, rows, stride, d, desk.low, desk.high);
  for (int64_t c = 0; c < d; ++c) {
    const float reach = desk.high[c] - desk.low[c];
    desk.v_middle[c] = (desk.high[c] + desk.low[c]) * 0.5f;
    desk.v_scale[c] = reach > 0 ? reach / 254 : 1;
    desk.inverse[c] = 1 / desk.v_scale[c];
  }
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t row = 0; row < desk.keys; row += 4) {
    int8_t* to = desk.v + row * desk.deep;
    for (int64_t c = 0; c < d; c += 8) {
      const __m256 middle = _mm256_loadu_ps(desk.v_middle + c), inverse = _mm256_loadu_ps(desk.inverse + c);
      __m256i four[4];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n)
        four[n] = row + n < rows ? coded(v + (row + n) * stride + c, d - c, middle, inverse) : _mm256_setzero_si256();
      const __m256i codes = _mm256_packs_epi16(_mm256_packs_epi32(four[0], four[1]), _mm256_packs_epi32(four[2], four[3]));
      keep(to + c * 4, _mm256_shuffle_epi8(codes, order), d - c);
    }
    std::memset(to + d * 4, 1, 4);
  }
}

void code_queries(Desk& desk, const float* q, int64_t rows, int64_t stride, int64_t block, int64_t blocks, float* scales) {
  const int64_t d = desk.d;
  for (int64_t row = 0; row < kLane; ++row) {
    scales[row] = 1;
    uint8_t* to = desk.q + block * 32 + row * 4;
    if (row >= rows) {
      for (int64_t quad = 0; quad < desk.quads; ++quad) std::memset(to + quad * blocks * 32, 64, 4);
      continue;
    }
    __m256 most = _mm256_setzero_ps();
    for (int64_t c = 0; c < d; c += 8) {
      const float* x = q + row * stride + c;
      const __m256 y = _mm256_mul_ps(d - c >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, some(d - c)), _mm256_loadu_ps(desk.balance + c));
      _mm256_storeu_ps(desk.line + c, y);
      most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), y));
    }
    __m128 two = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    two = _mm_max_ps(two, _mm_movehl_ps(two, two));
    const float greatest = _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
    scales[row] = greatest / 63;
    const __m256 inverse = _mm256_set1_ps(greatest > 0 ? 63 / greatest : 0);
    const __m256i middle = _mm256_set1_epi32(64);
    for (int64_t c = 0; c < d; c += 8) {
      const __m256i codes = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(desk.line + c), inverse)), middle);
      const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(codes, codes), codes);  // each half: four codes first
      const int32_t low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
      std::memcpy(to + c / 4 * blocks * 32, &low, 4);
      if (d - c > 4) std::memcpy(to + (c / 4 + 1) * blocks * 32, &high, 4);
    }
  }
}

template <int kBlocks>
void scores(const Desk& desk, int64_t from, int64_t count, __m256i* most) {
  const int8_t* k = desk.k + from * desk.quads * 4;
  int32_t* to = desk.scores;
  const int64_t step = kBlocks * 32;
  __m256i best[kBlocks];
  for (int n = 0; n < kBlocks; ++n) best[n] = most[n];
  for (int64_t at = 0; at < count; at += 4, to += 4 * kBlocks * kLane) {
    __m256i sums[4][kBlocks];
#pragma GCC unroll 4
    for (int key = 0; key < 4; ++key)
#pragma GCC unroll 2
      for (int n = 0; n < kBlocks; ++n) sums[key][n] = _mm256_set1_epi32(desk.first[from + at + key]);
    const uint8_t *q = desk.q, *end = q + desk.quads * step;
    do {
      __m256i rows[kBlocks];
#pragma GCC unroll 2
      for (int n = 0; n < kBlocks; ++n) rows[n] = read(q + n * 32);
#pragma GCC unroll 4
      for (int key = 0; key < 4; ++key) {
        const __m256i four = spread(k + key * 4);
#pragma GCC unroll 2
        for (int n = 0; n < kBlocks; ++n) add(sums[key][n], rows[n], four);
      }
      q += step, k += 16;
    } while (q != end);
#pragma GCC unroll 4
    for (int key = 0; key < 4; ++key)
#pragma GCC unroll 2
      for (int n = 0; n < kBlocks; ++n) {
        write(to + (key * kBlocks + n) * kLane, sums[key][n]);
        best[n] = _mm256_max_epi32(best[n], sums[key][n]);
      }
  }
  for (int n = 0; n < kBlocks; ++n) most[n] = best[n];
}

// 2^x to some 1e-4, x from -126 on.
inline __m256 power(__m256 x) {
  x = _mm256_max_ps(x, _mm256_set1_ps(-126));  // and where x is not a number
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm256_sub_ps(x, n);
  __m256 y = _mm256_fmadd_ps(_mm256_set1_ps(0.0558713f), f, _mm256_set1_ps(0.2422110f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(0.6931396f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(0.9999282f));
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

template <int kBlocks>
void exponentials(const Desk& desk, int64_t count, const __m256* times, const __m256* plus) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const float* from = reinterpret_cast<const float*>(desk.scores.at);
  uint8_t* to = desk.codes;
  for (int64_t key = 0; key < count; key += 4, from += 4 * kBlocks * kLane, to += kBlocks * 32)
#pragma GCC unroll 2
    for (int n = 0; n < kBlocks; ++n) {
      __m256i x[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        x[k] = _mm256_cvtps_epi32(power(_mm256_fmadd_ps(_mm256_load_ps(from + (k * kBlocks + n) * kLane), times[n], plus[n])));
      const __m256i codes = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
      write(to + n * 32, _mm256_shuffle_epi8(codes, order));
    }
}

template <int kBlocks, int kCount>
void value(const uint8_t* codes, const int8_t* v, int64_t steps, int64_t stride, bool fresh, const __m256* alpha, const __m256* beta, float* to) {
  __m256i sums[kCount][kBlocks];
#pragma GCC unroll 4
  for (int c = 0; c < kCount; ++c)
#pragma GCC unroll 2
    for (int n = 0; n < kBlocks; ++n) sums[c][n] = _mm256_setzero_si256();
  const uint8_t* end = codes + steps * kBlocks * 32;
  do {
    __m256i rows[kBlocks];
#pragma GCC unroll 2
    for (int n = 0; n < kBlocks; ++n) rows[n] = read(codes + n * 32);
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
      const __m256i four = spread(v + c * 4);
#pragma GCC unroll 2
      for (int n = 0; n < kBlocks; ++n) add(sums[c][n], rows[n], four);
    }
    codes += kBlocks * 32, v += stride;
  } while (codes != end);
#pragma GCC unroll 4
  for (int c = 0; c < kCount; ++c)
#pragma GCC unroll 2
    for (int n = 0; n < kBlocks; ++n) {
      float* place = to + (c * kBlocks + n) * kLane;
      const __m256 more = _mm256_cvtepi32_ps(sums[c][n]);
      _mm256_store_ps(place, fresh ? more : _mm256_fmadd_ps(_mm256_load_ps(place), alpha[n], _mm256_mul_ps(more, beta[n])));
    }
}

template <int kBlocks>
void attend_rows(Desk& desk, const float* q, float* out, int64_t rows, int64_t stride, float scale) {
  const __m256i lowest = _mm256_set1_epi32(kReal - (1 << 22));
  __m256 times[kBlocks], plus[kBlocks], alpha[kBlocks], beta[kBlocks];
  __m256i most[kBlocks];
  for (int n = 0; n < kBlocks; ++n) {
    alignas(32) float scales[kLane];
    code_queries(desk, q + n * kLane * stride, rows - n * kLane, stride, n, kBlocks, scales);
    times[n] = _mm256_mul_ps(_mm256_load_ps(scales), _mm256_set1_ps(desk.k_scale * scale * 1.44269504f));
    most[n] = lowest;
  }
  for (int64_t from = 0; from < desk.keys; from += desk.chunk) {
    const int64_t count = least(desk.chunk, desk.keys - from);
    __m256i best[kBlocks];
    for (int n = 0; n < kBlocks; ++n) best[n] = lowest;
    scores<kBlocks>(desk, from, count, best);
    for (int n = 0; n < kBlocks; ++n) {
      const __m256i now = _mm256_max_epi32(most[n], best[n]);
      const __m256 top = _mm256_castsi256_ps(now), own = _mm256_castsi256_ps(best[n]);
      alpha[n] = power(_mm256_mul_ps(_mm256_sub_ps(_mm256_castsi256_ps(most[n]), top), times[n]));
      beta[n] = power(_mm256_mul_ps(_mm256_sub_ps(own, top), times[n]));
      most[n] = now;
      plus[n] = _mm256_fnmadd_ps(own, times[n], _mm256_set1_ps(6.98868469f));  // 2^that is 127
    }
    exponentials<kBlocks>(desk, count, times, plus);
    for (int64_t c = 0; c < desk.deep; c += kDeep) {
      const int64_t left = desk.deep - c;
      (left >= 4 ? value<kBlocks, 4> : left == 3 ? value<kBlocks, 3> : left == 2 ? value<kBlocks, 2> : value<kBlocks, 1>)(
          desk.codes, desk.v + from * desk.deep + c * 4, count / 4, desk.deep * 4, from == 0, alpha, beta, desk.sums + c * kBlocks * kLane);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float* sums = desk.sums + row / kLane * kLane + row % kLane;
    const float inverse = 1 / sums[desk.d * kBlocks * kLane];
    for (int64_t c = 0; c < desk.d; ++c) out[row * stride + c] = sums[c * kBlocks * kLane] * inverse * desk.v_scale[c] + desk.v_middle[c];
  }
}

}  // namespace

extern "C" int attend(const float* q, const float* k, const float* v, float* out, int64_t batch, int64_t queries, int64_t keys,
                      int64_t heads, int64_t d, float scale, int64_t chunk, int, double*) {
  Desk desk(d, keys, least(pieces(chunk, 4) * 4, pieces(keys, 4) * 4));
  const int64_t stride = heads * d;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      code_keys(desk, k + b * keys * stride + h * d, keys, stride);
      code_values(desk, v + b * keys * stride + h * d, keys, stride);
      for (int64_t row = 0; row < queries; row += 16) {
        const int64_t rows = least(16, queries - row);
        (rows > 8 ? attend_rows<2> : attend_rows<1>)(desk, q + (b * queries + row) * stride + h * d, out + (b * queries + row) * stride + h * d,
                                                     rows, stride, scale);
      }
    }
  return 0;
}
