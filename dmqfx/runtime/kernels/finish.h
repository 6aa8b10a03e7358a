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

// Part of a layer: up to kMostBlocks blocks of 16 output channels, or of GEGLU as many of gates behind up to half of them.
struct Part {
  int64_t block, blocks;
  int64_t gates;            // blocks from a channel to its gate, or 0
  int32_t middle = 0;       // what codes are less in the sums
  int64_t run = INT64_MAX;  // steps that those hold

  int64_t half() const { return gates == 0 ? blocks : blocks / 2; }
  int64_t number(int64_t k) const { return k < half() ? block + k : block + k - half() + gates; }
};

constexpr int64_t kPeriod = kMostBlocks * kLane;

// What a position's results are made with; channels of a part, which need not lie side by side in the layer.
struct Finish {
  uint32_t less[kPeriod];
  float scales[kPeriod], biases[kPeriod];

  // Of shifted weights the product of weights and zero point is the sum behind the span's last.
  Finish(const DmqfxLayer& layer, const Span& span, const Part& part, const int32_t* sums) {
    const int64_t width = part.blocks * kLane, row = row_of(layer, span.image);
    const auto zero_point = static_cast<uint32_t>(layer.zero_points[row] - part.middle);
    for (int64_t k = 0; k < part.blocks; ++k) {
      const int64_t within = part.number(k) * kLane, used = least(kLane, layer.out_channels - within);
      const int64_t channel = span.group * layer.out_channels + within, at = k * kLane;
      for (int64_t n = 0; n < used; ++n)
        less[at + n] = layer.shifts == nullptr ? zero_point * static_cast<uint32_t>(layer.sums[channel + n])
                                               : static_cast<uint32_t>(sums[span.count * width + at + n]);
      for (int64_t n = used; n < kLane; ++n) less[at + n] = 0, scales[at + n] = biases[at + n] = 0;
      if (layer.input_scales == nullptr) continue;
      for (int64_t n = 0; n < used; ++n) {
        scales[at + n] = layer.input_scales[row] * layer.weight_scales[channel + n];
        biases[at + n] = layer.biases != nullptr ? layer.biases[channel + n] : -0.0f;  // x + -0 is x, of both zeros
      }
    }
    for (int64_t n = width; layer.coding != nullptr && n < kPeriod; ++n)  // of the next positions
      less[n] = less[n - width], scales[n] = scales[n - width], biases[n] = biases[n - width];
  }
  int32_t total(const int32_t* sums, int64_t n) const { return total(sums, n, n); }
  int32_t total(const int32_t* sums, int64_t n, int64_t channel) const {
    return static_cast<int32_t>(static_cast<uint32_t>(sums[n]) - less[channel]);
  }
  // Channels from..to of the part, to made[0]..: times both scales, plus bias, plus what is added, rounded one by one.
  void real(const int32_t* sums, const float* added, int64_t from, int64_t to, float* __restrict made) const {
    if (added == nullptr) {
      for (int64_t n = from; n < to; ++n) made[n - from] = static_cast<float>(total(sums, n)) * scales[n] + biases[n];
    } else {
      for (int64_t n = from; n < to; ++n)
        made[n - from] = (static_cast<float>(total(sums, n)) * scales[n] + biases[n]) + added[n];
    }
  }
};

// Numbers that come again with each kPeriod of a line.
struct Again {
  const float* all;
  int64_t within = 0;
  float operator[](int64_t n) const { return all[within + n]; }
};
inline Again behind(Again from, int64_t n) { return {from.all, (from.within + n) % kPeriod}; }
inline const float* few(Again from, int64_t n, int64_t, float*) { return from.all + (from.within + n) % kPeriod; }

// Results that nothing is added to, made as they are read; what belongs to them comes again with each kPeriod of them.
struct Results {
  const int32_t* sums;
  const Finish* how;
  int64_t within = 0;

  float operator[](int64_t n) const {
    return static_cast<float>(how->total(sums, n, within + n)) * how->scales[within + n] + how->biases[within + n];
  }
};
inline Results behind(Results from, int64_t n) { return {from.sums + n, from.how, (from.within + n) % kPeriod}; }
inline const float* few(Results from, int64_t n, int64_t left, float* room) {
  const Results last = behind(from, n);
  for (int k = 0; k < kShort; ++k) room[k] = last[k < left ? k : 0];
  return room;
}

// Where the results of a span and part begin in tensors of all channels, and what is added to them.
struct Place {
  int64_t width, used, channel, first;  // sums of a position; results of it that there are; the first channel and position
  const float* added;

  Place(const DmqfxLayer& layer, const Span& span, const Part& part)
      : width(part.blocks * kLane), used(least(part.half() * kLane, layer.out_channels - part.block * kLane)),
        channel(span.group * layer.out_channels + part.block * kLane),
        first(span.image * layer.out_height * layer.out_width + span.first), added(layer.added) {
    if (added != nullptr) added += span.image * layer.added_image + span.first * layer.added_position + channel;
  }
};

// Memory of some positions one after another, fetched ahead of its use: a store waits for its line, too.
struct Ahead {
  uintptr_t first = 0;
  int64_t stride = 0, bytes = 0;  // from position to position; of one

