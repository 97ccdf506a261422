// CPU kernels of attention_stats. Compiled once per instruction set: MASKD_ISA names the namespace.
#include "attention_stats.h"

namespace maskd {
namespace {

template <typename T>
MASKD_INLINE T magnitude(T x) {
  return x < T(0) ? -x : x;
}

MASKD_INLINE Vec<float> magnitude(Vec<float> x) {
  return reinterpret_cast<Vec<float>>(reinterpret_cast<BitsVec>(x) & 0x7fffffffu);
}

MASKD_INLINE Vec<double> magnitude(Vec<double> x) { return x < 0 ? -x : x; }

constexpr int64_t kRows = 8;   // taken together: the sums down the columns are loaded and stored once for all
constexpr int64_t kAhead = 4;  // times kRows: how far ahead short rows are fetched, which the processor does not follow

// Adds kCount rows to the sums down their columns, and to `along` the sums of each row. Magnitudes are summed over
// channels, values over pixels.
template <typename T, int64_t kCount, bool kInterleaved, typename Stored>
MASKD_INLINE void add_rows(const Stored* x, int64_t stride, int64_t count, T* down, double* along) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> sums[kRows];
  for (Vec<T>& sum : sums) sum = Vec<T>{};
  const auto sum_up = [&](Vec<T> total, auto value_of_row) {
    for (int64_t r = 0; r < kCount; ++r) {
      const Vec<T> value = value_of_row(x + r * stride), strength = magnitude(value);
      total += kInterleaved ? value : strength;
      sums[r] += kInterleaved ? strength : value;
    }
    return total;
  };
  int64_t i = 0;
  for (; i + L <= count; i += L)
    store(down + i, sum_up(load(down + i), [&](const Stored* row) { return load(row + i); }));
  T row_sums[kRows];
  lane_sums(sums, row_sums);
  for (; i < count; ++i) {
    for (int64_t r = 0; r < kCount; ++r) {
      const T value = T(value_of(x[r * stride + i])), strength = magnitude(value);
      down[i] += kInterleaved ? value : strength;
      row_sums[r] += kInterleaved ? strength : value;
    }
  }
  for (int64_t r = 0; r < kCount; ++r) along[r] += double(row_sums[r]);
}

template <typename T, bool kInterleaved>
void add_block(const AttentionStats& problem, const RowBlocks& blocks, int64_t n, int64_t first, int64_t last, T* down,
               T* along, T per_entry) {
  const int64_t stride = blocks.offset(problem.x, 0, 1);
  as_stored<T>(problem.x, [&](auto* memory) {
    for (int64_t row = first; row < last; row += kRows) {
      double totals[kRows] = {};
      const int64_t rows = last - row < kRows ? last - row : kRows;
      if (blocks.columns > 0 && blocks.columns < kStreamedRow)
        prefetch_run(problem.x, blocks.offset(problem.x, n, row + kAhead * kRows), kRows * blocks.columns);
      blocks.pieces([&](int64_t begin, int64_t count) {
        auto* x = memory + blocks.offset(problem.x, n, row) + begin;
        if (rows == kRows) {
          add_rows<T, kRows, kInterleaved>(x, stride, count, down + begin, totals);
        } else {
          for (int64_t r = 0; r < rows; ++r)
            add_rows<T, 1, kInterleaved>(x + r * stride, stride, count, down + begin, totals + r);
        }
      });
      for (int64_t r = 0; r < rows; ++r) along[row + r] = T(totals[r]) * per_entry;
    }
  });
}

template <typename T>
void forward(const AttentionStats& problem) {
  const MapShape& shape = problem.shape;
  const RowBlocks blocks(shape);
  T *attention = static_cast<T*>(problem.attention), *mean = static_cast<T*>(problem.mean);
  const T per_channel = shape.channels > 0 ? T(1) / T(shape.channels) : T(0);
  const T per_pixel = shape.pixels > 0 ? T(1) / T(shape.pixels) : T(0);
  const ColumnSums<T> sums(blocks, true);
  blocks.each([&](int64_t n, int64_t block, int64_t first, int64_t last) {
    if (shape.interleaved) {
      add_block<T, true>(problem, blocks, n, first, last, sums.row(n, block), attention + n * shape.pixels,
                         per_channel);
    } else {
      add_block<T, false>(problem, blocks, n, first, last, sums.row(n, block), mean + n * shape.channels, per_pixel);
    }
  });
  sums.total(shape.interleaved ? mean : attention, shape.interleaved ? per_pixel : per_channel);
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
