// y = x W^T for a few tokens, by table look-up.
//
// A weight in group g of a segment contributes, for each of its signs t, sign_t * r_gt * (c_gt x) to its row, where r is
// the row's scale and c the column's. So a row needs, for each segment, sign and group, the sum of +-(c_gt x) over the
// columns of its weights of that group; such a sum is called an accumulator. The signs and groups of a few
// neighbouring columns, four bits together, have only 16 possible values: for each four bits and each accumulator a
// table of 16 bytes holds what they add up to, and one instruction looks that up for 16 to 64 rows at once.
//
//   groups    columns in four bits, lowest first                     accumulators
//   1         4: their signs                                         1
//   2         2: their signs, then their groups                      2
//   4         1: its sign, its group (2 bits)                        4
//
// A second sign makes a second pass, with tables and codes of its own. A segment with a trellis code
// (arbllm/binarize/code.py) is one pass: each weight's level is a sum of signs and products of signs, the planes of bits
// of which look up in the same tables, and only stored signs are kept: what follows from the rows above is put together
// in registers. Row means double the accumulators: the sums of x over the columns of each group.
//
// The bytes of the tables are rounded to 1/127 of the largest entry of BLOCK_BYTES bytes of codes. This is the only error
// that matters: sums are exact, but for those products of signs that add little to a level, which are averaged in pairs.
// With AVX-512, several tokens are multiplied otherwise from the same bits: lookup_dots_avx512.h, and many in bfloat16:
// lookup_many_avx512bf16.cpp.
//
// Column order, codes, scales and widths are prepared once (prepare.h) as one array of bytes, which these structures
// describe:
//
//   Header | Pass[passes] | order int32[columns] | column factors float[] | row factors float[] | dense float[] | codes
//
// Rows go in blocks of 64 lanes, and blocks in tiles of four. Codes are [tile][pass][block of the tile][byte][lane],
// row factors [tile][pass][block][accumulator][row] and dense columns [tile][block][column][row], so that a thread
// which computes a tile reads each of them from front to back. Lane 2 i of a block is its row i, lane 2 i + 1 its row
// 32 + i: sums of even and odd lanes come apart, and each half is in order. In a pass with a trellis, lanes are rows, so
// that what lies 8 rows above is a word of 64 bits away, codes are [tile][pass][stretch][block of the tile][byte][plane]
// [lane], so that the stretch of the block above has just been read, and row factors are those of the even rows, then of
// the odd.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace arbllm {

constexpr int LANES = 64;
constexpr int TILE_BLOCKS = 4;
constexpr int TILE_ROWS = LANES * TILE_BLOCKS;
constexpr int BLOCK_BYTES = 8;  // bytes of codes, so 16 look-ups, that share one scale; sums stay far under 2^16
constexpr int STRETCH = 8;  // blocks whose sums, doubled, are added up in 16 bits
constexpr int STRETCH_BYTES = STRETCH * BLOCK_BYTES;
constexpr int AHEAD = 4 * STRETCH_BYTES;  // bytes of codes, of each lane, by which they are asked for before they are read
constexpr int MOST_ACCUMULATORS = 8;
constexpr int MOST_TOKENS = 16;

constexpr int LAGS[] = {16, 40};  // rows above whose first signs z1 depends on, besides its own
constexpr int LAG = 24;  // the row above whose first sign z0 is

// Summands of the levels of weights of 1 to 4 stored signs: products of the signs of some planes, bit t standing for
// plane t: the stored signs but the first, then z1 and z0.
constexpr int MOST_TERMS = 4;
constexpr int MOST_SUMMANDS = 10;
constexpr int MOST_LEVELS = 2 << MOST_TERMS;
constexpr int SUMMANDS[MOST_TERMS] = {2, 4, 8, 10};
constexpr int MASKS[MOST_TERMS][MOST_SUMMANDS] = {
    {1, 2}, {1, 2, 4, 7}, {1, 2, 4, 8, 7, 11, 13, 14}, {1, 2, 4, 8, 16, 7, 11, 19, 13, 14}};
constexpr int64_t MAGIC = 0x3150554b4f4f4c41;

struct Header {
    int64_t magic;
    int64_t bytes;  // of the whole array
    int64_t rows, columns;
    int64_t passes;
    int64_t dense;  // columns of narrow segments: kept as numbers, since their row scales would take as much
    int64_t dense_column;  // where in the order the dense columns begin: after all others
    int64_t lane_bytes;  // of codes, one row
    int64_t row_factors;  // of one row
    int64_t order_at, column_factors_at, row_factors_at, dense_at, codes_at;  // offsets in bytes
};

