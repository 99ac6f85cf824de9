// The kernel of lookup.h, in terms of an instruction set's vectors. Included once by each lookup_<name>.cpp, which
// defines a type V of static functions:
//
//   Bytes               a vector of V::lanes bytes, V::lanes a divisor of 64; also seen as numbers of 16 bits
//   together            vectors that are worked on at once, as many as registers hold; a divisor of 64 / V::lanes
//   zero, load          all zero; from memory
//   table               16 bytes of memory, in a form that lookup takes
//   low, high           the lower or higher four bits of each byte
//   lookup              table[index] in each byte
//   add16, sub16        sum, difference of numbers of 16 bits
//   up8, down8          numbers of 16 bits times, or divided by, 256
//   share16             numbers of 16 bits times share / 2^15, rounded
//   add_scaled          to[i] += scale * numbers[i], unsigned numbers of 16 bits, to float
//
// Everything is in an anonymous namespace, since each file is compiled for its own instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "lookup.h"
#include "lookup_trellis.h"
#include "parallel.h"

namespace arbllm {
namespace {

constexpr int ZERO = 128;  // table entries are unsigned: this stands for 0
constexpr float LARGEST = 127.0f;
constexpr int FINE = 7;  // bits that entries have beyond the point before they are rounded
constexpr int SHARE = 32767;  // the greatest share of a block
constexpr int BLOCK_NIBBLES = 2 * BLOCK_BYTES;
constexpr int STRETCH = 8;  // blocks whose sums, doubled, are added up in 16 bits
constexpr int STRETCH_NIBBLES = STRETCH * BLOCK_NIBBLES;
static_assert(Planes::BYTES == STRETCH * BLOCK_BYTES, "a stretch of a trellis is put together at a time");
constexpr int AHEAD = 2 * STRETCH * BLOCK_BYTES;  // bytes of a row's codes that are fetched before they are needed
constexpr int64_t SMALL = 1 << 18;  // weights times tokens that one thread does sooner alone
constexpr int64_t SHARES = 4;  // pieces of work for a thread, at least, if there are so many blocks of rows

// What an entry's index says of the columns of four bits: [kind of accumulator][column][index] -> -1, 0 or 1. Kinds are
// the groups of signs, then the groups of means.
typedef uint16_t Entries __attribute__((vector_size(32)));
typedef uint8_t EntryBytes __attribute__((vector_size(16)));

struct Patterns {
    Entries of[MOST_ACCUMULATORS][4];

    Patterns(int per, int groups) {
        for (int a = 0; a < 2 * groups; ++a) {
            for (int c = 0; c < per; ++c) {
                for (int i = 0; i < 16; ++i) {
                    const int own = per == 4 ? 0 : per == 2 ? i >> (2 + c) & 1 : i >> 1 & 3;
                    const int sign = a >= groups || i >> c & 1 ? 1 : -1;
                    of[a][c][i] = static_cast<uint16_t>(own == a % groups ? sign : 0);
                }
            }
        }
    }
};

// The tables of one pass, for one token.
struct Tables {
    const uint8_t* entries;  // [nibble][accumulator][16]
    const float* scales;  // [stretch][accumulator]
    const float* zeros;  // likewise: the sum of look-ups where every entry stands for 0
    const int32_t* shares;  // [block][accumulator]: of the scale of its stretch
};

int blocks_of(const Pass& pass) { return (pass.bytes + BLOCK_BYTES - 1) / BLOCK_BYTES; }
int stretches_of(const Pass& pass) { return (blocks_of(pass) + STRETCH - 1) / STRETCH; }

struct Stretch {
    int pass, number;
};

std::vector<Stretch> stretches_of(const Prepared& prepared) {
    std::vector<Stretch> all;
    for (int p = 0; p < prepared.header->passes; ++p) {
        for (int number = 0; number < stretches_of(prepared.passes[p]); ++number) {
            all.push_back({p, number});
        }
    }
    return all;
}

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
            numbers += (blocks_of(pass) + 2 * stretches_of(pass)) * int64_t{pass.accumulators};
        }
        entry_bytes_ = bytes;
        bytes_ = bytes + 64 * ((4 * numbers + 63) / 64);
    }

    int64_t bytes() const { return bytes_; }

    Tables tables(uint8_t* space, const Prepared& prepared, int64_t p) const {
        const Pass& pass = prepared.passes[p];
        const float* scales = reinterpret_cast<const float*>(space + entry_bytes_) + numbers_[p];
        const float* zeros = scales + stretches_of(pass) * pass.accumulators;
        const float* shares = zeros + stretches_of(pass) * pass.accumulators;
        return {space + entries_[p], scales, zeros, reinterpret_cast<const int32_t*>(shares)};
    }

  private:
    std::vector<int64_t> entries_, numbers_;
    int64_t entry_bytes_, bytes_;
};

