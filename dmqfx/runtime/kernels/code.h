// Tensors of real numbers to codes: the two layouts that they come in, norms before them, and pieces of work for threads.
//
// Internal linkage, as in tile.h.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "layer.h"
#include "line.h"
#include "moments.h"
#include "square.h"

namespace {

constexpr int64_t kRun = 64;           // positions that are coded together
constexpr int64_t kPart = 256;         // channels whose steps are found together
constexpr int64_t kInCache = 1 << 16;  // numbers whose moments are found before they are coded: they stay in the second cache

// The grid of one sample; `wide`: a number for each channel.
struct Grid {
  const float* scales;
  const int32_t* zero_points;
  bool wide_scales, wide_zero_points, divides_by;
  Grid(const DmqfxCoding& coding, int64_t image)
      : wide_scales(coding.scale_channels != 1), wide_zero_points(coding.zero_point_channels != 1),
        divides_by(divides(static_cast<int>(coding.norm), static_cast<int>(coding.activation))) {
    const int64_t group = coding.group == nullptr ? 0 : coding.group[image];
    scales = coding.scales + group * coding.scale_channels;
    zero_points = coding.zero_points + group * coding.zero_point_channels;
  }
  bool wide() const { return wide_scales || wide_zero_points; }
  float step(int64_t channel) const {
    const float scale = scales[wide_scales ? channel : 0];
    return divides_by ? scale : 1 / scale;
  }
  float zero_point(int64_t channel) const {
    return bounded(static_cast<float>(zero_points[wide_zero_points ? channel : 0]), -1048576.0f, 1048576.0f);
  }
};

inline Limits limits_of(const DmqfxCoding& coding) {
  return {static_cast<float>(coding.least), static_cast<float>(coding.greatest)};
}

// kRun positions of all channels of an image: lines of eight channels, then bytes transposed.
template <int kNorm, int kActivation>
void code_planes(const DmqfxCoding& coding, const float* moments, int64_t image, int64_t first, int64_t count) {
  const Grid grid(coding, image);
  const Limits limits = limits_of(coding);
  const int64_t channels = coding.channels;
  uint8_t lines[kSquare][kRun];
  uint8_t* to = coding.codes + (image * coding.positions + first) * channels;
  for (int64_t channel = 0; channel < channels; channel += kSquare) {
    const int64_t high = channels - channel < kSquare ? channels - channel : kSquare;
    for (int64_t k = 0; k < high; ++k) {
      const int64_t c = channel + k;
      using Same = One<float>;
      const float* x = coding.x + (image * channels + c) * coding.positions + first;
      Line<Same, Same, Same, Same> line{x, nullptr, {1}, {0}, {1}, {0}, {grid.step(c)}, {grid.zero_point(c)}};
      if constexpr (kNorm != kNoNorm) line.times = {moments[c]}, line.pluses = {moments[channels + c]};
      code_line<kNorm, kActivation>(line, limits, count, lines[k]);
    }
    const int64_t squares = high == kSquare ? count / kSquare * kSquare : 0;
    for (int64_t n = 0; n < squares; n += kSquare) transpose(&lines[0][n], kRun, to + n * channels + channel, channels, 0);
    for (int64_t n = squares; n < count; ++n)
      for (int64_t k = 0; k < high; ++k) to[n * channels + channel + k] = lines[k][n];
  }
}

// Some positions of some channels of an image, with these steps and zero points; `moments` are of channels or of positions.
template <int kNorm, int kActivation, class Steps, class ZeroPoints>
void code_column(const DmqfxCoding& coding, const void* moments, Column from, int64_t channel, int64_t rows, Steps steps,
                 ZeroPoints zero_points, uint8_t* to) {
  const Limits limits = limits_of(coding);
  for (int64_t k = 0; k < rows; ++k, to += coding.channels) {
    const float* x = from.x + k * from.row;
    if constexpr (kNorm == kLayerNorm) {
      const Moments& of = static_cast<const Moments*>(moments)[k];
      const One<float> times{static_cast<float>(of.times)}, plus{static_cast<float>(of.plus)};
      const Line<One<float>, const float*, Steps, ZeroPoints> line{
          x, nullptr, times, plus, coding.gammas + channel, coding.betas + channel, steps, zero_points};
      code_line<kNorm, kActivation>(line, limits, from.count, to);
    } else {
      const float* times = kNorm == kNoNorm ? nullptr : static_cast<const float*>(moments) + channel;
      const float* gates = kActivation == kGeglu ? x + coding.channels : nullptr;
      const Line<const float*, const float*, Steps, ZeroPoints> line{
          x, gates, times, behind(times, coding.channels), nullptr, nullptr, steps, zero_points};
      code_line<kNorm, kActivation>(line, limits, from.count, to);
    }
  }
}

// Up to kRun positions of an image whose channels lie side by side, from one arm or two.
template <int kNorm, int kActivation>
void code_rows(const DmqfxCoding& coding, const float* moments, int64_t image, int64_t first, int64_t rows) {
  const Grid grid(coding, image);
  const One<float> step{grid.step(0)}, zero_point{grid.zero_point(0)};
  uint8_t* to = coding.codes + (image * coding.positions + first) * coding.channels;
  Moments of_rows[kNorm == kLayerNorm ? kRun : 1];
  for (int64_t k = 0; kNorm == kLayerNorm && k < rows; ++k) {
    const float* x = coding.x + (image * coding.positions + first + k) * coding.channels;
    of_rows[k] = Moments(totals_of_run(x, coding.channels, *x), *x, static_cast<double>(coding.channels), coding.eps);
  }
  const void* known = kNorm == kLayerNorm ? static_cast<const void*>(of_rows) : moments;
  for (int64_t channel = 0, count; channel < coding.channels; channel += count) {
    Column from = column(coding, image, channel);
    from.x += first * from.row;
    if (kNorm == kNoNorm && !grid.wide() && from.row == coding.channels) {  // all rows are one
      from.count = rows * from.row;
      return code_column<kNorm, kActivation>(coding, known, from, 0, 1, step, zero_point, to);
    }
    float steps[kPart], zero_points[kPart];
    from.count = count = from.count < kPart || !grid.wide() ? from.count : kPart;
    if (!grid.wide()) {
      code_column<kNorm, kActivation>(coding, known, from, channel, rows, step, zero_point, to + channel);
      continue;
    }
    for (int64_t k = 0; k < count; ++k) steps[k] = grid.step(channel + k), zero_points[k] = grid.zero_point(channel + k);
    const float *of_steps = steps, *of_zero_points = zero_points;
    if (grid.wide_zero_points)
      code_column<kNorm, kActivation>(coding, known, from, channel, rows, of_steps, of_zero_points, to + channel);
    else
      code_column<kNorm, kActivation>(coding, known, from, channel, rows, of_steps, zero_point, to + channel);
  }
}

// Results of a layer at one position as codes: no norm, gates apart, a step and a zero point for each.
inline void code_results(const DmqfxCoding& coding, const float* x, const float* gates, const float* steps,
                         const float* zero_points, int64_t count, uint8_t* to) {
  const Limits limits = limits_of(coding);
  using Known = Line<const float*, const float*, const float*, const float*>;
  const Known line{x, gates, nullptr, nullptr, nullptr, nullptr, steps, zero_points};
  switch (coding.activation) {
    case kSilu: return code_line<kNoNorm, kSilu>(line, limits, count, to);
    case kGelu: return code_line<kNoNorm, kGelu>(line, limits, count, to);
    case kGeglu: return code_line<kNoNorm, kGeglu>(line, limits, count, to);
    default: return code_line<kNoNorm, kNoActivation>(line, limits, count, to);
  }
}

// Room for what is known of some images before they are coded: totals of their channels, then times and pluses of those.
struct Desks {
  int64_t channels;
  Totals* totals;
  float* moments;
  Desks(int64_t images, int64_t channels_of_one)
      : channels(channels_of_one),
        totals(static_cast<Totals*>(std::malloc(static_cast<size_t>(images * channels) * (sizeof(Totals) + 2 * sizeof(float))))),
        moments(reinterpret_cast<float*>(totals + images * channels)) {}
  Desks(const Desks&) = delete;
  ~Desks() { std::free(totals); }
  Totals* totals_of(int64_t image) const { return totals + image * channels; }
  float* moments_of(int64_t image) const { return moments + image * 2 * channels; }
};

// The moments of group norms of images first..first + count.
void prepare_moments(const DmqfxCoding& coding, const Desks& desks, int64_t first, int64_t count, int threads) {
  const int64_t channels = coding.channels, pieces = coding.planes ? channels : column_pieces(coding);
  const auto reference = [&](int64_t image) { return coding.x[image * coding.positions * column(coding, 0, 0).row]; };
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < count * pieces; ++k) {
    const int64_t image = first + k / pieces, piece = k % pieces;
    Totals* totals = desks.totals_of(k / pieces);
    if (coding.planes) {
      const float* x = coding.x + (image * channels + piece) * coding.positions;
      totals[piece] = totals_of_run(x, coding.positions, reference(image));
    } else {
      totals_of_piece(coding, image, piece, reference(image), totals);
    }
  }
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < count; ++k)
    normed_by(coding, reference(first + k), desks.totals_of(k), desks.moments_of(k), desks.moments_of(k) + channels);
}

