// Fills a model from files, on several threads: what lies there as the engine holds it is read into place or used from a
// map, and what does not is rearranged on the way, a few hundred kilobytes at a time.
//
// Tensors are announced one by one, which reads nothing; `run` then does all the work in the order of the file.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "context.h"
#include "model.h"
#include "repack.h"
#include "weight_file.h"

namespace trilemma {

// A run of bytes of a file, with their CRC-32 where one is known.
struct Piece {
  std::uint64_t offset = 0, bytes = 0;
  std::int64_t crc32 = -1;
};

struct LoadOptions {
  bool map = false;     // use the file's own pages where they lie as the engine wants them
  bool verify = false;  // compare checksums where they are known
};

class Loader {
 public:
  Loader(std::shared_ptr<Model> model, LoadOptions options) : model_(std::move(model)), options_(options) {}

  // Its number. Throws EngineFault when it can not be opened or has another size than `bytes`.
  int add_file(const std::string& path, std::uint64_t bytes);
  // A matrix that lies in the file as the engine holds it. `pieces` are the parts of Matrix::part_bytes that there are.
  void add_panels(const std::string& name, const Grid& grid, int rows, int cols, Activation activation, int file,
                  const std::vector<Piece>& pieces);
  // Rows of f32, f16 or bf16 values, and rows of GGUF blocks of a type; row i of the matrix is row order[i] of the file
  // where `order` has any. `label` is the tensor's name in the file.
  void add_rows(const std::string& name, const std::string& label, Dtype dtype, int rows, int cols,
                Activation activation, int file, const Piece& piece, std::vector<std::int32_t> order);
  void add_blocks(const std::string& name, const std::string& label, const std::string& type, int rows, int cols,
                  Activation activation, int file, const Piece& piece, std::vector<std::int32_t> order);
  // Throws EngineFault for the first fault in the order of the file, Interrupted when asked to stop.
  void run(int threads, const InterruptCheck& interrupted = {});

 private:
  // Rows of a tensor in a file, and the order that they are wanted in.
  struct Source {
    std::string label;
    int file;
    Piece piece;
    std::size_t row_bytes;
    std::shared_ptr<const std::vector<std::int32_t>> order;
  };
  struct Task {
    int file;
    std::uint64_t offset;
    std::function<void(std::vector<std::byte>&)> work;
  };
  // A piece and the checksums of the steps in which it is read.
  struct Check {
    std::string name;
    int file;
    std::uint32_t expected;
    std::vector<std::pair<std::uint32_t, std::uint64_t>> steps;
  };
  // What is done with `count` rows, the first of which is number `first`.
  using UseRows = std::function<void(const std::byte* rows, int first, int count)>;

  void check_piece(const std::string& label, int file, const Piece& piece, std::uint64_t expected) const;
  const std::byte* take_part(const std::string& name, int file, const Piece& piece);
  Check* check_of(const std::string& name, int file, const Piece& piece, std::size_t step);
  void read_part(const std::string& name, int file, const Piece& piece, const std::byte* at, bool mapped);
  void read_rows(Source source, int rows, UseRows use);
  std::vector<std::byte> take_buffer();
  void fail(std::size_t task, const std::string& fault);
  void compare_checksums() const;

  std::shared_ptr<Model> model_;
  LoadOptions options_;
  std::vector<std::shared_ptr<WeightFile>> files_;
  std::vector<Task> tasks_;
  std::deque<Check> checks_;
  std::mutex shared_;  // of what follows, between tasks
  std::vector<std::vector<std::byte>> buffers_;
  std::size_t first_fault_ = ~std::size_t(0);
  std::string fault_;
};

}  // namespace trilemma
