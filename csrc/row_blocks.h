// How the kernels that need no tokens walk a feature map: as rows of what lies dense in memory, one channel's pixels
// (planar; several channels' where they are few and a kernel allows it) or one pixel's channels (interleaved). A block
// is a few whole rows of one image; whatever is summed down the columns is summed per block first and over the blocks
// in a fixed order: results do not depend on the threads.
#pragma once

#include <initializer_list>

#include "common.h"
#include "memory_pool.h"

namespace maskd {

// One level [N, C, P]; every feature of a call has the same dense axis.
struct MapShape {
  int64_t batch = 0, channels = 0, pixels = 0;
  bool interleaved = false;
  int threads = 1;
};

namespace {

constexpr int64_t kBlockElements = 1 << 16;  // of a block, or kLeastRows
constexpr int64_t kStreamedRow = 256;
constexpr int64_t kLeastRows = 16;  // so that column sums of blocks are few beside the map

// How many channels of a planar map can make one row of at most kPiece elements: they must follow each other in every
// feature of the call.
inline int64_t channels_per_row(const MapShape& shape, std::initializer_list<const Feature*> features) {
  if (shape.interleaved || shape.pixels == 0 || shape.pixels >= kStreamedRow) return 1;
  for (const Feature* feature : features)
    if (feature->present() && feature->stride_c != shape.pixels) return 1;
  int64_t folded = 1;
  while (shape.channels % (2 * folded) == 0 && 2 * folded * shape.pixels <= kPiece) folded *= 2;
  return folded;
}

struct RowBlocks {
  MapShape shape;
  int64_t folded;                      // channels per row of a planar map
  int64_t rows, columns, size, count;  // size: rows per block; count: blocks per image

  explicit RowBlocks(const MapShape& s, int64_t channels_in_row = 1) : shape(s), folded(channels_in_row) {
    rows = s.interleaved ? s.pixels : s.channels / folded;
    columns = s.interleaved ? s.channels : s.pixels * folded;
    const int64_t fitting = kBlockElements / (columns > 0 ? columns : 1);
    size = fitting > kLeastRows ? fitting : kLeastRows;
    count = (rows + size - 1) / size;  // without columns too: what is summed along rows is then 0 and not unwritten
  }

  int threads() const {
    return shape.batch * rows * columns < kSerialElements || shape.threads < 1 ? 1 : shape.threads;
  }

  MASKD_INLINE int64_t offset(const Feature& feature, int64_t n, int64_t row) const {
    return n * feature.stride_n + row * (shape.interleaved ? feature.stride_p : feature.stride_c * folded);
  }

  // Past the caches, where the result is large and its rows are long enough for whole lines.
  bool streams(const Feature& result) const {
    return columns >= kStreamedRow && shape.batch * rows * columns * size_of(result.dtype) >= kStreamBytes;
  }

  // visit(n, block, first row, last row) for every block, in parallel.
  template <typename Visit>
  void each(Visit visit) const {
    const int workers = threads();
#pragma omp parallel num_threads(workers) if (workers > 1)
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < shape.batch * count; ++task) {
        const int64_t n = task / count, block = task % count, row = block * size, last = row + size;
        visit(n, block, row, last < rows ? last : rows);
      }
      stream_fence();
    }
  }

  // visit(begin, count) for the pieces of a row.
  template <typename Visit>
  MASKD_INLINE void pieces(Visit visit) const {
    for (int64_t begin = 0; begin < columns; begin += kPiece)
      visit(begin, columns - begin < kPiece ? columns - begin : kPiece);
  }
};

// Zeros from the pool.
template <typename T>
struct Buffer {
  Block block;
  T* data;
  explicit Buffer(int64_t count) : block((count + 1) * int64_t(sizeof(T))), data(static_cast<T*>(block.data())) {
    std::memset(data, 0, size_t(count) * sizeof(T));
  }
};

// Sums down the columns, [N, blocks, columns] while the blocks run. Rows share no cache lines, which two threads would
// take from each other with every step.
template <typename T>
struct ColumnSums {
  const RowBlocks& blocks;
  const bool wanted;
  const int64_t stride;
  Buffer<T> partials;

  ColumnSums(const RowBlocks& b, bool are_wanted)
      : blocks(b),
        wanted(are_wanted),
        stride(round_up(b.columns, 2 * kLanes<T>)),
        partials(wanted ? b.shape.batch * b.count * stride : 0) {}

  MASKD_INLINE T* row(int64_t n, int64_t block) const {
    return wanted ? partials.data + (n * blocks.count + block) * stride : nullptr;
  }

  // out [N, columns / folded] = factor * the sums: a row of several channels is as many rows here.
  void total(T* out, T factor) const {
    const int workers = blocks.threads();
    const int64_t columns = blocks.columns / blocks.folded, per_image = (columns + kPiece - 1) / kPiece;
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
    for (int64_t task = 0; task < blocks.shape.batch * per_image; ++task) {
      const int64_t n = task / per_image, begin = task % per_image * kPiece;
      const int64_t length = columns - begin < kPiece ? columns - begin : kPiece;
      T* to = out + n * columns + begin;
      for (int64_t i = 0; i < length; ++i) to[i] = T(0);
      for (int64_t block = 0; block < blocks.count; ++block)
        for (int64_t i = 0; i < blocks.folded; ++i) add_run(to, row(n, block) + i * columns + begin, length);
      for (int64_t i = 0; i < length; ++i) to[i] *= factor;
    }
  }
};

// Writes value(i) for i < count to a result, past the caches where it is large.
template <typename T, typename Value>
MASKD_INLINE void write_values(const Feature& result, int64_t offset, int64_t count, bool stream, T* staged,
                               Value value) {
  const bool in_place = !stream && result.dtype == kDType<T>;
  T* to = in_place ? static_cast<T*>(result.data) + offset : staged;
  for (int64_t i = 0; i < count; ++i) to[i] = value(i);
  if (!in_place) write_run(result, offset, count, to, stream);
}

// The sum of value(i) over vectors, where value takes a position and gives kLanes<T> values, and over what is left.
template <typename T, typename Vector, typename Scalar>
MASKD_INLINE T sum_values(int64_t count, Vector vector, Scalar scalar) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * L <= count; i += 2 * L) sums[0] += vector(i), sums[1] += vector(i + L);
  for (; i + L <= count; i += L) sums[0] += vector(i);
  T total = horizontal_sum<T>(sums[0] + sums[1]);
  for (; i < count; ++i) total += scalar(i);
  return total;
}

}  // namespace
}  // namespace maskd
