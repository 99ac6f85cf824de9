// The kernel of lookup.h, in terms of an instruction set's vectors. Included once by each lookup_<name>.cpp, which
// defines a type V of static functions:
//
//   Bytes               a vector of V::lanes bytes, V::lanes a divisor of 64; also seen as numbers of 16 bits
//   together            vectors that are worked on at once, as many as registers hold; a divisor of 64 / V::lanes
//   fetched_to          where codes of a trellis are to be when they are read: 3 is the first cache, 2 the second
//   zero, load          all zero; from memory
//   table               16 bytes of memory, in a form that lookup takes
//   low, high           the lower or higher four bits of each byte
//   lookup              table[index] in each byte
//   differ              bits in which two vectors differ
//   join<words>         so many last words of 8 bytes before an address, then the first ones from another address; both
//                       addresses are inside an array, never less than 8 bytes from its ends
//   average8            average of two bytes, rounded up
//   add16, sub16        sum, difference of numbers of 16 bits
//   up8, down8          numbers of 16 bits times, or divided by, 256
//   share16             numbers of 16 bits times share / 2^15, rounded
//   add_scaled          to[i] += scale * numbers[i], unsigned numbers of 16 bits, to float
//   pick                to[i] = table[words[i] >> shift & 15] for 64 words, to float
//
// Everything is in an anonymous namespace, since each file is compiled for its own instruction set.
#pragma once

#include <algorithm>
#include <cstring>

#include "bfloat16.h"
#include "gather.h"
#include "lookup.h"
#include "lookup_groups.h"
#include "lookup_tables.h"
#include "lookup_trellis.h"
#include "lookup_unpack.h"
#include "own_vector.h"
#include "parallel.h"

namespace arbllm {
namespace {

constexpr int64_t SMALL = 1 << 18;  // weights times tokens that one thread does sooner alone
constexpr int64_t SHARES = 4;  // pieces of work for a thread, at least, if there are so many blocks of rows

void read(const Prepared& prepared, const Activations& activations, int64_t token, float* to) {
    const int64_t first = token * activations.stride;
    if (activations.number == Number::float32) {
        gather(prepared, static_cast<const float*>(activations.x) + first, to, [](float value) { return value; });
    } else {
        gather(prepared, static_cast<const uint16_t*>(activations.x) + first, to, widened);
    }
}

void write(const Activations& activations, int64_t at, const float* values, int64_t count) {
    if (activations.number == Number::float32) {
        std::copy(values, values + count, static_cast<float*>(activations.y) + at);
    } else {
        std::transform(values, values + count, static_cast<uint16_t*>(activations.y) + at, narrowed);
    }
}

// y (64) += what the dense columns of a block add to its rows; x are the inputs of these columns.
void add_dense(const Prepared& prepared, int64_t tile, int64_t block, const float* x, float* y) {
    const float* dense = prepared.dense_of(tile, block);
    for (int64_t j = 0; j < prepared.header->dense; ++j) {
        for (int r = 0; r < LANES; ++r) {
            y[r] += x[j] * dense[LANES * j + r];
        }
    }
}

// What Product wants to know of tokens' activations, here their tables.
template <class V>
class Lookups {
  public:
    static constexpr int MOST = MOST_TOKENS;

    explicit Lookups(const Prepared& prepared)
        : prepared_(prepared), space_(prepared), stretches_(stretches_of(prepared)) {}

    int64_t bytes() const { return space_.bytes(); }  // of a token's work space
    int64_t tasks() const { return static_cast<int64_t>(stretches_.size()); }  // of building it, in any order

    // x are the token's inputs, in the prepared order.
    void build(int64_t task, const float* x, uint8_t* space) const {
        const Stretch& stretch = stretches_[task];
        const Pass& pass = prepared_.passes[stretch.pass];
        build_tables(prepared_, pass, stretch.number, x + pass.column, space_.tables(space, prepared_, stretch.pass));
    }

    // y of each token += what a pass adds to the rows of some blocks of a tile.
    void add(int p, uint8_t* const* spaces, int64_t tokens, int64_t tile, int64_t first, int64_t blocks,
             float (*y)[TILE_ROWS]) const {
        const Pass& pass = prepared_.passes[p];
        Tables found[MOST];
        for (int64_t token = 0; token < tokens; ++token) {
            found[token] = space_.tables(spaces[token], prepared_, p);
        }
        if (pass.trellis) {
            return add_trellis<V>(prepared_, pass, found, tokens, tile, first, blocks, y);
        }
        for (int64_t token = 0; token < tokens; ++token) {
            for (int64_t block = 0; block < blocks; ++block) {
                add_pass<V>(prepared_, pass, found[token], tile, first + block, y[token] + LANES * block);
            }
        }
    }

