// Real numbers to codes, written once: what is done to one number, and the two layouts that numbers come in.
//
// Plain C++ in a fixed order of operations, which the compiler vectorises for the instruction set of the file that
// includes this: every set gives the same bits. Internal linkage, as in tile.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "layer.h"
#include "square.h"

namespace {

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds to the nearest, ties to even
constexpr int64_t kRun = 64;             // positions of planes that are coded together
constexpr int kLong = 64, kShort = 16;   // numbers that are coded at once: loops of fixed length have no slow end
constexpr int kLanes = 32;               // running sums of a moment
constexpr int64_t kStretch = 2048;       // numbers that they add up in float

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

// Mean 0 and deviation 1, before gamma and beta: x * times + plus.
struct Moments {
  float times = 1, plus = 0;
};

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

// What belongs to each number of a line, arrays or `One`: gates for GEGLU, gammas and betas for a norm.
template <class Weights, class Scales, class ZeroPoints>
struct Line {
  const float *x, *gates;
  Weights gammas, betas;
  Scales scales;
  ZeroPoints zero_points;
};

template <bool kNormed, int kActivation, int kCount, class Known>
inline void code_vector(const Known& line, Moments moments, Limits limits, uint8_t* to) {
  int32_t codes[kCount];
  for (int k = 0; k < kCount; ++k) {
    float y = line.x[k];
    if constexpr (kNormed) y = (y * moments.times + moments.plus) * line.gammas[k] + line.betas[k];
    y = activated<kActivation>(y, kActivation == kGeglu ? line.gates[k] : 0);
    const float whole = (bounded(y / line.scales[k], -1048576.0f, 1048576.0f) + kRounder) - kRounder;
    const float code = whole + static_cast<float>(line.zero_points[k]);
    codes[k] = static_cast<int32_t>(bounded(code, limits.least, limits.greatest));
  }
  for (int k = 0; k < kCount; ++k) to[k] = static_cast<uint8_t>(codes[k]);
}

// From number n on; and the last few numbers, with room behind them.
template <class Number>
inline One<Number> behind(One<Number> one, int64_t) { return one; }
template <class Number>
inline const Number* behind(const Number* from, int64_t n) { return from == nullptr ? from : from + n; }
template <class Number>
inline One<Number> padded(One<Number> one, int64_t, Number*) { return one; }
template <class Number>
inline const Number* padded(const Number* from, int64_t count, Number* room) {
  if (from == nullptr) return from;
  for (int k = 0; k < kShort; ++k) room[k] = from[k < count ? k : 0];
  return room;
}

template <bool kNormed, int kActivation, class Known>
inline void code_line(const Known& line, Moments moments, Limits limits, int64_t count, uint8_t* to) {
  int64_t n = 0;
  const auto from = [&] {
    return Known{line.x + n, behind(line.gates, n), behind(line.gammas, n), behind(line.betas, n),
                 behind(line.scales, n), behind(line.zero_points, n)};
  };
  for (; n + kLong <= count; n += kLong) code_vector<kNormed, kActivation, kLong>(from(), moments, limits, to + n);
  for (; n + kShort <= count; n += kShort) code_vector<kNormed, kActivation, kShort>(from(), moments, limits, to + n);
  const int64_t left = count - n;
  if (left == 0) return;
  float rooms[5][kShort];
  int32_t room[kShort];
  uint8_t last[kShort];
  const Known rest = from();
  const Known end{padded(rest.x, left, rooms[0]),      padded(rest.gates, left, rooms[1]),
                  padded(rest.gammas, left, rooms[2]), padded(rest.betas, left, rooms[3]),
                  padded(rest.scales, left, rooms[4]), padded(rest.zero_points, left, room)};
  code_vector<kNormed, kActivation, kShort>(end, moments, limits, last);
  std::memcpy(to + n, last, static_cast<size_t>(left));
}

// Sum of x - less, or of its squares; in float over short runs, in double beyond.
template <bool kSquares>
double total(const float* x, int64_t count, float less) {
  double sum = 0;
  for (int64_t from = 0; from < count; from += kStretch) {
    const int64_t to = from + kStretch < count ? from + kStretch : count;
    float lanes[kLanes] = {};
    int64_t k = from;
    for (; k + kLanes <= to; k += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        const float off = x[k + lane] - less;
        lanes[lane] += kSquares ? off * off : off;
      }
    for (; k < to; ++k) {
      const float off = x[k] - less;
      lanes[k % kLanes] += kSquares ? off * off : off;
    }
    double halves[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) halves[lane] = lanes[lane];
#pragma GCC unroll 8
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int lane = 0; lane < width; ++lane) halves[lane] += halves[lane + width];
    sum += halves[0];
  }
  return sum;
}

