// The sizes of a tile, weights as a tile reads them, and what one thread works in. Internal linkage, as in tile.h.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "layer.h"
#include "sets.h"

namespace {

constexpr int kMostBlocks = 4;  // blocks of a part
constexpr int kStart = kStep / 2;  // sums of two products
constexpr int64_t kChunk = 768;   // steps whose weights are unpacked together: they stay in the second cache
constexpr int64_t kStrip = 96;    // output positions that are worked on together, at most
constexpr int64_t kWhole = 12;    // a multiple of every kRows
constexpr int64_t kBundle = 384;  // positions of a piece of work, about: they share unpacked weights

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t pieces(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Two signed weights of 4 bits a byte to one of 8: the low halves are the first 8 channels of a step.
inline void widen(const uint8_t* packed, int64_t steps, int8_t* weights) {
  for (; steps > 0; --steps, packed += kStep / 2, weights += kStep)
    for (int k = 0; k < kStep / 2; ++k) {
      weights[k] = static_cast<int8_t>(((packed[k] & 15) ^ 8) - 8);
      weights[k + kStep / 2] = static_cast<int8_t>(((packed[k] >> 4) ^ 8) - 8);
    }
}

// The weights of some steps times the factors of their input channels: shifted by powers of two, or left out by 0.
// Bytes by halves of 16 bits, which vector instructions can multiply. `to` may be where the weights come from.
inline void multiply(const int8_t* from, int64_t first, int64_t steps, int64_t quads, const uint8_t* factors, int8_t* to) {
  constexpr int kHalves = kStep / 2;
  int64_t quad = first % quads;
  for (int64_t step = 0; step < steps; ++step, from += kStep, to += kStep) {
    uint32_t of_quad, of_lanes[kLane];
    std::memcpy(&of_quad, factors + quad * kQuad, sizeof of_quad);
    for (uint32_t& lane : of_lanes) lane = of_quad;
    uint16_t weights[kHalves], four[kHalves];
    std::memcpy(weights, from, sizeof weights);
    std::memcpy(four, of_lanes, sizeof four);
    for (int k = 0; k < kHalves; ++k) {
      const uint16_t low = weights[k] * (four[k] & 255), high = (weights[k] & 0xFF00) * (four[k] >> 8);
      weights[k] = (low & 255) | high;
    }
    std::memcpy(to, weights, sizeof weights);
    if (++quad == quads) quad = 0;
  }
}

// Which weights lie unpacked on a desk: of which block and group, from which step, times which row of shifts less `left`.
struct Held {
  int64_t block, group, from, shifts, left;
  bool operator==(const Held& other) const {
    return block == other.block && group == other.group && from == other.from && shifts == other.shifts &&
           left == other.left;
  }
};

// What one thread works in.
struct Desk {
  int8_t* weights = nullptr;
  int16_t* starts = nullptr;
  int32_t* sums = nullptr;
  const uint8_t** rows = nullptr;
  uint8_t* padding = nullptr;
  uint8_t* factors = nullptr;
  int64_t table = -1;  // which bundle `rows` and `padding` belong to
  int64_t width = 0;   // sums of a position
  Held held{-1, -1, -1, -1, -1};

  bool furnish(const DmqfxLayer& layer, int64_t blocks, int64_t pointers, int64_t paddings) {
    width = blocks * kLane;
    weights = static_cast<int8_t*>(room(static_cast<size_t>(blocks * kChunk * kStep)));
    starts = static_cast<int16_t*>(room(static_cast<size_t>(blocks * kChunk * kStart) * sizeof(int16_t)));
    sums = static_cast<int32_t*>(room(static_cast<size_t>(kStrip * width) * sizeof(int32_t)));
    rows = static_cast<const uint8_t**>(room(static_cast<size_t>(pointers) * sizeof(uint8_t*)));
    padding = static_cast<uint8_t*>(room(static_cast<size_t>(paddings * layer.channels)));
    factors = static_cast<uint8_t*>(room(static_cast<size_t>(layer.channels)));
    return weights && starts && sums && rows && padding && factors;
  }
  void clear() { std::memset(sums, 0, static_cast<size_t>(kStrip * width) * sizeof(int32_t)); }
  ~Desk() {
    std::free(weights);
    std::free(starts);
    std::free(sums);
    std::free(rows);
    std::free(padding);
    std::free(factors);
  }
  static void* room(size_t bytes) { return std::aligned_alloc(64, (bytes + 64) / 64 * 64); }
};

}  // namespace
