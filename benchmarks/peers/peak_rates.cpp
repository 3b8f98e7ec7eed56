// What the processor's own instructions reach with nothing around them, and how fast memory is read: the ceilings of
// benchmarks/engines.py. Prints one JSON object. Usage: peak_rates THREADS BYTES
//
// Products: 16 accumulators that do not depend on each other, operands in registers, best of many short tries on all
// threads together. An instruction set that the processor lacks is left out.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kAccumulators = 16;  // with 24 the compiler spills, and vpdpbusd reads half of its rate
constexpr int64_t kSteps = 2'000'000;
volatile float sink;

__attribute__((target("avx512f,avx512vnni"))) void run_vnni() {
    __m512i sums[kAccumulators];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    __m512i left = _mm512_set1_epi8(3), right = _mm512_set1_epi8(5);
    for (int64_t step = 0; step < kSteps; ++step) {
        asm volatile("" : "+v"(left), "+v"(right));
#pragma GCC unroll 16
        for (int at = 0; at < kAccumulators; ++at) sums[at] = _mm512_dpbusd_epi32(sums[at], left, right);
    }
    for (auto& sum : sums) sink = static_cast<float>(_mm512_reduce_add_epi32(sum));
}

__attribute__((target("avx512f,avx512bf16"))) void run_bf16() {
    __m512 sums[kAccumulators];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    __m512i left = _mm512_set1_epi16(0x3f80), right = left;
    for (int64_t step = 0; step < kSteps; ++step) {
        asm volatile("" : "+v"(left), "+v"(right));
#pragma GCC unroll 16
        for (int at = 0; at < kAccumulators; ++at) sums[at] = _mm512_dpbf16_ps(sums[at], (__m512bh)left, (__m512bh)right);
    }
    for (auto& sum : sums) sink = _mm512_reduce_add_ps(sum);
}

__attribute__((target("avx512f"))) void run_f32() {
    __m512 sums[kAccumulators];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    __m512 left = _mm512_set1_ps(1.0f), right = _mm512_set1_ps(1e-8f);
    for (int64_t step = 0; step < kSteps; ++step) {
        asm volatile("" : "+v"(left), "+v"(right));
#pragma GCC unroll 16
        for (int at = 0; at < kAccumulators; ++at) sums[at] = _mm512_fmadd_ps(left, right, sums[at]);
    }
    for (auto& sum : sums) sink = _mm512_reduce_add_ps(sum);
}

__attribute__((target("avx512f"))) void read_all(const char* data, size_t bytes) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (size_t at = 0; at + 256 <= bytes; at += 256) {
        _mm_prefetch(data + at + 4096, _MM_HINT_T0);
        _mm_prefetch(data + at + 4096 + 128, _MM_HINT_T0);
        a = _mm512_or_si512(a, _mm512_load_si512(data + at));
        b = _mm512_or_si512(b, _mm512_load_si512(data + at + 64));
        c = _mm512_or_si512(c, _mm512_load_si512(data + at + 128));
        d = _mm512_or_si512(d, _mm512_load_si512(data + at + 192));
    }
    sink = static_cast<float>(_mm512_reduce_or_epi32(_mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d))));
}

// Seconds from a common start until the last thread is done.
double seconds(int threads, const std::function<void(int)>& work) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> pool;
    for (int thread = 0; thread < threads; ++thread) {
        pool.emplace_back([&, thread] {
            ++ready;
            while (!go) {
            }
            work(thread);
        });
    }
    while (ready < threads) std::this_thread::yield();
    const auto began = std::chrono::steady_clock::now();
    go = true;
    for (auto& thread : pool) thread.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

double best(int tries, int threads, const std::function<void(int)>& work) {
    double found = 1e9;
    for (int turn = 0; turn < tries; ++turn) found = std::min(found, seconds(threads, work));
    return found;
}

}  // namespace

int main(int count, char** words) {
    if (count != 3) return 2;
    const int threads = std::max(1, std::atoi(words[1]));
    const size_t each = std::strtoull(words[2], nullptr, 10) / threads / 4096 * 4096;
    std::string json = "{\"threads\": " + std::to_string(threads);
    const auto rate = [&](const char* name, int lanes, void (*work)()) {
        const double macs = static_cast<double>(kSteps) * kAccumulators * lanes * threads;
        json += std::string(", \"") + name + "\": " + std::to_string(macs / best(9, threads, [&](int) { work(); }));
    };
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni")) rate("int8_macs_per_s", 64, run_vnni);
    if (__builtin_cpu_supports("avx512bf16")) rate("bf16_macs_per_s", 32, run_bf16);
    if (__builtin_cpu_supports("avx512f")) {
        rate("f32_macs_per_s", 16, run_f32);
        std::vector<char*> data;
        for (int thread = 0; thread < threads; ++thread) {
            data.push_back(static_cast<char*>(std::aligned_alloc(4096, each + 8192)));
            std::fill(data.back(), data.back() + each + 8192, static_cast<char>(1));
        }
        const double took = best(9, threads, [&](int thread) { read_all(data[thread], each); });
        json += ", \"read_bytes_per_s\": " + std::to_string(each * threads / took);
    }
    std::puts((json + "}").c_str());
}
