// The kernels of training on a GPU; what they compute is defined in f64 in ../operators/definition.rs.
//
// Feature maps are [image, row, column, channel], channels a multiple of 8 (those that only fill up have weights and gradients 0). `argmax`
// is one byte a window: the first maximum in row-major order, 0 to 3, or 4 where ReLU closed it. Sums are in f32 and in a fixed order. Each kernel exists for bf16 and f32 storage.
//
// The file compiles for the GPU (nvcc) and, with the emulator in front of it (-DCUDA_EMULATOR), for the CPU, where the tests run it.

#ifdef CUDA_EMULATOR
#include "device.h"
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

struct bf16 {
  unsigned short bits;
};

__device__ __forceinline__ bf16 to_bf16(float value) {
  bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
}

// Byte i of the result is byte (nibble i of the selector) of `word`, or its sign eight times where the nibble's highest bit is set.
__device__ __forceinline__ unsigned permute(unsigned word, unsigned selector) {
  unsigned permuted;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(permuted) : "r"(word), "r"(selector));
  return permuted;
}

// sum[16 x 8] += a[16 x 16] b[16 x 8] by a warp; the fragments are those of mma.m16n8k16 in the PTX manual.
__device__ __forceinline__ void multiply(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16 bits from shared memory; lane l names row l % 8 of matrix l / 8. As stored, or transposed.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}
#endif

typedef unsigned char u8;
typedef long long i64;

namespace kernels {

constexpr int CLOSED = 4;
// Inputs of the first layer: 3 channels x 3 x 3; in memory 32, of which number 27 is 1 for the bias' gradient and the rest are 0.
constexpr int TAPS = 27;
constexpr int TAPS_IN_MEMORY = 32;
constexpr float IMAGE_SCALE = 1.0f / 255.0f;
constexpr float ADAM_FORGET_1 = 0.1f;
constexpr float ADAM_FORGET_2 = 0.001f;
constexpr float ADAM_EPSILON = 1e-7f;

__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ void store(bf16& to, float value) { to = to_bf16(value); }
__device__ __forceinline__ void store(float& to, float value) { to = value; }

// 16 bytes of a feature map.
template <class T> struct alignas(16) Vector {
  static constexpr int LENGTH = 16 / sizeof(T);
  T value[LENGTH];
};

// One byte a channel for as many channels as a Vector holds.
template <class T> struct alignas(16 / sizeof(T)) Bytes {
  u8 value[16 / sizeof(T)];
};

__device__ __forceinline__ i64 thread_number() { return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ i64 n_threads() { return static_cast<i64>(gridDim.x) * blockDim.x; }

// ---- First layer: the images as they lie in the cache, u8 [3, rows, columns] ----

// Images of a batch: `row[i]` numbers the image of place i; `change` is null or, for each place, {mirrored, down, right} as `batches::augment`.
struct Images {
  const u8* pixels;
  const i64* row;
  const int* change;
  int rows;
  int columns;
};

// Windows of one row of the pooled map that are in work at once.
template <class T> struct Segment;
template <> struct Segment<bf16> { static constexpr int WINDOWS = 128; };
template <> struct Segment<float> { static constexpr int WINDOWS = 64; };

// In memory the four 16-byte chunks of a bf16 window are exchanged so that eight rows of a matrix lie in different banks.
template <class T> __device__ __forceinline__ int chunk_place(int window, int chunk) { return chunk; }
template <> __device__ __forceinline__ int chunk_place<bf16>(int window, int chunk) { return chunk ^ ((window >> 1) & 3); }

__device__ __forceinline__ void store_pixel(bf16& to, u8 pixel) {
  // Integers to 255 are exact in bf16.
  to.bits = static_cast<unsigned short>(__float_as_uint(static_cast<float>(pixel)) >> 16);
}
__device__ __forceinline__ void store_pixel(float& to, u8 pixel) { to = static_cast<float>(pixel); }

// Fills `inputs` [4 places of a window, WINDOWS, TAPS_IN_MEMORY] for pooled row `y` from window `first` on; `raw` holds 3 x 4 rows of the
// image meanwhile. All threads of the block call it; afterwards `inputs` may be read.
template <class T>
__device__ void load_inputs(T* inputs, u8* raw, const Images& images, int place, int y, int first, int n_windows) {
  constexpr int WINDOWS = Segment<T>::WINDOWS;
  constexpr int RAW = 2 * WINDOWS + 2;
  const u8* image = images.pixels + images.row[place] * (static_cast<i64>(3) * images.rows * images.columns);
  int mirrored = 0, down = 0, right = 0;
  if (images.change) {
    mirrored = images.change[3 * place];
    down = images.change[3 * place + 1];
    right = images.change[3 * place + 2];
  }
  __syncthreads();
  for (int x = threadIdx.x; x < RAW; x += blockDim.x) {
    int column = 2 * first + x;
    bool is_inside = column < images.columns;
    if (mirrored) column = images.columns - 1 - column;
    column += right;
    is_inside = is_inside && column >= 0 && column < images.columns;
    // All twelve are on their way before the first is waited for.
    u8 pixels[12];
#pragma unroll
    for (int r = 0; r < 12; r++) {
      int row = 2 * y + r % 4 + down;
      bool is_row = row >= 0 && row < images.rows;
      pixels[r] = is_inside && is_row ? image[(static_cast<i64>(r / 4) * images.rows + row) * images.columns + column] : 0;
    }
#pragma unroll
    for (int r = 0; r < 12; r++) raw[r * RAW + x] = pixels[r];
  }
  __syncthreads();
  for (int index = threadIdx.x; index < 4 * WINDOWS; index += blockDim.x) {
    int window = index % WINDOWS, q = index / WINDOWS;
    bool is_there = first + window < n_windows;
    Vector<T> chunks[TAPS_IN_MEMORY / Vector<T>::LENGTH];
#pragma unroll
    for (int tap = 0; tap < TAPS_IN_MEMORY; tap++) {
      int c = tap / 9, i = tap / 3 % 3, j = tap % 3;
      u8 pixel = tap == TAPS ? 1 : 0;
      if (tap < TAPS) pixel = raw[(4 * c + (q >> 1) + i) * RAW + 2 * window + (q & 1) + j];
      store_pixel(chunks[tap / Vector<T>::LENGTH].value[tap % Vector<T>::LENGTH], is_there ? pixel : 0);
    }
    Vector<T>* to = reinterpret_cast<Vector<T>*>(inputs + static_cast<i64>(index) * TAPS_IN_MEMORY);
#pragma unroll
    for (int chunk = 0; chunk < TAPS_IN_MEMORY / Vector<T>::LENGTH; chunk++) to[chunk_place<T>(window, chunk)] = chunks[chunk];
  }
  __syncthreads();
}

__device__ __forceinline__ const bf16* matrix_row(const bf16* inputs, int q, int window, int chunk) {
  return inputs + ((q * Segment<bf16>::WINDOWS + window) * (TAPS_IN_MEMORY / 8) + chunk_place<bf16>(window, chunk)) * 8;
}

// First maximum of four, then bias and ReLU; NaN stays NaN and open.
__device__ __forceinline__ float pooled(const float (&value)[4], float scale, float bias, u8& argmax) {
  float best = value[0];
  int place = 0;
#pragma unroll
  for (int q = 1; q < 4; q++) {
    if (value[q] > best) {
      best = value[q];
      place = q;
    }
  }
  best = best * scale + bias;
  bool is_closed = best <= 0.0f;
  argmax = static_cast<u8>(is_closed ? CLOSED : place);
  return is_closed ? 0.0f : best;
}

struct FirstLayer {
  int channels;
  int pooled_rows;
  int pooled_columns;
  int segments;
};

__device__ __forceinline__ FirstLayer first_layer(const Images& images, int channels, int windows) {
  FirstLayer layer;
  layer.channels = channels;
  layer.pooled_rows = (images.rows - 2) / 2;
  layer.pooled_columns = (images.columns - 2) / 2;
  layer.segments = (layer.pooled_columns + windows - 1) / windows;
  return layer;
}

// Grid: [pooled row x segment, image, 256 channels]; a warp computes 32 channels of 8 windows at a time on the matrix units. Rows 0 to 7 and 8
// to 15 of a product are two places of the same 8 windows, and the columns of four products are arranged so that a thread ends with all four
// places of 8 neighbouring channels: pooling needs no exchange and the result is stored 16 bytes at a time.
__device__ void conv1_forward(Images images, const bf16* weight, const float* bias, bf16* out, u8* argmax, int channels, u8* shared) {
  constexpr int WINDOWS = Segment<bf16>::WINDOWS;
  FirstLayer layer = first_layer(images, channels, WINDOWS);
  bf16* inputs = reinterpret_cast<bf16*>(shared);
  int y = blockIdx.x / layer.segments, first = blockIdx.x % layer.segments * WINDOWS, place = blockIdx.y;
  load_inputs(inputs, shared + 4 * WINDOWS * TAPS_IN_MEMORY * sizeof(bf16), images, place, y, first, layer.pooled_columns);
  int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  int base = (blockIdx.z * 8 + threadIdx.x / 32) * 32;
  if (base >= channels) return;
  // The columns of product j are channels base + 8 (column / 2) + 2 j + column % 2.
  unsigned b[4][2][2];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    int channel = base + 8 * (group / 2) + 2 * j + group % 2;
#pragma unroll
    for (int k = 0; k < 2; k++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int tap = 16 * k + 8 * half + 2 * member;
        const bf16* w = weight + static_cast<i64>(channel) * TAPS + tap;
        unsigned low = channel < channels && tap < TAPS ? w[0].bits : 0;
        unsigned high = channel < channels && tap + 1 < TAPS ? w[1].bits : 0;
        b[j][k][half] = low | high << 16;
      }
    }
  }
  int channel = base + 8 * member;
  float offset[8];
#pragma unroll
  for (int i = 0; i < 8; i++) offset[i] = channel < channels ? bias[channel + i] : 0.0f;
  int n = min(WINDOWS, layer.pooled_columns - first);
  i64 to = ((static_cast<i64>(place) * layer.pooled_rows + y) * layer.pooled_columns + first + group) * channels + channel;
  for (int window = 0; window < n; window += 8, to += 8 * static_cast<i64>(channels)) {
    float sum[2][4][4] = {};
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        unsigned a[4];
        load_matrices(a, matrix_row(inputs, 2 * m + (lane / 8) % 2, window + lane % 8, 2 * k + lane / 16));
#pragma unroll
        for (int j = 0; j < 4; j++) multiply(sum[m][j], a, b[j][k]);
      }
    }
    if (channel >= channels || window + group >= n) continue;
    Vector<bf16> values;
    Bytes<bf16> places;
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float four[4] = {sum[0][j][i], sum[0][j][2 + i], sum[1][j][i], sum[1][j][2 + i]};
        values.value[2 * j + i] = to_bf16(pooled(four, IMAGE_SCALE, offset[2 * j + i], places.value[2 * j + i]));
      }
    }
    *reinterpret_cast<Vector<bf16>*>(out + to) = values;
    *reinterpret_cast<Bytes<bf16>*>(argmax + to) = places;
  }
}

