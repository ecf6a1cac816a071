#include "llama-atlas.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

// what happens in the memory of a KV head: archive, scores, the choice of tokens

// what the new queries look at counts for the survivors; a few wait until they are enough
void llama_atlas::listen(const job & j, const layer & l, int32_t g, head & h, work & w, item & it, const input & in, int64_t n_share) {
    const int64_t t1 = j.t0 + (int64_t) j.rows.size();
    const size_t  i_layer = &l - layers.data();

    if (j.score[i_layer]) {
        // each query is scored once; the last group, all of a chunk where they choose, is whole
        const int64_t n_group = j.choose ? std::max<int64_t>(params.n_chunk, params.n_refresh) : n_together;
        int64_t q0 = std::max(j.t0 - j.n_wait[i_layer], n_sink);
        for (int64_t n = (t1 - q0) % n_group; q0 < t1; n = n_group) {
            if (n > 0) {
                score(j, l, g, h, w, it, in, q0, q0 + n, n_share);
                q0 += n;
                if (it.recall) {
                    return; // the threads share the rest
                }
                score_part(l, h, w, it, 0);
                score_end(l, h, w, it);
            }
        }
        if (j.s->n_win0 > 0) { // whether or not this token chooses: a later one does
            survivors(j, h, w);
        }
    } else if (n_mem > 0) {
        float * dst = j.s->wait[i_layer].data();
        for (size_t i = 0; i < j.rows.size(); ++i) {
            for (int32_t r = 0; r < l.n_rep; ++r) {
                const int64_t head = g*l.n_rep + r;
                memcpy(dst + ((j.n_wait[i_layer] + i)*l.n_head_kv*l.n_rep + head)*l.dk, input::at(in.q, head, j.rows[i]), l.dk*sizeof(float));
            }
        }
    }
}

// rotate the new keys back and put them away with their values
void llama_atlas::archive(const job & j, const layer & l, int32_t g, head & h, work & w, const input & in) {
    const size_t row_k = l.row_k();
    const size_t row_v = l.row_v();

    float * x = w.kt.data();

    for (size_t i = 0; i < j.rows.size(); ++i) {
        const int64_t at = row(j.t0 + i);

        memcpy(x, input::at(in.k, g, j.rows[i]), l.dk*sizeof(float));
        if (l.rope >= 0) {
            atlas_rotate(x, j.t_key[l.rope].row(i), ropes[l.rope].n_rot, ropes[l.rope].neox, -1.0f);
        }
        atlas_store_row(l.type_k, x, h.k.data() + at*row_k, l.dk);

        // values only travel: keep them rotated as the cache has them
        memcpy(x, input::at(in.v, g, j.rows[i]), l.dv*sizeof(float));
        if (kv->n_rot_v) {
            atlas_hadamard(x, l.dv, kv->n_rot_v);
        }
        atlas_store_row(l.type_v, x, h.v.data() + at*row_v, l.dv);

        h.u[at] = 0.0f;
    }

    mean_keys(l, h, j.b0, j.b1, x); // of what the slide completed
}

// the mean keys of the archive's blocks [b0, b1); x: [dk]
void llama_atlas::mean_keys(const layer & l, head & h, int64_t b0, int64_t b1, float * x) const {
    const size_t row_k = l.row_k();

    for (int64_t b = b0; b < b1; ++b) {
        const int64_t r0 = row(n_sink + b*n_block);
        float * rep = h.rep.data() + (r0 - n_sink)/n_block*l.dk;
        std::fill(rep, rep + l.dk, 0.0f);
        for (int64_t i = 0; i < n_block; ++i) {
            atlas_load_row(l.type_k, h.k.data() + (r0 + i)*row_k, x, l.dk);
            for (int32_t c = 0; c < l.dk; ++c) {
                rep[c] += x[c]/n_block;
            }
        }
    }
}

// a block passes a part of its score on: the continuation of a match is what the next tokens need
static void add_credits(const float * b, float * res, int64_t n, float c1, float c2) {
    for (int64_t i = 0; i < n; ++i) {
        res[i] = b[i] + (i > 0 ? c1*b[i - 1] : 0.0f) + (i > 1 ? c2*b[i - 2] : 0.0f);
    }
}

