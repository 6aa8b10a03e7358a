// AVX-512 with VNNI: vpdpbusd adds four products of 8 bits straight into 32, without saturation.
#include "sets.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include "attention.h"
#include "averages.h"
#include "code.h"
#include "strips.h"

namespace {

struct Vnni {
  static constexpr int kRows = 6, kBlocks = 4;
  static constexpr bool kCentred = false;
  using Sums = __m512i;
  using Weights = __m512i;
  using Codes = __m512i;
  static void begin(Sums& sums, const int16_t*, Codes codes, Weights weights) {
    sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, weights);
  }
  static void load(Weights& weights, const int8_t* from) { weights = _mm512_loadu_si512(from); }
  static Codes spread(const uint8_t* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return _mm512_set1_epi32(four);
  }
  static void add(Sums& sums, Codes codes, Weights weights) { sums = _mm512_dpbusd_epi32(sums, codes, weights); }
  static void flush(Sums sums, int32_t* to, bool fresh) {
    _mm512_storeu_si512(to, fresh ? sums : _mm512_add_epi32(_mm512_loadu_si512(to), sums));
  }
};

// 64 scores at a time: what PlainScores gives.
struct VnniScores {
  static int32_t code(const Powers& powers, const int32_t* sums, const int32_t* less, int64_t keys, int32_t most, float times,
                      uint8_t* codes) {
    const __m512i twice = _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(powers.codes))), 1);
    const __m512i top = _mm512_set1_epi32(most), order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512 scale = _mm512_set1_ps(times);
    const auto far = [&](int64_t k) {  // what is beyond 32 bits, or no number, becomes the least of them
      const __m512i below = _mm512_sub_epi32(_mm512_add_epi32(top, _mm512_loadu_si512(less + k)), _mm512_loadu_si512(sums + k));
      return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(below), scale));
    };
    const auto coded = [&](int64_t k) {
      const __m512i x = _mm512_packs_epi32(far(k), far(k + 16));  // and here -2^15, whose shift is beyond all
      const __m512i shifted = _mm512_srlv_epi16(_mm512_permutexvar_epi16(x, twice), _mm512_srli_epi16(x, 5));
      return _mm512_avg_epu16(shifted, _mm512_setzero_si512());
    };
    __m512i total = _mm512_setzero_si512();
    for (int64_t k = 0; k < keys; k += 64) {
      const __m512i made = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(coded(k), coded(k + 32)));
      total = _mm512_dpbusd_epi32(total, made, _mm512_set1_epi8(1));
      _mm512_storeu_si512(codes + k, made);
    }
    return _mm512_reduce_add_epi32(total);
  }
};

bool run_vnni(const DmqfxLayer& layer, Room, int threads) { return run<Vnni>(layer, Room{}, threads); }
double peak_vnni(double (*seconds)()) { return peak<Vnni>(seconds); }

}  // namespace

const InstructionSet kAvx512Vnni{run_vnni, peak_vnni, code, attend<Vnni, VnniScores>, average_reals};
#else
const InstructionSet kAvx512Vnni{};
#endif
