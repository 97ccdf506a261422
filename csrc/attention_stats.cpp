// CPU kernels of attention_stats. Compiled once per instruction set: MASKD_ISA names the namespace.
#include "attention_stats.h"

namespace maskd {
namespace {

template <typename T>
MASKD_INLINE T magnitude(T x) {
  return x < T(0) ? -x : x;
}

template <typename T>
MASKD_INLINE Vec<T> magnitude(Vec<T> x) {
  return x < T(0) ? -x : x;
}

// The axis across the rows' elements gets sums down the columns, the other one sums along each row.
template <typename T>
void forward(const AttentionStats& problem) {
  const RowBlocks blocks(problem.shape);
  const bool interleaved = problem.shape.interleaved;
  T *attention = static_cast<T*>(problem.attention), *mean = static_cast<T*>(problem.mean);
  const T per_channel = problem.shape.channels > 0 ? T(1) / T(problem.shape.channels) : T(0);
  const T per_pixel = problem.shape.pixels > 0 ? T(1) / T(problem.shape.pixels) : T(0);
  const ColumnSums<T> sums(blocks, true);
  blocks.each([&](int64_t n, int64_t block, int64_t first, int64_t last) {
    alignas(64) T read[kPiece];
    T* column_sums = sums.row(n, block);
    for (int64_t row = first; row < last; ++row) {
      double total = 0;
      blocks.pieces([&](int64_t begin, int64_t count) {
        const T* x = read_run(problem.x, blocks.offset(problem.x, n, row) + begin, count, read);
        T* to = column_sums + begin;
        if (interleaved) {
          total += double(sum_values<T>(
              count, [&](int64_t i) { return magnitude<T>(load(x + i)); },
              [&](int64_t i) { return magnitude<T>(x[i]); }));
          for (int64_t i = 0; i < count; ++i) to[i] += x[i];
        } else {
          total += double(
              sum_values<T>(count, [&](int64_t i) { return Vec<T>(load(x + i)); }, [&](int64_t i) { return x[i]; }));
          for (int64_t i = 0; i < count; ++i) to[i] += magnitude<T>(x[i]);
        }
      });
      if (interleaved) {
        attention[n * problem.shape.pixels + row] = T(total) * per_channel;
      } else {
        mean[n * problem.shape.channels + row] = T(total) * per_pixel;
      }
    }
  });
  sums.total(interleaved ? mean : attention, interleaved ? per_pixel : per_channel);
  if (!interleaved && problem.shape.pixels == 0)
    for (int64_t i = 0; i < problem.shape.batch * problem.shape.channels; ++i) mean[i] = T(0);
}

template <typename T>
void backward(const AttentionStats& problem) {
  const RowBlocks blocks(problem.shape);
  const bool interleaved = problem.shape.interleaved, stream = blocks.streams(problem.grad_x);
  const T *grad_attention = static_cast<const T*>(problem.grad_attention),
          *grad_mean = static_cast<const T*>(problem.grad_mean);
  const T per_channel = T(1) / T(problem.shape.channels > 0 ? problem.shape.channels : 1);
  const T per_pixel = T(1) / T(problem.shape.pixels > 0 ? problem.shape.pixels : 1);
  blocks.each([&](int64_t n, int64_t, int64_t first, int64_t last) {
    alignas(64) T read[kPiece], staged[kPiece], along[kPiece], zeros[kPiece] = {};
    const T* own_attention = grad_attention ? grad_attention + n * problem.shape.pixels : nullptr;
    const T* own_mean = grad_mean ? grad_mean + n * problem.shape.channels : nullptr;
    for (int64_t row = first; row < last; ++row) {
      blocks.pieces([&](int64_t begin, int64_t count) {
        const T* x = read_run(problem.x, blocks.offset(problem.x, n, row) + begin, count, read);
        const int64_t to = blocks.offset(problem.grad_x, n, row) + begin;
        const T* dense = interleaved ? own_mean : own_attention;
        dense = dense ? dense + begin : zeros;
        const T* single = interleaved ? own_attention : own_mean;
        const T value = single ? single[row] : T(0);
        if (interleaved) {
          const T strength = value * per_channel;
          for (int64_t i = 0; i < count; ++i) along[i] = x[i] > T(0) ? strength : x[i] < T(0) ? -strength : T(0);
          write_values(problem.grad_x, to, count, stream, staged,
                       [&](int64_t i) { return along[i] + dense[i] * per_pixel; });
        } else {
          const T constant = value * per_pixel;
          for (int64_t i = 0; i < count; ++i) {
            const T strength = dense[i] * per_channel;
            along[i] = x[i] > T(0) ? strength : x[i] < T(0) ? -strength : T(0);
          }
          write_values(problem.grad_x, to, count, stream, staged, [&](int64_t i) { return along[i] + constant; });
        }
      });
    }
  });
}

}  // namespace

void MASKD_ISA::attention_stats_forward(const AttentionStats& problem) {
  return problem.float64 ? forward<double>(problem) : forward<float>(problem);
}

void MASKD_ISA::attention_stats_backward(const AttentionStats& problem) {
  return problem.float64 ? backward<double>(problem) : backward<float>(problem);
}

}  // namespace maskd