// the indices of the k largest of x[n] come first in order[0..k); returns k or less
static int64_t top_k(const float * x, int64_t n, int64_t k, std::vector<uint32_t> & order) {
    k = std::min(k, n);
    for (int64_t i = 0; i < n; ++i) {
        order[i] = i;
    }
    if (k < n) {
        std::nth_element(order.begin(), order.begin() + k, order.begin() + n, [x](uint32_t a, uint32_t b) {
            return x[a] != x[b] ? x[a] > x[b] : a < b;
        });
    }
    return k;
}

// stage 1: the tokens of the n_cand best blocks, and those that are in the cells or in no whole block
void llama_atlas::candidates(const job & j, const head & h, work & w, int64_t n_cand, std::vector<uint32_t> & res) {
    const int64_t a1 = j.s->n_win0;
    const int64_t j0 = first_kept(*j.s);
    const int64_t b0 = (j0 - n_sink)/n_block;
    const int64_t b1 = (a1 - n_sink)/n_block;
    const int64_t nb = b1 - b0;

    add_credits(w.block.data(), w.cred.data(), nb, credit_1, credit_2);

    std::fill(w.mark.begin(), w.mark.begin() + nb, 0);
    const int64_t k = top_k(w.cred.data(), nb, n_cand, w.order);
    for (int64_t i = 0; i < k; ++i) {
        const int64_t b = w.order[i];
        w.mark[b] = 1;
        for (int64_t c = 0; c < n_block; ++c) {
            res.push_back(n_sink + (b0 + b)*n_block + c);
        }
    }
    // what is in the cells now may stay
    for (uint32_t t : h.idx) {
        if (t >= j0 && !(((t - n_sink)/n_block < b1) && w.mark[(t - n_sink)/n_block - b0])) {
            res.push_back(t);
        }
    }
    for (int64_t t = n_sink + b1*n_block; t < a1; ++t) {
        res.push_back(t);
    }
}

// what the queries [q0, q1) are to be compared with: candidates from the archive, and the window
void llama_atlas::score(const job & j, const layer & l, int32_t g, head & h, work & w, item & it, const input & in, int64_t q0, int64_t q1, int64_t n_share) {
    const seq & s = *j.s;
    const size_t i_layer = &l - layers.data();

    const int64_t a1    = std::max(s.n_win0, n_sink);
    const int64_t nq    = q1 - q0;
    const int64_t n_use = l.n_rep*nq; // queries
    const int64_t n_vec = atlas_pad_lanes(n_use)/ATLAS_LANES;

    // the last queries of a chunk choose, and only they are shared
    it.recall = j.choose && q1 == j.t0 + (int64_t) j.rows.size();

    const int64_t nl = it.recall ? (n_vec + n_share - 1)/n_share*ATLAS_LANES : n_vec*ATLAS_LANES;

    it.q0      = q0;
    it.n_use   = n_use;
    it.nl      = nl;
    it.n_parts = (n_use + nl - 1)/nl;

    // column r*nq + t: query head r of token t; [n_parts][dk][nl]
    float * qt = it.q.data();
    std::fill(qt, qt + it.n_parts*l.dk*nl, 0.0f);
    const auto column = [&](int64_t c) { return qt + c/nl*l.dk*nl + c % nl; };
    for (int64_t t = 0; t < nq; ++t) {
        const int64_t i = q0 + t - j.t0; // new ones from 0 on
        for (int32_t r = 0; r < l.n_rep; ++r) {
            const int64_t head = g*l.n_rep + r;
            const float * src = i >= 0 ? input::at(in.q, head, j.rows[i])
                : s.wait[i_layer].data() + ((i + j.n_wait[i_layer])*l.n_head_kv*l.n_rep + head)*l.dk;
            float * x = w.kt.data();
            memcpy(x, src, l.dk*sizeof(float));
            if (l.rope >= 0) {
                atlas_rotate(x, j.t_query[l.rope].row(i + j.n_early), ropes[l.rope].n_rot, ropes[l.rope].neox, 1.0f);
            }
            float * q = column(r*nq + t);
            for (int32_t c = 0; c < l.dk; ++c) {
                q[c*nl] = x[c]*l.scale;
            }
        }
    }

    const int64_t j0 = first_kept(s);            // archive: [j0, a1)
    const int64_t b0 = (j0 - n_sink)/n_block;    // its complete blocks: [b0, b1)
    const int64_t b1 = std::max(b0, (a1 - n_sink)/n_block);
    const int64_t nb = b1 - b0;

    it.tok.clear();

    const int64_t n_cand = r_cand*n_mem/n_block;
    const bool two_stages = a1 > j0 && nb > n_cand;

    if (two_stages) {
        // stage 1: the blocks' mean keys against averages of n_pool queries
        const bool pool = nq % n_pool == 0;
        const int64_t n1  = pool ? n_use/n_pool : n_use;
        const int64_t nl1 = atlas_pad_lanes(n1);

        std::vector<float> & s1 = w.s1;
        float * q1t = w.s.data(); // not needed yet
        std::fill(q1t, q1t + l.dk*nl1, 0.0f);
        for (int64_t i = 0; i < n1; ++i) {
            const float * x = column(pool ? i*n_pool : i);
            for (int32_t c = 0; c < l.dk; ++c, x += nl) {
                q1t[c*nl1 + i] = pool ? 0.25f*(x[0] + x[1] + x[2] + x[3]) : x[0];
            }
        }

        // the archive is a ring: at most two pieces
        const int64_t n_ring = n_cap/n_block;
        for (int64_t b = b0; b < b1; ) {
            const int64_t n = std::min(b1 - b, n_ring - b % n_ring);
            atlas_dot(s1.data() + (b - b0)*nl1, h.rep.data() + b % n_ring*l.dk, q1t, n, l.dk, nl1);
            b += n;
        }
        atlas_softmax(s1.data(), nb, nl1, w.tmp.data());
        float * use = w.tmp.data();
        std::fill(use, use + n1, 1.0f);
        std::fill(use + n1, use + nl1, 0.0f);
        atlas_row_sums(w.block.data(), s1.data(), use, nb, nl1, false);
        candidates(j, h, w, n_cand, it.tok);
    } else {
        for (int64_t t = j0; t < a1; ++t) {
            it.tok.push_back(t);
        }
    }
    it.n_arch = it.tok.size();
    for (int64_t t = a1; t < q1; ++t) {
        it.tok.push_back(t);
    }
}

