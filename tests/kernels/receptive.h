// The kernels of receptive tokens.
#pragma once

#include "maps.h"

namespace maskd {

// Two levels of a pyramid, their statistics and the loss.
struct Receptive {
  const Kernels& kernels;
  DType dtype, compute;
  bool customize;
  std::string name;
  int64_t N, K, P = 0, C = 0;
  std::vector<Shape> shapes;
  std::vector<Map> teacher, student, grad_teacher, grad_student;
  std::vector<Memory> tokens, grad_tokens;
  std::vector<ReceptiveLevel> levels;
  std::vector<int64_t> pixel_offset, channel_offset;
  // Expected statistics, laid out as the kernels do
  Numbers masks, teacher_masks, distance, mass, error, gram, sums;

  Receptive(const Kernels& k, const std::vector<Shape>& s, int64_t num_tokens, DType type, bool interleaved,
            bool customized, const std::string& title)
      : kernels(k),
        dtype(type),
        compute(type == DType::float64 ? DType::float64 : DType::float32),
        customize(customized),
        name(title),
        N(s[0].n),
        K(num_tokens),
        shapes(s) {
    for (const Shape& shape : shapes) {
      const int64_t pixels = shape.height * shape.width;
      pixel_offset.push_back(P), channel_offset.push_back(C);
      P += pixels, C += shape.c;
      for (auto* maps : {&teacher, &student, &grad_teacher, &grad_student})
        maps->emplace_back(dtype, N, shape.c, pixels, interleaved, maps == &teacher || maps == &student);
      tokens.push_back(Memory(compute, K * shape.c));
      for (int64_t i = 0; i < K * shape.c; ++i)
        set(tokens.back().data(), compute, i, random_value() / 8);  // sigmoids that are not all 0 or 1
      grad_tokens.push_back(Memory(compute, K * shape.c));
    }
    expect_statistics();
  }

  ReceptiveProblem problem(bool gradients) {
    levels.assign(shapes.size(), ReceptiveLevel());
    for (size_t l = 0; l < shapes.size(); ++l) {
      ReceptiveLevel& level = levels[l];
      level.teacher = teacher[l].feature(), level.student = student[l].feature(), level.tokens = tokens[l].data();
      level.channels = shapes[l].c, level.pixels = teacher[l].p, level.interleaved = teacher[l].interleaved;
      level.width = shapes[l].width;
      level.pixel_offset = pixel_offset[l], level.channel_offset = channel_offset[l];
      level.grad_student = grad_student[l].feature();
      if (!gradients) continue;
      level.grad_teacher = grad_teacher[l].feature(), level.grad_tokens = grad_tokens[l].data();
    }
    return {levels.data(), int64_t(levels.size()), N, K, P, C, dtype == DType::float64, customize, kThreads};
  }

  bool tap_reads(size_t l, int64_t tap, int64_t p) const {
    const int64_t y = p / shapes[l].width + 1 - tap / 3, x = p % shapes[l].width + 1 - tap % 3;  // where its centre is
    return y >= 0 && y < shapes[l].height && x >= 0 && x < shapes[l].width;
  }

  double logit(const Map& map, size_t l, int64_t n, int64_t k, int64_t p) const {
    double total = 0;
    for (int64_t c = 0; c < map.c; ++c) total += tokens[l][k * map.c + c] * map.at(n, c, p);
    return total;
  }

  double& mask(int64_t n, int64_t k, int64_t p) { return masks[size_t((n * K + k) * P + p)]; }
  size_t row(size_t l, int64_t n) const { return l * size_t(N) + size_t(n); }

