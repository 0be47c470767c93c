// Copyright (c) ClinicalFMamba contributors
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//     http://www.apache.org/licenses/LICENSE-2.0
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.

// Selective scan and causal convolution on a CPU, built and called by custom_nets/ops/selective_scan_cpp.py.
//
// A vector holds one number of LANES channels. A task owns some of those blocks of channels of one sequence and walks
// their tokens in tiles of CHUNK, all blocks of a tile before the next one, whose rows lie in other pages: it reads a
// tile from wherever the order of its direction and strides say, and states stay in registers, eight at a time. The
// forward keeps the state that enters each tile; the backward takes the tiles from the last to the first and runs each
// again from there. Sums over channels go through a buffer for each task, so that results do not depend on the number of
// threads.
//
// No header of PyTorch is included: they take longer to compile than a user likes to wait. Vectors are an extension
// that GCC and Clang share. Nothing here may be compiled with -ffast-math: infinities and NaN are meant.

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int GROUP = 8;  // states in registers at once

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

// A tensor (batch, directions, tokens, channels) with any strides, in elements.
struct Sequence {
  void* data;
  int64_t batch, direction, token, channel, type;
};

// A float32 tensor (batch, directions, tokens, states) with adjacent states.
struct Matrix {
  const float* data;
  int64_t batch, direction, token;
};

// Float32 tensors that are not described otherwise are contiguous; those that a call has no use for are null.
struct Arguments {
  int64_t batch, directions, length, channels, states, groups, softplus, threads, width;
  Sequence u, delta, out, grad, grad_u, grad_delta;  // grad is the gradient of out
  Matrix B, C;
  const float *A, *D, *bias;           // (directions, channels, states) and (directions, channels)
  float* borders;                      // (batch, directions, chunks + 1, states, channels)
  float *grad_A, *grad_D, *grad_bias;  // (batch, directions, channels, states) and (batch, directions, channels)
  float *grad_B, *grad_C;              // (groups, batch, directions, length, states)
  const float* taps;                   // (directions, width, channels)
  float* grad_taps;                    // (batch, directions, width, channels)
  const int64_t* places;               // (directions, length): where each token lies; null if tokens lie in order
};

// ---- numbers -------------------------------------------------------------------------------------------------------

template <class To, class From>
To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

