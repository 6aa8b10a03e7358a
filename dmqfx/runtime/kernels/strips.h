// A layer by tiles: its positions in strips, its weights in panels, pieces of work for threads. Internal linkage, as in tile.h.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "desk.h"
#include "finish.h"
#include "fold.h"
#include "layer.h"
#include "tile.h"

namespace {

// Positions of a group that are worked on together, counted over all images; `rows` and `padding` are its own.
struct Strip {
  int64_t group, first, count;
  const uint8_t** rows;
  uint8_t* padding;  // of each image
};

// Where the codes under each tap of each position are; beyond the image lie the padding's.
inline void point(const DmqfxLayer& layer, const Strip& strip, int64_t reach) {
  const int64_t pixel = layer.groups * layer.channels;
  const int64_t positions = layer.out_height * layer.out_width, taps = layer.taps[0] * layer.taps[1];
  const uint8_t** row = strip.rows;
  uint8_t* padding = strip.padding;
  for (int64_t k = 0; k < strip.count; padding += layer.channels) {
    const int64_t image = (strip.first + k) / positions, within = (strip.first + k) % positions;
    const int64_t end = least(strip.count, k + positions - within);
    std::memset(padding, layer.zero_points[row_of(layer, image)], static_cast<size_t>(layer.channels));
    const uint8_t* codes = layer.codes + image * layer.height * layer.width * pixel + strip.group * layer.channels;
    int64_t down = within / layer.out_width, across = within % layer.out_width;
    for (; k < end; ++k) {
      for (int64_t high = 0; high < layer.taps[0]; ++high) {
        const int64_t line = line_of(layer, down, high);
        for (int64_t wide = 0; wide < layer.taps[1]; ++wide) {
          const int64_t at = line < 0 ? -1 : pixel_of(layer, across, wide);
          *row++ = at < 0 ? padding : codes + (line * layer.width + at) * pixel;
        }
      }
      if (++across == layer.out_width) across = 0, ++down;
    }
  }
  for (const uint8_t** end = strip.rows + reach * taps; row < end; ++row) *row = strip.padding;
}

// What the sums of each run of steps begin with: minus the middle times their weights, as if codes were less by it.
template <class Isa>
void start(const int8_t* weights, int64_t steps, int64_t run, int32_t middle_of_all, int16_t* starts) {
  const uint32_t four = 0x01010101u * static_cast<uint32_t>(middle_of_all);
  uint8_t middle[kQuad];
  std::memcpy(middle, &four, sizeof middle);
  const typename Isa::Codes codes = Isa::spread(middle);
  for (int64_t first = 0; first < steps; first += run, starts += kStart) {
    typename Isa::Sums sums;
    Isa::clear(sums);
    for (int64_t end = least(first + run, steps), step = first; step < end; ++step, weights += kStep) {
      typename Isa::Weights loaded;
      Isa::load(loaded, weights);
      Isa::add(sums, codes, loaded);
    }
    Isa::negate(sums, starts);
  }
}

// Steps that the sums of some blocks hold.
inline int64_t run_of(const DmqfxLayer& layer, const Part& part, int64_t group, int64_t reach) {
  Runs runs;
  const int32_t* of_group = layer.runs + group * pieces(layer.out_channels, kLane) * kRuns;
  for (int64_t k = 0; k < part.blocks; ++k) runs.join(of_group + part.number(k) * kRuns);
  return runs.steps(reach);
}

// The weights of steps from..to of a part: where they lie, or unpacked, beside their gates' and times factors on the desk,
// with what their sums start from; there they are kept while strip after strip wants the same.
template <class Isa>
Panel panel(const DmqfxLayer& layer, const Part& part, const Held& wanted, int64_t to, const uint8_t* factors, Desk& desk) {
  const int64_t quads = layer.channels / kQuad, steps = layer.taps[0] * layer.taps[1] * quads, from = wanted.from;
  const int64_t bytes = layer.nibbles ? kStep / 2 : kStep, count = to - from;
  const uint8_t* packed = layer.weights + wanted.group * pieces(layer.out_channels, kLane) * steps * bytes;
  const bool as_they_lie = !layer.nibbles && factors == nullptr && part.gates == 0;
  Panel found{desk.weights, count * kStep};
  if (as_they_lie) found = {reinterpret_cast<const int8_t*>(packed + (part.block * steps + from) * bytes), steps * kStep};
  const int64_t run = least(part.run, count);
  if (Isa::kCentred) found.starts = desk.starts, found.starts_stride = pieces(count, run) * kStart, found.run = run;
  if (desk.held == wanted) return found;
  for (int64_t k = 0; k < part.blocks; ++k) {
    const uint8_t* of_block = packed + (part.number(k) * steps + from) * bytes;
    int8_t* place = desk.weights + k * found.stride;
    if (layer.nibbles)
      widen(of_block, count, place);
    else if (!as_they_lie && factors == nullptr)
      std::memcpy(place, of_block, static_cast<size_t>(found.stride));
    if (factors != nullptr)
      multiply(layer.nibbles ? place : reinterpret_cast<const int8_t*>(of_block), from, count, quads, factors, place);
    if constexpr (Isa::kCentred)
      start<Isa>(found.weights + k * found.stride, count, run, part.middle, desk.starts + k * found.starts_stride);
  }
  desk.held = wanted;
  return found;
}

// Adds the products of `rows` positions to the sums, or makes them anew; of weights times factors, if there are any.
template <class Isa>
void accumulate(const DmqfxLayer& layer, const Strip& strip, Part part, int64_t rows, Held wanted, const uint8_t* factors,
                bool fresh, Desk& desk) {
  const int64_t taps = layer.taps[0] * layer.taps[1], quads = layer.channels / kQuad, all = taps * quads;
  const int64_t width = part.blocks * kLane;
  for (int64_t from = 0; from < all; from += kChunk, fresh = false) {
    const int64_t to = least(from + kChunk, all);
    const Steps steps(quads, from, to);
    wanted.from = from;
    const Panel read = panel<Isa>(layer, part, wanted, to, factors, desk);
    for (int64_t block = 0; block < part.blocks; block += Isa::kBlocks) {
      const int64_t used = least(Isa::kBlocks, part.blocks - block);
      const Ahead results = to == all && block < part.half() ? results_of(layer, strip.group, strip.first, part, block, used) : Ahead{};
      tiles<Isa>(strip.rows, rows, taps, steps, read.from(block), used, fresh, desk.sums + block * kLane, width,
                 [results](int64_t k, int64_t end) { results.fetch(k, end); });
    }
  }
}

// Input channels with steps of their own: (code << shift) * weight = code * (weight << shift). What does not fit the
// 8 bits of a weight is left to the sums: channels of large shifts go first, and their sums are shifted by the rest.
template <class Isa>
void accumulate_shifted(const DmqfxLayer& layer, const Strip& strip, Part part, Desk& desk) {
  const int64_t of_sample = row_of(layer, strip.first / (layer.out_height * layer.out_width));
  const uint8_t* shifts = layer.shifts + (of_sample * layer.groups + strip.group) * layer.given;
  const int64_t rows = strip.count + 1, span = layer.headroom + 1;  // the last row is the zero point's
  int64_t most = 0;
  for (int64_t c = 0; c < layer.given; ++c) most = shifts[c] > most ? shifts[c] : most;
  bool fresh = true;
  for (int64_t left = most / span * span; left >= 0; left -= span) {
    uint8_t any = 0;
    for (int64_t c = 0; c < layer.channels; ++c) {
      const int64_t shift = c < layer.given ? shifts[c] - left : -1;
      desk.factors[c] = shift >= 0 && shift < span ? static_cast<uint8_t>(1 << shift) : 0;
      any |= desk.factors[c];
    }
    const Held wanted{part.block, strip.group, 0, of_sample, left};
    if (any != 0) accumulate<Isa>(layer, strip, part, rows, wanted, desk.factors, fresh, desk);
    fresh = fresh && any == 0;
    for (int64_t k = 0; left > 0 && !fresh && k < rows * part.blocks * kLane; ++k)
      desk.sums[k] = static_cast<int32_t>(static_cast<uint32_t>(desk.sums[k]) << span);
  }
  if (fresh) desk.clear();
}

// One strip by up to kBlocks blocks of output channels.
template <class Isa>
void work(const DmqfxLayer& layer, const Strip& strip, Part part, Desk& desk) {
  if (layer.shifts != nullptr)
    accumulate_shifted<Isa>(layer, strip, part, desk);
  else if (layer.channels > 0)
    accumulate<Isa>(layer, strip, part, strip.count, Held{part.block, strip.group, 0, 0, 0}, nullptr, true, desk);
  else
    desk.clear();
  const int64_t positions = layer.out_height * layer.out_width;
  for (int64_t k = 0, count; k < strip.count; k += count) {
    const int64_t at = strip.first + k;
    count = least(strip.count - k, positions - at % positions);
    finish(layer, Span{at / positions, strip.group, at % positions, count}, part, desk.sums + k * part.blocks * kLane);
  }
}

// How the positions of a layer fall into strips, and strips into bundles, for which weights are unpacked once.
struct Cut {
  int64_t images, positions;          // apart, where each has weights of its own: those of an image, else of all
  int64_t length, strips;             // a strip's; of each
  int64_t bundle, bundles;            // strips of a bundle; bundles of a group
  int64_t reach, paddings;            // of a strip: rows of its table, whole tiles; images that it may reach into

