// The host's part of FP8 products: one call launches a cast, a transpose, a product or a backward.
//
// Kernels are Triton's and products cuBLASLt's. Python compiles and plans them, once for every kind of call,
// and hands over what is needed to launch them. A call of an unknown kind, or with tensors in a layout that
// kernels do not expect, returns an empty list, and Python makes it. CUDA functions are passed as addresses,
// so no CUDA header is needed.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = at::IntArrayRef;

constexpr int64_t TILE = 128, TOKENS = 16, GROUP = 4;  // as in ops/products.py
constexpr int64_t BEST_ALIGNMENT = 256, ALIGNMENT = 16;
constexpr int BIAS_POINTER = 8, A_SCALE_POINTER = 17, B_SCALE_POINTER = 18;
constexpr int64_t TURNED_ROWS = 1, TURNED_TILES = 2;
constexpr int64_t EXPANDED = 1024;  // scales of a program, as in ops/triton/products/weights.py
constexpr int64_t SUMMED = 64;      // sums of a program, as in ops/triton/products/casts.py

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
    const Kernel kernel{pointer(function), unsigned(threads), unsigned(shared)};
    kernels.emplace(std::make_pair(device, kind), kernel);  // one that is known may be in use
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

// What a cast reads.
struct Values {
    int64_t address;
    int32_t tokens, padded, features, stride, groups;
};

// None if a kernel does not expect them so.
std::optional<Values> read_by_casts(const Tensor& values) {
    if (values.dim() != 2 || values.scalar_type() != at::kBFloat16) return std::nullopt;
    const int64_t tokens = values.size(0), features = values.size(1), stride = values.stride(0);
    if (!tokens || tokens >= INT32_MAX - TOKENS || features >= INT32_MAX || stride >= INT32_MAX)
        return std::nullopt;
    if (values.stride(1) != 1 || (address(values) | features | stride) % TOKENS) return std::nullopt;
    const int64_t padded = ceil_div(tokens, TOKENS) * TOKENS;
    return Values{address(values),   int32_t(tokens), int32_t(padded),
                  int32_t(features), int32_t(stride), int32_t(padded_tiles(padded))};
}

// Where a cast writes; 0: nowhere.
struct Cast {
    int64_t codes = 0, scales = 0, turned = 0, turned_scales = 0, parts = 0;
};

void launch_cast(const Kernel& kernel, Values values, Cast out, int64_t stream) {
    for (int64_t* each : {&out.codes, &out.scales, &out.turned, &out.turned_scales, &out.parts})
        if (!*each) *each = values.address;  // a pointer needs an address
    int64_t scratch = 0, profile = 0;        // last arguments of Triton's kernels
    void* arguments[] = {
        &values.address, &out.codes,     &out.scales,    &out.turned,      &out.turned_scales,
        &out.parts,      &values.tokens, &values.padded, &values.features, &values.stride,
        &values.groups,  &scratch,       &profile};
    run(kernel, tiles(values.padded) * tiles(values.features), arguments, stream);
}

// Below the kinds of transposes and expansions, which are negative, too.
int64_t sum_kind() { return -7; }

// Adds parts, [count, features] float, to [features] bfloat16.
void launch_sum(const Kernel& kernel, int64_t parts, const Tensor& sums, int64_t count, int64_t stream) {
    int64_t to = address(sums), scratch = 0, profile = 0;
    int32_t rows = int32_t(count), features = int32_t(sums.numel());
    void* arguments[] = {&parts, &to, &rows, &features, &scratch, &profile};
    run(kernel, ceil_div(features, SUMMED), arguments, stream);
}

// Scales of rows, as cuBLAS reads them.
Tensor scales_of_rows(int64_t rows, int64_t inner, const at::TensorOptions& floats) {
    return at::empty_strided({rows, tiles(inner)}, {1, rows}, floats);
}