// Grid as above; a thread computes one channel.
__device__ void conv1_forward(Images images, const float* weight, const float* bias, float* out, u8* argmax, int channels, u8* shared) {
  constexpr int WINDOWS = Segment<float>::WINDOWS;
  FirstLayer layer = first_layer(images, channels, WINDOWS);
  float* inputs = reinterpret_cast<float*>(shared);
  int y = blockIdx.x / layer.segments, first = blockIdx.x % layer.segments * WINDOWS, place = blockIdx.y;
  load_inputs(inputs, shared + 4 * WINDOWS * TAPS_IN_MEMORY * sizeof(float), images, place, y, first, layer.pooled_columns);
  int channel = blockIdx.z * 256 + threadIdx.x;
  if (channel >= channels) return;
  float w[TAPS];
#pragma unroll
  for (int tap = 0; tap < TAPS; tap++) w[tap] = weight[static_cast<i64>(channel) * TAPS + tap];
  float offset = bias[channel];
  int n = min(WINDOWS, layer.pooled_columns - first);
  for (int window = 0; window < n; window++) {
    float four[4];
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const float* x = inputs + (q * WINDOWS + window) * TAPS_IN_MEMORY;
      float sum = 0.0f;
#pragma unroll
      for (int tap = 0; tap < TAPS; tap++) sum += w[tap] * x[tap];
      four[q] = sum;
    }
    i64 to = ((static_cast<i64>(place) * layer.pooled_rows + y) * layer.pooled_columns + first + window) * channels + channel;
    out[to] = pooled(four, IMAGE_SCALE, offset, argmax[to]);
  }
}

