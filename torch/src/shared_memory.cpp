#include "shared_memory.hpp"

#include <c10/util/Exception.h>
#include <linux/futex.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>

#include "kernels.hpp"

namespace athanor {

namespace {

// Bytes that each rank shares at a time: those of all ranks stay in the caches.
constexpr int64_t kChunk = 256 << 10;
// How often a rank looks before it sleeps, some ten microseconds: ranks that have a core each are hardly apart.
constexpr int kSpins = 2000;
// A sleeping rank looks this often whether the one that it waits for is still alive.
constexpr auto kNap = std::chrono::milliseconds(100);

long futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* timeout) {
  // Not the private kind: the word is shared between processes.
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, timeout, nullptr, 0);
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void add(const float* x, float* sum, int64_t count) { add_to(x, sum, count); }
void add(const double* x, double* sum, int64_t count) {
  for (int64_t i = 0; i < count; i++) sum[i] += x[i];
}

// Goes through an owner's numbers.
template <typename T>
class Cursor {
 public:
  using Pieces = std::vector<typename Parts<T>::Piece>;

  explicit Cursor(const Pieces& pieces) : pieces_(&pieces) { skip_empty(); }

  bool has_more() const { return at_ < pieces_->size(); }

  // The next `most` numbers, or the rest: calls visit(data, place, count) for each piece of them, with its place among them.
  template <typename F>
  void visit(int64_t most, F&& visit) {
    int64_t place = 0;
    while (has_more() && place < most) {
      const auto& piece = (*pieces_)[at_];
      const int64_t count = std::min(most - place, piece.count - offset_);
      visit(piece.data + offset_, place, count);
      place += count;
      offset_ += count;
      skip_empty();
    }
  }

 private:
  // Goes on where the current piece has no more.
  void skip_empty() {
    while (has_more() && offset_ == (*pieces_)[at_].count) {
      at_++;
      offset_ = 0;
    }
  }

  const Pieces* pieces_;
  std::size_t at_ = 0;
  int64_t offset_ = 0;
};

}  // namespace

// What a rank tells the others; a cache line of its own.
struct alignas(64) SharedMemory::Rank {
  // Chunks that it has put into its buffers; may run over.
  std::atomic<uint32_t> done;
  // Ranks that sleep until it changes.
  std::atomic<uint32_t> sleepers;
  std::atomic<int32_t> pid;
};

SharedMemory::SharedMemory(int fd, int rank, int world, std::chrono::milliseconds timeout)
    : fd_(dup(fd)), rank_(rank), world_(world), timeout_(timeout) {
  static_assert(std::atomic<uint32_t>::is_always_lock_free);
  const std::size_t head = (sizeof(Rank) * world + 4095) / 4096 * 4096;
  // Two buffers each: a rank may fill one while others still read the one before.
  bytes_ = head + 2 * world * kChunk;
  TORCH_CHECK(fd_ >= 0 && ftruncate(fd_, static_cast<off_t>(bytes_)) == 0, "the ranks' shared memory cannot grow: ", strerror(errno));
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  TORCH_CHECK(memory != MAP_FAILED, "the ranks' shared memory cannot be mapped: ", strerror(errno));
  memory_ = static_cast<char*>(memory);
  ranks_ = reinterpret_cast<Rank*>(memory_);
  buffers_ = memory_ + head;
  ranks_[rank].pid.store(getpid());
}

SharedMemory::~SharedMemory() {
  munmap(memory_, bytes_);
  close(fd_);
}

std::shared_ptr<char> SharedMemory::region(std::size_t bytes) {
  // Whole pages, and none of nothing.
  bytes = (std::max<std::size_t>(bytes, 1) + 4095) / 4096 * 4096;
  // Now all have let go of what they will, and none makes the file shorter than another needs it.
  exchange();
  const auto fits = [&](const Region& known) { return known.bytes >= bytes && known.use.expired(); };
  auto found = std::find_if(regions_.begin(), regions_.end(), fits);
  if (found == regions_.end()) {
    const std::size_t end = regions_.empty() ? bytes_ : regions_.back().at + regions_.back().bytes;
    TORCH_CHECK(ftruncate(fd_, static_cast<off_t>(end + bytes)) == 0, "the ranks' shared memory cannot grow: ", strerror(errno));
    found = regions_.insert(regions_.end(), {end, bytes, {}});
  }
  void* memory = mmap(nullptr, found->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, static_cast<off_t>(found->at));
  TORCH_CHECK(memory != MAP_FAILED, "the ranks' shared memory cannot be mapped: ", strerror(errno));
  auto region = std::shared_ptr<char>(static_cast<char*>(memory), [size = found->bytes](char* at) { munmap(at, size); });
  found->use = region;
  return region;
}

