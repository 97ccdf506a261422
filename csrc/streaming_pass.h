// The floor of the benchmarks: read two feature maps, write one, and do nothing else. No distillation
// loss that reads a student and a teacher and writes the student's gradient can take less.
#pragma once

#include <cstdint>

namespace maskd {

// out = a - b over `count` floats, written past the caches.
using StreamingDifference = void (*)(const float* a, const float* b, float* out, int64_t count, int threads);

namespace baseline {
void streaming_difference(const float* a, const float* b, float* out, int64_t count, int threads);
}
namespace avx2 {
void streaming_difference(const float* a, const float* b, float* out, int64_t count, int threads);
}
namespace avx512 {
void streaming_difference(const float* a, const float* b, float* out, int64_t count, int threads);
}

}  // namespace maskd
