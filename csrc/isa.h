// Picks, at run time, which build of the kernels this processor can run.
#pragma once

#include "attention_stats.h"
#include "maskd_loss.h"
#include "receptive_stats.h"
#include "scale_pixels.h"
#include "squared_error.h"
#include "streaming_pass.h"
#include "sum_taps.h"

namespace maskd {

struct Kernels {
  const char* isa;
  ReceptiveForward receptive_forward;
  ReceptiveBackward receptive_backward;
  MaskdLossKernel maskd_loss;
  ScalePixelsKernel scale_pixels_forward, scale_pixels_backward;
  SquaredErrorKernel squared_error_forward, squared_error_backward;
  AttentionStatsKernel attention_stats_forward, attention_stats_backward;
  SumTapsKernel sum_taps;
  StreamingDifference streaming_difference;
};

// The builds this processor can run, best first. `count` receives how many.
const Kernels* available_kernels(int* count);

}  // namespace maskd
