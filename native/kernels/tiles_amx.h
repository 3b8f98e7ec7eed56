// The eight tiles of the matrix unit: their shapes, and giving the unit back.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace trilemma {
namespace {

// Rows and bytes a row of the eight tiles, as the instruction reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  void set(int first, int last, int row_count, int row_bytes) {
    for (int i = first; i <= last; ++i) rows[i] = uint8_t(row_count), bytes[i] = uint16_t(row_bytes);
  }
};

// The tiles of one product; other code of this thread finds the unit as if never used.
struct Tiles {
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
  // Also a point that no store is moved past: the intrinsics that load tiles do not say what they read.
  void shape(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
};

}  // namespace
}  // namespace trilemma
