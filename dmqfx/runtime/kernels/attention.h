// softmax(Q K^T * scale) V of codes, written once over the tile, which reads codes of Q and of the softmax and, packed as
// weights, those of keys and values (operands.h).
//
// Everything but the tile and the codes of the softmax is plain C++ in a fixed order of operations, as in code.h: every
// instruction set and number of threads gives the same bits. Internal linkage, as in tile.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "desk.h"
#include "layer.h"
#include "operands.h"
#include "tile.h"

namespace {

constexpr int64_t kTogether = 256;  // keys whose codes are relative to one maximum: finer for those far below the row's
constexpr int64_t kQueries = 24;    // rows of Q that are worked on together
constexpr int kSteps = 32;          // of a power of two, between the codes of a softmax
static_assert(kQueries % kWhole == 0 && kTogether % kPadded == 0 && kPadded % (kMostBlocks * kLane) == 0);

// Codes and factors of 2^(-x / 32). Beyond 2^(-1 / 2) of code 1 they are 0.
struct Powers {
  alignas(64) uint8_t codes[kSteps];  // of the first power of two
  float factors[kSteps];

  explicit Powers(int64_t bits) {
    const double greatest = static_cast<double>((1 << bits) - 1);
    for (int n = 0; n < kSteps; ++n) {
      const double power = std::exp2(-n / static_cast<double>(kSteps));
      codes[n] = static_cast<uint8_t>(greatest * power + 0.5);
      factors[n] = static_cast<float>(power);
    }
  }
  uint8_t code(int32_t x) const {
    const int32_t shift = x / kSteps;
    return shift > 8 ? 0 : static_cast<uint8_t>(((2 * codes[x % kSteps] >> shift) + 1) >> 1);
  }
  float factor(int32_t x) const {
    const int32_t shift = x / kSteps, bits = (127 - (shift < 126 ? shift : 126)) * (1 << 23);
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return shift > 126 ? 0 : factors[x % kSteps] * power;
  }
};

// How far a score is below another, in steps; at most the largest of 16 bits, and 0 where it is above.
inline int32_t distance(int32_t below, float times) {
  const int32_t steps = whole(static_cast<float>(below) * times, 32767);
  return steps > 0 ? steps : 0;
}

// The greatest of scores; `less` is taken from the sums.
inline int32_t greatest(const int32_t* sums, const int32_t* less, int64_t keys) {
  int32_t most = INT32_MIN;
  for (int64_t k = 0; k < keys; ++k) most = sums[k] - less[k] > most ? sums[k] - less[k] : most;
  return most;
}

// Codes of scores, and their sum, in plain C++: what instruction sets do in their own ways.
struct PlainScores {
  static int32_t code(const Powers& powers, const int32_t* sums, const int32_t* less, int64_t keys, int32_t most, float times,
                      uint8_t* codes) {
    int32_t total = 0;
    for (int64_t k = 0; k < keys; ++k) total += codes[k] = powers.code(distance(most - (sums[k] - less[k]), times));
    return total;
  }
};

// What one thread works in, for kQueries rows of a head.
struct Table {
  uint8_t *queries, *codes;                 // [kQueries, channels]; [kQueries, kTogether]
  int32_t *scores, *sums;                   // [kQueries, kTogether]; [kQueries, channels]
  float* averages;                          // [kQueries, channels]
  const uint8_t *of_queries[kQueries], *of_codes[kQueries];
  float times[kQueries], total[kQueries];   // of scores; of codes
  int32_t most[kQueries];
  float* line;                              // [channels]
  int8_t* lines;                            // [4, channels]
  uint8_t* room;

