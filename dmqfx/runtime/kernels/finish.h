// What becomes of sums: real numbers, or their codes. Internal linkage, as in tile.h.
#pragma once

#include <cstdint>

#include "code.h"
#include "desk.h"
#include "sets.h"

namespace {

// Positions of one image and group.
struct Span {
  int64_t image, group, first, count;
};

// Part of a layer: up to kBlocks blocks of 16 output channels, or of GEGLU as many of gates behind up to half of them,
// and what their sums hold.
struct Part {
  int64_t block, blocks;
  Room room;
  int64_t gates;  // blocks from a channel to its gate, or 0

  int64_t half() const { return gates == 0 ? blocks : blocks / 2; }
  int64_t number(int64_t k) const { return k < half() ? block + k : block + k - half() + gates; }
};

// What a position's results are made with; channels of a part, which need not lie side by side in the layer.
struct Finish {
  uint32_t less[kMostBlocks * kLane];
  float scales[kMostBlocks * kLane], biases[kMostBlocks * kLane];

  // Of shifted weights the product of weights and zero point is the sum behind the span's last.
  Finish(const DmqfxLayer& layer, const Span& span, const Part& part, const int32_t* sums) {
    const int64_t width = part.blocks * kLane, row = row_of(layer, span.image);
    const auto zero_point = static_cast<uint32_t>(layer.zero_points[row] - part.room.middle);
    for (int64_t k = 0; k < part.blocks; ++k) {
      const int64_t within = part.number(k) * kLane, used = least(kLane, layer.out_channels - within);
      const int64_t channel = span.group * layer.out_channels + within, at = k * kLane;
      for (int64_t n = 0; n < used; ++n)
        less[at + n] = layer.shifts == nullptr ? zero_point * static_cast<uint32_t>(layer.sums[channel + n])
                                               : static_cast<uint32_t>(sums[span.count * width + at + n]);
      if (layer.input_scales == nullptr) continue;
      for (int64_t n = 0; n < used; ++n) {
        scales[at + n] = layer.input_scales[row] * layer.weight_scales[channel + n];
        biases[at + n] = layer.biases != nullptr ? layer.biases[channel + n] : -0.0f;  // x + -0 is x, of both zeros
      }
    }
  }
  int32_t total(const int32_t* sums, int64_t n) const {
    return static_cast<int32_t>(static_cast<uint32_t>(sums[n]) - less[n]);
  }
  // Channels from..to of the part: times both scales, plus bias, plus what is added to them, rounded one by one.
  void real(const int32_t* sums, const float* added, int64_t from, int64_t to, float* made) const {
    if (added == nullptr) {
      for (int64_t n = from; n < to; ++n) made[n] = static_cast<float>(total(sums, n)) * scales[n] + biases[n];
    } else {
      for (int64_t n = from; n < to; ++n)
        made[n] = (static_cast<float>(total(sums, n)) * scales[n] + biases[n]) + added[n];
    }
  }
};

// Sums to results: the sums alone, real numbers, or the codes of these.
inline void finish(const DmqfxLayer& layer, const Span& span, const Part& part, const int32_t* sums) {
  const Finish how(layer, span, part, sums);
  const int64_t width = part.blocks * kLane, all = layer.groups * layer.out_channels;
  const int64_t within = part.block * kLane, used = least(part.half() * kLane, layer.out_channels - within);
  const int64_t channel = span.group * layer.out_channels + within;
  const int64_t first = span.image * layer.out_height * layer.out_width + span.first;
  const float* added = layer.added;
  if (added != nullptr) added += span.image * layer.added_image + span.first * layer.added_position + channel;
  if (layer.integer != nullptr) {
    for (int64_t k = 0; k < span.count; ++k)
      for (int64_t n = 0; n < used; ++n) layer.integer[(first + k) * all + channel + n] = how.total(sums + k * width, n);
    return;
  }
  const auto more = [&](int64_t k) { return added == nullptr ? nullptr : added + k * layer.added_position; };
  if (layer.coding == nullptr) {
    for (int64_t k = 0; k < span.count; ++k)
      how.real(sums + k * width, more(k), 0, used, layer.real + (first + k) * all + channel);
    return;
  }
  const DmqfxCoding& coding = *layer.coding;
  const Grid grid(coding, span.image);
  float line[kMostBlocks * kLane], steps[kMostBlocks * kLane], zero_points[kMostBlocks * kLane];
  for (int64_t n = 0; n < used; ++n) steps[n] = grid.step(channel + n), zero_points[n] = grid.zero_point(channel + n);
  for (int64_t k = 0; k < span.count; ++k) {
    const int64_t half = part.half() * kLane, behind = part.gates * kLane - half;  // a gate's number is not its channel's
    how.real(sums + k * width, more(k), 0, used, line);
    if (part.gates != 0) how.real(sums + k * width, added == nullptr ? nullptr : more(k) + behind, half, width, line);
    code_results(coding, line, part.gates == 0 ? nullptr : line + half, steps, zero_points, used,
                 coding.codes + (first + k) * coding.channels + channel);
  }
}

}  // namespace
