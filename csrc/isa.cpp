#include "isa.h"

namespace maskd {
namespace {

#define MASKD_KERNELS(isa)        \
  {#isa,                          \
   isa::receptive_forward,        \
   isa::receptive_backward,       \
   isa::maskd_loss,               \
   isa::scale_pixels_forward,     \
   isa::scale_pixels_backward,    \
   isa::squared_error_forward,    \
   isa::squared_error_backward,   \
   isa::attention_stats_forward,  \
   isa::attention_stats_backward, \
   isa::sum_taps,                 \
   isa::streaming_difference}

const Kernels kBuilds[] = {
#if defined(__x86_64__)
    MASKD_KERNELS(avx512),
    MASKD_KERNELS(avx2),
#endif
    MASKD_KERNELS(baseline),
};
constexpr int kCount = sizeof(kBuilds) / sizeof(kBuilds[0]);

}  // namespace

const Kernels* available_kernels(int* count) {
  int first = 0;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  first = avx512 ? 0 : avx2 ? 1 : 2;
#endif
  *count = kCount - first;
  return kBuilds + first;
}

}  // namespace maskd
