#include "llama-atlas.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// the memory cells of a KV head: which token is in which of them, what has to be written, and how good the choice is

// give each chosen token a cell, and list the cells that change
void llama_atlas::place(const job & j, head & h, work & w, item & it) {
    const std::vector<uint32_t> & idx = w.chosen;

    // a token that stays keeps its cell, and so its value
    int64_t n_kept = 0;
    std::fill(w.taken.begin(), w.taken.end(), 0);
    std::fill(w.slot.begin(), w.slot.end(), UINT32_MAX);
    for (size_t i = 0, o = 0; i < idx.size() && o < h.idx.size(); ) {
        if (idx[i] == h.idx[o]) {
            w.slot[i] = h.slot[o];
            w.taken[h.slot[o]] = 1;
            n_kept++; i++; o++;
        } else if (idx[i] < h.idx[o]) {
            i++;
        } else {
            o++;
        }
    }
    h.n_recalled += ((int64_t) idx.size() - n_kept + n_block - 1)/n_block;

    it.todo.clear();
    for (int64_t i = 0; i < n_sink && j.slid; ++i) {
        it.todo.push_back(i*2 + 1);
    }
    uint32_t next = 0;
    for (size_t i = 0; i < idx.size(); ++i) {
        const bool stays = w.slot[i] != UINT32_MAX;
        if (!stays) {
            while (w.taken[next]) {
                next++;
            }
            w.slot[i] = next;
            w.taken[next] = 1;
        }
        uint32_t & rank = h.rank[w.slot[i]];
        if (!stays || j.slid || rank != i) {
            rank = i;
            it.todo.push_back((n_sink + i)*2 + stays);
        }
    }
    h.idx .assign(idx.begin(), idx.end());
    h.slot.assign(w.slot.begin(), w.slot.begin() + idx.size());
}

// How far is the output of the last query's attention from what it would be with all candidates (the first n_arch of tok)?
void llama_atlas::omega(const job & j, const layer & l, int32_t g, head & h, work & w, const input & in) {
    if (j.measure != &l - layers.data()) {
        return;
    }
    const size_t row_k  = l.row_k();
    const size_t row_v  = l.row_v();
    const int64_t n_new = j.rows.size();

    float * q   = w.qt.data();        // [n_rep][dk]
    float * all = q + l.n_rep*l.dk;   // [n_rep][dv]
    float * own = all + l.n_rep*l.dv; // [n_rep][dv]
    std::fill(all, own + l.n_rep*l.dv, 0.0f);

    for (int32_t r = 0; r < l.n_rep; ++r) {
        float * x = q + r*l.dk;
        memcpy(x, input::at(in.q, g*l.n_rep + r, j.rows[n_new - 1]), l.dk*sizeof(float));
        if (l.rope >= 0) {
            atlas_rotate(x, j.t_query[l.rope].row(j.n_early + n_new - 1), ropes[l.rope].n_rot, ropes[l.rope].neox, 1.0f);
        }
        for (int32_t c = 0; c < l.dk; ++c) {
            x[c] *= l.scale;
        }
    }

    w.tok.resize(w.n_arch);
    for (int64_t t = 0; t < n_sink; ++t) {
        w.tok.push_back(t);
    }
    for (int64_t t = j.s->n_win0; t < j.s->n_tok; ++t) {
        w.tok.push_back(t);
    }

    const int64_t n = w.tok.size();
    const int64_t n_pad = atlas_pad_lanes(n);
    float * p = w.s.data();
    for (int64_t i = 0; i < n; i += n_tile) {
        const int64_t m = std::min(n_tile, n - i);
        for (int64_t c = 0; c < m; ++c) {
            atlas_load_row(l.type_k, h.k.data() + row(w.tok[i + c])*row_k, w.kt.data() + c*l.dk, l.dk);
        }
        atlas_dot_few(p + i, n_pad, w.kt.data(), q, m, l.dk, l.n_rep);
    }

    float * mass = w.tmp.data();
    for (int32_t r = 0; r < l.n_rep; ++r) {
        atlas_softmax_row(p + r*n_pad, n);
        mass[r] = 0.0f;
    }
    for (int64_t i = 0; i < n; ++i) {
        const bool in_cell = i >= (int64_t) w.n_arch || std::binary_search(h.idx.begin(), h.idx.end(), w.tok[i]);
        atlas_load_row(l.type_v, h.v.data() + row(w.tok[i])*row_v, w.kt.data(), l.dv);
        for (int32_t r = 0; r < l.n_rep; ++r) {
            const float x = p[r*n_pad + i];
            for (int32_t c = 0; c < l.dv; ++c) {
                all[r*l.dv + c] += x*w.kt[c];
                own[r*l.dv + c] += in_cell ? x*w.kt[c] : 0.0f;
            }
            mass[r] += in_cell ? x : 0.0f;
        }
    }
    for (int32_t r = 0; r < l.n_rep; ++r) {
        float d2 = 0.0f, a2 = 1e-20f;
        for (int32_t c = 0; c < l.dv; ++c) {
            const float a = all[r*l.dv + c];
            const float d = a - own[r*l.dv + c]/(mass[r] + 1e-20f);
            d2 += d*d;
            a2 += a*a;
        }
        h.loss += sqrtf(d2/a2)/l.n_rep;
    }
    h.n_loss++;
}

