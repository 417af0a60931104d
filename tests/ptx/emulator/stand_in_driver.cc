// Stands in for NVIDIA's driver, libcuda.so.1, on a machine without one.
//
// It tells the compiler of Mosaic GPU for which GPU to compile, hands the launches that Mosaic's host code makes to a
// handler, and encodes TMA descriptors in a form of our own (`TensorMap`, which emulator.cc reads) once they are what
// CUDA's documentation of cuTensorMapEncodeTiled demands. Anything else that is asked of it does nothing.

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "tensor_map.h"

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kNotFound = 500;
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;  // of CUdevice_attribute
constexpr int kMaxDynamicSharedBytes = 8;                    // of CUfunction_attribute

// A launch: grid and block of three, bytes of shared memory, addresses of the parameters.
using Handler = int (*)(const uint32_t* grid, const uint32_t* block, uint32_t shared_bytes, void** parameters);

struct LaunchConfig {  // CUlaunchConfig
  uint32_t grid[3], block[3], shared_bytes;
  void* stream;
  void* attributes;
  uint32_t attribute_count;
};

Handler handler = nullptr;
int capability[2] = {9, 0};
uintptr_t handles = 0;
char said[512] = "";

int refuse(const char* what, unsigned long long value) {
  snprintf(said, sizeof said, "%s (%llu)", what, value);
  return kInvalidValue;
}

int new_handle(void** handle) {
  *handle = reinterpret_cast<void*>(++handles);
  return kSuccess;
}

}  // namespace

extern "C" {

// ---- for Python

void stand_in_set_handler(Handler wanted) { handler = wanted; }
void stand_in_set_capability(int major, int minor) { capability[0] = major, capability[1] = minor; }
int stand_in_capability() { return 10 * capability[0] + capability[1]; }
const char* stand_in_said() { return said; }

// ---- what is asked of the driver

int cuInit(unsigned) { return kSuccess; }
int cuDriverGetVersion(int* version) { return *version = 12090, kSuccess; }
int cuCtxGetDevice(int* device) { return *device = 0, kSuccess; }
int cuCtxGetCurrent(void** context) { return *context = nullptr, kSuccess; }
int cuDeviceGet(int* device, int) { return *device = 0, kSuccess; }
int cuDeviceGetCount(int* count) { return *count = 1, kSuccess; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == kCapabilityMajor ? capability[0] : attribute == kCapabilityMinor ? capability[1] : 0;
  return kSuccess;
}
int cuGetErrorName(int, const char** name) { return *name = "STAND_IN", kSuccess; }
int cuGetErrorString(int, const char** text) { return *text = said, kSuccess; }

int cuModuleLoadData(void** module, const void*) { return new_handle(module); }
int cuModuleGetFunction(void** function, void*, const char*) { return new_handle(function); }
int cuModuleGetGlobal(uint64_t*, size_t*, void*, const char*) { return kNotFound; }
int cuModuleGetGlobal_v2(uint64_t*, size_t*, void*, const char*) { return kNotFound; }
int cuModuleUnload(void*) { return kSuccess; }

int cuFuncSetAttribute(void*, int attribute, int value) {
  return attribute == kMaxDynamicSharedBytes && value < 0 ? refuse("bytes of shared memory", value) : kSuccess;
}

int cuLaunchKernelEx(const LaunchConfig* config, void*, void** parameters, void**) {
  if (config->attribute_count) return refuse("launch attributes (clusters) are not covered", config->attribute_count);
  return handler ? handler(config->grid, config->block, config->shared_bytes, parameters) : kInvalidValue;
}

int cuLaunchKernel(void*, uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, uint32_t block_x, uint32_t block_y,
                   uint32_t block_z, uint32_t shared_bytes, void*, void** parameters, void**) {
  const uint32_t grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
  return handler ? handler(grid, block, shared_bytes, parameters) : kInvalidValue;
}

int cuTensorMapEncodeTiled(void* out, int type, uint32_t rank, void* base, const uint64_t* dimensions,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                           int interleave, int swizzle, int /*l2_promotion*/, int /*out_of_bounds_fill*/) {
  static const uint8_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // of CUtensorMapDataType
  if (type < 0 || type >= static_cast<int>(sizeof kBytes)) return refuse("TMA descriptor: data type", type);
  if (reinterpret_cast<uintptr_t>(out) % 64) return refuse("TMA descriptor: not aligned to 64 bytes", 0);
  if (reinterpret_cast<uintptr_t>(base) % 16) return refuse("TMA descriptor: array not aligned to 16 bytes", 0);
  if (rank < 1 || rank > kMaxRank) return refuse("TMA descriptor: rank", rank);
  if (interleave) return refuse("TMA descriptor: interleave is not covered", interleave);
  if (swizzle < 0 || swizzle > 3) return refuse("TMA descriptor: swizzle is not covered", swizzle);

  TensorMap map;
  memset(&map, 0, sizeof map);
  map.magic = kTensorMapMagic;
  map.rank = rank;
  map.swizzle_bytes = swizzle ? 16 << swizzle : 0;
  map.element_bytes = kBytes[type];
  map.base = reinterpret_cast<uint64_t>(base);
  for (uint32_t d = 0; d < rank; d++) {
    if (!dimensions[d] || dimensions[d] > UINT32_MAX) return refuse("TMA descriptor: dimension", dimensions[d]);
    if (!box[d] || box[d] > 256) return refuse("TMA descriptor: box", box[d]);
    if (element_strides[d] != 1) return refuse("TMA descriptor: stride of elements", element_strides[d]);
    map.dimensions[d] = dimensions[d];
    map.box[d] = box[d];
    if (d + 1 == rank) break;
    if (strides[d] % 16 || strides[d] >> 40) return refuse("TMA descriptor: stride in bytes", strides[d]);
    map.strides[d] = strides[d];
  }
  const uint32_t inner_bytes = box[0] * map.element_bytes;
  if (inner_bytes % 16) return refuse("TMA descriptor: inner box is no multiple of 16 bytes", inner_bytes);
  if (swizzle && inner_bytes > map.swizzle_bytes) return refuse("TMA descriptor: box wider than swizzle", inner_bytes);
  memcpy(out, &map, sizeof map);
  return kSuccess;
}

}  // extern "C"