  void fetch(int64_t from, int64_t end) const {
    for (int64_t n = 0; n < bytes; n += 64)
      for (int64_t k = from; k < end; ++k)
        __builtin_prefetch(reinterpret_cast<const void*>(first + static_cast<uintptr_t>(n + k * stride)), 1);
  }
};

// Where the results of some blocks of a part go, from a position on, counted over all images.
inline Ahead results_of(const DmqfxLayer& layer, int64_t group, int64_t position, const Part& part, int64_t block, int64_t blocks) {
  const bool coded = layer.coding != nullptr;
  const void* real = layer.real != nullptr ? static_cast<const void*>(layer.real) : layer.integer;
  const int64_t size = coded ? 1 : sizeof(float), channel = group * layer.out_channels + (part.block + block) * kLane;
  const int64_t stride = size * (coded ? layer.coding->channels : layer.groups * layer.out_channels);
  const auto all = reinterpret_cast<uintptr_t>(coded ? layer.coding->codes : real);
  return {all + static_cast<uintptr_t>(position * stride + channel * size), stride, blocks * kLane * size};
}

// Codes of some positions from where they lie side by side to where they belong.
template <int64_t kUsed>
void spread_codes(const uint8_t* codes, int64_t width, int64_t count, uint8_t* to, int64_t channels) {
  for (int64_t k = 0; k < count; ++k) std::memcpy(to + k * channels, codes + k * width, kUsed);
}
inline void spread_codes(const uint8_t* codes, int64_t width, int64_t used, int64_t count, uint8_t* to, int64_t channels) {
  if (used == kLane) return spread_codes<kLane>(codes, width, count, to, channels);
  if (used == 2 * kLane) return spread_codes<2 * kLane>(codes, width, count, to, channels);
  if (used == 4 * kLane) return spread_codes<4 * kLane>(codes, width, count, to, channels);
  for (int64_t k = 0; k < count; ++k) std::memcpy(to + k * channels, codes + k * width, static_cast<size_t>(used));
}

// Results as codes, of several positions together: few numbers take as long as many.
// Inlined: else what `how` holds might be written by what it is read for.
DMQFX_INLINE void finish_codes(const DmqfxLayer& layer, const Span& span, const Part& part, const Finish& how, const Place& at,
                               const int32_t* sums) {
  const DmqfxCoding& coding = *layer.coding;
  const Grid grid(coding, span.image);
  const bool made = at.added != nullptr || part.gates != 0;
  const int64_t half = part.half() * kLane, fit = kPeriod / half, behind = part.gates * kLane;
  const int64_t together = made || kPeriod % half != 0 ? fit : kStrip;
  alignas(64) float line[kPeriod], gates[kPeriod], steps[kPeriod], zero_points[kPeriod];
  alignas(64) uint8_t codes[kStrip * kPeriod];
  if (made) std::memset(line, 0, sizeof line), std::memset(gates, 0, sizeof gates);
  if (grid.wide()) std::memset(steps, 0, sizeof steps), std::memset(zero_points, 0, sizeof zero_points);
  for (int64_t n = 0; grid.wide() && n < at.used; ++n)
    for (int64_t j = n; j < fit * half; j += half)
      steps[j] = grid.step(at.channel + n), zero_points[j] = grid.zero_point(at.channel + n);
  for (int64_t k = 0, some; k < span.count; k += some) {
    some = least(together, span.count - k);
    for (int64_t j = 0; made && j < some; ++j) {
      const int32_t* own = sums + (k + j) * at.width;
      const float* added = at.added == nullptr ? nullptr : at.added + (k + j) * layer.added_position;
      how.real(own, added, 0, at.used, line + j * half);
      if (part.gates == 0) continue;
      how.real(own, added == nullptr ? nullptr : added + behind - half, half, at.width, gates + j * half);
    }
    const auto make = [&](auto numbers, const float* beside) {
      if (grid.wide())
        code_results(coding, numbers, beside, Again{steps}, Again{zero_points}, some * half, codes);
      else
        code_results(coding, numbers, beside, One<float>{grid.step(0)}, One<float>{grid.zero_point(0)}, some * half, codes);
    };
    if (made)
      make(static_cast<const float*>(line), gates);
    else
      make(Results{sums + k * at.width, &how}, nullptr);
    spread_codes(codes, half, at.used, some, coding.codes + (at.first + k) * coding.channels + at.channel, coding.channels);
  }
}

// Sums to results: the sums alone, real numbers, or the codes of these.
inline void finish(const DmqfxLayer& layer, const Span& span, const Part& part, const int32_t* sums) {
  const Finish how(layer, span, part, sums);
  const Place at(layer, span, part);
  const int64_t all = layer.groups * layer.out_channels;
  if (layer.coding != nullptr) return finish_codes(layer, span, part, how, at, sums);
  for (int64_t k = 0; k < span.count; ++k, sums += at.width) {
    const int64_t place = (at.first + k) * all + at.channel;
    if (layer.integer != nullptr)
      for (int64_t n = 0; n < at.used; ++n) layer.integer[place + n] = how.total(sums, n);
    else
      how.real(sums, at.added == nullptr ? nullptr : at.added + k * layer.added_position, 0, at.used, layer.real + place);
  }
}

}  // namespace
