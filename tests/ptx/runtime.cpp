// The part of the CUDA runtime that pyfacts' launchers and CUTLASS call, over the machine: linked in place of
// libcudart.
//
// The PTX of the kernels is in the files that PTX_FILES names, or those of the last ptx_use(). PTX_SEED decides on the
// machine's turns, PTX_MULTIPROCESSORS (4) on its size. A kernel that does what it must not ends with an error like any
// other; its text is what cudaGetErrorString() says then.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "machine.h"
#include "tensor_map.h"

namespace {

constexpr int kUsualSharedBytes = 48 * 1024, kMostSharedBytes = 227 * 1024;  // of a block, on an H100

std::string setting(const char* name, const char* otherwise) {
  const char* const value = std::getenv(name);
  return value != nullptr ? value : otherwise;
}

struct Device {
  std::vector<ptx::Module> modules;
  std::unordered_map<const void*, std::string> names;         // of kernels, by the address of their host function
  std::unordered_map<const void*, int> dynamic_shared_bytes;  // that a kernel may ask for, if more than usual
  ptx::Memory memory;
  uint64_t seed = std::stoull(setting("PTX_SEED", "0"));
  uint64_t launches = 0;
  cudaError_t last = cudaSuccess;
  struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
  } configuration;

  std::string wrong;  // what the last kernel that failed did

  Device() { use(setting("PTX_FILES", "")); }

  void use(const std::string& names) {
    modules.clear();
    std::istringstream files(names);
    for (std::string file; std::getline(files, file, ':');) {
      std::ifstream in(file);
      if (!in) wrong = file + ": cannot be read";
      std::stringstream text;
      text << in.rdbuf();
      try {
        modules.push_back(ptx::parse(text.str()));
      } catch (const std::exception& error) {
        wrong = file + ": " + error.what();
      }
    }
  }
  cudaError_t fail(cudaError_t error) { return last = error; }
};

Device& device() {
  static Device made;
  return made;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, dim3 cluster, void** arguments, size_t shared) {
  Device& d = device();
  const auto name = d.names.find(function);
  if (name == d.names.end()) return d.fail(cudaErrorInvalidDeviceFunction);
  for (const ptx::Module& module : d.modules) {
    const auto found = module.kernels.find(name->second);
    if (found == module.kernels.end()) continue;
    const ptx::Kernel& kernel = found->second;
    const auto allowed = d.dynamic_shared_bytes.find(function);
    const int most_shared = allowed != d.dynamic_shared_bytes.end() ? allowed->second : kUsualSharedBytes;
    if (static_cast<int>(shared) > most_shared) return d.fail(cudaErrorInvalidValue);
    if (static_cast<int>(block.x * block.y * block.z) > kernel.max_threads) return d.fail(cudaErrorInvalidValue);
    ptx::Launch launch;
    launch.kernel = &kernel;
    launch.globals = module.globals.data();
    launch.grid = {static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)};
    launch.block = {static_cast<int>(block.x), static_cast<int>(block.y), static_cast<int>(block.z)};
    launch.cluster = {static_cast<int>(cluster.x), static_cast<int>(cluster.y), static_cast<int>(cluster.z)};
    launch.dynamic_shared_bytes = static_cast<int>(shared);
    launch.params.resize(kernel.param_bytes);
    for (size_t i = 0; i < kernel.params.size(); ++i) {
      std::memcpy(launch.params.data() + kernel.params[i].offset, arguments[i], kernel.params[i].size);
    }
    launch.seed = d.seed * 1000003 + d.launches++;
    try {
      const ptx::Statistics statistics = ptx::run(launch, d.memory);
      if (std::getenv("PTX_VERBOSE") != nullptr) {
        std::fprintf(stderr, "%.60s grid %u,%u,%u: %lu instructions, %lu products, %lu copies\n", kernel.name.c_str(),
                     grid.x, grid.y, grid.z, statistics.instructions, statistics.products, statistics.copies);
      }
    } catch (const std::exception& error) {
      std::ostringstream text;
      text << error.what() << "; grid " << grid.x << "," << grid.y << "," << grid.z << " of " << block.x
           << " threads, seed " << launch.seed << ", " << kernel.name;
      d.wrong = text.str();
      return d.fail(cudaErrorLaunchFailure);
    }
    return cudaSuccess;
  }
  if (d.wrong.empty()) d.wrong = "no PTX for " + name->second;  // unless what holds it could not be read
  return d.fail(cudaErrorNoKernelImageForDevice);
}

