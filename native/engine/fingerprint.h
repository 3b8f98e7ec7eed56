// A 64-bit name of bytes, to notice that something is not what it was; no protection against those who want to deceive.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

namespace trilemma {

class Fingerprint {
 public:
  void add(const void* data, std::size_t bytes) {
    const auto* at = static_cast<const unsigned char*>(data);
    std::uint64_t lanes[4] = {value_, value_ + 1, value_ + 2, value_ + 3};
    std::size_t done = 0;
    for (; done + 32 <= bytes; done += 32)
      for (int i = 0; i < 4; ++i) lanes[i] = mixed(lanes[i], word(at + done + 8 * i, 8));
    value_ = mixed(mixed(lanes[0], lanes[1]), mixed(lanes[2], lanes[3]));
    for (; done < bytes; done += 8) value_ = mixed(value_, word(at + done, bytes - done < 8 ? bytes - done : 8));
    value_ = mixed(value_, bytes);
  }
  template <class Number>
  void number(Number n) {
    add(&n, sizeof(n));
  }
  void text(const std::string& s) { add(s.data(), s.size()); }
  std::uint64_t value() const { return value_; }

 private:
  static std::uint64_t word(const unsigned char* at, std::size_t bytes) {
    std::uint64_t w = 0;
    std::memcpy(&w, at, bytes);
    return w;
  }
  // One round of Collet's xxHash64 and the shift of its end.
  static std::uint64_t mixed(std::uint64_t a, std::uint64_t b) {
    a += b * 0xC2B2AE3D27D4EB4FULL;
    a = ((a << 31) | (a >> 33)) * 0x9E3779B185EBCA87ULL;
    return a ^ (a >> 29);
  }

  std::uint64_t value_ = 0x27D4EB2F165667C5ULL;
};

}  // namespace trilemma