  explicit Table(int64_t channels) {
    const int64_t bytes = kQueries * (kTogether * 5 + channels * 9) + 8 * channels;
    room = static_cast<uint8_t*>(Desk::room(static_cast<size_t>(bytes)));
    if (room == nullptr) return;
    std::memset(room, 0, static_cast<size_t>(bytes));
    uint8_t* place = room;
    const auto take = [&](int64_t count) { return std::exchange(place, place + count); };
    scores = reinterpret_cast<int32_t*>(take(4 * kQueries * kTogether));
    codes = take(kQueries * kTogether);
    sums = reinterpret_cast<int32_t*>(take(4 * kQueries * channels));
    averages = reinterpret_cast<float*>(take(4 * kQueries * channels));
    line = reinterpret_cast<float*>(take(4 * channels));
    queries = take(kQueries * channels);
    lines = reinterpret_cast<int8_t*>(take(kQuad * channels));
    for (int64_t k = 0; k < kQueries; ++k) of_queries[k] = queries + k * channels, of_codes[k] = codes + k * kTogether;
  }
  Table(const Table&) = delete;
  ~Table() { std::free(room); }
};

// Codes of up to kQueries rows of Q, each with a scale of its own.
inline void code_queries(const DmqfxAttention& of, const Heads& heads, Rows rows, const Head& head, Table& table) {
  const auto zero_point = static_cast<int32_t>(1 << (of.bits - 1));
  const auto reach = static_cast<float>(zero_point - 1);
  const auto step = static_cast<float>(of.scale * kSteps * 1.4426950408889634);
  for (int64_t row = 0; row < rows.count; ++row) {
    uint8_t* to = table.queries + row * heads.channels;
    float sizes[kLane] = {}, odd[kLane] = {};
    const Blocks x(rows.x + row * rows.stride, rows.width);
    for (int64_t c = 0; c < rows.width; c += kLane) {
      const float *from = x.at(c), *balance = head.balance + c;
      float* line = table.line + c;
#pragma GCC unroll 1
      for (int n = 0; n < kLane; ++n) {
        line[n] = from[n] * balance[n];
        const float size = line[n] > 0 ? line[n] : -line[n];
        sizes[n] = size > sizes[n] ? size : sizes[n];
        odd[n] += line[n] * 0.0f;
      }
    }
    const float most = folded(sizes, [](float a, float b) { return a > b ? a : b; }) +
                       folded(odd, [](float a, float b) { return a + b; });
    const float inverse = most >= kTiny ? reach / most : 0;
    for (int64_t c = 0; c < heads.channels; c += kLane) {
      const float* line = table.line + c;
      int32_t codes[kLane];
#pragma GCC unroll 1
      for (int n = 0; n < kLane; ++n) codes[n] = whole(line[n] * inverse, reach) + zero_point;
      keep(codes, to + c);
    }
    table.times[row] = most / reach * (*head.scale * step);
  }
}

// sums[row] of rows of codes: codes * packed weights of `steps` quads and some blocks of 16.
template <class Isa>
void multiply(const uint8_t* const* codes, int64_t rows, int64_t steps, const int8_t* weights, int64_t stride, int64_t blocks,
              int32_t* sums, int64_t width) {
  for (int64_t block = 0; block < blocks; block += Isa::kBlocks) {
    const Panel panel{weights + block * stride, stride};
    tiles<Isa>(codes, rows, 1, Steps(steps, 0, steps), panel, least(Isa::kBlocks, blocks - block), true, sums + block * kLane, width,
               [](int64_t, int64_t) {});
  }
}

// Rows of Q by all keys, some keys at a time: what was averaged before is made less where these have greater scores.
template <class Isa, class Scores>
void average(const DmqfxAttention& of, const Heads& heads, const Head& head, const Powers& powers, int64_t rows, Table& table) {
  std::memset(table.averages, 0, static_cast<size_t>(kQueries * heads.channels) * sizeof(float));
  for (int64_t from = 0; from < heads.keys; from += kTogether) {
    const int64_t keys = least(kTogether, heads.keys - from), there = least(keys, of.keys - from);
    const int64_t quads = heads.quads, coded = pieces(keys, kPadded) * kPadded;
    multiply<Isa>(table.of_queries, rows, quads, head.keys + from * quads * kQuad, quads * kStep, keys / kLane, table.scores,
                  kTogether);
    float before[kQueries], now[kQueries];
    for (int64_t row = 0; row < rows; ++row) {
      const int32_t *sums = table.scores + row * kTogether, *less = head.less + from;
      uint8_t* codes = table.codes + row * kTogether;
      const float times = table.times[row];
      const int32_t own = greatest(sums, less, there);
      int32_t total = Scores::code(powers, sums, less, coded, own, times, codes);
      for (int64_t k = there; k < coded; ++k) total -= std::exchange(codes[k], uint8_t{0});
      const int32_t most = from > 0 && table.most[row] > own ? table.most[row] : own;
      before[row] = from > 0 ? powers.factor(distance(most - table.most[row], times)) : 0;
      now[row] = powers.factor(distance(most - own, times));
      table.total[row] = (from > 0 ? table.total[row] * before[row] : 0) + static_cast<float>(total) * now[row];
      table.most[row] = most;
    }
    multiply<Isa>(table.of_codes, rows, keys / kQuad, head.values + from * kLane, heads.keys * kLane, heads.blocks,
                  table.sums, heads.channels);
    for (int64_t row = 0; row < rows; ++row) {
      float* averages = table.averages + row * heads.channels;
      const int32_t* sums = table.sums + row * heads.channels;
      for (int64_t c = 0; c < heads.channels; ++c)
        averages[c] = averages[c] * before[row] + static_cast<float>(sums[c]) * now[row];
    }
  }
}

// Averages of codes of V to what they stand for.
inline void put(const Table& table, const Heads& heads, const Head& head, Rows to) {
  for (int64_t row = 0; row < to.count; ++row) {
    const float *averages = table.averages + row * heads.channels, inverse = 1 / table.total[row];
    float* out = const_cast<float*>(to.x) + row * to.stride;
    for (int64_t c = 0; c < to.width; ++c) out[c] = averages[c] * inverse * head.scales[c] + head.middles[c];
  }
}

template <class Isa, class Scores>
bool attend(const DmqfxAttention& of, int threads) {
  const Heads heads(of);
  if (heads.room == nullptr) return false;
  const Powers powers(of.bits);
  const int64_t all = of.batch * of.heads, strips = pieces(of.queries, kQueries);
  const auto rows_of = [&](const float* x, const int64_t* strides, int64_t number, int64_t first, int64_t count) {
    const int64_t start = number / of.heads * strides[0] + number % of.heads * strides[1] + first * strides[2];
    return Rows{x + start, count, strides[2], of.width};
  };
  if (all * of.queries * of.keys * of.width < 65536) threads = 1;  // less is not worth a team
  const int64_t ahead = kQueries * (threads > 1 ? threads : 1);
  bool failed = false;
#pragma omp parallel num_threads(threads > 1 ? threads : 1) if (threads > 1)
  {
    Table table(heads.channels);
    const bool ready = table.room != nullptr;
    if (!ready) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(dynamic)
    for (int64_t number = 0; number < all; ++number) {
      if (!ready) continue;
      const Head head = heads.at(number);
      heads.clear(head);
      code_keys(heads, rows_of(of.k, of.of_k, number, 0, of.keys), 1 << (of.bits - 1), head, table.lines);
      code_values(heads, rows_of(of.v, of.of_v, number, 0, of.keys), head, table.lines);
    }
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < all * strips; ++k) {
      if (!ready) continue;
      const int64_t number = k / strips, first = k % strips * kQueries, count = least(kQueries, of.queries - first);
      const Head head = heads.at(number);
      const Rows rows = rows_of(of.q, of.of_q, number, first, count);
      code_queries(of, heads, rows, head, table);
      if (first + ahead < of.queries)
        fetch(rows_of(of.q, of.of_q, number, first + ahead, least(kQueries, of.queries - first - ahead)));
      average<Isa, Scores>(of, heads, head, powers, count, table);
      put(table, heads, head, rows_of(of.out, of.of_out, number, first, count));
    }
  }
  return !failed;
}

}  // namespace
