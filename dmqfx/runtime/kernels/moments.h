// Mean and deviation of what a norm is over, for both layouts, from one reading of memory: blocks that stay in the first
// cache are added up twice, first for a number near their mean; in float, blocks in double.
//
// Plain C++ in a fixed order of operations, as in line.h: every instruction set and number of threads gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "layer.h"

namespace {

constexpr int kWide = 32;         // numbers that are added up together
constexpr int64_t kTall = 64;     // rows of them in a block
constexpr int kFour = 4;          // what they are folded to, before rows are folded together

// Rows of numbers: where they start, how far apart they are, how many numbers lie side by side, and how far behind these
// those of the next image are, or 0.
struct Column {
  const float* x;
  int64_t row, count, next = 0;
};

// sums[c] += x of some rows, and with their mean known, off[c] += x - mean and squares[c] += (x - mean)^2. Where `count` is
// kWide it is given so: loops of fixed length stay in registers.
inline void add(Column from, int64_t rows, int64_t count, float* sums) {
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t c = 0; c < count; ++c) sums[c] += from.x[k * from.row + c];
}
inline void add_off(Column from, int64_t rows, int64_t count, const float* near, float* off, float* squares) {
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t c = 0; c < count; ++c) {
      const float from_near = from.x[k * from.row + c] - near[c];
      off[c] += from_near;
      squares[c] += from_near * from_near;
    }
}

// Sums of count numbers less a reference, and of their squares, from those of x - near.
inline void join(double from_reference, double count, double off, double squares_off, double& sum, double& squares) {
  sum += count * from_reference + off;
  squares += squares_off + from_reference * (2 * off + count * from_reference);
}

// Mean 0 and deviation 1, x * times + plus, from such sums; reference k is `apart` behind the one before.
inline void find_moments(const double* sums, const double* squares, int64_t many, const float* references, int64_t apart,
                         double count, double eps, double* times, double* pluses) {
  const double share = 1 / count;
  for (int64_t k = 0; k < many; ++k) {
    const double mean = sums[k] * share, variance = squares[k] * share - mean * mean;
    const double deviation = 1 / std::sqrt((variance > 0 ? variance : 0) + eps);
    times[k] = deviation;
    pluses[k] = -(references[k * apart] + mean) * deviation;
  }
}

inline void fold_to_four(const float* of, float* to) {
  static_assert(kWide == 8 * kFour);
  for (int k = 0; k < kFour; ++k)
    to[k] = ((of[k] + of[k + 4]) + (of[k + 8] + of[k + 12])) + ((of[k + 16] + of[k + 20]) + (of[k + 24] + of[k + 28]));
}
inline float whole(const float (&four)[kFour]) { return (four[0] + four[1]) + (four[2] + four[3]); }

// Of up to kTall rows, each for itself.
inline void totals_of_rows(Column from, int64_t rows, const float* references, int64_t apart, double* sums, double* squares) {
  for (int64_t k = 0; k < rows; ++k) sums[k] = squares[k] = 0;
  for (int64_t first = 0, some; first < from.count; first += some) {
    some = from.count - first < kTall * kWide ? from.count - first : kTall * kWide;
    const int64_t full = some / kWide, left = some % kWide;
    const auto share = 1 / static_cast<float>(some);
    float near[kTall], of_sums[kTall][kFour], of_squares[kTall][kFour];
    for (int64_t k = 0; k < rows; ++k) {
      const Column lines{from.x + k * from.row + first, kWide, kWide}, last{lines.x + full * kWide, 0, left};
      float lanes[kWide] = {};
      add(lines, full, kWide, lanes);
      if (left > 0) add(last, 1, left, lanes);
      fold_to_four(lanes, of_sums[k]);
    }
    for (int64_t k = 0; k < rows; ++k) near[k] = whole(of_sums[k]) * share;
    for (int64_t k = 0; k < rows; ++k) {
      const Column lines{from.x + k * from.row + first, kWide, kWide}, last{lines.x + full * kWide, 0, left};
      float off[kWide] = {}, lanes[kWide] = {}, same[kWide];
      for (float& each : same) each = near[k];
      add_off(lines, full, kWide, same, off, lanes);
      if (left > 0) add_off(last, 1, left, same, off, lanes);
      fold_to_four(off, of_sums[k]);
      fold_to_four(lanes, of_squares[k]);
    }
    for (int64_t k = 0; k < rows; ++k)
      join(static_cast<double>(near[k]) - references[k * apart], static_cast<double>(some), whole(of_sums[k]),
           whole(of_squares[k]), sums[k], squares[k]);
  }
}

