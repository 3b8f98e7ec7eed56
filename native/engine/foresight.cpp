#include "foresight.h"

#include <algorithm>

namespace trilemma {

void Foresight::restart() {
  if (at_ == 0) return;
  jobs_.resize(at_);
  whole_ = true;
  at_ = 0;
}

NextRead first_read(const Matrix& matrix, int panel, int panels, std::size_t most) {
  const auto parts = matrix.parts();
  // Of an even share for each panel, which is what packed layouts have.
  const auto share = [&](const Bytes& part) { return part.size / std::size_t(matrix.panels()); };
  const auto from = [&](const Bytes& part) {
    return static_cast<const std::byte*>(part.data) + std::size_t(panel) * share(part);
  };
  const Bytes &codes = parts[0], &scales = parts[1];
  const std::size_t bytes = share(codes) * std::size_t(panels), used = std::min(bytes, most);
  if (!bytes) return {};
  return {from(codes), used, from(scales), std::size_t(double(share(scales)) * panels * double(used) / double(bytes))};
}

}  // namespace trilemma
