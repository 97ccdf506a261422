// Memory for large gradients, kept from one training step to the next. The C library maps every block above 32 MiB
// anew, and having the system zero it page by page costs more than computing what goes into it.
#pragma once

#include <cstdint>

namespace maskd {

// One piece of memory, on a boundary of 64 bytes at least; a large one lies on 2 MiB boundaries so that huge pages can
// back it. Destroying it gives it back to the pool, or a small one to the C library, which keeps those by itself.
class Block {
 public:
  explicit Block(int64_t bytes);  // throws std::bad_alloc
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
  int64_t capacity_;
};

struct PoolState {
  int64_t in_use, idle;  // bytes
};

// Idle memory never exceeds twice what was in use at one time: sizes that alternate are all kept.
PoolState pool_state();
void release_idle_memory();

}  // namespace maskd