// Partial sums [part, channel, TAPS_IN_MEMORY] of the first layer's gradients; tap 27 is the bias'. Grid: [part, 256 channels]; a part is every
// gridDim.x-th segment. A warp adds 32 channels: the product's rows are taps, its columns channels base + 4 column + j, its inner dimension 16
// windows, once for each of the four places with the gradients of the other places masked out.
__device__ void conv1_backward(Images images, int n_images, const bf16* gradient, const u8* argmax, float* partial, int channels, u8* shared) {
  constexpr int WINDOWS = Segment<bf16>::WINDOWS;
  FirstLayer layer = first_layer(images, channels, WINDOWS);
  bf16* inputs = reinterpret_cast<bf16*>(shared);
  int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  int base = (blockIdx.y * 8 + threadIdx.x / 32) * 32;
  int channel = base + 4 * group;
  bool is_there = channel < channels;
  float sum[2][4][4] = {};
  int n_items = layer.pooled_rows * layer.segments * n_images;
  for (int item = blockIdx.x; item < n_items; item += gridDim.x) {
    int segment = item % layer.segments, y = item / layer.segments % layer.pooled_rows;
    int place = item / layer.segments / layer.pooled_rows, first = segment * WINDOWS;
    load_inputs(inputs, shared + 4 * WINDOWS * TAPS_IN_MEMORY * sizeof(bf16), images, place, y, first, layer.pooled_columns);
    if (base >= channels) continue;
    int n = min(WINDOWS, layer.pooled_columns - first);
    i64 from = ((static_cast<i64>(place) * layer.pooled_rows + y) * layer.pooled_columns + first) * channels + channel;
    for (int window = 0; window < n; window += 16) {
      // Of 4 windows and 4 channels: gradients as they lie, two in a word, and one byte each of argmax.
      uint2 g[4];
      unsigned arg[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int w = window + 2 * member + i % 2 + 8 * (i / 2);
        g[i] = make_uint2(0, 0);
        arg[i] = 0x04040404;
        if (is_there && w < n) {
          g[i] = *reinterpret_cast<const uint2*>(gradient + from + static_cast<i64>(w) * channels);
          arg[i] = *reinterpret_cast<const unsigned*>(argmax + from + static_cast<i64>(w) * channels);
        }
      }
      // For each channel j, windows 0 and 1, and 2 and 3, side by side in a word; argmax likewise with 16 bits each.
      unsigned pair[4][2], where[4][2];
#pragma unroll
      for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          unsigned low = j < 2 ? g[2 * half].x : g[2 * half].y, high = j < 2 ? g[2 * half + 1].x : g[2 * half + 1].y;
          pair[j][half] = j % 2 ? (low >> 16) | (high & 0xFFFF0000u) : (low & 0xFFFFu) | (high << 16);
          where[j][half] = ((arg[2 * half] >> (8 * j)) & 0xFFu) | (((arg[2 * half + 1] >> (8 * j)) & 0xFFu) << 16);
        }
      }
#pragma unroll
      for (int q = 0; q < 4; q++) {
        unsigned b[4][2];
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
          for (int half = 0; half < 2; half++) {
            // The highest bit of each 16 is set where argmax is not q; it masks all 16.
            unsigned other = permute((where[j][half] ^ (0x00010001u * q)) + 0x7FFF7FFFu, 0xBB99);
            b[j][half] = pair[j][half] & ~other;
          }
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
          unsigned a[4];
          load_matrices_transposed(a, matrix_row(inputs, q, window + lane / 16 * 8 + lane % 8, 2 * m + (lane / 8) % 2));
#pragma unroll
          for (int j = 0; j < 4; j++) multiply(sum[m][j], a, b[j]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int to_channel = base + 4 * (2 * member + i % 2) + j, tap = 16 * m + group + 8 * (i / 2);
        if (to_channel < channels) partial[(static_cast<i64>(blockIdx.x) * channels + to_channel) * TAPS_IN_MEMORY + tap] = sum[m][j][i];
      }
    }
  }
}

// Grid as above; a thread adds one channel.
__device__ void conv1_backward(Images images, int n_images, const float* gradient, const u8* argmax, float* partial, int channels, u8* shared) {
  constexpr int WINDOWS = Segment<float>::WINDOWS;
  FirstLayer layer = first_layer(images, channels, WINDOWS);
  float* inputs = reinterpret_cast<float*>(shared);
  int channel = blockIdx.y * 256 + threadIdx.x;
  float sum[TAPS + 1] = {};
  int n_items = layer.pooled_rows * layer.segments * n_images;
  for (int item = blockIdx.x; item < n_items; item += gridDim.x) {
    int segment = item % layer.segments, y = item / layer.segments % layer.pooled_rows;
    int place = item / layer.segments / layer.pooled_rows, first = segment * WINDOWS;
    load_inputs(inputs, shared + 4 * WINDOWS * TAPS_IN_MEMORY * sizeof(float), images, place, y, first, layer.pooled_columns);
    if (channel >= channels) continue;
    int n = min(WINDOWS, layer.pooled_columns - first);
    i64 from = ((static_cast<i64>(place) * layer.pooled_rows + y) * layer.pooled_columns + first) * channels + channel;
    for (int window = 0; window < n; window++, from += channels) {
      int q = argmax[from];
      if (q == CLOSED) continue;
      float g = gradient[from];
      const float* x = inputs + (q * WINDOWS + window) * TAPS_IN_MEMORY;
#pragma unroll
      for (int tap = 0; tap <= TAPS; tap++) sum[tap] += g * x[tap];
    }
  }
  if (channel >= channels) return;
#pragma unroll
  for (int tap = 0; tap <= TAPS; tap++) {
    partial[(static_cast<i64>(blockIdx.x) * channels + channel) * TAPS_IN_MEMORY + tap] = sum[tap];
  }
}

// ---- Behind the other convolutions ----

