// The kernel of lookup.h, in terms of an instruction set's vectors. Included once by each lookup_<name>.cpp, which
// defines a type V of static functions:
//
//   Bytes               a vector of V::lanes bytes, V::lanes a divisor of 64; also seen as numbers of 16 bits
//   zero, load          all zero; from memory
//   table               16 bytes of memory, in a form that lookup takes
//   low, high           the lower or higher four bits of each byte
//   lookup              table[index] in each byte
//   add16, sub16        sum, difference of numbers of 16 bits
//   up8, down8          numbers of 16 bits times, or divided by, 256
//   add_scaled          to[i] += scale * numbers[i], unsigned numbers of 16 bits, to float
//
// Everything is in an anonymous namespace, since each file is compiled for its own instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "lookup.h"
#include "parallel.h"

namespace arbllm {
namespace {

constexpr float ZERO = 128.0f;  // table entries are unsigned: this stands for 0
constexpr float LARGEST = 127.0f;
constexpr int BLOCK_NIBBLES = 2 * BLOCK_BYTES;
constexpr int64_t SMALL = 1 << 17;  // weights times tokens that one thread does sooner alone

// Column c's share of entry i of the table of an accumulator: -1, 0 or 1.
float pattern(const Pass& pass, int accumulator, int c, int i) {
    const bool mean = accumulator >= pass.signed_sums;
    const int group = mean ? accumulator - pass.signed_sums : accumulator;
    const int per = pass.per_nibble;
    const int own = per == 4 ? 0 : per == 2 ? (i >> (2 + c)) & 1 : (i >> 1) & 3;
    if (own != group) {
        return 0.0f;
    }
    return mean || (i >> c) & 1 ? 1.0f : -1.0f;
}

// What the tables of one pass are, for one token.
struct Tables {
    const uint8_t* entries;  // [nibble][accumulator][16]
    const float* scales;  // [block][accumulator]
    const float* zeros;  // [accumulator]: what the sum of all look-ups is where every entry stands for 0
};

int blocks_of(const Pass& pass) { return (pass.bytes + BLOCK_BYTES - 1) / BLOCK_BYTES; }

// Where in a token's work space the tables of each pass are.
class Space {
  public:
    explicit Space(const Prepared& prepared) {
        int64_t bytes = 0, numbers = 0;
        for (int64_t p = 0; p < prepared.header->passes; ++p) {
            const Pass& pass = prepared.passes[p];
            entries_.push_back(bytes);
            numbers_.push_back(numbers);
            bytes += 2 * int64_t{pass.bytes} * pass.accumulators * 16;
            numbers += (blocks_of(pass) + 1) * int64_t{pass.accumulators};
        }
        entry_bytes_ = bytes;
        bytes_ = bytes + 64 * ((4 * numbers + 63) / 64);
    }

    int64_t bytes() const { return bytes_; }

    Tables tables(uint8_t* space, const Prepared& prepared, int64_t p) const {
        const Pass& pass = prepared.passes[p];
        const float* numbers = reinterpret_cast<const float*>(space + entry_bytes_) + numbers_[p];
        return {space + entries_[p], numbers, numbers + blocks_of(pass) * pass.accumulators};
    }

