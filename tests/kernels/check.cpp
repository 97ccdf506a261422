// The kernels of csrc without Python: each, on random maps, against plain loops in double precision. For processors and
// compilers that no Python package is at hand for: `make aarch64` runs it in an emulator. Exit code 1 if anything is
// off.
#include "receptive.h"
#include "streams.h"

namespace maskd {
namespace {

void check(const Kernels& kernels) {
  const std::pair<DType, const char*> dtypes[] = {{DType::float32, "float32"},
                                                  {DType::float64, "float64"},
                                                  {DType::float16, "float16"},
                                                  {DType::bfloat16, "bfloat16"}};
  for (const auto& [dtype, dtype_name] : dtypes)
    for (bool interleaved : {false, true}) {
      const std::string name =
          std::string(kernels.isa) + ", " + dtype_name + (interleaved ? ", channels-last: " : ": ");
      // Odd sizes, one pixel, and maps that are shared among threads and written past the caches.
      for (const Shape& shape : {Shape{2, 19, 7, 9}, Shape{1, 3, 1, 1}, Shape{1, 260, 70, 67}}) {
        const Streams streams{kernels, shape, dtype, interleaved, name};
        streams.scale_pixels(), streams.squared_error(), streams.attention_stats();
      }
      for (bool customize : {false, true}) {
        const std::string title = name + (customize ? "customized " : "");
        for (const auto& [shapes, num_tokens] :
             {std::pair<std::vector<Shape>, int64_t>{{{2, 19, 7, 9}, {2, 5, 1, 1}}, 6}, {{{1, 40, 41, 37}}, 9}}) {
          Receptive receptive(kernels, shapes, num_tokens, dtype, interleaved, customize, title);
          receptive.statistics(), receptive.loss(false), receptive.loss(true);
        }
      }
    }
  sum_taps(kernels, std::string(kernels.isa) + ": ");
  streaming_difference(kernels, std::string(kernels.isa) + ": ");
}

}  // namespace
}  // namespace maskd

int main() {
  using namespace maskd;
  int count = 0;
  const Kernels* kernels = available_kernels(&count);
  for (int i = 0; i < count; ++i) check(kernels[i]);
  std::printf("%d results of %d build(s) of the kernels compared, %d off\n", compared, count, failed);
  return failed > 0;
}
