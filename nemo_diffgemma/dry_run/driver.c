// A CUDA runtime and driver with one GPU that is not there.
//
// torch initialises CUDA on it, makes streams and events, and chooses kernels by the properties of the GPU that
// $NEMO_DIFFGEMMA_DRY_RUN_GPU names: "major minor multiprocessors shared_memory_of_a_block memory_in_bytes name".
// Pinned memory is ordinary memory that is remembered as pinned. Whatever would touch the GPU's memory or start a
// kernel prints a line and fails: the dispatch mode (mode.py) lets no such call through.
//
// Preloaded (LD_PRELOAD): its functions come before those of libcudart. It carries the name libcuda.so.1, so that
// torch's libraries find the driver loaded. Built by driver.py.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cuda_runtime_api.h>

#define SUCCEED(name, ...) \
  cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
#define REFUSE(name, ...)                                                     \
  cudaError_t name(__VA_ARGS__) {                                             \
    fprintf(stderr, "dry run: %s was called; there is no GPU\n", #name);      \
    return cudaErrorMemoryAllocation;                                         \
  }

// -- the GPU --------------------------------------------------------------------------------------------------------

static struct {
  int major, minor, multiprocessors;
  size_t shared_memory, memory;
  char name[128];
} gpu;

__attribute__((constructor)) static void read_gpu(void) {
  const char *text = getenv("NEMO_DIFFGEMMA_DRY_RUN_GPU");
  gpu.major = 9;
  if (text)
    sscanf(text, "%d %d %d %zu %zu %127[^\n]", &gpu.major, &gpu.minor, &gpu.multiprocessors, &gpu.shared_memory,
           &gpu.memory, gpu.name);
}

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
SUCCEED(cudaSetDevice, int device)
SUCCEED(cudaDeviceSynchronize, void)

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s (not there)", gpu.name);
  p->major = gpu.major;
  p->minor = gpu.minor;
  p->multiProcessorCount = gpu.multiprocessors;
  p->totalGlobalMem = gpu.memory;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = gpu.shared_memory;
  p->sharedMemPerMultiprocessor = gpu.shared_memory + (1 << 10);
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerMultiprocessor = 65536;
  p->l2CacheSize = 50 << 20;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = gpu.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = gpu.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = gpu.multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)gpu.shared_memory; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { return *low = 0, *high = -5, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) { return *unused = *total = gpu.memory, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
  return strncpy(id, "0000:00:00.0", size), cudaSuccess;
}
SUCCEED(cudaDeviceEnablePeerAccess, int device, unsigned flags)
SUCCEED(cudaDeviceGetDefaultMemPool, cudaMemPool_t *pool, int device)
SUCCEED(cudaMemPoolSetAttribute, cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value)
SUCCEED(cudaMemPoolSetAccess, cudaMemPool_t pool, const struct cudaMemAccessDesc *access, size_t count)
SUCCEED(cudaMemPoolTrimTo, cudaMemPool_t pool, size_t size)
SUCCEED(cudaFuncSetAttribute, const void *function, enum cudaFuncAttribute attribute, int value)
SUCCEED(cudaGetLastError, void)
SUCCEED(cudaPeekAtLastError, void)

// -- streams and events: everything enqueued is done at once --------------------------------------------------------

static void *handle(void) {
  static long next = 0x1000;
  return (void *)__atomic_add_fetch(&next, 16, __ATOMIC_SEQ_CST);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return *stream = handle(), cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return *stream = handle(), cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  return *stream = handle(), cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
SUCCEED(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *mode)
SUCCEED(cudaStreamDestroy, cudaStream_t stream)
SUCCEED(cudaStreamQuery, cudaStream_t stream)
SUCCEED(cudaStreamSynchronize, cudaStream_t stream)
SUCCEED(cudaStreamWaitEvent, cudaStream_t stream, cudaEvent_t event, unsigned flags)

cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = handle(), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return *event = handle(), cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  return *milliseconds = 1, cudaSuccess;
}
SUCCEED(cudaEventDestroy, cudaEvent_t event)
SUCCEED(cudaEventQuery, cudaEvent_t event)
SUCCEED(cudaEventRecord, cudaEvent_t event, cudaStream_t stream)
SUCCEED(cudaEventRecordWithFlags, cudaEvent_t event, cudaStream_t stream, unsigned flags)
SUCCEED(cudaEventSynchronize, cudaEvent_t event)

// -- pinned memory --------------------------------------------------------------------------------------------------

