#include "weight_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "config.h"

namespace trilemma {
namespace {

constexpr std::size_t kMostAtOnce = 1 << 30;  // of one call, below every system's limit

std::uint64_t size_of(int descriptor, const std::string& path) {
  struct stat found {};
  if (fstat(descriptor, &found) != 0) throw EngineFault("Can not read '" + path + "': " + std::strerror(errno) + ".");
  return std::uint64_t(found.st_size);
}

}  // namespace

WeightFile::WeightFile(std::string path, std::uint64_t expected) : path_(std::move(path)), size_(expected) {
  descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) throw EngineFault("Can not read '" + path_ + "': " + std::strerror(errno) + ".");
  try {
    check_size();
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
#if defined(POSIX_FADV_SEQUENTIAL)
  posix_fadvise(descriptor_, 0, 0, POSIX_FADV_SEQUENTIAL);
#endif
}

WeightFile::~WeightFile() {
  if (map_) munmap(map_, size_);
  ::close(descriptor_);
}

void WeightFile::check_size() const {
  const std::uint64_t found = size_of(descriptor_, path_);
  if (found != size_)
    throw EngineFault("'" + path_ + "' has " + std::to_string(found) + " bytes, and had " + std::to_string(size_) +
                      " when its header was read: it is being written or was cut. Open it again when it is complete.");
}

void WeightFile::read(std::uint64_t offset, void* to, std::size_t bytes, const std::string& what) const {
  auto* at = static_cast<std::byte*>(to);
  while (bytes > 0) {
    const ssize_t count = pread(descriptor_, at, std::min(bytes, kMostAtOnce), off_t(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw EngineFault("Can not read '" + path_ + "': " + std::strerror(errno) + ".");
    if (count == 0)
      throw EngineFault("'" + path_ + "' ends inside tensor '" + what + "': it is cut or being written. Fetch it again.");
    at += count;
    offset += std::uint64_t(count);
    bytes -= std::size_t(count);
  }
}

const std::byte* WeightFile::map() {
  if (!map_ && size_ > 0) {
    void* found = mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor_, 0);
    if (found == MAP_FAILED) return nullptr;
    map_ = found;
    check_size();
    madvise(map_, size_, MADV_WILLNEED);
  }
  return static_cast<const std::byte*>(map_);
}

}  // namespace trilemma