struct BFloat16 {
  uint16_t bits;
  operator float() const { return as<float>(uint32_t(bits) << 16); }
  BFloat16() = default;
  explicit BFloat16(float x) {
    uint32_t b = as<uint32_t>(x);
    bits = x != x ? 0x7fc0 : (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  }
};

struct Float16 {
  uint16_t bits;
  operator float() const {
    uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
    float x = magnitude >= 0x7c00u << 13 ? as<float>(magnitude | 0x7f800000u) : as<float>(magnitude) * 0x1p112f;
    return as<float>(as<uint32_t>(x) | uint32_t(bits & 0x8000) << 16);
  }
  Float16() = default;
  explicit Float16(float x) {
    uint32_t sign = as<uint32_t>(x) >> 16 & 0x8000, b = as<uint32_t>(x) & 0x7fffffff;
    uint32_t normal = (b - (112u << 23) + 0xfff + (b >> 13 & 1)) >> 13;
    // added to 0.5, a number below 2^-14 is rounded as its denormal is
    uint32_t denormal = as<uint32_t>(as<float>(b) + 0.5f) - as<uint32_t>(0.5f);
    uint32_t large = b > 0x7f800000 ? 0x7e00 : 0x7c00;
    bits = sign | (b < 0x38800000 ? denormal : b < 0x477ff000 ? normal : large);
  }
};

inline Vec load(const float* x) {
  Vec y;
  std::memcpy(&y, x, sizeof y);
  return y;
}

inline void store(float* x, Vec y) { std::memcpy(x, &y, sizeof y); }

// 2^f for f within half of 0, exact at 0, to a relative error of 1e-7
inline Vec power_of_fraction(Vec f) {
  return 1.0f + f * (0.693147004f + f * (0.240222424f + f * (0.0555073358f + f * (0.00967151113f + f * 0.00132647669f))));
}

constexpr float ROUND = 0x1.8p23f;

#if defined(__AVX512F__)
inline Vec nearest(Vec x) { return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// 2^(k + f) for a whole k and f within half of 0
inline Vec power(Vec k, Vec f) { return (Vec)_mm512_scalef_ps((__m512)power_of_fraction(f), (__m512)k); }
#else
inline Vec nearest(Vec x) { return (x + ROUND) - ROUND; }

// 2^(k + f) for a whole k and f within half of 0; below the smallest normal number it is 0, from 2^128 on infinite.
inline Vec power(Vec k, Vec f) {
  Vec bounded = k > 128.0f ? Vec{} + 128.0f : k, fraction = k > 128.0f ? Vec{} : f;
  Bits bits = (Bits)power_of_fraction(fraction) + ((Bits)(bounded + ROUND) << 23);
  return k + f < -126.0f ? Vec{} : (Vec)bits;
}
#endif

inline Vec exp2(Vec x) {
  Vec k = nearest(x);
  return power(k, x - k);
}

// exp(x) for x <= 0; the product with log2(e) is the exact one to twice the precision
inline Vec exp_negative(Vec x) {
  x = x < -200.0f ? Vec{} - 200.0f : x;  // 0 in any case, and no product is rounded to a multiple of more than 1
  Vec k = nearest(x * 1.44269502f);
  return power(k, (x * 1.44269502f - k) + x * 1.92596299e-8f);
}

// log(1 + exp(x)), to full relative precision at either end
inline Vec softplus(Vec x) {
  Vec e = exp_negative(x < 0.0f ? x : -x);
  Vec s = e / (2.0f + e), z = s * s;  // log(1 + e) = 2 atanh(s)
  Vec log1p = s * (2.0f + z * (0.66666317f + z * (0.400249094f + z * (0.279606044f + z * 0.281783342f))));
  return x < 0.0f ? log1p : x + log1p;
}

// 1 / (1 + exp(-x)), the slope of softplus, to full relative precision at either end
inline Vec sigmoid(Vec x) {
  Vec e = exp_negative(x < 0.0f ? x : -x), inverse = 1.0f / (1.0f + e);
  return x < 0.0f ? e * inverse : inverse;
}

// ---- lanes ---------------------------------------------------------------------------------------------------------

template <int DISTANCE, bool SECOND, int... LANE>
inline Vec shuffled(Vec a, Vec b, std::integer_sequence<int, LANE...>) {
#ifdef __clang__
  return __builtin_shufflevector(
      a, b, (LANE & DISTANCE ? LANES + (SECOND ? LANE : LANE ^ DISTANCE) : (SECOND ? LANE ^ DISTANCE : LANE))...);
#else
  return __builtin_shuffle(
      a, b, Bits{(LANE & DISTANCE ? LANES + (SECOND ? LANE : LANE ^ DISTANCE) : (SECOND ? LANE ^ DISTANCE : LANE))...});
#endif
}

// Of two vectors, the upper lanes of each DISTANCE-pair of the first change places with the lower ones of the second.
template <int DISTANCE>
inline void exchange(Vec& a, Vec& b) {
  auto lanes = std::make_integer_sequence<int, LANES>();
  Vec first = shuffled<DISTANCE, false>(a, b, lanes);
  b = shuffled<DISTANCE, true>(a, b, lanes);
  a = first;
}

template <int DISTANCE = LANES / 2>
inline void transpose(Vec* x) {
  if constexpr (DISTANCE > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
      if (!(i & DISTANCE)) exchange<DISTANCE>(x[i], x[i + DISTANCE]);
    transpose<DISTANCE / 2>(x);
  }
}

// Sums over the lanes of COUNT vectors; that of vector i is in lane i * LANES / COUNT of the result. Overwrites x.
template <int COUNT, int DISTANCE = LANES / 2>
inline Vec sums(Vec* x) {
  static_assert(COUNT <= LANES, "each needs a lane");
  if constexpr (DISTANCE == 0) {
    return x[0];
  } else if constexpr (COUNT > 1) {
#pragma GCC unroll 16
    for (int i = 0; i < COUNT / 2; ++i) {
      exchange<DISTANCE>(x[i], x[i + COUNT / 2]);
      x[i] += x[i + COUNT / 2];
    }
    return sums<COUNT / 2, DISTANCE / 2>(x);
  } else {
    Vec other = x[0];
    exchange<DISTANCE>(x[0], other);
    x[0] += other;
    return sums<1, DISTANCE / 2>(x);
  }
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

// One sequence's tokens [start, start + tokens), where they lie, and the channels of a block.
struct Range {
  int64_t batch, direction, start, channel;
  int tokens, channels;
  bool adjacent;
  int64_t place[CHUNK];
};

template <class T>
inline Vec load_lanes(const T* x) {
  float y[LANES];
  for (int i = 0; i < LANES; ++i) y[i] = x[i];
  return load(y);
}

template <class T>
inline void store_lanes(T* x, Vec y) {
  float z[LANES];
  store(z, y);
  for (int i = 0; i < LANES; ++i) x[i] = T(z[i]);
}

template <class T>
void read_as(const T* x, int64_t token, int64_t channel, const Range& r, Vec* tile) {
  int done = 0;
  if (r.channels == LANES && channel == 1) {
    for (; done < r.tokens; ++done) tile[done] = load_lanes(x + r.place[done] * token);
  } else if (r.channels == LANES && token == 1 && r.adjacent) {
    for (; done + LANES <= r.tokens; done += LANES) {
      for (int i = 0; i < LANES; ++i) tile[done + i] = load_lanes(x + i * channel + r.place[done]);
      transpose(tile + done);
    }
  }
  for (; done < r.tokens; ++done) {
    float y[LANES] = {};
    for (int i = 0; i < r.channels; ++i) y[i] = x[r.place[done] * token + i * channel];
    tile[done] = load(y);
  }
}

template <class T>
void write_as(T* x, int64_t token, int64_t channel, const Range& r, const Vec* tile) {
  int done = 0;
  if (r.channels == LANES && channel == 1) {
    for (; done < r.tokens; ++done) store_lanes(x + r.place[done] * token, tile[done]);
  } else if (r.channels == LANES && token == 1 && r.adjacent) {
    for (; done + LANES <= r.tokens; done += LANES) {
      Vec rows[LANES];
      for (int i = 0; i < LANES; ++i) rows[i] = tile[done + i];
      transpose(rows);
      for (int i = 0; i < LANES; ++i) store_lanes(x + i * channel + r.place[done], rows[i]);
    }
  }
  for (; done < r.tokens; ++done)
    for (int i = 0; i < r.channels; ++i) x[r.place[done] * token + i * channel] = T(tile[done][i]);
}

template <class Call>
inline void with_type(const Sequence& s, const Range& r, Call call) {
  int64_t offset = r.batch * s.batch + r.direction * s.direction + r.channel * s.channel;
  if (s.type == FLOAT32) call(static_cast<float*>(s.data) + offset);
  if (s.type == BFLOAT16) call(static_cast<BFloat16*>(s.data) + offset);
  if (s.type == FLOAT16) call(static_cast<Float16*>(s.data) + offset);
}

void read(const Sequence& s, const Range& r, Vec* tile) {
  with_type(s, r, [&](auto* x) { read_as(x, s.token, s.channel, r, tile); });
}

void write(const Sequence& s, const Range& r, const Vec* tile) {
  with_type(s, r, [&](auto* x) { write_as(x, s.token, s.channel, r, tile); });
}

// Up to LANES numbers that are `stride` apart, and zeros behind them; none at all if there are no numbers.
Vec gather(const float* x, int64_t stride, int count) {
  float y[LANES] = {};
  for (int i = 0; x && i < count; ++i) y[i] = x[i * stride];
  return load(y);
}

void scatter(float* x, int64_t stride, int count, Vec y) {
  for (int i = 0; i < count; ++i) x[i * stride] = y[i];
}

// ---- recurrence ----------------------------------------------------------------------------------------------------

// What a task computes with while it is at one tile of one block of channels.
struct Tile {
  Vec delta[CHUNK], step[CHUNK], u[CHUNK], drive[CHUNK], out[CHUNK];
  Vec grad_drive[CHUNK], grad_step[CHUNK];
  Vec decays[CHUNK * GROUP], states[(CHUNK + 1) * GROUP];
};

// What a task keeps about a block of channels from tile to tile.
struct Block {
  int64_t channel;
  int channels;
  std::vector<Vec> A, A_log2, state, later, grad_A;  // of each state
  Vec D, bias, grad_D, grad_bias;
  Tile& tile;

  Block(const Arguments& a, int64_t direction, int64_t index, Tile& shared)
      : channel(index * LANES),
        channels(int(a.channels - channel < LANES ? a.channels - channel : LANES)),
        A(a.states), A_log2(a.states), state(a.states), later(a.states), grad_A(a.states),
        tile(shared) {
    int64_t row = direction * a.channels + channel;
    for (int64_t n = 0; n < a.states; ++n) {
      A[n] = gather(a.A + row * a.states + n, a.states, channels);
      A_log2[n] = A[n] * 1.44269504f;
      state[n] = later[n] = grad_A[n] = Vec{};
    }
    D = gather(a.D ? a.D + row : nullptr, 1, channels);
    bias = gather(a.bias ? a.bias + row : nullptr, 1, channels);
    grad_D = grad_bias = Vec{};
  }

  void read_inputs(const Arguments& a, const Range& r) {
    read(a.u, r, tile.u);
    read(a.delta, r, tile.delta);
    for (int t = 0; t < r.tokens; ++t) {
      tile.delta[t] += bias;
      tile.step[t] = a.softplus ? softplus(tile.delta[t]) : tile.delta[t];
      tile.drive[t] = tile.step[t] * tile.u[t];
    }
  }
};

const float* tokens_of(const Matrix& m, const Range& r) {
  return m.data + r.batch * m.batch + r.direction * m.direction;
}

// Calls a function for all states, as many at once as the function is compiled for.
template <class Call>
inline void for_states(int64_t states, Call call) {
  int64_t n = 0;
  for (; n + 8 <= states; n += 8) call(n, std::integral_constant<int, 8>());
  if (states & 4) call(n, std::integral_constant<int, 4>()), n += 4;
  if (states & 2) call(n, std::integral_constant<int, 2>()), n += 2;
  if (states & 1) call(n, std::integral_constant<int, 1>());
}

// Adds what G states give to the outputs of a tile.
template <int G>
void advance(const Range& r, const Matrix& B, const Matrix& C, int64_t n, Block& block) {
  const float *b = tokens_of(B, r) + n, *c = tokens_of(C, r) + n;
  Vec x[G], A[G];
  for (int i = 0; i < G; ++i) x[i] = block.state[n + i], A[i] = block.A_log2[n + i];
  for (int t = 0; t < r.tokens; ++t) {
    Vec step = block.tile.step[t], drive = block.tile.drive[t], y = block.tile.out[t];
    const float *b_t = b + r.place[t] * B.token, *c_t = c + r.place[t] * C.token;
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) {
      x[i] = exp2(step * A[i]) * x[i] + drive * b_t[i];
      y += x[i] * c_t[i];
    }
    block.tile.out[t] = y;
  }
  for (int i = 0; i < G; ++i) block.state[n + i] = x[i];
}

// Decays by each token of a tile, and states before each and after the last.
template <int G>
void retrace(const Range& r, const Matrix& B, int64_t n, Block& block) {
  const float* b = tokens_of(B, r) + n;
  Vec x[G], A[G];
  for (int i = 0; i < G; ++i) block.tile.states[i] = x[i] = block.state[n + i], A[i] = block.A_log2[n + i];
  for (int t = 0; t < r.tokens; ++t) {
    Vec step = block.tile.step[t], drive = block.tile.drive[t];
    const float* b_t = b + r.place[t] * B.token;
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) {
      Vec decay = exp2(step * A[i]);
      x[i] = decay * x[i] + drive * b_t[i];
      block.tile.decays[t * G + i] = decay;
      block.tile.states[(t + 1) * G + i] = x[i];
    }
  }
}

template <int G>
inline void add_sums(Vec* products, float* out, bool first) {
  constexpr int COUNT = G < LANES ? G : LANES;
  for (int i = 0; i < G; i += COUNT) {
    Vec lanes = sums<COUNT>(products + i);
    for (int j = 0; j < COUNT; ++j) {
      float sum = lanes[j * (LANES / COUNT)];
      out[i + j] = first ? sum : out[i + j] + sum;
    }
  }
}

// Gradients that come through G states, from the last token of a tile to its first; the gradient of the outputs is in
// `out`. `first` says that nothing is in grad_B and grad_C yet, which begin at the sequence's first place.
template <int G>
void go_back(
    const Range& r, const Matrix& B, const Matrix& C, int64_t n, float* grad_B, float* grad_C, int64_t states, bool first,
    Block& block) {
  const float *b = tokens_of(B, r) + n, *c = tokens_of(C, r) + n;
  Vec later[G], grad_A[G] = {};
  for (int i = 0; i < G; ++i) later[i] = block.later[n + i];
  for (int t = r.tokens - 1; t >= 0; --t) {
    Vec step = block.tile.step[t], drive = block.tile.drive[t], out = block.tile.out[t];
    Vec grad_drive = block.tile.grad_drive[t], grad_step = block.tile.grad_step[t];
    const Vec *decay = block.tile.decays + t * G, *before = block.tile.states + t * G;
    Vec products[G];
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) products[i] = out * before[G + i];
    add_sums<G>(products, grad_C + r.place[t] * states + n, first);
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) {
      Vec g = later[i] + out * c[r.place[t] * C.token + i];
      products[i] = drive * g;
      grad_drive += g * b[r.place[t] * B.token + i];
      later[i] = decay[i] * g;
      Vec exponent = later[i] * before[i];
      grad_step += exponent * block.A[n + i];
      grad_A[i] += exponent * step;
    }
    add_sums<G>(products, grad_B + r.place[t] * states + n, first);
    block.tile.grad_drive[t] = grad_drive;
    block.tile.grad_step[t] = grad_step;
  }
  for (int i = 0; i < G; ++i) block.later[n + i] = later[i], block.grad_A[n + i] += grad_A[i];
}

