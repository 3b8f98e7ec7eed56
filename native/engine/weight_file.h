// A file of weights, read at offsets by any thread, or mapped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace trilemma {

class WeightFile {
 public:
  // Throws EngineFault when it can not be opened, or has not `expected` bytes: it changed since its header was checked.
  WeightFile(std::string path, std::uint64_t expected);
  WeightFile(const WeightFile&) = delete;
  ~WeightFile();

  // Throws EngineFault, naming `what`, when the file ends before or can not be read: what shrinks meanwhile is an
  // error here and no signal, which a map would give.
  void read(std::uint64_t offset, void* to, std::size_t bytes, const std::string& what) const;
  // The whole file, read-only, as long as this object; null where it can not be mapped.
  const std::byte* map();
  // Throws EngineFault unless the file still has every byte that it had.
  void check_size() const;

  const std::string& path() const { return path_; }
  std::uint64_t size() const { return size_; }

 private:
  std::string path_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
  void* map_ = nullptr;
};

}  // namespace trilemma
