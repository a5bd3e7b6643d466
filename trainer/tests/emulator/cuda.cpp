// libcuda for the tests: the driver calls that the trainer makes, over the CPU's memory. Kernels are src/gpu/kernels.cu itself.
//
// Streams are queues. CUDA_EMULATOR_ORDER=lazy runs work as late as the program's waits allow and the order of threads backwards, so that a wait
// or a barrier that is missing shows; the default runs it at once. Fresh device memory holds NaN. What a GPU would refuse (an unknown kernel, too
// much shared memory, a launch out of bounds) is refused here.
#define CUDA_EMULATOR
#include "../../src/gpu/kernels.cu"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define UNWATCHED __attribute__((no_sanitize("thread"), noinline))
#else
#define UNWATCHED __attribute__((noinline))
#endif

extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {
namespace {

constexpr size_t STACK = 64 << 10;
constexpr size_t MOST_SHARED = 227 << 10;

struct Fiber {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  uint3 thread = {};
  bool is_done = false;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  unsigned char slot[2][64];
  unsigned exchanges = 0;
  unsigned barriers = 0;
};

struct Warp {
  unsigned char all[2][32 * 64];
  unsigned arrived[2] = {0, 0};
  unsigned generation = 0;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* current = nullptr;
void* main_pointer = nullptr;
[[maybe_unused]] void* main_fake = nullptr;
[[maybe_unused]] const void* main_bottom = nullptr;
[[maybe_unused]] size_t main_size = 0;
[[maybe_unused]] void* main_tsan = nullptr;
uint3 block = {}, block_dim = {}, grid_dim = {};
unsigned char* shared = nullptr;
const std::function<void()>* kernel = nullptr;
unsigned block_arrived = 0, block_generation = 0;
// What ThreadSanitizer is told of: a block's begin and end, and its barriers in turn, so that a thread that is ahead orders nothing for the others.
[[maybe_unused]] char tsan_begin, tsan_end, tsan_barrier[2];
unsigned long progress = 0;

UNWATCHED void to_main() {
  Fiber* self = current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(self->is_done ? nullptr : &self->fake_stack, main_bottom, main_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  emulator_switch(&self->stack_pointer, main_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

UNWATCHED void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&tsan_begin);
#endif
  (*kernel)();
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&tsan_end);
#endif
  current->is_done = true;
  progress++;
  to_main();
  std::abort();
}

UNWATCHED void resume(Fiber& fiber) {
  current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&main_fake, fiber.stack, STACK);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  emulator_switch(&main_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#endif
  current = nullptr;
}

bool is_lazy() {
  static const bool lazy = [] {
    const char* order = std::getenv("CUDA_EMULATOR_ORDER");
    return order && std::string(order) == "lazy";
  }();
  return lazy;
}

UNWATCHED void run_block() {
  size_t n = fibers.size();
  block_arrived = block_generation = 0;
  for (Warp& warp : warps) warp = Warp();
  for (size_t i = 0; i < n; i++) {
    Fiber& fiber = fibers[i];
    fiber.is_done = false;
    fiber.exchanges = fiber.barriers = 0;
    unsigned index = static_cast<unsigned>(i);
    fiber.thread = {index % block_dim.x, index / block_dim.x % block_dim.y, index / block_dim.x / block_dim.y};
    void** top = reinterpret_cast<void**>(fiber.stack + STACK - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int r = 0; r < 6; r++) *--top = nullptr;
    fiber.stack_pointer = top;
#if defined(__SANITIZE_THREAD__)
    fiber.tsan = __tsan_create_fiber(0);
#endif
  }
#if defined(__SANITIZE_THREAD__)
  main_tsan = __tsan_get_current_fiber();
  __tsan_release(&tsan_begin);
#endif
  bool is_backwards = is_lazy();
  for (size_t left = n; left > 0;) {
    unsigned long before = progress;
    left = 0;
    for (size_t i = 0; i < n; i++) {
      Fiber& fiber = fibers[is_backwards ? n - 1 - i : i];
      if (!fiber.is_done) resume(fiber);
      left += !fiber.is_done;
    }
    if (left > 0 && progress == before) {
      std::fprintf(stderr, "emulator: the threads of a block wait for each other for ever\n");
      std::abort();
    }
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&tsan_end);
  for (Fiber& fiber : fibers) __tsan_destroy_fiber(fiber.tsan);
#endif
}

}  // namespace

UNWATCHED uint3 thread_index() { return current->thread; }
UNWATCHED uint3 block_index() { return block; }
UNWATCHED uint3 block_size() { return block_dim; }
UNWATCHED uint3 grid_size() { return grid_dim; }
UNWATCHED unsigned char* dynamic_shared() { return shared; }

UNWATCHED void synchronize_block() {
  unsigned generation = block_generation;
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&tsan_barrier[generation % 2]);
#endif
  progress++;
  size_t n_left = 0;
  for (const Fiber& fiber : fibers) n_left += !fiber.is_done;
  if (++block_arrived == n_left) {
    block_arrived = 0;
    block_generation++;
  }
  while (generation == block_generation) {
    to_main();
    // Threads that ended meanwhile need not come.
    n_left = 0;
    for (const Fiber& fiber : fibers) n_left += !fiber.is_done;
    if (generation == block_generation && block_arrived == n_left) {
      block_arrived = 0;
      block_generation++;
    }
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&tsan_barrier[generation % 2]);
#endif
}

UNWATCHED const unsigned char* exchange(const void* own, int bytes) {
  size_t number = current - fibers.data();
  Warp& warp = warps[number / 32];
  unsigned side = current->exchanges % 2;
  unsigned turn = current->exchanges++;
  for (int i = 0; i < bytes; i++) warp.all[side][(number % 32) * bytes + i] = static_cast<const unsigned char*>(own)[i];
#if defined(__SANITIZE_THREAD__)
  __tsan_release(warp.all[side]);
#endif
  progress++;
  if (++warp.arrived[side] == 32) {
    warp.arrived[side] = 0;
    warp.generation++;
  }
  while (warp.generation <= turn) to_main();
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(warp.all[side]);
#endif
  return warp.all[side];
}

UNWATCHED void run(const std::function<void()>& call, uint3 grid, uint3 threads, size_t shared_bytes) {
  size_t n = static_cast<size_t>(threads.x) * threads.y * threads.z;
  while (fibers.size() > n) {
    std::free(fibers.back().stack);
    fibers.pop_back();
  }
  while (fibers.size() < n) {
    fibers.emplace_back();
    fibers.back().stack = static_cast<unsigned char*>(std::aligned_alloc(64, STACK));
  }
  warps.resize((n + 31) / 32);
  kernel = &call;
  block_dim = threads;
  grid_dim = grid;
  void* memory = nullptr;
  if (shared_bytes && posix_memalign(&memory, 16, shared_bytes)) std::abort();
  shared = static_cast<unsigned char*>(memory);
  for (block.z = 0; block.z < grid.z; block.z++)
    for (block.y = 0; block.y < grid.y; block.y++)
      for (block.x = 0; block.x < grid.x; block.x++) {
        if (shared) std::memset(shared, 0xFF, shared_bytes);
        run_block();
      }
  std::free(shared);
}

struct Function {
  std::function<std::function<void()>(void**)> bind;
  size_t most_shared = 48 << 10;
};

template <class... P, size_t... I>
std::function<void()> bound(void (*function)(P...), void** arguments, std::index_sequence<I...>) {
  std::tuple<P...> values(*static_cast<P*>(arguments[I])...);
  return [function, values] { std::apply(function, values); };
}

template <class... P> Function make(void (*function)(P...)) {
  Function made;
  made.bind = [function](void** arguments) { return bound(function, arguments, std::index_sequence_for<P...>()); };
  return made;
}

std::map<std::string, Function>& functions() {
#define BOTH(name) {#name "_bf16", make(name##_bf16)}, {#name "_f32", make(name##_f32)}
  static std::map<std::string, Function> all = {
      BOTH(conv1_forward), BOTH(conv1_backward), BOTH(bias_relu_pool), BOTH(bias_relu_pool_backward), BOTH(head_backward),
      BOTH(normalise), BOTH(fold), BOTH(unfold), BOTH(bias_relu), BOTH(add_relu), BOTH(relu_backward), BOTH(average),
      BOTH(max_pool), BOTH(max_pool_backward), BOTH(mean_pool), BOTH(mean_pool_backward),
      {"conv1_sum", make(conv1_sum)}, {"sum_parts", make(sum_parts)}, {"head_forward", make(head_forward)},
      {"to_f32", make(to_f32)}, {"to_bf16_copy", make(to_bf16_copy)}, {"adam", make(adam)}, {"sgd", make(sgd)},
  };
  return all;
}

// ---- Streams ----

struct Event {
  unsigned long recorded = 0;
  unsigned long done = 0;
};
struct Stream {
  std::deque<std::function<void()>> work;
  // A piece of its work is being done: nothing behind that may begin.
  bool is_busy = false;

  bool can_go_on() const { return !work.empty() && !is_busy; }
  void go_on() {
    auto piece = std::move(work.front());
    work.pop_front();
    is_busy = true;
    piece();
    is_busy = false;
  }
};

std::recursive_mutex lock;
std::map<void*, Stream> streams;
size_t allocated = 0;
std::map<void*, size_t> sizes;

void drain(Stream& stream) {
  while (stream.can_go_on()) stream.go_on();
}

void drain_all() {
  for (auto& [handle, stream] : streams) drain(stream);
}

// Whatever an event waits for stands in one of the streams before its mark.
void finish(Event& event, unsigned long number) {
  for (auto& [handle, stream] : streams) {
    while (event.done < number && stream.can_go_on()) stream.go_on();
  }
}

}  // namespace emulator

