// The host's part of FP8 products: one call launches a cast, a transpose, a product or a backward.
//
// Kernels are Triton's and products cuBLASLt's. Python compiles and plans them, once for every kind of call,
// and hands over what is needed to launch them. A call of an unknown kind, or with tensors in a layout that
// kernels do not expect, returns an empty list, and Python makes it. CUDA functions are passed as addresses,
// so no CUDA header is needed.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = at::IntArrayRef;

constexpr int64_t TILE = 128, TOKENS = 16, GROUP = 4;  // as in ops/products.py
constexpr int64_t BEST_ALIGNMENT = 256, ALIGNMENT = 16;
constexpr int BIAS_POINTER = 8, A_SCALE_POINTER = 17, B_SCALE_POINTER = 18;
constexpr int64_t TURNED_ROWS = 1, TURNED_TILES = 2;

using LaunchKernel = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                             void*, void**, void**);
using GetContext = int (*)(void**);
using SetAttribute = int (*)(void*, int, const void*, size_t);
using Matmul = int (*)(void*, void*, const void*, const void*, void*, const void*, void*, const void*,
                       const void*, void*, void*, void*, const void*, void*, size_t, void*);

struct Kernel {
    void* function;
    unsigned threads, shared;
};

struct Plan {
    void *handle, *matmul, *right, *left, *product;
    std::array<int64_t, 8> algorithm;
    int64_t workspace;
    std::mutex mutex;  // the descriptor holds the addresses of scales
};

using Shape = std::array<int64_t, 7>;  // device, rows, columns, inner, right in tiles, with bias, alignment

LaunchKernel launch_kernel;
GetContext get_context;
SetAttribute set_attribute;
Matmul matmul;
std::map<std::pair<int64_t, int64_t>, Kernel> kernels;  // by device and kind
std::map<Shape, std::unique_ptr<Plan>> plans;
std::mutex known;  // guards `kernels` and `plans`

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t tiles(int64_t length) { return ceil_div(length, TILE); }
int64_t padded_tiles(int64_t length) { return ceil_div(tiles(length), GROUP) * GROUP; }
int64_t address(const Tensor& tensor) { return reinterpret_cast<int64_t>(tensor.data_ptr()); }
void* pointer(int64_t address) { return reinterpret_cast<void*>(address); }

void check(int64_t status, const char* what) { TORCH_CHECK(status == 0, what, ": status ", status); }

void start(Integers functions) {
    launch_kernel = reinterpret_cast<LaunchKernel>(functions[0]);
    get_context = reinterpret_cast<GetContext>(functions[1]);
    set_attribute = reinterpret_cast<SetAttribute>(functions[2]);
    matmul = reinterpret_cast<Matmul>(functions[3]);
}

void add_kernel(int64_t device, int64_t kind, int64_t function, int64_t threads, int64_t shared) {
    std::lock_guard<std::mutex> guard(known);
    kernels[{device, kind}] = {pointer(function), unsigned(threads), unsigned(shared)};
}

void add_plan(Integers shape, Integers handles, Integers algorithm, int64_t workspace) {
    auto plan = std::make_unique<Plan>();
    plan->handle = pointer(handles[0]);
    plan->matmul = pointer(handles[1]);
    plan->right = pointer(handles[2]);
    plan->left = pointer(handles[3]);
    plan->product = pointer(handles[4]);
    std::copy(algorithm.begin(), algorithm.end(), plan->algorithm.begin());
    plan->workspace = workspace;
    Shape key;
    std::copy(shape.begin(), shape.end(), key.begin());
    std::lock_guard<std::mutex> guard(known);
    plans.emplace(key, std::move(plan));
}

// None in a thread that has not used CUDA before: Triton's own launch gives it a context.
const Kernel* find_kernel(int64_t device, int64_t kind) {
    void* context = nullptr;
    if (get_context(&context) || !context) return nullptr;
    std::lock_guard<std::mutex> guard(known);
    const auto found = kernels.find({device, kind});
    return found == kernels.end() ? nullptr : &found->second;
}

