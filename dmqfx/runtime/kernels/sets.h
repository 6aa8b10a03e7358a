// What each instruction set's file offers to the dispatcher.
#pragma once

#include "layer.h"

// What 16 bit sums of products surely hold: so many steps of codes less their middle.
struct Room {
  int64_t steps = INT64_MAX;
  int32_t middle = 0;
};

struct InstructionSet {
  bool (*run)(const DmqfxLayer& layer, Room room, int threads);  // false: no memory
  double (*peak)(double (*seconds)());
  bool (*code)(const DmqfxCoding& coding, int threads);  // false: no memory
  bool (*attend)(const DmqfxAttention& attention, int threads);   // false: no memory
  bool (*average)(const DmqfxAttention& attention, int threads);  // in real numbers; false: no memory
};

// The row of each table of a layer that belongs to a sample; internal linkage, as in tile.h.
namespace {
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