template <int kNorm, int kActivation>
bool code_all(const DmqfxCoding& coding, int threads) {
  const int64_t size = coding.channels * coding.positions, fit = kInCache / size > 1 ? kInCache / size : 1;
  const int64_t together = kNorm == kGroupNorm ? (threads * fit < coding.batch ? threads * fit : coding.batch) : coding.batch;
  const Desks desks(kNorm == kGroupNorm ? together : 0, coding.channels);
  if (kNorm == kGroupNorm && desks.totals == nullptr) return false;
  const int64_t run = kNorm != kLayerNorm || coding.channels < 2 * kRun ? kRun : kRun * 2 * kRun / coding.channels + 1;
  const int64_t runs = (coding.positions + run - 1) / run;
  for (int64_t from = 0, images; from < coding.batch; from += images) {
    images = coding.batch - from < together ? coding.batch - from : together;
    if constexpr (kNorm == kGroupNorm) prepare_moments(coding, desks, from, images, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < images * runs; ++k) {
      const int64_t first = k % runs * run, left = coding.positions - first, image = k / runs;
      const auto one = coding.planes ? code_planes<kNorm == kLayerNorm ? kNoNorm : kNorm, kActivation> : code_rows<kNorm, kActivation>;
      one(coding, kNorm == kGroupNorm ? desks.moments_of(image) : nullptr, from + image, first, left < run ? left : run);
    }
  }
  return true;
}

template <int kNorm>
bool code_normed(const DmqfxCoding& coding, int threads) {
  switch (coding.activation) {
    case kSilu: return code_all<kNorm, kSilu>(coding, threads);
    case kGelu: return code_all<kNorm, kGelu>(coding, threads);
    case kGeglu: return code_all<kNoNorm, kGeglu>(coding, threads);  // of rows without a norm
    default: return code_all<kNorm, kNoActivation>(coding, threads);
  }
}

// False where there is no memory.
bool code(const DmqfxCoding& coding, int threads) {
  if (coding.batch * coding.channels * coding.positions < 16384) threads = 1;  // less is not worth a team
  threads = threads > 1 ? threads : 1;
  if (coding.norm == kGroupNorm) return code_normed<kGroupNorm>(coding, threads);
  return (coding.norm == kLayerNorm ? code_normed<kLayerNorm> : code_normed<kNoNorm>)(coding, threads);
}

}  // namespace
