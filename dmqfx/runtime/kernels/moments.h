// Mean and deviation of what a norm is over, for both layouts; float over short runs, double beyond.
//
// Plain C++ in a fixed order of operations, as in code.h: every instruction set and number of threads gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "layer.h"

namespace {

constexpr int kLanes = 32;              // running sums of a moment
constexpr int64_t kStretch = 2048;      // numbers that they add up in float
constexpr int64_t kColumns = 64;        // channels of rows that are added up together
constexpr int64_t kTall = 64;           // rows that they add up in float

// Mean 0 and deviation 1, before gamma and beta: x * times + plus.
struct Moments {
  float times = 1, plus = 0;
};

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

// From a mean, and the mean of the squares about the float `near` it.
inline Moments moments_from(double mean, float near, double squares, double eps) {
  const double off = mean - near, variance = squares - off * off;
  const double times = 1 / std::sqrt((variance > 0 ? variance : 0) + eps);
  return {static_cast<float>(times), static_cast<float>(-mean * times)};
}

inline Moments moments_of(const float* x, int64_t count, double eps) {
  const auto whole = static_cast<double>(count);
  const double mean = total<false>(x, count, 0) / whole;
  const auto near = static_cast<float>(mean);
  return moments_from(mean, near, total<true>(x, count, near) / whole, eps);
}

// Channels first..first + count of rows: where they start and how far apart rows are. None are of both arms.
struct Column {
  const float* x;
  int64_t row;
};

inline Column column(const DmqfxCoding& coding, int64_t image, int64_t first) {
  if (coding.beside == nullptr) return {coding.x + image * coding.positions * coding.channels + first, coding.channels};
  const int64_t other = coding.channels - coding.split;
  if (first < coding.split) return {coding.x + image * coding.positions * coding.split + first, coding.split};
  return {coding.beside + image * coding.positions * other + first - coding.split, other};
}

// sums[c] += x - less, or its square, over all rows of a column of up to kColumns channels.
template <bool kSquares>
inline void add_rows(Column from, int64_t rows, int64_t count, const float* less, double* sums) {
  for (int64_t first = 0; first < rows; first += kTall) {
    const int64_t end = first + kTall < rows ? first + kTall : rows;
    float lanes[kColumns] = {};
    for (int64_t k = first; k < end; ++k) {
      const float* x = from.x + k * from.row;
      for (int64_t c = 0; c < count; ++c) {
        const float off = x[c] - less[c];
        lanes[c] += kSquares ? off * off : off;
      }
    }
    for (int64_t c = 0; c < count; ++c) sums[c] += lanes[c];
  }
}

// sums[group] += x - mean, or its square, over channels from..to, which are whole groups.
template <bool kSquares>
inline void group_sums(const DmqfxCoding& coding, int64_t image, int64_t from, int64_t to, const float* means, double* sums) {
  const int64_t size = coding.channels / coding.norm_groups;
  for (int64_t first = from, count; first < to; first += count) {
    count = to - first < kColumns ? to - first : kColumns;
    if (coding.beside != nullptr && first < coding.split && first + count > coding.split) count = coding.split - first;
    float less[kColumns] = {};
    double of_channels[kColumns] = {};
    for (int64_t c = 0; kSquares && c < count; ++c) less[c] = means[(first + c - from) / size];
    add_rows<kSquares>(column(coding, image, first), coding.positions, count, less, of_channels);
    for (int64_t c = 0; c < count; ++c) sums[(first + c - from) / size] += of_channels[c];
  }
}

// Group norm of rows: moments of some groups of an image, a few at a time so that threads have work.
inline int64_t groups_at_once(const DmqfxCoding& coding) {
  const int64_t size = coding.channels / coding.norm_groups, many = (kColumns + size - 1) / size;
  return many < coding.norm_groups ? many : coding.norm_groups;
}

inline void moments_of_rows(const DmqfxCoding& coding, int64_t image, int64_t first_group) {
  const int64_t size = coding.channels / coding.norm_groups, many = groups_at_once(coding);
  const int64_t left = coding.norm_groups - first_group, groups = left < many ? left : many;
  const int64_t from = first_group * size, to = from + groups * size;
  const auto whole = static_cast<double>(size * coding.positions);
  double sums[kColumns] = {}, squares[kColumns] = {};
  float near[kColumns];
  group_sums<false>(coding, image, from, to, nullptr, sums);
  for (int64_t g = 0; g < groups; ++g) near[g] = static_cast<float>(sums[g] / whole);
  group_sums<true>(coding, image, from, to, near, squares);
  float* times = coding.moments + image * 2 * coding.channels;
  for (int64_t c = from; c < to; ++c) {
    const int64_t g = (c - from) / size;
    const Moments moments = moments_from(sums[g] / whole, near[g], squares[g] / whole, coding.eps);
    times[c] = moments.times;
    times[coding.channels + c] = moments.plus;
  }
}

}  // namespace