using namespace emulator;
typedef std::lock_guard<std::recursive_mutex> Guard;

// For the other libraries: work on a stream.
extern "C" void emulator_enqueue(void* stream, std::function<void()>* work) {
  Guard guard(lock);
  streams[stream].work.push_back(std::move(*work));
  delete work;
  if (!is_lazy()) drain(streams[stream]);
}

namespace {
void enqueue(void* stream, std::function<void()> work) { emulator_enqueue(stream, new std::function<void()>(std::move(work))); }
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, NOT_FOUND = 500, NOT_READY = 600 };
constexpr size_t MEMORY = size_t(8) << 30;
int allocate(void** to, size_t bytes) {
  Guard guard(lock);
  if (allocated + bytes > MEMORY) return OUT_OF_MEMORY;
  // Exactly as much as was asked for, so that a sanitizer sees what reaches beyond.
  if (posix_memalign(to, 256, bytes)) return OUT_OF_MEMORY;
  std::memset(*to, 0xFF, bytes);
  sizes[*to] = bytes;
  allocated += bytes;
  return SUCCESS;
}
void release(void* memory) {
  allocated -= sizes[memory];
  sizes.erase(memory);
  std::free(memory);
}
}  // namespace

extern "C" {
int cuInit(unsigned) { return SUCCESS; }
int cuDeviceGet(int* device, int number) { *device = number; return number == 0 ? SUCCESS : INVALID_DEVICE; }
int cuDeviceGetCount(int* count) { *count = 1; return SUCCESS; }
int cuDeviceGetName(char* name, int bytes, int) { std::snprintf(name, bytes, "emulator"); return SUCCESS; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = MEMORY; return SUCCESS; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16: *value = 2; break;   // MULTIPROCESSOR_COUNT
    case 75: *value = 9; break;   // COMPUTE_CAPABILITY_MAJOR
    case 76: *value = 0; break;   // COMPUTE_CAPABILITY_MINOR
    case 97: *value = MOST_SHARED; break;  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    default: *value = 0;
  }
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** context, int) { *context = reinterpret_cast<void*>(1); return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuCtxSetCurrent(void*) { return SUCCESS; }
int cuCtxGetCurrent(void** context) { *context = reinterpret_cast<void*>(1); return SUCCESS; }
int cuCtxSynchronize() { Guard guard(lock); drain_all(); return SUCCESS; }
int cuMemGetInfo_v2(size_t* free, size_t* total) { Guard guard(lock); *total = MEMORY; *free = MEMORY - allocated; return SUCCESS; }
int cuGetErrorName(int, const char** name) { *name = "emulated error"; return SUCCESS; }
int cuGetErrorString(int code, const char** text) {
  *text = code == OUT_OF_MEMORY ? "out of memory" : code == INVALID_DEVICE ? "invalid device ordinal" : "refused by the emulator";
  return SUCCESS;
}
int cuMemAlloc_v2(void** to, size_t bytes) { return allocate(to, bytes); }
int cuMemFree_v2(void* memory) { Guard guard(lock); drain_all(); release(memory); return SUCCESS; }
int cuMemHostAlloc(void** to, size_t bytes, unsigned) { return posix_memalign(to, 256, bytes) ? OUT_OF_MEMORY : SUCCESS; }
int cuMemFreeHost(void* memory) { Guard guard(lock); drain_all(); std::free(memory); return SUCCESS; }
// Host memory is read and written when the copy runs, as with pinned memory.
int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
  enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  return SUCCESS;
}
int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
  enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  return SUCCESS;
}
int cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
  enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  return SUCCESS;
}
int cuMemsetD8Async(void* to, unsigned char value, size_t bytes, void* stream) {
  enqueue(stream, [=] { std::memset(to, value, bytes); });
  return SUCCESS;
}
int cuStreamCreate(void** stream, unsigned) { Guard guard(lock); *stream = new char; streams[*stream]; return SUCCESS; }
int cuStreamDestroy_v2(void* stream) {
  Guard guard(lock);
  drain(streams[stream]);
  streams.erase(stream);
  delete static_cast<char*>(stream);
  return SUCCESS;
}
int cuStreamSynchronize(void* stream) { Guard guard(lock); drain(streams[stream]); return SUCCESS; }
int cuStreamWaitEvent(void* stream, void* handle, unsigned) {
  Event* event = static_cast<Event*>(handle);
  unsigned long number = event->recorded;
  enqueue(stream, [=] { finish(*event, number); });
  return SUCCESS;
}
int cuEventCreate(void** event, unsigned) { *event = new Event; return SUCCESS; }
int cuEventDestroy_v2(void* event) { Guard guard(lock); drain_all(); delete static_cast<Event*>(event); return SUCCESS; }
int cuEventRecord(void* handle, void* stream) {
  Event* event = static_cast<Event*>(handle);
  unsigned long number = ++event->recorded;
  enqueue(stream, [=] { event->done = number; });
  return SUCCESS;
}
int cuEventSynchronize(void* handle) {
  Guard guard(lock);
  Event* event = static_cast<Event*>(handle);
  finish(*event, event->recorded);
  return SUCCESS;
}
int cuEventQuery(void* handle) {
  Guard guard(lock);
  Event* event = static_cast<Event*>(handle);
  // Whoever asks again and again lets the streams go on, a piece of work at a time.
  for (auto& [other, stream] : streams) {
    if (event->done >= event->recorded || !stream.can_go_on()) continue;
    stream.go_on();
    break;
  }
  return event->done >= event->recorded ? SUCCESS : NOT_READY;
}
int cuEventElapsedTime(float* milliseconds, void*, void*) { *milliseconds = 1; return SUCCESS; }
int cuEventElapsedTime_v2(float* milliseconds, void*, void*) { *milliseconds = 1; return SUCCESS; }
int cuModuleLoadData(void** module, const void* image) {
  *module = reinterpret_cast<void*>(1);
  return std::strstr(static_cast<const char*>(image), ".target sm_90") ? SUCCESS : INVALID_VALUE;
}
int cuModuleUnload(void*) { return SUCCESS; }
int cuModuleGetFunction(void** function, void*, const char* name) {
  auto found = functions().find(name);
  if (found == functions().end()) return NOT_FOUND;
  *function = &found->second;
  return SUCCESS;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8 || value < 0 || size_t(value) > MOST_SHARED) return INVALID_VALUE;
  static_cast<Function*>(function)->most_shared = value;
  return SUCCESS;
}
int cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared_bytes, void* stream,
                   void** arguments, void**) {
  Function& function = *static_cast<Function*>(handle);
  size_t n = size_t(bx) * by * bz;
  if (!gx || !gy || !gz || gx > 0x7FFFFFFFu || gy > 65535 || gz > 65535 || !n || n > 1024 || bz > 64 || shared_bytes > function.most_shared)
    return INVALID_VALUE;
  auto call = function.bind(arguments);
  enqueue(stream, [=] { emulator::run(call, {gx, gy, gz}, {bx, by, bz}, shared_bytes); });
  return SUCCESS;
}
}
