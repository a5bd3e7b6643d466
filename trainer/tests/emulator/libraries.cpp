// libcublas, libcudnn (its backend interface) and libnccl for the tests, as far as the trainer calls them: plain loops over the CPU's memory, by
// the shapes, strides and types that the caller states. What the manuals forbid is refused.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

extern "C" void emulator_enqueue(void* stream, std::function<void()>* work);

namespace {

void enqueue(void* stream, std::function<void()> work) { emulator_enqueue(stream, new std::function<void()>(std::move(work))); }

enum Type { F32, BF16 };

float load(Type type, const void* memory, int64_t index) {
  if (type == F32) return static_cast<const float*>(memory)[index];
  uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(memory)[index]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void store(Type type, void* memory, int64_t index, double value) {
  float rounded = static_cast<float>(value);
  if (type == F32) {
    static_cast<float*>(memory)[index] = rounded;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  static_cast<uint16_t*>(memory)[index] = rounded != rounded ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// ---- cuBLAS ----

struct Blas {
  void* stream = nullptr;
};

bool blas_type(int code, Type& type) {
  type = code == 14 ? BF16 : F32;
  return code == 14 || code == 0;
}

}  // namespace

extern "C" {
int cublasCreate_v2(void** handle) { *handle = new Blas; return 0; }
int cublasDestroy_v2(void* handle) { delete static_cast<Blas*>(handle); return 0; }
// No other mode but that without sums of fewer bits.
int cublasSetMathMode(void*, int mode) { return mode == 16 ? 0 : 7; }
int cublasSetStream_v2(void* handle, void* stream) { static_cast<Blas*>(handle)->stream = stream; return 0; }
// c[m, n] = alpha op(a)[m, k] op(b)[k, n] + beta c, columns one after the other.
int cublasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, const void* b, int type_b, int ldb,
                 const void* beta, void* c, int type_c, int ldc, int compute, int) {
  Type ta, tb, tc;
  if (!blas_type(type_a, ta) || !blas_type(type_b, tb) || !blas_type(type_c, tc) || ta != tb || (ta == F32 && tc != F32) || compute != 68) return 15;
  if (m < 0 || n < 0 || k < 0 || lda < std::max(1, op_a ? k : m) || ldb < std::max(1, op_b ? n : k) || ldc < std::max(1, m) || op_a > 1 || op_b > 1) return 7;
  float scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  enqueue(static_cast<Blas*>(handle)->stream, [=] {
    std::vector<float> left(static_cast<size_t>(m) * k), right(static_cast<size_t>(k) * n);
    for (int64_t i = 0; i < m; i++)
      for (int64_t l = 0; l < k; l++) left[i * k + l] = load(ta, a, op_a ? l + i * lda : i + l * lda);
    for (int64_t j = 0; j < n; j++)
      for (int64_t l = 0; l < k; l++) right[j * k + l] = load(tb, b, op_b ? j + l * ldb : l + j * ldb);
    for (int64_t j = 0; j < n; j++)
      for (int64_t i = 0; i < m; i++) {
        // In f32 as a card does, and in the order that loses most.
        float sum = 0;
        for (int64_t l = 0; l < k; l++) sum += left[i * k + l] * right[j * k + l];
        store(tc, c, i + j * ldc, scale * sum + (keep == 0 ? 0 : keep * load(tc, c, i + j * ldc)));
      }
  });
  return 0;
}
}

// ---- cuDNN ----

namespace {

enum { SUCCESS = 0, BAD_PARAM = 2000, NOT_SUPPORTED = 3000 };
enum Kind { CONVOLUTION = 1, CONFIGURATION = 3, HEURISTIC = 4, PLAN = 5, FORWARD = 10, BACKWARD_FILTER = 11, BACKWARD_DATA = 12, GRAPH = 15, PACK = 16, TENSOR = 17, ENGINE = 2 };
enum { TYPE_HANDLE = 0, TYPE_DATA_TYPE = 1, TYPE_INT64 = 3, TYPE_FLOAT = 4, TYPE_VOID = 6, TYPE_MODE = 7, TYPE_HEURISTIC = 8, TYPE_NOTE = 11, TYPE_DESCRIPTOR = 15 };

struct Dnn {
  void* stream = nullptr;
};

struct Descriptor {
  int kind;
  bool is_final = false;
  std::map<int, std::vector<unsigned char>> attribute;

  template <class T> std::vector<T> get(int name) const {
    auto found = attribute.find(name);
    if (found == attribute.end()) return {};
    std::vector<T> values(found->second.size() / sizeof(T));
    std::memcpy(values.data(), found->second.data(), found->second.size());
    return values;
  }
  template <class T> T one(int name) const {
    auto values = get<T>(name);
    return values.empty() ? T() : values[0];
  }
  const Descriptor& child(int name) const { return *one<Descriptor*>(name); }
};

int size_of(int type) {
  switch (type) {
    case TYPE_HANDLE: case TYPE_INT64: case TYPE_VOID: case TYPE_DESCRIPTOR: return 8;
    case TYPE_DATA_TYPE: case TYPE_FLOAT: case TYPE_MODE: case TYPE_HEURISTIC: return 4;
    default: return 0;
  }
}

// The type that an attribute must be given with; those of convolutions by their place.
int type_of(int name) {
  switch (name) {
    case 100: case 901: return TYPE_DATA_TYPE;
    case 101: return TYPE_MODE;
    case 102: case 103: case 104: case 105: case 106: case 900: case 902: case 903: case 906: case 1000: return TYPE_INT64;
    case 200: return TYPE_HEURISTIC;
    case 201: case 401: case 801: return TYPE_DESCRIPTOR;
    case 400: case 800: return TYPE_HANDLE;
    case 700: case 701: case 706: case 707: case 712: case 713: return TYPE_FLOAT;
    case 702: case 703: case 704: case 705: case 708: case 709: case 710: case 711: case 714: case 715: case 716: case 717: return TYPE_DESCRIPTOR;
    case 1001: case 1003: return TYPE_VOID;
    default: return -1;
  }
}

struct Tensor {
  Type type;
  int64_t id;
  std::vector<int64_t> size, stride;
  explicit Tensor(const Descriptor& from)
      : type(from.one<int>(901) == 9 ? BF16 : F32), id(from.one<int64_t>(906)), size(from.get<int64_t>(902)), stride(from.get<int64_t>(903)) {}
};

struct Operation {
  int kind;
  Tensor x, w, y;
  std::vector<int64_t> before, after, step, dilation;
  explicit Operation(const Descriptor& from)
      : kind(from.kind),
        x(from.child(kind == FORWARD ? 704 : kind == BACKWARD_DATA ? 710 : 716)),
        w(from.child(kind == FORWARD ? 703 : kind == BACKWARD_DATA ? 709 : 715)),
        y(from.child(kind == FORWARD ? 705 : kind == BACKWARD_DATA ? 711 : 717)) {
    const Descriptor& convolution = from.child(kind == FORWARD ? 702 : kind == BACKWARD_DATA ? 708 : 714);
    before = convolution.get<int64_t>(105);
    after = convolution.get<int64_t>(104);
    step = convolution.get<int64_t>(103);
    dilation = convolution.get<int64_t>(102);
  }

  bool is_sound() const {
    if (x.size.size() != 4 || w.size.size() != 4 || y.size.size() != 4 || x.size[0] != y.size[0] || w.size[0] != y.size[1] || w.size[1] != x.size[1]) return false;
    for (int d = 0; d < 2; d++) {
      if (y.size[2 + d] != (x.size[2 + d] + before[d] + after[d] - dilation[d] * (w.size[2 + d] - 1) - 1) / step[d] + 1) return false;
    }
    return x.type == w.type && x.type == y.type;
  }

  // Calls f(x index, w index, y index) of the first channels, for every image, place of y and tap that lies inside.
  template <class F> void each(F f) const {
    for (int64_t n = 0; n < y.size[0]; n++)
      for (int64_t p = 0; p < y.size[2]; p++)
        for (int64_t q = 0; q < y.size[3]; q++)
          for (int64_t r = 0; r < w.size[2]; r++)
            for (int64_t s = 0; s < w.size[3]; s++) {
              int64_t row = p * step[0] - before[0] + r * dilation[0], column = q * step[1] - before[1] + s * dilation[1];
              if (row < 0 || column < 0 || row >= x.size[2] || column >= x.size[3]) continue;
              f(n * x.stride[0] + row * x.stride[2] + column * x.stride[3], r * w.stride[2] + s * w.stride[3],
                n * y.stride[0] + p * y.stride[2] + q * y.stride[3]);
            }
  }

  void run(const std::map<int64_t, void*>& memory) const {
    void *px = memory.at(x.id), *pw = memory.at(w.id), *py = memory.at(y.id);
    auto extent = [](const Tensor& tensor) {
      int64_t last = 1;
      for (int d = 0; d < 4; d++) last += (tensor.size[d] - 1) * tensor.stride[d];
      return last;
    };
    auto floats = [&](const Tensor& tensor, void* from, bool is_output) {
      std::vector<float> values(extent(tensor));
      for (size_t i = 0; i < values.size(); i++) values[i] = is_output ? 0.0f : load(tensor.type, from, i);
      return values;
    };
    auto vx = floats(x, px, kind == BACKWARD_DATA), vw = floats(w, pw, kind == BACKWARD_FILTER), vy = floats(y, py, kind == FORWARD);
    int64_t channels = x.size[1], outputs = y.size[1];
    each([&](int64_t ix, int64_t iw, int64_t iy) {
      for (int64_t o = 0; o < outputs; o++) {
        float* py = &vy[iy + o * y.stride[1]];
        float* pw = &vw[iw + o * w.stride[0]];
        if (kind != FORWARD && *py == 0) continue;
        float* px = &vx[ix];
        int64_t sx = x.stride[1], sw = w.stride[1];
        if (kind == FORWARD) {
          float sum = 0;
          for (int64_t c = 0; c < channels; c++) sum += px[c * sx] * pw[c * sw];
          *py += sum;
        } else if (kind == BACKWARD_DATA) {
          for (int64_t c = 0; c < channels; c++) px[c * sx] += *py * pw[c * sw];
        } else {
          for (int64_t c = 0; c < channels; c++) pw[c * sw] += *py * px[c * sx];
        }
      }
    });
    const Tensor& out = kind == FORWARD ? y : kind == BACKWARD_DATA ? x : w;
    const auto& values = kind == FORWARD ? vy : kind == BACKWARD_DATA ? vx : vw;
    void* to = memory.at(out.id);
    for (size_t i = 0; i < values.size(); i++) store(out.type, to, i, values[i]);
  }
};

int64_t workspace_of(const Operation& operation) { return operation.kind == BACKWARD_FILTER ? 256 * operation.w.size[0] : 0; }

}  // namespace

extern "C" {
int cudnnCreate(void** handle) { *handle = new Dnn; return SUCCESS; }
int cudnnDestroy(void* handle) { delete static_cast<Dnn*>(handle); return SUCCESS; }
int cudnnSetStream(void* handle, void* stream) { static_cast<Dnn*>(handle)->stream = stream; return SUCCESS; }
size_t cudnnGetVersion() { return 0; }

int cudnnBackendCreateDescriptor(int kind, void** descriptor) {
  auto* made = new Descriptor;
  made->kind = kind;
  *descriptor = made;
  return SUCCESS;
}
int cudnnBackendDestroyDescriptor(void* descriptor) { delete static_cast<Descriptor*>(descriptor); return SUCCESS; }
int cudnnBackendSetAttribute(void* handle, int name, int type, int64_t count, const void* values) {
  auto& descriptor = *static_cast<Descriptor*>(handle);
  if (descriptor.is_final || type != type_of(name) || count < 1 || !values) {
    std::fprintf(stderr, "emulator: attribute %d of descriptor %d refused\n", name, descriptor.kind);
    return BAD_PARAM;
  }
  if (type == TYPE_DESCRIPTOR && !static_cast<Descriptor* const*>(values)[0]->is_final) return BAD_PARAM;
  auto bytes = static_cast<const unsigned char*>(values);
  descriptor.attribute[name].assign(bytes, bytes + count * size_of(type));
  return SUCCESS;
}
int cudnnBackendFinalize(void* handle) {
  auto& descriptor = *static_cast<Descriptor*>(handle);
  if (descriptor.is_final) return BAD_PARAM;
  auto needs = [&](std::initializer_list<int> names) {
    return std::all_of(names.begin(), names.end(), [&](int name) { return descriptor.attribute.count(name) == 1; });
  };
  bool is_sound = true;
  switch (descriptor.kind) {
    case TENSOR: is_sound = needs({900, 901, 902, 903, 906}); break;
    case CONVOLUTION: is_sound = needs({100, 101, 102, 103, 104, 105, 106}) && descriptor.one<int>(100) == 0 && descriptor.one<int>(101) == 1; break;
    case FORWARD: is_sound = needs({700, 701, 702, 703, 704, 705}) && Operation(descriptor).is_sound(); break;
    case BACKWARD_DATA: is_sound = needs({706, 707, 708, 709, 710, 711}) && Operation(descriptor).is_sound(); break;
    case BACKWARD_FILTER: is_sound = needs({712, 713, 714, 715, 716, 717}) && Operation(descriptor).is_sound(); break;
    case GRAPH: is_sound = needs({800, 801}); break;
    case HEURISTIC: is_sound = needs({200, 201}); break;
    case PLAN:
      if (!needs({400, 401})) return BAD_PARAM;
      // As heuristics do, the first proposal of a data gradient turns out not to be supported.
      if (descriptor.child(401).one<int64_t>(-2) == 0 && descriptor.child(401).child(-1).child(801).kind == BACKWARD_DATA) return NOT_SUPPORTED;
      break;
    case PACK: is_sound = needs({1000, 1001, 1003}); break;
    default: return NOT_SUPPORTED;
  }
  descriptor.is_final = is_sound;
  return is_sound ? SUCCESS : BAD_PARAM;
}
int cudnnBackendGetAttribute(void* handle, int name, int type, int64_t requested, int64_t* count, void* values) {
  auto& descriptor = *static_cast<Descriptor*>(handle);
  if (!descriptor.is_final) return BAD_PARAM;
  if (descriptor.kind == HEURISTIC && name == 202 && type == TYPE_DESCRIPTOR) {
    *count = 3;
    for (int64_t i = 0; values && i < std::min<int64_t>(requested, *count); i++) {
      auto* to = static_cast<Descriptor**>(values)[i];
      if (to->kind != CONFIGURATION) return BAD_PARAM;
      Descriptor* graph = descriptor.one<Descriptor*>(201);
      auto bytes = reinterpret_cast<unsigned char*>(&graph);
      to->attribute[-1].assign(bytes, bytes + 8);
      bytes = reinterpret_cast<unsigned char*>(&i);
      to->attribute[-2].assign(bytes, bytes + 8);
      to->is_final = true;
    }
    return SUCCESS;
  }
  if (descriptor.kind == CONFIGURATION && name == 300 && type == TYPE_DESCRIPTOR && requested == 1) {
    auto* to = static_cast<Descriptor**>(values)[0];
    if (to->kind != ENGINE) return BAD_PARAM;
    to->attribute[-2] = descriptor.attribute[-2];
    to->is_final = true;
    *count = 1;
    return SUCCESS;
  }
  if (descriptor.kind == ENGINE && name == 1303 && type == TYPE_NOTE) {
    // The last proposal rounds its inputs.
    *count = descriptor.one<int64_t>(-2) == 2;
    if (*count) static_cast<int*>(values)[0] = 1;
    return SUCCESS;
  }
  if (descriptor.kind == PLAN && name == 402 && type == TYPE_INT64 && requested == 1) {
    *static_cast<int64_t*>(values) = workspace_of(Operation(descriptor.child(401).child(-1).child(801)));
    *count = 1;
    return SUCCESS;
  }
  return BAD_PARAM;
}
int cudnnBackendExecute(void* handle, void* plan, void* pack_handle) {
  auto& descriptor = *static_cast<Descriptor*>(plan);
  auto& pack = *static_cast<Descriptor*>(pack_handle);
  if (!descriptor.is_final || !pack.is_final || descriptor.kind != PLAN || pack.kind != PACK || descriptor.one<void*>(400) != handle) return BAD_PARAM;
  auto ids = pack.get<int64_t>(1000);
  auto pointers = pack.get<void*>(1001);
  if (ids.size() != pointers.size()) return BAD_PARAM;
  std::map<int64_t, void*> memory;
  for (size_t i = 0; i < ids.size(); i++) memory[ids[i]] = pointers[i];
  Operation operation(descriptor.child(401).child(-1).child(801));
  for (const Tensor* tensor : {&operation.x, &operation.w, &operation.y}) {
    if (!memory.count(tensor->id) || reinterpret_cast<uintptr_t>(memory[tensor->id]) % 16) return BAD_PARAM;
  }
  void* workspace = pack.one<void*>(1003);
  int64_t bytes = workspace_of(operation);
  if (bytes && !workspace) return BAD_PARAM;
  enqueue(static_cast<Dnn*>(handle)->stream, [=] {
    if (bytes) std::memset(workspace, 0xFF, bytes);
    operation.run(memory);
  });
  return SUCCESS;
}
}

// ---- NCCL, one rank ----

extern "C" {
struct ncclUniqueId { char internal[128]; };
int ncclGetUniqueId(ncclUniqueId* id) { std::memset(id->internal, 7, sizeof id->internal); return 0; }
int ncclCommInitRank(void** communicator, int n, ncclUniqueId id, int rank) {
  if (n != 1 || rank != 0 || id.internal[127] != 7) return 4;
  *communicator = new char;
  return 0;
}
int ncclCommDestroy(void* communicator) { delete static_cast<char*>(communicator); return 0; }
int ncclCommAbort(void* communicator) { delete static_cast<char*>(communicator); return 0; }
int ncclCommGetAsyncError(void*, int* error) { *error = 0; return 0; }
const char* ncclGetErrorString(int) { return "refused by the emulator"; }
int ncclAllReduce(const void* from, void* to, size_t n, int type, int operation, void*, void* stream) {
  if (type != 7 || operation != 0) return 4;
  enqueue(stream, [=] { std::memmove(to, from, 4 * n); });
  return 0;
}
}