// Returns those wanted of: codes and scales in rows, codes and scales transposed, sums over tokens.
Tensors cast(const Tensor& values, bool rows, int64_t turned, bool sums, int64_t stream) {
    const auto source = read_by_casts(values);
    if (!source) return {};
    const auto [_, tokens, padded, features, stride, groups] = *source;
    const auto device = values.device();
    const Kernel* kernel = find_kernel(device.index(), cast_kind(rows, turned, sums, groups));
    const Kernel* summing = sums ? find_kernel(device.index(), sum_kind()) : nullptr;
    if (!kernel || (sums && !summing)) return {};
    const c10::DeviceGuard guard(device);
    const auto codes_of = values.options().dtype(at::kFloat8_e4m3fn),
               floats = values.options().dtype(at::kFloat);
    Tensors found;
    Cast out;
    if (rows) {
        found.push_back(at::empty({padded, features}, codes_of));
        out.codes = address(found.back());
        found.push_back(scales_of_rows(padded, features, floats));
        out.scales = address(found.back());
    }
    if (turned) {
        found.push_back(at::empty({features, padded}, codes_of));
        out.turned = address(found.back());
        found.push_back(turned == TURNED_TILES ? at::empty({tiles(features), groups}, floats)
                                               : scales_of_rows(features, padded, floats));
        out.turned_scales = address(found.back());
    }
    Tensor parts;
    if (sums) {
        parts = at::empty({tiles(padded), features}, floats);
        out.parts = address(parts);
    }
    launch_cast(*kernel, *source, out, stream);
    if (sums) {
        found.push_back(at::empty({features}, values.options()));
        launch_sum(*summing, out.parts, found.back(), tiles(padded), stream);
    }
    return found;
}

// Negative; a kind of cast is not. exponents: their address, at any alignment.
int64_t transpose_kind(int64_t exponents, int64_t groups) {
    return -1 - int64_t(exponents % ALIGNMENT == 0) - 2 * int64_t(groups % ALIGNMENT == 0);
}

// Below those of transposes.
int64_t expand_kind(int64_t exponents) { return -5 - int64_t(exponents % ALIGNMENT == 0); }

// Codes and scales, as addresses.
struct Operand {
    int64_t codes, scales;
};

// A weight that a product reads as it is stored or transposed, [rows, inner].
struct Weight {
    const Tensor &codes, &exponents;
    bool turned;
    const Kernel* kernel;  // transposes; or expands exponents, codes staying where they are

    int64_t rows() const { return codes.size(turned); }
    int64_t inner() const { return codes.size(!turned); }
    int64_t scales() const { return tiles(rows()) * padded_tiles(inner()); }
};

// None if a kernel does not expect it so.
std::optional<Weight> find_weight(const Tensor& codes, const Tensor& exponents, bool turned) {
    if (codes.dim() != 2 || codes.element_size() != 1 || !codes.is_contiguous()) return std::nullopt;
    if (exponents.dim() != 2 || exponents.scalar_type() != at::kByte || !exponents.is_contiguous())
        return std::nullopt;
    const int64_t rows = codes.size(0), columns = codes.size(1);
    if (exponents.size(0) != tiles(rows) || exponents.size(1) != tiles(columns)) return std::nullopt;
    if (exponents.device() != codes.device()) return std::nullopt;
    if (!codes.numel() || rows >= INT32_MAX || columns >= INT32_MAX) return std::nullopt;
    if ((address(codes) | rows | columns) % ALIGNMENT) return std::nullopt;
    const int64_t kind =
        turned ? transpose_kind(address(exponents), padded_tiles(rows)) : expand_kind(address(exponents));
    const Kernel* kernel = find_kernel(codes.device().index(), kind);
    if (!kernel) return std::nullopt;
    return Weight{codes, exponents, turned, kernel};
}

// Writes scales, and codes if they are transposed.
void launch_weight(const Weight& weight, Operand out, int64_t stream) {
    int64_t source = address(weight.codes), bytes = address(weight.exponents), scratch = 0, profile = 0;
    int32_t groups = int32_t(padded_tiles(weight.inner()));
    if (weight.turned) {
        int32_t rows = int32_t(weight.inner()), columns = int32_t(weight.rows());
        void* arguments[] = {&source,  &bytes,  &out.codes, &out.scales, &rows,
                             &columns, &groups, &scratch,   &profile};
        run(*weight.kernel, tiles(rows) * tiles(columns), arguments, stream);
    } else {
        int32_t rows = int32_t(tiles(weight.rows())), columns = int32_t(tiles(weight.inner()));
        void* arguments[] = {&bytes, &out.scales, &rows, &columns, &groups, &scratch, &profile};
        run(*weight.kernel, ceil_div(weight.scales(), EXPANDED), arguments, stream);
    }
}

// Returns a weight's scales.
Tensors expand(const Tensor& codes, const Tensor& exponents, int64_t stream) {
    const auto weight = find_weight(codes, exponents, false);
    if (!weight) return {};
    const c10::DeviceGuard guard(codes.device());
    const Tensor scales =
        at::empty({tiles(weight->rows()), padded_tiles(weight->inner())}, codes.options().dtype(at::kFloat));
    launch_weight(*weight, {address(codes), address(scales)}, stream);
    return {scales};
}

