#include "llama-atlas-kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

// F16 by integer arithmetic, as the compiler vectorizes that for every target; what is not finite becomes a large number
static inline float f16_to_f32(uint16_t h) {
    const uint32_t bits = ((uint32_t) (h & 0x8000) << 16) | ((uint32_t) (h & 0x7fff) << 13);
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f*5.192296858534828e+33f; // 2^112: the difference of the exponents' biases
}

static inline uint16_t f32_to_f16(float f) {
    uint32_t sign;
    memcpy(&sign, &f, sizeof(sign));
    sign = (sign >> 16) & 0x8000;

    // 65504 is the largest F16
    const float a = std::min(std::fabs(f), 65504.0f)*1.925929944387236e-34f; // 2^-112
    uint32_t bits;
    memcpy(&bits, &a, sizeof(bits));
    return sign | ((bits + 0x0fff + ((bits >> 13) & 1)) >> 13);
}

// Q8_0: blocks of a scale in F16 and 32 numbers. ggml has this for F32 in a library that is built for any processor
static constexpr int Q8_0_N    = 32;
static constexpr int Q8_0_SIZE = Q8_0_N + sizeof(uint16_t);

void atlas_load_row(ggml_type type, const void * src, float * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:
            memcpy(dst, src, n*sizeof(float));
            break;
        case GGML_TYPE_F16:
            {
                const uint16_t * x = (const uint16_t *) src;
                int64_t i = 0;
#ifdef __F16C__
                for (; i + 8 <= n; i += 8) {
                    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (x + i))));
                }
#endif
                for (; i < n; ++i) {
                    dst[i] = f16_to_f32(x[i]);
                }
            } break;
        case GGML_TYPE_Q8_0:
            for (int64_t i = 0; i < n; i += Q8_0_N) {
                const uint8_t * x = (const uint8_t *) src + i/Q8_0_N*Q8_0_SIZE;
                uint16_t h;
                memcpy(&h, x, sizeof(h));
                const float d = f16_to_f32(h);
                for (int j = 0; j < Q8_0_N; ++j) {
                    dst[i + j] = d*(int8_t) x[sizeof(h) + j];
                }
            }
            break;
        default:
            ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

void atlas_store_row(ggml_type type, const float * src, void * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:
            memcpy(dst, src, n*sizeof(float));
            break;
        case GGML_TYPE_F16:
            {
                uint16_t * y = (uint16_t *) dst;
                for (int64_t i = 0; i < n; ++i) {
                    y[i] = f32_to_f16(src[i]);
                }
            } break;
        case GGML_TYPE_Q8_0:
            for (int64_t i = 0; i < n; i += Q8_0_N) {
                uint8_t * y = (uint8_t *) dst + i/Q8_0_N*Q8_0_SIZE;
                float max = 0.0f;
                for (int j = 0; j < Q8_0_N; ++j) {
                    max = std::max(max, std::fabs(src[i + j]));
                }
                const float d  = max/127.0f;
                const float id = d > 0.0f ? 1.0f/d : 0.0f;
                const uint16_t h = f32_to_f16(d);
                memcpy(y, &h, sizeof(h));
                for (int j = 0; j < Q8_0_N; ++j) {
                    const float r = src[i + j]*id + 12582912.0f; // 1.5*2^23: the nearest integer is in the lowest bits
                    uint32_t bits;
                    memcpy(&bits, &r, sizeof(bits));
                    y[sizeof(h) + j] = bits;
                }
            }
            break;
        default:
            ggml_get_type_traits(type)->from_float_ref(src, dst, n);
    }
}

// as many floats as a register holds: GCC takes longer vectors apart, and moves the parts through memory
#if defined(__AVX512F__)
#define ATLAS_VEC 16
#elif defined(__AVX__)
#define ATLAS_VEC 8
#else
#define ATLAS_VEC 4
#endif

// and so many of these registers are there
#if defined(__AVX512F__) || defined(__aarch64__)
#define ATLAS_REGS 32
#else
#define ATLAS_REGS 16
#endif