inline Moments moments_of(const float* x, int64_t count, double eps) {
  const auto whole = static_cast<double>(count);
  const double mean = total<false>(x, count, 0) / whole;
  const auto near = static_cast<float>(mean);
  const double off = mean - near, variance = total<true>(x, count, near) / whole - off * off;
  const double times = 1 / std::sqrt((variance > 0 ? variance : 0) + eps);
  return {static_cast<float>(times), static_cast<float>(-mean * times)};
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
  uint8_t lines[kSquare][kRun];
  uint8_t* to = coding.codes + (image * coding.positions + first) * channels;
  for (int64_t channel = 0; channel < channels; channel += kSquare) {
    const int64_t high = channels - channel < kSquare ? channels - channel : kSquare;
    for (int64_t k = 0; k < high; ++k) {
      const int64_t c = channel + k;
      const float* x = coding.x + (image * channels + c) * coding.positions + first;
      Line<One<float>, One<float>, One<int32_t>> line{x, nullptr, {1}, {0}, {grid.scale(c)}, {grid.zero_point(c)}};
      Moments moments;
      if constexpr (kNormed) {
        const int64_t group = image * coding.norm_groups + c / (channels / coding.norm_groups);
        moments = {coding.moments[2 * group], coding.moments[2 * group + 1]};
        line.gammas = {coding.gammas[c]};
        line.betas = {coding.betas[c]};
      }
      code_line<kNormed, kActivation>(line, moments, limits, count, lines[k]);
    }
    const int64_t squares = high == kSquare ? count / kSquare * kSquare : 0;
    for (int64_t n = 0; n < squares; n += kSquare) transpose(&lines[0][n], kRun, to + n * channels + channel, channels, 0);
    for (int64_t n = squares; n < count; ++n)
      for (int64_t k = 0; k < high; ++k) to[n * channels + channel + k] = lines[k][n];
  }
}

// One position's channels, side by side; behind them as many gates, if there are any.
template <bool kNormed, int kActivation>
void code_row(const DmqfxCoding& coding, int64_t row) {
  const Grid grid(coding, row / coding.positions);
  const Limits limits = limits_of(coding);
  const int64_t channels = coding.channels;
  const float* x = coding.x + row * channels * (kActivation == kGeglu ? 2 : 1);
  uint8_t* to = coding.codes + row * channels;
  Moments moments;
  if constexpr (kNormed) moments = moments_of(x, channels, coding.eps);
  const float *gates = kActivation == kGeglu ? x + channels : nullptr, *gammas = kNormed ? coding.gammas : nullptr;
  const float* betas = kNormed ? coding.betas : nullptr;
  if (!grid.wide_scales && !grid.wide_zero_points) {
    const Line<const float*, One<float>, One<int32_t>> line{x, gates, gammas, betas, {*grid.scales}, {*grid.zero_points}};
    return code_line<kNormed, kActivation>(line, moments, limits, channels, to);
  }
  for (int64_t n = 0; n < channels; n += kLong) {
    const int64_t count = channels - n < kLong ? channels - n : kLong;
    float scales[kLong];
    int32_t zero_points[kLong];
    for (int64_t k = 0; k < count; ++k) scales[k] = grid.scale(n + k), zero_points[k] = grid.zero_point(n + k);
    const Line<const float*, const float*, const int32_t*> line{
        x + n, behind(gates, n), behind(gammas, n), behind(betas, n), scales, zero_points};
    code_line<kNormed, kActivation>(line, moments, limits, count, to + n);
  }
}

template <bool kNormed, int kActivation>
void code_all(const DmqfxCoding& coding, int threads) {
  if (coding.planes == 0) {
    const int64_t rows = coding.batch * coding.positions;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) code_row<kNormed, kActivation>(coding, row);
    return;
  }
  if constexpr (kNormed) {
    const int64_t groups = coding.batch * coding.norm_groups;
    const int64_t size = coding.channels / coding.norm_groups * coding.positions;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t group = 0; group < groups; ++group) {
      const Moments moments = moments_of(coding.x + group * size, size, coding.eps);
      coding.moments[2 * group] = moments.times;
      coding.moments[2 * group + 1] = moments.plus;
    }
  }
  const int64_t runs = (coding.positions + kRun - 1) / kRun;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < coding.batch * runs; ++k) {
    const int64_t first = k % runs * kRun, left = coding.positions - first;
    code_planes<kNormed, kActivation>(coding, k / runs, first, left < kRun ? left : kRun);
  }
}

template <bool kNormed>
void code_normed(const DmqfxCoding& coding, int threads) {
  switch (coding.activation) {
    case kSilu: return code_all<kNormed, kSilu>(coding, threads);
    case kGelu: return code_all<kNormed, kGelu>(coding, threads);
    case kGeglu: return code_all<false, kGeglu>(coding, threads);  // of rows without a norm
    default: return code_all<kNormed, kNoActivation>(coding, threads);
  }
}

void code(const DmqfxCoding& coding, int threads) {
  if (coding.batch * coding.channels * coding.positions < 16384) threads = 1;  // less is not worth a team
  threads = threads > 1 ? threads : 1;
  (coding.norm == kNoNorm ? code_normed<false> : code_normed<true>)(coding, threads);
}

}  // namespace
