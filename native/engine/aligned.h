// Memory owned by the engine: 64-byte aligned, never copied, counted exactly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace trilemma {

// Zero-filled. Pages that are never touched cost no resident memory.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(std::size_t bytes, std::size_t alignment = 64) : bytes_(bytes) {
    if (bytes == 0) return;
    // calloc rather than aligned_alloc + memset: large blocks come as untouched zero pages.
    raw_ = std::calloc(1, bytes + alignment);
    if (!raw_) throw std::bad_alloc();
    const auto address = reinterpret_cast<std::uintptr_t>(raw_);
    data_ = reinterpret_cast<std::byte*>((address + alignment - 1) & ~std::uintptr_t(alignment - 1));
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept { swap(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    AlignedBuffer moved(std::move(other));
    swap(moved);
    return *this;
  }
  ~AlignedBuffer() { std::free(raw_); }

  std::size_t bytes() const { return bytes_; }
  std::byte* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void swap(AlignedBuffer& other) noexcept {
    std::swap(raw_, other.raw_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  void* raw_ = nullptr;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

inline std::size_t round_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace trilemma