#if defined(__GNUC__)
typedef float vec_t __attribute__((vector_size(ATLAS_VEC*sizeof(float))));
#else
struct vec_t {
    float x[ATLAS_VEC];
};
static inline vec_t operator*(float a, const vec_t & b) {
    vec_t r;
    for (int i = 0; i < ATLAS_VEC; ++i) {
        r.x[i] = a*b.x[i];
    }
    return r;
}
static inline vec_t operator*(const vec_t & a, const vec_t & b) {
    vec_t r;
    for (int i = 0; i < ATLAS_VEC; ++i) {
        r.x[i] = a.x[i]*b.x[i];
    }
    return r;
}
static inline vec_t & operator+=(vec_t & a, const vec_t & b) {
    for (int i = 0; i < ATLAS_VEC; ++i) {
        a.x[i] += b.x[i];
    }
    return a;
}
#endif

static inline vec_t load(const float * x) {
    vec_t r;
    memcpy(&r, x, sizeof(r));
    return r;
}

// NK rows of k (with T: columns, added to what is there) and NV registers of queries
template <int NK, int NV, bool T>
static inline void dot_tile(float * out, const float * k, const float * qt, int64_t d, int64_t stride, int64_t nl) {
    for (int64_t l = 0; l < nl; l += NV*ATLAS_VEC) {
        vec_t acc[NK][NV] = {};
        if (T) {
            for (int j = 0; j < NK; ++j) {
                for (int v = 0; v < NV; ++v) {
                    acc[j][v] = load(out + j*nl + l + v*ATLAS_VEC);
                }
            }
        }
        for (int64_t i = 0; i < d; ++i) {
            vec_t q[NV];
            for (int v = 0; v < NV; ++v) {
                q[v] = load(qt + i*nl + l + v*ATLAS_VEC);
            }
            for (int j = 0; j < NK; ++j) {
                for (int v = 0; v < NV; ++v) {
                    acc[j][v] += (T ? k[i*stride + j] : k[j*stride + i])*q[v];
                }
            }
        }
        for (int j = 0; j < NK; ++j) {
            for (int v = 0; v < NV; ++v) {
                memcpy(out + j*nl + l + v*ATLAS_VEC, &acc[j][v], sizeof(acc[j][v]));
            }
        }
    }
}

template <bool T>
static void dot_tiles(float * out, const float * k, const float * qt, int64_t nk, int64_t d, int64_t nl) {
    constexpr int NV = ATLAS_VEC == ATLAS_LANES ? 1 : 2;
    const int64_t stride = T ? nk : d;
    int64_t j = 0;
    for (; j + 6 <= nk; j += 6) {
        dot_tile<6, NV, T>(out + j*nl, k + (T ? j : j*d), qt, d, stride, nl);
    }
    for (; j < nk; ++j) {
        dot_tile<1, NV, T>(out + j*nl, k + (T ? j : j*d), qt, d, stride, nl);
    }
}

void atlas_dot(float * out, const float * k, const float * qt, int64_t nk, int64_t d, int64_t nl) {
    dot_tiles<false>(out, k, qt, nk, d, nl);
}