// ---- tasks ---------------------------------------------------------------------------------------------------------

// Calls a function for each group of blocks of channels, with its range (still without tokens and channels).
template <class Call>
void for_groups(const Arguments& a, Call call) {
  int64_t blocks = (a.channels + LANES - 1) / LANES, tasks = a.batch * a.directions * a.groups;
  // without num_threads, which makes GCC's runtime start its threads anew: PyTorch has set their number
#pragma omp parallel for schedule(dynamic) if (a.threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    int64_t group = task % a.groups, row = task / a.groups;
    Range r{row / a.directions, row % a.directions, 0, 0, 0, 0, true, {}};
    Tile tile;
    std::vector<Block> own;
    for (int64_t i = group * blocks / a.groups; i < (group + 1) * blocks / a.groups; ++i)
      own.emplace_back(a, r.direction, i, tile);
    call(r, group, own);
  }
}

template <class Block>
void set_channels(Range& r, const Block& block) {
  r.channel = block.channel;
  r.channels = block.channels;
}

// The state that enters a chunk, for a block of channels.
float* border(const Arguments& a, const Range& r, int64_t chunk) {
  int64_t chunks = (a.length + CHUNK - 1) / CHUNK, row = r.batch * a.directions + r.direction;
  return a.borders + (row * (chunks + 1) + chunk) * a.states * a.channels + r.channel;
}

