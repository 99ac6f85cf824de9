// The pass itself, compiled once for each instruction set by a file that defines INSTRUCTION_SET and includes this.
//
// Rows are independent of one another: LANES of them are solved at a time, in a copy that stays in the cache. Columns
// go in tiles: inside a tile each column's change reaches the next ones at once, later columns get the changes of a
// whole tile as one small matrix product. Nothing from the standard library is used that might be compiled as a
// function of its own: the linker could give it to code that runs on every processor.

#include <cstring>

#include "sweep.h"
#include "vectors.h"

namespace arbllm {
namespace INSTRUCTION_SET {

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Mask __attribute__((vector_size(VECTOR_BYTES)));

constexpr int VECTORS = 4;  // of the rows solved at a time
constexpr int LANES = VECTORS * VECTOR_BYTES / 4;
constexpr int TILE = 32;
static_assert(LANES <= MOST_LANES, "the caller's memory is for so many");

INLINE Vector magnitude(Vector x) { return (Vector)((Mask)x & INT32_MAX); }

INLINE Vector select(Mask mask, Vector yes, Vector no) { return (Vector)(((Mask)yes & mask) | ((Mask)no & ~mask)); }

// The value of the level nearest to `wanted`, and its number. Levels come in pairs of opposite signs: the search is
// among magnitudes, then the signs are those that give the pair's member on the side of `wanted`.
template <int GROUPS, int TERMS>
INLINE Vector nearest(Vector wanted, const Vector* rows, const float* columns, Mask& number) {
    const Mask side = (Mask)wanted & INT32_MIN;
    const Vector size = magnitude(wanted);
    Vector best{}, least{};
    for (int group = 0; group < GROUPS; ++group) {
        for (int second = 0; second < TERMS; ++second) {
            const int slot = group * TERMS;
            Vector level = rows[slot] * columns[slot];
            if (TERMS == 2) {
                const Vector other = rows[slot + 1] * columns[slot + 1];
                level = second ? level - other : level + other;
            }
            const Mask flipped = ((Mask)level ^ side) < 0;
            const Mask code = (group << TERMS) + (TERMS == 2 ? (flipped & 2) + ((flipped & 1) ^ second) : flipped & 1);
            const Vector value = magnitude(level);
            const Vector distance = magnitude(value - size);
            const Mask closer = group + second == 0 ? Mask{} - 1 : distance < least;
            best = select(closer, value, best);
            least = select(closer, distance, least);
            number = (closer & code) | (~closer & number);
        }
    }
    return (Vector)((Mask)best | side);
}

// state[k] -= sum over t < count of influence[k, t] * changes[t], for `begin` <= k < `end`; `stride` floats a row.
INLINE void spread(Vector* state, const Vector* changes, const float* influence, int64_t stride, int64_t begin,
                   int64_t end, int count) {
    int64_t k = begin;
    for (; k + 1 < end; k += 2) {
        Vector here[VECTORS], next[VECTORS];
        std::memcpy(here, state + k * VECTORS, sizeof here);
        std::memcpy(next, state + (k + 1) * VECTORS, sizeof next);
        const float *one = influence + k * stride, *two = one + stride;
        for (int t = 0; t < count; ++t) {
            for (int v = 0; v < VECTORS; ++v) {
                here[v] -= one[t] * changes[t * VECTORS + v];
                next[v] -= two[t] * changes[t * VECTORS + v];
            }
        }
        std::memcpy(state + k * VECTORS, here, sizeof here);
        std::memcpy(state + (k + 1) * VECTORS, next, sizeof next);
    }
    for (; k < end; ++k) {
        for (int t = 0; t < count; ++t) {
            for (int v = 0; v < VECTORS; ++v) {
                state[k * VECTORS + v] -= influence[k * stride + t] * changes[t * VECTORS + v];
            }
        }
    }
}

// Column j of `lanes` rows from `first` on: chooses levels, leaves the change.
template <int GROUPS, int TERMS>
INLINE void choose(const Sweep& task, int64_t j, int64_t first, int lanes, const Vector* rows, const Vector* state,
                   Vector* change) {
    constexpr int SLOTS = GROUPS * TERMS;
    Vector value[VECTORS] = {}, chosen[VECTORS], scales[SLOTS];
    Mask number[VECTORS] = {};
    float columns[SLOTS];
    for (int slot = 0; slot < SLOTS; ++slot) columns[slot] = task.column_scales[slot * task.columns + j];
    const int64_t place = j * task.rows + first;
    if (task.values) std::memcpy(value, task.values + place, lanes * sizeof(float));
    for (int v = 0; v < VECTORS; ++v) {
        const Vector wanted = value[v] + task.steps[j] * state[v];
        for (int slot = 0; slot < SLOTS; ++slot) scales[slot] = rows[slot * VECTORS + v];
        chosen[v] = nearest<GROUPS, TERMS>(wanted, scales, columns, number[v]);
        change[v] = chosen[v] - (task.values ? value[v] : wanted);
    }
    std::memcpy(task.chosen + place, chosen, lanes * sizeof(float));
    const int32_t* numbers = reinterpret_cast<const int32_t*>(number);
    for (int lane = 0; lane < lanes; ++lane) task.choices[place + lane] = static_cast<uint8_t>(numbers[lane]);
}

template <int GROUPS, int TERMS>
void solve(const Sweep& task, float* memory) {
    constexpr int SLOTS = GROUPS * TERMS;
    Vector* state = reinterpret_cast<Vector*>(memory);
    for (int64_t first = 0; first < task.rows; first += LANES) {
        const int lanes = static_cast<int>(task.rows - first < LANES ? task.rows - first : LANES);
        Vector rows[SLOTS * VECTORS] = {};
        for (int slot = 0; slot < SLOTS; ++slot) {
            std::memcpy(rows + slot * VECTORS, task.row_scales + slot * task.rows + first, lanes * sizeof(float));
        }
        std::memset(memory, 0, task.columns * LANES * sizeof(float));
        for (int64_t k = 0; k < task.columns; ++k) {
            std::memcpy(state + k * VECTORS, task.state + k * task.rows + first, lanes * sizeof(float));
        }
        for (int64_t begin = 0; begin < task.columns; begin += TILE) {
            const int count = static_cast<int>(task.columns - begin < TILE ? task.columns - begin : TILE);
            Vector changes[TILE * VECTORS];
            for (int t = 0; t < count; ++t) {
                const int64_t j = begin + t;
                Vector* change = changes + t * VECTORS;
                choose<GROUPS, TERMS>(task, j, first, lanes, rows, state + j * VECTORS, change);
                spread(state, change, task.influence + j, task.columns, j + 1, begin + count, 1);
            }
            spread(state, changes, task.influence + begin, task.columns, begin + count, task.columns, count);
        }
    }
}

inline void sweep(const Sweep& task, float* memory) {
    switch (task.groups * task.terms * 10 + task.terms) {
        case 11: return solve<1, 1>(task, memory);
        case 21: return solve<2, 1>(task, memory);
        case 41: return solve<4, 1>(task, memory);
        case 22: return solve<1, 2>(task, memory);
        case 42: return solve<2, 2>(task, memory);
        case 82: return solve<4, 2>(task, memory);
    }
}

}  // namespace INSTRUCTION_SET
}  // namespace arbllm
