// The kernel, written once: a tile of output positions by blocks of 16 output channels, over an instruction set.
//
// An instruction set `Isa` gives
//   kRows, kBlocks       how many positions and blocks of 16 channels fit its registers
//   Sums                 running sums of one position and block
//   Weights              4 weights of each of 16 channels, one quad
//   Codes                4 codes of one position, in every lane
//   clear, load, spread, add(sums, codes, weights), flush(sums, int32[16]), which adds
// Everything here has internal linkage: each file that includes it is compiled for its own instruction set, and
// nothing of it may be taken for the code of another.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "desk.h"
#include "layer.h"
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace {

// sums[row][channel] += the steps from..to; rows[row * taps + tap] points to the codes under a tap.
// `room` is how many steps the running sums of the instruction set surely hold.
template <class Isa, int kUsed>
void tile(const uint8_t* const* rows, int64_t taps, int64_t quads, int64_t from, int64_t to, int64_t room,
          const int8_t* weights, int64_t block_stride, int32_t* sums, int64_t sums_stride) {
  typename Isa::Sums running[Isa::kRows][kUsed];
#pragma GCC unroll 8
  for (int row = 0; row < Isa::kRows; ++row)
#pragma GCC unroll 4
    for (int block = 0; block < kUsed; ++block) Isa::clear(running[row][block]);
  int64_t left = room;
  while (from < to) {
    const int64_t tap = from / quads, quad = from % quads;
    const int64_t count = least(least(to - from, quads - quad), left);
    const uint8_t* codes[Isa::kRows];
#pragma GCC unroll 8
    for (int row = 0; row < Isa::kRows; ++row) codes[row] = rows[row * taps + tap] + quad * kQuad;
    for (int64_t step = 0; step < count; ++step, weights += kStep) {
      typename Isa::Weights loaded[kUsed];
#pragma GCC unroll 4
      for (int block = 0; block < kUsed; ++block) Isa::load(loaded[block], weights + block * block_stride);
#pragma GCC unroll 8
      for (int row = 0; row < Isa::kRows; ++row) {
        const typename Isa::Codes four = Isa::spread(codes[row] + step * kQuad);
#pragma GCC unroll 4
        for (int block = 0; block < kUsed; ++block) Isa::add(running[row][block], four, loaded[block]);
      }
    }
    from += count;
    left -= count;
    if (left == 0 || from == to) {
      left = room;
#pragma GCC unroll 8
      for (int row = 0; row < Isa::kRows; ++row)
#pragma GCC unroll 4
        for (int block = 0; block < kUsed; ++block)
          Isa::flush(running[row][block], sums + row * sums_stride + block * kLane);
    }
  }
}

template <class Isa>
using Tile = void (*)(const uint8_t* const*, int64_t, int64_t, int64_t, int64_t, int64_t, const int8_t*, int64_t,
                      int32_t*, int64_t);

template <class Isa>
Tile<Isa> tile_of(int64_t blocks) {
  if constexpr (Isa::kBlocks > 1) {
    if (blocks == 2) return tile<Isa, 2>;
    if (blocks == 3) return tile<Isa, 3>;
    if (blocks == 4) return tile<Isa, 4>;
  }
  return tile<Isa, 1>;
}

// One strip of positions of one image and group.
struct Strip {
  int64_t number, image, group, first, count;
};

// Where the codes under each tap of each position are; beyond the image lie the padding's.
inline void point(const DmqfxLayer& layer, const Strip& strip, Desk& desk) {
  const int64_t taps = layer.taps[0] * layer.taps[1], pixel = layer.groups * layer.channels;
  std::memset(desk.padding, layer.zero_points[strip.image], static_cast<size_t>(layer.channels));
  const uint8_t* image =
      layer.codes + strip.image * layer.height * layer.width * pixel + strip.group * layer.channels;
  const uint8_t** row = desk.rows;
  for (int64_t k = 0; k < kStrip; ++k) {
    const int64_t position = strip.first + k;
    const int64_t top = position / layer.out_width * layer.stride[0] - layer.padding[0];
    const int64_t left = position % layer.out_width * layer.stride[1] - layer.padding[1];
    for (int64_t tap = 0; tap < taps; ++tap, ++row) {
      const int64_t y = top + tap / layer.taps[1] * layer.dilation[0];
      const int64_t x = left + tap % layer.taps[1] * layer.dilation[1];
      const bool inside = k < strip.count && y >= 0 && y < layer.height && x >= 0 && x < layer.width;
      *row = inside ? image + (y * layer.width + x) * pixel : desk.padding;
    }
  }
}

// 4 by 4 floats, of 4 positions side by side to 4 channels.
inline void turn(const int32_t* from, int64_t from_row, float* to, int64_t to_row) {
#ifdef __SSE2__
  __m128 rows[kQuad];
  for (int k = 0; k < kQuad; ++k) rows[k] = _mm_loadu_ps(reinterpret_cast<const float*>(from + k * from_row));
  _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
  for (int k = 0; k < kQuad; ++k) _mm_storeu_ps(to + k * to_row, rows[k]);
#else
  for (int n = 0; n < kQuad; ++n)
    for (int k = 0; k < kQuad; ++k) std::memcpy(to + n * to_row + k, from + k * from_row + n, sizeof(float));
#endif
}

// Sums to results: minus zero point times sum of weights; times both scales, plus bias, rounded one by one.
// Of shifted weights that product is the sum behind the strip's last.
inline void finish(const DmqfxLayer& layer, const Strip& strip, int64_t block, int64_t blocks, int32_t* sums) {
  const int64_t width = blocks * kLane;
  const int64_t within = block * kLane, used = least(width, layer.out_channels - within);
  const int64_t channel = strip.group * layer.out_channels + within;
  const auto zero_point = static_cast<uint32_t>(layer.zero_points[strip.image]);
  const int64_t place = strip.image * layer.out_image + channel * layer.out_channel + strip.first * layer.out_position;
  const int32_t* of_weights = layer.sums + channel;
  uint32_t less[64];
  for (int64_t n = 0; n < used; ++n)
    less[n] = layer.shifts == nullptr ? zero_point * static_cast<uint32_t>(of_weights[n])
                                      : static_cast<uint32_t>(sums[strip.count * width + n]);
  const auto total = [&](int64_t k, int64_t n) {
    return static_cast<int32_t>(static_cast<uint32_t>(sums[k * width + n]) - less[n]);
  };
  if (layer.real == nullptr) {
    for (int64_t n = 0; n < used; ++n)
      for (int64_t k = 0; k < strip.count; ++k)
        layer.integer[place + n * layer.out_channel + k * layer.out_position] = total(k, n);
    return;
  }
  const float input_scale = layer.input_scales[strip.image];
  const bool biased = layer.biases != nullptr;
  float scales[64], biases[64];
  for (int64_t n = 0; n < used; ++n) {
    scales[n] = input_scale * layer.weight_scales[channel + n];
    biases[n] = biased ? layer.biases[channel + n] : 0.0f;
  }
  for (int64_t k = 0; k < strip.count; ++k)
    for (int64_t n = 0; n < used; ++n) {
      const float product = static_cast<float>(total(k, n)) * scales[n];
      const float real = biased ? product + biases[n] : product;  // -0 + 0 would be another zero
      std::memcpy(sums + k * width + n, &real, sizeof real);
    }
  if (layer.out_position != 1) {  // rows: a position's channels lie side by side
    for (int64_t k = 0; k < strip.count; ++k)
      std::memcpy(layer.real + place + k * layer.out_position, sums + k * width,
                  static_cast<size_t>(used) * sizeof(float));
    return;
  }
  const int64_t squares_wide = used / kQuad * kQuad, squares_high = strip.count / kQuad * kQuad;
  float* to = layer.real + place;
  for (int64_t n = 0; n < squares_wide; n += kQuad)
    for (int64_t k = 0; k < squares_high; k += kQuad)
      turn(sums + k * width + n, width, to + n * layer.out_channel + k, layer.out_channel);
  for (int64_t n = 0; n < used; ++n)
    for (int64_t k = n < squares_wide ? squares_high : 0; k < strip.count; ++k)
      std::memcpy(to + n * layer.out_channel + k, sums + k * width + n, sizeof(float));
}

// Part of a layer: up to kBlocks blocks of 16 output channels, and what their sums hold.
struct Part {
  int64_t block, blocks, room;
};

// Adds the products of `rows` positions to the sums; of weights times factors, if there are any.
template <class Isa>
void accumulate(const DmqfxLayer& layer, const Strip& strip, Part part, int64_t rows, const uint8_t* factors, Desk& desk) {
  const int64_t taps = layer.taps[0] * layer.taps[1], quads = layer.channels / kQuad, steps = taps * quads;
  const int64_t bytes = layer.nibbles ? kStep / 2 : kStep, width = part.blocks * kLane;
  const uint8_t* packed =
      layer.weights + (strip.group * pieces(layer.out_channels, kLane) + part.block) * steps * bytes;
  for (int64_t from = 0; from < steps; from += kChunk) {
    const int64_t to = least(from + kChunk, steps);
    const auto* weights = reinterpret_cast<const int8_t*>(packed + from * bytes);
    int64_t stride = steps * kStep;
    if (layer.nibbles || factors != nullptr) {
      stride = (to - from) * kStep;
      for (int64_t k = 0; k < part.blocks; ++k) {
        const uint8_t* of_block = packed + (k * steps + from) * bytes;
        int8_t* panel = desk.weights + k * stride;
        if (layer.nibbles) widen(of_block, to - from, panel);
        if (factors != nullptr)
          multiply(layer.nibbles ? panel : reinterpret_cast<const int8_t*>(of_block), from, to - from, quads, factors, panel);
      }
      weights = desk.weights;
    }
    for (int64_t k = 0; k < rows; k += Isa::kRows)
      tile_of<Isa>(part.blocks)(desk.rows + k * taps, taps, quads, from, to, part.room, weights, stride,
                                desk.sums + k * width, width);
  }
}

// Input channels with steps of their own: (code << shift) * weight = code * (weight << shift). What does not fit the
// 8 bits of a weight is left to the sums: channels of large shifts go first, and their sums are shifted by the rest.
template <class Isa>
void accumulate_shifted(const DmqfxLayer& layer, const Strip& strip, Part part, Desk& desk) {
  const uint8_t* shifts = layer.shifts + (strip.image * layer.groups + strip.group) * layer.given;
  const int64_t rows = strip.count + 1, span = layer.headroom + 1;  // the last row is the zero point's
  int64_t most = 0;
  for (int64_t c = 0; c < layer.given; ++c) most = shifts[c] > most ? shifts[c] : most;
  for (int64_t left = most / span * span; left >= 0; left -= span) {
    uint8_t any = 0;
    for (int64_t c = 0; c < layer.channels; ++c) {
      const int64_t shift = c < layer.given ? shifts[c] - left : -1;
      desk.factors[c] = shift >= 0 && shift < span ? static_cast<uint8_t>(1 << shift) : 0;
      any |= desk.factors[c];
    }
    if (any != 0) accumulate<Isa>(layer, strip, part, rows, desk.factors, desk);
    for (int64_t k = 0; left > 0 && k < rows * part.blocks * kLane; ++k)
      desk.sums[k] = static_cast<int32_t>(static_cast<uint32_t>(desk.sums[k]) << span);
  }
}

// One strip by up to kBlocks blocks of output channels.
template <class Isa>
void work(const DmqfxLayer& layer, const Strip& strip, Part part, Desk& desk) {
  std::memset(desk.sums, 0, static_cast<size_t>(kStrip * part.blocks * kLane) * sizeof(int32_t));
  if (layer.shifts == nullptr)
    accumulate<Isa>(layer, strip, part, strip.count, nullptr, desk);
  else
    accumulate_shifted<Isa>(layer, strip, part, desk);
  finish(layer, strip, part.block, part.blocks, desk.sums);
}

// All of a layer; false if there is no memory.
template <class Isa>
bool run(const DmqfxLayer& layer, int64_t room, int threads) {
  static_assert(kStrip % Isa::kRows == 0 && Isa::kBlocks * kLane <= 64);
  const int64_t long_one = layer.shifts == nullptr ? kStrip : kStrip - 1;  // the zero point has a row too
  const int64_t positions = layer.out_height * layer.out_width, strips = pieces(positions, long_one);
  const int64_t blocks = pieces(layer.out_channels, kLane), panels = pieces(blocks, Isa::kBlocks);
  const int64_t pieces_of_work = layer.batch * layer.groups * strips * panels;
  bool failed = false;
  threads = static_cast<int>(least(threads, pieces_of_work));
#pragma omp parallel num_threads(threads > 1 ? threads : 1) if (threads > 1)
  {
    Desk desk;
    const bool ready = desk.furnish(layer, Isa::kBlocks);
    if (!ready) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < pieces_of_work; ++k) {
      if (!ready) continue;
      const int64_t number = k / panels, outer = number / strips, first = number % strips * long_one;
      const Strip strip{number, outer / layer.groups, outer % layer.groups, first, least(long_one, positions - first)};
      const int64_t block = k % panels * Isa::kBlocks;
      if (desk.table != number) point(layer, strip, desk);
      desk.table = number;
      work<Isa>(layer, strip, Part{block, least(Isa::kBlocks, blocks - block), room}, desk);
    }
  }
  return !failed;
}