void keep_state(const Arguments& a, const Range& r, int64_t chunk, const Block& block) {
  float* x = border(a, r, chunk);
  for (int64_t n = 0; n < a.states; ++n) scatter(x + n * a.channels, 1, r.channels, block.state[n]);
}

void set_tokens(const Arguments& a, Range& r, int64_t start, int64_t end) {
  r.start = start;
  r.tokens = int(end - start);
  r.adjacent = !a.places;
  const int64_t* places = a.places ? a.places + r.direction * a.length : nullptr;
  for (int t = 0; t < r.tokens; ++t) r.place[t] = places ? places[start + t] : start + t;
}

void set_chunk(const Arguments& a, Range& r, int64_t chunk) {
  int64_t start = chunk * CHUNK;
  set_tokens(a, r, start, start + CHUNK < a.length ? start + CHUNK : a.length);
}

void forward(const Arguments& a) {
  for_groups(a, [&](Range r, int64_t, std::vector<Block>& blocks) {
    for (int64_t chunk = 0; chunk * CHUNK < a.length; ++chunk) {
      set_chunk(a, r, chunk);
      for (Block& block : blocks) {
        set_channels(r, block);
        keep_state(a, r, chunk, block);
        block.read_inputs(a, r);
        for (int t = 0; t < r.tokens; ++t) block.tile.out[t] = block.D * block.tile.u[t];
        for_states(a.states, [&](int64_t n, auto g) { advance<g()>(r, a.B, a.C, n, block); });
        write(a.out, r, block.tile.out);
      }
    }
    for (Block& block : blocks) {
      set_channels(r, block);
      keep_state(a, r, (a.length + CHUNK - 1) / CHUNK, block);
    }
  });
}

