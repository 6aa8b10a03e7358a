// Real numbers to codes, written once: what is done to one number, and the two layouts that numbers come in.
//
// Plain C++ in a fixed order of operations, which the compiler vectorises for the instruction set of the file that
// includes this: every set gives the same bits. Internal linkage, as in tile.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "layer.h"
#include "moments.h"
#include "square.h"

namespace {

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds to the nearest, ties to even
constexpr int64_t kRun = 64;             // positions of planes that are coded together
constexpr int kLong = 64, kShort = 16;   // numbers that are coded at once: loops of fixed length have no slow end

inline float bounded(float x, float low, float high) {
  const float below = x < high ? x : high;  // also where x is not a number
  return below > low ? below : low;
}

// e^x to about one unit in the last place: 2^n times a Taylor series within half of ln 2.
inline float exponential(float x) {
  const float y = bounded(x, -87.0f, 88.0f);
  const float shifted = y * 1.44269504f + kRounder, n = shifted - kRounder;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) * (1 << 23);
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return series * power;
}

struct Limits {
  float least, greatest;
};

inline float silu(float x) {
  const float y = x > -88.0f ? x : -88.0f;  // below, silu is 0 to any grid, but e^-y would not hold
  return y / (1.0f + exponential(-y));
}

// x times the share of the normal distribution below it, to 1e-7 |x|: Abramowitz and Stegun, 7.1.26.
inline float gelu(float x) {
  const float z = (x > 0 ? x : -x) * 0.707106781f, t = 1.0f / (1.0f + 0.3275911f * z);
  float series = 1.061405429f;
  series = series * t - 1.453152027f;
  series = series * t + 1.421413741f;
  series = series * t - 0.284496736f;
  series = series * t + 0.254829592f;
  const float beyond = 0.5f * (series * t * exponential(-z * z));
  return x > 0 ? x - x * beyond : x * beyond;
}

template <int kActivation>
inline float activated(float x, float gate) {
  if constexpr (kActivation == kSilu) return silu(x);
  if constexpr (kActivation == kGelu) return gelu(x);
  if constexpr (kActivation == kGeglu) return x * gelu(gate);
  return x;
}

// One number in the place of many.
template <class Number>
struct One {
  Number value;
  Number operator[](int) const { return value; }
};

// What belongs to each number of a line, arrays or `One`: gates for GEGLU; moments, gammas and betas for a norm.
template <class Moment, class Weights, class Scales, class ZeroPoints>
struct Line {
  const float *x, *gates;
  Moment times, pluses;
  Weights gammas, betas;
  Scales scales;
  ZeroPoints zero_points;
};

template <bool kNormed, int kActivation, int kCount, class Known>
inline void code_vector(const Known& line, Limits limits, uint8_t* to) {
  int32_t codes[kCount];
  for (int k = 0; k < kCount; ++k) {
    float y = line.x[k];
    if constexpr (kNormed) y = (y * line.times[k] + line.pluses[k]) * line.gammas[k] + line.betas[k];
    y = activated<kActivation>(y, kActivation == kGeglu ? line.gates[k] : 0);
    const float whole = (bounded(y / line.scales[k], -1048576.0f, 1048576.0f) + kRounder) - kRounder;
    const float code = whole + static_cast<float>(line.zero_points[k]);
    codes[k] = static_cast<int32_t>(bounded(code, limits.least, limits.greatest));
  }
  for (int k = 0; k < kCount; ++k) to[k] = static_cast<uint8_t>(codes[k]);
}

// From number n on; and a few numbers from there, with room behind the last.
template <class Number>
inline One<Number> behind(One<Number> one, int64_t) { return one; }
template <class Number>
inline const Number* behind(const Number* from, int64_t n) { return from == nullptr ? from : from + n; }
template <class Number>
inline const Number* few(One<Number> one, int64_t, int64_t, Number* room) {
  for (int k = 0; k < kShort; ++k) room[k] = one.value;
  return room;
}
template <class Number>
inline const Number* few(const Number* from, int64_t n, int64_t left, Number* room) {
  if (from == nullptr || left >= kShort) return behind(from, n);
  for (int k = 0; k < kShort; ++k) room[k] = from[n + (k < left ? k : 0)];
  return room;
}