// Of up to kWide columns, each for itself, less its first number.
inline void totals_of_columns(Column from, int64_t rows, double* sums, double* squares) {
  double all_sums[kWide] = {}, all_squares[kWide] = {};
  for (int64_t first = 0, some; first < rows; first += some) {
    some = rows - first < kTall ? rows - first : kTall;
    const Column next{from.x + first * from.row, from.row, from.count};
    const float share = 1 / static_cast<float>(some);
    float near[kWide] = {}, off[kWide] = {}, of_squares[kWide] = {};
    from.count == kWide ? add(next, some, kWide, near) : add(next, some, from.count, near);
    for (float& each : near) each *= share;
    from.count == kWide ? add_off(next, some, kWide, near, off, of_squares)
                        : add_off(next, some, from.count, near, off, of_squares);
    for (int64_t c = 0; c < from.count; ++c)
      join(static_cast<double>(near[c]) - from.x[c], static_cast<double>(some), off[c], of_squares[c], all_sums[c],
           all_squares[c]);
  }
  for (int64_t c = 0; c < from.count; ++c) sums[c] = all_sums[c], squares[c] = all_squares[c];
}

// Channels of rows from one on, up to the end of its arm; of GEGLU without their gates.
inline Column column(const DmqfxCoding& coding, int64_t image, int64_t first) {
  const int64_t split = coding.beside == nullptr ? coding.channels : coding.split, rows = image * coding.positions;
  const int64_t others = image + 1 < coding.batch ? coding.positions : 0;
  if (first >= split) {
    const int64_t width = coding.channels - split;
    return {coding.beside + rows * width + first - split, width, coding.channels - first, others * width};
  }
  const int64_t width = coding.activation == kGeglu ? 2 * split : split;
  return {coding.x + rows * width + first, width, split - first, others * width};
}

// Where the numbers of a channel of an image begin: what they are less in the sums for its group norm. One number for
// all channels would leave nothing of the small ones beside one that is far out.
inline const float* first_of(const DmqfxCoding& coding, int64_t image, int64_t channel) {
  if (!coding.planes) return column(coding, image, channel).x;
  return coding.x + (image * coding.channels + channel) * coding.positions;
}

// Sums of some channels of an image for its group norm, a piece of work; none is of both arms.
inline int64_t pieces_of_moments(const DmqfxCoding& coding) {
  if (coding.planes) return (coding.channels + kTall - 1) / kTall;
  const int64_t split = coding.beside == nullptr ? coding.channels : coding.split, other = coding.channels - split;
  return (split + kWide - 1) / kWide + (other + kWide - 1) / kWide;
}

inline void totals_of_piece(const DmqfxCoding& coding, int64_t image, int64_t piece, double* sums, double* squares) {
  if (coding.planes) {
    const int64_t first = piece * kTall, left = coding.channels - first;
    const Column from{first_of(coding, image, first), coding.positions, coding.positions};
    return totals_of_rows(from, left < kTall ? left : kTall, from.x, from.row, sums + first, squares + first);
  }
  const int64_t split = coding.beside == nullptr ? coding.channels : coding.split, before = (split + kWide - 1) / kWide;
  const int64_t first = piece < before ? piece * kWide : split + (piece - before) * kWide;
  Column from = column(coding, image, first);
  from.count = from.count < kWide ? from.count : kWide;
  totals_of_columns(from, coding.positions, sums + first, squares + first);
}

// A group norm with its weight and bias, scaled and shifted: x * times + plus of each channel of an image, from its sums.
inline void finish_group_norm(const DmqfxCoding& coding, int64_t image, const double* sums, const double* squares,
                              float* times, float* pluses) {
  const int64_t size = coding.channels / coding.norm_groups;
  const auto count = static_cast<double>(size * coding.positions);
  const float* multipliers = coding.multipliers == nullptr ? nullptr : coding.multipliers + image * coding.of_multipliers;
  const float* addends = coding.addends == nullptr ? nullptr : coding.addends + image * coding.of_addends;
  for (int64_t first = 0, some; first < coding.norm_groups; first += some) {
    some = coding.norm_groups - first < kWide ? coding.norm_groups - first : kWide;
    float references[kWide];
    double of_sums[kWide] = {}, of_squares[kWide] = {}, of_times[kWide], of_pluses[kWide];
    for (int64_t g = 0; g < some; ++g) {
      references[g] = *first_of(coding, image, (first + g) * size);
      for (int64_t c = (first + g) * size; c < (first + g + 1) * size; ++c)
        join(static_cast<double>(*first_of(coding, image, c)) - references[g], static_cast<double>(coding.positions), sums[c],
             squares[c], of_sums[g], of_squares[g]);
    }
    find_moments(of_sums, of_squares, some, references, 1, count, coding.eps, of_times, of_pluses);
    for (int64_t g = 0; g < some; ++g)
      for (int64_t c = (first + g) * size; c < (first + g + 1) * size; ++c) {
        const double by = multipliers == nullptr ? 1 : multipliers[c], more = addends == nullptr ? 0 : addends[c];
        times[c] = static_cast<float>(of_times[g] * coding.gammas[c] * by);
        pluses[c] = static_cast<float>((of_pluses[g] * coding.gammas[c] + coding.betas[c]) * by + more);
      }
  }
}

}  // namespace
