#include "streaming_pass.h"

#include "common.h"

namespace maskd {
namespace MASKD_ISA {

void streaming_difference(const float* a, const float* b, float* out, int64_t count, int threads) {
  constexpr int64_t kBlock = 4096;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    alignas(64) float staged[kBlock];
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kBlock, length = count - begin < kBlock ? count - begin : kBlock;
      for (int64_t i = 0; i < length; ++i) staged[i] = a[begin + i] - b[begin + i];
      stream_bytes(out + begin, staged, length * int64_t(sizeof(float)));
    }
    stream_fence();
  }
}

}  // namespace MASKD_ISA
}  // namespace maskd
