// Weights as the kernels read them: blocks of 16 output channels, four input channels side by side.
#include <algorithm>
#include <cstring>

#include "layer.h"

namespace {

constexpr int64_t kLanes = 16, kQuad = 4, kStep = kLanes * kQuad;

struct Bounds {
  int32_t up = 0, down = 0;  // what two neighbouring codes add up to, those above 0 and those below
};

// The codes of one step: zeros where there is no such channel.
void gather(const DmqfxPacking& packing, const int8_t* rows, int64_t lanes, int64_t tap, int64_t first, int8_t* step) {
  const int64_t row = packing.channels * packing.taps, count = std::min(kQuad, packing.channels - first);
  std::memset(step, 0, kStep);
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int64_t k = 0; k < count; ++k)
      step[lane * kQuad + k] = rows[lane * row + (first + k) * packing.taps + tap];
}

void widen(const int8_t* step, Bounds& bounds) {
  for (int64_t k = 0; k < kStep; k += 2) {
    const int32_t one = step[k], two = step[k + 1];
    bounds.up = std::max(bounds.up, std::max(one, 0) + std::max(two, 0));
    bounds.down = std::min(bounds.down, std::min(one, 0) + std::min(two, 0));
  }
}

uint8_t* put(const DmqfxPacking& packing, const int8_t* step, uint8_t* to) {
  if (!packing.nibbles) {
    std::memcpy(to, step, kStep);
    return to + kStep;
  }
  for (int64_t k = 0; k < kStep / 2; ++k)
    to[k] = static_cast<uint8_t>((step[k] & 15) | static_cast<uint8_t>(step[k + kStep / 2]) << 4);
  return to + kStep / 2;
}

// 16 output channels of a group.
Bounds pack_block(const DmqfxPacking& packing, int64_t group, int64_t block, uint8_t* to) {
  const int64_t row = packing.channels * packing.taps, first = block * kLanes;
  const int64_t lanes = std::min(kLanes, packing.out_channels - first), at = group * packing.out_channels + first;
  const int8_t* rows = packing.raw + at * row;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    int32_t sum = 0;
    for (int64_t k = 0; k < row; ++k) sum += rows[lane * row + k];
    packing.sums[at + lane] = sum;
  }
  Bounds bounds;
  int8_t step[kStep];
  for (int64_t tap = 0; tap < packing.taps; ++tap)
    for (int64_t channel = 0; channel < packing.channels; channel += kQuad) {
      gather(packing, rows, lanes, tap, channel, step);
      widen(step, bounds);
      to = put(packing, step, to);
    }
  return bounds;
}

}  // namespace

int64_t dmqfx_packing_size(void) { return sizeof(DmqfxPacking); }

int64_t dmqfx_pack(const DmqfxPacking* packing, int threads) {
  const int64_t blocks = (packing->out_channels + kLanes - 1) / kLanes;
  const int64_t steps = packing->taps * ((packing->channels + kQuad - 1) / kQuad);
  const int64_t length = steps * (packing->nibbles ? kStep / 2 : kStep);
  int32_t up = 0, down = 0;
#pragma omp parallel for num_threads(threads > 1 ? threads : 1) reduction(max : up) reduction(min : down) if (threads > 1)
  for (int64_t k = 0; k < packing->groups * blocks; ++k) {
    const Bounds found = pack_block(*packing, k / blocks, k % blocks, packing->weights + k * length);
    up = std::max(up, found.up);
    down = std::min(down, found.down);
  }
  return std::max(up, -down);
}
