// AVX2: vpmaddubsw into 16 bit lanes while they surely hold the sums, else a widening sequence of vpmaddwd.
#include "sets.h"

#ifdef __AVX2__
#include <immintrin.h>

#include "attention.h"
#include "averages.h"
#include "code.h"
#include "strips.h"

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
  static constexpr bool kCentred = true;
  struct Sums {
    __m256i low, high;
  };
  using Weights = Sums;
  using Codes = __m256i;
  static void clear(Sums& sums) { sums.low = sums.high = _mm256_setzero_si256(); }
  static void negate(const Sums& sums, int16_t* to) {
    auto* place = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(place, _mm256_sub_epi16(_mm256_setzero_si256(), sums.low));
    _mm256_storeu_si256(place + 1, _mm256_sub_epi16(_mm256_setzero_si256(), sums.high));
  }
  static void begin(Sums& sums, const int16_t* start, Codes codes, const Weights& weights) {
    load(sums, reinterpret_cast<const int8_t*>(start));
    add(sums, codes, weights);
  }
  static void load(Weights& weights, const int8_t* from) {
    weights.low = read(from);
    weights.high = read(from + 32);
  }
  static Codes spread(const uint8_t* from) { return four_everywhere(from); }
  static void add(Sums& sums, Codes codes, const Weights& weights) {
    sums.low = _mm256_add_epi16(sums.low, _mm256_maddubs_epi16(codes, weights.low));
    sums.high = _mm256_add_epi16(sums.high, _mm256_maddubs_epi16(codes, weights.high));
  }
  static void flush(const Sums& sums, int32_t* to, bool fresh) {
    const __m256i ones = _mm256_set1_epi16(1);
    add_to(to, _mm256_madd_epi16(sums.low, ones), fresh);
    add_to(to + 8, _mm256_madd_epi16(sums.high, ones), fresh);
  }
};

// Sums of four products in 32 bits, where those of two surely fit 16.
struct Middle {
  static constexpr int kRows = 4, kBlocks = 1;
  static constexpr bool kCentred = false;
  struct Sums {
    __m256i low, high;
  };
  using Weights = Narrow::Weights;
  using Codes = __m256i;
  static void begin(Sums& sums, const int16_t*, Codes codes, const Weights& weights) {
    sums.low = sums.high = _mm256_setzero_si256();
    add(sums, codes, weights);
  }
  static void load(Weights& weights, const int8_t* from) { Narrow::load(weights, from); }
  static Codes spread(const uint8_t* from) { return four_everywhere(from); }
  static void add(Sums& sums, Codes codes, const Weights& weights) {
    const __m256i ones = _mm256_set1_epi16(1);
    sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, weights.low), ones));
    sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, weights.high), ones));
  }
  static void flush(const Sums& sums, int32_t* to, bool fresh) {
    add_to(to, sums.low, fresh);
    add_to(to + 8, sums.high, fresh);
  }
};

// Even and odd codes and weights as 16 bit numbers: vpmaddwd of each adds two products into 32 bits.
struct Wide {
  static constexpr int kRows = 4, kBlocks = 1;
  static constexpr bool kCentred = false;
  struct Sums {
    __m256i low, high;
  };
  struct Weights {
    __m256i even_low, odd_low, even_high, odd_high;
  };
  struct Codes {
    __m256i even, odd;
  };
  static void begin(Sums& sums, const int16_t*, const Codes& codes, const Weights& weights) {
    sums.low = sums.high = _mm256_setzero_si256();
    add(sums, codes, weights);
  }
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
  static void flush(const Sums& sums, int32_t* to, bool fresh) {
    add_to(to, sums.low, fresh);
    add_to(to + 8, sums.high, fresh);
  }
};