// stage 2: the exact attention of a part of these queries; its sums, of squares and by mass, are [2][n_tok] of it.p
void llama_atlas::score_part(const layer & l, const head & h, work & w, item & it, int64_t part) {
    const int64_t nl    = it.nl;
    const int64_t c0    = part*nl;
    const int64_t nc    = std::min(nl, it.n_use - c0);
    const int64_t nq    = it.n_use/l.n_rep;
    const size_t row_k  = l.row_k();
    const float * qt    = it.q.data() + part*l.dk*nl;

    const int64_t n = it.tok.size();
    float * p = w.s.data();
    for (int64_t i = 0; i < n; i += n_tile) {
        const int64_t m = std::min(n_tile, n - i);
        for (int64_t c = 0; c < m; ++c) {
            atlas_load_row(l.type_k, h.k.data() + row(it.tok[i + c])*row_k, w.kt.data() + c*l.dk, l.dk);
        }
        atlas_dot(p + i*nl, w.kt.data(), qt, m, l.dk, nl);
    }
    for (int64_t i = n - 1; i >= 0 && it.tok[i] > it.q0; --i) { // causal
        for (int64_t c = 0; c < nc; ++c) {
            if (it.q0 + (c0 + c) % nq < it.tok[i]) {
                p[i*nl + c] = -INFINITY;
            }
        }
    }
    atlas_softmax(p, n, nl, w.tmp.data());

    float * use  = w.tmp.data();
    float * mass = use + nl;
    std::fill(use, use + nc, 1.0f);
    std::fill(use + nc, use + nl, 0.0f);
    atlas_row_sums(it.p.data() + part*2*n, p, use, n, nl, true);

    if (!it.recall) {
        return;
    }

    // every query counts the same for the recall, whatever part of its attention is in the window
    std::fill(mass, mass + nl, 1e-20f);
    for (int64_t i = 0; i < it.n_arch; ++i) {
        for (int64_t c = 0; c < nl; ++c) {
            mass[c] += p[i*nl + c];
        }
    }
    for (int64_t c = 0; c < nl; ++c) {
        mass[c] = c < nc ? 1.0f/(it.n_use*mass[c]) : 0.0f;
    }
    atlas_row_sums(it.p.data() + part*2*n + n, p, mass, it.n_arch, nl, false);
}

