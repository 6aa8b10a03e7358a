// What each instruction set's file offers to the dispatcher.
#pragma once

#include "layer.h"

// What 16 bit sums are of: codes less their middle, which reach so far from it, shifts included.
struct Room {
  int64_t reach = 0;
  int32_t middle = 0;
};

struct InstructionSet {
  bool (*run)(const DmqfxLayer& layer, Room room, int threads);  // false: no memory
  double (*peak)(double (*seconds)());
  bool (*code)(const DmqfxCoding& coding, int threads);  // false: no memory
  bool (*attend)(const DmqfxAttention& attention, int threads);   // false: no memory
  bool (*average)(const DmqfxAttention& attention, int threads);  // in real numbers; false: no memory
};

// Internal linkage, as in tile.h.
namespace {
constexpr int64_t length_of(int run) { return run < kDoubled ? int64_t{1} << run : int64_t{3} << (run - kDoubled); }

// Steps whose sums 16 bits surely hold, of a block with these bounds of its runs.
inline int64_t steps_within(const int32_t* runs, int64_t reach) {
  int64_t most = 0;
  for (int k = 0; k < kRuns; ++k) {
    const int64_t one = runs[k] * reach;
    if (one <= 0) return INT64_MAX;
    const int64_t steps = length_of(k) * (INT16_MAX / one);
    most = steps > most ? steps : most;
  }
  return most;
}

// The row of each table of a layer that belongs to a sample.
inline int64_t row_of(const DmqfxLayer& layer, int64_t image) { return layer.group == nullptr ? 0 : layer.group[image]; }
}  // namespace

void arrange(const DmqfxLayer& layer, int threads);  // layer.raw to layer.codes

// Bounds of code.h's numbers, whose values compilers of other files shall not know.
extern const float kLeastPower, kLeastSilu;

extern const InstructionSet kScalar;
extern const InstructionSet kAvx2;       // 16 bit sums: `room` steps hold
extern const InstructionSet kAvx2Middle; // 32 bit sums of two products that surely fit 16
extern const InstructionSet kAvx2Wide;   // 32 bit sums
extern const InstructionSet kAvx512Vnni;
