// The C interface: which kernel a machine can run, and which sums a layer takes.
#include <cstdlib>
#include <ctime>
#include <memory>

#include "sets.h"

namespace {

constexpr int64_t kFewRows = 4;  // positions that are not worth finding what 16 bit sums of the weights begin with
constexpr int64_t kFew = 3;  // steps of 16 bit sums that are not worth their flushes

constexpr int64_t kAlone = 1 << 17;  // codes that one thread reads as fast as a team

enum { kOfScalar = 0, kOfAvx2 = 1, kOfAvx512Vnni = 2 };

bool cpu_has(int instruction_set) {
#if defined(__x86_64__) || defined(__i386__)
  if (instruction_set == kOfAvx2) return __builtin_cpu_supports("avx2") != 0;
  if (instruction_set == kOfAvx512Vnni)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  return instruction_set == kOfScalar;
}

const InstructionSet& named(int instruction_set) {
  if (instruction_set == kOfAvx512Vnni) return kAvx512Vnni;
  return instruction_set == kOfAvx2 ? kAvx2 : kScalar;
}

bool here(int instruction_set) {
  return instruction_set >= 0 && instruction_set <= kOfAvx512Vnni && ((dmqfx_instruction_sets() >> instruction_set) & 1) != 0;
}

bool known(const int64_t* group, int64_t batch, int64_t rows) {
  for (int64_t k = 0; group != nullptr && k < batch; ++k)
    if (group[k] < 0 || group[k] >= rows) return false;
  return true;
}

struct Range {
  int32_t least = 255, greatest = 0;

  void take(int32_t code) {
    if (code < least) least = code;
    if (code > greatest) greatest = code;
  }
};

// Of the codes of the input; padding is a zero point.
Range range_of(const DmqfxLayer& layer, int threads) {
  const int64_t count = layer.batch * layer.height * layer.width * layer.groups * layer.channels;
  uint8_t least = 255, greatest = 0;
  const int team = threads > 1 && count > kAlone ? threads : 1;
#pragma omp parallel for reduction(min : least) reduction(max : greatest) num_threads(team) if (team > 1)
  for (int64_t k = 0; k < count; ++k) {
    least = layer.codes[k] < least ? layer.codes[k] : least;
    greatest = layer.codes[k] > greatest ? layer.codes[k] : greatest;
  }
  Range range{least, greatest};
  for (int64_t k = 0; k < layer.batch; ++k) range.take(layer.zero_points[row_of(layer, k)]);
  return range;
}

int64_t greatest_shift(const DmqfxLayer& layer) {
  uint8_t greatest = 0;
  const int64_t given = layer.groups * layer.given;
  for (int64_t k = 0; layer.shifts != nullptr && k < layer.batch; ++k) {
    const uint8_t* shifts = layer.shifts + row_of(layer, k) * given;
    for (int64_t c = 0; c < given; ++c) greatest = shifts[c] > greatest ? shifts[c] : greatest;
  }
  return greatest;
}

// Codes less their middle. Two products saturate, so that the pair itself has to fit; sums of pairs wrap around, so only what a
// run comes to has to.
Room room_of(const DmqfxLayer& layer, int64_t shift, int threads) {
  const int64_t within = shift < layer.headroom ? shift : layer.headroom;  // the sums take the rest
  const Range range = range_of(layer, threads);
  const int32_t half = (range.greatest - range.least + 1) / 2;
  return {int64_t{half} << within, range.least + half, layer.pair * (int64_t{range.greatest} << within) <= INT16_MAX};
}

// Whether sums of 32 bits are faster, since others would hold few steps.
bool is_middle(const DmqfxLayer& layer, int64_t reach) {
  if (layer.batch * layer.out_height * layer.out_width < kFewRows) return true;
  Runs runs;
  const int64_t wide = layer.out_channels * (layer.folded != 0 ? layer.taps[0] * layer.taps[1] : 1);
  const int64_t blocks = layer.groups * ((wide + kLane - 1) / kLane);
  for (int64_t k = 0; k < blocks; ++k) runs.join(layer.runs + k * kRuns);
  return runs.steps(reach) < kFew;
}

double seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);  // other programs may run beside this one
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