// ... and of all of them together
void llama_atlas::score_end(const layer & l, head & h, work & w, const item & it) {
    const int64_t n = it.tok.size();
    const float * sums = it.p.data();
    for (int64_t i = 0; i < n; ++i) {
        float u = 0.0f;
        for (int64_t part = 0; part < it.n_parts; ++part) {
            u += sums[part*2*n + i];
        }
        h.u[row(it.tok[i])] += u/(l.n_rep*n_block);
    }
    if (!it.recall) {
        return;
    }
    for (int64_t i = 0; i < it.n_arch; ++i) {
        w.rel[i] = 0.0f;
        for (int64_t part = 0; part < it.n_parts; ++part) {
            w.rel[i] += sums[part*2*n + n + i];
        }
    }
    w.tok.assign(it.tok.begin(), it.tok.end());
    w.n_arch = it.n_arch;
}

// what one token's queries look at in the archive; the candidates are kept for the tokens that follow
void llama_atlas::ask(const job & j, const layer & l, int32_t g, head & h, work & w, item & it, const input & in) {
    const seq & s = *j.s;

    const int64_t a1 = s.n_win0;
    const int64_t j0 = first_kept(s);
    const int64_t b0 = (j0 - n_sink)/n_block;
    const int64_t b1 = (a1 - n_sink)/n_block;
    const int64_t nb = b1 - b0;
    const int64_t n_cand = r_cand*n_mem/n_block;

    float * q = it.q.data();
    for (int32_t r = 0; r < l.n_rep; ++r) {
        float * x = q + r*l.dk;
        memcpy(x, input::at(in.q, g*l.n_rep + r, j.rows[0]), l.dk*sizeof(float));
        if (l.rope >= 0) {
            atlas_rotate(x, j.t_query[l.rope].row(j.n_early), ropes[l.rope].n_rot, ropes[l.rope].neox, 1.0f);
        }
        for (int32_t c = 0; c < l.dk; ++c) {
            x[c] *= l.scale;
        }
    }

    // stage 1 as rarely as its cost demands, and when tokens have joined the archive
    if (j.slid || nb <= n_cand || j.t0 - h.t_cand >= nb/n_scan) {
        h.t_cand = j.t0;
        h.cand.clear();
        if (nb <= n_cand) {
            for (int64_t t = j0; t < a1; ++t) {
                h.cand.push_back(t);
            }
        } else {
            const int64_t n_pad = atlas_pad_lanes(nb);
            float * s1 = w.s1.data();
            const int64_t n_ring = n_cap/n_block;
            for (int64_t b = b0; b < b1; ) {
                const int64_t n = std::min(b1 - b, n_ring - b % n_ring);
                atlas_dot_few(s1 + b - b0, n_pad, h.rep.data() + b % n_ring*l.dk, q, n, l.dk, l.n_rep);
                b += n;
            }
            std::fill(w.block.begin(), w.block.begin() + nb, 0.0f);
            for (int32_t r = 0; r < l.n_rep; ++r) {
                atlas_softmax_row(s1 + r*n_pad, nb);
                for (int64_t b = 0; b < nb; ++b) {
                    w.block[b] += s1[r*n_pad + b];
                }
            }
            candidates(j, h, w, n_cand, h.cand);
        }
    }
}

// the exact logits of the candidates [i0, i1)
void llama_atlas::ask_part(const layer & l, const head & h, work & w, item & it, int64_t i0, int64_t i1) {
    const size_t row_k = l.row_k();
    const int64_t n_pad = atlas_pad_lanes(h.cand.size());

    for (int64_t i = i0; i < i1; i += n_tile) {
        const int64_t m = std::min(n_tile, i1 - i);
        for (int64_t c = 0; c < m; ++c) {
            atlas_load_row(l.type_k, h.k.data() + row(h.cand[i + c])*row_k, w.kt.data() + c*l.dk, l.dk);
        }
        atlas_dot_few(it.p.data() + i, n_pad, w.kt.data(), it.q.data(), m, l.dk, l.n_rep);
    }
}

