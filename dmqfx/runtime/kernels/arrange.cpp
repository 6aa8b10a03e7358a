// Codes as the kernels read them: the channels of a pixel side by side, each group filled up to whole quads.
#include <cstring>

#include "sets.h"
#include "square.h"

namespace {

struct Block {
  int64_t first, count;  // positions
};

// Channels of one group of one image, from planes.
void from_planes(const DmqfxLayer& layer, const uint8_t* from, uint8_t* to, Block block) {
  const int64_t plane = layer.height * layer.width, pixel = layer.groups * layer.channels;
  const uint64_t flips = 0x0101010101010101u * static_cast<uint64_t>(layer.flip);
  const int64_t whole = layer.given / kSquare * kSquare, squares = block.count / kSquare * kSquare;
  from += block.first;
  to += block.first * pixel;
  for (int64_t c = 0; c < whole; c += kSquare)
    for (int64_t k = 0; k < squares; k += kSquare)
      transpose(from + c * plane + k, plane, to + k * pixel + c, pixel, flips);
  for (int64_t c = 0; c < layer.given; ++c)
    for (int64_t k = c < whole ? squares : 0; k < block.count; ++k)
      to[k * pixel + c] = static_cast<uint8_t>(from[c * plane + k] ^ layer.flip);
}

void from_pixels(const DmqfxLayer& layer, const uint8_t* from, uint8_t* to, Block block) {
  const int64_t pixel = layer.groups * layer.channels, given = layer.groups * layer.given;
  for (int64_t k = block.first; k < block.first + block.count; ++k)
    for (int64_t c = 0; c < layer.given; ++c)
      to[k * pixel + c] = static_cast<uint8_t>(from[k * given + c] ^ layer.flip);
}

void fill(const DmqfxLayer& layer, uint8_t* to, Block block) {
  const int64_t pixel = layer.groups * layer.channels, more = layer.channels - layer.given;
  for (int64_t k = block.first; more > 0 && k < block.first + block.count; ++k)
    std::memset(to + k * pixel + layer.given, 0, static_cast<size_t>(more));
}

}  // namespace

void arrange(const DmqfxLayer& layer, int threads) {
  constexpr int64_t kPositions = 64;
  const int64_t positions = layer.height * layer.width, blocks = (positions + kPositions - 1) / kPositions;
  const int64_t given = layer.groups * layer.given * positions, made = layer.groups * layer.channels * positions;
  const int64_t count = layer.batch * layer.groups * blocks;
  threads = layer.batch * made > 65536 ? threads : 1;  // less is not worth a team
#pragma omp parallel for num_threads(threads > 1 ? threads : 1) if (threads > 1)
  for (int64_t k = 0; k < count; ++k) {
    const int64_t outer = k / blocks, image = outer / layer.groups, group = outer % layer.groups;
    const int64_t first = k % blocks * kPositions, left = positions - first;
    const Block block{first, left < kPositions ? left : kPositions};
    const uint8_t* from = layer.raw + image * given + group * layer.given * (layer.planes ? positions : 1);
    uint8_t* to = layer.codes + image * made + group * layer.channels;
    (layer.planes ? from_planes : from_pixels)(layer, from, to, block);
    fill(layer, to, block);
  }
}