// 10^9 multiply-adds a second of the tile alone on data in the first cache.
template <class Isa>
double peak(int64_t room, double (*seconds)()) {
  constexpr int64_t kSteps = 120;  // no power of two: blocks would fall into the same sets of the cache
  alignas(64) static int8_t weights[Isa::kBlocks * kSteps * kStep];
  alignas(64) static uint8_t codes[kSteps * kQuad];
  alignas(64) static int32_t sums[Isa::kRows * Isa::kBlocks * kLane];
  std::memset(weights, 1, sizeof weights);  // pages of their own
  std::memset(codes, 1, sizeof codes);
  const uint8_t* rows[Isa::kRows];
  for (auto& row : rows) row = codes;
  const volatile Tile<Isa> measured = tile_of<Isa>(Isa::kBlocks);  // as layers call it: not compiled for these sizes
  double best = 0;
  for (int trial = 0; trial < 20; ++trial) {
    constexpr int kTimes = 2000;
    const double started = seconds();
    for (int k = 0; k < kTimes; ++k)
      measured(rows, 1, kSteps, 0, kSteps, room, weights, kSteps * kStep, sums, Isa::kBlocks * kLane);
    const double rate = 1e-9 * kTimes * kSteps * kStep * Isa::kRows * Isa::kBlocks / (seconds() - started);
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace
