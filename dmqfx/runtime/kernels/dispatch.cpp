// The C interface: which kernel a machine can run, and how many steps its 16 bit sums surely hold.
#include <ctime>

#include "sets.h"

namespace {

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

int64_t greatest_code(const DmqfxLayer& layer) {
  const int64_t count = layer.batch * layer.height * layer.width * layer.groups * layer.channels;
  uint8_t greatest = 0;
  for (int64_t k = 0; k < count; ++k) greatest = layer.codes[k] > greatest ? layer.codes[k] : greatest;
  for (int64_t k = 0; k < layer.batch; ++k)
    if (layer.zero_points[k] > greatest) greatest = static_cast<uint8_t>(layer.zero_points[k]);
  return greatest;
}

int64_t greatest_shift(const DmqfxLayer& layer) {
  uint8_t greatest = 0;
  const int64_t count = layer.shifts == nullptr ? 0 : layer.batch * layer.groups * layer.given;
  for (int64_t k = 0; k < count; ++k) greatest = layer.shifts[k] > greatest ? layer.shifts[k] : greatest;
  return greatest;
}

double seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);  // other programs may run beside this one
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

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
  if (instruction_set < 0 || instruction_set > kOfAvx512Vnni || !((dmqfx_instruction_sets() >> instruction_set) & 1))
    return kNotHere;
  for (int64_t k = 0; k < layer->batch; ++k)
    if (layer->zero_points[k] < 0 || layer->zero_points[k] > 255) return kBadZeroPoint;
  const int64_t shift = greatest_shift(*layer);
  if (shift > 30 || layer->headroom < 0 || layer->headroom > 7) return kBadShift;
  if (layer->raw != nullptr) arrange(*layer, threads);
  int64_t room = INT64_MAX;
  const InstructionSet* chosen = &named(instruction_set);
  if (instruction_set == kOfAvx2) {
    const int64_t within = shift < layer->headroom ? shift : layer->headroom;  // the sums take the rest
    const int64_t most = (layer->pair << within) * greatest_code(*layer);
    if (most > 0) room = INT16_MAX / most;
    if (room == 0) chosen = &kAvx2Wide;
  }
  return chosen->run(*layer, room, threads) ? kDone : kNoMemory;
}

int dmqfx_code(const DmqfxCoding* coding, int instruction_set, int threads) {
  if (instruction_set < 0 || instruction_set > kOfAvx512Vnni || !((dmqfx_instruction_sets() >> instruction_set) & 1))
    return kNotHere;
  named(instruction_set).code(*coding, threads);
  return kDone;
}

double dmqfx_peak(int instruction_set, int widening) {
  if (!((dmqfx_instruction_sets() >> instruction_set) & 1)) return 0;
  return (instruction_set == kOfAvx2 && widening ? kAvx2Wide : named(instruction_set)).peak(seconds);
}
