// CUDA's device language, as far as src/gpu/kernels.cu speaks it, for a C++ compiler: one fiber a thread, one block after the other.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define DYNAMIC_SHARED(name) unsigned char* name = emulator::dynamic_shared()
#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

struct uint3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) { return {x, y, z, w}; }
using std::max;
using std::min;

inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }

struct bf16 { unsigned short bits; };
// To nearest, ties to even; NaN stays NaN (cvt.rn.bf16.f32).
inline bf16 to_bf16(float value) {
  unsigned bits = __float_as_uint(value);
  if (value != value) return {0x7FFF};
  return {static_cast<unsigned short>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

inline unsigned permute(unsigned word, unsigned selector) {
  unsigned permuted = 0;
  for (int i = 0; i < 4; i++) {
    unsigned nibble = selector >> (4 * i) & 0xF;
    unsigned byte = (nibble & 7) < 4 ? word >> (8 * (nibble & 7)) & 0xFF : 0;
    if (nibble & 8) byte = byte & 0x80 ? 0xFF : 0;
    permuted |= byte << (8 * i);
  }
  return permuted;
}

namespace emulator {
uint3 thread_index();
uint3 block_index();
uint3 block_size();
uint3 grid_size();
unsigned char* dynamic_shared();
// Barrier of the block.
void synchronize_block();
// Gives `bytes` of this lane to the warp; returns those of all 32 lanes, once every lane has come.
const unsigned char* exchange(const void* own, int bytes);
}  // namespace emulator

inline void __syncthreads() { emulator::synchronize_block(); }

inline float emulated_bf16(unsigned word, int half) { return __uint_as_float(half ? word & 0xFFFF0000u : word << 16); }

inline void multiply(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  unsigned own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned* all = reinterpret_cast<const unsigned*>(emulator::exchange(own, sizeof own));
  int lane = emulator::thread_index().x % 32;
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    double product = 0;
    for (int k = 0; k < 16; k++) {
      const unsigned* left = all + 6 * (4 * (row % 8) + k % 8 / 2);
      const unsigned* right = all + 6 * (4 * column + k % 8 / 2);
      product += static_cast<double>(emulated_bf16(left[row / 8 + 2 * (k / 8)], k % 2)) * emulated_bf16(right[4 + k / 8], k % 2);
    }
    sum[i] = static_cast<float>(sum[i] + product);
  }
}

inline void load_matrices(unsigned (&to)[4], const void* row) {
  uint16_t own[8];
  std::memcpy(own, __builtin_assume_aligned(row, 16), sizeof own);
  const uint16_t* all = reinterpret_cast<const uint16_t*>(emulator::exchange(own, sizeof own));
  int lane = emulator::thread_index().x % 32;
  for (int m = 0; m < 4; m++) {
    const uint16_t* from = all + 8 * (8 * m + lane / 4) + 2 * (lane % 4);
    to[m] = from[0] | static_cast<unsigned>(from[1]) << 16;
  }
}

inline void load_matrices_transposed(unsigned (&to)[4], const void* row) {
  uint16_t own[8];
  std::memcpy(own, __builtin_assume_aligned(row, 16), sizeof own);
  const uint16_t* all = reinterpret_cast<const uint16_t*>(emulator::exchange(own, sizeof own));
  int lane = emulator::thread_index().x % 32;
  for (int m = 0; m < 4; m++) {
    const uint16_t* from = all + 8 * (8 * m + 2 * (lane % 4)) + lane / 4;
    to[m] = from[0] | static_cast<unsigned>(from[8]) << 16;
  }
}
