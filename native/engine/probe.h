// Times the engine's own matrix products on the matrices of a model, for device profiles.
//
// A job is what a layer runs as one: products of the same input, prepared once. Jobs follow each other as in a step,
// so their matrices are in cache or come from memory as in a model of that size. Values mean nothing.
#pragma once

#include <string>
#include <vector>

#include "model.h"

namespace trilemma {

using ProductJobs = std::vector<std::vector<std::string>>;

// Seconds of each of `passes` walks over all jobs; the first finds the matrices as they were left, perhaps in memory.
// Throws EngineFault for an unknown matrix, or products of one job whose inputs differ in width.
std::vector<double> time_products(const Model& model, const ProductJobs& jobs, int tokens, int threads,
                                  const std::string& isa, int passes);

}  // namespace trilemma
