// Eight by eight bytes, rows to columns: how codes get from planes to channels last.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int kSquare = 8;

// Swap the upper half of each field of `a` with the lower half of the same field of `b`.
inline void exchange(uint64_t& a, uint64_t& b, int bits, uint64_t mask) {
  const uint64_t moved = ((a >> bits) ^ b) & mask;
  b ^= moved;
  a ^= moved << bits;
}

inline void transpose(const uint8_t* from, int64_t from_row, uint8_t* to, int64_t to_row, uint64_t flip) {
  uint64_t rows[kSquare];
  for (int k = 0; k < kSquare; ++k) {
    std::memcpy(&rows[k], from + k * from_row, sizeof rows[k]);
    rows[k] ^= flip;
  }
  for (int k = 0; k < 4; ++k) exchange(rows[k], rows[k + 4], 32, 0x00000000FFFFFFFFu);
  for (int k = 0; k < 6; k = k == 1 ? 4 : k + 1) exchange(rows[k], rows[k + 2], 16, 0x0000FFFF0000FFFFu);
  for (int k = 0; k < kSquare; k += 2) exchange(rows[k], rows[k + 1], 8, 0x00FF00FF00FF00FFu);
  for (int k = 0; k < kSquare; ++k) std::memcpy(to + k * to_row, &rows[k], sizeof rows[k]);
}

}  // namespace
