#include "loader.h"

#include <algorithm>
#include <cstring>

#include "crc32.h"
#include "thread_pool.h"

namespace trilemma {
namespace {

constexpr std::size_t kStep = 256 << 10;  // read together: stays in a second-level cache until it is used
constexpr std::size_t kWave = 64;         // tasks between two looks at whether to stop
constexpr std::size_t kAligned = 64;

template <class Bits>
int first_not_finite(const std::byte* values, std::size_t count, Bits exponent) {
  constexpr std::size_t kLooked = 4096;  // at once, without a branch in between
  const auto is_bad = [=](std::size_t i) {
    Bits bits;
    std::memcpy(&bits, values + i * sizeof bits, sizeof bits);
    return (bits & exponent) == exponent;
  };
  for (std::size_t begin = 0; begin < count; begin += kLooked) {
    const std::size_t end = std::min(begin + kLooked, count);
    bool any = false;
    for (std::size_t i = begin; i < end; ++i) any |= is_bad(i);
    for (std::size_t i = begin; any && i < end; ++i)
      if (is_bad(i)) return int(i);
  }
  return -1;
}

int first_not_finite(const std::byte* values, std::size_t count, Dtype dtype) {
  if (dtype == kF32) return first_not_finite<std::uint32_t>(values, count, 0x7f800000u);
  return first_not_finite<std::uint16_t>(values, count, dtype == kF16 ? 0x7c00 : 0x7f80);
}

[[noreturn]] void refuse_value(const std::string& label, const std::string& path, const std::string& place) {
  throw EngineFault("Tensor '" + label + "' in " + path + " has a NaN or infinite value at " + place +
                    ". The file is damaged or its training diverged: fetch it again or use an earlier one.");
}

}  // namespace

int Loader::add_file(const std::string& path, std::uint64_t bytes) {
  files_.push_back(std::make_shared<WeightFile>(path, bytes));
  return int(files_.size()) - 1;
}

void Loader::check_piece(const std::string& label, int file, const Piece& piece, std::uint64_t expected) const {
  const WeightFile& from = *files_.at(std::size_t(file));
  if (piece.bytes != expected)
    throw EngineFault("Tensor '" + label + "' has " + std::to_string(piece.bytes) + " bytes in '" + from.path() +
                      "', expected " + std::to_string(expected) + ".");
  if (piece.offset > from.size() || piece.bytes > from.size() - piece.offset)
    throw EngineFault("'" + from.path() + "' ends inside tensor '" + label + "': it is cut. Fetch it again.");
}

void Loader::add_panels(const std::string& name, const Grid& grid, int rows, int cols, Activation activation, int file,
                        const std::vector<Piece>& pieces) {
  Matrix matrix = Matrix::unplaced(name, grid, rows, cols, activation);
  const PartBytes expected = matrix.part_bytes();
  PartPlaces places{};
  std::size_t next = 0;
  for (std::size_t part = 0; part < kMatrixParts; ++part) {
    if (expected[part] == 0) continue;
    if (next == pieces.size()) throw EngineFault("Tensor '" + name + "' lacks a part.");
    check_piece(name, file, pieces[next], expected[part]);
    places[part] = take_part(name, file, pieces[next++]);
  }
  if (next != pieces.size()) throw EngineFault("Tensor '" + name + "' has more parts than its format.");
  matrix.place(places);
  model_->add_matrix(name, std::move(matrix));
}

const std::byte* Loader::take_part(const std::string& name, int file, const Piece& piece) {
  const auto& from = files_.at(std::size_t(file));
  const std::byte* map = options_.map && piece.offset % kAligned == 0 ? from->map() : nullptr;
  if (map) model_->arena().keep(from);
  const std::byte* at = map ? map + piece.offset : model_->arena().take(piece.bytes);
  if (!map || options_.verify) read_part(name, file, piece, at, map != nullptr);
  return at;
}

Loader::Check* Loader::check_of(const std::string& name, int file, const Piece& piece, std::size_t step) {
  if (!options_.verify || piece.crc32 < 0) return nullptr;
  const std::size_t steps = step ? std::size_t((piece.bytes + step - 1) / step) : 0;
  checks_.push_back({name, file, std::uint32_t(piece.crc32), std::vector<std::pair<std::uint32_t, std::uint64_t>>(steps)});
  return &checks_.back();
}

void Loader::read_part(const std::string& name, int file, const Piece& piece, const std::byte* at, bool mapped) {
  Check* const check = check_of(name, file, piece, kStep);
  for (std::uint64_t begin = 0; begin < piece.bytes; begin += kStep) {
    const std::size_t bytes = std::size_t(std::min<std::uint64_t>(kStep, piece.bytes - begin));
    const auto work = [=, this](std::vector<std::byte>&) {
      auto* to = const_cast<std::byte*>(at) + begin;
      if (!mapped) files_[std::size_t(file)]->read(piece.offset + begin, to, bytes, name);
      if (check) check->steps[begin / kStep] = {crc32(to, bytes), bytes};
    };
    tasks_.push_back({file, piece.offset + begin, work});
  }
}

void Loader::read_rows(Source source, int rows, UseRows use) {
  if (source.order && (source.order->size() != std::size_t(rows) ||
                       std::any_of(source.order->begin(), source.order->end(), [&](int r) { return r < 0 || r >= rows; })))
    throw EngineFault("Tensor '" + source.label + "' has an order of rows that is none.");
  const std::size_t panel_bytes = std::max<std::size_t>(1, source.row_bytes * kPanel);
  const int step = int(std::clamp<std::size_t>(kStep / panel_bytes, 1, 4096)) * kPanel;
  Check* const check = source.order ? nullptr : check_of(source.label, source.file, source.piece, std::size_t(step) * source.row_bytes);
  const auto shared = std::make_shared<const std::pair<Source, UseRows>>(std::move(source), std::move(use));
  for (int first = 0; first < rows; first += step) {
    const int count = std::min(step, rows - first);
    const auto work = [=, this](std::vector<std::byte>& buffer) {
      const auto& [s, use_rows] = *shared;
      const WeightFile& from = *files_[std::size_t(s.file)];
      buffer.resize(std::size_t(count) * s.row_bytes);
      if (!s.order) from.read(s.piece.offset + std::uint64_t(first) * s.row_bytes, buffer.data(), buffer.size(), s.label);
      for (int r = 0; s.order && r < count; ++r)
        from.read(s.piece.offset + std::uint64_t((*s.order)[std::size_t(first + r)]) * s.row_bytes,
                  buffer.data() + std::size_t(r) * s.row_bytes, s.row_bytes, s.label);
      if (check) check->steps[std::size_t(first / step)] = {crc32(buffer.data(), buffer.size()), buffer.size()};
      use_rows(buffer.data(), first, count);
    };
    tasks_.push_back({shared->first.file, shared->first.piece.offset + std::uint64_t(first) * shared->first.row_bytes, work});
  }
}

void Loader::add_rows(const std::string& name, const std::string& label, Dtype dtype, int rows, int cols,
                      Activation activation, int file, const Piece& piece, std::vector<std::int32_t> order) {
  Matrix matrix = Matrix::unplaced(name, dtype, rows, cols, activation);
  const std::size_t row_bytes = std::size_t(cols) * (dtype == kF32 ? 4 : 2);
  check_piece(label, file, piece, std::uint64_t(rows) * row_bytes);
  std::byte* to = model_->arena().take(matrix.bytes());
  matrix.place({to});
  const std::size_t held = dtype == kBf16 ? round_up(std::size_t(cols), kBlock) * 2 : row_bytes;
  const auto use = [=, this](const std::byte* values, int first, int count) {
    const int bad = first_not_finite(values, std::size_t(count) * std::size_t(cols), dtype);
    if (bad >= 0)
      refuse_value(label, files_[std::size_t(file)]->path(),
                   "(" + std::to_string(first + bad / cols) + ", " + std::to_string(bad % cols) + ")");
    std::byte* at = to + std::size_t(first) * held;
    if (dtype == kBf16)
      pair_rows(values, count, cols, at);
    else
      std::memcpy(at, values, std::size_t(count) * row_bytes);
  };
  auto wanted = order.empty() ? nullptr : std::make_shared<const std::vector<std::int32_t>>(std::move(order));
  read_rows({label, file, piece, row_bytes, std::move(wanted)}, rows, use);
  model_->add_matrix(name, std::move(matrix));
}

void Loader::add_blocks(const std::string& name, const std::string& label, const std::string& type_name, int rows,
                        int cols, Activation activation, int file, const Piece& piece, std::vector<std::int32_t> order) {
  const BlockType& type = block_type(type_name);
  Matrix matrix = Matrix::unplaced(name, type.grid, rows, cols, activation);
  if (cols % type.values != 0)
    throw EngineFault("Tensor '" + label + "' has rows of " + std::to_string(cols) + ", no multiple of the " +
                      std::to_string(type.values) + " values of a block of " + type.name + ".");
  const std::size_t row_bytes = type.row_bytes(cols);
  check_piece(label, file, piece, std::uint64_t(rows) * row_bytes);
  const PartBytes bytes = matrix.part_bytes();
  PartPlaces places{};
  for (std::size_t i = 0; i < kMatrixParts; ++i) places[i] = bytes[i] ? model_->arena().take(bytes[i]) : nullptr;
  matrix.place(places);
  const std::size_t panels = std::size_t(matrix.panels());
  const auto use = [=, this, &type](const std::byte* values, int first, int count) {
    for (int r = 0; r < count; r += kPanel) {
      Bytes part[kMatrixParts];
      for (std::size_t i = 0; i < kMatrixParts; ++i)
        if (bytes[i]) part[i] = {places[i] + std::size_t((first + r) / kPanel) * (bytes[i] / panels), bytes[i] / panels};
      const auto* from = reinterpret_cast<const std::uint8_t*>(values) + std::size_t(r) * row_bytes;
      const int bad = type.repack(from, row_bytes, std::min<int>(kPanel, count - r), cols / type.values,
                                  {part[0], part[1], part[2], part[3], part[4]});
      if (bad >= 0) refuse_value(label, files_[std::size_t(file)]->path(), "row " + std::to_string(first + r + bad));
    }
  };
  auto wanted = order.empty() ? nullptr : std::make_shared<const std::vector<std::int32_t>>(std::move(order));
  read_rows({label, file, piece, row_bytes, std::move(wanted)}, rows, use);
  model_->add_matrix(name, std::move(matrix));
}

std::vector<std::byte> Loader::take_buffer() {
  const std::lock_guard lock(shared_);
  if (buffers_.empty()) return {};
  std::vector<std::byte> buffer = std::move(buffers_.back());
  buffers_.pop_back();
  return buffer;
}

void Loader::fail(std::size_t task, const std::string& fault) {
  const std::lock_guard lock(shared_);
  if (task >= first_fault_) return;
  first_fault_ = task;
  fault_ = fault;
}

void Loader::run(int threads, const InterruptCheck& interrupted) {
  std::stable_sort(tasks_.begin(), tasks_.end(), [](const Task& a, const Task& b) {
    return std::pair(a.file, a.offset) < std::pair(b.file, b.offset);
  });
  for (std::size_t begin = 0; begin < tasks_.size(); begin += kWave) {
    if (interrupted && interrupted()) throw Interrupted{};
    const int count = int(std::min(kWave, tasks_.size() - begin));
    ThreadPool::instance().run(threads, count, [&](int i) {
      const std::size_t number = begin + std::size_t(i);
      try {
        std::vector<std::byte> buffer = take_buffer();
        tasks_[number].work(buffer);
        const std::lock_guard lock(shared_);
        buffers_.push_back(std::move(buffer));
      } catch (const std::exception& fault) {
        fail(number, fault.what());
      }
    });
    if (!fault_.empty()) throw EngineFault(fault_);
  }
  tasks_.clear();
  buffers_.clear();
  compare_checksums();
  for (const auto& file : files_) file->check_size();
}

void Loader::compare_checksums() const {
  for (const Check& check : checks_) {
    std::uint32_t whole = 0;
    for (const auto& [sum, bytes] : check.steps) whole = crc32_join(whole, sum, bytes);
    if (whole != check.expected)
      throw EngineFault("Tensor '" + check.name + "' in '" + files_[std::size_t(check.file)]->path() +
                        "' does not match its checksum: the file was changed or damaged. Copy or make it again.");
  }
}

}  // namespace trilemma
