// The parts of CUDA that are needed to compile the kernels for the CPU and run them in tests. The warps of a block are
// real threads, and blocks run one after the other.
#pragma once

#include <barrier>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks take turns, so one copy will do
#define MT_LAUNCH(kernel, grid, threads, stream, ...) cuda_on_host::launch(grid, threads, [&] { kernel(__VA_ARGS__); })

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 gridDim, blockDim;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no memory"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMallocAsync(void** memory, std::size_t bytes, cudaStream_t) {
    *memory = std::malloc(bytes);
    if (*memory) std::memset(*memory, 0xff, bytes);  // all NaN: what is read before it is written shows
    return *memory ? cudaSuccess : 1;
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
    std::free(memory);
    return cudaSuccess;
}

namespace cuda_on_host {

struct Warp {
    std::barrier<> meet{32};
    alignas(16) unsigned char exchanged[32][16];
};
inline std::barrier<>* block_meets;
inline std::vector<std::unique_ptr<Warp>> warps;

template <class Kernel>
void launch(dim3 grid, unsigned threads, Kernel kernel) {
    gridDim = grid;
    blockDim = dim3(threads);
    std::barrier<> meet(threads);
    block_meets = &meet;
    warps.clear();
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
    std::vector<std::thread> block;
    for (unsigned t = 0; t < threads; ++t) {
        block.emplace_back([&, t] {
            threadIdx = dim3(t);
            for (unsigned y = 0; y < grid.y; ++y) {
                for (unsigned x = 0; x < grid.x; ++x) {
                    blockIdx = dim3(x, y);
                    kernel();
                    meet.arrive_and_wait();
                }
            }
        });
    }
    for (std::thread& thread : block) thread.join();
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::block_meets->arrive_and_wait(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int other) {
    cuda_on_host::Warp& warp = *cuda_on_host::warps[threadIdx.x / 32];
    const unsigned lane = threadIdx.x % 32;
    std::memcpy(warp.exchanged[lane], &value, sizeof value);
    warp.meet.arrive_and_wait();
    std::memcpy(&value, warp.exchanged[lane ^ unsigned(other)], sizeof value);
    warp.meet.arrive_and_wait();
    return value;
}