// y [images, rows, columns, channels] -> out and argmax [images, rows / 2, columns / 2, channels]. A thread takes 16 bytes of channels.
template <class T>
__device__ void bias_relu_pool(const T* y, const float* bias, T* out, u8* argmax, int n_images, int rows, int columns, int channels) {
  constexpr int LENGTH = Vector<T>::LENGTH;
  int vectors = channels / LENGTH, pooled_rows = rows / 2, pooled_columns = columns / 2;
  i64 n = static_cast<i64>(n_images) * pooled_rows * pooled_columns * vectors;
  const Vector<T>* from = reinterpret_cast<const Vector<T>*>(y);
  for (i64 index = thread_number(); index < n; index += n_threads()) {
    int vector = static_cast<int>(index % vectors);
    i64 rest = index / vectors;
    int x = static_cast<int>(rest % pooled_columns);
    rest /= pooled_columns;
    int row = static_cast<int>(rest % pooled_rows);
    i64 at = (((rest / pooled_rows) * rows + 2 * row) * columns + 2 * x) * vectors + vector;
    i64 below = at + static_cast<i64>(columns) * vectors;
    Vector<T> place[4] = {from[at], from[at + vectors], from[below], from[below + vectors]};
    Vector<T> values;
    Bytes<T> places;
#pragma unroll
    for (int i = 0; i < LENGTH; i++) {
      float four[4] = {to_float(place[0].value[i]), to_float(place[1].value[i]), to_float(place[2].value[i]), to_float(place[3].value[i])};
      store(values.value[i], pooled(four, 1.0f, bias[vector * LENGTH + i], places.value[i]));
    }
    reinterpret_cast<Vector<T>*>(out)[index] = values;
    reinterpret_cast<Bytes<T>*>(argmax)[index] = places;
  }
}

// Partial sums [part, channels] of a block's [vectors, rest] threads; part is blockIdx.x. All threads of the block call it.
template <int LENGTH> __device__ __forceinline__ void sum_block(float (&sum)[LENGTH], float* partial, int vector, int vectors, u8* shared) {
  float* sums = reinterpret_cast<float*>(shared);
  float* own = sums + (static_cast<i64>(threadIdx.y) * blockDim.x + threadIdx.x) * LENGTH;
#pragma unroll
  for (int i = 0; i < LENGTH; i++) own[i] = sum[i];
  __syncthreads();
  if (threadIdx.y > 0 || vector >= vectors) return;
  for (unsigned y = 1; y < blockDim.y; y++) {
#pragma unroll
    for (int i = 0; i < LENGTH; i++) sum[i] += own[static_cast<i64>(y) * blockDim.x * LENGTH + i];
  }
#pragma unroll
  for (int i = 0; i < LENGTH; i++) partial[(static_cast<i64>(blockIdx.x) * vectors + vector) * LENGTH + i] = sum[i];
}

// The pooled map's gradient -> that of y, all of it, and partial sums [part, channels] of the bias'. Grid: [part, blockDim.x vectors];
// block: [vectors, 256 / vectors windows].
template <class T>
__device__ void bias_relu_pool_backward(const T* gradient, const u8* argmax, T* to, float* partial, int n_images, int rows, int columns, int channels, u8* shared) {
  constexpr int LENGTH = Vector<T>::LENGTH;
  int vectors = channels / LENGTH, vector = blockIdx.y * blockDim.x + threadIdx.x;
  int pooled_rows = rows / 2, pooled_columns = columns / 2;
  // Windows, and the halves that an odd size leaves at the edge.
  int cell_rows = (rows + 1) / 2, cell_columns = (columns + 1) / 2;
  i64 n = static_cast<i64>(n_images) * cell_rows * cell_columns;
  float sum[LENGTH] = {};
  if (vector < vectors) {
    for (i64 cell = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y; cell < n; cell += static_cast<i64>(gridDim.x) * blockDim.y) {
      int x = static_cast<int>(cell % cell_columns);
      i64 rest = cell / cell_columns;
      int row = static_cast<int>(rest % cell_rows);
      i64 image = rest / cell_rows;
      Vector<T> g = {};
      Bytes<T> place;
#pragma unroll
      for (int i = 0; i < LENGTH; i++) place.value[i] = CLOSED;
      if (row < pooled_rows && x < pooled_columns) {
        i64 at = ((image * pooled_rows + row) * pooled_columns + x) * vectors + vector;
        g = reinterpret_cast<const Vector<T>*>(gradient)[at];
        place = reinterpret_cast<const Bytes<T>*>(argmax)[at];
      }
#pragma unroll
      for (int i = 0; i < LENGTH; i++) {
        if (place.value[i] != CLOSED) sum[i] += to_float(g.value[i]);
      }
#pragma unroll
      for (int q = 0; q < 4; q++) {
        if (2 * row + q / 2 >= rows || 2 * x + q % 2 >= columns) continue;
        Vector<T> values = {};
#pragma unroll
        for (int i = 0; i < LENGTH; i++) {
          if (place.value[i] == q) values.value[i] = g.value[i];
        }
        i64 at = ((image * rows + 2 * row + q / 2) * columns + 2 * x + q % 2) * vectors + vector;
        reinterpret_cast<Vector<T>*>(to)[at] = values;
      }
    }
  }
  sum_block(sum, partial, vector, vectors, shared);
}

// ---- Layers of any window: ../operators/spatial ----
//
// A map lies [image, place, channel], its places row by row; `pitch` is how many values stand between one place and the next, more than its channels where it is a
// part of a concatenation. Maps without a pitch are packed.

// One reader's part of a map's gradient: where the first channel stands, values from one image to the next and from one place to the next (0: all places have the same), factor.
struct Part {
  const void* first;
  i64 image;
  i64 place;
  float scale;
};

template <class T, int LENGTH>
__device__ __forceinline__ void add_parts(float (&sum)[LENGTH], const Part* parts, int n_parts, i64 image, i64 place, int vector) {
  for (int index = 0; index < n_parts; index++) {
    Part part = parts[index];
    const T* at = static_cast<const T*>(part.first) + image * part.image + place * part.place;
    Vector<T> values = reinterpret_cast<const Vector<T>*>(at)[vector];
#pragma unroll
    for (int i = 0; i < LENGTH; i++) sum[i] += part.scale * to_float(values.value[i]);
  }
}

template <class T> __device__ __forceinline__ Vector<T> vector_of(const float (&values)[Vector<T>::LENGTH]) {
  Vector<T> stored;
#pragma unroll
  for (int i = 0; i < Vector<T>::LENGTH; i++) store(stored.value[i], values[i]);
  return stored;
}

__device__ __forceinline__ float relu(float value) { return value <= 0.0f ? 0.0f : value; }

struct Normalisation {
  float mean[3];
  float deviation[3];
};