void backward(const Arguments& a) {
  for_groups(a, [&](Range r, int64_t group, std::vector<Block>& blocks) {
    int64_t row = r.batch * a.directions + r.direction;
    int64_t tokens = (group * a.batch * a.directions + row) * a.length;
    float *grad_B = a.grad_B + tokens * a.states, *grad_C = a.grad_C + tokens * a.states;
    for (int64_t chunk = (a.length + CHUNK - 1) / CHUNK - 1; chunk >= 0; --chunk) {
      set_chunk(a, r, chunk);
      for (Block& block : blocks) {
        set_channels(r, block);
        const float* entering = border(a, r, chunk);
        for (int64_t n = 0; n < a.states; ++n) block.state[n] = gather(entering + n * a.channels, 1, r.channels);
        block.read_inputs(a, r);
        Tile& tile = block.tile;
        read(a.grad, r, tile.out);
        for (int t = 0; t < r.tokens; ++t) tile.grad_drive[t] = tile.grad_step[t] = Vec{};
        for_states(a.states, [&](int64_t n, auto g) {
          retrace<g()>(r, a.B, n, block);
          go_back<g()>(r, a.B, a.C, n, grad_B, grad_C, a.states, &block == blocks.data(), block);
        });
        Vec grad_D{}, grad_bias{};
        for (int t = 0; t < r.tokens; ++t) {
          grad_D += tile.out[t] * tile.u[t];
          tile.grad_step[t] += tile.grad_drive[t] * tile.u[t];
          if (a.softplus) tile.grad_step[t] *= sigmoid(tile.delta[t]);
          grad_bias += tile.grad_step[t];
          tile.grad_drive[t] = tile.grad_drive[t] * tile.step[t] + tile.out[t] * block.D;
        }
        block.grad_D += grad_D, block.grad_bias += grad_bias;
        write(a.grad_u, r, tile.grad_drive);
        write(a.grad_delta, r, tile.grad_step);
      }
    }
    for (Block& block : blocks) {
      int64_t channel = row * a.channels + block.channel;
      for (int64_t n = 0; n < a.states; ++n)
        scatter(a.grad_A + channel * a.states + n, a.states, block.channels, block.grad_A[n]);
      scatter(a.grad_D + channel, 1, block.channels, block.grad_D);
      scatter(a.grad_bias + channel, 1, block.channels, block.grad_bias);
    }
  });
}