template <bool kNormed, int kActivation, class Known>
inline void code_line(const Known& line, Limits limits, int64_t count, uint8_t* to) {
  int64_t n = 0;
  for (; n + kLong <= count; n += kLong) {
    const Known next{line.x + n, behind(line.gates, n), behind(line.times, n), behind(line.pluses, n),
                     behind(line.gammas, n), behind(line.betas, n), behind(line.scales, n), behind(line.zero_points, n)};
    code_vector<kNormed, kActivation, kLong>(next, limits, to + n);
  }
  for (; n < count; n += kShort) {  // arrays of everything: with `One` a loop so short is not vectorised
    const int64_t left = count - n;
    float rooms[7][kShort];
    int32_t room[kShort];
    uint8_t last[kShort];
    const Line<const float*, const float*, const float*, const int32_t*> next{
        few(line.x, n, left, rooms[0]),      few(line.gates, n, left, rooms[1]),  few(line.times, n, left, rooms[2]),
        few(line.pluses, n, left, rooms[3]), few(line.gammas, n, left, rooms[4]), few(line.betas, n, left, rooms[5]),
        few(line.scales, n, left, rooms[6]), few(line.zero_points, n, left, room)};
    code_vector<kNormed, kActivation, kShort>(next, limits, left < kShort ? last : to + n);
    if (left < kShort) std::memcpy(to + n, last, static_cast<size_t>(left));
  }
}

// The grid of one sample; `wide`: a number for each channel.
struct Grid {
  const float* scales;
  const int32_t* zero_points;
  bool wide_scales, wide_zero_points;
  Grid(const DmqfxCoding& coding, int64_t image)
      : wide_scales(coding.scale_channels != 1), wide_zero_points(coding.zero_point_channels != 1) {
    const int64_t group = coding.group == nullptr ? 0 : coding.group[image];
    scales = coding.scales + group * coding.scale_channels;
    zero_points = coding.zero_points + group * coding.zero_point_channels;
  }
  float scale(int64_t channel) const { return scales[wide_scales ? channel : 0]; }
  int32_t zero_point(int64_t channel) const { return zero_points[wide_zero_points ? channel : 0]; }
};

inline Limits limits_of(const DmqfxCoding& coding) {
  return {static_cast<float>(coding.least), static_cast<float>(coding.greatest)};
}

// kRun positions of all channels of an image: lines of eight channels, then bytes transposed.
template <bool kNormed, int kActivation>
void code_planes(const DmqfxCoding& coding, int64_t image, int64_t first, int64_t count) {
  const Grid grid(coding, image);
  const Limits limits = limits_of(coding);
  const int64_t channels = coding.channels;
  const float* moments = coding.moments + image * 2 * channels;
  uint8_t lines[kSquare][kRun];
  uint8_t* to = coding.codes + (image * coding.positions + first) * channels;
  for (int64_t channel = 0; channel < channels; channel += kSquare) {
    const int64_t high = channels - channel < kSquare ? channels - channel : kSquare;
    for (int64_t k = 0; k < high; ++k) {
      const int64_t c = channel + k;
      using Same = One<float>;
      const float* x = coding.x + (image * channels + c) * coding.positions + first;
      Line<Same, Same, Same, One<int32_t>> line{x, nullptr, {1}, {0}, {1}, {0}, {grid.scale(c)}, {grid.zero_point(c)}};
      if constexpr (kNormed) {
        line.times = {moments[c]};
        line.pluses = {moments[channels + c]};
        line.gammas = {coding.gammas[c]};
        line.betas = {coding.betas[c]};
      }
      code_line<kNormed, kActivation>(line, limits, count, lines[k]);
    }
    const int64_t squares = high == kSquare ? count / kSquare * kSquare : 0;
    for (int64_t n = 0; n < squares; n += kSquare) transpose(&lines[0][n], kRun, to + n * channels + channel, channels, 0);
    for (int64_t n = squares; n < count; ++n)
      for (int64_t k = 0; k < high; ++k) to[n * channels + channel + k] = lines[k][n];
  }
}

// Channels first..first + count of one position, which lie side by side from x and `gates` on; moments are numbers or arrays.
template <bool kNormed, int kActivation, class Moment>
inline void code_channels(const DmqfxCoding& coding, const Grid& grid, Moment times, Moment pluses, const float* x,
                          const float* gates, int64_t first, int64_t count, uint8_t* to) {
  const Limits limits = limits_of(coding);
  const float *gammas = kNormed ? coding.gammas + first : nullptr, *betas = kNormed ? coding.betas + first : nullptr;
  if (!grid.wide_scales && !grid.wide_zero_points) {
    const Line<Moment, const float*, One<float>, One<int32_t>> line{x, gates, times, pluses, gammas, betas,
                                                                    {*grid.scales}, {*grid.zero_points}};
    return code_line<kNormed, kActivation>(line, limits, count, to);
  }
  for (int64_t n = 0; n < count; n += kLong) {
    const int64_t some = count - n < kLong ? count - n : kLong;
    float scales[kLong];
    int32_t zero_points[kLong];
    for (int64_t k = 0; k < some; ++k)
      scales[k] = grid.scale(first + n + k), zero_points[k] = grid.zero_point(first + n + k);
    const Line<Moment, const float*, const float*, const int32_t*> line{
        x + n, behind(gates, n), behind(times, n), behind(pluses, n), behind(gammas, n), behind(betas, n), scales, zero_points};
    code_line<kNormed, kActivation>(line, limits, some, to + n);
  }
}