struct Pass {
    int32_t column;  // first column, in the prepared order
    int32_t width;
    int32_t per_nibble;  // columns of four bits: 4, 2 or 1
    int32_t bytes;  // of codes, one row and one plane
    int32_t planes;  // of codes: with a trellis, stored signs of a weight; else 1
    int32_t trellis;  // whether there is one
    int32_t signed_sums;  // accumulators of signs: 1, 2 or 4
    int32_t accumulators;  // with those of means
    int32_t codes_before;  // bytes of a row's codes in earlier passes
    int32_t factors_before;  // row factors in earlier passes
    int64_t column_factors;  // index of the first of signed_sums * width
    // With a trellis: of the products of MASKS; and the levels at the numbers that signs make, bit t being plane t, also
    // as bytes that a unit is multiplied by; and what they are divided by to lose least in bfloat16.
    float coefficients[MOST_SUMMANDS];
    float levels[MOST_LEVELS];
    float level_unit;
    int8_t level_bytes[MOST_LEVELS];
    float half_unit;
};

static inline int blocks_of(const Pass& pass) { return (pass.bytes + BLOCK_BYTES - 1) / BLOCK_BYTES; }
static inline int stretches_of(const Pass& pass) { return (pass.bytes + STRETCH_BYTES - 1) / STRETCH_BYTES; }
static inline int stretch_bytes(const Pass& pass, int number) {
    return std::min(STRETCH_BYTES, pass.bytes - STRETCH_BYTES * number);
}

static_assert(sizeof(Header) % 8 == 0 && sizeof(Pass) % 8 == 0);

// A prepared array, seen through its header.
struct Prepared {
    const Header* header;
    const Pass* passes;
    const int32_t* order;
    const float* column_factors;
    const float* row_factors;
    const float* dense;
    const uint8_t* codes;

    explicit Prepared(const uint8_t* start)
        : header(reinterpret_cast<const Header*>(start)),
          passes(reinterpret_cast<const Pass*>(start + sizeof(Header))),
          order(reinterpret_cast<const int32_t*>(start + header->order_at)),
          column_factors(reinterpret_cast<const float*>(start + header->column_factors_at)),
          row_factors(reinterpret_cast<const float*>(start + header->row_factors_at)),
          dense(reinterpret_cast<const float*>(start + header->dense_at)),
          codes(start + header->codes_at) {}

    int64_t blocks() const { return (header->rows + LANES - 1) / LANES; }
    int64_t tiles() const { return (blocks() + TILE_BLOCKS - 1) / TILE_BLOCKS; }
    int64_t tile_blocks(int64_t tile) const {
        const int64_t left = blocks() - tile * TILE_BLOCKS;
        return left < TILE_BLOCKS ? left : TILE_BLOCKS;
    }

    // Index of an item of a block where each row has `items`, and a pass `own` of them after `before` earlier ones.
    int64_t at(int64_t tile, int64_t block, int64_t items, int64_t before, int64_t own) const {
        return LANES * (tile * TILE_BLOCKS * items + tile_blocks(tile) * before + block * own);
    }
    // Codes of a block, in a pass without a trellis.
    const uint8_t* codes_of(int64_t tile, int64_t block, const Pass& pass) const {
        return codes + at(tile, block, header->lane_bytes, pass.codes_before, pass.planes * pass.bytes);
    }
    // Codes of a stretch of a block, in a pass with a trellis.
    const uint8_t* stretch_of(int64_t tile, int64_t block, const Pass& pass, int number) const {
        const int64_t before = tile_blocks(tile) * STRETCH_BYTES * number + block * stretch_bytes(pass, number);
        return codes + at(tile, 0, header->lane_bytes, pass.codes_before, 0) + LANES * pass.planes * before;
    }
    const float* factors_of(int64_t tile, int64_t block, const Pass& pass) const {
        return row_factors + at(tile, block, header->row_factors, pass.factors_before, pass.accumulators);
    }
    const float* dense_of(int64_t tile, int64_t block) const {
        return dense + at(tile, block, header->dense, 0, header->dense);
    }
};

enum class Number : int32_t { float32 = 0, bfloat16 = 1 };

// x (tokens, columns), rows of `stride` numbers; y (tokens, rows), contiguous; both of the same type of number.
struct Activations {
    const void* x;
    void* y;
    int64_t tokens, stride;
    Number number;
    bool halves;  // whether factors may be rounded to bfloat16 in place of 8 bits, where that is faster
};

// One instruction set's implementation.
struct Kernel {
    const char* name;
    int most_tokens;  // of a product in 8 bits
    bool takes_more;  // whether it multiplies more, if these may be in bfloat16
    void (*multiply)(const Prepared&, const Activations&, int threads);
    // Blocks [first, last) of W^T in the prepared order: (columns, 64 * (last - first)), rows beyond n being 0.
    void (*unpack)(const Prepared&, int64_t first, int64_t last, void* to, Number number, int threads);
};

// y (tokens, columns) = x with its columns in the prepared order.
void put_in_order(const Prepared& prepared, const Activations& activations, int threads);

// Null where the compiler had no such target.
const Kernel* kernel_avx512();
const Kernel* kernel_avx2();
const Kernel* kernel_neon();
const Kernel* kernel_portable();

// The kernel of this name; null if this processor cannot run it, or it is not built.
const Kernel* kernel_named(const char* name);

}  // namespace arbllm
