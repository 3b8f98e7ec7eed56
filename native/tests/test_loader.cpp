// Files into a model: places, maps, checksums, blocks, cut files; under threads and sanitizers.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "engine/crc32.h"
#include "engine/loader.h"

#define EXPECT(condition) CHECK(condition, #condition)

using namespace trilemma;

namespace {

// A file of these bytes, removed at the end.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::vector<std::uint8_t>& bytes) {
    const int descriptor = mkstemp(path_);
    EXPECT(descriptor >= 0 && write(descriptor, bytes.data(), bytes.size()) == ssize_t(bytes.size()));
    close(descriptor);
  }
  ~TemporaryFile() { unlink(path_); }
  const char* path() const { return path_; }

 private:
  char path_[32] = "/tmp/trilemma-XXXXXX";
};

DecoderConfig config_of(int vocab, int dim) {
  DecoderConfig c;
  c.vocab_size = vocab;
  c.dim = dim;
  c.max_context = 8;
  c.tied = true;
  c.layers.push_back({std::nullopt, FfnSpec{32}, {}});
  return c;
}

std::vector<std::uint8_t> random_bytes(std::size_t n) {
  std::vector<std::uint8_t> bytes(n);
  for (auto& b : bytes) b = std::uint8_t(check::between(0, 255));
  return bytes;
}

void put_half(std::uint8_t* at, int exponent) {  // 2^exponent
  const std::uint16_t bits = std::uint16_t((exponent + 15) << 10);
  std::memcpy(at, &bits, 2);
}

template <class Work>
std::string fault_of(const Work& work) {
  try {
    work();
  } catch (const EngineFault& fault) {
    return fault.what();
  }
  return "";
}

void test_crc_of_parts_is_that_of_the_whole() {
  EXPECT(crc32("123456789", 9) == 0xcbf43926u);  // the check value of its catalogue
  const auto bytes = random_bytes(70000);
  for (const std::size_t cut : {std::size_t(0), std::size_t(1), std::size_t(63), std::size_t(4096), bytes.size()})
    EXPECT(crc32_join(crc32(bytes.data(), cut), crc32(bytes.data() + cut, bytes.size() - cut), bytes.size() - cut) ==
          crc32(bytes.data(), bytes.size()));
}

// 16 values of a panel's row are read back by Matrix::read_row, which knows nothing of blocks.
void test_q4_0_rows_are_their_values(int threads) {
  const int rows = 1000, cols = 96, blocks = cols / 32;
  auto bytes = random_bytes(64 + std::size_t(rows * blocks) * 18);
  for (int i = 0; i < rows * blocks; ++i) put_half(&bytes[64 + std::size_t(i) * 18], i % 5 - 2);
  const TemporaryFile file(bytes);
  std::vector<std::int32_t> order(std::size_t(rows), 0);
  for (int i = 0; i < rows; ++i) order[std::size_t(i)] = rows - 1 - i;
  const auto model = std::make_shared<Model>(config_of(rows, cols));
  Loader loader(model, {});
  const int number = loader.add_file(file.path(), bytes.size());
  loader.add_blocks("embedding.weight", "token_embd", "Q4_0", rows, cols, Activation::kInt8, number,
                    {64, bytes.size() - 64, -1}, order);
  loader.run(threads);
  std::vector<float> row(static_cast<std::size_t>(cols));
  for (int i = 0; i < rows; ++i) {
    model->matrix("embedding.weight").read_row(i, row.data());
    for (int k = 0; k < cols; ++k) {
      const int index = order[std::size_t(i)] * blocks + k / 32;
      const std::uint8_t packed = bytes[64 + std::size_t(index) * 18 + 2 + std::size_t(k % 16)];
      const int code = (k % 32 < 16 ? packed & 15 : packed >> 4) - 8;
      EXPECT(row[std::size_t(k)] == float(code) * std::ldexp(1.0f, index % 5 - 2));
    }
  }
}

struct Packed {
  std::vector<std::uint8_t> bytes;
  std::vector<Piece> pieces;
};