// Returns a weight's codes and scales, both transposed.
Tensors transpose(const Tensor& codes, const Tensor& exponents, int64_t stream) {
    const auto weight = find_weight(codes, exponents, true);
    if (!weight) return {};
    const int64_t rows = weight->rows(), inner = weight->inner();
    const c10::DeviceGuard guard(codes.device());
    const Tensor turned = at::empty({rows, inner}, codes.options());
    const Tensor scales = at::empty({tiles(rows), padded_tiles(inner)}, codes.options().dtype(at::kFloat));
    launch_weight(*weight, {address(turned), address(scales)}, stream);
    return {turned, scales};
}

bool is_codes(const Tensor& codes) {
    return codes.dim() == 2 && codes.scalar_type() == at::kFloat8_e4m3fn && codes.is_contiguous();
}

bool has_scales(const Tensor& scales, int64_t rows, int64_t columns, int64_t down, int64_t across) {
    return scales.dim() == 2 && scales.scalar_type() == at::kFloat && scales.size(0) == rows &&
           scales.size(1) == columns && scales.stride(0) == down && scales.stride(1) == across;
}

bool has_scales_of_rows(const Tensor& scales, int64_t rows, int64_t inner) {
    return has_scales(scales, rows, tiles(inner), 1, rows);
}

bool has_scales_of_tiles(const Tensor& scales, int64_t rows, int64_t inner) {
    return has_scales(scales, tiles(rows), padded_tiles(inner), padded_tiles(inner), 1);
}

// The plan for operands at these addresses: left [rows, inner], right [columns, inner].
Plan* find_plan(int64_t device, int64_t rows, int64_t columns, int64_t inner, bool in_tiles, bool with_bias,
                Operand left, Operand right) {
    const int64_t together = left.codes | left.scales | right.codes | right.scales;
    const int64_t alignment = together % BEST_ALIGNMENT ? together & -together : BEST_ALIGNMENT;
    std::lock_guard<std::mutex> guard(known);
    const auto found = plans.find({device, rows, columns, inner, in_tiles, with_bias, alignment});
    return found == plans.end() ? nullptr : found->second.get();
}

// bias: its address, if the plan has one.
void launch_product(Plan& plan, Operand left, Operand right, int64_t bias, int64_t out, int64_t workspace,
                    int64_t stream) {
    const float one = 1, zero = 0;
    std::lock_guard<std::mutex> lock(plan.mutex);
    check(set_attribute(plan.matmul, A_SCALE_POINTER, &right.scales, sizeof(int64_t)), "A_SCALE_POINTER");
    check(set_attribute(plan.matmul, B_SCALE_POINTER, &left.scales, sizeof(int64_t)), "B_SCALE_POINTER");
    if (bias) check(set_attribute(plan.matmul, BIAS_POINTER, &bias, sizeof(int64_t)), "BIAS_POINTER");
    check(matmul(plan.handle, plan.matmul, &one, pointer(right.codes), plan.right, pointer(left.codes),
                 plan.left, &zero, pointer(out), plan.product, pointer(out), plan.product,
                 plan.algorithm.data(), pointer(plan.workspace ? workspace : 0), size_t(plan.workspace),
                 pointer(stream)),
          "cublasLtMatmul");
}

// Places in one piece of memory, one after the other.
struct Places {
    int64_t end = 0;

    int64_t add(int64_t bytes) {
        const int64_t begin = end;
        end += ceil_div(bytes, BEST_ALIGNMENT) * BEST_ALIGNMENT;
        return begin;
    }
    Operand add(int64_t codes, int64_t scales) { return {add(codes), add(scales * int64_t(sizeof(float)))}; }
    Operand add(const Weight& weight) {
        return add(weight.turned ? weight.rows() * weight.inner() : 0, weight.scales());
    }
};

Operand in(Operand places, int64_t memory) { return {places.codes + memory, places.scales + memory}; }
Operand in(Operand places, const Weight& weight, int64_t memory) {
    const Operand found = in(places, memory);
    return weight.turned ? found : Operand{address(weight.codes), found.scales};
}

