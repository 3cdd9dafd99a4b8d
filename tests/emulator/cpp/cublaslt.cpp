// A libcublasLt.so.13 for machines without GPUs: the functions that Lockstep uses. Device memory is what the fake driver
// makes of it, host memory; a product runs on its stream by cuLaunchHostFunc.
//
// Meanings, defaults and refusals are those of NVIDIA's documentation (cuBLAS 13, chapter 3) and header. Where these leave
// room, it is as awkward as the real one may be: its one algorithm wants the workspace that it may have, all of it, and
// leaves NaNs there; it relies on the alignment that it was told of, and on 16 bytes for leading dimensions; and it works for
// nothing but the layouts that the heuristic was asked about. Sums have an order of their own.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "libcuda.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

enum Status : int {
    SUCCESS = 0,
    NOT_INITIALIZED = 1,
    INVALID_VALUE = 7,
    EXECUTION_FAILED = 13,
    NOT_SUPPORTED = 15,
};

enum Type : int { R_32F = 0, R_16BF = 14 };
enum Order : int { COLUMNS = 0, ROWS = 1 };
enum Transform : int { NONE = 0, TRANSPOSE = 1 };
constexpr int COMPUTE_32F = 68;

struct Handle {
    void* context;
};

struct Layout {
    Type type;
    Order order;
    uint64_t rows, columns;
    int64_t stride;  // from one column to the next, or row

    uint64_t run() const { return order == COLUMNS ? rows : columns; }
    size_t bytes() const { return type == R_32F ? 4 : 2; }
    size_t at(uint64_t row, uint64_t column) const {
        return order == COLUMNS ? column * stride + row : row * stride + column;
    }
    bool operator==(const Layout& other) const {
        return type == other.type && order == other.order && rows == other.rows && columns == other.columns &&
               stride == other.stride;
    }
};

struct Operation {
    int compute_type;
    Type scale_type;
    Transform a = NONE, b = NONE;
};

struct Preference {
    uint64_t workspace_bytes = 0;
    uint32_t alignment[4] = {256, 256, 256, 256};  // A, B, C, D
};

struct Shape {
    uint64_t m, n, k;
};

// What the caller keeps for us: 64 bytes that it does not look into.
struct Algorithm {
    uint64_t made_by;
    uint64_t workspace_bytes;
    uint64_t layouts;  // a digest
    uint32_t alignment[4];
    uint64_t reserved[3];
};
static_assert(sizeof(Algorithm) == 64, "cublasLtMatmulAlgo_t");
constexpr uint64_t MADE_BY = 0x6c61626c75636d65;

struct Heuristic {
    Algorithm algorithm;
    size_t workspace_bytes;
    Status state;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Heuristic) == 96, "cublasLtMatmulHeuristicResult_t");

// Whether the four matrices can be those of one product.
Status find_shape(const Operation& operation, const Layout& a, const Layout& b, const Layout& c, const Layout& d,
                  Shape& shape) {
    bool a_turned = operation.a == TRANSPOSE, b_turned = operation.b == TRANSPOSE;
    shape = {d.rows, d.columns, a_turned ? a.rows : a.columns};
    bool fits = (a_turned ? a.columns : a.rows) == shape.m && (b_turned ? b.rows : b.columns) == shape.n &&
                (b_turned ? b.columns : b.rows) == shape.k && c.rows == d.rows && c.columns == d.columns &&
                c.type == d.type && c.order == d.order;
    bool empty = shape.m == 0 || shape.n == 0 || shape.k == 0;
    if (!fits || empty) return INVALID_VALUE;
    for (const Layout* layout : {&a, &b, &c, &d}) {
        if (layout->stride < 0 || static_cast<uint64_t>(layout->stride) < layout->run()) return INVALID_VALUE;
    }
    bool known = operation.compute_type == COMPUTE_32F && operation.scale_type == R_32F && a.type == b.type &&
                 (a.type == R_16BF || (a.type == R_32F && d.type == R_32F));
    return known ? SUCCESS : NOT_SUPPORTED;
}

uint64_t digest(const Operation& operation, std::initializer_list<const Layout*> layouts) {
    uint64_t digest = operation.a * 2 + operation.b + 1;
    auto add = [&](uint64_t value) { digest = (digest ^ value) * 0x9e3779b97f4a7c15 + (digest >> 29); };
    for (const Layout* layout : layouts) {
        for (uint64_t value : {uint64_t(layout->type), uint64_t(layout->order), layout->rows, layout->columns,
                               uint64_t(layout->stride)}) {
            add(value);
        }
    }
    return digest;
}

