#include "llama-atlas-kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// F16 by integer arithmetic, as the compiler vectorizes that for every target; finite values only
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

void atlas_load_row(ggml_type type, const void * src, float * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:
            memcpy(dst, src, n*sizeof(float));
            break;
        case GGML_TYPE_F16:
            {
                const uint16_t * x = (const uint16_t *) src;
                for (int64_t i = 0; i < n; ++i) {
                    dst[i] = f16_to_f32(x[i]);
                }
            } break;
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
        default:
            ggml_get_type_traits(type)->from_float_ref(src, dst, n);
    }
}

#if defined(__GNUC__)
// one register (or a few) for all lanes: left to itself, GCC takes the accumulators apart
typedef float lanes_t __attribute__((vector_size(ATLAS_LANES*sizeof(float))));
#else
struct lanes_t {
    float x[ATLAS_LANES];
};
static inline lanes_t operator*(float a, const lanes_t & b) {
    lanes_t r;
    for (int i = 0; i < ATLAS_LANES; ++i) {
        r.x[i] = a*b.x[i];
    }
    return r;
}
static inline lanes_t operator*(const lanes_t & a, const lanes_t & b) {
    lanes_t r;
    for (int i = 0; i < ATLAS_LANES; ++i) {
        r.x[i] = a.x[i]*b.x[i];
    }
    return r;
}
static inline lanes_t & operator+=(lanes_t & a, const lanes_t & b) {
    for (int i = 0; i < ATLAS_LANES; ++i) {
        a.x[i] += b.x[i];
    }
    return a;
}
#endif

template <int NK>
static inline void dot_tile(float * out, const float * k, const float * qt, int64_t d, int64_t nl) {
    for (int64_t l = 0; l < nl; l += ATLAS_LANES) {
        lanes_t acc[NK] = {};
        for (int64_t i = 0; i < d; ++i) {
            lanes_t q;
            memcpy(&q, qt + i*nl + l, sizeof(q));
            for (int j = 0; j < NK; ++j) {
                acc[j] += k[j*d + i]*q;
            }
        }
        for (int j = 0; j < NK; ++j) {
            memcpy(out + j*nl + l, &acc[j], sizeof(acc[j]));
        }
    }
}

void atlas_dot(float * out, const float * k, const float * qt, int64_t nk, int64_t d, int64_t nl) {
    int64_t j = 0;
    for (; j + 6 <= nk; j += 6) {
        dot_tile<6>(out + j*nl, k + j*d, qt, d, nl);
    }
    for (; j < nk; ++j) {
        dot_tile<1>(out + j*nl, k + j*d, qt, d, nl);
    }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define ATLAS_SHUFFLE
#endif
#endif

// the sums of the lanes of four vectors
static inline void sum_lanes(const lanes_t * x, float * out) {
#ifdef ATLAS_SHUFFLE
    static_assert(ATLAS_LANES == 16, "the folds are written for 16 lanes");
    typedef float half_t  __attribute__((vector_size(8*sizeof(float))));
    typedef float quart_t __attribute__((vector_size(4*sizeof(float))));
    quart_t q[4];
    for (int i = 0; i < 4; ++i) {
        const half_t h = __builtin_shufflevector(x[i], x[i], 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x[i], x[i], 8, 9, 10, 11, 12, 13, 14, 15);
        q[i] = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
    }
    const quart_t a = __builtin_shufflevector(q[0], q[1], 0, 4, 1, 5) + __builtin_shufflevector(q[0], q[1], 2, 6, 3, 7);
    const quart_t b = __builtin_shufflevector(q[2], q[3], 0, 4, 1, 5) + __builtin_shufflevector(q[2], q[3], 2, 6, 3, 7);
    const quart_t r = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    memcpy(out, &r, sizeof(r));
#else
    for (int i = 0; i < 4; ++i) {
        float part[ATLAS_LANES];
        memcpy(part, &x[i], sizeof(part));
        float sum = 0.0f;
        for (int l = 0; l < ATLAS_LANES; ++l) {
            sum += part[l];
        }
        out[i] = sum;
    }
#endif
}

// NQ queries and 4 keys
template <int NQ>
static inline void few_tile(float * out, int64_t n_out, const float * k, const float * q, int64_t d) {
    lanes_t acc[NQ][4] = {};
    for (int64_t c = 0; c < d; c += ATLAS_LANES) {
        lanes_t x[4];
        for (int i = 0; i < 4; ++i) {
            memcpy(&x[i], k + i*d + c, sizeof(x[i]));
        }
        for (int j = 0; j < NQ; ++j) {
            lanes_t y;
            memcpy(&y, q + j*d + c, sizeof(y));
            for (int i = 0; i < 4; ++i) {
                acc[j][i] += x[i]*y;
            }
        }
    }
    sum_lanes(acc[0], out);
    if (NQ > 1) { sum_lanes(acc[NQ > 1 ? 1 : 0], out + 1*n_out); }
    if (NQ > 2) { sum_lanes(acc[NQ > 2 ? 2 : 0], out + 2*n_out); }
    if (NQ > 3) { sum_lanes(acc[NQ > 3 ? 3 : 0], out + 3*n_out); }
}

void atlas_dot_few(float * out, int64_t n_out, const float * k, const float * q, int64_t nk, int64_t d, int64_t nq) {
    const int64_t n4 = d % ATLAS_LANES == 0 ? nk/4*4 : 0;
    for (int64_t j = 0; j < nq; j += 4) {
        for (int64_t i = 0; i < n4; i += 4) {
            float * o = out + j*n_out + i;
            switch (std::min<int64_t>(nq - j, 4)) {
                case 4:  few_tile<4>(o, n_out, k + i*d, q + j*d, d); break;
                case 3:  few_tile<3>(o, n_out, k + i*d, q + j*d, d); break;
                case 2:  few_tile<2>(o, n_out, k + i*d, q + j*d, d); break;
                default: few_tile<1>(o, n_out, k + i*d, q + j*d, d);
            }
        }
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
