// What each instruction set's file offers to the dispatcher.
#pragma once

#include "layer.h"

// What 16 bit sums are of: codes less their middle, which reach so far from it, shifts included.
struct Room {
  int64_t reach = 0;
  int32_t middle = 0;
  bool pairs_fit = true;  // whether two products do, which saturate
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

// What the runs of several blocks come to. They are bounded together, since a run begins at a multiple of its length: one
// that suits a block alone may lie across two of another's.
struct Runs {
  int32_t most[kRuns] = {};

  void join(const int32_t* of_block) {
    for (int k = 0; k < kRuns; ++k) most[k] = of_block[k] > most[k] ? of_block[k] : most[k];
  }
  // Steps whose sums 16 bits surely hold.
  int64_t steps(int64_t reach) const {
    int64_t found = 0;
    for (int k = 0; k < kRuns; ++k) {
      const int64_t one = most[k] * reach;
      if (one <= 0) return INT64_MAX;
      const int64_t steps = length_of(k) * (INT16_MAX / one);
      found = steps > found ? steps : found;
    }
    return found;
  }
};

// Where an upsampled position is in the input; rounded as torch does it.
inline int64_t nearest(int64_t position, int64_t size, int64_t upsampled, float step) {
  if (size == upsampled) return position;
  const auto at = static_cast<int64_t>(static_cast<float>(position) * step);
  return at < size ? at : size - 1;
}

// The line of an image that lies under a tap of a line of positions, or -1 beyond the image.
inline int64_t line_of(const DmqfxLayer& layer, int64_t down, int64_t tap) {
  const int64_t y = down * layer.stride[0] - layer.padding[0] + tap * layer.dilation[0], tall = layer.upsampled[0];
  return y < 0 || y >= tall ? -1 : nearest(y, layer.height, tall, layer.steps[0]);
}

// The pixel of a line that lies under a tap of a position, or -1 beyond it.
inline int64_t pixel_of(const DmqfxLayer& layer, int64_t across, int64_t tap) {
  const int64_t x = across * layer.stride[1] - layer.padding[1] + tap * layer.dilation[1], wide = layer.upsampled[1];
  return x < 0 || x >= wide ? -1 : nearest(x, layer.width, wide, layer.steps[1]);
}

// The same layer but of one tap, over an image whose pixels are its positions.
inline DmqfxLayer of_one_tap(const DmqfxLayer& layer, int64_t height, int64_t width) {
  DmqfxLayer flat = layer;
  flat.height = flat.upsampled[0] = flat.out_height = height;
  flat.width = flat.upsampled[1] = flat.out_width = width;
  for (int axis = 0; axis < 2; ++axis) flat.taps[axis] = flat.stride[axis] = flat.dilation[axis] = 1, flat.padding[axis] = 0;
  return flat;
}

// The row of each table of a layer that belongs to a sample.
inline int64_t row_of(const DmqfxLayer& layer, int64_t image) { return layer.group == nullptr ? 0 : layer.group[image]; }
}  // namespace

void arrange(const DmqfxLayer& layer, int threads);  // layer.raw to layer.codes

// A layer of so few channels that the tables of its taps take longer than its steps; as one of a single tap, whose channels
// are those under all taps. `room` is for them, [batch, out_height, out_width, taps, channels], and a table, that many bytes;
// of other layers there are 0.
int64_t gathered(const DmqfxLayer& layer);
DmqfxLayer gather(const DmqfxLayer& layer, void* room, int threads);

// Bounds of code.h's numbers, whose values compilers of other files shall not know.
extern const float kLeastPower, kLeastSilu;

extern const InstructionSet kScalar;
extern const InstructionSet kAvx2;       // 16 bit sums of a run of steps
extern const InstructionSet kAvx2Middle; // 32 bit sums of two products that surely fit 16
extern const InstructionSet kAvx2Wide;   // 32 bit sums
extern const InstructionSet kAvx512Vnni;
