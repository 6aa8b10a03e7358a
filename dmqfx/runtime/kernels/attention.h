// softmax(Q K^T * scale) V of codes, written once over the tile: keys and values lie packed as weights do, with scales of
// their own for each head; codes of Q and of the softmax are what the tile reads.
//
// Everything but the tile and the codes of the softmax is plain C++ in a fixed order of operations, as in code.h: every
// instruction set and number of threads gives the same bits. Internal linkage, as in tile.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "code.h"
#include "desk.h"
#include "layer.h"
#include "tile.h"

namespace {

constexpr int64_t kTogether = 256;  // keys whose codes are relative to one maximum: finer for those far below the row's
constexpr int64_t kPadded = 64;     // scores that are coded at once, at most
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
    const int32_t bits = (127 - x / kSteps) * (1 << 23);
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x / kSteps > 126 ? 0 : factors[x % kSteps] * power;
  }
};

// To the nearest whole number of -reach..reach, ties to even; reach where x is not a number.
inline int32_t whole(float x, float reach) {
  const float shifted = bounded(x, -reach, reach) + kRounder;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4B400000;
}

// How far a score is below another, in steps; at most the largest of 16 bits.
inline int32_t distance(int32_t below, float times) { return whole(static_cast<float>(below) * times, 32767); }

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

// Where a head's codes are, and what they stand for.
struct Head {
  int8_t *keys, *values;  // [blocks of 16 keys][quads][16][4]; [blocks of 16 channels][keys / 4][16][4]
  int32_t* less;          // [keys], what the zero point of Q adds to their scores
  float *balance, *scales, *middles, *inverses;  // [channels]: of Q, by which K was divided; of V, and one over its scales
  float* scale;                                  // of K
};

// Sizes of all heads of all samples, and their room in one piece.
struct Heads {
  int64_t quads, blocks;   // of a head: channels / 4 of Q and K; channels / 16 of V
  int64_t keys, channels;  // filled up to whole blocks
  int64_t bytes;
  uint8_t* room;

  explicit Heads(const DmqfxAttention& of)
      : quads(pieces(of.width, kQuad)), blocks(pieces(of.width, kLane)), keys(pieces(of.keys, kLane) * kLane),
        channels(blocks * kLane), bytes(keys * (quads * kQuad + channels + 4) + 4 * kPadded + 16 * channels + 64),
        room(static_cast<uint8_t*>(Desk::room(static_cast<size_t>(bytes * of.batch * of.heads)))) {}
  Heads(const Heads&) = delete;
  ~Heads() { std::free(room); }

  Head at(int64_t number) const {
    uint8_t* place = room + number * bytes;
    const auto take = [&](int64_t count) { return std::exchange(place, place + count); };
    const auto reals = [&](int64_t count) { return reinterpret_cast<float*>(take(4 * count)); };
    Head head;
    head.keys = reinterpret_cast<int8_t*>(take(keys * quads * kQuad));
    head.values = reinterpret_cast<int8_t*>(take(keys * channels));
    head.less = reinterpret_cast<int32_t*>(take(4 * (keys + kPadded)));  // more are read than there are
    head.balance = reals(channels), head.scales = reals(channels), head.middles = reals(channels);
    head.inverses = reals(channels), head.scale = reals(1);
    return head;
  }
  // Zeros where nothing is written: what stands beside the channels and keys that there are.
  void clear(const Head& head) const {
    std::memset(head.less + keys, 0, 4 * kPadded);
    std::memset(head.balance, 0, static_cast<size_t>(16 * channels));
  }
};

// Rows of one head among those of all.
struct Rows {
  const float* x;
  int64_t count, stride, width;
};

// Rows of a head lie far apart, where nothing is fetched ahead but what is asked for.
inline void fetch(Rows rows) {
  for (int64_t row = 0; row < rows.count; ++row)
    for (int64_t c = 0; c < rows.width + kLane; c += kLane)
      __builtin_prefetch(rows.x + row * rows.stride + least(c, rows.width - 1));
}