void run(const Kernel& kernel, int64_t programs, void** arguments, int64_t stream) {
    check(launch_kernel(kernel.function, unsigned(programs), 1, 1, kernel.threads, 1, 1, kernel.shared,
                        pointer(stream), arguments, nullptr),
          "cuLaunchKernel");
}

int64_t cast_kind(bool rows, int64_t turned, bool sums, int64_t groups) {
    return int64_t(rows) | turned << 1 | int64_t(sums) << 3 | int64_t(groups % 16 == 0) << 4;
}

// Scales of rows, as cuBLAS reads them.
Tensor scales_of_rows(int64_t rows, int64_t inner, const at::TensorOptions& floats) {
    return at::empty_strided({rows, tiles(inner)}, {1, rows}, floats);
}

// Returns those wanted of: codes and scales in rows, codes and scales transposed, sums over tokens.
Tensors cast(const Tensor& values, bool rows, int64_t turned, bool sums, int64_t stream) {
    if (values.dim() != 2 || values.scalar_type() != at::kBFloat16) return {};
    int64_t source = address(values);
    int32_t tokens = int32_t(values.size(0)), features = int32_t(values.size(1)),
            stride = int32_t(values.stride(0));
    const bool small =
        values.size(0) < INT32_MAX - TOKENS && values.size(1) < INT32_MAX && values.stride(0) < INT32_MAX;
    if (!tokens || !small || values.stride(1) != 1 || (source | features | stride) % TOKENS) return {};
    int32_t padded = int32_t(ceil_div(tokens, TOKENS) * TOKENS), groups = int32_t(padded_tiles(padded));
    const auto device = values.device();
    const Kernel* kernel = find_kernel(device.index(), cast_kind(rows, turned, sums, groups));
    if (!kernel) return {};
    const c10::DeviceGuard guard(device);
    const auto codes_of = values.options().dtype(at::kFloat8_e4m3fn),
               floats = values.options().dtype(at::kFloat);
    Tensors found;
    std::array<int64_t, 5> out;
    out.fill(source);  // a pointer needs an address
    if (rows) {
        found.push_back(at::empty({padded, features}, codes_of));
        out[0] = address(found.back());
        found.push_back(scales_of_rows(padded, features, floats));
        out[1] = address(found.back());
    }
    if (turned) {
        found.push_back(at::empty({features, padded}, codes_of));
        out[2] = address(found.back());
        found.push_back(turned == TURNED_TILES ? at::empty({tiles(features), groups}, floats)
                                               : scales_of_rows(features, padded, floats));
        out[3] = address(found.back());
    }
    Tensor parts;
    if (sums) {
        parts = at::empty({tiles(padded), features}, floats);
        out[4] = address(parts);
    }
    int64_t scratch = 0, profile = 0;  // last arguments of Triton's kernels
    void* arguments[] = {&source, &out[0],   &out[1], &out[2], &out[3],  &out[4], &tokens,
                         &padded, &features, &stride, &groups, &scratch, &profile};
    run(*kernel, tiles(padded) * tiles(features), arguments, stream);
    if (sums) found.push_back(at::sum(parts, 0));
    return found;
}

// Negative; a kind of cast is not. exponents: their address, at any alignment.
int64_t transpose_kind(int64_t exponents, int64_t groups) {
    return -1 - int64_t(exponents % ALIGNMENT == 0) - 2 * int64_t(groups % ALIGNMENT == 0);
}

const Kernel* find_transpose(const Tensor& codes, const Tensor& exponents) {
    if (codes.dim() != 2 || codes.element_size() != 1 || !codes.is_contiguous()) return nullptr;
    if (exponents.dim() != 2 || exponents.scalar_type() != at::kByte || !exponents.is_contiguous())
        return nullptr;
    const int64_t rows = codes.size(0), columns = codes.size(1);
    if (exponents.size(0) != tiles(rows) || exponents.size(1) != tiles(columns)) return nullptr;
    if (exponents.device() != codes.device()) return nullptr;
    if (!codes.numel() || rows >= INT32_MAX || columns >= INT32_MAX) return nullptr;
    if ((address(codes) | rows | columns) % ALIGNMENT) return nullptr;
    return find_kernel(codes.device().index(), transpose_kind(address(exponents), padded_tiles(rows)));
}

