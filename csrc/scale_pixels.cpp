// CPU kernels of scale_pixels. Compiled once per instruction set: MASKD_ISA names the namespace.
#include "scale_pixels.h"

namespace maskd {
namespace {

// The scale along a row of image n: once per channel in it. `repeated`: kPiece elements.
template <typename T>
const T* scale_of_row(const ScalePixels& problem, const RowBlocks& blocks, int64_t n, T* repeated) {
  const int64_t pixels = problem.shape.pixels;
  const T* scale = static_cast<const T*>(problem.scale) + n * pixels;
  if (blocks.folded == 1) return scale;
  for (int64_t i = 0; i < blocks.folded; ++i) std::memcpy(repeated + i * pixels, scale, size_t(pixels) * sizeof(T));
  return repeated;
}

template <typename T>
void forward(const ScalePixels& problem) {
  const RowBlocks blocks(problem.shape, channels_per_row(problem.shape, {&problem.x, &problem.y}));
  const bool stream = blocks.streams(problem.y);
  blocks.each([&](int64_t n, int64_t, int64_t first, int64_t last) {
    alignas(64) T read[kPiece], staged[kPiece], repeated[kPiece];
    const T* scale = scale_of_row(problem, blocks, n, repeated);
    for (int64_t row = first; row < last; ++row) {
      const int64_t from = blocks.offset(problem.x, n, row), to = blocks.offset(problem.y, n, row);
      blocks.pieces([&](int64_t begin, int64_t count) {
        const T* x = read_run(problem.x, from + begin, count, read);
        if (problem.shape.interleaved) {
          const T factor = scale[row];
          write_values(problem.y, to + begin, count, stream, staged, [&](int64_t i) { return factor * x[i]; });
        } else {
          const T* factor = scale + begin;
          write_values(problem.y, to + begin, count, stream, staged, [&](int64_t i) { return factor[i] * x[i]; });
        }
      });
    }
  });
}

template <typename T>
void backward(const ScalePixels& problem) {
  const RowBlocks blocks(problem.shape,
                         channels_per_row(problem.shape, {&problem.x, &problem.grad_y, &problem.grad_x}));
  const bool interleaved = problem.shape.interleaved, scale_wanted = problem.grad_scale != nullptr;
  const bool stream = problem.grad_x.present() && blocks.streams(problem.grad_x);
  const ColumnSums<T> sums(blocks, scale_wanted && !interleaved);
  T* grad_scale = static_cast<T*>(problem.grad_scale);
  blocks.each([&](int64_t n, int64_t block, int64_t first, int64_t last) {
    alignas(64) T read_g[kPiece], read_x[kPiece], staged[kPiece], repeated[kPiece];
    const T* scale = scale_of_row(problem, blocks, n, repeated);
    T* column_sums = sums.row(n, block);
    for (int64_t row = first; row < last; ++row) {
      double total = 0;
      blocks.pieces([&](int64_t begin, int64_t count) {
        const T* g = read_run(problem.grad_y, blocks.offset(problem.grad_y, n, row) + begin, count, read_g);
        if (scale_wanted) {
          const T* x = read_run(problem.x, blocks.offset(problem.x, n, row) + begin, count, read_x);
          if (interleaved) {
            total += double(sum_values<T>(
                count, [&](int64_t i) { return load(g + i) * load(x + i); }, [&](int64_t i) { return g[i] * x[i]; }));
          } else {
            T* to = column_sums + begin;
            for (int64_t i = 0; i < count; ++i) to[i] += g[i] * x[i];
          }
        }
        if (problem.grad_x.present()) {
          const int64_t to = blocks.offset(problem.grad_x, n, row) + begin;
          if (interleaved) {
            const T factor = scale[row];
            write_values(problem.grad_x, to, count, stream, staged, [&](int64_t i) { return factor * g[i]; });
          } else {
            const T* factor = scale + begin;
            write_values(problem.grad_x, to, count, stream, staged, [&](int64_t i) { return factor[i] * g[i]; });
          }
        }
      });
      if (scale_wanted && interleaved) grad_scale[n * problem.shape.pixels + row] = T(total);
    }
  });
  if (scale_wanted && !interleaved) sums.total(grad_scale, T(1));
}

}  // namespace

void MASKD_ISA::scale_pixels_forward(const ScalePixels& problem) {
  return problem.float64 ? forward<double>(problem) : forward<float>(problem);
}

void MASKD_ISA::scale_pixels_backward(const ScalePixels& problem) {
  return problem.float64 ? backward<double>(problem) : backward<float>(problem);
}

}  // namespace maskd
