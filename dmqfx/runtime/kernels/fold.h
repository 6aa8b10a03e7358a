// A layer of few output channels, which would leave most lanes of a block empty: as one of a single tap over the pixels of the
// input, whose output channels are those under every tap; what the taps of a position find there is added up.
// Internal linkage, as in tile.h.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "desk.h"
#include "finish.h"
#include "sets.h"

namespace {

constexpr int64_t kFoldBytes = 1 << 26;  // of sums of images that are worked on together, but for one that has more

// Some images of a layer, of one tap; `sums` are of codes less their zero point, so that padding adds nothing.
inline DmqfxLayer flat_of(const DmqfxLayer& layer, int64_t first, int64_t images, int32_t* sums) {
  DmqfxLayer flat = of_one_tap(layer, layer.height, layer.width);
  flat.folded = 0;
  flat.batch = images;
  flat.codes += first * layer.height * layer.width * layer.channels;
  if (layer.group != nullptr) flat.group += first;
  flat.out_channels *= layer.taps[0] * layer.taps[1];
  flat.input_scales = flat.added = flat.real = nullptr;
  flat.coding = nullptr;
  flat.integer = sums;
  return flat;
}

// The sums of a span of a line of positions, [count, 16]; `pixels` are those of the image.
inline void add_taps(const DmqfxLayer& layer, const int32_t* pixels, int64_t down, int64_t across, int64_t count, int32_t* sums) {
  const int64_t under = layer.taps[0] * layer.taps[1] * layer.out_channels;
  std::memset(sums, 0, static_cast<size_t>(count * kLane) * sizeof(int32_t));
  for (int64_t high = 0; high < layer.taps[0]; ++high) {
    const int64_t line = line_of(layer, down, high);
    for (int64_t wide = 0; wide < layer.taps[1] && line >= 0; ++wide)
      for (int64_t k = 0; k < count; ++k) {
        const int64_t at = pixel_of(layer, across + k, wide);
        if (at < 0) continue;
        const int32_t* found = pixels + (line * layer.width + at) * under + (high * layer.taps[1] + wide) * layer.out_channels;
        for (int64_t n = 0; n < layer.out_channels; ++n) sums[k * kLane + n] += found[n];
      }
  }
}

// All of a folded layer, whose flat one `run` computes; false if there is no memory.
template <class Run>
bool unfold(const DmqfxLayer& layer, int threads, Run run) {
  static constexpr int32_t kNothing[kLane] = {};
  const int64_t pixels = layer.height * layer.width, under = layer.taps[0] * layer.taps[1] * layer.out_channels;
  const int64_t bytes = pixels * under * static_cast<int64_t>(sizeof(int32_t));
  const int64_t fit = bytes > 0 ? kFoldBytes / bytes : layer.batch, together = fit > 1 ? least(layer.batch, fit) : 1;
  const std::unique_ptr<void, decltype(&std::free)> room(std::malloc(static_cast<size_t>(together * bytes + 64)), &std::free);
  auto* sums = static_cast<int32_t*>(room.get());
  if (sums == nullptr) return false;
  DmqfxLayer centred = layer;  // its sums are, so nothing has to be taken from them
  centred.sums = kNothing;
  centred.shifts = nullptr;
  for (int64_t first = 0; first < layer.batch; first += together) {
    const int64_t images = least(together, layer.batch - first), lines = images * layer.out_height;
    if (pixels > 0 && !run(flat_of(layer, first, images, sums))) return false;
    const int team = threads > 1 && lines > 1 ? threads : 1;
#pragma omp parallel for num_threads(team) if (team > 1)
    for (int64_t k = 0; k < lines; ++k) {
      alignas(64) int32_t some[kStrip * kLane];
      const int64_t image = k / layer.out_height, down = k % layer.out_height;
      for (int64_t across = 0, count; across < layer.out_width; across += count) {
        count = least(kStrip, layer.out_width - across);
        add_taps(layer, sums + image * pixels * under, down, across, count, some);
        finish(centred, Span{first + image, 0, down * layer.out_width + across, count}, Part{0, 1, 0}, some);
      }
    }
  }
  return true;
}

}  // namespace
