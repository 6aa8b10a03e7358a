// Weights as the kernels read them: blocks of 16 output channels, four input channels side by side.
#include <algorithm>
#include <cstring>

#include "layer.h"

namespace {

constexpr int64_t kLanes = 16, kQuad = 4, kStep = kLanes * kQuad;

// What two neighbouring codes add up to in runs of steps: those above 0, then those below without their sign.
struct Run {
  int32_t of[kStep];

  int32_t greatest() const { return *std::max_element(of, of + kStep); }
  void add(const Run& other) {
    for (int64_t k = 0; k < kStep; ++k) of[k] += other.of[k];
  }
};

// The greatest of all runs of 2^k steps that begin at multiples of 2^k; one that the last step cuts off counts too.
class Bounds {
 public:
  int32_t most[kRuns] = {};

  // Step after step: a run is whole with the second of its halves, as a binary counter carries.
  void step(const Run& one) {
    Run whole = one;
    int level = 0;
    note(level, whole);
    for (int64_t before = steps_++; (before & 1) != 0 && level + 1 < kRuns; before >>= 1) {
      whole.add(halves_[level]);
      note(++level, whole);
    }
    halves_[level] = whole;
  }
  void end() {
    Run rest{};
    for (int level = 0; level + 1 < kRuns; ++level) {
      if (((steps_ >> level) & 1) != 0) rest.add(halves_[level]);
      note(level + 1, rest);
    }
  }

 private:
  Run halves_[kRuns];
  int64_t steps_ = 0;

  void note(int level, const Run& run) { most[level] = std::max(most[level], run.greatest()); }
};

// The codes of one step: zeros where there is no such channel.
void gather(const DmqfxPacking& packing, const int8_t* rows, int64_t lanes, int64_t tap, int64_t first, int8_t* step) {
  const int64_t row = packing.channels * packing.taps, count = std::min(kQuad, packing.channels - first);
  std::memset(step, 0, kStep);
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int64_t k = 0; k < count; ++k)
      step[lane * kQuad + k] = rows[lane * row + (first + k) * packing.taps + tap];
}

Run bounded(const int8_t* step) {
  Run found;
  for (int64_t k = 0; k < kStep / 2; ++k) {
    const int32_t one = step[2 * k], two = step[2 * k + 1];
    found.of[k] = std::max(one, 0) + std::max(two, 0);
    found.of[k + kStep / 2] = -(std::min(one, 0) + std::min(two, 0));
  }
  return found;
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

// 16 output channels of a group; what their runs come to.
void pack_block(const DmqfxPacking& packing, int64_t group, int64_t block, uint8_t* to, Bounds& bounds) {
  const int64_t row = packing.channels * packing.taps, first = block * kLanes;
  const int64_t lanes = std::min(kLanes, packing.out_channels - first), at = group * packing.out_channels + first;
  const int8_t* rows = packing.raw + at * row;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    int32_t sum = 0;
    for (int64_t k = 0; k < row; ++k) sum += rows[lane * row + k];
    packing.sums[at + lane] = sum;
  }
  int8_t step[kStep];
  for (int64_t tap = 0; tap < packing.taps; ++tap)
    for (int64_t channel = 0; channel < packing.channels; channel += kQuad) {
      gather(packing, rows, lanes, tap, channel, step);
      bounds.step(bounded(step));
      to = put(packing, step, to);
    }
  bounds.end();
}

}  // namespace

int64_t dmqfx_packing_size(void) { return sizeof(DmqfxPacking); }

void dmqfx_pack(const DmqfxPacking* packing, int threads) {
  const int64_t blocks = (packing->out_channels + kLanes - 1) / kLanes;
  const int64_t steps = packing->taps * ((packing->channels + kQuad - 1) / kQuad);
  const int64_t length = steps * (packing->nibbles ? kStep / 2 : kStep);
  int32_t most[kRuns] = {};
#pragma omp parallel for num_threads(threads > 1 ? threads : 1) reduction(max : most) if (threads > 1)
  for (int64_t k = 0; k < packing->groups * blocks; ++k) {
    Bounds bounds;
    pack_block(*packing, k / blocks, k % blocks, packing->weights + k * length, bounds);
    for (int level = 0; level < kRuns; ++level) most[level] = std::max(most[level], bounds.most[level]);
  }
  std::copy(most, most + kRuns, packing->runs);
}
