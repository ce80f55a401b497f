// The arithmetic of an Adam step, and a sweep's arguments; ops/adam.py.
#pragma once
#include "masters.h"

namespace ISA {

constexpr int UNIT = 24;  // ops.adam.LOG_UNIT

struct Scalars {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, root_beta2, quotient_beta, step_size;
    float root_correction;
    float eps;  // in the sweep's unit
    float decay;
    float clamp;  // inf: no clamp
    int32_t decoupled;
};

struct Segment {
    int64_t first_row, last_row, first_element, parameter;
};

struct Factors {  // factors of decoded values
    float g, p, m, v;
};

struct StateCounts {  // ops/health.py
    double clamped, underflows, zeros;
};

struct Sweep {
    Blocks gradient, master, m, v;
    const float* gradient_scales;  // of rows, replacing the gradient's own; or null
    Values weights;
    const Segment* segments;
    int64_t segment_count;
    StateCounts* counts;   // one per thread, or null
    const float* control;  // factor of the gradient; 0 if the step is skipped
    uint32_t v_stream, p_stream, multiplier, odd;
    int32_t n, stochastic, stores_sqrt;
    Scalars scalars;
    Factors by;  // set by the sweep

    bool root() const { return stores_sqrt && v.f().encode_up; }  // whether v holds its root
    bool quotient() const { return m.is<INT8>(); }                // whether m is stored over that root
};

struct Batch {
    alignas(64) float g[BATCH], p[BATCH], m[BATCH], v[BATCH];
    uint32_t clamped;  // on measured steps only
    uint32_t p_amax[MAX_ROWS], m_amax[MAX_ROWS], root_amax[MAX_ROWS];
};

struct Ready {  // a Reader of decoded values
    const float* values;

    float scale(int) const { return 1; }
    f32 at(int i, float) const { return load<f32>(values + i); }
};

constexpr int NEXT_TO_ZERO = 127 - 110;  // ops.moments.NEXT_TO_ZERO

// The arithmetic, from codes or decoded values to the values that are encoded; g becomes the root of v.
// QUOTIENT: m is over the root of v, before and after. SCALED: masters have scales, which need their amax.
template <bool ROOT, bool QUOTIENT, bool SCALED, bool COUNT = false, typename G, typename P, typename M,
          typename V>
void adam(G g_in, P p_in, M m_in, V v_in, Batch& out, int rows, int n, const Scalars s) {
    const float l2 = s.decay * power_of_two(127 + UNIT);
    u32 clamped = {};
    for (int row = 0, i = 0; row < rows; ++row) {
        const float g_scale = g_in.scale(row), p_scale = p_in.scale(row), m_scale = m_in.scale(row);
        const float v_scale = v_in.scale(row);
        u32 p_amax = {}, m_amax = {}, root_amax = {};
        for (; i < (row + 1) * n; i += LANES) {
            f32 g = g_in.at(i, g_scale), p = p_in.at(i, p_scale), v = v_in.at(i, v_scale);
            if (!s.decoupled) g = g + p * l2;
            f32 m = m_in.at(i, m_scale);
            if (QUOTIENT) m = m * (ROOT ? v : square_root(v));
            m = m + g * s.one_minus_beta1;
            if (ROOT) v = v * v;
            v = at_most(v + g * g * s.one_minus_beta2, f32{} + 3.4028234663852886e38f);
            f32 root = square_root(v), magnitude = at_most(absolute(m), root * s.clamp);
            if constexpr (COUNT) clamped += (u32)(absolute(m) > magnitude) & 1;
            m = float_of(pick(SIGN, bits_of(m), bits_of(magnitude)));
            p = p - m / (root * s.root_correction + s.eps) * s.step_size;
            if (QUOTIENT) m = m / (root + power_of_two(NEXT_TO_ZERO)), magnitude = absolute(m);
            if (SCALED) p_amax = larger(p_amax, bits_of(absolute(p)));
            m_amax = larger(m_amax, bits_of(magnitude));
            root_amax = larger(root_amax, bits_of(root));
            store(out.p + i, p);
            store(out.m + i, m);
            store((ROOT ? out.g : out.v) + i, ROOT ? root : v);
        }
        out.p_amax[row] = largest(p_amax);
        out.m_amax[row] = largest(m_amax);
        out.root_amax[row] = largest(root_amax) & MAGNITUDE;  // NaN has either sign
    }
    if constexpr (COUNT) out.clamped = total(clamped);
}

}  // namespace ISA
