// Codes as the kernels read them: the channels of a pixel side by side, each group filled up to whole quads; where they are
// few, those under all taps.
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

constexpr int64_t kFew = 16;  // channels that are gathered

// Bytes of a table of pixels.
int64_t table_of(const DmqfxLayer& layer) { return layer.taps[1] * layer.out_width * static_cast<int64_t>(sizeof(int64_t)); }

// What lies under the taps of a line of positions; `pixels` [taps across, out_width] say where in its line.
template <int64_t kChannels>
void gather_line(const DmqfxLayer& layer, int64_t image, int64_t down, const int64_t* pixels, uint8_t* to) {
  uint8_t padding[kFew];
  std::memset(padding, layer.zero_points[row_of(layer, image)], sizeof padding);
  const uint8_t* codes = layer.codes + image * layer.height * layer.width * kChannels;
  const int64_t under = layer.taps[0] * layer.taps[1] * kChannels;
  for (int64_t high = 0; high < layer.taps[0]; ++high) {
    const int64_t line = line_of(layer, down, high);
    for (int64_t wide = 0; wide < layer.taps[1]; ++wide, to += kChannels)
      for (int64_t k = 0; k < layer.out_width; ++k) {
        const int64_t at = line < 0 ? -1 : pixels[wide * layer.out_width + k];
        std::memcpy(to + k * under, at < 0 ? padding : codes + (line * layer.width + at) * kChannels, kChannels);
      }
  }
}

}  // namespace

int64_t gathered(const DmqfxLayer& layer) {
  constexpr int64_t kUnder = 256, kMost = 1 << 26;
  const int64_t taps = layer.taps[0] * layer.taps[1], under = taps * layer.channels;
  const int64_t bytes = layer.batch * layer.out_height * layer.out_width * under;
  const bool few = layer.channels <= kFew && taps > 1 && under <= kUnder && bytes > 0 && bytes <= kMost;
  return few && layer.groups == 1 && layer.shifts == nullptr && layer.folded == 0 ? bytes + table_of(layer) : 0;
}

DmqfxLayer gather(const DmqfxLayer& layer, void* room, int threads) {
  auto* pixels = static_cast<int64_t*>(room);
  for (int64_t wide = 0; wide < layer.taps[1]; ++wide)
    for (int64_t k = 0; k < layer.out_width; ++k) pixels[wide * layer.out_width + k] = pixel_of(layer, k, wide);
  auto* codes = static_cast<uint8_t*>(room) + table_of(layer);
  const auto line = layer.channels == 4 ? gather_line<4> : layer.channels == 8 ? gather_line<8>
                    : layer.channels == 12 ? gather_line<12> : gather_line<kFew>;
  DmqfxLayer flat = of_one_tap(layer, layer.out_height, layer.out_width);
  flat.codes = codes;
  flat.raw = nullptr;
  flat.given = flat.channels = layer.taps[0] * layer.taps[1] * layer.channels;
  const int64_t lines = layer.batch * layer.out_height, length = layer.out_width * flat.channels;
  threads = lines * length > 65536 ? threads : 1;
#pragma omp parallel for num_threads(threads > 1 ? threads : 1) if (threads > 1)
  for (int64_t k = 0; k < lines; ++k) line(layer, k / layer.out_height, k % layer.out_height, pixels, codes + k * length);
  return flat;
}

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