// Whether a product with a right side of [columns, inner] can have them as its left side and its bias.
bool fit(const Tensor& left, const Tensor& left_scales, const std::optional<Tensor>& bias, int64_t columns,
         int64_t inner) {
    const auto device = left.device();
    if (!is_codes(left) || !left.numel() || left.size(1) != inner) return false;
    if (!has_scales_of_rows(left_scales, left.size(0), inner) || left_scales.device() != device) return false;
    return !bias || (bias->dim() == 1 && bias->size(0) == columns && bias->scalar_type() == at::kBFloat16 &&
                     bias->device() == device && bias->is_contiguous() && address(*bias) % ALIGNMENT == 0);
}

// Returns left right^T + bias.
Tensor product_of(Plan& plan, const Tensor& like, int64_t columns, Operand left, Operand right,
                  const std::optional<Tensor>& bias, int64_t stream) {
    const Tensor product = at::empty({like.size(0), columns}, like.options().dtype(at::kBFloat16));
    Tensor workspace;
    if (plan.workspace) workspace = at::empty({plan.workspace}, like.options().dtype(at::kByte));
    launch_product(plan, left, right, bias ? address(*bias) : 0, address(product),
                   plan.workspace ? address(workspace) : 0, stream);
    return product;
}

Tensors multiply(const Tensor& left, const Tensor& left_scales, const Tensor& right,
                 const Tensor& right_scales, const std::optional<Tensor>& bias, int64_t stream) {
    if (!is_codes(right)) return {};
    const int64_t columns = right.size(0), inner = right.size(1);
    const bool in_tiles = right_scales.dim() == 2 && right_scales.size(0) != columns;
    if (!fit(left, left_scales, bias, columns, inner)) return {};
    if (!(in_tiles ? has_scales_of_tiles : has_scales_of_rows)(right_scales, columns, inner)) return {};
    const auto device = left.device();
    if (right.device() != device || right_scales.device() != device) return {};
    const Operand a{address(left), address(left_scales)}, b{address(right), address(right_scales)};
    Plan* const plan =
        find_plan(device.index(), left.size(0), columns, inner, in_tiles, bias.has_value(), a, b);
    if (!plan) return {};
    const c10::DeviceGuard guard(device);
    return {product_of(*plan, left, columns, a, b, bias, stream)};
}

// Returns x W^T + bias for a weight, which is transposed first if it is swapped, that is stored as [K, N].
Tensors multiply_weight(const Tensor& x, const Tensor& x_scales, const Tensor& codes, const Tensor& exponents,
                        const std::optional<Tensor>& bias, bool swapped, int64_t stream) {
    const auto weight = find_weight(codes, exponents, swapped);
    if (!weight || !is_codes(codes) || !fit(x, x_scales, bias, weight->rows(), weight->inner())) return {};
    const auto device = x.device();
    if (codes.device() != device) return {};
    const c10::DeviceGuard guard(device);
    Places places;
    const Operand room = places.add(*weight);
    const Tensor memory = at::empty({places.end}, codes.options().dtype(at::kByte));
    const Operand left{address(x), address(x_scales)}, right = in(room, *weight, address(memory));
    Plan* const plan = find_plan(device.index(), x.size(0), weight->rows(), weight->inner(), true,
                                 bias.has_value(), left, right);
    if (!plan) return {};
    launch_weight(*weight, right, stream);
    return {product_of(*plan, x, weight->rows(), left, right, bias, stream)};
}