void atlas_sum(float * out, const float * v, const float * p, int64_t n, int64_t d, int64_t nl) {
    dot_tiles<true>(out, v, p, d, n, nl);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define ATLAS_SHUFFLE
#endif
#endif

// the sums of the floats of four vectors
static inline void sum_vecs(const vec_t * x, float * out) {
#ifdef ATLAS_SHUFFLE
    typedef float quart_t __attribute__((vector_size(4*sizeof(float))));
    quart_t q[4];
    for (int i = 0; i < 4; ++i) {
#if ATLAS_VEC == 16
        typedef float half_t __attribute__((vector_size(8*sizeof(float))));
        const half_t h = __builtin_shufflevector(x[i], x[i], 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x[i], x[i], 8, 9, 10, 11, 12, 13, 14, 15);
#else
        const vec_t h = x[i];
#endif
#if ATLAS_VEC == 4
        q[i] = h;
#else
        q[i] = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
#endif
    }
    const quart_t a = __builtin_shufflevector(q[0], q[1], 0, 4, 1, 5) + __builtin_shufflevector(q[0], q[1], 2, 6, 3, 7);
    const quart_t b = __builtin_shufflevector(q[2], q[3], 0, 4, 1, 5) + __builtin_shufflevector(q[2], q[3], 2, 6, 3, 7);
    const quart_t r = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    memcpy(out, &r, sizeof(r));
#else
    for (int i = 0; i < 4; ++i) {
        float part[ATLAS_VEC];
        memcpy(part, &x[i], sizeof(part));
        float sum = 0.0f;
        for (int l = 0; l < ATLAS_VEC; ++l) {
            sum += part[l];
        }
        out[i] = sum;
    }
#endif
}

template <bool squares>
static void row_sums(float * out, const float * x, const float * w, int64_t n, int64_t nl) {
    for (int64_t i = 0; i < n; i += 4) {
        // the last rows may be there twice
        const int64_t last = n - 1;
        const float * r0 = x + i*nl;
        const float * r1 = x + std::min(i + 1, last)*nl;
        const float * r2 = x + std::min(i + 2, last)*nl;
        const float * r3 = x + std::min(i + 3, last)*nl;
        vec_t acc[4] = {};
        for (int64_t c = 0; c < nl; c += ATLAS_VEC) {
            const vec_t y  = load(w + c);
            const vec_t x0 = load(r0 + c), x1 = load(r1 + c), x2 = load(r2 + c), x3 = load(r3 + c);
            acc[0] += squares ? x0*y*x0 : x0*y;
            acc[1] += squares ? x1*y*x1 : x1*y;
            acc[2] += squares ? x2*y*x2 : x2*y;
            acc[3] += squares ? x3*y*x3 : x3*y;
        }
        float sums[4];
        sum_vecs(acc, sums);
        memcpy(out + i, sums, std::min<int64_t>(n - i, 4)*sizeof(float));
    }
}

void atlas_row_sums(float * out, const float * x, const float * w, int64_t n, int64_t nl, bool squares) {
    if (squares) {
        row_sums<true>(out, x, w, n, nl);
    } else {
        row_sums<false>(out, x, w, n, nl);
    }
}

// NQ queries and 4 keys
template <int NQ>
static inline void few_tile(float * out, int64_t n_out, const float * k, const float * q, int64_t d) {
    vec_t acc[NQ][4] = {};
    for (int64_t c = 0; c < d; c += ATLAS_VEC) {
        vec_t y[NQ];
        for (int j = 0; j < NQ; ++j) {
            y[j] = load(q + j*d + c);
        }
        for (int i = 0; i < 4; ++i) {
            const vec_t x = load(k + i*d + c);
            for (int j = 0; j < NQ; ++j) {
                acc[j][i] += x*y[j];
            }
        }
    }
    // not in a loop, for which the accumulators would have to be in memory
    sum_vecs(acc[0], out);
    if constexpr (NQ > 1) { sum_vecs(acc[1], out + 1*n_out); }
    if constexpr (NQ > 2) { sum_vecs(acc[2], out + 2*n_out); }
    if constexpr (NQ > 3) { sum_vecs(acc[3], out + 3*n_out); }
}

void atlas_dot_few(float * out, int64_t n_out, const float * k, const float * q, int64_t nk, int64_t d, int64_t nq) {
    const int64_t n4 = d % ATLAS_VEC == 0 ? nk/4*4 : 0;
    for (int64_t j = 0; j < nq; ) {
        // as many queries at a time as the registers hold
        const int64_t left = nq - j;
        const int64_t n = ATLAS_REGS == 32 ? std::min<int64_t>(left, 4) : left == 3 || left > 4 ? 3 : std::min<int64_t>(left, 2);
        for (int64_t i = 0; i < n4; i += 4) {
            float * o = out + j*n_out + i;
            switch (n) {
#if ATLAS_REGS == 32
                case 4:  few_tile<4>(o, n_out, k + i*d, q + j*d, d); break;
#endif
                case 3:  few_tile<3>(o, n_out, k + i*d, q + j*d, d); break;
                case 2:  few_tile<2>(o, n_out, k + i*d, q + j*d, d); break;
                default: few_tile<1>(o, n_out, k + i*d, q + j*d, d);
            }
        }
        j += n;
    }
    for (int64_t i = n4; i < nk; ++i) {
        for (int64_t j = 0; j < nq; ++j) {
            float sum = 0.0f;
            for (int64_t c = 0; c < d; ++c) {
                sum += k[i*d + c]*q[j*d + c];
            }
            out[j*n_out + i] = sum;
        }
    }
}

// e^x for x <= 0, relative error below 3e-7
static inline float exp_neg(float x) {
    x = std::max(x, -87.0f);
    const float n = std::floor(x*1.44269504f + 0.5f);
    const float r = (x - n*0.693359375f) + n*2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p*r + 1.3981999507e-3f;
    p = p*r + 8.3334519073e-3f;
    p = p*r + 4.1665795894e-2f;
    p = p*r + 1.6666665459e-1f;
    p = p*r + 5.0000001201e-1f;
    p = p*r*r + r + 1.0f;
    const uint32_t bits = (uint32_t) ((int32_t) n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof(scale));
    return p*scale;
}

void atlas_softmax(float * s, int64_t n, int64_t nl, float * tmp) {
    float * max = tmp;
    float * sum = tmp + nl;

    for (int64_t l = 0; l < nl; ++l) {
        max[l] = -INFINITY;
        sum[l] = 0.0f;
    }
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t l = 0; l < nl; ++l) {
            max[l] = std::max(max[l], s[j*nl + l]);
        }
    }
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t l = 0; l < nl; ++l) {
            const float e = exp_neg(s[j*nl + l] - max[l]);
            s[j*nl + l] = e;
            sum[l] += e;
        }
    }
    for (int64_t l = 0; l < nl; ++l) {
        sum[l] = 1.0f/sum[l];
    }
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t l = 0; l < nl; ++l) {
            s[j*nl + l] *= sum[l];
        }
    }
}

