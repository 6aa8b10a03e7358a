// Weights as the kernels read them: blocks of 16 output channels, four input channels side by side.
#include <algorithm>
#include <cstring>

#include "layer.h"

namespace {

// What two neighbouring codes in every step of a run add up to without their signs.
struct Run {
  int32_t of[kStep / 2];

  int32_t greatest() const { return *std::max_element(of, of + kStep / 2); }
  void most(const Run& other) {
    for (int64_t k = 0; k < kStep / 2; ++k) of[k] = other.of[k] > of[k] ? other.of[k] : of[k];
  }
  void add(const Run& other) {
    for (int64_t k = 0; k < kStep / 2; ++k) of[k] += other.of[k];
  }
};

// The greatest of all runs of 2^k steps that begin at multiples of 2^k; one that the last step cuts off counts too.
template <int kLengths>
class Doubled {
 public:
  // Step after step: a run is whole with the second of its halves, as a binary counter carries.
  void step(const Run& one, Run* most) {
    Run whole = one;
    int level = 0;
    note(level, whole, most);
    for (int64_t before = steps_++; (before & 1) != 0 && level + 1 < kLengths; before >>= 1) {
      whole.add(halves_[level]);
      note(++level, whole, most);
    }
    halves_[level] = whole;
  }
  void end(Run* most) const {
    Run rest{};
    for (int level = 0; level + 1 < kLengths; ++level) {
      if (((steps_ >> level) & 1) != 0) rest.add(halves_[level]);
      note(level + 1, rest, most);
    }
  }

 private:
  Run halves_[kLengths];
  int64_t steps_ = 0;

  static void note(int level, const Run& run, Run* most) { most[level].most(run); }
};

// Of one block: its greatest pair and runs, of 1, 2, 4, ... steps and of 3, 6, 12, ...
class Bounds {
 public:
  Run most[1 + kRuns] = {};

  void step(const int8_t* codes) {
    Run one;
    for (int64_t k = 0; k < kStep / 2; ++k) {
      const int32_t up = std::max<int32_t>(codes[2 * k], 0) + std::max<int32_t>(codes[2 * k + 1], 0);
      const int32_t down = up - codes[2 * k] - codes[2 * k + 1], further = up > down ? up : down;
      one.of[k] = up + down;
      most[0].of[k] = further > most[0].of[k] ? further : most[0].of[k];
    }
    singly_.step(one, most + 1);
    if (within_ == 0) three_ = Run{};
    three_.add(one);
    if (++within_ == 3) three_end();
  }
  void end() {
    singly_.end(most + 1);
    if (within_ > 0) three_end();
    in_threes_.end(most + 1 + kDoubled);
  }

 private:
  Doubled<kDoubled> singly_;
  Doubled<kRuns - kDoubled> in_threes_;
  Run three_;
  int within_ = 0;

  void three_end() {
    in_threes_.step(three_, most + 1 + kDoubled);
    within_ = 0;
  }
};

// The codes of one step: zeros where there is no such channel.
void gather(const DmqfxPacking& packing, const int8_t* rows, int64_t lanes, int64_t tap, int64_t first, int8_t* step) {
  const int64_t row = packing.channels * packing.taps, count = std::min<int64_t>(kQuad, packing.channels - first);
  std::memset(step, 0, kStep);
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int64_t k = 0; k < count; ++k)
      step[lane * kQuad + k] = rows[lane * row + (first + k) * packing.taps + tap];
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
  const int64_t row = packing.channels * packing.taps, first = block * kLane;
  const int64_t lanes = std::min<int64_t>(kLane, packing.out_channels - first), at = group * packing.out_channels + first;
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
      bounds.step(step);
      to = put(packing, step, to);
    }
  bounds.end();
}

}  // namespace

int64_t dmqfx_packing_size(void) { return sizeof(DmqfxPacking); }

void dmqfx_pack(const DmqfxPacking* packing, int threads) {
  const int64_t blocks = (packing->out_channels + kLane - 1) / kLane;
  const int64_t steps = packing->taps * ((packing->channels + kQuad - 1) / kQuad);
  const int64_t length = steps * (packing->nibbles ? kStep / 2 : kStep);
  int32_t pair = 0;
#pragma omp parallel for num_threads(threads > 1 ? threads : 1) reduction(max : pair) if (threads > 1)
  for (int64_t k = 0; k < packing->groups * blocks; ++k) {
    Bounds bounds;
    pack_block(*packing, k / blocks, k % blocks, packing->weights + k * length, bounds);
    pair = std::max(pair, bounds.most[0].greatest());
    for (int64_t n = 0; n < kRuns; ++n) packing->runs[k * kRuns + n] = bounds.most[1 + n].greatest();
  }
  *packing->pair = pair;
}
