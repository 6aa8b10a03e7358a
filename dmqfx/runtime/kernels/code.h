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
#include "sets.h"
#include "square.h"

namespace {

constexpr int64_t kRun = 64;           // positions that are coded together
constexpr int64_t kPart = 256;         // channels whose steps are found together
constexpr int64_t kInCache = 1 << 16;  // numbers whose moments are found before they are coded, so that they stay in
                                       // the second cache

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
  return {static_cast<float>(coding.least), static_cast<float>(coding.greatest), kLeastPower, kLeastSilu};
}

// times and pluses of a norm: of channels; of a layer norm of positions.
struct Norm {
  const float *times, *pluses;
};

// kRun positions of all channels of an image: lines of eight channels, then bytes transposed.
template <int kNorm, int kActivation>
void code_planes(const DmqfxCoding& coding, Norm norm, int64_t image, int64_t first, int64_t count) {
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
      Line<const float*, Same, Same, Same, Same> line{x, nullptr, {1}, {0}, {1}, {0}, {grid.step(c)}, {grid.zero_point(c)}};
      if constexpr (kNorm != kNoNorm) line.times = {norm.times[c]}, line.pluses = {norm.pluses[c]};
      code_line<kNorm, kActivation>(line, limits, count, lines[k]);
    }
    const int64_t squares = high == kSquare ? count / kSquare * kSquare : 0;
    for (int64_t n = 0; n < squares; n += kSquare) transpose(&lines[0][n], kRun, to + n * channels + channel, channels, 0);
    for (int64_t n = squares; n < count; ++n)
      for (int64_t k = 0; k < high; ++k) to[n * channels + channel + k] = lines[k][n];
  }
}

// Some positions of some channels of an image, with these steps and zero points.
template <int kNorm, int kActivation, class Steps, class ZeroPoints, class Made>
void code_column(const DmqfxCoding& coding, Norm norm, Column from, int64_t channel, int64_t rows, Steps steps,
                 ZeroPoints zero_points, Made* to) {
  const Limits limits = limits_of(coding);
  const bool waits = kNorm == kGroupNorm && from.next > 0 && from.next < kInCache;
  const int64_t fetched = waits ? from.count : 0;  // of the next image, into the second cache
  for (int64_t k = 0; k < rows; ++k, to += coding.channels) {
    const float* x = from.x + k * from.row;
    for (int64_t n = 0; n < fetched; n += 16) __builtin_prefetch(x + from.next + n, 0, 2);
    if constexpr (kNorm == kLayerNorm) {
      const Line<const float*, One<float>, const float*, Steps, ZeroPoints> line{
          x, nullptr, {norm.times[k]}, {norm.pluses[k]}, coding.gammas + channel, coding.betas + channel, steps, zero_points};
      code_line<kNorm, kActivation>(line, limits, from.count, to);
    } else {
      const float* gates = kActivation == kGeglu ? x + coding.channels : nullptr;
      const Line<const float*, const float*, const float*, Steps, ZeroPoints> line{
          x, gates, behind(norm.times, channel), behind(norm.pluses, channel), nullptr, nullptr, steps, zero_points};
      code_line<kNorm, kActivation>(line, limits, from.count, to);
    }
  }
}

// The layer norm of each of up to kRun positions.
inline void find_layer_norms(const DmqfxCoding& coding, int64_t row, int64_t rows, float* times, float* pluses) {
  const int64_t channels = coding.channels;
  const float* x = coding.x + row * channels;
  double sums[kRun], squares[kRun], of_times[kRun], of_pluses[kRun];
  totals_of_rows({x, channels, channels}, rows, x, channels, sums, squares);
  find_moments(sums, squares, rows, x, channels, static_cast<double>(channels), coding.eps, of_times, of_pluses);
  for (int64_t k = 0; k < rows; ++k) times[k] = static_cast<float>(of_times[k]), pluses[k] = static_cast<float>(of_pluses[k]);
}

// Up to kRun positions of an image whose channels lie side by side, from one arm or two.
template <int kNorm, int kActivation>
void code_rows(const DmqfxCoding& coding, Norm norm, int64_t image, int64_t first, int64_t rows) {
  const Grid grid(coding, image);
  const One<float> step{grid.step(0)}, zero_point{grid.zero_point(0)};
  uint8_t* to = coding.codes + (image * coding.positions + first) * coding.channels;
  float times[kRun], pluses[kRun];
  if constexpr (kNorm == kLayerNorm) {
    find_layer_norms(coding, image * coding.positions + first, rows, times, pluses);
    norm = {times, pluses};
  }
  for (int64_t channel = 0, count; channel < coding.channels; channel += count) {
    Column from = column(coding, image, channel);
    from.x += first * from.row;
    if (kNorm == kNoNorm && !grid.wide() && from.row == coding.channels) {  // all rows are one
      from.count = rows * from.row;
      return code_column<kNorm, kActivation>(coding, norm, from, 0, 1, step, zero_point, to);
    }
    from.count = count = from.count < kPart || !grid.wide() ? from.count : kPart;
    if (!grid.wide()) {
      code_column<kNorm, kActivation>(coding, norm, from, channel, rows, step, zero_point, to + channel);
      continue;
    }
    float steps[kPart], zero_points[kPart];
    for (int64_t k = 0; k < count; ++k) steps[k] = grid.step(channel + k), zero_points[k] = grid.zero_point(channel + k);
    const float *of_steps = steps, *of_zero_points = zero_points;
    if (grid.wide_zero_points)
      code_column<kNorm, kActivation>(coding, norm, from, channel, rows, of_steps, of_zero_points, to + channel);
    else
      code_column<kNorm, kActivation>(coding, norm, from, channel, rows, of_steps, zero_point, to + channel);
  }
}

