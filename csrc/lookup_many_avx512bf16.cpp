// Products of many tokens: a block of 64 rows becomes panels of bfloat16, each of which stays in the caches while all
// tokens are multiplied by it. What is multiplied is rounded to bfloat16, but for the dense columns; sums are in float32.
#include "lookup_many.h"

#ifdef __AVX512BF16__
#include <algorithm>

#include "lookup_dots_avx512.h"
#include "lookup_kernel.h"
#include "lookup_panels_avx512bf16.h"
#include "processor.h"

namespace arbllm {
namespace {

constexpr int MOST_TOGETHER = 6;  // tokens whose sums are in registers
constexpr int MOST_OF_PART = 42 * MOST_TOGETHER;  // tokens whose inputs for a panel, and sums, the second cache holds
constexpr int LEAST_OF_PART = 6 * MOST_TOGETHER;  // for which a panel is worth its while
constexpr int MOST_AT_ONCE = 1024;  // tokens whose inputs are in memory
constexpr int64_t PIECES = 6;  // of work for a thread, at least, if parts may be so small

int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }  // rounded up

// Octets of some columns that are in one panel.
struct Piece {
    int columns, first, octets;
};

// Pieces that are multiplied at once.
struct Chunk {
    int first_piece, pieces;
    int octet, octets;  // of all columns
    bool begins, ends;  // a run of chunks whose sums are added up before they are multiplied by row factors
};

// The panels of a block, in order.
struct Chunks {
    OwnVector<Columns> columns;
    OwnVector<Piece> pieces;
    OwnVector<Chunk> all;
    int octets = 0;

    explicit Chunks(const Prepared& prepared) {
        for (int p = 0; p < prepared.header->passes; p += columns.back().count) {
            const Pass* const pass = prepared.passes + p;
            int count = 1;
            while (p + count < prepared.header->passes && pass[count].column == pass->column) {
                ++count;
            }
            columns.push_back({pass, count});
            add(static_cast<int>(columns.size()) - 1);
        }
    }

  private:
    void add(int number) {
        const Columns& own = columns[number];
        const bool begins = all.empty() || own.passes->trellis || columns[number - 1].passes->trellis;
        for (int first = 0; first < own.octets(); first += PANEL_OCTETS) {
            const int count = std::min(PANEL_OCTETS, own.octets() - first);
            const bool joins = !all.empty() && !(begins && first == 0) && all.back().octets + count <= PANEL_OCTETS;
            if (!joins) {
                if (!all.empty()) {
                    all.back().ends = begins && first == 0;
                }
                all.push_back({static_cast<int>(pieces.size()), 0, octets, 0, begins && first == 0, true});
            }
            pieces.push_back({number, first, count});
            ++all.back().pieces;
            all.back().octets += count;
            octets += count;
        }
    }
};

// sums += weights times the inputs (octets, TOKENS, 8), for four vectors of rows, or = if they begin with that; `ahead`
// is asked for meanwhile. Unless told to unroll early, GCC keeps the sums in memory.
template <int TOKENS>
void add_tokens(const HalfPanel& weights, int first, int octets, const uint16_t* x, const uint16_t* ahead, bool begins,
                RowSums* sums) {
    constexpr int COLUMNS = OCTET / HALVES;
    __m512 found[TOKENS][TOGETHER];
#pragma GCC unroll 6
    for (int t = 0; t < TOKENS; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < TOGETHER; ++v) {
            found[t][v] = begins ? _mm512_setzero_ps() : _mm512_load_ps(sums[t] + 16 * (first + v));
        }
    }
    for (int i = 0; i < octets; ++i) {
        for (int half = 0; half < HALVES; ++half) {
            __builtin_prefetch(ahead + COLUMNS * TOKENS * half, 0, 2);
            __m512bh own[TOGETHER];
#pragma GCC unroll 4
            for (int v = 0; v < TOGETHER; ++v) {
                own[v] = reinterpret_cast<__m512bh>(weights[i][half][v]);
            }
#pragma GCC unroll 6
            for (int t = 0; t < TOKENS; ++t) {
                int64_t word;
                std::memcpy(&word, x + OCTET * t + COLUMNS * half, 8);
                const auto inputs = reinterpret_cast<__m512bh>(_mm512_set1_epi64(word));
#pragma GCC unroll 4
                for (int v = 0; v < TOGETHER; ++v) {
                    found[t][v] = _mm512_dpbf16_ps(found[t][v], own[v], inputs);
                }
            }
        }
        x += OCTET * TOKENS;
        ahead += OCTET * TOKENS;
    }
#pragma GCC unroll 6
    for (int t = 0; t < TOKENS; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < TOGETHER; ++v) {
            _mm512_store_ps(sums[t] + 16 * (first + v), found[t][v]);
        }
    }
}

