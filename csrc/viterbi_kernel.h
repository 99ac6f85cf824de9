// The choice itself, compiled once for each instruction set by a file that defines INSTRUCTION_SET and includes this.
// As in sweep_kernel.h, nothing is used that the linker might give to code for other processors.

#include <cstring>

#include "vectors.h"
#include "viterbi.h"

namespace arbllm {
namespace INSTRUCTION_SET {

typedef float Vector __attribute__((vector_size(4 * SEQUENCES)));
typedef int32_t Mask __attribute__((vector_size(4 * SEQUENCES)));

constexpr int MEMORY = 5, STATES = 1 << MEMORY;  // first signs of the last five rows of a sequence, the latest in bit 0
constexpr float FAR = 1e30f;

INLINE Vector select(Mask mask, Vector yes, Vector no) { return (Vector)(((Mask)yes & mask) | ((Mask)no & ~mask)); }
INLINE Vector lesser(Vector a, Vector b) { return select(a < b, a, b); }

// 2 z1 + z0 of the code, for first signs in bits 0 (the row's own) to 5.
constexpr int label(int window) {
    return 2 * ((window ^ window >> 2 ^ window >> 5) & 1) + (window >> 3 & 1);
}

// Squared distances to the nearest of every fourth level.
template <int LEVELS>
INLINE void measure(const float* levels, Vector wanted, Vector scale, Vector* least) {
    for (int bits = 0; bits < 4; ++bits) {
        for (int number = bits; number < LEVELS; number += 4) {
            const Vector off = wanted - scale * levels[number];
            const Vector distance = off * off;
            least[bits] = number == bits ? distance : lesser(least[bits], distance);
        }
    }
}

// The least costs of all paths to each state; returns, in bit s, whether the one to state s dropped a + .
INLINE Mask extend(const Vector* least, Vector* costs) {
    Vector next[STATES];
    Mask dropped{};
#pragma GCC unroll 32
    for (int state = 0; state < STATES; ++state) {
        const Vector minus = costs[state >> 1] + least[label(state)];
        const Vector plus = costs[(state | STATES) >> 1] + least[label(state | STATES)];
        const Mask better = plus < minus;
        next[state] = select(better, plus, minus);
        dropped |= better & (1 << state);
    }
    std::memcpy(costs, next, sizeof next);
    return dropped;
}

// First signs of the best paths, 1 or 0, in the place of `dropped`.
INLINE void trace(const Vector* costs, int64_t length, Mask* dropped) {
    Mask state{};
    Vector best = costs[0];
    for (int s = 1; s < STATES; ++s) {
        const Mask better = costs[s] < best;
        best = select(better, costs[s], best);
        state = (better & s) | (~better & state);
    }
    for (int64_t i = length - 1; i >= 0; --i) {
        const Mask sign = state & 1, oldest = dropped[i] >> state & 1;
        state = state >> 1 | oldest << (MEMORY - 1);
        dropped[i] = sign;
    }
}

// Of every fourth level, beginning with those that the code's bits name, the nearest.
template <int LEVELS>
INLINE Vector nearest(const float* levels, Vector wanted, Vector scale, Mask bits, Mask& number) {
    Vector best{}, least{};
    for (int free = 0; free < LEVELS; free += 4) {
        Vector level = Vector{} + levels[free];
        for (int b = 1; b < 4; ++b) level = select(bits == b, Vector{} + levels[free + b], level);
        const Vector value = level * scale, off = wanted - value, distance = off * off;
        const Mask closer = free == 0 ? Mask{} - 1 : distance < least;
        best = select(closer, value, best);
        least = select(closer, distance, least);
        number = (closer & (free + bits)) | (~closer & number);
    }
    return best;
}

template <int LEVELS>
void solve(const Trellis& task, float* memory) {
    const int64_t n = task.rows, length = (n + SEQUENCES - 1) / SEQUENCES;
    Vector* wanted = reinterpret_cast<Vector*>(memory);
    Vector* scales = wanted + length;
    Mask* signs = reinterpret_cast<Mask*>(scales + length);
    Vector* state = scales + 2 * length;
    float levels[LEVELS];
    std::memcpy(levels, task.levels, sizeof levels);
    for (int64_t j = 0; j < task.columns; ++j) {
        std::memset(memory, 0, length * 4 * sizeof(Vector));  // what lies beyond n costs nothing
        const float* values = task.values ? task.values + j * n : nullptr;
        std::memcpy(state, task.state + j * n, n * sizeof(float));
        for (int64_t t = 0; t < j; ++t) {
            const float influence = task.influence[j * task.columns + t];
            const float* change = task.changes + t * n;
            float* to = reinterpret_cast<float*>(state);
            for (int64_t i = 0; i < n; ++i) to[i] -= influence * change[i];
        }
        std::memcpy(scales, task.row_scales, n * sizeof(float));
        if (values) std::memcpy(wanted, values, n * sizeof(float));
        Vector costs[STATES];
        for (int s = 0; s < STATES; ++s) costs[s] = Vector{} + (s ? FAR : 0.0f);
        for (int64_t i = 0; i < length; ++i) {
            Vector least[4];
            wanted[i] += task.steps[j] * state[i];
            scales[i] *= task.column_scales[j];
            measure<LEVELS>(levels, wanted[i], scales[i], least);
            signs[i] = extend(least, costs);
        }
        trace(costs, length, signs);
        Mask before[MEMORY] = {};
        for (int64_t i = 0; i < length; ++i) {
            const Mask bits = 2 * (signs[i] ^ before[1] ^ before[4]) + before[2];
            Mask number{};
            const Vector chosen = nearest<LEVELS>(levels, wanted[i], scales[i], bits, number);
            const int lanes = static_cast<int>(n - i * SEQUENCES < SEQUENCES ? n - i * SEQUENCES : SEQUENCES);
            for (int lane = 0; lane < lanes; ++lane) {
                const int64_t place = j * n + i * SEQUENCES + lane;
                task.choices[place] = static_cast<uint8_t>(number[lane] + 128 * signs[i][lane]);
                task.changes[place] = chosen[lane] - (values ? task.values[place] : wanted[i][lane]);
            }
            for (int back = MEMORY - 1; back > 0; --back) before[back] = before[back - 1];
            before[0] = signs[i];
        }
    }
}

inline void viterbi(const Trellis& task, float* memory) {
    switch (task.level_count) {
        case 4: return solve<4>(task, memory);
        case 8: return solve<8>(task, memory);
        case 16: return solve<16>(task, memory);
        case 32: return solve<32>(task, memory);
    }
}

}  // namespace INSTRUCTION_SET
}  // namespace arbllm