enum { MOST_PINNED = 4096 };
static struct { char *start; size_t size; int ours; } pinned[MOST_PINNED];
static int pinned_count;
static pthread_mutex_t pinned_lock = PTHREAD_MUTEX_INITIALIZER;

static cudaError_t pin(void *start, size_t size, int ours) {
  cudaError_t error = cudaErrorMemoryAllocation;
  pthread_mutex_lock(&pinned_lock);
  if (start && pinned_count < MOST_PINNED) {
    pinned[pinned_count].start = start;
    pinned[pinned_count].size = size;
    pinned[pinned_count++].ours = ours;
    error = cudaSuccess;
  }
  pthread_mutex_unlock(&pinned_lock);
  return error;
}

static cudaError_t unpin(void *start) {
  pthread_mutex_lock(&pinned_lock);
  for (int i = 0; i < pinned_count; i++)
    if (pinned[i].start == start) {
      if (pinned[i].ours) free(start);
      pinned[i] = pinned[--pinned_count];
      break;
    }
  pthread_mutex_unlock(&pinned_lock);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **start, size_t size, unsigned flags) {
  *start = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  return pin(*start, size, 1);
}
cudaError_t cudaFreeHost(void *start) { return unpin(start); }
cudaError_t cudaHostRegister(void *start, size_t size, unsigned flags) { return pin(start, size, 0); }
cudaError_t cudaHostUnregister(void *start) { return unpin(start); }
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) { return *device = host, cudaSuccess; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&pinned_lock);
  for (int i = 0; i < pinned_count; i++)
    if ((const char *)pointer >= pinned[i].start && (const char *)pointer < pinned[i].start + pinned[i].size) {
      attributes->type = cudaMemoryTypeHost;
      attributes->hostPointer = (void *)pointer;
    }
  pthread_mutex_unlock(&pinned_lock);
  return cudaSuccess;
}

// -- what would touch the GPU ---------------------------------------------------------------------------------------

SUCCEED(cudaFree, void *pointer)  // torch calls it with NULL to initialise
REFUSE(cudaMalloc, void **pointer, size_t size)
REFUSE(cudaMemcpy, void *to, const void *from, size_t size, enum cudaMemcpyKind kind)
REFUSE(cudaMemcpyAsync, void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream)
REFUSE(cudaMemsetAsync, void *pointer, int value, size_t size, cudaStream_t stream)
REFUSE(cudaLaunchKernel, const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
REFUSE(cudaLaunchKernelExC, const cudaLaunchConfig_t *config, const void *f, void **arguments)
REFUSE(cudaGraphLaunch, cudaGraphExec_t graph, cudaStream_t stream)
REFUSE(cudaStreamBeginCapture, cudaStream_t stream, enum cudaStreamCaptureMode mode)

// -- the driver library ---------------------------------------------------------------------------------------------

// c10::cuda::hasPrimaryContext(signed char), which would ask a driver that is not installed
int _ZN3c104cuda17hasPrimaryContextEa(signed char device) { return 1; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  *active = 1;
  return 0;
}

// libcaffe2_nvrtc.so is linked against these
#define UNAVAILABLE(name)                                                \
  int name() {                                                           \
    fprintf(stderr, "dry run: %s was called; there is no GPU\n", #name); \
    return 999; /* CUDA_ERROR_UNKNOWN */                                 \
  }
UNAVAILABLE(cuCtxGetCurrent)
UNAVAILABLE(cuCtxSetCurrent)
UNAVAILABLE(cuDeviceGet)
UNAVAILABLE(cuDeviceGetAttribute)
UNAVAILABLE(cuDevicePrimaryCtxRetain)
UNAVAILABLE(cuFuncGetAttribute)
UNAVAILABLE(cuFuncSetAttribute)
UNAVAILABLE(cuFuncSetCacheConfig)
UNAVAILABLE(cuGetErrorString)
UNAVAILABLE(cuLaunchCooperativeKernel)
UNAVAILABLE(cuLaunchKernel)
UNAVAILABLE(cuLinkAddData_v2)
UNAVAILABLE(cuLinkComplete)
UNAVAILABLE(cuLinkCreate_v2)
UNAVAILABLE(cuModuleGetFunction)
UNAVAILABLE(cuModuleLoad)
UNAVAILABLE(cuModuleLoadData)
UNAVAILABLE(cuModuleLoadDataEx)
UNAVAILABLE(cuModuleUnload)
UNAVAILABLE(cuOccupancyMaxActiveBlocksPerMultiprocessor)
UNAVAILABLE(cuPointerGetAttribute)
UNAVAILABLE(cuTensorMapEncodeTiled)