// write listed cells of one head: keys rotated to sit just before the window, in time order, and new values
void llama_atlas::write(const job & j, size_t i_layer, int32_t g, const head & h, work & w, const item & it, int64_t i0, int64_t i1) {
    const seq & s = *j.s;
    const layer & l = layers[i_layer];

    const size_t row_k = l.row_k(); // in the archive
    const size_t row_v = l.row_v();
    const size_t own_k = ggml_row_size(l.k->type, l.dk); // in the cache
    const size_t own_v = ggml_row_size(l.v->type, l.dv);
    const size_t el_v  = ggml_type_size(l.v->type);
    const int64_t kv_size = kv->get_size();

    float * x = w.kt.data();

    for (int64_t n = i0; n < i1; ++n) {
        const int64_t i = it.todo[n]/2;
        const bool has_value = it.todo[n] % 2;

        const int64_t token = i < n_sink ? i : h.idx[i - n_sink];
        const int64_t at    = i < n_sink ? i : n_sink + h.slot[i - n_sink]; // among the cells
        const int64_t cell  = s.cells[at];

        atlas_load_row(l.type_k, h.k.data() + row(token)*row_k, x, l.dk);
        if (l.rope >= 0) {
            atlas_rotate(x, s.t_cell[l.rope].row(i), ropes[l.rope].n_rot, ropes[l.rope].neox, 1.0f);
        }
        if (kv->n_rot_k) {
            atlas_hadamard(x, l.dk, kv->n_rot_k);
        }
        uint8_t * dst_k = staged ? j.s->stage_k[i_layer].data() + at*l.k->nb[1]
                                 : (uint8_t *) l.k->data + j.stream*l.k->nb[2] + cell*l.k->nb[1];
        atlas_store_row(l.k->type, x, dst_k + g*own_k, l.dk);

        if (has_value && !staged) {
            continue;
        }
        const uint8_t * src_v = h.v.data() + row(token)*row_v;
        if (l.type_v != l.v->type) {
            atlas_load_row (l.type_v, src_v, x, l.dv);
            atlas_store_row(l.v->type, x, w.conv.data(), l.dv);
            src_v = w.conv.data();
        }
        if (staged) {
            memcpy(j.s->stage_v[i_layer].data() + at*l.v->nb[1] + g*own_v, src_v, own_v);
        } else if (!kv->v_trans) {
            memcpy((uint8_t *) l.v->data + j.stream*l.v->nb[2] + cell*l.v->nb[1] + g*own_v, src_v, own_v);
        } else {
            uint8_t * dst_v = (uint8_t *) l.v->data + ((int64_t) j.stream*l.v->ne[0] + g*l.dv)*kv_size*el_v + cell*el_v;
            for (int32_t c = 0; c < l.dv; ++c) {
                memcpy(dst_v + c*kv_size*el_v, src_v + c*el_v, el_v);
            }
        }
    }
}

// bring the staged rows of a layer to the device, in runs of neighbouring cells
void llama_atlas::upload(const job & j, size_t i_layer) {
    const seq & s = *j.s;
    const layer & l = layers[i_layer];

    const uint8_t * src_k = s.stage_k[i_layer].data();
    const uint8_t * src_v = s.stage_v[i_layer].data();
    const size_t el_v = ggml_type_size(l.v->type);
    const int64_t kv_size = kv->get_size();

    std::vector<uint8_t> column;

    for (size_t c0 = 0, c1; c0 < s.cells.size(); c0 = c1) {
        for (c1 = c0 + 1; c1 < s.cells.size() && s.cells[c1] == s.cells[c1 - 1] + 1; ++c1) {
        }
        const size_t n = c1 - c0;
        ggml_backend_tensor_set(l.k, src_k + c0*l.k->nb[1], j.stream*l.k->nb[2] + s.cells[c0]*l.k->nb[1], n*l.k->nb[1]);
        if (!kv->v_trans) {
            ggml_backend_tensor_set(l.v, src_v + c0*l.v->nb[1], j.stream*l.v->nb[2] + s.cells[c0]*l.v->nb[1], n*l.v->nb[1]);
            continue;
        }
        column.resize(n*el_v);
        for (int64_t d = 0; d < (int64_t) l.n_head_kv*l.dv; ++d) {
            for (size_t c = 0; c < n; ++c) {
                memcpy(column.data() + c*el_v, src_v + (c0 + c)*l.v->nb[1] + d*el_v, el_v);
            }
            ggml_backend_tensor_set(l.v, column.data(), ((j.stream*l.v->ne[0] + d)*kv_size + s.cells[c0])*el_v, n*el_v);
        }
    }
}