bool is_aligned(const void* at, size_t bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

// A product on its way.
struct Product {
    Operation operation;
    Layout layout_a, layout_b, layout_c, layout_d;
    Shape shape;
    float alpha, beta;
    const void *a, *b, *c;
    void *d, *workspace;
    size_t workspace_bytes;
    bool captured;
};

float load(const void* from, const Layout& layout, uint64_t row, uint64_t column) {
    size_t at = layout.at(row, column);
    if (layout.type == R_32F) return static_cast<const float*>(from)[at];
    uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(from)[at]) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void store(void* to, const Layout& layout, uint64_t row, uint64_t column, float value) {
    size_t at = layout.at(row, column);
    if (layout.type == R_32F) {
        static_cast<float*>(to)[at] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bool is_nan = value != value;
    bits = is_nan ? 0x7fff0000 : bits + 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(bits >> 16);
}

constexpr int LANES = 8;
typedef float Lanes __attribute__((vector_size(4 * LANES)));

// The first index is that which a product keeps; zeros fill up the second, which it sums over.
std::vector<Lanes> gather(const void* from, const Layout& layout, bool k_is_row, uint64_t n, uint64_t k) {
    uint64_t vectors = (k + LANES - 1) / LANES;
    std::vector<Lanes> gathered(n * vectors, Lanes{});
    auto* values = reinterpret_cast<float*>(gathered.data());
    for (uint64_t i = 0; i < n; i++) {
        for (uint64_t j = 0; j < k; j++) {
            values[i * vectors * LANES + j] = k_is_row ? load(from, layout, j, i) : load(from, layout, i, j);
        }
    }
    return gathered;
}

// D = alpha op(A) op(B) + beta C. What beta is 0 for is not read.
void run(const Product& p) {
    memset(p.workspace, 0xff, p.workspace_bytes);
    std::vector<Lanes> a = gather(p.a, p.layout_a, p.operation.a == TRANSPOSE, p.shape.m, p.shape.k);
    std::vector<Lanes> b = gather(p.b, p.layout_b, p.operation.b == NONE, p.shape.n, p.shape.k);
    uint64_t vectors = a.size() / p.shape.m;
    for (uint64_t column = 0; column < p.shape.n; column++) {
        for (uint64_t row = 0; row < p.shape.m; row++) {
            Lanes sums = {};
            for (uint64_t i = 0; i < vectors; i++) sums += a[row * vectors + i] * b[column * vectors + i];
            float sum = 0;
            for (int i = 0; i < LANES; i++) sum += sums[i];
            float value = p.alpha * sum;
            if (p.beta != 0) value += p.beta * load(p.c, p.layout_c, row, column);
            store(p.d, p.layout_d, row, column, value);
        }
    }
}

// Called by the stream. A graph calls again, so that what is captured is kept for good.
void run_on_stream(void* data) {
    auto* product = static_cast<Product*>(data);
    run(*product);
    if (!product->captured) delete product;
}

template <class T>
Status assign(T& to, const void* from, size_t bytes) {
    if (!from || bytes != sizeof to) return INVALID_VALUE;
    memcpy(&to, from, sizeof to);
    return SUCCESS;
}

}  // namespace

API size_t cublasLtGetVersion() { return 130000; }

API Status cublasLtCreate(Handle** handle) {
    void* context = current_context();
    if (!handle) return INVALID_VALUE;
    if (!context) return NOT_INITIALIZED;
    *handle = new Handle{context};
    return SUCCESS;
}

API Status cublasLtDestroy(Handle* handle) {
    if (!handle) return NOT_INITIALIZED;
    delete handle;
    return SUCCESS;
}

// === Layouts ===

API Status cublasLtMatrixLayoutCreate(Layout** layout, Type type, uint64_t rows, uint64_t columns, int64_t stride) {
    *layout = new Layout{type, COLUMNS, rows, columns, stride};
    return SUCCESS;
}

API Status cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return SUCCESS;
}

API Status cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t bytes) {
    switch (attribute) {
        case 0: return assign(layout->type, value, bytes);
        case 1: return assign(layout->order, value, bytes);
        case 2: return assign(layout->rows, value, bytes);
        case 3: return assign(layout->columns, value, bytes);
        case 4: return assign(layout->stride, value, bytes);
        default: return INVALID_VALUE;
    }
}

