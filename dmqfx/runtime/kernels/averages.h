// softmax(Q K^T * scale) V in real numbers, head by head: both products by one tile, rows of Q side by side between them.
//
// Plain C++ in a fixed order of operations, as in line.h: every instruction set and number of threads gives the same bits.
// Internal linkage, as in tile.h.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "desk.h"
#include "layer.h"
#include "line.h"
#include "sets.h"

namespace {

#ifdef __AVX512F__
constexpr int kVector = 16;
#else
constexpr int kVector = 8;
#endif
constexpr int64_t kColumns = 32;  // rows of Q that are worked on together, at most
constexpr int kTallReals = 4;     // rows of a tile

using Vector = float __attribute__((vector_size(kVector * sizeof(float))));  // whatever an instruction set makes of it

// Numbers by row and column.
template <class Number>
struct Numbers {
  Number* x = nullptr;
  int64_t row = 0, column = 1;  // how far apart
  Numbers at(int64_t down, int64_t across) const { return {x + down * row + across * column, row, column}; }
};
using Factors = Numbers<const float>;
using Lines = Numbers<float>;

// to[row] = the sum over steps of factors[row][step] * lines[step], kUsed vectors of columns.
template <int kTall, int kUsed>
inline void tile_of_reals(Factors factors, Lines lines, int64_t steps, Lines to) {
  Vector sums[kTall][kUsed];
#pragma GCC unroll 4
  for (int row = 0; row < kTall; ++row)
#pragma GCC unroll 2
    for (int k = 0; k < kUsed; ++k) sums[row][k] = Vector{};
  const float *line = lines.x, *factor = factors.x;
  for (int64_t step = 0; step < steps; ++step, line += lines.row, factor += factors.column) {
    Vector loaded[kUsed];
#pragma GCC unroll 2
    for (int k = 0; k < kUsed; ++k) std::memcpy(&loaded[k], line + k * kVector, sizeof(Vector));
#pragma GCC unroll 4
    for (int row = 0; row < kTall; ++row)
#pragma GCC unroll 2
      for (int k = 0; k < kUsed; ++k) sums[row][k] += loaded[k] * factor[row * factors.row];
  }
#pragma GCC unroll 4
  for (int row = 0; row < kTall; ++row)
#pragma GCC unroll 2
    for (int k = 0; k < kUsed; ++k) std::memcpy(to.x + row * to.row + k * kVector, &sums[row][k], sizeof(Vector));
}

template <int kTall>
void rows_of_reals(Factors factors, Lines lines, int64_t steps, int64_t columns, Lines to) {
  for (int64_t c = 0; c < columns; c += 2 * kVector) {
    if (columns - c > kVector)
      tile_of_reals<kTall, 2>(factors, lines.at(0, c), steps, to.at(0, c));
    else
      tile_of_reals<kTall, 1>(factors, lines.at(0, c), steps, to.at(0, c));
  }
}

// to = factors [rows, steps] times lines [steps, columns], whose columns are whole vectors.
inline void multiply_reals(Factors factors, int64_t rows, Lines lines, int64_t steps, int64_t columns, Lines to) {
  int64_t row = 0;
  for (; row + kTallReals <= rows; row += kTallReals)
    rows_of_reals<kTallReals>(factors.at(row, 0), lines, steps, columns, to.at(row, 0));
  for (; row < rows; ++row) rows_of_reals<1>(factors.at(row, 0), lines, steps, columns, to.at(row, 0));
}

// What one thread works in.
struct Averaging {
  int64_t channels;                           // filled up to whole vectors
  Lines queries, scores, values, averages;    // [width, kColumns], [keys, kColumns], [keys, channels], [kColumns, channels]
  float* room;
  int64_t held = -1;  // which head's values these are