Tensors launch_transpose(const Kernel& kernel, const Tensor& codes, const Tensor& exponents, int64_t stream) {
    int64_t source = address(codes), bytes = address(exponents);
    int32_t rows = int32_t(codes.size(0)), columns = int32_t(codes.size(1)),
            groups = int32_t(padded_tiles(rows));
    const c10::DeviceGuard guard(codes.device());
    const Tensor turned = at::empty({columns, rows}, codes.options());
    const Tensor scales = at::empty({tiles(columns), groups}, codes.options().dtype(at::kFloat));
    int64_t target = address(turned), floats = address(scales), scratch = 0, profile = 0;
    void* arguments[] = {&source, &bytes, &target, &floats, &rows, &columns, &groups, &scratch, &profile};
    run(kernel, tiles(rows) * tiles(columns), arguments, stream);
    return {turned, scales};
}

// Returns a weight's codes and scales, both transposed.
Tensors transpose(const Tensor& codes, const Tensor& exponents, int64_t stream) {
    const Kernel* kernel = find_transpose(codes, exponents);
    return kernel ? launch_transpose(*kernel, codes, exponents, stream) : Tensors();
}

bool is_codes(const Tensor& codes) {
    return codes.dim() == 2 && codes.scalar_type() == at::kFloat8_e4m3fn && codes.is_contiguous();
}

bool has_scales(const Tensor& scales, int64_t rows, int64_t columns, int64_t down, int64_t across) {
    return scales.dim() == 2 && scales.scalar_type() == at::kFloat && scales.size(0) == rows &&
           scales.size(1) == columns && scales.stride(0) == down && scales.stride(1) == across;
}

// Returns left right^T + bias.
Tensors multiply(const Tensor& left, const Tensor& left_scales, const Tensor& right,
                 const Tensor& right_scales, const std::optional<Tensor>& bias, int64_t stream) {
    if (!is_codes(left) || !is_codes(right) || !left.numel() || left.size(1) != right.size(1)) return {};
    const int64_t rows = left.size(0), columns = right.size(0), inner = left.size(1),
                  across = padded_tiles(inner);
    const bool in_tiles = right_scales.dim() == 2 && right_scales.size(0) != columns;
    const bool fit = has_scales(left_scales, rows, tiles(inner), 1, rows) &&
                     (in_tiles ? has_scales(right_scales, tiles(columns), across, across, 1)
                               : has_scales(right_scales, columns, tiles(inner), 1, columns));
    if (!fit) return {};
    int64_t together = address(left) | address(left_scales) | address(right) | address(right_scales);
    const auto device = left.device();
    if (right.device() != device || left_scales.device() != device || right_scales.device() != device)
        return {};
    if (bias) {
        if (bias->dim() != 1 || bias->size(0) != columns || bias->scalar_type() != at::kBFloat16) return {};
        if (bias->device() != device || !bias->is_contiguous() || address(*bias) % ALIGNMENT) return {};
    }
    const int64_t alignment = together % BEST_ALIGNMENT ? together & -together : BEST_ALIGNMENT;
    Plan* plan;
    {
        std::lock_guard<std::mutex> guard(known);
        const auto found =
            plans.find({device.index(), rows, columns, inner, in_tiles, bias.has_value(), alignment});
        if (found == plans.end()) return {};
        plan = found->second.get();
    }
    const c10::DeviceGuard guard(device);
    const Tensor product = at::empty({rows, columns}, left.options().dtype(at::kBFloat16));
    Tensor workspace;
    if (plan->workspace) workspace = at::empty({plan->workspace}, left.options().dtype(at::kByte));
    const float one = 1, zero = 0;
    const int64_t a_scales = address(right_scales), b_scales = address(left_scales);
    const int64_t added = bias ? address(*bias) : 0;
    void* const out = product.data_ptr();
    std::lock_guard<std::mutex> lock(plan->mutex);
    check(set_attribute(plan->matmul, A_SCALE_POINTER, &a_scales, sizeof(a_scales)), "A_SCALE_POINTER");
    check(set_attribute(plan->matmul, B_SCALE_POINTER, &b_scales, sizeof(b_scales)), "B_SCALE_POINTER");
    if (bias) check(set_attribute(plan->matmul, BIAS_POINTER, &added, sizeof(added)), "BIAS_POINTER");
    check(matmul(plan->handle, plan->matmul, &one, right.data_ptr(), plan->right, left.data_ptr(), plan->left,
                 &zero, out, plan->product, out, plan->product, plan->algorithm.data(),
                 plan->workspace ? workspace.data_ptr() : nullptr, size_t(plan->workspace), pointer(stream)),
          "cublasLtMatmul");
    return {product};
}