// 8-bit codes and scales of 8000 rows at offsets 64 and behind, with their checksums.
Packed packed_file(int rows, int cols) {
  Packed p;
  const std::size_t codes = std::size_t(rows * cols), scales = std::size_t(rows * (cols / 32) * 2);
  p.bytes = random_bytes(64 + codes + scales);
  for (std::size_t i = 0; i < scales; i += 2) put_half(&p.bytes[64 + codes + i], -3);
  p.pieces = {{64, codes, crc32(&p.bytes[64], codes)}, {64 + codes, scales, crc32(&p.bytes[64 + codes], scales)}};
  return p;
}

std::shared_ptr<Model> load(const char* path, const Packed& p, int rows, int cols, LoadOptions options, int threads) {
  auto model = std::make_shared<Model>(config_of(rows, cols));
  Loader loader(model, options);
  const int file = loader.add_file(path, p.bytes.size());
  loader.add_panels("embedding.weight", {8, true, 32}, rows, cols, Activation::kInt8, file, p.pieces);
  loader.run(threads);
  return model;
}

void test_panels_are_the_same_copied_and_mapped() {
  const int rows = 8000, cols = 64;
  const Packed p = packed_file(rows, cols);
  const TemporaryFile file(p.bytes);
  for (const bool map : {false, true})
    for (const bool verify : {false, true})
      for (const int threads : {1, 2, 4}) {
        const auto model = load(file.path(), p, rows, cols, {map, verify}, threads);
        const PackedView& view = model->matrix("embedding.weight").packed_view();
        EXPECT(std::memcmp(view.codes, &p.bytes[64], p.pieces[0].bytes) == 0);
        EXPECT(std::memcmp(view.scales, &p.bytes[p.pieces[1].offset], p.pieces[1].bytes) == 0);
      }
}

void test_damage_is_a_fault() {
  const int rows = 8000, cols = 64;
  Packed p = packed_file(rows, cols);
  p.bytes[p.pieces[1].offset + 77] ^= 4;
  const TemporaryFile file(p.bytes);
  for (const bool map : {false, true})
    EXPECT(fault_of([&] { load(file.path(), p, rows, cols, {map, true}, 2); }).find("checksum") != std::string::npos);
  EXPECT(fault_of([&] { load(file.path(), p, rows, cols, {true, false}, 2); }).empty());
  const auto model = std::make_shared<Model>(config_of(rows, cols));
  Loader loader(model, {});
  EXPECT(!fault_of([&] { loader.add_file(file.path(), p.bytes.size() + 1); }).empty());
  EXPECT(!fault_of([&] { loader.add_file("/nowhere/at/all", 1); }).empty());
  const int number = loader.add_file(file.path(), p.bytes.size());
  for (const Piece wrong : {Piece{64, p.pieces[0].bytes - 1}, Piece{p.bytes.size(), p.pieces[0].bytes},
                            Piece{~std::uint64_t(0) - 8, p.pieces[0].bytes}})
    EXPECT(!fault_of([&] {
             loader.add_panels("embedding.weight", {8, true, 32}, rows, cols, Activation::kInt8, number,
                               {wrong, p.pieces[1]});
           }).empty());
}

// Cut after it was announced: reading ends in a fault, and nothing of it is a signal.
void test_a_file_that_is_cut_while_it_is_read_is_a_fault() {
  const int rows = 8000, cols = 64;
  const Packed p = packed_file(rows, cols);
  const TemporaryFile file(p.bytes);
  const auto model = std::make_shared<Model>(config_of(rows, cols));
  Loader loader(model, {});
  const int number = loader.add_file(file.path(), p.bytes.size());
  loader.add_panels("embedding.weight", {8, true, 32}, rows, cols, Activation::kInt8, number, p.pieces);
  EXPECT(truncate(file.path(), 5000) == 0);
  EXPECT(fault_of([&] { loader.run(2); }).find("ends inside") != std::string::npos);
}

}  // namespace

int main() {
  test_crc_of_parts_is_that_of_the_whole();
  for (const int threads : {1, 2, 4}) test_q4_0_rows_are_their_values(threads);
  test_panels_are_the_same_copied_and_mapped();
  test_damage_is_a_fault();
  test_a_file_that_is_cut_while_it_is_read_is_a_fault();
  return check::finish("test_loader");
}
