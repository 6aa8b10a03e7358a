// Mean and deviation of what a norm is over, for both layouts, from one reading of memory: blocks that stay in the first
// cache are added up twice, first for a number near their mean; float in a block, double beyond.
//
// Plain C++ in a fixed order of operations, as in line.h: every instruction set and number of threads gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "layer.h"

namespace {

constexpr int kWide = 32;      // columns that are added up together
constexpr int64_t kTall = 64;  // their rows in a block

// Rows of numbers: where they start, how far apart they are, and how many numbers lie side by side.
struct Column {
  const float* x;
  int64_t row, count;
};

// Sums of x and x^2, both less a reference.
struct Totals {
  double sum = 0, squares = 0;

  // More numbers: their sums of x - near and of its squares.
  void join(double from_reference, double count, double off, double squares_off) {
    sum += count * from_reference + off;
    squares += squares_off + from_reference * (2 * off + count * from_reference);
  }
};

// Mean 0 and deviation 1: x * times + plus.
struct Moments {
  double times = 1, plus = 0;
  Moments() = default;
  Moments(Totals totals, double reference, double count, double eps) {
    const double mean = totals.sum / count, variance = totals.squares / count - mean * mean;
    times = 1 / std::sqrt((variance > 0 ? variance : 0) + eps);
    plus = -(reference + mean) * times;
  }
};

// What a block adds up to, column by column.
struct Block {
  float near[kWide] = {}, off[kWide] = {}, squares[kWide] = {};

  // `near` += x; and with that near the mean, the others += x - near and its square.
  void add(Column from, int64_t rows) { from.count == kWide ? add_first(from, rows, kWide) : add_first(from, rows, from.count); }
  void add_off(Column from, int64_t rows) {
    from.count == kWide ? add_second(from, rows, kWide) : add_second(from, rows, from.count);
  }

 private:
  inline void add_first(Column from, int64_t rows, int64_t count) {
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t c = 0; c < count; ++c) near[c] += from.x[k * from.row + c];
  }
  inline void add_second(Column from, int64_t rows, int64_t count) {
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t c = 0; c < count; ++c) {
        const float x = from.x[k * from.row + c] - near[c];
        off[c] += x;
        squares[c] += x * x;
      }
  }
};

inline float folded(const float* lanes) {
  float halves[kWide];
  for (int k = 0; k < kWide; ++k) halves[k] = lanes[k];
#pragma GCC unroll 8
  for (int width = kWide / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) halves[k] += halves[k + width];
  return halves[0];
}

// Of numbers that lie side by side.
inline Totals totals_of_run(const float* x, int64_t count, double reference) {
  Totals all;
  for (int64_t from = 0, some; from < count; from += some) {
    some = count - from < kTall * kWide ? count - from : kTall * kWide;
    const int64_t rows = some / kWide, left = some % kWide;
    const Column whole{x + from, kWide, kWide}, last{x + from + rows * kWide, 0, left};
    Block block;
    block.add(whole, rows);
    if (left > 0) block.add(last, 1);
    const float near = folded(block.near) / static_cast<float>(some);
    for (float& each : block.near) each = near;
    block.add_off(whole, rows);
    if (left > 0) block.add_off(last, 1);
    all.join(near - reference, static_cast<double>(some), folded(block.off), folded(block.squares));
  }
  return all;
}

// Of each of up to kWide columns.
inline void totals_of_columns(Column from, int64_t rows, double reference, Totals* all) {
  double sums[kWide] = {}, squares[kWide] = {};
  for (int64_t first = 0, some; first < rows; first += some) {
    some = rows - first < kTall ? rows - first : kTall;
    const Column next{from.x + first * from.row, from.row, from.count};
    const auto count = static_cast<double>(some);
    const float share = 1 / static_cast<float>(some);
    Block block;
    block.add(next, some);
    for (float& each : block.near) each *= share;
    block.add_off(next, some);
    for (int c = 0; c < kWide; ++c) {
      Totals more{sums[c], squares[c]};
      more.join(block.near[c] - reference, count, block.off[c], block.squares[c]);
      sums[c] = more.sum, squares[c] = more.squares;
    }
  }
  for (int64_t c = 0; c < from.count; ++c) all[c] = {sums[c], squares[c]};
}

// Channels of rows from one on, up to the end of its arm; of GEGLU without their gates.
inline Column column(const DmqfxCoding& coding, int64_t image, int64_t first) {
  const int64_t split = coding.beside == nullptr ? coding.channels : coding.split, rows = image * coding.positions;
  if (first >= split) {
    const int64_t width = coding.channels - split;
    return {coding.beside + rows * width + first - split, width, coding.channels - first};
  }
  const int64_t width = coding.activation == kGeglu ? 2 * split : split;
  return {coding.x + rows * width + first, width, split - first};
}

// How many columns a piece of work has, and which is the last of so many pieces: no piece is of both arms.
inline int64_t column_pieces(const DmqfxCoding& coding) {
  const int64_t split = coding.beside == nullptr ? coding.channels : coding.split, other = coding.channels - split;
  return (split + kWide - 1) / kWide + (other + kWide - 1) / kWide;
}

inline void totals_of_piece(const DmqfxCoding& coding, int64_t image, int64_t piece, double reference, Totals* totals) {
  const int64_t split = coding.beside == nullptr ? coding.channels : coding.split, before = (split + kWide - 1) / kWide;
  const int64_t first = piece < before ? piece * kWide : split + (piece - before) * kWide;
  Column from = column(coding, image, first);
  from.count = from.count < kWide ? from.count : kWide;
  totals_of_columns(from, coding.positions, reference, totals + first);
}

// A group norm with its weight and bias: x * times + plus of each channel, from its totals.
inline void normed_by(const DmqfxCoding& coding, double reference, const Totals* totals, float* times, float* pluses) {
  const int64_t size = coding.channels / coding.norm_groups;
  for (int64_t first = 0; first < coding.channels; first += size) {
    Totals all;
    for (int64_t c = first; c < first + size; ++c) all.sum += totals[c].sum, all.squares += totals[c].squares;
    const Moments of(all, reference, static_cast<double>(size * coding.positions), coding.eps);
    for (int64_t c = first; c < first + size; ++c) {
      times[c] = static_cast<float>(of.times * coding.gammas[c]);
      pluses[c] = static_cast<float>(of.plus * coding.gammas[c] + coding.betas[c]);
    }
  }
}

}  // namespace