// Images -> (x / 255 - mean) / deviation [image, row, column, 8], of which the last 5 channels are 0. A thread takes a place.
template <class T> __device__ void normalise(Images images, Normalisation to, T* out, int n_images) {
  i64 area = static_cast<i64>(images.rows) * images.columns;
  for (i64 index = thread_number(); index < n_images * area; index += n_threads()) {
    int place = static_cast<int>(index / area);
    int row = static_cast<int>(index % area) / images.columns, column = static_cast<int>(index % area) % images.columns;
    if (images.change) {
      if (images.change[3 * place]) column = images.columns - 1 - column;
      row += images.change[3 * place + 1];
      column += images.change[3 * place + 2];
    }
    bool is_inside = row >= 0 && row < images.rows && column >= 0 && column < images.columns;
    const u8* image = images.pixels + images.row[place] * (3 * area);
    float values[8] = {};
#pragma unroll
    for (int c = 0; c < 3; c++) {
      float pixel = is_inside ? static_cast<float>(image[c * area + static_cast<i64>(row) * images.columns + column]) : 0.0f;
      values[c] = (pixel * IMAGE_SCALE - to.mean[c]) / to.deviation[c];
    }
    Vector<T>* stored = reinterpret_cast<Vector<T>*>(out + 8 * index);
#pragma unroll
    for (int i = 0; i < 8; i++) store(stored[i / Vector<T>::LENGTH].value[i % Vector<T>::LENGTH], values[i]);
  }
}

// A kernel with its normalisation: gamma W / deviation, and beta - mean gamma / deviation. Grid: channels; a kernel has `length` values.
template <class T>
__device__ void fold(const float* weight, const float* gamma, const float* beta, const float* mean, const float* variance, float epsilon, T* filter, float* bias, int length) {
  int channel = blockIdx.x;
  float factor = gamma[channel] / sqrtf(variance[channel] + epsilon);
  i64 begin = static_cast<i64>(channel) * length;
  for (int i = threadIdx.x; i < length; i += blockDim.x) store(filter[begin + i], weight[begin + i] * factor);
  if (threadIdx.x == 0) bias[channel] = beta[channel] - mean[channel] * factor;
}

// Gradients of kernel, gamma and beta from those of the folded filter and bias. Grid: channels; block: 128 threads.
template <class T>
__device__ void unfold(const T* filter_gradient, const float* bias_gradient, const float* weight, const float* gamma, const float* mean, const float* variance, float epsilon,
                       float* weight_gradient, float* gamma_gradient, float* beta_gradient, int length) {
  __shared__ float sums[128];
  int channel = blockIdx.x;
  float deviation = sqrtf(variance[channel] + epsilon), factor = gamma[channel] / deviation;
  i64 begin = static_cast<i64>(channel) * length;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < length; i += blockDim.x) {
    float gradient = to_float(filter_gradient[begin + i]);
    sum += gradient * weight[begin + i];
    weight_gradient[begin + i] = gradient * factor;
  }
  sums[threadIdx.x] = sum;
  for (int half = 64; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x > 0) return;
  gamma_gradient[channel] = (sums[0] - mean[channel] * bias_gradient[channel]) / deviation;
  beta_gradient[channel] = bias_gradient[channel];
}

// y [.., channels] packed -> relu(y + bias), which may take its place.
template <class T> __device__ void bias_relu(const T* y, const float* bias, T* out, int pitch, i64 n_places, int channels) {
  constexpr int LENGTH = Vector<T>::LENGTH;
  int vectors = channels / LENGTH;
  for (i64 index = thread_number(); index < n_places * vectors; index += n_threads()) {
    int vector = static_cast<int>(index % vectors);
    Vector<T> from = reinterpret_cast<const Vector<T>*>(y)[index];
    float values[LENGTH];
#pragma unroll
    for (int i = 0; i < LENGTH; i++) values[i] = relu(to_float(from.value[i]) + bias[vector * LENGTH + i]);
    reinterpret_cast<Vector<T>*>(out + index / vectors * pitch)[vector] = vector_of<T>(values);
  }
}

// relu(left + right), each with the bias of its convolution where it has one (else null); all packed.
template <class T>
__device__ void add_relu(const T* left, const float* left_bias, const T* right, const float* right_bias, T* out, i64 n_places, int channels) {
  constexpr int LENGTH = Vector<T>::LENGTH;
  int vectors = channels / LENGTH;
  for (i64 index = thread_number(); index < n_places * vectors; index += n_threads()) {
    int channel = static_cast<int>(index % vectors) * LENGTH;
    Vector<T> a = reinterpret_cast<const Vector<T>*>(left)[index], b = reinterpret_cast<const Vector<T>*>(right)[index];
    float values[LENGTH];
#pragma unroll
    for (int i = 0; i < LENGTH; i++) {
      float sum = to_float(a.value[i]) + (left_bias ? left_bias[channel + i] : 0.0f);
      values[i] = relu(sum + (to_float(b.value[i]) + (right_bias ? right_bias[channel + i] : 0.0f)));
    }
    reinterpret_cast<Vector<T>*>(out)[index] = vector_of<T>(values);
  }
}

// Gradient behind a ReLU, in parts -> gradient before it, packed, and partial sums [part, channels] of the bias'. `out` is what the ReLU gave. Grid and block as for
// bias_relu_pool_backward, with places for windows.
template <class T>
__device__ void relu_backward(const T* out, int pitch, const Part* parts, int n_parts, T* to, float* partial, int n_images, int places, int channels, u8* shared) {
  constexpr int LENGTH = Vector<T>::LENGTH;
  int vectors = channels / LENGTH, vector = blockIdx.y * blockDim.x + threadIdx.x;
  i64 n = static_cast<i64>(n_images) * places;
  float sum[LENGTH] = {};
  if (vector < vectors) {
    for (i64 place = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y; place < n; place += static_cast<i64>(gridDim.x) * blockDim.y) {
      float values[LENGTH] = {};
      add_parts<T>(values, parts, n_parts, place / places, place % places, vector);
      Vector<T> output = reinterpret_cast<const Vector<T>*>(out + place * pitch)[vector];
#pragma unroll
      for (int i = 0; i < LENGTH; i++) {
        if (!(to_float(output.value[i]) > 0.0f)) values[i] = 0.0f;
      }
      Vector<T> stored = vector_of<T>(values);
#pragma unroll
      for (int i = 0; i < LENGTH; i++) sum[i] += to_float(stored.value[i]);
      reinterpret_cast<Vector<T>*>(to)[place * vectors + vector] = stored;
    }
  }
  sum_block(sum, partial, vector, vectors, shared);
}

// A window of a pool: sizes, stride, padding. `rows` and `columns` are of what goes in, `out_rows` and `out_columns` of what comes out.
struct Pool {
  int kernel_rows, kernel_columns, stride, above, left;
  int rows, columns, out_rows, out_columns;
};