int share_of(int number, int share) { return (number * share + (1 << 14)) >> 15; }

// The tables of one accumulator and stretch, from what its columns are multiplied by, 0 beyond the last one.
template <int PER>
void build_accumulator(const Pass& pass, int stretch, int a, const float* values, const Tables& tables) {
    static const Patterns patterns(PER, PER == 4 ? 1 : PER == 2 ? 2 : 4);
    const int count = pass.accumulators, first = STRETCH * stretch;
    const int nibbles = std::min(STRETCH_NIBBLES, 2 * pass.bytes - BLOCK_NIBBLES * first);
    const int blocks = (nibbles + BLOCK_NIBBLES - 1) / BLOCK_NIBBLES;
    auto* entries = const_cast<uint8_t*>(tables.entries) + 16 * (int64_t{count} * BLOCK_NIBBLES * first + a);
    auto* shares = const_cast<int32_t*>(tables.shares) + count * first + a;
    const auto& pattern = patterns.of[a];
    float largest[STRETCH] = {}, most = 0.0f;
    for (int block = 0; block < blocks; ++block) {
        const int end = std::min(BLOCK_NIBBLES * (block + 1), nibbles);
        for (int n = BLOCK_NIBBLES * block; n < end; ++n) {
            float sum = 0.0f;
            for (int c = 0; c < PER; ++c) {
                sum += std::fabs(values[PER * n + c]);
            }
            largest[block] = std::max(largest[block], sum);
        }
        most = std::max(most, largest[block]);
    }
    int zero = 0;
    for (int block = 0; block < blocks; ++block) {
        const float own = largest[block], inverse = own > 0.0f ? LARGEST * (1 << FINE) / own : 0.0f;
        const int share = most > 0.0f ? static_cast<int>(std::ceil(own / most * SHARE)) : 0;
        const int begin = BLOCK_NIBBLES * block, inside = std::min(BLOCK_NIBBLES, nibbles - begin);
        // The share is a whole number, so the scale of the block is that which it makes exact.
        const float exact = share ? inverse * (own / most * SHARE) / static_cast<float>(share) : 0.0f;
        shares[block * count] = share;
        zero += share_of(2 * ZERO * inside, share);
        int16_t fine[PER * BLOCK_NIBBLES];
        for (int i = 0; i < PER * inside; ++i) {
            fine[i] = static_cast<int16_t>(static_cast<int32_t>(std::nearbyint(values[PER * begin + i] * exact)));
        }
        for (int n = 0; n < inside; ++n) {
            Entries sums = Entries{} + static_cast<uint16_t>((ZERO << FINE) + (1 << (FINE - 1)));
            for (int c = 0; c < PER; ++c) {
                sums += pattern[c] * static_cast<uint16_t>(fine[PER * n + c]);
            }
            const EntryBytes rounded = __builtin_convertvector(sums >> FINE, EntryBytes);
            std::memcpy(entries + 16 * count * (begin + n), &rounded, 16);
        }
    }
    const float scale = most / LARGEST * (static_cast<float>(1 << 14) / SHARE);
    const_cast<float*>(tables.scales)[stretch * count + a] = scale;
    const_cast<float*>(tables.zeros)[stretch * count + a] = scale * static_cast<float>(zero);
}

