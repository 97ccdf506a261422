#include "memory_pool.h"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace maskd {
namespace {

#if defined(MASKD_SANITIZE)
constexpr int64_t kPooledBytes = INT64_MAX;  // nothing: AddressSanitizer sees the end of each block
#else
constexpr int64_t kPooledBytes = 128 << 10;  // from here on
#endif
constexpr int64_t kGranule = 64 << 10;  // pooled capacities are multiples of it
constexpr int64_t kCacheLine = 64;
constexpr int64_t kHugePage = 2 << 20;

int64_t round_up(int64_t bytes, int64_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// nullptr where the system refuses.
void* allocate(int64_t bytes, int64_t boundary) {
  void* data = nullptr;
  return posix_memalign(&data, size_t(boundary), size_t(bytes > 0 ? bytes : 1)) == 0 ? data : nullptr;
}

struct Piece {
  void* data;
  int64_t capacity;
};

struct Pool {
  std::mutex mutex;
  std::list<Piece> idle;  // the one given back last comes first
  int64_t in_use = 0, idle_bytes = 0, most_in_use = 0;

  void shrink(int64_t limit) {  // frees what has been idle longest
    while (idle_bytes > limit) {
      idle_bytes -= idle.back().capacity;
      std::free(idle.back().data);
      idle.pop_back();
    }
  }

  // Under the lock. Idle memory is freed before the system's refusal counts.
  void* allocate_or_shrink(int64_t bytes, int64_t boundary) {
    void* data = allocate(bytes, boundary);
    if (!data && idle_bytes > 0) {
      shrink(0);
      data = allocate(bytes, boundary);
    }
    if (!data) throw std::bad_alloc();
    return data;
  }
};

Pool& pool() {
  static Pool* instance = new Pool;  // never destroyed: tensors may outlive everything else in the process
  return *instance;
}

}  // namespace

Block::Block(int64_t bytes) : capacity_(bytes) {
  if (bytes < kPooledBytes) {
    data_ = allocate(bytes, kCacheLine);
    if (data_) return;
  }
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  if (bytes < kPooledBytes) {
    data_ = p.allocate_or_shrink(bytes, kCacheLine);
    return;
  }
  capacity_ = round_up(bytes, kGranule);
  for (auto piece = p.idle.begin(); piece != p.idle.end(); ++piece) {
    // A piece a quarter too large will do: image sizes change from step to step.
    if (piece->capacity < capacity_ || piece->capacity > capacity_ + capacity_ / 4) continue;
    data_ = piece->data, capacity_ = piece->capacity;
    p.idle_bytes -= capacity_, p.in_use += capacity_;
    p.idle.erase(piece);
    if (p.in_use > p.most_in_use) p.most_in_use = p.in_use;
    return;
  }
  const bool huge = capacity_ >= kHugePage;
  data_ = p.allocate_or_shrink(capacity_, huge ? kHugePage : kGranule);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (huge) madvise(data_, size_t(capacity_), MADV_HUGEPAGE);
#endif
  p.in_use += capacity_;
  if (p.in_use > p.most_in_use) p.most_in_use = p.in_use;
}

Block::~Block() {
  if (capacity_ < kPooledBytes) {
    std::free(data_);
    return;
  }
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  p.in_use -= capacity_;
  try {
    p.idle.push_front({data_, capacity_});
  } catch (const std::bad_alloc&) {
    std::free(data_);
    return;
  }
  p.idle_bytes += capacity_;
  p.shrink(2 * p.most_in_use);
}

PoolState pool_state() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  return {p.in_use, p.idle_bytes};
}

void release_idle_memory() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  p.shrink(0);
  p.most_in_use = p.in_use;
}

}  // namespace maskd