void atlas_softmax_row(float * x, int64_t n) {
    const int64_t n_pad = (n + ATLAS_LANES - 1)/ATLAS_LANES*ATLAS_LANES;
    std::fill(x + n, x + n_pad, -INFINITY);

    float max[ATLAS_LANES], sum[ATLAS_LANES];
    for (int l = 0; l < ATLAS_LANES; ++l) {
        max[l] = -INFINITY;
        sum[l] = 0.0f;
    }
    for (int64_t i = 0; i < n_pad; i += ATLAS_LANES) {
        for (int l = 0; l < ATLAS_LANES; ++l) {
            max[l] = std::max(max[l], x[i + l]);
        }
    }
    const float top = *std::max_element(max, max + ATLAS_LANES);
    for (int64_t i = 0; i < n_pad; i += ATLAS_LANES) {
        for (int l = 0; l < ATLAS_LANES; ++l) {
            const float e = exp_neg(x[i + l] - top);
            x[i + l] = e;
            sum[l] += e;
        }
    }
    float total = 0.0f;
    for (int l = 0; l < ATLAS_LANES; ++l) {
        total += sum[l];
    }
    total = 1.0f/total;
    for (int64_t i = 0; i < n_pad; ++i) {
        x[i] *= total;
    }
}

void atlas_rotate(float * x, const float * cs, int64_t n_rot, bool neox, float sign) {
    const int64_t n = n_rot/2;
    const float * co = cs;
    const float * si = cs + n;

    if (neox) {
        for (int64_t i = 0; i < n; ++i) {
            const float a = x[i];
            const float b = x[i + n];
            const float s = sign*si[i];
            x[i]     = a*co[i] - b*s;
            x[i + n] = a*s     + b*co[i];
        }
    } else {
        for (int64_t i = 0; i < n; ++i) {
            const float a = x[2*i];
            const float b = x[2*i + 1];
            const float s = sign*si[i];
            x[2*i]     = a*co[i] - b*s;
            x[2*i + 1] = a*s     + b*co[i];
        }
    }
}

void atlas_hadamard(float * x, int64_t d, int64_t n) {
    const float scale = 1.0f/std::sqrt((float) n);

    for (int64_t o = 0; o < d; o += n) {
        float * y = x + o;
        for (int64_t h = 1; h < n; h *= 2) {
            for (int64_t i = 0; i < n; i += 2*h) {
                for (int64_t j = i; j < i + h; ++j) {
                    const float a = y[j];
                    const float b = y[j + h];
                    y[j]     = a + b;
                    y[j + h] = a - b;
                }
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            y[i] *= scale;
        }
    }
}
