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
constexpr int64_t kRun = 64;             // numbers of a line that are coded together
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

template <bool kNormed, bool kSilu>
inline uint8_t coded(float x, Moments moments, float gamma, float beta, float scale, float zero_point, Limits limits) {
  float y = x;
  if constexpr (kNormed) y = (x * moments.times + moments.plus) * gamma + beta;
  if constexpr (kSilu) {
    y = y > -88.0f ? y : -88.0f;  // below, silu is 0 to any grid, but e^-y would not hold
    y = y / (1.0f + exponential(-y));
  }
  const float whole = (bounded(y / scale, -1048576.0f, 1048576.0f) + kRounder) - kRounder;
  return static_cast<uint8_t>(static_cast<int32_t>(bounded(whole + zero_point, limits.least, limits.greatest)));
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
    for (const float lane : lanes) sum += lane;
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

// The parameters of one sample.
struct Sample {
  const float* scales;
  const int32_t* zero_points;
  Sample(const DmqfxCoding& coding, int64_t image) {
    const int64_t group = coding.group == nullptr ? 0 : coding.group[image];
    scales = coding.scales + group * coding.scale_channels;
    zero_points = coding.zero_points + group * coding.zero_point_channels;
  }
};

inline float at(const float* of_channels, int64_t channel, float otherwise) {
  return of_channels == nullptr ? otherwise : of_channels[channel];
}

// kRun positions of all channels of an image: lines of eight channels, then bytes transposed.
template <bool kNormed, bool kSilu>
void code_planes(const DmqfxCoding& coding, int64_t image, int64_t first, int64_t count) {
  const Sample sample(coding, image);
  const Limits limits{static_cast<float>(coding.least), static_cast<float>(coding.greatest)};
  const int64_t channels = coding.channels;
  uint8_t lines[kSquare][kRun];
  uint8_t* to = coding.codes + (image * coding.positions + first) * channels;
  for (int64_t channel = 0; channel < channels; channel += kSquare) {
    const int64_t high = channels - channel < kSquare ? channels - channel : kSquare;
    for (int64_t k = 0; k < high; ++k) {
      const int64_t c = channel + k;
      const float* x = coding.x + (image * channels + c) * coding.positions + first;
      Moments moments;
      if constexpr (kNormed) {
        const int64_t group = image * coding.norm_groups + c / (channels / coding.norm_groups);
        moments = {coding.moments[2 * group], coding.moments[2 * group + 1]};
      }
      const float gamma = at(coding.gammas, c, 1), beta = at(coding.betas, c, 0);
      const float scale = sample.scales[coding.scale_channels == 1 ? 0 : c];
      const auto zero_point = static_cast<float>(sample.zero_points[coding.zero_point_channels == 1 ? 0 : c]);
      for (int64_t n = 0; n < count; ++n)
        lines[k][n] = coded<kNormed, kSilu>(x[n], moments, gamma, beta, scale, zero_point, limits);
    }
    const int64_t squares = high == kSquare ? count / kSquare * kSquare : 0;
    for (int64_t n = 0; n < squares; n += kSquare) transpose(&lines[0][n], kRun, to + n * channels + channel, channels, 0);
    for (int64_t n = squares; n < count; ++n)
      for (int64_t k = 0; k < high; ++k) to[n * channels + channel + k] = lines[k][n];
  }
}

// One position's channels, side by side.
template <bool kNormed, bool kSilu>
void code_row(const DmqfxCoding& coding, int64_t row) {
  const Sample sample(coding, row / coding.positions);
  const Limits limits{static_cast<float>(coding.least), static_cast<float>(coding.greatest)};
  const float* x = coding.x + row * coding.channels;
  uint8_t* to = coding.codes + row * coding.channels;
  Moments moments;
  if constexpr (kNormed) moments = moments_of(x, coding.channels, coding.eps);
  for (int64_t first = 0; first < coding.channels; first += kRun) {
    const int64_t count = coding.channels - first < kRun ? coding.channels - first : kRun;
    float gammas[kRun], betas[kRun], scales[kRun], zero_points[kRun];
    for (int64_t n = 0; n < count; ++n) {
      if constexpr (kNormed) gammas[n] = at(coding.gammas, first + n, 1), betas[n] = at(coding.betas, first + n, 0);
      scales[n] = sample.scales[coding.scale_channels == 1 ? 0 : first + n];
      zero_points[n] = static_cast<float>(sample.zero_points[coding.zero_point_channels == 1 ? 0 : first + n]);
    }
    for (int64_t n = 0; n < count; ++n)
      to[first + n] = coded<kNormed, kSilu>(x[first + n], moments, kNormed ? gammas[n] : 1, kNormed ? betas[n] : 0,
                                            scales[n], zero_points[n], limits);
  }
}

template <bool kNormed, bool kSilu>
void code_all(const DmqfxCoding& coding, int threads) {
  if (coding.planes == 0) {
    const int64_t rows = coding.batch * coding.positions;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) code_row<kNormed, kSilu>(coding, row);
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
    code_planes<kNormed, kSilu>(coding, k / runs, first, left < kRun ? left : kRun);
  }
}

void code(const DmqfxCoding& coding, int threads) {
  if (coding.batch * coding.channels * coding.positions < 16384) threads = 1;  // less is not worth a team
  threads = threads > 1 ? threads : 1;
  const bool normed = coding.norm != kNoNorm;
  if (coding.silu != 0)
    (normed ? code_all<true, true> : code_all<false, true>)(coding, threads);
  else
    (normed ? code_all<true, false> : code_all<false, false>)(coding, threads);
}

}  // namespace
