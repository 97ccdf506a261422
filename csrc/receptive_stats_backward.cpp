// CPU kernels of receptive_stats, backward. Compiled once per instruction set: MASKD_ISA names the namespace.
#include "receptive_stats.h"
#include "receptive_tiles.h"

namespace maskd {
namespace {

template <typename T>
struct BackwardScratch {
  T *coefficient, *grad_logits, *student_row, *teacher_row, *grad_row, *result_row;

  void take(Arena& arena, const ReceptiveProblem& problem, int64_t tile, int64_t channels) {
    const int64_t run = round_up(tile > channels ? tile : channels, kLanes<T>);
    coefficient = arena.take<T>(tile);
    grad_logits = arena.take<T>(problem.num_tokens * tile);
    student_row = arena.take<T>(run);
    teacher_row = arena.take<T>(run);
    grad_row = arena.take<T>(run);
    result_row = arena.take<T>(run);
  }
};

// grad_logits[k,p] = M (1 - M_T) (g_mass + 2 g_error M D + sum_l (g_gram + g_gram^T)[k,l] M_l + g_masks).
template <typename T>
void token_logit_gradients(const ReceptiveProblem& problem, const Tile& tile, const ReceptiveStats& saved,
                           const ReceptiveStats& grad, T* grad_logits) {
  const int64_t K = problem.num_tokens, P = problem.total_pixels, column = tile.level->pixel_offset + tile.begin;
  const int64_t image = tile.level_index * problem.batch + tile.n;
  const T* masks = static_cast<const T*>(saved.masks) + tile.n * K * P + column;
  const T* teacher_masks =
      problem.customize ? static_cast<const T*>(saved.teacher_masks) + tile.n * K * P + column : masks;
  const T* distance = grad.error ? static_cast<const T*>(saved.distance) + tile.n * P + column : nullptr;
  for (int64_t k = 0; k < K; ++k) {
    const T* mask = masks + k * P;
    const T* teacher_mask = teacher_masks + k * P;
    T* row = grad_logits + k * tile.stride;
    const T mass_grad = grad.mass ? static_cast<const T*>(grad.mass)[image * K + k] : T(0);
    for (int64_t i = 0; i < tile.count; ++i) row[i] = mass_grad;
    if (grad.error) {
      const T factor = 2 * static_cast<const T*>(grad.error)[image * K + k];
      for (int64_t i = 0; i < tile.count; ++i) row[i] += factor * mask[i] * distance[i];
    }
    if (grad.gram) {
      const T* gram = static_cast<const T*>(grad.gram) + image * K * K;
      for (int64_t l = 0; l < K; ++l) {
        const T factor = gram[k * K + l] + gram[l * K + k];
        for (int64_t i = 0; i < tile.count; ++i) row[i] += factor * masks[l * P + i];
      }
    }
    if (grad.masks) add_run(row, static_cast<const T*>(grad.masks) + (tile.n * K + k) * P + column, tile.count);
    for (int64_t i = 0; i < tile.count; ++i) row[i] *= mask[i] * (1 - teacher_mask[i]);
    for (int64_t i = tile.count; i < round_up(tile.count, kLanes<T>); ++i) row[i] = T(0);
  }
}

template <typename T>
MASKD_INLINE void add_scaled_run(T* to, const T* from, T factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

// A run is what lies dense in memory: one channel's pixels of the tile (planar) or one pixel's channels (interleaved).
template <typename T>
struct BackwardTile {
  const ReceptiveProblem& problem;
  const ReceptiveLevel& level;
  const Tile& tile;
  const BackwardScratch<T>& scratch;
  const T* sums_grad;  // [9 sets, total channels] of this image, or nullptr
  T* token_partial;    // [K, C], or nullptr
  bool stream;

  static int64_t offset(const Feature& feature, int64_t n, int64_t c, int64_t p) {
    return n * feature.stride_n + c * feature.stride_c + p * feature.stride_p;
  }

  void planar_student() const {
    for (int64_t c = tile.first_channel; c < tile.last_channel; ++c) {
      for (int64_t i = 0; i < tile.count; i += kPiece) {
        const int64_t count = tile.count - i < kPiece ? tile.count - i : kPiece, p = tile.begin + i;
        const T* t = read_run(level.teacher, offset(level.teacher, tile.n, c, p), count, scratch.teacher_row);
        student_run(t, c, p, count, [&](int64_t j) { return scratch.coefficient[i + j]; });
      }
    }
  }

  void planar() const {
    const int64_t K = problem.num_tokens, C = level.channels, count = tile.count;
    const T* tokens = static_cast<const T*>(level.tokens);
    for (int64_t c = 0; c < C; ++c) {
      const T* t = read_run(level.teacher, offset(level.teacher, tile.n, c, tile.begin), count, scratch.teacher_row);
      student_run(t, c, tile.begin, count, [&](int64_t i) { return scratch.coefficient[i]; });
      if (token_partial)
        for (int64_t k = 0; k < K; ++k)
          token_partial[k * C + c] = dot_run<T, 1>(scratch.grad_logits + k * tile.stride, t, count);
      if (level.grad_teacher.present()) {
        T* row = scratch.result_row;
        start_teacher_run(row, count);
        for (int64_t k = 0; k < K; ++k)
          add_scaled_run(row, scratch.grad_logits + k * tile.stride, tokens[k * C + c], count);
        if (sums_grad) {
          const T* own = sums_grad + level.channel_offset + c;
          for (int64_t i = 0; i < count; ++i) row[i] += own[0];
          visit_borders<T>(level, tile.begin, count,
                           [&](int set, int64_t i) { row[i] += own[set * problem.total_channels]; });
        }
        write_run(level.grad_teacher, offset(level.grad_teacher, tile.n, c, tile.begin), count, row, stream);
      }
    }
  }

  void interleaved() const {
    const int64_t K = problem.num_tokens, C = level.channels, c = tile.first_channel, count = tile.last_channel - c;
    const T* tokens = static_cast<const T*>(level.tokens);
    if (token_partial) std::memset(token_partial, 0, size_t(K * C) * sizeof(T));
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t p = tile.begin + i;
      const T* t = read_run(level.teacher, offset(level.teacher, tile.n, c, p), count, scratch.teacher_row);
      const T coefficient = scratch.coefficient[i];
      student_run(t, c, p, count, [&](int64_t) { return coefficient; });
      for (int64_t k = 0; token_partial && k < K; ++k)
        add_scaled_run(token_partial + k * C, t, scratch.grad_logits[k * tile.stride + i], C);
      if (level.grad_teacher.present()) {
        T* row = scratch.result_row;
        start_teacher_run(row, C);
        for (int64_t k = 0; k < K; ++k)
          add_scaled_run(row, tokens + k * C, scratch.grad_logits[k * tile.stride + i], C);
        if (sums_grad) {
          const T* own = sums_grad + level.channel_offset;
          add_run(row, own, C);
          visit_borders<T>(level, p, 1, [&](int set, int64_t) { add_run(row, own + set * problem.total_channels, C); });
        }
        write_run(level.grad_teacher, offset(level.grad_teacher, tile.n, 0, p), C, row, stream);
      }
    }
  }

 private:
  // Leaves coefficient * (student - teacher) in grad_row and, where wanted, in the student's gradient.
  template <typename Coefficient>
  MASKD_INLINE void student_run(const T* t, int64_t c, int64_t p, int64_t count, Coefficient coefficient) const {
    if (!level.student.present() || !(level.grad_student.present() || level.grad_teacher.present())) return;
    const T* s = read_run(level.student, offset(level.student, tile.n, c, p), count, scratch.student_row);
    const Feature& result = level.grad_student;
    const bool in_place = !level.grad_teacher.present() && !stream && result.dtype == kDType<T>;
    T* row = in_place ? static_cast<T*>(result.data) + offset(result, tile.n, c, p) : scratch.grad_row;
    for (int64_t i = 0; i < count; ++i) row[i] = coefficient(i) * (s[i] - t[i]);
    if (result.present() && !in_place) write_run(result, offset(result, tile.n, c, p), count, row, stream);
  }

  void start_teacher_run(T* row, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) row[i] = level.student.present() ? -scratch.grad_row[i] : T(0);
  }
};

template <typename T>
void backward(const ReceptiveProblem& problem, const ReceptiveStats& saved, const ReceptiveStats& grad) {
  const int64_t K = problem.num_tokens;
  bool logits_wanted = false, tokens_wanted = false;
  int64_t written_bytes = 0;
  for (int64_t l = 0; l < problem.num_levels; ++l) {
    const ReceptiveLevel& level = problem.levels[l];
    tokens_wanted |= level.grad_tokens != nullptr;
    logits_wanted |= level.grad_tokens != nullptr || level.grad_teacher.present();
    written_bytes += problem.batch * level.channels * level.pixels *
                     (int64_t(level.grad_student.present()) * size_of(level.grad_student.dtype) +
                      int64_t(level.grad_teacher.present()) * size_of(level.grad_teacher.dtype));
  }
  Workspace plan_memory;
  int64_t* table = nullptr;
  plan_memory.provide([&](Arena& arena) { table = arena.take<int64_t>(3 * problem.num_levels + 1); });
  const Plan plan = lay_out<T>(problem, table, K, !logits_wanted);
  const bool stream = written_bytes >= kStreamBytes;
  const int threads = worker_count(problem);
  const int64_t partial_size = tokens_wanted ? K * plan.max_channels : 0;
  const int64_t sets_size = grad.sums ? kTaps * problem.total_channels : 0;
  Workspace memory;
  T *partials = nullptr, *sets_grad = nullptr;
  char* scratch_base = nullptr;
  memory.provide([&](Arena& arena) {
    partials = arena.take<T>(plan.total * partial_size);
    sets_grad = arena.take<T>(problem.batch * sets_size);
    scratch_base = arena.take<char>(threads * scratch_bytes<BackwardScratch<T>>(plan));
  });
  for (int64_t n = 0; grad.sums && n < problem.batch; ++n) {
    for (int64_t c = 0; c < problem.total_channels; ++c)
      taps_to_sets(static_cast<const T*>(grad.sums) + n * sets_size + c, sets_grad + n * sets_size + c,
                   problem.total_channels);
  }

  int started = 0;
  Tasks tasks(plan, true);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const auto scratch = own_scratch<BackwardScratch<T>>(plan, scratch_base, &started);
    tasks.each([&](int64_t task) {
      const Tile tile = plan.tile(task);
      const ReceptiveLevel& level = *tile.level;
      if (level.student.present())
        student_coefficient<T>(problem, tile, saved.masks, grad.error, grad.distance, scratch.coefficient);
      if (logits_wanted) token_logit_gradients(problem, tile, saved, grad, scratch.grad_logits);
      const T* sums_grad = grad.sums ? sets_grad + tile.n * sets_size : nullptr;
      const BackwardTile<T> work{
          problem, level, tile, scratch, sums_grad, tokens_wanted ? partials + task * partial_size : nullptr, stream};
      if (level.interleaved) {
        work.interleaved();
      } else if (logits_wanted) {
        work.planar();
      } else {
        work.planar_student();
      }
    });
    if (stream) stream_fence();
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t l = 0; l < problem.num_levels; ++l) {
      const ReceptiveLevel& level = problem.levels[l];
      T* result = static_cast<T*>(level.grad_tokens);
      if (!result) continue;
      for (int64_t i = 0; i < K * level.channels; ++i) {
        double total = 0;
        for (int64_t task = plan.first[l]; task < plan.first[l + 1]; ++task)
          total += double(partials[task * partial_size + i]);
        result[i] = T(total);
      }
    }
  }
}

}  // namespace

void MASKD_ISA::receptive_backward(const ReceptiveProblem& problem, const ReceptiveStats& saved,
                                   const ReceptiveStats& grad) {
  return problem.float64 ? backward<double>(problem, saved, grad) : backward<float>(problem, saved, grad);
}

}  // namespace maskd
