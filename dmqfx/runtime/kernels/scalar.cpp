// The portable kernel: plain C++, which the compiler vectorises as it can.
#include "attention.h"
#include "averages.h"
#include "code.h"
#include "sets.h"
#include "strips.h"

namespace {

struct Scalar {
  static constexpr int kRows = 4, kBlocks = 1;
  static constexpr bool kCentred = false;
  struct Sums {
    int32_t of[kLane];
  };
  using Weights = const int8_t*;
  struct Codes {
    int32_t of[kQuad];
  };
  static void begin(Sums& sums, const int16_t*, const Codes& codes, Weights weights) {
    std::memset(&sums, 0, sizeof sums);
    add(sums, codes, weights);
  }
  static void load(Weights& weights, const int8_t* from) { weights = from; }
  static Codes spread(const uint8_t* from) { return {{from[0], from[1], from[2], from[3]}}; }
  static void add(Sums& sums, const Codes& codes, Weights weights) {
    for (int n = 0; n < kLane; ++n)
      sums.of[n] += codes.of[0] * weights[n * kQuad] + codes.of[1] * weights[n * kQuad + 1] +
                    codes.of[2] * weights[n * kQuad + 2] + codes.of[3] * weights[n * kQuad + 3];
  }
  static void flush(const Sums& sums, int32_t* to, bool fresh) {
    for (int n = 0; n < kLane; ++n) to[n] = sums.of[n] + (fresh ? 0 : to[n]);
  }
};

bool run_scalar(const DmqfxLayer& layer, Room, int threads) { return run<Scalar>(layer, Room{}, threads); }
double peak_scalar(double (*seconds)()) { return peak<Scalar>(seconds); }

}  // namespace

const InstructionSet kScalar{run_scalar, peak_scalar, code, attend<Scalar, PlainScores>, average_reals};