// The tables of one stretch of a pass; x are the inputs of the whole pass.
void build_tables(const Prepared& prepared, const Pass& pass, int stretch, const float* x, const Tables& tables) {
    const int per = pass.per_nibble, first = per * STRETCH_NIBBLES * stretch;
    const int width = std::min(per * STRETCH_NIBBLES, pass.width - first);
    float values[4 * STRETCH_NIBBLES] = {};
    for (int a = 0; a < pass.accumulators; ++a) {
        if (a < pass.signed_sums) {
            const float* factors = prepared.column_factors + pass.column_factors + int64_t{a} * pass.width + first;
            std::transform(x + first, x + first + width, factors, values, std::multiplies<float>());
        } else {
            std::copy(x + first, x + first + width, values);
        }
        (per == 4   ? build_accumulator<4>
         : per == 2 ? build_accumulator<2>
                    : build_accumulator<1>)(pass, stretch, a, values, tables);
    }
}

// Sums of what the codes of V::together vectors look up in K of COUNT tables: of all bytes, seen as numbers of 16 bits,
// and of the upper ones, which tell the lower ones' sums from the former.
template <class V, int COUNT>
struct Sums {
    static constexpr int K = COUNT < 2 ? 1 : 2, G = V::together;
    typename V::Bytes all[K][G], odd[K][G];

    Sums() {
        for (int k = 0; k < K; ++k) {
            for (int g = 0; g < G; ++g) {
                all[k][g] = odd[k][g] = V::zero();
            }
        }
    }

    // One byte of codes, so the tables of two nibbles.
    void add(const uint8_t* codes, const uint8_t* tables) {
        typename V::Bytes code[G];
        for (int g = 0; g < G; ++g) {
            code[g] = V::load(codes + V::lanes * g);
        }
        for (int half = 0; half < 2; ++half) {
            typename V::Bytes index[G];
            for (int g = 0; g < G; ++g) {
                index[g] = half ? V::high(code[g]) : V::low(code[g]);
            }
            for (int k = 0; k < K; ++k) {
                const auto table = V::table(tables + 16 * (COUNT * half + k));
                for (int g = 0; g < G; ++g) {
                    const auto found = V::lookup(table, index[g]);
                    all[k][g] = V::add16(all[k][g], found);
                    odd[k][g] = V::add16(odd[k][g], V::down8(found));
                }
            }
        }
    }
};

// Adds to sums (K, 64) what one stretch of codes looks up in K of COUNT neighbouring tables.
template <class V, int COUNT>
void add_stretch(const uint8_t* codes, const uint8_t* tables, int bytes, const int32_t* shares, const float* scales,
                 float* sums) {
    constexpr int K = Sums<V, COUNT>::K, G = Sums<V, COUNT>::G, STRIDE = 32 * COUNT;
    for (int lane = 0; lane < LANES; lane += V::lanes * G) {
        typename V::Bytes totals[K][G][2];
        for (int i = 0; i < K * G; ++i) {
            totals[i / G][i % G][0] = totals[i / G][i % G][1] = V::zero();
        }
        for (int first = 0; first < bytes; first += BLOCK_BYTES) {
            const uint8_t* code = codes + LANES * first + lane;
            const uint8_t* table = tables + int64_t{STRIDE} * first;
            Sums<V, COUNT> found;
            if (first + BLOCK_BYTES <= bytes) {
#pragma GCC unroll 8
                for (int b = 0; b < BLOCK_BYTES; ++b) {
                    __builtin_prefetch(code + LANES * (b + AHEAD), 0, 2);
                    found.add(code + LANES * b, table + STRIDE * b);
                }
            } else {
                for (int b = 0; b < bytes - first; ++b) {
                    found.add(code + LANES * b, table + STRIDE * b);
                }
            }
            for (int k = 0; k < K; ++k) {
                const int share = shares[first / BLOCK_BYTES * COUNT + k];
                for (int g = 0; g < G; ++g) {
                    const auto odd = found.odd[k][g], even = V::sub16(found.all[k][g], V::up8(odd));
                    totals[k][g][0] = V::add16(totals[k][g][0], V::share16(V::add16(even, even), share));
                    totals[k][g][1] = V::add16(totals[k][g][1], V::share16(V::add16(odd, odd), share));
                }
            }
        }
        for (int k = 0; k < K; ++k) {
            for (int g = 0; g < G; ++g) {
                for (int half = 0; half < 2; ++half) {
                    float* to = sums + LANES * k + LANES / 2 * half + (lane + V::lanes * g) / 2;
                    V::add_scaled(to, totals[k][g][half], scales[k]);
                }
            }
        }
    }
}