// === Operations ===

API Status cublasLtMatmulDescCreate(Operation** operation, int compute_type, Type scale_type) {
    *operation = new Operation{compute_type, scale_type};
    return SUCCESS;
}

API Status cublasLtMatmulDescDestroy(Operation* operation) {
    delete operation;
    return SUCCESS;
}

API Status cublasLtMatmulDescSetAttribute(Operation* operation, int attribute, const void* value, size_t bytes) {
    switch (attribute) {
        case 3: return assign(operation->a, value, bytes);
        case 4: return assign(operation->b, value, bytes);
        default: return INVALID_VALUE;
    }
}

// === Preferences ===

API Status cublasLtMatmulPreferenceCreate(Preference** preference) {
    *preference = new Preference;
    return SUCCESS;
}

API Status cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return SUCCESS;
}

API Status cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
    if (attribute == 1) return assign(preference->workspace_bytes, value, bytes);
    if (attribute >= 5 && attribute <= 8) return assign(preference->alignment[attribute - 5], value, bytes);
    return INVALID_VALUE;
}

// === Products ===

API Status cublasLtMatmulAlgoGetHeuristic(Handle* handle, Operation* operation, Layout* a, Layout* b, Layout* c, Layout* d,
                                          Preference* preference, int n_wanted, Heuristic* found, int* n_found) {
    if (!handle) return NOT_INITIALIZED;
    if (!operation || !a || !b || !c || !d || !preference || !found || !n_found || n_wanted < 1) return INVALID_VALUE;
    *n_found = 0;
    Shape shape;
    if (Status status = find_shape(*operation, *a, *b, *c, *d, shape); status != SUCCESS) return status;
    const Layout* layouts[] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        if (preference->alignment[i] < 16 || layouts[i]->stride * layouts[i]->bytes() % 16 != 0) return NOT_SUPPORTED;
    }
    *found = {};
    found->algorithm = {MADE_BY, preference->workspace_bytes, digest(*operation, {a, b, c, d}), {}, {}};
    std::copy_n(preference->alignment, 4, found->algorithm.alignment);
    found->workspace_bytes = preference->workspace_bytes;
    *n_found = 1;
    return SUCCESS;
}

API Status cublasLtMatmul(Handle* handle, Operation* operation, const float* alpha, const void* a, Layout* layout_a,
                          const void* b, Layout* layout_b, const float* beta, const void* c, Layout* layout_c, void* d,
                          Layout* layout_d, const Algorithm* algorithm, void* workspace, size_t workspace_bytes,
                          void* stream) {
    if (!handle) return NOT_INITIALIZED;
    bool complete = operation && alpha && a && layout_a && b && layout_b && beta && c && layout_c && d && layout_d;
    // (The real one asks its heuristic itself where there is no algorithm.)
    if (!complete || !algorithm || handle->context != current_context()) return INVALID_VALUE;
    Shape shape;
    Status status = find_shape(*operation, *layout_a, *layout_b, *layout_c, *layout_d, shape);
    if (status != SUCCESS) return status;
    // In place is allowed, and then both are laid out alike.
    if (c == d && !(*layout_c == *layout_d)) return INVALID_VALUE;
    if (algorithm->made_by != MADE_BY ||
        algorithm->layouts != digest(*operation, {layout_a, layout_b, layout_c, layout_d})) {
        return INVALID_VALUE;
    }
    if (workspace_bytes < algorithm->workspace_bytes || !is_aligned(workspace, 256)) return INVALID_VALUE;
    const void* matrices[] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        if (!is_aligned(matrices[i], algorithm->alignment[i])) return INVALID_VALUE;
    }
    auto enqueue = driver<int (*)(void*, void (*)(void*), void*)>("cuLaunchHostFunc");
    auto is_capturing = driver<int (*)(void*, int*)>("cuStreamIsCapturing");
    int capturing = 0;
    if (!enqueue || !is_capturing || is_capturing(stream, &capturing) != 0) return EXECUTION_FAILED;
    auto product = std::make_unique<Product>(Product{*operation, *layout_a, *layout_b, *layout_c, *layout_d, shape, *alpha,
                                                     *beta, a, b, c, d, workspace, algorithm->workspace_bytes,
                                                     capturing != 0});
    if (enqueue(stream, run_on_stream, product.get()) != 0) return EXECUTION_FAILED;
    product.release();
    return SUCCESS;
}