  Cut(const DmqfxLayer& layer, int64_t panels, int threads) {
    const bool apart = layer.shifts != nullptr;
    const int64_t of_image = layer.out_height * layer.out_width, more = apart ? 1 : 0;  // the zero point has a row too
    images = apart ? layer.batch : 1;
    positions = apart ? of_image : layer.batch * of_image;
    length = positions > 0 ? least(positions, kStrip - more) : 1;
    strips = pieces(positions, length);
    reach = least(kStrip, pieces(length + more, kWhole) * kWhole);
    paddings = of_image > 0 ? least(layer.batch, (length - 1) / of_image + 2) : 1;
    const int64_t all = images * strips, enough = 8 * threads;
    bundle = least(pieces(kBundle, reach), all);
    while (bundle > 1 && layer.groups * pieces(all, bundle) * panels < enough) bundle /= 2;
    bundles = pieces(all, bundle);
  }
};

constexpr int64_t kFewSteps = 256;  // of a layer whose results take as long as its sums: wider parts write longer lines

// All of a layer; false if there is no memory.
template <class Isa>
bool run(const DmqfxLayer& layer, Room room, int threads) {
  if (layer.folded != 0) return unfold(layer, threads, [&](const DmqfxLayer& flat) { return run<Isa>(flat, room, threads); });
  constexpr int64_t kBlocks = kMostBlocks;
  static_assert(kChunk % 256 == 0 && kChunk % 384 == 0);  // runs are counted from the first step of a chunk
  static_assert(kWhole % Isa::kRows == 0 && kStrip % kWhole == 0 && kBlocks <= kMostBlocks && kBlocks % 2 == 0);
  const bool gated = layer.coding != nullptr && layer.coding->activation == kGeglu;
  const int64_t taps = layer.taps[0] * layer.taps[1], steps = taps * layer.channels / kQuad;
  const int64_t wide = steps > kFewSteps ? Isa::kBlocks : kMostBlocks;
  const int64_t blocks = pieces(layer.out_channels, kLane) / (gated ? 2 : 1), together = gated ? (wide > 1 ? wide / 2 : 1) : wide;
  const int64_t panels = pieces(blocks, together);
  const Cut cut(layer, panels, threads);
  const int64_t pieces_of_work = layer.groups * cut.bundles * panels;
  bool failed = false;
  threads = static_cast<int>(least(threads, pieces_of_work));
#pragma omp parallel num_threads(threads > 1 ? threads : 1) if (threads > 1)
  {
    Desk desk;
    const bool ready = desk.furnish(layer, kBlocks, cut.bundle * cut.reach * taps, cut.bundle * cut.paddings);
    if (!ready) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < pieces_of_work; ++k) {
      if (!ready) continue;
      const int64_t number = k / panels, group = number / cut.bundles, start = number % cut.bundles * cut.bundle;
      const int64_t block = k % panels * together, end = least(start + cut.bundle, cut.images * cut.strips);
      const int64_t some = least(together, blocks - block);
      Part part{block, gated ? 2 * some : some, gated ? blocks : 0};
      if (Isa::kCentred) part.middle = room.middle, part.run = run_of(layer, part, group, room.reach);
      for (int64_t at = start; at < end; ++at) {
        const int64_t first = at % cut.strips * cut.length, place = at - start;
        const Strip strip{group, at / cut.strips * cut.positions + first, least(cut.length, cut.positions - first),
                          desk.rows + place * cut.reach * taps, desk.padding + place * cut.paddings * layer.channels};
        if (desk.table != number) point(layer, strip, cut.reach);
        work<Isa>(layer, strip, part, desk);
      }
      desk.table = number;
    }
  }
  return !failed;
}

}  // namespace
