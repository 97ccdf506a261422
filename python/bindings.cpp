// Python bindings of csrc/: the only place that knows both. Addresses, shapes and strides arrive as
// integers that maskd_kernels/ops has validated; no Torch header is needed, so one build serves every Torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dlpack.h"
#include "isa.h"
#include "memory_pool.h"

namespace py = pybind11;
using namespace maskd;

namespace {

const Kernels* selected = nullptr;

std::vector<std::string> isas() {
  int count = 0;
  const Kernels* kernels = available_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(kernels[i].isa);
  return names;
}

void select_isa(const std::string& name) {
  int count = 0;
  const Kernels* kernels = available_kernels(&count);
  for (int i = 0; i < count; ++i) {
    if (name == kernels[i].isa) {
      selected = &kernels[i];
      return;
    }
  }
  throw std::invalid_argument("isa: '" + name + "' is unknown or not supported by this processor");
}

// (address, dtype code, stride_n, stride_c, stride_p); address 0: absent
using FeatureTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;

// addresses of conv_weight, conv_bias, projection_weight, projection_bias
using WeightingTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

Feature feature(const FeatureTuple& t) {
  Feature f;
  f.data = reinterpret_cast<void*>(std::get<0>(t));
  f.dtype = DType(std::get<1>(t));
  f.stride_n = std::get<2>(t), f.stride_c = std::get<3>(t), f.stride_p = std::get<4>(t);
  return f;
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// addresses of teacher, student, tokens, grad_student
using LevelAddresses = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

// The same level elsewhere in memory.
void place(ReceptiveLevel& level, const LevelAddresses& addresses) {
  level.teacher.data = pointer(std::get<0>(addresses)), level.student.data = pointer(std::get<1>(addresses));
  level.tokens = pointer(std::get<2>(addresses)), level.grad_student.data = pointer(std::get<3>(addresses));
}

// Addresses in the order of the struct's fields; 0: absent.
ReceptiveStats stats(const std::vector<uintptr_t>& a) {
  if (a.size() != 7) throw std::invalid_argument("expected seven addresses");
  ReceptiveStats s;
  s.masks = pointer(a[0]), s.teacher_masks = pointer(a[1]), s.distance = pointer(a[2]), s.mass = pointer(a[3]);
  s.error = pointer(a[4]), s.gram = pointer(a[5]), s.sums = pointer(a[6]);
  return s;
}

ReceptiveProblem problem(const std::vector<ReceptiveLevel>& levels, int64_t batch, int64_t num_tokens, bool float64,
                         bool customize, int threads) {
  ReceptiveProblem p;
  p.levels = levels.data(), p.num_levels = int64_t(levels.size()), p.batch = batch, p.num_tokens = num_tokens;
  p.float64 = float64, p.customize = customize, p.threads = threads;
  for (const ReceptiveLevel& level : levels) p.total_pixels += level.pixels, p.total_channels += level.channels;
  return p;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of maskd_kernels.";
  selected = [] {
    int count = 0;
    return available_kernels(&count);
  }();

  m.def("isas", &isas, "Instruction sets this processor and build support, best first.");
  m.def("isa", [] { return std::string(selected->isa); }, "The instruction set in use.");
  m.def("select_isa", &select_isa, py::arg("name"));

  m.def(
      "new_tensor",
      [](std::vector<int64_t> shape, std::vector<int64_t> strides, int dtype) {
        return new_tensor(std::move(shape), std::move(strides), DType(dtype));
      },
      py::arg("shape"), py::arg("strides"), py::arg("dtype"), "An uninitialised tensor as a DLPack capsule.");
  m.def(
      "pool_state", [] { return std::make_pair(pool_state().in_use, pool_state().idle); }, "Bytes in use, bytes idle.");
  m.def("release_idle_memory", &release_idle_memory);

  py::class_<ReceptiveLevel>(m, "ReceptiveLevel")
      .def(py::init([](const FeatureTuple& teacher, const FeatureTuple& student, const FeatureTuple& grad_teacher,
                       const FeatureTuple& grad_student, uintptr_t tokens, uintptr_t grad_tokens, int64_t channels,
                       int64_t pixels, bool interleaved, int64_t width, int64_t pixel_offset, int64_t channel_offset) {
             ReceptiveLevel level;
             level.teacher = feature(teacher), level.student = feature(student);
             level.grad_teacher = feature(grad_teacher), level.grad_student = feature(grad_student);
             level.tokens = pointer(tokens), level.grad_tokens = pointer(grad_tokens);
             level.channels = channels, level.pixels = pixels, level.interleaved = interleaved, level.width = width;
             level.pixel_offset = pixel_offset, level.channel_offset = channel_offset;
             return level;
           }),
           py::arg("teacher"), py::arg("student"), py::arg("grad_teacher"), py::arg("grad_student"), py::arg("tokens"),
           py::arg("grad_tokens"), py::arg("channels"), py::arg("pixels"), py::arg("interleaved"), py::arg("width"),
           py::arg("pixel_offset"), py::arg("channel_offset"));

  m.def(
      "receptive_forward",
      [](const std::vector<ReceptiveLevel>& levels, int64_t batch, int64_t num_tokens, bool float64, bool customize,
         int threads, const std::vector<uintptr_t>& out) {
        const ReceptiveProblem p = problem(levels, batch, num_tokens, float64, customize, threads);
        const ReceptiveStats s = stats(out);
        py::gil_scoped_release release;
        selected->receptive_forward(p, s);
      },
      py::arg("levels"), py::arg("batch"), py::arg("num_tokens"), py::arg("float64"), py::arg("customize"),
      py::arg("threads"), py::arg("out"));

  m.def(
      "receptive_backward",
      [](const std::vector<ReceptiveLevel>& levels, int64_t batch, int64_t num_tokens, bool float64, bool customize,
         int threads, const std::vector<uintptr_t>& saved, const std::vector<uintptr_t>& grad) {
        const ReceptiveProblem p = problem(levels, batch, num_tokens, float64, customize, threads);
        const ReceptiveStats s = stats(saved), g = stats(grad);
        py::gil_scoped_release release;
        selected->receptive_backward(p, s, g);
      },
      py::arg("levels"), py::arg("batch"), py::arg("num_tokens"), py::arg("float64"), py::arg("customize"),
      py::arg("threads"), py::arg("saved"), py::arg("grad"));

  m.def(
      "maskd_loss",
      [](std::vector<ReceptiveLevel> levels, const std::vector<LevelAddresses>& addresses,
         const std::vector<WeightingTuple>& weighting, int64_t batch, int64_t num_tokens, bool float64, bool customize,
         int threads, double eps, double upstream, uintptr_t masks, uintptr_t share, uintptr_t loss) {
        for (size_t l = 0; l < levels.size(); ++l) place(levels[l], addresses.at(l));
        std::vector<MaskWeighting> parameters;
        for (const WeightingTuple& w : weighting) {
          MaskWeighting p;
          p.conv_weight = pointer(std::get<0>(w)), p.conv_bias = pointer(std::get<1>(w));
          p.projection_weight = pointer(std::get<2>(w)), p.projection_bias = pointer(std::get<3>(w));
          parameters.push_back(p);
        }
        MaskdLoss call;
        call.problem = problem(levels, batch, num_tokens, float64, customize, threads);
        call.weighting = parameters.empty() ? nullptr : parameters.data();
        call.eps = eps, call.upstream = upstream;
        call.masks = pointer(masks), call.share = pointer(share), call.loss = pointer(loss);
        py::gil_scoped_release release;
        selected->maskd_loss(call);
      },
      py::arg("levels"), py::arg("addresses"), py::arg("weighting"), py::arg("batch"), py::arg("num_tokens"),
      py::arg("float64"), py::arg("customize"), py::arg("threads"), py::arg("eps"), py::arg("upstream"),
      py::arg("masks"), py::arg("share"), py::arg("loss"));

  py::class_<MapShape>(m, "MapShape")
      .def(py::init([](int64_t batch, int64_t channels, int64_t pixels, bool interleaved, int threads) {
             return MapShape{batch, channels, pixels, interleaved, threads};
           }),
           py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("interleaved"), py::arg("threads"));

  m.def(
      "scale_pixels_forward",
      [](const MapShape& shape, const FeatureTuple& x, const FeatureTuple& y, uintptr_t scale, bool float64) {
        ScalePixels p;
        p.shape = shape, p.x = feature(x), p.y = feature(y), p.scale = pointer(scale), p.float64 = float64;
        py::gil_scoped_release release;
        selected->scale_pixels_forward(p);
      },
      py::arg("shape"), py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("float64"));

  m.def(
      "scale_pixels_backward",
      [](const MapShape& shape, const FeatureTuple& x, const FeatureTuple& grad_y, const FeatureTuple& grad_x,
         uintptr_t scale, uintptr_t grad_scale, bool float64) {
        ScalePixels p;
        p.shape = shape, p.x = feature(x), p.grad_y = feature(grad_y), p.grad_x = feature(grad_x);
        p.scale = pointer(scale), p.grad_scale = pointer(grad_scale), p.float64 = float64;
        py::gil_scoped_release release;
        selected->scale_pixels_backward(p);
      },
      py::arg("shape"), py::arg("x"), py::arg("grad_y"), py::arg("grad_x"), py::arg("scale"), py::arg("grad_scale"),
      py::arg("float64"));

  m.def(
      "squared_error_forward",
      [](const MapShape& shape, const FeatureTuple& pred, const FeatureTuple& target, uintptr_t scale, uintptr_t error,
         bool float64) {
        SquaredError p;
        p.shape = shape, p.pred = feature(pred), p.target = feature(target);
        p.scale = pointer(scale), p.error = pointer(error), p.float64 = float64;
        py::gil_scoped_release release;
        selected->squared_error_forward(p);
      },
      py::arg("shape"), py::arg("pred"), py::arg("target"), py::arg("scale"), py::arg("error"), py::arg("float64"));

  m.def(
      "squared_error_backward",
      [](const MapShape& shape, const FeatureTuple& pred, const FeatureTuple& target, const FeatureTuple& grad_pred,
         const FeatureTuple& grad_target, uintptr_t scale, uintptr_t grad_scale, uintptr_t grad, bool float64) {
        SquaredError p;
        p.shape = shape, p.pred = feature(pred), p.target = feature(target);
        p.grad_pred = feature(grad_pred), p.grad_target = feature(grad_target);
        p.scale = pointer(scale), p.grad_scale = pointer(grad_scale), p.grad = pointer(grad), p.float64 = float64;
        py::gil_scoped_release release;
        selected->squared_error_backward(p);
      },
      py::arg("shape"), py::arg("pred"), py::arg("target"), py::arg("grad_pred"), py::arg("grad_target"),
      py::arg("scale"), py::arg("grad_scale"), py::arg("grad"), py::arg("float64"));

  m.def(
      "attention_stats_forward",
      [](const MapShape& shape, const FeatureTuple& x, uintptr_t attention, uintptr_t mean, bool float64) {
        AttentionStats p;
        p.shape = shape, p.x = feature(x), p.attention = pointer(attention), p.mean = pointer(mean);
        p.float64 = float64;
        py::gil_scoped_release release;
        selected->attention_stats_forward(p);
      },
      py::arg("shape"), py::arg("x"), py::arg("attention"), py::arg("mean"), py::arg("float64"));

  m.def(
      "attention_stats_backward",
      [](const MapShape& shape, const FeatureTuple& x, const FeatureTuple& grad_x, uintptr_t grad_attention,
         uintptr_t grad_mean, bool float64) {
        AttentionStats p;
        p.shape = shape, p.x = feature(x), p.grad_x = feature(grad_x);
        p.grad_attention = pointer(grad_attention), p.grad_mean = pointer(grad_mean), p.float64 = float64;
        py::gil_scoped_release release;
        selected->attention_stats_backward(p);
      },
      py::arg("shape"), py::arg("x"), py::arg("grad_x"), py::arg("grad_attention"), py::arg("grad_mean"),
      py::arg("float64"));

  m.def(
      "sum_taps",
      [](uintptr_t table, uintptr_t slot, uintptr_t bias, uintptr_t out, int64_t height, int64_t width,
         int64_t channels, int threads) {
        SumTaps p;
        p.table = static_cast<const float*>(pointer(table)), p.slot = static_cast<const int64_t*>(pointer(slot));
        p.bias = static_cast<const float*>(pointer(bias)), p.out = static_cast<float*>(pointer(out));
        p.height = height, p.width = width, p.channels = channels, p.threads = threads;
        py::gil_scoped_release release;
        selected->sum_taps(p);
      },
      py::arg("table"), py::arg("slot"), py::arg("bias"), py::arg("out"), py::arg("height"), py::arg("width"),
      py::arg("channels"), py::arg("threads"));

  m.def(
      "streaming_difference",
      [](uintptr_t a, uintptr_t b, uintptr_t out, int64_t count, int threads) {
        py::gil_scoped_release release;
        selected->streaming_difference(static_cast<const float*>(pointer(a)), static_cast<const float*>(pointer(b)),
                                       static_cast<float*>(pointer(out)), count, threads);
      },
      py::arg("a"), py::arg("b"), py::arg("out"), py::arg("count"), py::arg("threads"),
      "out = a - b over float32, written past the caches: the floor of the benchmarks.");
}