// Where a thread stands in a map [image, row, column, vector].
struct Position {
  i64 image;
  int row, column, vector;
};
__device__ __forceinline__ Position position(i64 index, int rows, int columns, int vectors) {
  Position at;
  at.vector = static_cast<int>(index % vectors);
  index /= vectors;
  at.column = static_cast<int>(index % columns);
  index /= columns;
  at.row = static_cast<int>(index % rows);
  at.image = index / rows;
  return at;
}

// Windows of largest values: the first in row-major order, whose number in its window goes to argmax (packed). Mean: the sum over all places, padding counted.
template <class T, bool IS_MEAN> __device__ void pool(const T* from, T* out, int pitch, u8* argmax, Pool of, int n_images, int channels) {
  constexpr int LENGTH = Vector<T>::LENGTH;
  int vectors = channels / LENGTH;
  i64 n = static_cast<i64>(n_images) * of.out_rows * of.out_columns * vectors;
  float share = 1.0f / static_cast<float>(of.kernel_rows * of.kernel_columns);
  for (i64 index = thread_number(); index < n; index += n_threads()) {
    Position to = position(index, of.out_rows, of.out_columns, vectors);
    float values[LENGTH] = {};
    Bytes<T> places = {};
    bool is_first = true;
    for (int i = 0; i < of.kernel_rows; i++) {
      int row = to.row * of.stride - of.above + i;
      if (row < 0 || row >= of.rows) continue;
      for (int j = 0; j < of.kernel_columns; j++) {
        int column = to.column * of.stride - of.left + j;
        if (column < 0 || column >= of.columns) continue;
        Vector<T> under = reinterpret_cast<const Vector<T>*>(from)[((to.image * of.rows + row) * of.columns + column) * vectors + to.vector];
#pragma unroll
        for (int l = 0; l < LENGTH; l++) {
          float value = to_float(under.value[l]);
          if (IS_MEAN) {
            values[l] += value;
          } else if (is_first || value > values[l]) {
            values[l] = value;
            places.value[l] = static_cast<u8>(i * of.kernel_columns + j);
          }
        }
        is_first = false;
      }
    }
    if (IS_MEAN) {
#pragma unroll
      for (int l = 0; l < LENGTH; l++) values[l] *= share;
    } else {
      reinterpret_cast<Bytes<T>*>(argmax)[index] = places;
    }
    i64 place = (to.image * of.out_rows + to.row) * of.out_columns + to.column;
    reinterpret_cast<Vector<T>*>(out + place * pitch)[to.vector] = vector_of<T>(values);
  }
}

// The pool's gradient in parts -> that of what went in, packed: a thread adds up the windows over its place, in row-major order.
template <class T, bool IS_MEAN>
__device__ void pool_backward(const u8* argmax, const Part* parts, int n_parts, T* to, Pool of, int n_images, int channels) {
  constexpr int LENGTH = Vector<T>::LENGTH;
  int vectors = channels / LENGTH;
  i64 n = static_cast<i64>(n_images) * of.rows * of.columns * vectors;
  float share = 1.0f / static_cast<float>(of.kernel_rows * of.kernel_columns);
  for (i64 index = thread_number(); index < n; index += n_threads()) {
    Position at = position(index, of.rows, of.columns, vectors);
    int lowest = at.row + of.above, rightmost = at.column + of.left;
    int first_row = max(0, (lowest - of.kernel_rows + of.stride) / of.stride), last_row = min(of.out_rows - 1, lowest / of.stride);
    int first_column = max(0, (rightmost - of.kernel_columns + of.stride) / of.stride), last_column = min(of.out_columns - 1, rightmost / of.stride);
    float sum[LENGTH] = {};
    for (int row = first_row; row <= last_row; row++) {
      for (int column = first_column; column <= last_column; column++) {
        i64 place = static_cast<i64>(row) * of.out_columns + column;
        float values[LENGTH] = {};
        add_parts<T>(values, parts, n_parts, at.image, place, at.vector);
        int tap = (lowest - row * of.stride) * of.kernel_columns + rightmost - column * of.stride;
        Bytes<T> places = {};
        if (!IS_MEAN) places = reinterpret_cast<const Bytes<T>*>(argmax)[(at.image * of.out_rows * of.out_columns + place) * vectors + at.vector];
#pragma unroll
        for (int l = 0; l < LENGTH; l++) {
          if (IS_MEAN) {
            sum[l] += values[l] * share;
          } else if (places.value[l] == tap) {
            sum[l] += values[l];
          }
        }
      }
    }
    reinterpret_cast<Vector<T>*>(to)[index] = vector_of<T>(sum);
  }
}

// Means [image, channel] of a packed map's channels. A thread takes a vector of an image.
template <class T> __device__ void average(const T* from, float* out, int n_images, int places, int channels) {
  constexpr int LENGTH = Vector<T>::LENGTH;
  int vectors = channels / LENGTH;
  for (i64 index = thread_number(); index < static_cast<i64>(n_images) * vectors; index += n_threads()) {
    i64 image = index / vectors;
    float sum[LENGTH] = {};
    for (int place = 0; place < places; place++) {
      Vector<T> values = reinterpret_cast<const Vector<T>*>(from)[(image * places + place) * vectors + index % vectors];
#pragma unroll
      for (int i = 0; i < LENGTH; i++) sum[i] += to_float(values.value[i]);
    }
#pragma unroll
    for (int i = 0; i < LENGTH; i++) out[index * LENGTH + i] = sum[i] * (1.0f / static_cast<float>(places));
  }
}

// ---- The last layer and the loss ----

__device__ __forceinline__ float hidden(float z, float bias) { return z + bias <= 0.0f ? 0.0f : z + bias; }