// Some positions of an image, normed and activated, as real numbers.
template <int kActivation>
void norm_rows(const DmqfxCoding& coding, Norm norm, int64_t image, int64_t first, int64_t rows) {
  float* to = coding.real + (image * coding.positions + first) * coding.channels;
  for (int64_t channel = 0, count; channel < coding.channels; channel += count) {
    Column from = column(coding, image, channel);
    from.x += first * from.row;
    count = from.count;
    code_column<kGroupNorm, kActivation>(coding, norm, from, channel, rows, One<float>{1}, One<float>{0}, to + channel);
  }
}

// Results of a layer as codes: no norm, gates apart.
template <class Numbers, class Steps, class ZeroPoints>
void code_results(const DmqfxCoding& coding, Numbers x, const float* gates, Steps steps, ZeroPoints zero_points, int64_t count,
                  uint8_t* to) {
  const Limits limits = limits_of(coding);
  using Known = Line<Numbers, const float*, const float*, Steps, ZeroPoints>;
  const Known line{x, gates, nullptr, nullptr, nullptr, nullptr, steps, zero_points};
  if (coding.activation == kSilu) return code_line<kNoNorm, kSilu>(line, limits, count, to);
  if (coding.activation == kGelu) return code_line<kNoNorm, kGelu>(line, limits, count, to);
  if (coding.activation == kGeglu) return code_line<kNoNorm, kGeglu>(line, limits, count, to);
  code_line<kNoNorm, kNoActivation>(line, limits, count, to);
}

// Room for what is known of channels of some images before they are coded: sums for a group norm, then that.
struct Desks {
  int64_t images, channels;
  double* sums;
  Desks(int64_t of_images, int64_t of_channels)
      : images(of_images), channels(of_channels),
        sums(static_cast<double*>(std::malloc(static_cast<size_t>(images * channels) * 2 * (sizeof(double) + sizeof(float))))) {}
  Desks(const Desks&) = delete;
  ~Desks() { std::free(sums); }
  double* sums_of(int64_t image) const { return sums + image * 2 * channels; }
  double* squares_of(int64_t image) const { return sums_of(image) + channels; }
  float* times_of(int64_t image) const { return reinterpret_cast<float*>(sums_of(images)) + image * 2 * channels; }
  float* pluses_of(int64_t image) const { return times_of(image) + channels; }
};

// The group norms of images first..first + count.
void prepare_moments(const DmqfxCoding& coding, const Desks& desks, int64_t first, int64_t count, int threads) {
  const int64_t pieces = pieces_of_moments(coding);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < count * pieces; ++k) {
    const int64_t image = k / pieces;
    totals_of_piece(coding, first + image, k % pieces, desks.sums_of(image), desks.squares_of(image));
  }
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < count; ++k)
    finish_group_norm(coding, first + k, desks.sums_of(k), desks.squares_of(k), desks.times_of(k), desks.pluses_of(k));
}

template <int kNorm, int kActivation>
bool code_all(const DmqfxCoding& coding, int threads) {
  const int64_t size = coding.channels * coding.positions, fit = size < kInCache ? kInCache / (size + 1) + 1 : 1;
  const int64_t together = kNorm == kGroupNorm ? (threads * fit < coding.batch ? threads * fit : coding.batch) : coding.batch;
  const Desks desks(kNorm == kGroupNorm ? together : 0, coding.channels);
  if (kNorm == kGroupNorm && desks.sums == nullptr) return false;
  const int64_t run = kNorm != kLayerNorm || coding.channels < 2 * kRun ? kRun : (kRun * 2 * kRun + coding.channels - 1) / coding.channels;
  const int64_t runs = (coding.positions + run - 1) / run;
  for (int64_t from = 0, images; from < coding.batch; from += images) {
    images = coding.batch - from < together ? coding.batch - from : together;
    if constexpr (kNorm == kGroupNorm) prepare_moments(coding, desks, from, images, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < images * runs; ++k) {
      const int64_t first = k % runs * run, left = coding.positions - first, image = k / runs;
      const Norm norm = kNorm == kGroupNorm ? Norm{desks.times_of(image), desks.pluses_of(image)} : Norm{};
      constexpr int kNormOfPlanes = kNorm == kLayerNorm ? kNoNorm : kNorm;
      auto one = coding.planes ? code_planes<kNormOfPlanes, kActivation> : code_rows<kNorm, kActivation>;
      if constexpr (kNorm == kGroupNorm && kActivation == kSilu)
        if (coding.real != nullptr) one = norm_rows<kActivation>;
      one(coding, norm, from + image, first, left < run ? left : run);
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
  if (coding.batch * coding.channels * coding.positions == 0) return true;
  if (coding.batch * coding.channels * coding.positions < 16384) threads = 1;  // less is not worth a team
  threads = threads > 1 ? threads : 1;
  if (coding.norm == kGroupNorm) return code_normed<kGroupNorm>(coding, threads);
  return (coding.norm == kLayerNorm ? code_normed<kLayerNorm> : code_normed<kNoNorm>)(coding, threads);
}

}  // namespace