// ---- causal convolution --------------------------------------------------------------------------------------------

// A block of channels of a convolution: its tile with the width - 1 tokens before it, and behind it, going back, the
// gradients that follow it.
struct Window {
  int64_t channel;
  int channels;
  int64_t history;
  std::vector<Vec> taps, x, grads, grad_taps;
  Vec bias, grad_bias, tile[CHUNK];

  Window(const Arguments& a, int64_t direction, int64_t index)
      : channel(index * LANES),
        channels(int(a.channels - channel < LANES ? a.channels - channel : LANES)),
        history(a.width - 1), taps(a.width), x(CHUNK + a.width), grads(CHUNK + a.width), grad_taps(a.width) {
    for (int64_t j = 0; j <= history; ++j) {
      taps[j] = gather(a.taps + (direction * a.width + j) * a.channels + channel, 1, channels);
      grad_taps[j] = Vec{};
    }
    bias = gather(a.bias + direction * a.channels + channel, 1, channels);
    grad_bias = Vec{};
    for (int64_t j = 0; j < history; ++j) grads[j] = Vec{};
  }

  void read_inputs(const Arguments& a, const Range& r) {
    Range before = r;
    set_tokens(a, before, r.start > history ? r.start - history : 0, r.start);
    for (int64_t j = 0; j < history - before.tokens; ++j) x[j] = Vec{};
    read(a.u, before, x.data() + history - before.tokens);
    read(a.u, r, x.data() + history);
  }

