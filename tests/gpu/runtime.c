/* A CUDA runtime with one H200 that does nothing. Preloaded before torch, it answers what torch's host side asks: which device
   there is, streams, events, and page-locked memory, which is real memory. Nothing is allocated on the device and no kernel runs;
   where torch tries, the true runtime fails for want of a driver. */
#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static const size_t MEMORY = 141ul << 30;
static char handles[1024]; /* a stream or an event is the address of one of these */

static void *new_handle(void) {
  static unsigned made;
  return &handles[made++ % sizeof handles];
}

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) { return *left = *all = MEMORY, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { return *least = 0, *most = -1, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "NVIDIA H200");
  found->major = 9, found->minor = 0;
  found->totalGlobalMem = MEMORY;
  found->multiProcessorCount = 132, found->warpSize = 32;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxGridSize[0] = 2147483647, found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->sharedMemPerBlock = 49152, found->sharedMemPerBlockOptin = 232448, found->sharedMemPerMultiprocessor = 233472;
  found->l2CacheSize = 50 << 20;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr asked, int device) {
  *value = asked == cudaDevAttrComputeCapabilityMajor ? 9 : asked == cudaDevAttrComputeCapabilityMinor ? 0 : 1;
  return cudaSuccess;
}

/* streams and events: all work is done as soon as it is asked for */
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return *stream = new_handle(), cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  return *stream = new_handle(), cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
/* its arguments after the second differ between versions of CUDA, and are not asked for outside of a capture */
int capture_info(cudaStream_t stream, int *status) __asm__("cudaStreamGetCaptureInfo");
int capture_info(cudaStream_t stream, int *status) { return *status = 0; }
int capture_info_2(cudaStream_t stream, int *status) __asm__("cudaStreamGetCaptureInfo_v2");
int capture_info_2(cudaStream_t stream, int *status) { return *status = 0; }
int capture_info_3(cudaStream_t stream, int *status) __asm__("cudaStreamGetCaptureInfo_v3");
int capture_info_3(cudaStream_t stream, int *status) { return *status = 0; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = new_handle(), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return *event = new_handle(), cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  return *milliseconds = 1, cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }

/* page-locked memory: torch asks of an address whether it lies there */
static struct { char *start; size_t size; } pinned[65536];
static int count_pinned;

cudaError_t cudaHostAlloc(void **start, size_t size, unsigned flags) {
  if (count_pinned == sizeof pinned / sizeof *pinned || posix_memalign(start, 4096, size)) return cudaErrorMemoryAllocation;
  pinned[count_pinned].start = *start, pinned[count_pinned++].size = size;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void *start) {
  for (int number = 0; number < count_pinned; number++)
    if (pinned[number].start == start) pinned[number] = pinned[--count_pinned];
  return free(start), cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered, found->device = -1;
  for (int number = 0; number < count_pinned; number++) {
    const char *start = pinned[number].start;
    if (start <= (const char *)address && (const char *)address < start + pinned[number].size) {
      found->type = cudaMemoryTypeHost, found->device = 0;
      found->hostPointer = found->devicePointer = (void *)address;
    }
  }
  return cudaSuccess;
}

/* at::cuda::detail::hasPrimaryContext(signed char), which otherwise asks the driver */
bool _ZN2at4cuda6detail17hasPrimaryContextEa(signed char device) { return true; }

/* the driver, which torch opens by the name of this library: whether there is a context */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "no error", 0; }
static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
  if (result) *result = cudaDriverEntryPointSuccess;
  return *function = nothing, cudaSuccess;
}
