#include "int8_form.h"

#include <bit>

namespace trilemma {

std::size_t Int8Form::bytes_of(const Int8Needs& needs, std::size_t cells, std::size_t rows) const {
  if (!needs.codes) return 0;
  const std::size_t arrays = 1 + std::size_t(needs.sums) + 2 * std::size_t(needs.half_sums) + std::size_t(std::popcount(needs.starts));
  return cells * (kBlock + 4 * arrays) + (shared_rows_ ? (rows + cells) * 4 : 0);
}

void Int8Form::reserve(const Int8Needs& needs, std::size_t cells, std::size_t rows) {
  if (!needs.codes) return;
  codes_ = AlignedBuffer(cells * kBlock);
  scale_ = AlignedBuffer(cells * 4);
  if (shared_rows_) row_scale_ = AlignedBuffer(rows * 4), base_ = AlignedBuffer(cells * 4);
  if (needs.sums) sums_ = AlignedBuffer(cells * 4);
  for (AlignedBuffer& half : half_sums_)
    if (needs.half_sums) half = AlignedBuffer(cells * 4);
  for (int i = 0; i < kStarts; ++i)
    if (needs.starts >> i & 1) starts_[i] = AlignedBuffer(cells * 4);
}

std::size_t Int8Form::bytes() const {
  std::size_t total = codes_.bytes() + row_scale_.bytes() + scale_.bytes() + base_.bytes() + sums_.bytes();
  for (const AlignedBuffer& b : half_sums_) total += b.bytes();
  for (const AlignedBuffer& b : starts_) total += b.bytes();
  return total;
}

Int8Input Int8Form::view(const Int8Needs& needs, std::size_t cell, std::size_t row, int width, int blocks) const {
  Int8Input view{};
  if (!needs.codes) return view;
  view.codes = codes_.as<std::int8_t>() + cell * kBlock;
  if (shared_rows_) view.row_scale = row_scale_.as<float>() + row, view.base = base_.as<float>() + cell;
  view.scale = scale_.as<float>() + cell;
  if (needs.sums) view.sum = sums_.as<float>() + cell;
  for (int i = 0; i < 2 && needs.half_sums; ++i) view.half_sum[i] = half_sums_[i].as<float>() + cell;
  for (int i = 0; i < kStarts; ++i)
    if (needs.starts >> i & 1) view.start[i] = starts_[i].as<std::int32_t>() + cell;
  view.width = width;
  view.blocks = blocks;
  return view;
}

}  // namespace trilemma
