// AVX2: vpmaddubsw into 16 bit lanes while they surely hold the sums, else a widening sequence of vpmaddwd.
#include "sets.h"

#ifdef __AVX2__
#include <immintrin.h>

#include "code.h"
#include "tile.h"

namespace {

inline __m256i read(const int8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

inline __m256i four_everywhere(const uint8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof four);
  return _mm256_set1_epi32(four);
}

inline void add_to(int32_t* to, __m256i sums, bool fresh) {
  auto* place = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(place, fresh ? sums : _mm256_add_epi32(_mm256_loadu_si256(place), sums));
}

struct Narrow {
  static constexpr int kRows = 6, kBlocks = 1;
  struct Sums {
    __m256i low, high;
  };
  using Weights = Sums;
  using Codes = __m256i;
  static void clear(Sums& sums) { sums.low = sums.high = _mm256_setzero_si256(); }
  static void load(Weights& weights, const int8_t* from) {
    weights.low = read(from);
    weights.high = read(from + 32);
  }
  static Codes spread(const uint8_t* from) { return four_everywhere(from); }
  static void add(Sums& sums, Codes codes, const Weights& weights) {
    sums.low = _mm256_add_epi16(sums.low, _mm256_maddubs_epi16(codes, weights.low));
    sums.high = _mm256_add_epi16(sums.high, _mm256_maddubs_epi16(codes, weights.high));
  }
  static void flush(Sums& sums, int32_t* to, bool fresh) {
    const __m256i ones = _mm256_set1_epi16(1);
    add_to(to, _mm256_madd_epi16(sums.low, ones), fresh);
    add_to(to + 8, _mm256_madd_epi16(sums.high, ones), fresh);
    clear(sums);
  }
};

// Even and odd codes and weights as 16 bit numbers: vpmaddwd of each adds two products into 32 bits.
struct Wide {
  static constexpr int kRows = 4, kBlocks = 1;
  struct Sums {
    __m256i low, high;
  };
  struct Weights {
    __m256i even_low, odd_low, even_high, odd_high;
  };
  struct Codes {
    __m256i even, odd;
  };
  static void clear(Sums& sums) { sums.low = sums.high = _mm256_setzero_si256(); }
  static void load(Weights& weights, const int8_t* from) {
    const __m256i low = read(from), high = read(from + 32);
    weights.even_low = _mm256_srai_epi16(_mm256_slli_epi16(low, 8), 8);
    weights.odd_low = _mm256_srai_epi16(low, 8);
    weights.even_high = _mm256_srai_epi16(_mm256_slli_epi16(high, 8), 8);
    weights.odd_high = _mm256_srai_epi16(high, 8);
  }
  static Codes spread(const uint8_t* from) {
    const __m256i four = four_everywhere(from);
    return {_mm256_and_si256(four, _mm256_set1_epi16(255)), _mm256_srli_epi16(four, 8)};
  }
  static void add(Sums& sums, const Codes& codes, const Weights& weights) {
    sums.low = _mm256_add_epi32(sums.low, _mm256_add_epi32(_mm256_madd_epi16(codes.even, weights.even_low),
                                                           _mm256_madd_epi16(codes.odd, weights.odd_low)));
    sums.high = _mm256_add_epi32(sums.high, _mm256_add_epi32(_mm256_madd_epi16(codes.even, weights.even_high),
                                                             _mm256_madd_epi16(codes.odd, weights.odd_high)));
  }
  static void flush(Sums& sums, int32_t* to, bool fresh) {
    add_to(to, sums.low, fresh);
    add_to(to + 8, sums.high, fresh);
    clear(sums);
  }
};

bool run_wide(const DmqfxLayer& layer, int64_t, int threads) { return run<Wide>(layer, INT64_MAX, threads); }
double peak_narrow(double (*seconds)()) { return peak<Narrow>(32, seconds); }
double peak_wide(double (*seconds)()) { return peak<Wide>(INT64_MAX, seconds); }

}  // namespace

const InstructionSet kAvx2{run<Narrow>, peak_narrow, code};
const InstructionSet kAvx2Wide{run_wide, peak_wide, code};
#else
const InstructionSet kAvx2{nullptr, nullptr, nullptr};
const InstructionSet kAvx2Wide{nullptr, nullptr, nullptr};
#endif