// Returns the wanted gradients of a product: of its input, cut to dy's tokens, of its weight and of its bias.
// weight_tiles: the weight's exponents; its scales if it is swapped, that is stored as [K, N].
Tensors differentiate(const Tensor& dy, const Tensor& codes, const Tensor& weight_tiles,
                      const std::optional<Tensor>& x, const std::optional<Tensor>& x_scales, bool input,
                      bool weight, bool bias, bool swapped, int64_t stream) {
    if (codes.device() != dy.device() || (weight && !(x && x_scales))) return {};
    const bool turns = input && !swapped;
    const Kernel* const turning = turns ? find_transpose(codes, weight_tiles) : nullptr;
    if (turns && !turning) return {};  // before a cast is launched in vain
    const Tensors casts = cast(dy, input, weight ? TURNED_ROWS : 0, bias, stream);
    if (casts.empty()) return {};
    Tensors found;
    if (input) {
        const Tensors right =
            turns ? launch_transpose(*turning, codes, weight_tiles, stream) : Tensors{codes, weight_tiles};
        const Tensors dx = multiply(casts[0], casts[1], right[0], right[1], std::nullopt, stream);
        if (dx.empty()) return {};
        const bool padded = dx[0].size(0) != dy.size(0);
        found.push_back(padded ? dx[0].narrow(0, 0, dy.size(0)) : dx[0]);
    }
    if (weight) {
        const Tensor* const turned = &casts[input ? 2 : 0];
        const Tensors dw = multiply(turned[0], turned[1], *x, *x_scales, std::nullopt, stream);
        if (dw.empty()) return {};
        found.push_back(swapped ? dw[0].t().contiguous() : dw[0]);
    }
    if (bias) found.push_back(casts.back().to(at::kBFloat16));
    return found;
}

}  // namespace

TORCH_LIBRARY(ds_fp8_launches, library) {
    library.def("start(int[] functions) -> ()", start);
    library.def("add_kernel(int device, int kind, int function, int threads, int shared) -> ()", add_kernel);
    library.def("add_plan(int[] shape, int[] handles, int[] algorithm, int workspace) -> ()", add_plan);
    library.def("cast_kind(bool rows, int turned, bool sums, int groups) -> int", cast_kind);
    library.def("cast(Tensor values, bool rows, int turned, bool sums, int stream) -> Tensor[]", cast);
    library.def("transpose_kind(int exponents, int groups) -> int", transpose_kind);
    library.def("transpose(Tensor codes, Tensor exponents, int stream) -> Tensor[]", transpose);
    library.def(
        "multiply(Tensor left, Tensor left_scales, Tensor right, Tensor right_scales, Tensor? bias, int "
        "stream) "
        "-> Tensor[]",
        multiply);
    library.def(
        "differentiate(Tensor dy, Tensor codes, Tensor weight_tiles, Tensor? x, Tensor? x_scales, "
        "bool input, bool weight, bool bias, bool swapped, int stream) -> Tensor[]",
        differentiate);
}