// Returns the wanted gradients of a product: of its input, cut to dy's tokens, of its weight and of its bias.
// swapped: the weight is stored as [K, N]. What only this call reads lies in one piece of memory. Nothing is
// launched unless everything can be.
Tensors differentiate(const Tensor& dy, const Tensor& codes, const Tensor& exponents,
                      const std::optional<Tensor>& x, const std::optional<Tensor>& x_scales, bool input,
                      bool weight, bool bias, bool swapped, int64_t stream) {
    const auto source = read_by_casts(dy);
    if (!source || !is_codes(codes) || codes.size(swapped) != source->features) return {};
    const auto device = dy.device();
    if (codes.device() != device) return {};
    const int64_t padded = source->padded, outputs = source->features, inputs = codes.size(!swapped);
    const Kernel* const casting =
        find_kernel(device.index(), cast_kind(input, weight ? TURNED_ROWS : 0, bias, source->groups));
    const Kernel* const summing = bias ? find_kernel(device.index(), sum_kind()) : nullptr;
    const auto stored = input ? find_weight(codes, exponents, !swapped) : std::nullopt;
    if (!casting || (bias && !summing) || (input && !stored)) return {};
    bool in_tiles = false;
    if (weight) {
        if (!x || !x_scales || !is_codes(*x) || x->device() != device || x_scales->device() != device)
            return {};
        if (x->size(0) != inputs || x->size(1) != padded) return {};
        in_tiles = x_scales->dim() == 2 && x_scales->size(0) != inputs;
        if (!(in_tiles ? has_scales_of_tiles : has_scales_of_rows)(*x_scales, inputs, padded)) return {};
    }

    Places places;
    Operand rows{}, turned{}, right{};
    if (input) rows = places.add(padded * outputs, padded * tiles(outputs)), right = places.add(*stored);
    if (weight) turned = places.add(outputs * padded, outputs * tiles(padded));
    const int64_t parts = bias ? places.add(tiles(padded) * outputs * int64_t(sizeof(float))) : 0;
    const c10::DeviceGuard guard(device);
    const auto bytes = codes.options().dtype(at::kByte);
    const Tensor memory = at::empty({places.end}, bytes);
    const int64_t begin = address(memory);
    rows = in(rows, begin), turned = in(turned, begin);
    if (input) right = in(right, *stored, begin);
    const Operand given = weight ? Operand{address(*x), address(*x_scales)} : Operand{};
    const auto plan = [&](int64_t height, int64_t inner, bool tiled, Operand a, Operand b) {
        return find_plan(device.index(), height, inputs, inner, tiled, false, a, b);
    };
    Plan* const of_input = input ? plan(padded, outputs, true, rows, right) : nullptr;
    Plan* const of_weight = weight ? plan(outputs, padded, in_tiles, turned, given) : nullptr;
    if ((input && !of_input) || (weight && !of_weight)) return {};
    const int64_t needed = std::max(of_input ? of_input->workspace : 0, of_weight ? of_weight->workspace : 0);
    Tensor workspace;
    if (needed) workspace = at::empty({needed}, bytes);
    const int64_t room = needed ? address(workspace) : 0;

    Cast out;
    if (input) out.codes = rows.codes, out.scales = rows.scales;
    if (weight) out.turned = turned.codes, out.turned_scales = turned.scales;
    if (bias) out.parts = begin + parts;
    launch_cast(*casting, *source, out, stream);
    const auto values = dy.options();
    Tensors found;
    if (input) {
        launch_weight(*stored, right, stream);
        const Tensor dx = at::empty({padded, inputs}, values);
        launch_product(*of_input, rows, right, 0, address(dx), room, stream);
        found.push_back(padded == source->tokens ? dx : dx.narrow(0, 0, source->tokens));
    }
    if (weight) {
        const Tensor dw = at::empty({outputs, inputs}, values);
        launch_product(*of_weight, turned, given, 0, address(dw), room, stream);
        found.push_back(swapped ? dw.t().contiguous() : dw);
    }
    if (bias) {
        found.push_back(at::empty({outputs}, values));
        launch_sum(*summing, out.parts, found.back(), tiles(padded), stream);
    }
    return found;
}

}  // namespace

TORCH_LIBRARY(ds_fp8_launches, library) {
    library.def("start(int[] functions) -> ()", start);
    library.def("add_kernel(int device, int kind, int function, int threads, int shared) -> ()", add_kernel);
    library.def("add_plan(int[] shape, int[] handles, int[] algorithm, int workspace) -> ()", add_plan);
    library.def("cast_kind(bool rows, int turned, bool sums, int groups) -> int", cast_kind);
    library.def("sum_kind() -> int", sum_kind);
    library.def("cast(Tensor values, bool rows, int turned, bool sums, int stream) -> Tensor[]", cast);
    library.def("transpose_kind(int exponents, int groups) -> int", transpose_kind);
    library.def("expand_kind(int exponents) -> int", expand_kind);
    library.def("expand(Tensor codes, Tensor exponents, int stream) -> Tensor[]", expand);
    library.def("transpose(Tensor codes, Tensor exponents, int stream) -> Tensor[]", transpose);
    library.def(
        "multiply(Tensor left, Tensor left_scales, Tensor right, Tensor right_scales, Tensor? bias, "
        "int stream) -> Tensor[]",
        multiply);
    library.def(
        "multiply_weight(Tensor x, Tensor x_scales, Tensor codes, Tensor exponents, Tensor? bias, "
        "bool swapped, int stream) -> Tensor[]",
        multiply_weight);
    library.def(
        "differentiate(Tensor dy, Tensor codes, Tensor exponents, Tensor? x, Tensor? x_scales, "
        "bool input, bool weight, bool bias, bool swapped, int stream) -> Tensor[]",
        differentiate);
}