// y (64) += what one pass with COUNT accumulators adds to the rows of one block.
template <class V, int COUNT>
void add_accumulators(const Prepared& prepared, const Pass& pass, const Tables& tables, int64_t tile, int64_t block,
                      float* y) {
    constexpr int BYTES = STRETCH * BLOCK_BYTES, K = Sums<V, COUNT>::K;
    const uint8_t* codes = prepared.codes_of(tile, block, pass);
    const float* factors = prepared.factors_of(tile, block, pass);
    for (int a = 0; a < COUNT; a += K) {
        alignas(64) float sums[K * LANES] = {};
        for (int stretch = 0; stretch < stretches_of(pass); ++stretch) {
            const int first = BYTES * stretch, at = stretch * COUNT + a;
            for (int k = 0; k < K; ++k) {
                const float zero = tables.zeros[at + k];
                for (int r = 0; r < LANES; ++r) {
                    sums[LANES * k + r] -= zero;
                }
            }
            add_stretch<V, COUNT>(codes + LANES * first, tables.entries + 16 * (int64_t{2 * COUNT} * first + a),
                                  std::min(BYTES, pass.bytes - first),
                                  tables.shares + STRETCH * stretch * COUNT + a, tables.scales + at, sums);
        }
        for (int k = 0; k < K; ++k) {
            for (int r = 0; r < LANES; ++r) {
                y[r] += factors[LANES * (a + k) + r] * sums[LANES * k + r];
            }
        }
    }
}

template <class V>
void add_pass(const Prepared& prepared, const Pass& pass, const Tables& tables, int64_t tile, int64_t block, float* y) {
    auto* const chosen = pass.accumulators == 1   ? add_accumulators<V, 1>
                         : pass.accumulators == 2 ? add_accumulators<V, 2>
                         : pass.accumulators == 4 ? add_accumulators<V, 4>
                                                  : add_accumulators<V, 8>;
    chosen(prepared, pass, tables, tile, block, y);
}

