// The kernel, written once: a tile of output positions by blocks of 16 output channels, over an instruction set.
//
// An instruction set `Isa` gives
//   kRows, kBlocks       how many positions and blocks of 16 channels fit its registers
//   Sums                 running sums of one position and block
//   Weights              4 weights of each of 16 channels, one quad
//   Codes                4 codes of one position, in every lane
//   kCentred             whether sums begin with what a panel has for them, and hold no more than its room; then also
//                        clear and negate(sums, int16[32])
//   load, spread, add(sums, codes, weights), begin(sums, int16[32], codes, weights), which makes sums of a first step,
//   flush(sums, int32[16], fresh), which adds unless these are fresh
// Everything here has internal linkage: each file that includes it is compiled for its own instruction set, and
// nothing of it may be taken for the code of another.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "desk.h"
#include "layer.h"

namespace {

// Weights as tiles read them, block after block: where they lie, or unpacked. Sums of a run of steps begin with `starts`.
struct Panel {
  const int8_t* weights;
  int64_t stride;  // from block to block
  const int16_t* starts = nullptr;
  int64_t starts_stride = 0, run = INT64_MAX;

  Panel from(int64_t block) const {
    return {weights + block * stride, stride, starts == nullptr ? nullptr : starts + block * starts_stride, starts_stride, run};
  }
};

// Some steps of a layer's: those of `quads` for every tap, from one on.
struct Steps {
  int64_t quads, tap, quad, count;

  Steps(int64_t of_tap, int64_t from, int64_t to) : quads(of_tap), tap(from / of_tap), quad(from % of_tap), count(to - from) {}
};

// sums[row][channel] += these steps, or = where they are fresh; rows[row * taps + tap] points to the codes under a tap.
template <class Isa, int kTall, int kUsed>
void tile(const uint8_t* const* rows, int64_t taps, const Steps& steps, const Panel& panel, bool fresh, int32_t* sums,
          int64_t sums_stride) {
  typename Isa::Sums running[kTall][kUsed];
  const int8_t* weights = panel.weights;
  const int16_t* starts = panel.starts;
  const uint8_t* codes[kTall];
  const auto step = [&](auto begins, int64_t number) __attribute__((always_inline)) {
    typename Isa::Weights loaded[kUsed];
#pragma GCC unroll 4
    for (int block = 0; block < kUsed; ++block) Isa::load(loaded[block], weights + block * panel.stride);
#pragma GCC unroll 8
    for (int row = 0; row < kTall; ++row) {
      const typename Isa::Codes four = Isa::spread(codes[row] + number * kQuad);
#pragma GCC unroll 4
      for (int block = 0; block < kUsed; ++block)
        if constexpr (begins)
          Isa::begin(running[row][block], starts + block * panel.starts_stride, four, loaded[block]);
        else
          Isa::add(running[row][block], four, loaded[block]);
    }
    weights += kStep;
  };
  const int64_t quads = steps.quads;
  int64_t tap = steps.tap, quad = steps.quad, rest = steps.count;
  const auto look = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int row = 0; row < kTall; ++row) codes[row] = rows[row * taps + tap] + quad * kQuad;
  };
  for (; rest > 0; fresh = false) {
    int64_t left = least(rest, panel.run);
    rest -= left;
    look();
    step(std::true_type{}, 0);
    for (int64_t next = 1; left > 0; next = 0) {
      const int64_t count = least(left, quads - quad);
      for (; next < count; ++next) step(std::false_type{}, next);
      left -= count;
      quad += count;
      if (quad == quads) quad = 0, ++tap;
      if (left > 0) look();
    }
    if (Isa::kCentred) starts += kStart;
#pragma GCC unroll 8
    for (int row = 0; row < kTall; ++row)
#pragma GCC unroll 4
      for (int block = 0; block < kUsed; ++block)
        Isa::flush(running[row][block], sums + row * sums_stride + block * kLane, fresh);
  }
}

template <class Isa>
using Tile = void (*)(const uint8_t* const*, int64_t, const Steps&, const Panel&, bool, int32_t*, int64_t);

template <class Isa, int kTall>
Tile<Isa> tile_of(int64_t blocks) {
  if constexpr (Isa::kBlocks > 1) {
    if (blocks == 2) return tile<Isa, kTall, 2>;
    if (blocks == 3) return tile<Isa, kTall, 3>;
    if (blocks == 4) return tile<Isa, kTall, 4>;
  }
  return tile<Isa, kTall, 1>;
}

// The sums of some rows by up to kBlocks blocks: tiles of all rows that fit the registers, and lower ones for what is left.
// `before` is told which rows come next.
template <class Isa, class Before>
void tiles(const uint8_t* const* rows, int64_t count, int64_t taps, const Steps& steps, const Panel& panel, int64_t blocks, bool fresh,
           int32_t* sums, int64_t sums_stride, Before before) {
  constexpr int kHalf = Isa::kRows / 2;
  const Tile<Isa> whole = tile_of<Isa, Isa::kRows>(blocks);
  for (int64_t k = 0, tall; k < count; k += tall) {
    const int64_t left = count - k;
    tall = left > kHalf ? Isa::kRows : left > 1 ? kHalf : 1;
    const Tile<Isa> chosen = left > kHalf ? whole : left > 1 ? tile_of<Isa, kHalf>(blocks) : tile_of<Isa, 1>(blocks);
    before(k, least(k + tall, count));
    chosen(rows + k * taps, taps, steps, panel, fresh, sums + k * sums_stride, sums_stride);
  }
}

// 10^9 multiply-adds a second of the tile alone on data in the first cache.
template <class Isa>
double peak(double (*seconds)()) {
  constexpr int64_t kSteps = 120;  // no power of two: blocks would fall into the same sets of the cache
  alignas(64) static int8_t weights[Isa::kBlocks * kSteps * kStep];
  alignas(64) static uint8_t codes[kSteps * kQuad];
  alignas(64) static int32_t sums[Isa::kRows * Isa::kBlocks * kLane];
  std::memset(weights, 1, sizeof weights);  // pages of their own
  std::memset(codes, 1, sizeof codes);
  alignas(64) static int16_t starts[kSteps * kStart];
  const Panel panel{weights, kSteps * kStep, starts, 0, kSteps};
  const Steps steps(kSteps, 0, kSteps);
  const uint8_t* rows[Isa::kRows];
  for (auto& row : rows) row = codes;
  const volatile Tile<Isa> measured = tile_of<Isa, Isa::kRows>(Isa::kBlocks);  // as layers call it: not compiled for these sizes
  double best = 0;
  for (int trial = 0; trial < 20; ++trial) {
    constexpr int kTimes = 2000;
    const double started = seconds();
    for (int k = 0; k < kTimes; ++k)
      measured(rows, 1, steps, panel, false, sums, Isa::kBlocks * kLane);
    const double rate = 1e-9 * kTimes * kSteps * kStep * Isa::kRows * Isa::kBlocks / (seconds() - started);
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace
