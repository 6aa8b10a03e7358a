// Real numbers to codes, written once: what is done to one number, and to a line of them.
//
// Plain C++ in a fixed order of operations, which the compiler vectorises for the instruction set of the file that
// includes this: every set gives the same bits. Internal linkage, as in tile.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "layer.h"

// Loops with calls in them are not vectorised.
#define DMQFX_INLINE inline __attribute__((always_inline))

namespace {

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds to the nearest, ties to even
constexpr int kLong = 64, kMiddle = 32, kShort = 16;  // numbers coded at once: loops of fixed length have no slow end

DMQFX_INLINE float bounded(float x, float low, float high) {
  const float below = x < high ? x : high;  // also where x is not a number
  return below > low ? below : low;
}

DMQFX_INLINE int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// What numbers are bounded by: codes; powers of 2; what silu is of, below which it is 0 to any grid, but e^-x would not
// hold. The compiler does not see their values, or it would make cases of these.
struct Limits {
  float least, greatest, least_power, least_silu;
};

// e^x for x up to 88, to 2e-7 and 1e-7 |x|, relatively; below -87 that of -87. 2^n times 2^f, f within half, whose
// polynomial is off by 9.2e-8 at most and has its exponent moved by n, the last bits of `shifted`.
DMQFX_INLINE float exponential(float x, Limits limits) {
  const float power = x * 1.44269504f, y = power > limits.least_power ? power : limits.least_power;
  const float shifted = y + kRounder, f = y - (shifted - kRounder);
  float series = 1.32647273e-3f;
  series = series * f + 9.67151299e-3f;
  series = series * f + 5.55073358e-2f;
  series = series * f + 2.40222424e-1f;
  series = series * f + 6.93147004e-1f;
  series = series * f + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(bits_of(series)) + (static_cast<uint32_t>(bits_of(shifted)) << 23);
  float made;
  std::memcpy(&made, &bits, sizeof made);
  return made;
}

// What an activation divides, and by what. The division and what follows is a loop of its own: a processor looks ahead no
// further than a few numbers, each of which waits for its own last result.
struct Ratio {
  float over, under;
};

// x / (1 + e^-x).
DMQFX_INLINE Ratio silu_of(float x, Limits limits) {
  const float y = x > limits.least_silu ? x : limits.least_silu;
  return {y, 1.0f + exponential(-y, limits)};
}

// The share of the normal distribution below x, less a half, to 3e-7. It is odd: x times a rational function of x^2, fitted
// for the least greatest error within kFar; beyond, the share is 0 or 1 to 1e-7.
constexpr float kFar = 5.2f;
DMQFX_INLINE Ratio share_of(float x) {
  const float y = bounded(x, -kFar, kFar), square = y * y;
  float above = 5.84046438e-6f, below = 5.01887087e-7f;
  above = above * square + 3.14254983e-4f;
  below = below * square + 1.12737507e-4f;
  above = above * square + 5.51868323e-3f;
  below = below * square + 2.70370208e-3f;
  above = above * square + 4.95927893e-2f;
  below = below * square + 3.73394266e-2f;
  above = above * square + 3.98941904e-1f;
  below = below * square + 2.90971458e-1f;
  return {y * above, below * square + 1.0f};
}

template <int kActivation>
DMQFX_INLINE Ratio ratio_of(float x, float gate, Limits limits) {
  if constexpr (kActivation == kSilu) return silu_of(x, limits);
  return share_of(kActivation == kGeglu ? gate : x);
}

// x times its share, which would not be quite 0 of a number far below.
DMQFX_INLINE float gelu(float x, Ratio ratio) {
  return (x < -kFar ? -kFar : x) * (0.5f + ratio.over / ratio.under);
}

template <int kActivation>
DMQFX_INLINE float activated(float x, float gate, Ratio ratio) {
  if constexpr (kActivation == kSilu) return ratio.over / ratio.under;
  return kActivation == kGeglu ? x * gelu(gate, ratio) : gelu(x, ratio);
}

// Where quantize is all that is done, numbers are divided by the scale, else multiplied by its reciprocal.
constexpr bool divides(int norm, int activation) { return norm == kNoNorm && activation == kNoActivation; }

// One number in the place of many.
template <class Number>
struct One {
  Number value;
  Number operator[](int) const { return value; }
};

// What belongs to each number of a line, arrays or `One`: the numbers, which may be made as they are read; gates for GEGLU;
// times and pluses of a norm, and for a layer norm gammas and betas behind them; steps, which are scales or reciprocals, and
// zero points.
template <class Numbers, class Moment, class Weights, class Steps, class ZeroPoints>
struct Line {
  Numbers x;
  const float* gates;
  Moment times, pluses;
  Weights gammas, betas;
  Steps steps;
  ZeroPoints zero_points;
};

// Codes; or the numbers themselves, where `to` is of such.
template <int kNorm, int kActivation, int kCount, class Known, class Made>
DMQFX_INLINE void code_vector(const Known& line, Limits limits, Made* to) {
  float normed[kCount], overs[kCount], unders[kCount];
  [[maybe_unused]] int32_t codes[kCount];
  [[maybe_unused]] int16_t halves[kCount];
  constexpr bool kSame = std::is_same_v<decltype(Known::zero_points), One<float>>;
  const auto given = [&](int k) {
    float y = line.x[k];
    if constexpr (kNorm != kNoNorm) y = y * line.times[k] + line.pluses[k];
    if constexpr (kNorm == kLayerNorm) y = y * line.gammas[k] + line.betas[k];
    return y;
  };
  const auto gate = [&](int k) { return kActivation == kGeglu ? line.gates[k] : 0; };
  for (int k = 0; kActivation != kNoActivation && k < kCount; ++k) {
    normed[k] = given(k);
    const Ratio ratio = ratio_of<kActivation>(normed[k], gate(k), limits);
    overs[k] = ratio.over;
    unders[k] = ratio.under;
  }
  for (int k = 0; k < kCount; ++k) {
    float y;
    if constexpr (kActivation == kNoActivation)
      y = given(k);
    else
      y = activated<kActivation>(normed[k], gate(k), {overs[k], unders[k]});
    if constexpr (sizeof(Made) > 1) {
      to[k] = y + (normed[k] - normed[k]);  // what is not finite stays so
    } else {
      y = divides(kNorm, kActivation) ? y / line.steps[k] : y * line.steps[k];
      const float zero_point = line.zero_points[k];
      const float whole = bounded(y, limits.least - zero_point, limits.greatest - zero_point) + kRounder;
      codes[k] = kSame ? bits_of(whole) : bits_of(whole + zero_point);  // the last byte is the code, or that less the zero point
    }
  }
  if constexpr (sizeof(Made) == 1) {
    for (int k = 0; k < kCount; ++k) halves[k] = static_cast<int16_t>(codes[k]);  // in two steps: fewer shuffles
    const auto more = static_cast<uint8_t>(kSame ? static_cast<int32_t>(line.zero_points[0]) : 0);
    for (int k = 0; k < kCount; ++k) to[k] = static_cast<uint8_t>(static_cast<uint8_t>(halves[k]) + more);
  }
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

template <int kNorm, int kActivation, class Known, class Made>
inline void code_line(const Known& line, Limits limits, int64_t count, Made* to) {
  const auto from = [&](int64_t n) -> Known {
    return {behind(line.x, n), behind(line.gates, n), behind(line.times, n), behind(line.pluses, n),
            behind(line.gammas, n), behind(line.betas, n), behind(line.steps, n), behind(line.zero_points, n)};
  };
  int64_t n = 0;
  for (; n + kLong <= count; n += kLong) code_vector<kNorm, kActivation, kLong>(from(n), limits, to + n);
  for (; n + kMiddle <= count; n += kMiddle) code_vector<kNorm, kActivation, kMiddle>(from(n), limits, to + n);
  for (; n < count; n += kShort) {  // arrays of everything: with `One` a loop so short is not vectorised
    const int64_t left = count - n;
    float rooms[8][kShort];
    Made last[kShort];
    const Line<const float*, const float*, const float*, const float*, const float*> next{
        few(line.x, n, left, rooms[0]),      few(line.gates, n, left, rooms[1]),  few(line.times, n, left, rooms[2]),
        few(line.pluses, n, left, rooms[3]), few(line.gammas, n, left, rooms[4]), few(line.betas, n, left, rooms[5]),
        few(line.steps, n, left, rooms[6]),  few(line.zero_points, n, left, rooms[7])};
    code_vector<kNorm, kActivation, kShort>(next, limits, left < kShort ? last : to + n);
    if (left < kShort) std::memcpy(to + n, last, static_cast<size_t>(left) * sizeof(Made));
  }
}

}  // namespace