// 32 scores at a time: what PlainScores gives.
struct Avx2Scores {
  // 16 bytes of a table in each half.
  static __m256i table(const uint8_t* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  // codes / 2^shifts, rounded: bytes, of 16 bits for a moment. Beyond shift 8 there is nothing.
  static __m256i shifted(__m256i codes, __m256i shifts) {
    static constexpr uint8_t kFactors[16] = {0, 128, 64, 32, 16, 8, 4, 2, 1};
    const __m256i factors = _mm256_shuffle_epi8(table(kFactors), shifts), none = _mm256_setzero_si256(), half = _mm256_set1_epi16(128);
    const __m256i low = _mm256_mullo_epi16(_mm256_unpacklo_epi8(codes, none), _mm256_unpacklo_epi8(factors, none));
    const __m256i high = _mm256_mullo_epi16(_mm256_unpackhi_epi8(codes, none), _mm256_unpackhi_epi8(factors, none));
    const __m256i made = _mm256_packus_epi16(_mm256_srli_epi16(_mm256_add_epi16(low, half), 8),
                                             _mm256_srli_epi16(_mm256_add_epi16(high, half), 8));
    return _mm256_blendv_epi8(made, codes, _mm256_cmpeq_epi8(shifts, none));
  }
  static int32_t code(const Powers& powers, const int32_t* sums, const int32_t* less, int64_t keys, int32_t most, float times,
                      uint8_t* codes) {
    const __m256i lower = table(powers.codes), upper = table(powers.codes + 16), top = _mm256_set1_epi32(most);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), within = _mm256_set1_epi16(kSteps - 1);
    const __m256 scale = _mm256_set1_ps(times);
    const auto number = [](const int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); };
    const auto far = [&](int64_t k) {  // what is beyond 32 bits, or no number, becomes the least of them
      const __m256i below = _mm256_sub_epi32(_mm256_add_epi32(top, number(less + k)), number(sums + k));
      return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(below), scale));
    };
    const auto shift = [](__m256i x) { return _mm256_min_epi16(_mm256_srli_epi16(x, 5), _mm256_set1_epi16(15)); };
    __m256i total = _mm256_setzero_si256();
    for (int64_t k = 0; k < keys; k += 32) {
      const __m256i one = _mm256_packs_epi32(far(k), far(k + 8)), two = _mm256_packs_epi32(far(k + 16), far(k + 24));
      const __m256i at = _mm256_packus_epi16(_mm256_and_si256(one, within), _mm256_and_si256(two, within));
      const __m256i power = _mm256_blendv_epi8(_mm256_shuffle_epi8(lower, at), _mm256_shuffle_epi8(upper, at), _mm256_slli_epi16(at, 3));
      const __m256i made = _mm256_permutevar8x32_epi32(shifted(power, _mm256_packus_epi16(shift(one), shift(two))), order);
      total = _mm256_add_epi64(total, _mm256_sad_epu8(made, _mm256_setzero_si256()));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + k), made);
    }
    int64_t parts[4];
    std::memcpy(parts, &total, sizeof parts);
    return static_cast<int32_t>(parts[0] + parts[1] + parts[2] + parts[3]);
  }
};

bool run_middle(const DmqfxLayer& layer, Room, int threads) { return run<Middle>(layer, Room{}, threads); }
bool run_wide(const DmqfxLayer& layer, Room, int threads) { return run<Wide>(layer, Room{}, threads); }
double peak_narrow(double (*seconds)()) { return peak<Narrow>(seconds); }
double peak_wide(double (*seconds)()) { return peak<Wide>(seconds); }

}  // namespace

const InstructionSet kAvx2{run<Narrow>, peak_narrow, code, nullptr, average_reals};
const InstructionSet kAvx2Middle{run_middle, nullptr, code, attend<Middle, Avx2Scores>, average_reals};
const InstructionSet kAvx2Wide{run_wide, peak_wide, code, attend<Wide, Avx2Scores>, average_reals};
#else
const InstructionSet kAvx2{};
const InstructionSet kAvx2Middle{};
const InstructionSet kAvx2Wide{};
#endif