  private:
    std::vector<int64_t> entries_, numbers_;
    int64_t entry_bytes_, bytes_;
};

void build_tables(const Prepared& prepared, const Pass& pass, const float* x, const Tables& tables) {
    const int per = pass.per_nibble, count = pass.accumulators;
    alignas(64) float patterns[MOST_ACCUMULATORS][4][16];
    for (int a = 0; a < count; ++a) {
        for (int c = 0; c < per; ++c) {
            for (int i = 0; i < 16; ++i) {
                patterns[a][c][i] = pattern(pass, a, c, i);
            }
        }
    }
    auto* entries = const_cast<uint8_t*>(tables.entries);
    auto* scales = const_cast<float*>(tables.scales);
    auto* zeros = const_cast<float*>(tables.zeros);
    std::fill(zeros, zeros + count, 0.0f);
    const int nibbles = 2 * pass.bytes;
    for (int first = 0; first < nibbles; first += BLOCK_NIBBLES) {
        const int inside = std::min(BLOCK_NIBBLES, nibbles - first);
        for (int a = 0; a < count; ++a) {
            float values[BLOCK_NIBBLES * 4] = {};
            const int begin = first * per, end = std::min(begin + inside * per, int{pass.width});
            const float* factors = prepared.column_factors + pass.column_factors + int64_t{a} * pass.width;
            for (int j = begin; j < end; ++j) {
                values[j - begin] = a < pass.signed_sums ? x[j] * factors[j] : x[j];
            }
            float largest = 0.0f;
            for (int n = 0; n < inside; ++n) {
                float sum = 0.0f;
                for (int c = 0; c < per; ++c) {
                    sum += std::fabs(values[n * per + c]);
                }
                largest = std::max(largest, sum);
            }
            const float scale = largest / LARGEST, inverse = largest > 0.0f ? LARGEST / largest : 0.0f;
            scales[first / BLOCK_NIBBLES * count + a] = scale;
            zeros[a] += scale * ZERO * static_cast<float>(inside);
            for (int n = 0; n < inside; ++n) {
                float sums[16];
                for (int i = 0; i < 16; ++i) {
                    sums[i] = ZERO + 0.5f;
                }
                for (int c = 0; c < per; ++c) {
                    const float value = inverse * values[n * per + c];
                    for (int i = 0; i < 16; ++i) {
                        sums[i] += patterns[a][c][i] * value;
                    }
                }
                uint8_t* entry = entries + (int64_t{first + n} * count + a) * 16;
                for (int i = 0; i < 16; ++i) {
                    entry[i] = static_cast<uint8_t>(static_cast<int32_t>(sums[i]));
                }
            }
        }
    }
}

// Adds to sums (K, 64) what BLOCK_BYTES bytes of codes, or the fewer that are left, look up in K neighbouring tables.
template <class V, int K>
void add_block(const uint8_t* codes, const uint8_t* tables, int stride, int bytes, const float* scales, float* sums) {
    constexpr int N = LANES / V::lanes;
    typename V::Bytes all[K][N], odd[K][N];
    for (int k = 0; k < K; ++k) {
        for (int v = 0; v < N; ++v) {
            all[k][v] = odd[k][v] = V::zero();
        }
    }
    for (int b = 0; b < bytes; ++b) {
        typename V::Bytes code[N];
        for (int v = 0; v < N; ++v) {
            code[v] = V::load(codes + LANES * b + V::lanes * v);
        }
        for (int half = 0; half < 2; ++half) {
            for (int k = 0; k < K; ++k) {
                const auto table = V::table(tables + (2 * b + half) * stride + 16 * k);
                for (int v = 0; v < N; ++v) {
                    const auto found = V::lookup(table, half ? V::high(code[v]) : V::low(code[v]));
                    // Neighbouring bytes are summed as one number: the upper byte's sum, kept apart, tells the lower's.
                    all[k][v] = V::add16(all[k][v], found);
                    odd[k][v] = V::add16(odd[k][v], V::down8(found));
                }
            }
        }
    }
    for (int k = 0; k < K; ++k) {
        for (int v = 0; v < N; ++v) {
            float* to = sums + LANES * k + V::lanes / 2 * v;
            V::add_scaled(to, V::sub16(all[k][v], V::up8(odd[k][v])), scales[k]);
            V::add_scaled(to + LANES / 2, odd[k][v], scales[k]);
        }
    }
}

// y (64) += what one pass adds to the rows of one block.
template <class V>
void add_pass(const Prepared& prepared, const Pass& pass, const Tables& tables, int64_t tile, int64_t block, float* y) {
    const int count = pass.accumulators, stride = 16 * count;
    const uint8_t* codes = prepared.codes_of(tile, block, pass);
    const float* factors = prepared.factors_of(tile, block, pass);
    for (int a = 0; a < count; a += 2) {
        alignas(64) float sums[2 * LANES];
        const int together = std::min(2, count - a);
        for (int k = 0; k < together; ++k) {
            std::fill(sums + LANES * k, sums + LANES * (k + 1), -tables.zeros[a + k]);
        }
        for (int first = 0; first < pass.bytes; first += BLOCK_BYTES) {
            const int bytes = std::min(BLOCK_BYTES, pass.bytes - first);
            const uint8_t* entries = tables.entries + int64_t{2 * first} * stride + 16 * a;
            const float* scales = tables.scales + first / BLOCK_BYTES * count + a;
            if (together == 2) {
                add_block<V, 2>(codes + LANES * first, entries, stride, bytes, scales, sums);
            } else {
                add_block<V, 1>(codes + LANES * first, entries, stride, bytes, scales, sums);
            }
        }
        for (int k = 0; k < together; ++k) {
            for (int r = 0; r < LANES; ++r) {
                y[r] += factors[LANES * (a + k) + r] * sums[LANES * k + r];
            }
        }
    }
}

float widened(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// To the nearest bfloat16, ties to even.
uint16_t narrowed(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (value != value) {
        return static_cast<uint16_t>(word >> 16 | 0x40);
    }
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

void gather(const Prepared& prepared, const Activations& activations, int64_t token, float* to) {
    const int64_t columns = prepared.header->columns;
    const int32_t* order = prepared.order;
    if (activations.number == Number::float32) {
        const float* x = static_cast<const float*>(activations.x) + token * activations.stride;
        for (int64_t j = 0; j < columns; ++j) {
            to[j] = x[order[j]];
        }
    } else {
        const uint16_t* x = static_cast<const uint16_t*>(activations.x) + token * activations.stride;
        for (int64_t j = 0; j < columns; ++j) {
            to[j] = widened(x[order[j]]);
        }
    }
}

void write(const Activations& activations, int64_t at, const float* values, int64_t count) {
    if (activations.number == Number::float32) {
        std::copy(values, values + count, static_cast<float*>(activations.y) + at);
    } else {
        std::transform(values, values + count, static_cast<uint16_t*>(activations.y) + at, narrowed);
    }
}

// One multiplication, as its threads see it: first the tables of all tokens, then tile by tile all tokens.
template <class V>
class Product {
  public:
    Product(const Prepared& prepared, const Activations& activations)
        : prepared_(prepared),
          activations_(activations),
          space_(prepared),
          columns_((prepared.header->columns + 15) / 16 * 16),
          tokens_(activations.tokens),
          tables_(activations.tokens * prepared.header->passes),
          tiles_(prepared.tiles()) {
        const int64_t each = space_.bytes() + 4 * columns_;
        static thread_local std::vector<uint8_t> memory;
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
            gather(product.prepared_, product.activations_, token, product.x_[token]);
        }
        product.tokens_.wait();
        const int64_t passes = product.prepared_.header->passes;
        for (int64_t i; (i = product.tables_.next()) >= 0; product.tables_.done()) {
            const Pass& pass = product.prepared_.passes[i % passes];
            build_tables(product.prepared_, pass, product.x_[i / passes] + pass.column, product.tables(i / passes, i % passes));
        }
        product.tables_.wait();
        for (int64_t tile; (tile = product.tiles_.next()) >= 0;) {
            product.multiply(tile);
        }
    }

  private:
    Tables tables(int64_t token, int64_t pass) const { return space_.tables(spaces_[token], prepared_, pass); }

    void multiply(int64_t tile) const {
        const Header& header = *prepared_.header;
        const int64_t blocks = prepared_.tile_blocks(tile), tokens = activations_.tokens;
        alignas(64) float y[MOST_TOKENS][TILE_ROWS] = {};
        for (int64_t p = 0; p < header.passes; ++p) {
            for (int64_t token = 0; token < tokens; ++token) {
                const Tables found = tables(token, p);
                for (int64_t block = 0; block < blocks; ++block) {
                    add_pass<V>(prepared_, prepared_.passes[p], found, tile, block, y[token] + LANES * block);
                }
            }
        }
        for (int64_t block = 0; block < blocks; ++block) {
            const float* dense = prepared_.dense_of(tile, block);
            for (int64_t token = 0; token < tokens; ++token) {
                const float* x = x_[token] + header.dense_column;
                float* to = y[token] + LANES * block;
                for (int64_t j = 0; j < header.dense; ++j) {
                    for (int r = 0; r < LANES; ++r) {
                        to[r] += x[j] * dense[LANES * j + r];
                    }
                }
            }
        }
        const int64_t row = tile * TILE_ROWS, rows = std::min(int64_t{TILE_ROWS}, header.rows - row);
        for (int64_t token = 0; token < tokens; ++token) {
            write(activations_, token * header.rows + row, y[token], rows);
        }
    }

    const Prepared& prepared_;
    const Activations& activations_;
    const Space space_;
    const int64_t columns_;
    std::vector<float*> x_;
    std::vector<uint8_t*> spaces_;
    Claims tokens_, tables_, tiles_;
};

template <class V>
void multiply(const Prepared& prepared, const Activations& activations, int threads) {
    Product<V> product(prepared, activations);
    const int64_t work = prepared.header->rows * prepared.header->columns * activations.tokens;
    in_parallel(work < SMALL ? 1 : threads, &Product<V>::run, &product);
}

// Adds one pass of one block, with G groups, to W^T: rows of `stride` floats.
template <int G, bool means>
void unpack_groups(const Prepared& prepared, const Pass& pass, int64_t tile, int64_t block, float* to, int64_t stride) {
    const uint8_t* codes = prepared.codes_of(tile, block, pass);
    const float* factors = prepared.factors_of(tile, block, pass);
    const float* column_factors = prepared.column_factors + pass.column_factors;
    const int per = pass.per_nibble;
    for (int j = 0; j < pass.width; ++j) {
        const int first_bit = 4 * (j / per % 2), sign_bit = first_bit + j % per;
        const int group_bit = first_bit + (G == 2 ? 2 + j % per : 1);
        const uint8_t* code = codes + LANES * (j / (2 * per));
        float* row = to + j * stride;
        for (int r = 0; r < LANES; ++r) {
            const int own = code[2 * (r % (LANES / 2)) + r / (LANES / 2)], group = own >> group_bit & (G - 1);
            float value = factors[r] * column_factors[j], mean = means ? factors[LANES * G + r] : 0.0f;
            for (int g = 1; g < G; ++g) {
                const float candidate = factors[LANES * g + r] * column_factors[g * pass.width + j];
                value = group == g ? candidate : value;
                mean = means && group == g ? factors[LANES * (G + g) + r] : mean;
            }
            row[r] += (own >> sign_bit & 1 ? value : -value) + mean;
        }
    }
}

void unpack_pass(const Prepared& prepared, const Pass& pass, int64_t tile, int64_t block, float* to, int64_t stride) {
    const bool means = pass.accumulators > pass.signed_sums;
    auto* const chosen = pass.signed_sums == 1   ? (means ? unpack_groups<1, true> : unpack_groups<1, false>)
                         : pass.signed_sums == 2 ? (means ? unpack_groups<2, true> : unpack_groups<2, false>)
                                                 : (means ? unpack_groups<4, true> : unpack_groups<4, false>);
    chosen(prepared, pass, tile, block, to, stride);
}

struct Unpacking {
    const Prepared& prepared;
    int64_t first, last;
    float* to;
    Claims blocks;

    static void run(void* argument) {
        auto& job = *static_cast<Unpacking*>(argument);
        const Header& header = *job.prepared.header;
        const int64_t stride = LANES * (job.last - job.first);
        for (int64_t i; (i = job.blocks.next()) >= 0;) {
            const int64_t tile = (job.first + i) / TILE_BLOCKS, block = (job.first + i) % TILE_BLOCKS;
            float* to = job.to + LANES * i;
            for (int64_t j = 0; j < header.dense_column; ++j) {
                std::fill(to + j * stride, to + j * stride + LANES, 0.0f);
            }
            for (int64_t p = 0; p < header.passes; ++p) {
                const Pass& pass = job.prepared.passes[p];
                unpack_pass(job.prepared, pass, tile, block, to + pass.column * stride, stride);
            }
            const float* dense = job.prepared.dense_of(tile, block);
            for (int64_t j = 0; j < header.dense; ++j) {
                std::copy(dense + LANES * j, dense + LANES * (j + 1), to + (header.dense_column + j) * stride);
            }
        }
    }
};

void unpack(const Prepared& prepared, int64_t first, int64_t last, float* to, int threads) {
    Unpacking job{prepared, first, last, to, Claims(last - first)};
    in_parallel(threads, &Unpacking::run, &job);
}

}  // namespace
}  // namespace arbllm