// One position of an image, from one arm or two.
template <int kNorm, int kActivation>
void code_row(const DmqfxCoding& coding, int64_t row) {
  const int64_t image = row / coding.positions, channels = coding.channels;
  const Grid grid(coding, image);
  uint8_t* to = coding.codes + row * channels;
  if constexpr (kNorm == kLayerNorm) {
    const float* x = coding.x + row * channels;
    const Moments moments = moments_of(x, channels, coding.eps);
    const One<float> times{moments.times}, pluses{moments.plus};
    return code_channels<true, kActivation>(coding, grid, times, pluses, x, nullptr, 0, channels, to);
  }
  const int64_t split = coding.beside == nullptr ? channels : coding.split;
  const float* moments = kNorm == kGroupNorm ? coding.moments + image * 2 * channels : nullptr;
  const auto part = [&](const float* x, int64_t first, int64_t count) {
    const float* gates = kActivation == kGeglu ? x + channels : nullptr;
    code_channels<kNorm != kNoNorm, kActivation>(coding, grid, behind(moments, first), behind(moments, channels + first),
                                                 x, gates, first, count, to + first);
  };
  part(coding.x + row * split * (kActivation == kGeglu ? 2 : 1), 0, split);
  if (split < channels) part(coding.beside + row * (channels - split), split, channels - split);
}

// Results of a layer at one position as codes: no norm, gates apart, a scale and a zero point for each.
inline void code_results(const DmqfxCoding& coding, const float* x, const float* gates, const float* scales,
                         const int32_t* zero_points, int64_t count, uint8_t* to) {
  const Limits limits = limits_of(coding);
  using Known = Line<const float*, const float*, const float*, const int32_t*>;
  const Known line{x, gates, nullptr, nullptr, nullptr, nullptr, scales, zero_points};
  switch (coding.activation) {
    case kSilu: return code_line<false, kSilu>(line, limits, count, to);
    case kGelu: return code_line<false, kGelu>(line, limits, count, to);
    case kGeglu: return code_line<false, kGeglu>(line, limits, count, to);
    default: return code_line<false, kNoActivation>(line, limits, count, to);
  }
}

// The moments of all groups of a group norm, written for each channel.
void prepare_moments(const DmqfxCoding& coding, int threads) {
  const int64_t channels = coding.channels, size = channels / coding.norm_groups;
  const int64_t many = coding.planes ? 1 : groups_at_once(coding), turns = (coding.norm_groups + many - 1) / many;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < coding.batch * turns; ++k) {
    const int64_t image = k / turns, group = k % turns * many, first = group * size;
    if (!coding.planes) {
      moments_of_rows(coding, image, group);
      continue;
    }
    const float* x = coding.x + (image * channels + first) * coding.positions;
    const Moments moments = moments_of(x, size * coding.positions, coding.eps);
    float* times = coding.moments + image * 2 * channels + first;
    for (int64_t c = 0; c < size; ++c) times[c] = moments.times, times[channels + c] = moments.plus;
  }
}

template <int kNorm, int kActivation>
void code_all(const DmqfxCoding& coding, int threads) {
  if constexpr (kNorm == kGroupNorm) prepare_moments(coding, threads);
  if (coding.planes == 0) {
    const int64_t rows = coding.batch * coding.positions;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) code_row<kNorm, kActivation>(coding, row);
    return;
  }
  const int64_t runs = (coding.positions + kRun - 1) / kRun;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < coding.batch * runs; ++k) {
    const int64_t first = k % runs * kRun, left = coding.positions - first;
    code_planes<kNorm == kGroupNorm, kActivation>(coding, k / runs, first, left < kRun ? left : kRun);
  }
}

template <int kNorm>
void code_normed(const DmqfxCoding& coding, int threads) {
  switch (coding.activation) {
    case kSilu: return code_all<kNorm, kSilu>(coding, threads);
    case kGelu: return code_all<kNorm, kGelu>(coding, threads);
    case kGeglu: return code_all<kNoNorm, kGeglu>(coding, threads);  // of rows without a norm
    default: return code_all<kNorm, kNoActivation>(coding, threads);
  }
}

void code(const DmqfxCoding& coding, int threads) {
  if (coding.batch * coding.channels * coding.positions < 16384) threads = 1;  // less is not worth a team
  threads = threads > 1 ? threads : 1;
  if (coding.norm == kGroupNorm) return code_normed<kGroupNorm>(coding, threads);
  (coding.norm == kLayerNorm ? code_normed<kLayerNorm> : code_normed<kNoNorm>)(coding, threads);
}

}  // namespace