// ... and their share of the attention
void llama_atlas::ask_end(const layer & l, const head & h, work & w, item & it) {
    const int64_t n = h.cand.size();
    const int64_t n_pad = atlas_pad_lanes(n);

    std::fill(w.rel.begin(), w.rel.begin() + n, 0.0f);
    for (int32_t r = 0; r < l.n_rep; ++r) {
        float * p = it.p.data() + r*n_pad;
        atlas_softmax_row(p, n);
        for (int64_t i = 0; i < n; ++i) {
            w.rel[i] += p[i];
        }
    }
    w.tok.assign(h.cand.begin(), h.cand.end());
    w.n_arch = n;
}

// what goes into the memory cells, given the scores of the candidates, the first n_arch of tok
void llama_atlas::choose(const job & j, head & h, work & w) {
    const int64_t t  = j.s->n_tok;
    const int64_t a1 = j.s->n_win0;
    const int64_t j0 = first_kept(*j.s);
    const int64_t b0 = (j0 - n_sink)/n_block;
    const int64_t nb = (a1 - n_sink)/n_block - b0;
    const int64_t n_blocks = (int64_t) (params.recall*n_mem/n_block + 0.5f);

    std::fill(w.block.begin(), w.block.begin() + nb, 0.0f);
    std::fill(w.mark .begin(), w.mark .begin() + nb, 0);
    w.chosen.clear();

    if (params.shuffle) {
        std::mt19937 rng(params.shuffle + t*7919 + (&h - j.s->heads.data()));
        for (int64_t b = 0; b < nb; ++b) {
            w.cred[b] = 1.0f + rng()/4294967296.0f;
        }
    } else {
        for (size_t i = 0; i < w.n_arch; ++i) {
            const int64_t b = (w.tok[i] - n_sink)/n_block - b0;
            if (b >= 0 && b < nb) {
                w.block[b] += w.rel[i];
            }
        }
        add_credits(w.block.data(), w.cred.data(), nb, credit_1, credit_2);
    }

    const int64_t k = top_k(w.cred.data(), nb, n_blocks, w.order);
    for (int64_t i = 0; i < k; ++i) {
        const int64_t b = w.order[i];
        if (w.cred[b] > 0.0f) {
            w.mark[b] = 1;
            for (int64_t c = 0; c < n_block; ++c) {
                w.chosen.push_back(n_sink + (b0 + b)*n_block + c);
            }
        }
    }
    for (uint32_t t : h.surv) {
        if ((int64_t) w.chosen.size() == n_mem) {
            break;
        }
        const int64_t b = (t - n_sink)/n_block - b0;
        if (t >= j0 && (b >= nb || !w.mark[b])) {
            w.chosen.push_back(t);
        }
    }
    std::sort(w.chosen.begin(), w.chosen.end());
}

// the n_mem tokens with the largest u/age
void llama_atlas::survivors(const job & j, head & h, work & w) {
    const int64_t t  = j.s->n_tok;
    const int64_t a1 = j.s->n_win0;
    const int64_t j0 = first_kept(*j.s);

    if (params.shuffle) {
        std::mt19937 rng(params.shuffle + t*104729 + (&h - j.s->heads.data()));
        for (int64_t i = j0; i < a1; ++i) {
            h.u[row(i)] = rng()/4294967296.0f;
        }
    }

    // those below the last threshold are not worth a sort, nearly always
    for (float threshold = 0.7f*h.threshold; ; threshold = -1.0f) {
        w.ranked.clear();
        for (int64_t i = j0; i < a1; ) {
            const int64_t n = std::min(a1 - i, n_block);
            const float * u = h.u.data() + row(i);
            float max = 0.0f;
            for (int64_t c = 0; c < n; ++c) {
                max = std::max(max, u[c]);
            }
            if (max >= threshold*(t - i - n + 2)) {
                for (int64_t c = 0; c < n; ++c) {
                    const float x = u[c]/(t - i - c + 1);
                    if (x >= threshold) {
                        w.ranked.push_back({ x, (uint32_t) (i + c) });
                    }
                }
            }
            i += n;
        }
        if ((int64_t) w.ranked.size() >= n_mem || threshold < 0.0f) {
            break;
        }
    }

    const int64_t n = std::min<int64_t>(n_mem, w.ranked.size());
    std::partial_sort(w.ranked.begin(), w.ranked.begin() + n, w.ranked.end(), [](const auto & a, const auto & b) {
        return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    h.surv.clear();
    for (int64_t i = 0; i < n; ++i) {
        h.surv.push_back(w.ranked[i].second);
    }
    h.threshold = n > 0 ? w.ranked[n - 1].first : 0.0f;
}