  Vec convolve(int64_t t) const {
    Vec total = bias;
    for (int64_t j = 0; j <= history; ++j) total += x[t + j] * taps[j];
    return total;
  }
};

// Calls a function for each direction of each group of blocks of channels, those of one group one after the other.
template <class Call>
void for_windows(const Arguments& a, Call call) {
  int64_t blocks = (a.channels + LANES - 1) / LANES, tasks = a.batch * a.groups;
#pragma omp parallel for schedule(dynamic) if (a.threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    int64_t group = task % a.groups;
    for (int64_t k = 0; k < a.directions; ++k) {
      Range r{task / a.groups, k, 0, 0, 0, 0, true, {}};
      std::vector<Window> own;
      for (int64_t i = group * blocks / a.groups; i < (group + 1) * blocks / a.groups; ++i) own.emplace_back(a, k, i);
      call(r, own);
    }
  }
}

void convolve(const Arguments& a) {
  for_windows(a, [&](Range r, std::vector<Window>& windows) {
    for (int64_t chunk = 0; chunk * CHUNK < a.length; ++chunk) {
      set_chunk(a, r, chunk);
      for (Window& window : windows) {
        set_channels(r, window);
        window.read_inputs(a, r);
        for (int t = 0; t < r.tokens; ++t) {
          Vec value = window.convolve(t);
          window.tile[t] = value * sigmoid(value);
        }
        write(a.out, r, window.tile);
      }
    }
  });
}

// Adds one tile's gradients to those of the taps and the bias, and gives those of its tokens.
void convolve_tile_back(const Arguments& a, const Range& r, Window& window) {
  window.read_inputs(a, r);
  read(a.grad, r, window.tile);
  // the gradients of the first tokens of the tile that was before this one move behind this one
  for (int64_t j = window.history - 1; j >= 0; --j) window.grads[r.tokens + j] = window.grads[j];
  for (int t = 0; t < r.tokens; ++t) {
    Vec value = window.convolve(t), gate = sigmoid(value);
    window.grads[t] = window.tile[t] * gate * (1.0f + value * (1.0f - gate));
    for (int64_t j = 0; j <= window.history; ++j) window.grad_taps[j] += window.grads[t] * window.x[t + j];
    window.grad_bias += window.grads[t];
  }
  if (r.direction > 0) {
    read(a.grad_u, r, window.tile);
  } else {
    for (int t = 0; t < r.tokens; ++t) window.tile[t] = Vec{};
  }
  for (int t = 0; t < r.tokens; ++t)
    for (int64_t j = 0; j <= window.history; ++j)
      window.tile[t] += window.grads[t + j] * window.taps[window.history - j];
  write(a.grad_u, r, window.tile);
}

void convolve_back(const Arguments& a) {
  for_windows(a, [&](Range r, std::vector<Window>& windows) {
    for (int64_t chunk = (a.length + CHUNK - 1) / CHUNK - 1; chunk >= 0; --chunk) {
      set_chunk(a, r, chunk);
      for (Window& window : windows) {
        set_channels(r, window);
        convolve_tile_back(a, r, window);
      }
    }
    int64_t row = r.batch * a.directions + r.direction;
    for (Window& window : windows) {
      for (int64_t j = 0; j <= window.history; ++j)
        scatter(
            a.grad_taps + (row * a.width + j) * a.channels + window.channel, 1, window.channels, window.grad_taps[j]);
      scatter(a.grad_bias + row * a.channels + window.channel, 1, window.channels, window.grad_bias);
    }
  });
}

}  // namespace

extern "C" {
void selective_scan_forward(const Arguments* a) { forward(*a); }
void selective_scan_backward(const Arguments* a) { backward(*a); }
int selective_scan_lanes() { return LANES; }
void directional_conv_forward(const Arguments* a) { convolve(*a); }
void directional_conv_backward(const Arguments* a) { convolve_back(*a); }
}
