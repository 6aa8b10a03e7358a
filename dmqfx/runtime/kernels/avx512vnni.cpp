// AVX-512 with VNNI: vpdpbusd adds four products of 8 bits straight into 32, without saturation.
#include "sets.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include "code.h"
#include "tile.h"

namespace {

struct Vnni {
  static constexpr int kRows = 6, kBlocks = 4;
  using Sums = __m512i;
  using Weights = __m512i;
  using Codes = __m512i;
  static void clear(Sums& sums) { sums = _mm512_setzero_si512(); }
  static void load(Weights& weights, const int8_t* from) { weights = _mm512_loadu_si512(from); }
  static Codes spread(const uint8_t* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return _mm512_set1_epi32(four);
  }
  static void add(Sums& sums, Codes codes, Weights weights) { sums = _mm512_dpbusd_epi32(sums, codes, weights); }
  static void flush(Sums& sums, int32_t* to, bool fresh) {
    _mm512_storeu_si512(to, fresh ? sums : _mm512_add_epi32(_mm512_loadu_si512(to), sums));
    clear(sums);
  }
};

bool run_vnni(const DmqfxLayer& layer, int64_t, int threads) { return run<Vnni>(layer, INT64_MAX, threads); }
double peak_vnni(double (*seconds)()) { return peak<Vnni>(INT64_MAX, seconds); }

}  // namespace

const InstructionSet kAvx512Vnni{run_vnni, peak_vnni, code};
#else
const InstructionSet kAvx512Vnni{nullptr, nullptr, nullptr};
#endif
