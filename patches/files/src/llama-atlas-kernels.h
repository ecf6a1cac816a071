#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

// the inner loops of llama_atlas, written so that the compiler vectorizes them
// all matrices are row-major

// number of queries that are scored side by side; rows of queries are padded to a multiple of it
#define ATLAS_LANES 16

static inline int64_t atlas_pad_lanes(int64_t n) {
    return GGML_PAD(n, ATLAS_LANES);
}

// a row of n values to and from F32
void atlas_load_row (ggml_type type, const void * src, float * dst, int64_t n);
void atlas_store_row(ggml_type type, const float * src, void * dst, int64_t n);

// out[nk][nl] = k[nk][d] * qt[d][nl], nl a multiple of ATLAS_LANES
void atlas_dot(float * out, const float * k, const float * qt, int64_t nk, int64_t d, int64_t nl);

// out[d][nl] += transposed v[n][d] * p[n][nl]
void atlas_sum(float * out, const float * v, const float * p, int64_t n, int64_t d, int64_t nl);

// out[n]: the sum of each row of x[n][nl], or of its squares, weighted by w[nl]
void atlas_row_sums(float * out, const float * x, const float * w, int64_t n, int64_t nl, bool squares);

// as atlas_dot() for few queries: out[nq][n_out] = q[nq][d] * k[nk][d], fast where d is a multiple of ATLAS_LANES
void atlas_dot_few(float * out, int64_t n_out, const float * k, const float * q, int64_t nk, int64_t d, int64_t nq);

// softmax of x[n]; what is behind, up to the next multiple of ATLAS_LANES, is overwritten
void atlas_softmax_row(float * x, int64_t n);

// softmax over the rows of s[n][nl], for each column on its own
// tmp: [2*nl]
void atlas_softmax(float * s, int64_t n, int64_t nl, float * tmp);

// the rotation of dimensions [0, n_rot) of x[d] by the angles in cs = { cos[n_rot/2], sin[n_rot/2] }
// neox: pairs (i, i + n_rot/2) instead of (2i, 2i + 1); sign: -1 rotates back
void atlas_rotate(float * x, const float * cs, int64_t n_rot, bool neox, float sign);

// in-place normalized Walsh-Hadamard transform of each n values of x[d], n a power of 2
void atlas_hadamard(float * x, int64_t d, int64_t n);