// The same for any number of tokens and all rows; inputs that will be wanted next are `next` numbers after these.
void add_tokens(const HalfPanel* panel, int octets, const uint16_t* x, int64_t next, int64_t tokens, bool begins,
                RowSums* sums) {
    using Add = void (*)(const HalfPanel&, int, int, const uint16_t*, const uint16_t*, bool, RowSums*);
    static constexpr Add by_count[] = {nullptr,       add_tokens<1>, add_tokens<2>, add_tokens<3>,
                                       add_tokens<4>, add_tokens<5>, add_tokens<6>};
    for (int half = 0; half < VECTORS / TOGETHER; ++half) {
        for (int64_t token = 0; token < tokens; token += MOST_TOGETHER) {
            const uint16_t* own = x + OCTET * octets * token;
            const auto count = std::min<int64_t>(MOST_TOGETHER, tokens - token);
            by_count[count](panel[half], TOGETHER * half, octets, own, own + next, begins, sums + token);
        }
    }
}

// What a thread works with.
struct Workspace {
    HalfPanel panel[VECTORS / TOGETHER];
    WideFactors rows[MOST_SIGNS];
    alignas(64) RowSums sums[MOST_OF_PART];
    alignas(64) float y[MOST_OF_PART][LANES];
};

// Tokens in parts: as many of them as keep all threads busy to the end, whole groups of those that go together.
int64_t part_of(int64_t tokens, int64_t blocks, int threads) {
    const int64_t fewest = quotient(tokens, MOST_OF_PART), most = std::max(fewest, tokens / LEAST_OF_PART);
    const int64_t parts = std::clamp(quotient(PIECES * threads, blocks), fewest, most);
    return MOST_TOGETHER * quotient(quotient(tokens, parts), MOST_TOGETHER);
}

// One multiplication of at most MOST_AT_ONCE tokens, as its threads see it: first what all inputs become, then block by
// block and part by part of the tokens.
class ManyTokens {
  public:
    ManyTokens(const Prepared& prepared, const Activations& activations, int threads)
        : prepared_(prepared),
          activations_(activations),
          chunks_(prepared),
          part_(part_of(activations.tokens, prepared.blocks(), threads)),
          groups_(quotient(activations.tokens, MOST_TOGETHER)),
          pieces_(prepared.blocks() * quotient(activations.tokens, part_)),
          workers_(threads),
          read_(threads * prepared.header->columns),
          spaces_(workspaces(threads)) {
        const int64_t columns = chunks_.octets * OCTET, dense = prepared.header->dense;
        static thread_local OwnVector<uint8_t> memory;
        const size_t bytes = activations.tokens * (2 * columns + 4 * dense) + 64;
        if (memory.size() < bytes) {
            memory = OwnVector<uint8_t>(bytes);
        }
        auto* const start = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
        inputs_ = reinterpret_cast<uint16_t*>(start);
        dense_ = reinterpret_cast<float*>(start + 2 * activations.tokens * columns);
    }

    static void run(void* argument) {
        auto& product = *static_cast<ManyTokens*>(argument);
        const int64_t worker = product.workers_.next();
        float* const x = product.read_.data() + worker * product.prepared_.header->columns;
        for (int64_t group; (group = product.groups_.next()) >= 0; product.groups_.done()) {
            const int64_t first = MOST_TOGETHER * group;
            for (int64_t token = first; token < first + product.together(first); ++token) {
                product.round(token, x);
            }
        }
        product.groups_.wait();
        const int64_t blocks = product.prepared_.blocks();
        for (int64_t piece; (piece = product.pieces_.next()) >= 0;) {
            product.multiply(piece % blocks, product.part_ * (piece / blocks), product.spaces_[worker]);
        }
    }

  private:
    // All memory is taken before threads begin, which must not throw.
    static Workspace* workspaces(int count) {
        static thread_local OwnVector<Workspace> spaces;
        if (static_cast<int>(spaces.size()) < count) {
            spaces = OwnVector<Workspace>(count);
        }
        return spaces.data();
    }

    // Inputs of a chunk are (octets, 6, 8) of six tokens, then of the next six, and so on.
    int64_t inputs_at(const Chunk& chunk, int64_t token) const {
        const int64_t place = token % MOST_TOGETHER;
        return OCTET * (chunk.octet * activations_.tokens + (token - place) * chunk.octets + place);
    }
    int64_t together(int64_t token) const {  // tokens among which its inputs are
        return std::min<int64_t>(MOST_TOGETHER, activations_.tokens - token + token % MOST_TOGETHER);
    }

    // One token's inputs, in bfloat16; beyond the last column of some, 0.
    void round(int64_t token, float* x) {
        const int64_t step = OCTET * together(token);
        read(prepared_, activations_, token, x);
        for (const Chunk& chunk : chunks_.all) {
            uint16_t* to = &inputs_[inputs_at(chunk, token)];
            for (int i = 0; i < chunk.pieces; ++i) {
                const Piece& piece = chunks_.pieces[chunk.first_piece + i];
                const Pass& pass = *chunks_.columns[piece.columns].passes;
                const int first = OCTET * piece.first;
                const float* const factors = prepared_.column_factors + pass.column_factors + first;
                round(x + pass.column + first, pass.trellis ? factors : nullptr, pass.half_unit, pass.width - first,
                      piece.octets, step, to);
                to += step * piece.octets;
            }
        }
        const int64_t dense = prepared_.header->dense;
        std::copy_n(x + prepared_.header->dense_column, dense, dense_ + token * dense);
    }

