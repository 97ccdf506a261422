// Picks, at run time, which build of the kernels this processor can run.
#pragma once

#include "receptive_stats.h"
#include "streaming_pass.h"

namespace maskd {

struct Kernels {
  const char* isa;
  ReceptiveForward receptive_forward;
  ReceptiveBackward receptive_backward;
  StreamingDifference streaming_difference;
};

// The builds this processor can run, best first. `count` receives how many.
const Kernels* available_kernels(int* count);

}  // namespace maskd