// Gradient of the hidden layer before ReLU [image, unit] and of dense1.bias, dense2.weight and dense2.bias; the loss of the step. Grid: 32 units;
// block: [32 units, 8 images].
template <class T>
__device__ void head_backward(const float* z, const float* bias1, const float* weight2, const float* image_loss, const float* logit_gradient, T* hidden_gradient,
                              float* bias1_gradient, float* weight2_gradient, float* bias2_gradient, float* loss, int n_images, int units) {
  __shared__ float sums[2][8][32];
  int unit = blockIdx.x * 32 + threadIdx.x;
  float to_weight = 0.0f, to_bias = 0.0f;
  if (unit < units) {
    for (int image = threadIdx.y; image < n_images; image += 8) {
      i64 at = static_cast<i64>(image) * units + unit;
      float value = hidden(z[at], bias1[unit]);
      float g = value == 0.0f ? 0.0f : logit_gradient[image] * weight2[unit];
      to_weight += logit_gradient[image] * value;
      to_bias += g;
      store(hidden_gradient[at], g);
    }
  }
  sums[0][threadIdx.y][threadIdx.x] = to_weight;
  sums[1][threadIdx.y][threadIdx.x] = to_bias;
  __syncthreads();
  if (threadIdx.y == 0 && unit < units) {
    for (int y = 1; y < 8; y++) {
      to_weight += sums[0][y][threadIdx.x];
      to_bias += sums[1][y][threadIdx.x];
    }
    weight2_gradient[unit] = to_weight;
    bias1_gradient[unit] = to_bias;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0 && threadIdx.y == 1) {
    double total = 0.0, to_bias2 = 0.0;
    for (int image = 0; image < n_images; image++) {
      total += image_loss[image];
      to_bias2 += logit_gradient[image];
    }
    *loss = static_cast<float>(total);
    *bias2_gradient = static_cast<float>(to_bias2);
  }
}

}  // namespace kernels
using namespace kernels;

#define FOR_EACH_STORAGE(DEFINE) DEFINE(bf16, bf16) DEFINE(float, f32)

#define CONV1(T, suffix)                                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256, 2) conv1_forward_##suffix(                                                                    \
      const u8* pixels, const i64* row, const int* change, const T* weight, const float* bias, T* out, u8* argmax, int rows, int columns, int channels) { \
    DYNAMIC_SHARED(shared);                                                                                                                       \
    Images images = {pixels, row, change, rows, columns};                                                                                         \
    conv1_forward(images, weight, bias, out, argmax, channels, shared);                                                                           \
  }                                                                                                                                               \
  extern "C" __global__ void __launch_bounds__(256, 2) conv1_backward_##suffix(                                                                   \
      const u8* pixels, const i64* row, const int* change, const T* gradient, const u8* argmax, float* partial, int n_images, int rows, int columns, int channels) { \
    DYNAMIC_SHARED(shared);                                                                                                                       \
    Images images = {pixels, row, change, rows, columns};                                                                                         \
    conv1_backward(images, n_images, gradient, argmax, partial, channels, shared);                                                                \
  }
FOR_EACH_STORAGE(CONV1)

#define POOL(T, suffix)                                                                                                                           \
  extern "C" __global__ void bias_relu_pool_##suffix(const T* y, const float* bias, T* out, u8* argmax, int n_images, int rows, int columns, int channels) { \
    bias_relu_pool(y, bias, out, argmax, n_images, rows, columns, channels);                                                                      \
  }                                                                                                                                               \
  extern "C" __global__ void __launch_bounds__(256) bias_relu_pool_backward_##suffix(                                                             \
      const T* gradient, const u8* argmax, T* to, float* partial, int n_images, int rows, int columns, int channels) {                            \
    DYNAMIC_SHARED(shared);                                                                                                                       \
    bias_relu_pool_backward(gradient, argmax, to, partial, n_images, rows, columns, channels, shared);                                            \
  }
FOR_EACH_STORAGE(POOL)

#define HEAD(T, suffix)                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(256) head_backward_##suffix(                                                                       \
      const float* z, const float* bias1, const float* weight2, const float* image_loss, const float* logit_gradient, T* hidden_gradient,         \
      float* bias1_gradient, float* weight2_gradient, float* bias2_gradient, float* loss, int n_images, int units) {                              \
    head_backward(z, bias1, weight2, image_loss, logit_gradient, hidden_gradient, bias1_gradient, weight2_gradient, bias2_gradient, loss, n_images, units); \
  }
FOR_EACH_STORAGE(HEAD)

#define SPATIAL(T, suffix)                                                                                                                        \
  extern "C" __global__ void normalise_##suffix(const u8* pixels, const i64* row, const int* change, T* out, int n_images, int rows, int columns, \
                                                float red, float green, float blue, float of_red, float of_green, float of_blue) {                \
    Images images = {pixels, row, change, rows, columns};                                                                                         \
    normalise(images, {{red, green, blue}, {of_red, of_green, of_blue}}, out, n_images);                                                          \
  }                                                                                                                                               \
  extern "C" __global__ void fold_##suffix(const float* weight, const float* gamma, const float* beta, const float* mean, const float* variance,  \
                                           float epsilon, T* filter, float* bias, int length) {                                                   \
    fold(weight, gamma, beta, mean, variance, epsilon, filter, bias, length);                                                                     \
  }                                                                                                                                               \
  extern "C" __global__ void __launch_bounds__(128) unfold_##suffix(                                                                              \
      const T* filter_gradient, const float* bias_gradient, const float* weight, const float* gamma, const float* mean, const float* variance,    \
      float epsilon, float* weight_gradient, float* gamma_gradient, float* beta_gradient, int length) {                                           \
    unfold(filter_gradient, bias_gradient, weight, gamma, mean, variance, epsilon, weight_gradient, gamma_gradient, beta_gradient, length);       \
  }                                                                                                                                               \
  extern "C" __global__ void bias_relu_##suffix(const T* y, const float* bias, T* out, int pitch, i64 n_places, int channels) {                   \
    bias_relu(y, bias, out, pitch, n_places, channels);                                                                                           \
  }                                                                                                                                               \
  extern "C" __global__ void add_relu_##suffix(const T* left, const float* left_bias, const T* right, const float* right_bias, T* out,            \
                                               i64 n_places, int channels) {                                                                      \
    add_relu(left, left_bias, right, right_bias, out, n_places, channels);                                                                        \
  }                                                                                                                                               \
  extern "C" __global__ void __launch_bounds__(256) relu_backward_##suffix(                                                                       \
      const T* out, int pitch, const Part* parts, int n_parts, T* to, float* partial, int n_images, int places, int channels) {                   \
    DYNAMIC_SHARED(shared);                                                                                                                       \
    relu_backward(out, pitch, parts, n_parts, to, partial, n_images, places, channels, shared);                                                   \
  }                                                                                                                                               \
  extern "C" __global__ void average_##suffix(const T* from, float* out, int n_images, int places, int channels) {                                \
    average(from, out, n_images, places, channels);                                                                                               \
  }
FOR_EACH_STORAGE(SPATIAL)

