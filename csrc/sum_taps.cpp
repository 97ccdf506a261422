// CPU kernel of sum_taps. Compiled once per instruction set: MASKD_ISA names the namespace.
#include "sum_taps.h"

namespace maskd {
namespace {

constexpr int64_t kChannels = 256;  // accumulated at a time, in the L1 cache

void pixel(const SumTaps& problem, int64_t y, int64_t x) {
  const float* rows[9];
  int count = 0;
  for (int64_t i = 0; i < 3; ++i) {
    for (int64_t j = 0; j < 3; ++j) {
      const int64_t row = y + i - 1, column = x + j - 1;
      if (row < 0 || row >= problem.height || column < 0 || column >= problem.width) continue;
      const int64_t slot = problem.slot[row * problem.width + column];
      if (slot >= 0) rows[count++] = problem.table + (slot * 9 + 3 * i + j) * problem.channels;
    }
  }
  float* out = problem.out + (y * problem.width + x) * problem.channels;
  for (int64_t begin = 0; begin < problem.channels; begin += kChannels) {
    const int64_t length = problem.channels - begin < kChannels ? problem.channels - begin : kChannels;
    alignas(64) float sum[kChannels];
    std::memcpy(sum, problem.bias + begin, size_t(length) * sizeof(float));
    for (int r = 0; r < count; ++r)
      for (int64_t c = 0; c < length; ++c) sum[c] += rows[r][begin + c];
    std::memcpy(out + begin, sum, size_t(length) * sizeof(float));
  }
}

}  // namespace

void MASKD_ISA::sum_taps(const SumTaps& problem) {
  const int64_t elements = problem.height * problem.width * problem.channels;
  const int threads = elements < kSerialElements || problem.threads < 1 ? 1 : problem.threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t y = 0; y < problem.height; ++y)
    for (int64_t x = 0; x < problem.width; ++x) pixel(problem, y, x);
}

}  // namespace maskd
