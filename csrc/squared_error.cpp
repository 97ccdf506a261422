// CPU kernels of squared_error. Compiled once per instruction set: MASKD_ISA names the namespace.
#include "squared_error.h"

namespace maskd {
namespace {

// Calls body(factor): the scale of each element of a piece, as what can be indexed by position.
template <typename T, typename Body>
MASKD_INLINE void with_scale(const SquaredError& problem, int64_t n, int64_t row, int64_t begin, Body body) {
  struct Constant {
    T value;
    MASKD_INLINE T at(int64_t) const { return value; }
    MASKD_INLINE Vec<T> vector(int64_t) const { return Vec<T>{} + value; }
  };
  struct Row {
    const T* values;
    MASKD_INLINE T at(int64_t i) const { return values[i]; }
    MASKD_INLINE Vec<T> vector(int64_t i) const { return load(values + i); }
  };
  const T* scale = static_cast<const T*>(problem.scale);
  if (!scale) {
    body(Constant{T(1)});
  } else if (problem.shape.interleaved) {
    body(Row{scale + n * problem.shape.channels + begin});
  } else {
    body(Constant{scale[n * problem.shape.channels + row]});
  }
}

// Calls body(p, t): pieces of both maps as what they hold, if that is the same, else as T.
template <typename T, typename Body>
MASKD_INLINE void with_runs(const SquaredError& problem, int64_t pred_offset, int64_t target_offset, int64_t count,
                            T* read_p, T* read_t, Body body) {
  if (problem.pred.dtype != problem.target.dtype)
    return body(read_run(problem.pred, pred_offset, count, read_p),
                read_run(problem.target, target_offset, count, read_t));
  as_stored<T>(problem.pred,
               [&](auto* p) { body(p + pred_offset, static_cast<decltype(p)>(problem.target.data) + target_offset); });
}

// Rows of several channels only where each element counts alike.
RowBlocks rows_of(const SquaredError& problem) {
  if (problem.scale) return RowBlocks(problem.shape);
  return RowBlocks(problem.shape, channels_per_row(problem.shape, {&problem.pred, &problem.target, &problem.grad_pred,
                                                                   &problem.grad_target}));
}

template <typename T>
void forward(const SquaredError& problem) {
  const RowBlocks blocks = rows_of(problem);
  const Buffer<double> partials(problem.shape.batch * blocks.count);
  blocks.each([&](int64_t n, int64_t block, int64_t first, int64_t last) {
    alignas(64) T read_p[kPiece], read_t[kPiece];
    double total = 0;
    for (int64_t row = first; row < last; ++row) {
      blocks.pieces([&](int64_t begin, int64_t count) {
        const int64_t from_p = blocks.offset(problem.pred, n, row) + begin;
        const int64_t from_t = blocks.offset(problem.target, n, row) + begin;
        with_scale<T>(problem, n, row, begin, [&](auto scale) {
          with_runs<T>(problem, from_p, from_t, count, read_p, read_t, [&](auto* p, auto* t) {
            const auto vector = [&](int64_t i) {
              const Vec<T> e = scale.vector(i) * load(p + i) - load(t + i);
              return e * e;
            };
            const auto scalar = [&](int64_t i) {
              const T e = scale.at(i) * T(value_of(p[i])) - T(value_of(t[i]));
              return e * e;
            };
            total += double(sum_values<T>(count, vector, scalar));
          });
        });
      });
    }
    partials.data[n * blocks.count + block] = total;
  });
  for (int64_t n = 0; n < problem.shape.batch; ++n) {
    double total = 0;
    for (int64_t block = 0; block < blocks.count; ++block) total += partials.data[n * blocks.count + block];
    static_cast<T*>(problem.error)[n] = T(total);
  }
}

template <typename T>
void backward(const SquaredError& problem) {
  const RowBlocks blocks = rows_of(problem);
  const bool interleaved = problem.shape.interleaved, scale_wanted = problem.grad_scale != nullptr;
  const bool stream_pred = problem.grad_pred.present() && blocks.streams(problem.grad_pred);
  const bool stream_target = problem.grad_target.present() && blocks.streams(problem.grad_target);
  const ColumnSums<T> sums(blocks, scale_wanted && interleaved);
  T* grad_scale = static_cast<T*>(problem.grad_scale);
  blocks.each([&](int64_t n, int64_t block, int64_t first, int64_t last) {
    alignas(64) T read_p[kPiece], read_t[kPiece], staged[kPiece];
    const T g = 2 * static_cast<const T*>(problem.grad)[n];
    T* column_sums = sums.row(n, block);
    for (int64_t row = first; row < last; ++row) {
      double total = 0;
      blocks.pieces([&](int64_t begin, int64_t count) {
        const T* p = read_run(problem.pred, blocks.offset(problem.pred, n, row) + begin, count, read_p);
        const T* t = read_run(problem.target, blocks.offset(problem.target, n, row) + begin, count, read_t);
        with_scale<T>(problem, n, row, begin, [&](auto scale) {
          const auto error = [&](int64_t i) { return scale.at(i) * p[i] - t[i]; };
          if (problem.grad_pred.present())
            write_values(problem.grad_pred, blocks.offset(problem.grad_pred, n, row) + begin, count, stream_pred,
                         staged, [&](int64_t i) { return g * scale.at(i) * error(i); });
          if (problem.grad_target.present())
            write_values(problem.grad_target, blocks.offset(problem.grad_target, n, row) + begin, count, stream_target,
                         staged, [&](int64_t i) { return -g * error(i); });
          if (scale_wanted && interleaved) {
            T* to = column_sums + begin;
            for (int64_t i = 0; i < count; ++i) to[i] += g * p[i] * error(i);
          } else if (scale_wanted) {
            const auto vector = [&](int64_t i) { return load(p + i) * (scale.vector(i) * load(p + i) - load(t + i)); };
            total += double(sum_values<T>(count, vector, [&](int64_t i) { return p[i] * error(i); }));
          }
        });
      });
      if (scale_wanted && !interleaved) grad_scale[n * problem.shape.channels + row] = T(double(g) * total);
    }
  });
  if (scale_wanted && interleaved) sums.total(grad_scale, T(1));
}

}  // namespace

void MASKD_ISA::squared_error_forward(const SquaredError& problem) {
  return problem.float64 ? forward<double>(problem) : forward<float>(problem);
}

void MASKD_ISA::squared_error_backward(const SquaredError& problem) {
  return problem.float64 ? backward<double>(problem) : backward<float>(problem);
}

}  // namespace maskd