#define POOLS(T, suffix, name, is_mean)                                                                                                           \
  extern "C" __global__ void name##_##suffix(const T* from, T* out, int pitch, u8* argmax, int n_images, int channels, int kernel_rows,           \
                                             int kernel_columns, int stride, int above, int left, int rows, int columns, int out_rows,            \
                                             int out_columns) {                                                                                   \
    Pool of = {kernel_rows, kernel_columns, stride, above, left, rows, columns, out_rows, out_columns};                                           \
    pool<T, is_mean>(from, out, pitch, argmax, of, n_images, channels);                                                                           \
  }                                                                                                                                               \
  extern "C" __global__ void name##_backward_##suffix(const u8* argmax, const Part* parts, int n_parts, T* to, int n_images, int channels,        \
                                                      int kernel_rows, int kernel_columns, int stride, int above, int left, int rows,             \
                                                      int columns, int out_rows, int out_columns) {                                               \
    Pool of = {kernel_rows, kernel_columns, stride, above, left, rows, columns, out_rows, out_columns};                                           \
    pool_backward<T, is_mean>(argmax, parts, n_parts, to, of, n_images, channels);                                                                \
  }
#define BOTH_POOLS(T, suffix) POOLS(T, suffix, max_pool, false) POOLS(T, suffix, mean_pool, true)
FOR_EACH_STORAGE(BOTH_POOLS)

// Sum of a column of [part, width] over the parts, by the block's threads of one threadIdx.x; the first of them (threadIdx.y 0) has it. All threads of the block call it.
__device__ __forceinline__ float sum_column(const float* partial, int n_parts, i64 width, i64 column) {
  __shared__ float sums[1024];
  float sum = 0.0f;
  if (column < width) {
    for (int part = threadIdx.y; part < n_parts; part += blockDim.y) sum += partial[part * width + column];
  }
  sums[threadIdx.y * blockDim.x + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0) return 0.0f;
  for (unsigned y = 1; y < blockDim.y; y++) sum += sums[y * blockDim.x + threadIdx.x];
  return sum;
}

// Gradients of the first layer from partial sums: weight [channel, 27], with the images' scale, and bias. Grid: channels; block: [32 taps, some parts].
extern "C" __global__ void __launch_bounds__(1024) conv1_sum(const float* partial, float* weight, float* bias, int n_parts, int channels) {
  int channel = blockIdx.x, tap = threadIdx.x;
  float sum = sum_column(partial, n_parts, static_cast<i64>(channels) * TAPS_IN_MEMORY, static_cast<i64>(channel) * TAPS_IN_MEMORY + tap);
  if (threadIdx.y > 0) return;
  if (tap < TAPS) weight[static_cast<i64>(channel) * TAPS + tap] = sum * IMAGE_SCALE;
  if (tap == TAPS) bias[channel] = sum;
}

// Sums over the parts of [part, n]. Grid: blockDim.x of n; block: [of n, some parts].
extern "C" __global__ void __launch_bounds__(1024) sum_parts(const float* partial, float* sums, int n_parts, int n) {
  int index = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = sum_column(partial, n_parts, n, index);
  if (threadIdx.y == 0 && index < n) sums[index] = sum;
}

// Logits of z [image, unit], a hidden layer before bias and ReLU; where there are targets [image, 2] (label, weight) also each image's part of the mean loss
// over `n_total` images, and its gradient. Grid: images; block: 32 threads.
extern "C" __global__ void head_forward(const float* z, const float* bias1, const float* weight2, const float* bias2, const float* targets, float* logits,
                                        float* image_loss, float* logit_gradient, int units, int n_total) {
  __shared__ float sums[32];
  int image = blockIdx.x;
  float sum = 0.0f;
  for (int unit = threadIdx.x; unit < units; unit += 32) sum += hidden(z[static_cast<i64>(image) * units + unit], bias1[unit]) * weight2[unit];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int lane = 1; lane < 32; lane++) sum += sums[lane];
  float logit = sum + bias2[0];
  logits[image] = logit;
  if (!targets) return;
  double x = logit, label = targets[2 * image], weight = targets[2 * image + 1] / static_cast<double>(n_total);
  double positive = x > 0.0 || x != x ? x : 0.0, tail = exp(-fabs(x));
  image_loss[image] = static_cast<float>(weight * (positive - x * label + log1p(tail)));
  double probability = x >= 0.0 ? 1.0 / (1.0 + tail) : tail / (1.0 + tail);
  logit_gradient[image] = static_cast<float>(weight * (x != x ? x : probability - label));
}

extern "C" __global__ void to_f32(const bf16* from, float* to, i64 n) {
  for (i64 index = thread_number(); index < n; index += n_threads()) to[index] = to_float(from[index]);
}

extern "C" __global__ void to_bf16_copy(const float* from, bf16* to, i64 n) {
  for (i64 index = thread_number(); index < n; index += n_threads()) to[index] = to_bf16(from[index]);
}

// One step of Keras' Adam on all parameters at once: ../operators/optimiser.rs. `copy` is null or what the matrix units read. n is a multiple of 4.
extern "C" __global__ void __launch_bounds__(256) adam(float4* weight, float4* first, float4* second, const float4* gradient, ushort4* copy, i64 n, float rate) {
  for (i64 index = thread_number(); index < n / 4; index += n_threads()) {
    float4 w = weight[index], m = first[index], v = second[index], g = gradient[index];
    auto update = [rate](float& w, float& m, float& v, float g) {
      m += ADAM_FORGET_1 * (g - m);
      v += ADAM_FORGET_2 * (g * g - v);
      w -= rate * m / (sqrtf(v) + ADAM_EPSILON);
    };
    update(w.x, m.x, v.x, g.x);
    update(w.y, m.y, v.y, g.y);
    update(w.z, m.z, v.z, g.z);
    update(w.w, m.w, v.w, g.w);
    weight[index] = w;
    first[index] = m;
    second[index] = v;
    if (copy) copy[index] = make_ushort4(to_bf16(w.x).bits, to_bf16(w.y).bits, to_bf16(w.z).bits, to_bf16(w.w).bits);
  }
}

// One step of SGD, likewise.
extern "C" __global__ void __launch_bounds__(256) sgd(float4* weight, const float4* gradient, ushort4* copy, i64 n, float rate) {
  for (i64 index = thread_number(); index < n / 4; index += n_threads()) {
    float4 w = weight[index], g = gradient[index];
    w.x -= rate * g.x;
    w.y -= rate * g.y;
    w.z -= rate * g.z;
    w.w -= rate * g.w;
    weight[index] = w;
    if (copy) copy[index] = make_ushort4(to_bf16(w.x).bits, to_bf16(w.y).bits, to_bf16(w.z).bits, to_bf16(w.w).bits);
  }
}
