// CRC-32 as zlib has it: of a whole, or of parts that are computed apart and joined.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trilemma {

std::uint32_t crc32(const void* data, std::size_t bytes);

// Of a followed by b, from the checksums of both and b's length.
std::uint32_t crc32_join(std::uint32_t a, std::uint32_t b, std::uint64_t bytes_of_b);

}  // namespace trilemma
