#include "llama-atlas.h"

#include <algorithm>

// the attention of a chunk of a prompt
// ggml's flash attention has no tiles for less than 64 queries of a head, and takes several times as long for each

static constexpr int64_t n_queries_min = 16;      // of a KV head: fewer are not worth the conversion of keys and values
static constexpr int64_t n_tokens_min  = 4;       // of a sequence: those of different ones see different keys
static constexpr int64_t n_queries_max = 64;      // of a head: from there on ggml has its tiles
static constexpr int64_t n_logits_max  = 1 << 16; // that a thread computes before it needs them, so that they stay in its cache

// queries of a KV head that a thread takes at a time: enough to pay for the conversion, few enough for all threads to have some
static int64_t n_lanes(int64_t n_kv, int64_t n_col, int64_t n_heads, int nth) {
    const int64_t n_part = n_heads*(atlas_pad_lanes(n_col)/ATLAS_LANES)/(4*nth);
    return ATLAS_LANES*std::clamp<int64_t>(std::min(n_part, n_logits_max/n_kv/ATLAS_LANES), 1, 4);
}

ggml_tensor * llama_atlas::build_few(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask, float kq_scale, int il, int64_t n_seqs) {
    const int64_t n_col = q->ne[1]*q->ne[2]/k->ne[2];
    if (q->ne[1] >= n_queries_max || n_col < n_queries_min || q->ne[1]*q->ne[3] < n_tokens_min*n_seqs || !mask || mask->type != GGML_TYPE_F16 || mask->ne[1] != q->ne[1]) {
        return nullptr;
    }
    for (const ggml_tensor * t : { k, v }) {
        if (!t->view_src || !t->view_src->buffer || !ggml_backend_buffer_is_host(t->view_src->buffer)) {
            return nullptr;
        }
    }
    const int64_t n_kv = k->ne[1];
    const int64_t nl   = n_lanes(n_kv, n_col, k->ne[2]*q->ne[3], 1);

    // queries, logits, output, a tile of keys or values, sums, a row of the mask
    n_few       = std::max<size_t>(n_few, nl*(q->ne[0] + n_kv + v->ne[0] + 2) + n_tile*(std::max(k->ne[0], v->ne[0]) + 1));
    n_few_tiles = std::max<size_t>(n_few_tiles, n_kv/n_tile + 1);
    few_ops[il].scale = kq_scale;

    ggml_tensor * args[] = { q, k, v, mask };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0]*q->ne[2], q->ne[1]*q->ne[3], 1, 1, args, 4, attend, GGML_N_TASKS_MAX, &few_ops[il]);
}

void llama_atlas::attend(ggml_tensor * dst, int ith, int nth, void * userdata) {
    few_op & o = *(few_op *) userdata;
    work & w = *o.atlas->works[ith];

    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    const auto at = [](const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
        return (char *) t->data + i1*t->nb[1] + i2*t->nb[2] + i3*t->nb[3];
    };

    const int64_t n_tok     = q->ne[1];
    const int64_t n_kv      = k->ne[1];
    const int64_t n_head_kv = k->ne[2];
    const int64_t n_rep     = q->ne[2]/n_head_kv;
    const int64_t dk        = k->ne[0];
    const int64_t dv        = v->ne[0];
    const int64_t n_col     = n_rep*n_tok; // column r*n_tok + t: query head r of token t
    const int64_t nl        = n_lanes(n_kv, n_col, n_head_kv*q->ne[3], nth);
    const int64_t n_part    = (n_col + nl - 1)/nl;

    float * qt  = w.few.data();   // [dk][nl]
    float * p   = qt  + dk*nl;    // [n_kv][nl]
    float * out = p   + n_kv*nl;  // [dv][nl]
    float * tmp = out + dv*nl;    // [2*nl]
    float * x   = tmp + 2*nl;     // [n_tile][max(dk, dv)]
    float * m   = x   + n_tile*std::max(dk, dv); // [n_tile]

    for (int64_t i; (i = o.next.fetch_add(1, std::memory_order_relaxed)) < n_part*n_head_kv*q->ne[3]; ) {
        const int64_t c0 = i % n_part*nl;
        const int64_t nc = std::min(nl, n_col - c0);
        const int64_t g  = i/n_part % n_head_kv;
        const int64_t s  = i/n_part/n_head_kv;

        std::fill(qt, qt + dk*nl, 0.0f);
        for (int64_t c = 0; c < nc; ++c) {
            const float * src = (const float *) at(q, (c0 + c) % n_tok, g*n_rep + (c0 + c)/n_tok, s);
            for (int64_t d = 0; d < dk; ++d) {
                qt[d*nl + c] = src[d]*o.scale;
            }
        }

        // the logits of the keys that any of them may see, a tile behind the other
        int64_t n = 0, n_tiles = 0;
        for (int64_t j0 = 0; j0 < n_kv; j0 += n_tile) {
            const int64_t nk = std::min(n_tile, n_kv - j0);
            bool any = false;
            for (int64_t t = 0; t < n_tok && !any; ++t) {
                const uint16_t * row = (const uint16_t *) at(mask, t, 0, s) + j0;
                any = std::any_of(row, row + nk, [](uint16_t bits) { return bits != 0xfc00; }); // -INFINITY
            }
            if (!any) {
                continue;
            }
            for (int64_t j = 0; j < nk; ++j) {
                atlas_load_row(k->type, at(k, j0 + j, g, s), x + j*dk, dk);
            }
            atlas_dot(p + n*nl, x, qt, nk, dk, nl);
            for (int64_t c = 0; c < nc; ++c) {
                atlas_load_row(mask->type, (const ggml_fp16_t *) at(mask, (c0 + c) % n_tok, 0, s) + j0, m, nk);
                for (int64_t j = 0; j < nk; ++j) {
                    p[(n + j)*nl + c] += m[j];
                }
            }
            w.tiles[n_tiles++] = j0;
            n += nk;
        }
        atlas_softmax(p, n, nl, tmp);

        std::fill(out, out + dv*nl, 0.0f);
        const float * y = p;
        for (int64_t a = 0; a < n_tiles; ++a) {
            const int64_t nk = std::min(n_tile, n_kv - w.tiles[a]);
            for (int64_t j = 0; j < nk; ++j) {
                atlas_load_row(v->type, at(v, w.tiles[a] + j, g, s), x + j*dv, dv);
            }
            atlas_sum(out, x, y, nk, dv, nl);
            y += nk*nl;
        }
        for (int64_t c = 0; c < nc; ++c) {
            const int64_t row = s*n_tok + (c0 + c) % n_tok;
            float * to = (float *) ((char *) dst->data + row*dst->nb[1]) + (g*n_rep + (c0 + c)/n_tok)*dv;
            for (int64_t d = 0; d < dv; ++d) {
                to[d] = out[d*nl + c];
            }
        }
    }
}