// The middle of what each channel holds, and half of how wide that is: no number where it holds one that is not finite.
inline void spans(Rows rows, float* middles, float* halves) {
  constexpr int64_t kWidth = 64, kAhead = 8;
  for (int64_t from = 0; from < rows.width; from += kWidth) {
    const int64_t count = least(kWidth, rows.width - from);
    float low[kWidth], high[kWidth], odd[kWidth] = {};
    const float* x = rows.x + from;
    std::memcpy(low, x, static_cast<size_t>(count) * sizeof(float));
    std::memcpy(high, x, static_cast<size_t>(count) * sizeof(float));
    for (int64_t row = 0; row < rows.count; ++row, x += rows.stride) {
      fetch({x + least(kAhead, rows.count - 1 - row) * rows.stride, 1, rows.stride, count});
      for (int64_t c = 0; c < count; ++c) {
        low[c] = x[c] < low[c] ? x[c] : low[c];
        high[c] = x[c] > high[c] ? x[c] : high[c];
        odd[c] += x[c] * 0.0f;
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      middles[from + c] = (high[c] + low[c]) * 0.5f;
      halves[from + c] = (high[c] - low[c]) * 0.5f + odd[c];
    }
  }
}

// A row of a head in blocks of 16 numbers: where they lie, or the last filled up with zeros.
struct Blocks {
  const float* x;
  int64_t width;
  float last[kLane] = {};

  Blocks(const float* x, int64_t width) : x(x), width(width) {
    const int64_t over = width % kLane;
    std::memcpy(last, x + width - over, static_cast<size_t>(over) * sizeof(float));
  }
  const float* at(int64_t c) const { return c + kLane > width ? last : x + c; }
};

// 16 numbers to one, by halves.
template <class Number, class Both>
Number folded(Number* lanes, Both both) {
#pragma GCC unroll 4
  for (int width = kLane / 2; width > 0; width /= 2)
    for (int n = 0; n < width; ++n) lanes[n] = both(lanes[n], lanes[n + width]);
  return lanes[0];
}

// 16 codes to bytes; a loop of its own, or the widest vectors would be of 16 bytes.
template <class Byte>
void keep(const int32_t* codes, Byte* to) {
#pragma GCC unroll 1
  for (int n = 0; n < kLane; ++n) to[n] = static_cast<Byte>(codes[n]);
}

// Codes of a row, and their sum.
inline int32_t code_centered(const Blocks& x, const Head& by, int8_t* codes) {
  int32_t sums[kLane] = {};
  for (int64_t c = 0; c < x.width; c += kLane) {
    const float *from = x.at(c), *middles = by.middles + c, *inverses = by.inverses + c;
    int32_t line[kLane];
#pragma GCC unroll 1
    for (int n = 0; n < kLane; ++n) sums[n] += line[n] = whole((from[n] - middles[n]) * inverses[n], 127);
    keep(line, codes + c);
  }
  return folded(sums, [](int32_t a, int32_t b) { return a + b; });
}

// A power of two near the root of x, of one that is not finite too: exact wherever it is computed.
inline float root(float x) {
  int exponent = 0;
  if (x > 0) std::frexp(x, &exponent);  // and of no number 0
  const int half = (exponent - (exponent & 1)) / 2;
  return std::ldexp(1.0f, half < -60 ? -60 : half > 60 ? 60 : half);
}

// K less the middle of each channel, which changes no softmax, over `balance`, by which Q is multiplied.
inline void code_keys(const Heads& heads, Rows rows, int32_t zero_point, const Head& to, int8_t* codes) {
  spans(rows, to.middles, to.balance);
  float most = 0, odd = 0;
  for (int64_t c = 0; c < rows.width; ++c) {
    const float half = to.balance[c];
    to.balance[c] = root(half);
    most = half / to.balance[c] > most ? half / to.balance[c] : most;
    odd += half * 0.0f;
  }
  const float scale = most > 0 ? most / 127 : 1;
  *to.scale = scale + odd;
  for (int64_t c = 0; c < rows.width; ++c) to.inverses[c] = 1 / (to.balance[c] * scale);
  std::memset(codes, 0, static_cast<size_t>(heads.channels));
  for (int64_t key = 0; key < heads.keys; ++key) {
    int8_t* place = to.keys + key / kLane * kLane * heads.quads * kQuad + key % kLane * kQuad;
    int32_t sum = 0;
    if (key < rows.count)
      sum = code_centered(Blocks(rows.x + key * rows.stride, rows.width), to, codes);
    else if (key == rows.count)
      std::memset(codes, 0, static_cast<size_t>(heads.channels));
    to.less[key] = zero_point * sum;
    for (int64_t quad = 0; quad < heads.quads; ++quad) std::memcpy(place + quad * kStep, codes + quad * kQuad, kQuad);
  }
}

// Four rows of codes side by side.
inline void weave(const int8_t* rows, int64_t stride, int8_t* to) {
  uint32_t words[kLane];
  for (int64_t n = 0; n < kLane; ++n) {
    const auto byte = [&](int64_t k) { return static_cast<uint32_t>(static_cast<uint8_t>(rows[k * stride + n])) << 8 * k; };
    words[n] = byte(0) | byte(1) | byte(2) | byte(3);
  }
  std::memcpy(to, words, sizeof words);
}

inline void code_values(const Heads& heads, Rows rows, const Head& to, int8_t* codes) {
  spans(rows, to.middles, to.scales);
  for (int64_t c = 0; c < rows.width; ++c) {
    to.scales[c] = to.scales[c] == 0 ? 1 : to.scales[c] / 127;
    to.inverses[c] = 1 / to.scales[c];
  }
  for (int64_t key = 0; key < heads.keys; key += kQuad) {
    if (key + kQuad > rows.count) std::memset(codes, 0, static_cast<size_t>(kQuad * heads.channels));
    for (int64_t k = key; k < least(key + kQuad, rows.count); ++k)
      code_centered(Blocks(rows.x + k * rows.stride, rows.width), to, codes + (k - key) * heads.channels);
    for (int64_t block = 0; block < heads.blocks; ++block)
      weave(codes + block * kLane, heads.channels, to.values + (block * heads.keys + key) * kLane);
  }
}

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
    const float inverse = most > 0 ? reach / most : 0;
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

// sums[row] of rows of codes, and of some more: codes * packed weights of `steps` quads and some blocks of 16.
template <class Isa>
void multiply(const uint8_t* const* codes, int64_t rows, int64_t steps, const int8_t* weights, int64_t stride, int64_t blocks,
              int32_t* sums, int64_t width) {
  for (int64_t block = 0; block < blocks; block += Isa::kBlocks) {
    const Tile<Isa> chosen = tile_of<Isa>(least(Isa::kBlocks, blocks - block));
    for (int64_t row = 0; row < rows; row += Isa::kRows)
      chosen(codes + row, 1, steps, 0, steps, INT64_MAX, weights + block * stride, stride, true,
             sums + row * width + block * kLane, width);
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
