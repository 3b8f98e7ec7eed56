// What products in tiles of the matrix unit (AMX) share: shapes of tiles, and the room that they work in.
#pragma once

#include "panel.h"

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
  // Also a point that no store is moved past.
  void shape(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
};

// What was written for tiles is in memory: the intrinsics that load them do not say that they read it.
TRILEMMA_INLINE void finish_stores() { __asm__ volatile("" ::: "memory"); }

// Tokens that walk over the same weights, and the room of a thread for the totals of some panels: it stays in the
// second-level cache (2 MB on these processors).
constexpr int kAmxTokens = 256;
constexpr size_t kAmxWorkspace = size_t(16) * kPanel * kAmxTokens * 4;

}  // namespace
}  // namespace trilemma
