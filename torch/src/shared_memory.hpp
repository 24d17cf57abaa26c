// Sums over the ranks of one machine through memory that they share. Through Gloo each number would go down the loopback's TCP and come
// up again, which on a CPU takes the time of the backward pass's cores.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

namespace athanor {

// Numbers of which each belongs to one rank: by owner, where they are. Owners and lengths are the same on all ranks.
template <typename T>
struct Parts {
  struct Piece {
    T* data;
    int64_t count;
  };
  std::vector<std::vector<Piece>> of;
};

// All ranks have to call the collectives in the same order, with as many numbers. They throw c10::DistBackendError where a rank has ended
// or does not come.
class SharedMemory {
 public:
  // Maps the file `fd`, which all ranks have and which is empty before the first of them maps it. No collective waits longer than
  // `timeout`. Throws c10::Error.
  SharedMemory(int fd, int rank, int world, std::chrono::milliseconds timeout);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // Replaces this rank's own numbers by their sums over all ranks; the others' stay as they are.
  template <typename T>
  void sum_to_owners(const Parts<T>& parts);
  // Replaces the others' numbers by what they have.
  template <typename T>
  void copy_from_owners(const Parts<T>& parts);
  // Replaces the numbers by their sums over all ranks; all of them get the same bits.
  template <typename T>
  void sum(T* data, int64_t count);
  // Returns once all ranks have called it; what each has written before is there for all.
  void sync() { exchange(); }
  // Memory that all ranks have in common until the last of them lets go of it. What is in it is not said. A collective.
  std::shared_ptr<char> region(std::size_t bytes);

  int rank() const { return rank_; }
  int world() const { return world_; }

 private:
  struct Rank;

  // Where a rank puts its numbers of the current chunk.
  template <typename T>
  T* buffer(int rank);
  // Says that this rank has filled its buffer, and waits until all have.
  void exchange();
  void wait_for(int rank, std::chrono::steady_clock::time_point deadline);

  // A part of the file, which may be in use.
  struct Region {
    std::size_t at, bytes;
    std::weak_ptr<char> use;
  };

  const int fd_, rank_, world_;
  const std::chrono::milliseconds timeout_;
  char* memory_ = nullptr;
  std::size_t bytes_ = 0;
  Rank* ranks_ = nullptr;
  char* buffers_ = nullptr;
  // Chunks that this rank has put into its buffer.
  uint32_t done_ = 0;
  // Behind the buffers; the same on all ranks.
  std::vector<Region> regions_;
};

}  // namespace athanor