// y (64) of each token += what a pass with a trellis adds to the rows of one block.
template <class V>
void add_trellis(const Prepared& prepared, const Pass& pass, const Tables* tables, int64_t tokens, int64_t tile,
                 int64_t block, float* const* y) {
    alignas(64) float sums[MOST_TOKENS][LANES] = {};
    for (int stretch = 0; stretch < stretches_of(pass); ++stretch) {
        const int first = Planes::BYTES * stretch, bytes = std::min(Planes::BYTES, pass.bytes - first);
        Planes planes(prepared, pass, tile, block, first, bytes);
        for (int s = 0; s < pass.summands; ++s) {
            const uint8_t* codes = planes.product(pass.masks[s]);
            for (int64_t token = 0; token < tokens; ++token) {
                const Tables& own = tables[token];
                const float scale = pass.coefficients[s] * own.scales[stretch];
                const float zero = pass.coefficients[s] * own.zeros[stretch];
                for (int r = 0; r < LANES; ++r) {
                    sums[token][r] -= zero;
                }
                add_stretch<V, 1>(codes, own.entries + 32 * int64_t{first}, bytes, own.shares + STRETCH * stretch,
                                  &scale, sums[token]);
            }
        }
    }
    const float* factors = prepared.factors_of(tile, block, pass);
    for (int64_t token = 0; token < tokens; ++token) {
        for (int r = 0; r < LANES; ++r) {
            const int lane = LANES / 2 * (r % 2) + r / 2;
            y[token][r] += factors[lane] * sums[token][lane];
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

// One multiplication, as its threads see it: first the tables of all tokens, then piece by piece of the rows all tokens.
template <class V>
class Product {
  public:
    Product(const Prepared& prepared, const Activations& activations, int threads)
        : prepared_(prepared),
          activations_(activations),
          space_(prepared),
          columns_((prepared.header->columns + 15) / 16 * 16),
          stretches_(stretches_of(prepared)),
          tokens_(activations.tokens),
          tables_(activations.tokens * static_cast<int64_t>(stretches_.size())),
          piece_(prepared.tiles() < SHARES * threads ? 1 : TILE_BLOCKS),
          pieces_((prepared.blocks() + piece_ - 1) / piece_) {
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
        const auto stretches = static_cast<int64_t>(product.stretches_.size());
        for (int64_t i; (i = product.tables_.next()) >= 0; product.tables_.done()) {
            const Stretch& stretch = product.stretches_[i % stretches];
            const Pass& pass = product.prepared_.passes[stretch.pass];
            build_tables(product.prepared_, pass, stretch.number, product.x_[i / stretches] + pass.column,
                         product.tables(i / stretches, stretch.pass));
        }
        product.tables_.wait();
        for (int64_t piece; (piece = product.pieces_.next()) >= 0;) {
            product.multiply(piece * product.piece_);
        }
    }

  private:
    Tables tables(int64_t token, int64_t pass) const { return space_.tables(spaces_[token], prepared_, pass); }

    // The rows of one piece: blocks of one tile, from the first one on.
    void multiply(int64_t first) const {
        const Header& header = *prepared_.header;
        const int64_t tile = first / TILE_BLOCKS, skipped = first % TILE_BLOCKS, tokens = activations_.tokens;
        const int64_t blocks = std::min(piece_, prepared_.tile_blocks(tile) - skipped);
        alignas(64) float y[MOST_TOKENS][TILE_ROWS] = {};
        for (int64_t p = 0; p < header.passes; ++p) {
            Tables found[MOST_TOKENS];
            for (int64_t token = 0; token < tokens; ++token) {
                found[token] = tables(token, p);
            }
            if (prepared_.passes[p].summands) {
                for (int64_t block = 0; block < blocks; ++block) {
                    float* rows[MOST_TOKENS];
                    for (int64_t token = 0; token < tokens; ++token) {
                        rows[token] = y[token] + LANES * block;
                    }
                    add_trellis<V>(prepared_, prepared_.passes[p], found, tokens, tile, skipped + block, rows);
                }
                continue;
            }
            for (int64_t token = 0; token < tokens; ++token) {
                for (int64_t block = 0; block < blocks; ++block) {
                    add_pass<V>(prepared_, prepared_.passes[p], found[token], tile, skipped + block,
                                y[token] + LANES * block);
                }
            }
        }
        for (int64_t block = 0; block < blocks; ++block) {
            const float* dense = prepared_.dense_of(tile, skipped + block);
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
        const int64_t row = first * LANES, rows = std::min(blocks * LANES, header.rows - row);
        for (int64_t token = 0; token < tokens; ++token) {
            write(activations_, token * header.rows + row, y[token], rows);
        }
    }

    const Prepared& prepared_;
    const Activations& activations_;
    const Space space_;
    const int64_t columns_;
    const std::vector<Stretch> stretches_;
    std::vector<float*> x_;
    std::vector<uint8_t*> spaces_;
    Claims tokens_, tables_;
    const int64_t piece_;  // blocks of rows that a thread claims at a time
    Claims pieces_;
};

template <class V>
void multiply(const Prepared& prepared, const Activations& activations, int threads) {
    const int64_t work = prepared.header->rows * prepared.header->columns * activations.tokens;
    const int used = work < SMALL ? 1 : threads;
    Product<V> product(prepared, activations, used);
    in_parallel(used, &Product<V>::run, &product);
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
    if (pass.summands) {
        return unpack_trellis(prepared, pass, tile, block, to, stride);
    }
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
