// What attention reads: keys and values of each head as codes that lie packed as weights do, with scales of their own.
//
// Plain C++ in a fixed order of operations, as in code.h. Internal linkage, as in tile.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "code.h"
#include "desk.h"
#include "layer.h"

namespace {

constexpr int64_t kPadded = 64;     // scores that are coded at once, at most
constexpr float kTiny = 1e-30f;     // what is smaller counts as 0: one over it could be infinite

// To the nearest whole number of -reach..reach, ties to even; reach where x is not a number.
inline int32_t whole(float x, float reach) {
  const float shifted = bounded(x, -reach, reach) + kRounder;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4B400000;
}

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
      const float half = (high[c] - low[c]) * 0.5f;
      halves[from + c] = (half < kTiny ? 0 : half) + odd[c];
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
  const float scale = most >= kTiny ? most / 127 : 1;
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

}  // namespace
