#include "probe.h"

#include <algorithm>
#include <chrono>

#include "dispatch.h"
#include "product.h"
#include "thread_pool.h"

namespace trilemma {
namespace {

using Clock = std::chrono::steady_clock;

struct Job {
  std::vector<Linear> linears;
  InputForms forms;
  int columns = 0, rows = 0;
};

Job job_of(const Model& model, const std::vector<std::string>& names) {
  Job job;
  for (const std::string& name : names) {
    const Matrix& matrix = model.matrix(name);
    if (job.columns && matrix.cols() != job.columns)
      throw EngineFault("'" + name + "' takes " + std::to_string(matrix.cols()) + " inputs, the others of its job " +
                        std::to_string(job.columns) + ".");
    job.linears.push_back({&matrix, nullptr});
    job.forms.add(job.linears.back());
    job.columns = matrix.cols();
    job.rows += matrix.rows();
  }
  if (job.linears.empty()) throw EngineFault("A job has no matrix.");
  return job;
}

// Room for the largest job's input and output.
struct Scratch {
  ProductInput input;
  AlignedBuffer x, y;

  Scratch(const Kernels& kernels, const std::vector<Job>& jobs, int tokens) {
    InputForms all;
    int columns = 0, rows = 0;
    for (const Job& job : jobs) {
      for (const Linear& linear : job.linears) all.add(linear);
      columns = std::max(columns, job.columns);
      rows = std::max(rows, job.rows);
    }
    input.reserve(kernels, all, columns, tokens, false);
    const size_t floats = size_t(tokens) * round_up(size_t(columns), kBlock);
    x = AlignedBuffer(floats * sizeof(float));
    y = AlignedBuffer(size_t(tokens) * size_t(rows) * sizeof(float));
    for (size_t i = 0; i < floats; ++i) x.as<float>()[i] = float(int(i * 7919 % 2001) - 1000) * 1e-3f;
  }
};

void run(const Kernels& kernels, int threads, int tokens, const Job& job, Scratch& s) {
  s.input.begin(job.forms, s.x.as<float>(), job.columns, tokens);
  ThreadPool::instance().run_rows(threads, tokens, job.columns, [&](int i) { s.input.prepare(kernels, i); });
  std::vector<Product> products;
  float* y = s.y.as<float>();
  for (const Linear& linear : job.linears) {
    products.push_back({&linear, y, size_t(linear.weight->rows())});
    y += size_t(tokens) * size_t(linear.weight->rows());
  }
  multiply(kernels, threads, s.input, products);
}

}  // namespace

std::vector<double> time_products(const Model& model, const ProductJobs& names, int tokens, int threads,
                                  const std::string& isa, int passes) {
  if (tokens < 1 || threads < 1) throw EngineFault("At least one token and one thread are needed.");
  const Kernels& kernels = pick_kernels(isa);
  std::vector<Job> jobs;
  for (const auto& job : names) jobs.push_back(job_of(model, job));
  Scratch scratch(kernels, jobs, tokens);
  std::vector<double> seconds;
  for (int pass = 0; pass < passes; ++pass) {
    const auto begun = Clock::now();
    for (const Job& job : jobs) run(kernels, threads, tokens, job, scratch);
    seconds.push_back(std::chrono::duration<double>(Clock::now() - begun).count());
  }
  return seconds;
}

}  // namespace trilemma