  void expect_statistics() {
    const size_t rows = shapes.size() * size_t(N * K);
    masks.resize(size_t(N * K * P)), teacher_masks.resize(masks.size()), distance.resize(size_t(N * P));
    mass.resize(rows), error.resize(rows), gram.resize(rows * size_t(K)), sums.resize(size_t(N * kTaps * C));
    for (size_t l = 0; l < shapes.size(); ++l)
      for (int64_t n = 0; n < N; ++n)
        for (int64_t p = 0; p < teacher[l].p; ++p) {
          const int64_t at = pixel_offset[l] + p;
          double& d = distance[size_t(n * P + at)];
          for (int64_t c = 0; c < shapes[l].c; ++c) {
            const double t = teacher[l].at(n, c, p), difference = student[l].at(n, c, p) - t;
            d += difference * difference;
            for (int64_t tap = 0; tap < kTaps; ++tap)
              if (tap_reads(l, tap, p)) sums[size_t((n * kTaps + tap) * C + channel_offset[l] + c)] += t;
          }
          for (int64_t k = 0; k < K; ++k) {
            const double own = sigmoid_of(logit(teacher[l], l, n, k, p));
            teacher_masks[size_t((n * K + k) * P + at)] = own;
            mask(n, k, at) = own * (customize ? sigmoid_of(logit(student[l], l, n, k, p)) : 1);
          }
          for (int64_t k = 0; k < K; ++k) {
            const size_t i = row(l, n) * size_t(K) + size_t(k);
            mass[i] += mask(n, k, at), error[i] += mask(n, k, at) * mask(n, k, at) * d;
            for (int64_t j = 0; j < K; ++j) gram[i * size_t(K) + size_t(j)] += mask(n, k, at) * mask(n, j, at);
          }
        }
  }

  void statistics() {
    Memory got_masks(compute, N * K * P), got_teacher(compute, N * K * P), got_distance(compute, N * P);
    const int64_t rows = int64_t(mass.size());
    Memory got_mass(compute, rows), got_error(compute, rows), got_gram(compute, rows * K);
    Memory got_sums(compute, N * kTaps * C);
    ReceptiveStats out;
    out.masks = got_masks.data(), out.distance = got_distance.data(), out.mass = got_mass.data();
    out.error = got_error.data(), out.gram = got_gram.data(), out.sums = got_sums.data();
    if (customize) out.teacher_masks = got_teacher.data();
    kernels.receptive_forward(problem(false), out);
    compare(name + "masks", got_masks, masks), compare(name + "distance", got_distance, distance);
    if (customize) compare(name + "teacher_masks", got_teacher, teacher_masks);
    compare(name + "mass", got_mass, mass), compare(name + "error", got_error, error);
    compare(name + "gram", got_gram, gram), compare(name + "sums", got_sums, sums);

    Memory g_masks = Memory::random(compute, N * K * P), g_distance = Memory::random(compute, N * P);
    Memory g_mass = Memory::random(compute, rows), g_error = Memory::random(compute, rows);
    Memory g_gram = Memory::random(compute, rows * K), g_sums = Memory::random(compute, N * kTaps * C);
    ReceptiveStats saved, grad;
    saved.masks = out.masks, saved.teacher_masks = out.teacher_masks, saved.distance = out.distance;
    grad.masks = g_masks.data(), grad.distance = g_distance.data(), grad.mass = g_mass.data();
    grad.error = g_error.data(), grad.gram = g_gram.data(), grad.sums = g_sums.data();
    kernels.receptive_backward(problem(true), saved, grad);
    for (size_t l = 0; l < shapes.size(); ++l) {
      const Map &t = teacher[l], &s = student[l];
      Numbers to_student(size_t(t.memory.count), 0.0), to_teacher = to_student, to_tokens(size_t(K * t.c), 0.0);
      for (int64_t n = 0; n < N; ++n)
        for (int64_t p = 0; p < t.p; ++p) {
          const int64_t at = pixel_offset[l] + p, first = int64_t(row(l, n)) * K;
          double coefficient = g_distance[n * P + at];
          Numbers d_logit;
          for (int64_t k = 0; k < K; ++k) {
            const double m = mask(n, k, at), d = distance[size_t(n * P + at)];
            coefficient += g_error[first + k] * m * m;
            double inner = g_mass[first + k] + 2 * g_error[first + k] * m * d + g_masks[(n * K + k) * P + at];
            for (int64_t j = 0; j < K; ++j)
              inner += (g_gram[(first + k) * K + j] + g_gram[(first + j) * K + k]) * mask(n, j, at);
            d_logit.push_back(inner * m * (1 - teacher_masks[size_t((n * K + k) * P + at)]));
          }
          for (int64_t c = 0; c < t.c; ++c) {
            const double d_student = 2 * coefficient * (s.at(n, c, p) - t.at(n, c, p));
            double d_teacher = -d_student;
            for (int64_t tap = 0; tap < kTaps; ++tap)
              if (tap_reads(l, tap, p)) d_teacher += g_sums[(n * kTaps + tap) * C + channel_offset[l] + c];
            for (int64_t k = 0; k < K; ++k) {
              d_teacher += tokens[l][k * t.c + c] * d_logit[size_t(k)];
              to_tokens[size_t(k * t.c + c)] += d_logit[size_t(k)] * t.at(n, c, p);
            }
            to_student[size_t(t.place(n, c, p))] = d_student, to_teacher[size_t(t.place(n, c, p))] = d_teacher;
          }
        }
      compare(name + "grad_student", grad_student[l].memory, to_student);
      compare(name + "grad_teacher", grad_teacher[l].memory, to_teacher);
      compare(name + "grad_tokens", grad_tokens[l], to_tokens);
    }
  }