    // Octets of x, times factors and their unit if there are any, each `step` numbers after the one before.
    static void round(const float* x, const float* factors, float unit, int columns, int octets, int64_t step,
                      uint16_t* to) {
        for (int i = 0; i < octets; ++i) {
            const auto present = static_cast<__mmask8>((1 << std::min(OCTET, columns - OCTET * i)) - 1);
            __m256 own = _mm256_maskz_loadu_ps(present, x + OCTET * i);
            if (factors) {
                const __m256 factor = _mm256_maskz_loadu_ps(present, factors + OCTET * i);
                own = _mm256_mul_ps(own, _mm256_mul_ps(_mm256_set1_ps(unit), factor));
            }
            const auto rounded = reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(own));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + step * i), rounded);
        }
    }

    void fill(const Chunk& chunk, BlockPlace at, Workspace& space) const {
        int to = 0;
        for (int i = 0; i < chunk.pieces; ++i) {
            const Piece& piece = chunks_.pieces[chunk.first_piece + i];
            const Columns& columns = chunks_.columns[piece.columns];
            if (columns.passes->trellis) {
                fill_trellis(prepared_, *columns.passes, at, piece.first, piece.octets, space.panel, to);
            } else {
                auto* const chosen = columns.passes->signed_sums == 1   ? fill_groups<1>
                                     : columns.passes->signed_sums == 2 ? fill_groups<2>
                                                                        : fill_groups<4>;
                chosen(prepared_, columns, at, piece.first, piece.octets, space.rows, space.panel, to);
            }
            to += piece.octets;
        }
    }

    // One block and the part of the tokens that begins with `first`.
    void multiply(int64_t number, int64_t first, Workspace& space) const {
        const BlockPlace at{number / TILE_BLOCKS, number % TILE_BLOCKS};
        const int64_t tokens = std::min(part_, activations_.tokens - first);
        std::fill_n(space.y[0], LANES * tokens, 0.0f);
        for (const Chunk& chunk : chunks_.all) {
            fill(chunk, at, space);
            const int64_t next = OCTET * chunk.octets * activations_.tokens;
            const uint16_t* x = inputs_ + inputs_at(chunk, first);
            add_tokens(space.panel, chunk.octets, x, next, tokens, chunk.begins, space.sums);
            if (chunk.ends) {
                add_run(*chunks_.columns[chunks_.pieces[chunk.first_piece].columns].passes, at, tokens, space);
            }
        }
        const int64_t row = LANES * number, rows = std::min<int64_t>(LANES, prepared_.header->rows - row);
        for (int64_t token = 0; token < tokens; ++token) {
            const float* x = dense_ + (first + token) * prepared_.header->dense;
            add_dense(prepared_, at.tile, at.block, x, space.y[token]);
            write(activations_, (first + token) * prepared_.header->rows + row, space.y[token], rows);
        }
    }

    // y += sums, times the row factors that are not in weights.
    void add_run(const Pass& pass, BlockPlace at, int64_t tokens, Workspace& space) const {
        float ones[LANES];
        std::fill_n(ones, LANES, 1.0f);
        const float* const factors = pass.trellis ? prepared_.factors_of(at.tile, at.block, pass) : ones;
        auto* const add = !pass.trellis              ? add_rows<false, false>
                          : pass.planes < MOST_TERMS ? add_rows<true, true>
                                                     : add_rows<true, false>;
        for (int64_t token = 0; token < tokens; ++token) {
            add(space.sums[token], factors, space.y[token]);
        }
    }

    const Prepared& prepared_;
    const Activations& activations_;
    const Chunks chunks_;
    const int64_t part_;  // tokens
    Claims groups_, pieces_, workers_;
    OwnVector<float> read_;  // (threads, columns): a token's inputs
    Workspace* const spaces_;  // of each thread
    uint16_t* inputs_;  // chunk by chunk
    float* dense_;  // (tokens, columns), of those that are dense
};

void multiply_many(const Prepared& prepared, const Activations& activations, int threads) {
    const auto bytes = [&](const void* from, int64_t items) {
        return static_cast<const uint8_t*>(from) + items * (activations.number == Number::float32 ? 4 : 2);
    };
    for (int64_t first = 0; first < activations.tokens; first += MOST_AT_ONCE) {
        Activations own = activations;
        own.x = bytes(activations.x, first * activations.stride);
        own.y = const_cast<uint8_t*>(bytes(activations.y, first * prepared.header->rows));
        own.tokens = std::min<int64_t>(MOST_AT_ONCE, activations.tokens - first);
        const int64_t work = prepared.header->rows * prepared.header->columns * own.tokens;
        const int used = work < SMALL ? 1 : threads;
        ManyTokens product(prepared, own, used);
        in_parallel(used, &ManyTokens::run, &product);
    }
}

}  // namespace

Multiply many_tokens() { return multiplies_bfloat16() && !multiplies_tiles() ? multiply_many : nullptr; }

}  // namespace arbllm
#else
arbllm::Multiply arbllm::many_tokens() { return nullptr; }
#endif
