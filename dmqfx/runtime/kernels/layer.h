// The C interface: one integer layer, the coding of its input, the packing of its weights, or attention, called through ctypes.
// Every field is eight bytes, or a pair of four, so that both sides agree.
#pragma once

#include <cstdint>

extern "C" {

struct DmqfxCoding;

constexpr int kLane = 16;  // output channels of a block of packed weights
constexpr int kQuad = 4;   // input channels of a step
constexpr int kStep = kLane * kQuad;

enum { kDoubled = 9, kRuns = 17 };  // lengths of runs of steps that are bounded: 1, 2, 4, ... 256, and 3, 6, 12, ... 384

// A convolution of codes with packed codes; a linear layer is one of a single tap over rows of height 1.
struct DmqfxLayer {
  int64_t batch, height, width;       // of the input
  int64_t groups, channels;           // input channels of one group, filled up to a multiple of 4
  int64_t given;                      // those that there are
  int64_t out_channels;               // of one group
  int64_t taps[2], stride[2], padding[2], dilation[2];
  int64_t upsampled[2];               // sizes that the input is read as if it had, from nearest neighbours
  float steps[2];                     // how far apart those lie in the input
  int64_t out_height, out_width;
  int64_t nibbles;                    // whether two weights share a byte
  int64_t folded;                     // whether `weights`, `sums` and `runs` are those of a layer of one tap, whose output
                                      // channels are this one's under every tap, [taps, out_channels]; of one group
  int64_t pair;                       // the greatest magnitude that two neighbouring weights make of codes of 0 or 1
  const int32_t* runs;                // [groups, blocks of 16, kRuns], that those of a block in every step of a run make of
                                      // codes of -1 to 1; it begins at a multiple of its length, from
                                      // the first step of the layer
  int64_t headroom;                   // bits by which every weight can be shifted within its 8
  int64_t planes;                     // whether `raw` has its channels outside, [batch, groups * given, height, width]
  int64_t flip;                       // 128 to make signed codes unsigned, else 0
  const uint8_t* raw;                 // codes that have to be arranged first, or null
  uint8_t* codes;                     // [batch, height, width, groups * channels]
  int64_t timestep_groups;            // rows of the next tables
  const int64_t* group;               // [batch], the row of each sample, or null: the first
  const int32_t* zero_points;         // [timestep groups], 0..255; padding stands for it
  const float* input_scales;          // [timestep groups]
  const uint8_t* shifts;              // [timestep groups, groups * given], bits by which centered codes are shifted, or null
  const uint8_t* weights;             // [groups, blocks of 16, taps, channels / 4, 16, 4]
  const int32_t* sums;                // [groups * out_channels], of the weights of an output channel
  const float* weight_scales;         // [groups * out_channels]
  const float* biases;                // [groups * out_channels] or null
  const float* added;                 // added to each result, or null; channels side by side
  int64_t added_image, added_position;  // its strides, in elements; 0 where all have the same
  float* real;                        // where (sum - zero point * sum of weights) * scales + bias goes, or null
  int32_t* integer;                   // where the sum alone goes, if not; both [batch, positions, groups * out_channels]
  const DmqfxCoding* coding;          // what the real numbers become, with no norm, instead of `real`; or null. GEGLU takes
                                      // halves of whole blocks, of one group
};

enum DmqfxNorm { kNoNorm = 0, kGroupNorm = 1, kLayerNorm = 2 };

enum DmqfxActivation { kNoActivation = 0, kSilu = 1, kGelu = 2, kGeglu = 3 };  // GEGLU: x * gelu(gate)

// Real numbers to codes, channels last: clamp(round(activation(norm(x)) / scale) + zero point), both where asked.
struct DmqfxCoding {
  int64_t batch, channels, positions;  // positions of one sample
  int64_t planes;                      // whether x is [batch, channels, positions], else [batch, positions, channels],
                                       // and for GEGLU, which is of rows alone, [batch, positions, 2, channels]
  int64_t split;                       // channels of x, where the others are in `beside`; rows alone
  int64_t norm, norm_groups;           // kLayerNorm of rows that are not split
  int64_t activation;
  int64_t scale_channels, zero_point_channels;  // 1 or channels
  int64_t least, greatest;             // codes
  double eps;
  const float* x;
  const float* beside;                 // or null
  const float* gammas;                 // [channels], of a norm
  const float* betas;                  // [channels], of a norm
  const float* scales;                 // [timestep groups, scale_channels]
  const int32_t* zero_points;          // [timestep groups, zero_point_channels]
  int64_t timestep_groups;             // rows of scales and zero points
  const int64_t* group;                // [batch], which of them, or null: the first
  uint8_t* codes;                      // [batch, positions, channels]; signed ones in two's complement
  float* real;                         // or null: where the numbers go that codes would be of, of silu(group norm) of rows
  const float* multipliers;            // or null: of what a group norm makes, [channels] of each image
  const float* addends;                // or null: what is added to that, likewise
  int64_t of_multipliers, of_addends;  // from image to image
};

// Codes of a weight to the form in which layers read them.
struct DmqfxPacking {
  int64_t groups, out_channels, channels, taps;  // channels of one group
  int64_t nibbles;                     // whether two codes share a byte: all lie in -8..7
  const int8_t* raw;                   // [groups * out_channels, channels, taps]
  uint8_t* weights;                    // as DmqfxLayer has them
  int32_t* sums;
  int32_t* pair;                       // [1] and [groups, blocks, kRuns], as DmqfxLayer has them
  int32_t* runs;
};

// softmax(q k^T * scale) v, head by head, in codes or real numbers; the channels of a head lie side by side.
struct DmqfxAttention {
  int64_t batch, heads, queries, keys, width;  // width: channels of a head
  int64_t bits;                        // 2..8, of the codes of Q and of the softmax; those of K and V have 8. 0: none are made
  double scale;                        // not negative
  int64_t of_q[3], of_k[3], of_v[3], of_out[3];  // strides of samples, heads and rows, in elements
  const float* q;
  const float* k;
  const float* v;
  float* out;
};

// One call of several: a DmqfxLayer (kind 0), DmqfxCoding (1) or DmqfxAttention (2).
struct DmqfxStep {
  int64_t kind;
  const void* what;
};

#define DMQFX_EXPORT __attribute__((visibility("default")))

enum DmqfxStatus { kDone = 0, kNotHere = 1, kBadZeroPoint = 2, kNoMemory = 3, kBadShift = 4, kBadGroup = 5 };

// Which of the instruction sets 0 (scalar), 1 (AVX2) and 2 (AVX-512 VNNI) this machine and this build have, as bits.
DMQFX_EXPORT int dmqfx_instruction_sets(void);
DMQFX_EXPORT int dmqfx_has_threads(void);
DMQFX_EXPORT int64_t dmqfx_layer_size(void);  // whether a caller means the same struct
DMQFX_EXPORT int64_t dmqfx_coding_size(void);
DMQFX_EXPORT int dmqfx_run(const DmqfxLayer* layer, int instruction_set, int threads);
DMQFX_EXPORT int dmqfx_code(const DmqfxCoding* coding, int instruction_set, int threads);
DMQFX_EXPORT int64_t dmqfx_packing_size(void);
DMQFX_EXPORT int64_t dmqfx_attention_size(void);
DMQFX_EXPORT int dmqfx_attend(const DmqfxAttention* attention, int instruction_set, int threads);
// One behind the other; the status of the first that is not done.
DMQFX_EXPORT int dmqfx_run_all(const DmqfxStep* steps, int64_t count, int instruction_set, int threads);
DMQFX_EXPORT void dmqfx_pack(const DmqfxPacking* packing, int threads);
// 10^9 multiply-adds a second of the innermost instructions alone, on one thread: what a layer is measured against.
DMQFX_EXPORT double dmqfx_peak(int instruction_set, int widening);
}