const float kLeastPower = -126, kLeastSilu = -88;

int dmqfx_instruction_sets(void) {
  int found = 0;
  for (int k = kOfScalar; k <= kOfAvx512Vnni; ++k)
    if (cpu_has(k) && named(k).run != nullptr) found |= 1 << k;
  return found;
}

int dmqfx_has_threads(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

int64_t dmqfx_coding_size(void) { return sizeof(DmqfxCoding); }

int64_t dmqfx_layer_size(void) { return sizeof(DmqfxLayer); }

int dmqfx_run(const DmqfxLayer* layer, int instruction_set, int threads) {
  if (!here(instruction_set)) return kNotHere;
  if (layer->batch == 0) return kDone;
  const DmqfxCoding* coding = layer->coding;
  if (!known(layer->group, layer->batch, layer->timestep_groups)) return kBadGroup;
  if (coding != nullptr && !known(coding->group, layer->batch, coding->timestep_groups)) return kBadGroup;
  for (int64_t k = 0; k < layer->batch; ++k) {
    const int32_t zero_point = layer->zero_points[row_of(*layer, k)];
    if (zero_point < 0 || zero_point > 255) return kBadZeroPoint;
  }
  const int64_t shift = greatest_shift(*layer);
  if (shift > 30 || layer->headroom < 0 || layer->headroom > 7) return kBadShift;
  if (layer->raw != nullptr) arrange(*layer, threads);
  Room room;
  const InstructionSet* chosen = &named(instruction_set);
  if (instruction_set == kOfAvx2) {
    room = room_of(*layer, shift, threads);
    if (!room.pairs_fit)
      chosen = &kAvx2Wide;
    else if (is_middle(*layer, room.reach))
      chosen = &kAvx2Middle;
  }
  const int64_t bytes = gathered(*layer);
  const std::unique_ptr<void, decltype(&std::free)> own(bytes > 0 ? std::malloc(static_cast<size_t>(bytes)) : nullptr, &std::free);
  if (own == nullptr) return chosen->run(*layer, room, threads) ? kDone : kNoMemory;
  return chosen->run(gather(*layer, own.get(), threads), room, threads) ? kDone : kNoMemory;
}

int dmqfx_code(const DmqfxCoding* coding, int instruction_set, int threads) {
  if (!here(instruction_set)) return kNotHere;
  if (!known(coding->group, coding->batch, coding->timestep_groups)) return kBadGroup;
  return named(instruction_set).code(*coding, threads) ? kDone : kNoMemory;
}

int64_t dmqfx_attention_size(void) { return sizeof(DmqfxAttention); }

int dmqfx_attend(const DmqfxAttention* attention, int instruction_set, int threads) {
  if (!here(instruction_set)) return kNotHere;
  const InstructionSet* chosen = &named(instruction_set);
  if (attention->bits == 0) return chosen->average(*attention, threads) ? kDone : kNoMemory;
  if (instruction_set == kOfAvx2)  // two products of a code with 127 and -127 fit 16 bits, of 7 bits alone
    chosen = attention->bits < 8 ? &kAvx2Middle : &kAvx2Wide;
  return chosen->attend(*attention, threads) ? kDone : kNoMemory;
}

int dmqfx_run_all(const DmqfxStep* steps, int64_t count, int instruction_set, int threads) {
  for (const DmqfxStep* step = steps; step < steps + count; ++step) {
    int status = kDone;
    if (step->kind == 0) status = dmqfx_run(static_cast<const DmqfxLayer*>(step->what), instruction_set, threads);
    if (step->kind == 1) status = dmqfx_code(static_cast<const DmqfxCoding*>(step->what), instruction_set, threads);
    if (step->kind == 2) status = dmqfx_attend(static_cast<const DmqfxAttention*>(step->what), instruction_set, threads);
    if (status != kDone) return status;
  }
  return kDone;
}

double dmqfx_peak(int instruction_set, int widening) {
  if (!here(instruction_set)) return 0;
  return (instruction_set == kOfAvx2 && widening ? kAvx2Wide : named(instruction_set)).peak(seconds);
}