  explicit Averaging(const DmqfxAttention& of) : channels(pieces(of.width, kVector) * kVector) {
    const int64_t numbers = (of.width + of.keys) * kColumns + (of.keys + kColumns) * channels;
    room = static_cast<float*>(Desk::room(static_cast<size_t>(numbers) * sizeof(float)));
    if (room == nullptr) return;
    std::memset(room, 0, static_cast<size_t>(numbers) * sizeof(float));  // also what stands beside the numbers that there are
    float* place = room;
    const auto take = [&](int64_t rows, int64_t width) { return Lines{std::exchange(place, place + rows * width), width}; };
    queries = take(of.width, kColumns), scores = take(of.keys, kColumns);
    values = take(of.keys, channels), averages = take(kColumns, channels);
  }
  Averaging(const Averaging&) = delete;
  ~Averaging() { std::free(room); }

  void hold(const float* v, int64_t stride, const DmqfxAttention& of, int64_t number) {
    if (std::exchange(held, number) == number) return;
    for (int64_t key = 0; key < of.keys; ++key)
      std::memcpy(values.at(key, 0).x, v + key * stride, static_cast<size_t>(of.width) * sizeof(float));
  }
};

// The softmax of each column: scores to e^(scale * (score - the greatest)), and one over their sum, which is no number
// where a score is none or infinite.
inline void softmax(Lines scores, int64_t keys, float scale, float* shares) {
  const Limits limits{0, 0, kLeastPower, kLeastSilu};
  float most[kColumns], totals[kColumns] = {};
  std::memcpy(most, scores.x, sizeof most);
  for (int64_t key = 0; key < keys; ++key) {
    const float* line = scores.x + key * kColumns;
    for (int n = 0; n < kColumns; ++n) {
      most[n] = line[n] > most[n] ? line[n] : most[n];
      totals[n] += line[n] * 0.0f;
    }
  }
  for (int64_t key = 0; key < keys; ++key) {
    float* line = scores.x + key * kColumns;
    for (int n = 0; n < kColumns; ++n) line[n] = exponential((line[n] - most[n]) * scale, limits);
    for (int n = 0; n < kColumns; ++n) totals[n] += line[n];
  }
  for (int n = 0; n < kColumns; ++n) shares[n] = 1 / totals[n];
}

// False where there is no memory.
bool average_reals(const DmqfxAttention& of, int threads) {
  const int64_t all = of.batch * of.heads, strips = pieces(of.queries, kColumns);
  const auto head_of = [&](auto* x, const int64_t* strides, int64_t number) {
    return x + number / of.heads * strides[0] + number % of.heads * strides[1];
  };
  threads = static_cast<int>(least(threads, all * strips));
  if (all * of.queries * of.keys * of.width < 65536) threads = 1;  // less is not worth a team
  bool failed = false;
#pragma omp parallel num_threads(threads > 1 ? threads : 1) if (threads > 1)
  {
    Averaging room(of);
    const bool ready = room.room != nullptr;
    if (!ready) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < all * strips; ++k) {
      if (!ready) continue;
      const int64_t number = k / strips, first = k % strips * kColumns, rows = least(kColumns, of.queries - first);
      room.hold(head_of(of.v, of.of_v, number), of.of_v[2], of, number);
      const float* q = head_of(of.q, of.of_q, number) + first * of.of_q[2];
      for (int64_t row = 0; row < rows; ++row, q += of.of_q[2])
        for (int64_t c = 0; c < of.width; ++c) room.queries.x[c * kColumns + row] = q[c];
      const int64_t columns = pieces(rows, kVector) * kVector;
      multiply_reals({head_of(of.k, of.of_k, number), of.of_k[2]}, of.keys, room.queries, of.width, columns, room.scores);
      float shares[kColumns];
      softmax(room.scores, of.keys, static_cast<float>(of.scale), shares);
      multiply_reals({room.scores.x, 1, kColumns}, rows, room.values, of.keys, room.channels, room.averages);
      float* out = head_of(of.out, of.of_out, number) + first * of.of_out[2];
      for (int64_t row = 0; row < rows; ++row, out += of.of_out[2]) {
        const float* averages = room.averages.at(row, 0).x;
        for (int64_t c = 0; c < of.width; ++c) out[c] = averages[c] * shares[row];
      }
    }
  }
  return !failed;
}

}  // namespace