  private:
    const Prepared& prepared_;
    const Space space_;
    const OwnVector<Stretch> stretches_;
};

// One multiplication, as its threads see it: first what all tokens' activations become, then piece by piece of the rows
// all tokens.
template <class Inputs>
class Product {
  public:
    Product(const Prepared& prepared, const Activations& activations, int threads)
        : prepared_(prepared),
          activations_(activations),
          inputs_(prepared),
          columns_((prepared.header->columns + 15) / 16 * 16),
          tokens_(activations.tokens),
          tasks_(activations.tokens * inputs_.tasks()),
          piece_(prepared.tiles() < SHARES * threads ? 1 : TILE_BLOCKS),
          pieces_((prepared.blocks() + piece_ - 1) / piece_) {
        const int64_t each = inputs_.bytes() + 4 * columns_;
        static thread_local OwnVector<uint8_t> memory;
        if (static_cast<int64_t>(memory.size()) < activations.tokens * each + 64) {
            memory.resize(activations.tokens * each + 64);
        }
        auto* start = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
        for (int64_t token = 0; token < activations.tokens; ++token) {
            x_.push_back(reinterpret_cast<float*>(start + token * each));
            spaces_.push_back(start + token * each + 4 * columns_);
        }
    }

    static void run(void* argument) {
        auto& product = *static_cast<Product*>(argument);
        for (int64_t token; (token = product.tokens_.next()) >= 0; product.tokens_.done()) {
            read(product.prepared_, product.activations_, token, product.x_[token]);
        }
        product.tokens_.wait();
        const int64_t tasks = product.inputs_.tasks();
        for (int64_t i; (i = product.tasks_.next()) >= 0; product.tasks_.done()) {
            const int64_t token = i / tasks;
            product.inputs_.build(i % tasks, product.x_[token], product.spaces_[token]);
        }
        product.tasks_.wait();
        for (int64_t piece; (piece = product.pieces_.next()) >= 0;) {
            product.multiply(piece * product.piece_);
        }
    }

  private:
    // The rows of one piece: blocks of one tile, from the first one on.
    void multiply(int64_t first) const {
        const Header& header = *prepared_.header;
        const int64_t tile = first / TILE_BLOCKS, skipped = first % TILE_BLOCKS, tokens = activations_.tokens;
        const int64_t blocks = std::min(piece_, prepared_.tile_blocks(tile) - skipped);
        alignas(64) float y[Inputs::MOST][TILE_ROWS];
        for (int64_t token = 0; token < tokens; ++token) {
            std::fill_n(y[token], LANES * blocks, 0.0f);
        }
        for (int p = 0; p < header.passes; ++p) {
            inputs_.add(p, spaces_.data(), tokens, tile, skipped, blocks, y);
        }
        for (int64_t block = 0; block < blocks; ++block) {
            for (int64_t token = 0; token < tokens; ++token) {
                add_dense(prepared_, tile, skipped + block, x_[token] + header.dense_column, y[token] + LANES * block);
            }
        }
        const int64_t row = first * LANES, rows = std::min(blocks * LANES, header.rows - row);
        for (int64_t token = 0; token < tokens; ++token) {
            write(activations_, token * header.rows + row, y[token], rows);
        }
    }

    const Prepared& prepared_;
    const Activations& activations_;
    const Inputs inputs_;
    const int64_t columns_;
    OwnVector<float*> x_;
    OwnVector<uint8_t*> spaces_;
    Claims tokens_, tasks_;
    const int64_t piece_;  // blocks of rows that a thread claims at a time
    Claims pieces_;
};

template <class Inputs>
void multiply(const Prepared& prepared, const Activations& activations, int threads) {
    const int64_t work = prepared.header->rows * prepared.header->columns * activations.tokens;
    const int used = work < SMALL ? 1 : threads;
    Product<Inputs> product(prepared, activations, used);
    in_parallel(used, &Product<Inputs>::run, &product);
}

}  // namespace
}  // namespace arbllm