void SharedMemory::exchange() {
  done_++;
  auto& own = ranks_[rank_];
  // Either this rank sees the sleeper, or the sleeper sees the new number: both are in one order.
  own.done.store(done_);
  if (own.sleepers.load() > 0) futex(&own.done, FUTEX_WAKE, INT_MAX, nullptr);
  const auto deadline = std::chrono::steady_clock::now() + timeout_;
  for (int rank = 0; rank < world_; rank++)
    if (rank != rank_) wait_for(rank, deadline);
}

void SharedMemory::wait_for(int rank, std::chrono::steady_clock::time_point deadline) {
  auto& other = ranks_[rank];
  const auto is_behind = [&](uint32_t done) { return static_cast<int32_t>(done - done_) < 0; };
  for (int i = 0; i < kSpins; i++) {
    if (!is_behind(other.done.load(std::memory_order_acquire))) return;
    pause();
  }
  const timespec nap{0, std::chrono::nanoseconds(kNap).count()};
  while (true) {
    other.sleepers.fetch_add(1);
    const uint32_t done = other.done.load();
    if (is_behind(done)) futex(&other.done, FUTEX_WAIT, done, &nap);
    other.sleepers.fetch_sub(1);
    if (!is_behind(other.done.load(std::memory_order_acquire))) return;
    const int32_t pid = other.pid.load();
    const bool has_ended = pid != 0 && kill(pid, 0) != 0 && errno == ESRCH;
    TORCH_CHECK_WITH(DistBackendError, !has_ended, "Connection closed by peer: rank ", rank, " (process ", pid, ") has ended");
    TORCH_CHECK_WITH(DistBackendError, std::chrono::steady_clock::now() < deadline, "timed out: rank ", rank, " was not there in ",
                     timeout_.count() / 1000, " s");
  }
}

template <typename T>
T* SharedMemory::buffer(int rank) {
  // Two by turns: a rank that fills one has seen that all have filled the other, and so that nobody reads this one any more.
  return reinterpret_cast<T*>(buffers_ + (done_ % 2 * world_ + rank) * kChunk);
}

template <typename T>
void SharedMemory::sum_to_owners(const Parts<T>& parts) {
  // Of each owner's numbers, a share of the buffer at a time, by cache lines.
  const int64_t share = kChunk / static_cast<int64_t>(sizeof(T)) / world_ / 16 * 16;
  std::vector<Cursor<T>> cursors(parts.of.begin(), parts.of.end());
  while (std::any_of(cursors.begin(), cursors.end(), [](const Cursor<T>& cursor) { return cursor.has_more(); })) {
    T* own = buffer<T>(rank_);
    std::vector<const T*> others;
    for (int rank = 0; rank < world_; rank++)
      if (rank != rank_) {
        cursors[rank].visit(share, [&](T* data, int64_t place, int64_t count) {
          std::memcpy(own + rank * share + place, data, count * sizeof(T));
        });
        others.push_back(buffer<T>(rank) + rank_ * share);
      }
    exchange();
    cursors[rank_].visit(share, [&](T* data, int64_t place, int64_t count) {
      for (const T* other : others) add(other + place, data, count);
    });
  }
}

template <typename T>
void SharedMemory::copy_from_owners(const Parts<T>& parts) {
  const int64_t share = kChunk / static_cast<int64_t>(sizeof(T));
  std::vector<Cursor<T>> cursors(parts.of.begin(), parts.of.end());
  while (std::any_of(cursors.begin(), cursors.end(), [](const Cursor<T>& cursor) { return cursor.has_more(); })) {
    std::vector<const T*> from;
    for (int rank = 0; rank < world_; rank++) from.push_back(buffer<T>(rank));
    T* own = buffer<T>(rank_);
    cursors[rank_].visit(share, [&](T* data, int64_t place, int64_t count) { std::memcpy(own + place, data, count * sizeof(T)); });
    exchange();
    for (int rank = 0; rank < world_; rank++)
      if (rank != rank_)
        cursors[rank].visit(share, [&](T* data, int64_t place, int64_t count) {
          std::memcpy(data, from[rank] + place, count * sizeof(T));
        });
  }
}

template <typename T>
void SharedMemory::sum(T* data, int64_t count) {
  Parts<T> parts;
  for (int64_t rank = 0; rank < world_; rank++) {
    const auto cut = [&](int64_t place) { return place == world_ ? count : count * place / world_ / 16 * 16; };
    parts.of.push_back({{data + cut(rank), cut(rank + 1) - cut(rank)}});
  }
  sum_to_owners(parts);
  copy_from_owners(parts);
}

template void SharedMemory::sum_to_owners(const Parts<float>&);
template void SharedMemory::copy_from_owners(const Parts<float>&);
template void SharedMemory::sum(float*, int64_t);
template void SharedMemory::sum(double*, int64_t);

}  // namespace athanor