  void loss(bool weighted) {
    std::vector<Memory> parameters;
    std::vector<MaskWeighting> weighting;
    for (const Shape& shape : shapes)
      for (int64_t size : {shape.c * shape.c * kTaps, shape.c, K * shape.c, K}) {
        parameters.push_back(Memory(compute, size));
        for (int64_t i = 0; i < size; ++i)
          set(parameters.back().data(), compute, i, random_value() / double(shape.c));  // logits of a trained size
      }
    for (size_t i = 0; i < parameters.size(); i += 4)
      weighting.push_back(
          {parameters[i].data(), parameters[i + 1].data(), parameters[i + 2].data(), parameters[i + 3].data()});
    Memory got_masks(compute, N * K * P), got_share(compute, int64_t(mass.size())), got_loss(compute, 1);
    MaskdLoss call;
    call.problem = problem(false), call.weighting = weighted ? weighting.data() : nullptr;
    call.eps = 1e-5, call.upstream = 0.75;
    call.masks = got_masks.data(), call.share = got_share.data(), call.loss = got_loss.data();
    kernels.maskd_loss(call);
    Numbers share, total(1, 0.0);
    for (size_t l = 0; l < shapes.size(); ++l)
      for (int64_t n = 0; n < N; ++n) {
        const Numbers w = weighted ? weights(parameters, l, n) : Numbers(size_t(K), 1 / double(K));
        for (int64_t k = 0; k < K; ++k) {
          const size_t i = row(l, n) * size_t(K) + size_t(k);
          share.push_back(w[size_t(k)] / (double(shapes[l].c * N) * (mass[i] + call.eps)));
          total[0] += share.back() * error[i];
        }
      }
    const std::string title = name + (weighted ? "weighted loss" : "loss");
    compare(title, got_loss, total), compare(title + " masks", got_masks, masks);
    compare(title + " share", got_share, share);
    for (size_t l = 0; l < shapes.size(); ++l)
      compare(title + " grad_student", grad_student[l].memory,
              expected_map(teacher[l], [&](int64_t n, int64_t c, int64_t p) {
                double coefficient = 0;
                for (int64_t k = 0; k < K; ++k) {
                  const double m = mask(n, k, pixel_offset[l] + p);
                  coefficient += share[row(l, n) * size_t(K) + size_t(k)] * m * m;
                }
                return call.upstream * 2 * coefficient * (student[l].at(n, c, p) - teacher[l].at(n, c, p));
              }));
  }

  // softmax(Conv1x1(AvgPool(Conv3x3(teacher)))), the convolution as its taps' sums.
  Numbers weights(const std::vector<Memory>& parameters, size_t l, int64_t n) const {
    const int64_t c = shapes[l].c;
    const Memory *own = &parameters[4 * l], &conv = own[0], &bias = own[1], &projection = own[2], &offset = own[3];
    Numbers hidden, logits;
    for (int64_t o = 0; o < c; ++o) {
      double value = bias[o];
      for (int64_t i = 0; i < c * kTaps; ++i)
        value += conv[o * c * kTaps + i] * sums[size_t((n * kTaps + i % kTaps) * C + channel_offset[l] + i / kTaps)] /
                 double(teacher[l].p);
      hidden.push_back(value);
    }
    double total = 0;
    for (int64_t k = 0; k < K; ++k) {
      double value = offset[k];
      for (int64_t i = 0; i < c; ++i) value += projection[k * c + i] * hidden[size_t(i)];
      logits.push_back(std::exp(value)), total += logits.back();
    }
    for (double& x : logits) x /= total;
    return logits;
  }
};

}  // namespace maskd
