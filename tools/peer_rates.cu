// How fast one GPU reads another, by copy engines and by kernels, one way and both ways at once. Needs two GPUs.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -o peer_rates tools/peer_rates.cu && ./peer_rates
//
// Medians of five, in GB/s of each reader. "beside": every GPU also copies as many bytes of its own at the same time.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace {

constexpr size_t kBytes = size_t{3} << 30;
constexpr int kThreads = 512;
constexpr int kUnroll = 4;
constexpr int kTileBytes = 32 << 10;
constexpr int kStages = 6;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, #call)

__global__ void __launch_bounds__(kThreads) load_and_store(const uint4* src, uint4* dst, size_t tiles) {
  constexpr int kPerTile = kTileBytes / sizeof(uint4);
  for (size_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const uint4* from = src + tile * kPerTile;
    uint4* to = dst + tile * kPerTile;
    for (int first = threadIdx.x; first < kPerTile; first += kThreads * kUnroll) {
      uint4 words[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) words[i] = from[first + i * kThreads];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) to[first + i * kThreads] = words[i];
    }
  }
}

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One thread keeps kStages bulk copies of a tile in flight through shared memory.
__global__ void __launch_bounds__(32) bulk_copy(const char* src, char* dst, size_t tiles) {
  extern __shared__ __align__(128) char stages[];
  __shared__ uint64_t barriers[kStages];
  if (threadIdx.x != 0) return;
  for (uint64_t& barrier : barriers) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
  }
  asm volatile("fence.proxy.async;" ::: "memory");
  auto load = [&](size_t turn) {
    const size_t tile = blockIdx.x + turn * gridDim.x;
    if (tile >= tiles) return;
    const int stage = turn % kStages;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barriers + stage)),
                 "r"(kTileBytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(stages + stage * kTileBytes)),
        "l"(src + tile * kTileBytes), "r"(kTileBytes), "r"(shared_address(barriers + stage))
        : "memory");
  };
  for (int turn = 0; turn < kStages; ++turn) load(turn);
  for (size_t turn = 0; blockIdx.x + turn * gridDim.x < tiles; ++turn) {
    const int stage = turn % kStages;
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(
            shared_address(barriers + stage)),
        "r"(static_cast<uint32_t>(turn / kStages & 1))
        : "memory");
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                     dst + (blockIdx.x + turn * gridDim.x) * kTileBytes),
                 "r"(shared_address(stages + stage * kTileBytes)), "r"(kTileBytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if (turn == 0) continue;
    asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    load(turn - 1 + kStages);
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

struct Gpu {
  char *src, *dst, *own;
  cudaStream_t stream, beside;
  cudaEvent_t begin, joined, end;
};

using Copy = std::function<void(const char* src, char* dst, cudaStream_t stream)>;

// GB/s of the slower reader. `local` may be empty.
double rate(std::vector<Gpu>& gpus, int readers, const Copy& remote, const Copy& local) {
  std::vector<float> times;
  for (int round = 0; round < 5; ++round) {
    float slowest = 0;
    for (int i = 0; i < 2; ++i) {
      CHECK(cudaSetDevice(i));
      CHECK(cudaDeviceSynchronize());
    }
    for (int i = 0; i < readers; ++i) {
      Gpu& gpu = gpus[i];
      CHECK(cudaSetDevice(i));
      CHECK(cudaEventRecord(gpu.begin, gpu.stream));
      CHECK(cudaStreamWaitEvent(gpu.beside, gpu.begin, 0));
      remote(gpus[1 - i].src, gpu.dst, gpu.stream);
      if (local) local(gpu.src, gpu.own, gpu.beside);
      CHECK(cudaEventRecord(gpu.joined, gpu.beside));
      CHECK(cudaStreamWaitEvent(gpu.stream, gpu.joined, 0));
      CHECK(cudaEventRecord(gpu.end, gpu.stream));
    }
    for (int i = 0; i < readers; ++i) {
      float ms = 0;
      CHECK(cudaSetDevice(i));
      CHECK(cudaStreamSynchronize(gpus[i].stream));
      CHECK(cudaGetLastError());
      CHECK(cudaEventElapsedTime(&ms, gpus[i].begin, gpus[i].end));
      slowest = std::max(slowest, ms);
    }
    times.push_back(slowest);
  }
  std::sort(times.begin(), times.end());
  return kBytes / times[2] / 1e6;
}

// Pieces of one size; with `row_bytes`, rows that lie twice as far apart in the source, of which half is read twice.
Copy engine(size_t piece, size_t row_bytes = 0) {
  return [=](const char* src, char* dst, cudaStream_t stream) {
    for (size_t at = 0; at + piece <= kBytes; at += piece) {
      if (row_bytes == 0) {
        CHECK(cudaMemcpyAsync(dst + at, src + at, piece, cudaMemcpyDeviceToDevice, stream));
      } else {
        const char* from = src + (2 * at) % (kBytes - 2 * piece);
        CHECK(cudaMemcpy2DAsync(dst + at, row_bytes, from, 2 * row_bytes, row_bytes, piece / row_bytes,
                                cudaMemcpyDeviceToDevice, stream));
      }
    }
  };
}

}  // namespace

int main() {
  std::vector<Gpu> gpus(2);
  int processors = 0;
  CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
  for (int i = 0; i < 2; ++i) {
    Gpu& gpu = gpus[i];
    CHECK(cudaSetDevice(i));
    CHECK(cudaDeviceEnablePeerAccess(1 - i, 0));
    CHECK(cudaFuncSetAttribute(bulk_copy, cudaFuncAttributeMaxDynamicSharedMemorySize, kStages * kTileBytes));
    for (char** buffer : {&gpu.src, &gpu.dst, &gpu.own}) CHECK(cudaMalloc(buffer, kBytes));
    CHECK(cudaMemset(gpu.src, i + 1, kBytes));
    for (cudaStream_t* stream : {&gpu.stream, &gpu.beside}) CHECK(cudaStreamCreate(stream));
    for (cudaEvent_t* event : {&gpu.begin, &gpu.joined, &gpu.end}) CHECK(cudaEventCreate(event));
  }
  const Copy kernel = [=](const char* src, char* dst, cudaStream_t stream) {
    load_and_store<<<4 * processors, kThreads, 0, stream>>>(reinterpret_cast<const uint4*>(src),
                                                            reinterpret_cast<uint4*>(dst), kBytes / kTileBytes);
  };
  const Copy bulk = [=](const char* src, char* dst, cudaStream_t stream) {
    bulk_copy<<<processors, 32, kStages * kTileBytes, stream>>>(src, dst, kBytes / kTileBytes);
  };
  const auto report = [&](const char* name, const Copy& remote) {
    std::printf("%-44s one way %6.1f  both ways %6.1f  beside %6.1f\n", name, rate(gpus, 1, remote, {}),
                rate(gpus, 2, remote, {}), rate(gpus, 2, remote, kernel));
    std::fflush(stdout);
  };
  report("kernel, 16-byte loads", kernel);
  report("kernel, bulk copies of 32 KiB", bulk);
  report("copy engine, one piece", engine(kBytes));
  for (size_t mib : {64, 8, 1}) {
    std::printf("%zu MiB: ", mib);
    report("copy engine, pieces", engine(mib << 20));
  }
  for (size_t row_bytes : {4096, 256}) {
    std::printf("%zu B: ", row_bytes);
    report("copy engine, 32 MiB in rows", engine(size_t{32} << 20, row_bytes));
  }
  return 0;
}