// As the driver's documentation says of what it takes.
CUresult encode_tensor_map(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  if (type != CU_TENSOR_MAP_DATA_TYPE_UINT16 && type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 &&
      type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16)
    return CUDA_ERROR_NOT_SUPPORTED;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return CUDA_ERROR_NOT_SUPPORTED;
  if (reinterpret_cast<uint64_t>(out) % 64 != 0 || reinterpret_cast<uint64_t>(address) % 16 != 0)
    return CUDA_ERROR_INVALID_VALUE;
  if (rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  ptx::TensorMap map{};
  map.magic = ptx::TensorMap::kMagic;
  map.address = reinterpret_cast<uint64_t>(address);
  map.rank = static_cast<uint8_t>(rank);
  map.item_bytes = 2;
  map.swizzle_bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                      : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                      : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                             : 0;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > (uint64_t{1} << 32)) return CUDA_ERROR_INVALID_VALUE;
    if (box[i] == 0 || box[i] > 256 || element_strides[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    if (i > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= (uint64_t{1} << 40))) return CUDA_ERROR_INVALID_VALUE;
    map.size[i] = static_cast<uint32_t>(std::min<uint64_t>(sizes[i], 0xffffffff));
    map.box[i] = static_cast<uint16_t>(box[i]);
    if (i > 0) map.stride[i - 1] = strides[i - 1];
  }
  if (box[0] * map.item_bytes % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (map.swizzle_bytes != 0 && box[0] * map.item_bytes > map.swizzle_bytes) return CUDA_ERROR_INVALID_VALUE;
  std::memset(out, 0, sizeof(*out));
  std::memcpy(out, &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// Other PTX for the same kernels, and the seed of the machine's turns from here on.
void ptx_use(const char* files, uint64_t seed) {
  device().use(files);
  device().seed = seed;
  device().launches = 0;
  device().last = cudaSuccess;
}
// What the last kernel that failed did, since the last call; or "".
const char* ptx_error() {
  static std::string last;
  last = std::exchange(device().wrong, {});
  return last.c_str();
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  device().names[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(kernel, grid, block, {1, 1, 1}, arguments, shared);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  device().configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const auto& c = device().configuration;
  *grid = c.grid, *block = c.block, *shared = c.shared, *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return launch(function, grid, block, {1, 1, 1}, arguments, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  dim3 cluster{1, 1, 1};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& c = config->attrs[i].val.clusterDim;
      cluster = {c.x, c.y, c.z};
    }
  }
  return launch(function, config->gridDim, config->blockDim, cluster, arguments, config->dynamicSmemBytes);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return device().fail(cudaErrorNotSupported);
  if (value > kMostSharedBytes) return device().fail(cudaErrorInvalidValue);
  device().dynamic_shared_bytes[function] = value;
  return cudaSuccess;
}

// What CUB asks, to choose among its kernels.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof(*attributes));
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* id) {
  *id = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int id) { return id == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = std::stoi(setting("PTX_MULTIPROCESSORS", "4"));
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kMostSharedBytes;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = 0x7fffffff;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    default:
      return cudaErrorNotSupported;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::memset(properties, 0, sizeof(*properties));
  std::strcpy(properties->name, "PTX on the host");
  properties->major = 9;
  return cudaDeviceGetAttribute(&properties->multiProcessorCount, cudaDevAttrMultiProcessorCount, 0);
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return std::exchange(device().last, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return device().last; }
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure && !device().wrong.empty()) return device().wrong.c_str();
  static char text[40];
  std::snprintf(text, sizeof(text), "CUDA error %d", static_cast<int>(error));
  return text;
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = device().memory.allocate(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  return pointer == nullptr || device().memory.free(pointer) ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return cudaMemset(to, value, bytes); }

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode_tensor_map) : nullptr;
  if (found != nullptr) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return known ? cudaSuccess : cudaErrorInvalidValue;
}

}  // extern "C"
