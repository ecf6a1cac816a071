#include "llama-atlas.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <cinttypes>
#include <random>
#include <stdexcept>
#include <thread>

// what happens in the memories while a graph is computed, between the queries of a layer and its attention

static constexpr int64_t ATLAS_TILE  = 48;   // keys that are converted at a time
static constexpr int64_t ATLAS_GROUP = 16;   // queries that are scored together where they choose nothing
static constexpr float   ATLAS_CAND  = 2.0f; // candidates of stage 1, in units of the memory cells
static constexpr int64_t ATLAS_SCAN  = 128;  // blocks that stage 1 may look at per token, on average

// the tensors of a layer, F32: [n_embd_head, n_head(_kv), n_tokens]
struct llama_atlas::input {
    const ggml_tensor * q, * k, * v;

    static const float * at(const ggml_tensor * t, int64_t head, int64_t row) {
        return (const float *) ((const char *) t->data + head*t->nb[1] + row*t->nb[2]);
    }
};

static int64_t pad_lanes(int64_t n) {
    return GGML_PAD(n, ATLAS_LANES);
}

// make room for n_new tokens of a sequence, and for what the threads need
void llama_atlas::reserve(seq & s, int64_t n_new) {
    const int64_t n_tok  = s.n_tok + n_new;
    const int64_t n_rows = n_sink + std::min(n_cap, GGML_PAD(n_tok + n_tok/8, 1024));
    const int64_t n_blocks = std::min(n_cap, n_tok)/n_block + 2;
    const int64_t n_group  = std::max<int64_t>({ ATLAS_GROUP, params.n_chunk, params.n_refresh });

    int64_t n_lanes = 0;
    int64_t d_max = 0;

    s.heads.resize(n_heads);
    s.wait.resize(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
        const layer & l = layers[i];
        for (int32_t g = 0; g < l.n_head_kv; ++g) {
            head & h = s.heads[l.head0 + g];
            if ((int64_t) h.u.size() < n_tok && (int64_t) h.u.size() < n_rows) {
                h.k.reserve(n_rows*ggml_row_size(l.k->type, l.dk));
                h.v.reserve(n_rows*ggml_row_size(l.v->type, l.dv));
                h.u.resize(n_rows);
                h.rep.resize(GGML_PAD(n_rows, n_block)/n_block*l.dk);
            }
            h.idx.reserve(n_mem);
            h.slot.reserve(n_mem);
            h.rank.resize(n_mem, UINT32_MAX);
            h.surv.reserve(n_mem);
            h.cand.reserve((ATLAS_CAND + 1)*n_mem + 2*n_block);
        }
        s.wait[i].resize((int64_t) n_group*l.n_head_kv*l.n_rep*l.dk);
        n_lanes = std::max(n_lanes, pad_lanes(l.n_rep*n_group));
        d_max   = std::max<int64_t>({ d_max, l.dk, l.dv });
    }
    const int64_t n_score = std::max<int64_t>((ATLAS_CAND + 1)*n_mem + 2*n_block + n_ctx + n_group, d_max);

    for (auto & w : works) {
        w->qt.resize(d_max*n_lanes);
        w->s.resize(n_score*n_lanes);
        w->s1.resize(n_blocks*n_lanes);
        w->kt.resize(ATLAS_TILE*d_max);
        w->tmp.resize(2*n_lanes);
        w->block.resize(n_blocks);
        w->cred.resize(n_blocks);
        w->rel.resize(n_score);
        w->mark.resize(n_blocks);
        w->order.resize(std::max(n_blocks, n_score));
        w->tok.reserve(n_score);
        w->chosen.reserve(n_mem + n_block);
        w->slot.resize(n_mem);
        w->taken.resize(n_mem);
        w->ranked.reserve(std::min(n_cap, n_tok));
    }
}

void llama_atlas::begin(const llama_ubatch & ubatch) {
    settle();
    jobs.clear();

    if (cparams.warmup) {
        return;
    }

    // the tokens of each sequence must come one after the other
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];
        seq & s = seqs[seq_id];

        auto j = std::find_if(jobs.begin(), jobs.end(), [&](const job & j) { return j.s == &s; });
        const int64_t n_tok = s.n_tok + (j == jobs.end() ? 0 : j->rows.size());

        if (!ubatch.token || ubatch.n_seq_id[i] > 1 || ubatch.pos[i] != n_tok) {
            for (int32_t k = 0; k < ubatch.n_seq_id[i]; ++k) {
                seqs[ubatch.seq_id[i][k]].active = false;
            }
        }
        if (!s.active) {
            continue;
        }
        if (j == jobs.end()) {
            job n = {};
            n.s      = &s;
            n.stream = kv->get_stream(seq_id);
            jobs.push_back(std::move(n));
            j = jobs.end() - 1;
        }
        j->rows.push_back(i);
    }
    jobs.erase(std::remove_if(jobs.begin(), jobs.end(), [](const job & j) { return !j.s->active; }), jobs.end());

    const int n_threads = std::max(cparams.n_threads, cparams.n_threads_batch);
    while ((int) works.size() < n_threads) {
        works.push_back(std::make_unique<work>());
    }

    for (auto & j : jobs) {
        seq & s = *j.s;
        const int64_t n = j.rows.size();

        try {
            reserve(s, n);
        } catch (const std::bad_alloc &) {
            LLAMA_LOG_ERROR("%s: out of memory after %" PRId64 " tokens: the sequence cannot slide\n", __func__, s.n_tok);
            s.active = false;
            continue;
        }

        const bool has_cells = s.n_win0 > 0 && n_mem > 0;

        j.t0     = s.n_tok;
        j.n_wait = s.n_wait;
        j.b0     = s.n_rep;
        j.b1     = std::max<int64_t>(0, s.n_win0 - n_sink)/n_block;
        j.slid   = s.slid;
        if (n == 1 && has_cells && params.n_refresh < ATLAS_GROUP) {
            j.own    = s.slid || s.n_tok % params.n_refresh == 0;
            j.score  = s.slid || s.n_wait + n >= ATLAS_GROUP;
        } else {
            j.score  = n_mem > 0 && (s.slid || s.n_wait + n >= (has_cells ? params.n_refresh : ATLAS_GROUP));
            j.choose = j.score && has_cells;
        }

        std::vector<int32_t> pos_key, pos_query;
        for (int64_t t = j.t0; t < j.t0 + n; ++t) {
            pos_key.push_back(t);
        }
        if (j.score || j.own) {
            for (int64_t t = j.t0 - j.n_wait; t < j.t0 + n; ++t) {
                pos_query.push_back((int32_t) dist - t);
            }
        }
        for (const auto & r : ropes) {
            j.t_key  .push_back(make_table(r, pos_key));
            j.t_query.push_back(make_table(r, pos_query));
        }
        if (s.slid) {
            std::vector<int32_t> pos_cell;
            for (int64_t i = 0; i < n_sink + n_mem; ++i) {
                pos_cell.push_back(s.n_win0 - n_mem - n_sink + i);
            }
            s.t_cell.clear();
            for (const auto & r : ropes) {
                s.t_cell.push_back(make_table(r, pos_cell));
            }
        }
        if (staged && (j.choose || j.own) && s.stage_k.empty()) {
            for (const auto & l : layers) {
                s.stage_k.emplace_back(s.cells.size()*l.k->nb[1]);
                s.stage_v.emplace_back(s.cells.size()*l.v->nb[1]);
            }
        }

        s.n_tok += n;
        s.n_wait = n_mem == 0 ? 0 : j.score ? 0 : s.n_wait + n;
        s.n_rep  = j.b1;
        s.slid   = false;
        s.n_refresh += j.choose || j.own;
    }
    jobs.erase(std::remove_if(jobs.begin(), jobs.end(), [](const job & j) { return !j.s->active; }), jobs.end());

    int32_t n_head_kv = 0;
    int64_t n_q = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
        for (int k = 0; k < 4; ++k) {
            ops[i].next[k] = 0;
            ops[i].n_at[k] = 0;
        }
        n_head_kv = std::max(n_head_kv, layers[i].n_head_kv);
        n_q       = std::max<int64_t>(n_q, layers[i].n_rep*layers[i].dk);
    }
    int32_t n_rep = 0;
    for (const auto & l : layers) {
        n_rep = std::max(n_rep, l.n_rep);
    }
    if (items.size() < jobs.size()*n_head_kv) {
        items.resize(jobs.size()*n_head_kv);
        for (auto & it : items) {
            it.q.resize(n_q);
            it.p.resize(n_rep*pad_lanes((ATLAS_CAND + 1)*n_mem + 2*n_block));
            it.todo.reserve(n_sink + n_mem);
        }
    }
}

// hand the times of the last graph to its sequences
void llama_atlas::settle() {
    int64_t t_score = 0, t_write = 0;
    for (auto & w : works) {
        t_score += w->t_score;
        t_write += w->t_write;
        w->t_score = w->t_write = 0;
    }
    const int64_t n = jobs.size()*std::max(1, cparams.n_threads);
    for (auto & j : jobs) {
        j.s->t_score += t_score/n;
        j.s->t_write += t_write/n;
    }
}

ggml_tensor * llama_atlas::build(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, float kq_scale, int il) {
    for (size_t i = 0; i < layers.size(); ++i) {
        layer & l = layers[i];
        if ((int) l.il == il) {
            GGML_ASSERT(q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F32 && v->type == GGML_TYPE_F32);
            GGML_ASSERT(q->nb[0] == sizeof(float) && k->nb[0] == sizeof(float) && v->nb[0] == sizeof(float));
            l.scale = kq_scale;
            l.built = true;
            return ggml_map_custom3(ctx, q, k, v, compute, GGML_N_TASKS_MAX, &ops[i]);
        }
    }
    return q; // a layer that reads the cells of another one
}

void llama_atlas::check() const {
    for (const auto & l : layers) {
        if (!l.built) {
            throw std::runtime_error(format("ATLAS: layer %u has attention of a special kind", l.il));
        }
    }
}

// all threads of the graph are in the operation, so they can wait for each other
static void wait_for_all(std::atomic<int32_t> & n_at, int nth) {
    n_at.fetch_add(1, std::memory_order_acq_rel);
    for (int i = 0; n_at.load(std::memory_order_acquire) < nth; ++i) {
        if (i > 1000) {
            std::this_thread::yield();
        }
    }
}

static constexpr int64_t ATLAS_PART = 64; // candidates or cells that a thread takes at a time

void llama_atlas::compute(ggml_tensor * dst, const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v, int ith, int nth, void * userdata) {
    op & o = *(op *) userdata;
    llama_atlas & a = *o.atlas;
    const layer & l = a.layers[o.i_layer];

    // the queries pass unchanged
    const int64_t n_rows = q->ne[2];
    for (int64_t i = ith; i < n_rows; i += nth) {
        for (int64_t h = 0; h < q->ne[1]; ++h) {
            memcpy((char *) dst->data + h*dst->nb[1] + i*dst->nb[2], input::at(q, h, i), q->ne[0]*sizeof(float));
        }
    }

    // begin() made one for each thread
    GGML_ASSERT(a.jobs.empty() || (size_t) ith < a.works.size());

    const input in = { q, k, v };
    const int32_t n_items = a.jobs.size()*l.n_head_kv;

    // fn(item, job, head, part) for the parts of all items
    const auto for_parts = [&](int phase, const auto & n_parts, const auto & fn) {
        int32_t i = 0;
        int64_t first = 0; // part of item i
        for (int64_t next; i < n_items; ) {
            next = o.next[phase].fetch_add(1, std::memory_order_relaxed);
            for (; i < n_items; ++i) {
                const job & j = a.jobs[i/l.n_head_kv];
                head & h = j.s->heads[l.head0 + i % l.n_head_kv];
                const int64_t n = n_parts(i, j, h);
                if (next < first + n) {
                    fn(i, j, h, next - first);
                    break;
                }
                first += n;
            }
        }
    };
    const auto whole = [](int32_t, const job &, head &) -> int64_t { return 1; };

    bool any_own = false, any = false;
    for (const auto & j : a.jobs) {
        any_own = any_own || j.own;
        any     = any || j.own || j.choose;
    }
    if (a.jobs.empty()) {
        return;
    }
    work & w = *a.works[ith];

    int64_t t_start = ggml_time_us();

    for_parts(0, whole, [&](int32_t i, const job & j, head & h, int64_t) {
        const int32_t g = i % l.n_head_kv;
        a.items[i].todo.clear();
        a.archive(j, l, g, h, w, in);
        a.listen (j, l, g, h, w, in);
        if (j.own) {
            a.ask(j, l, g, h, w, a.items[i], in);
        }
        if (j.choose) {
            a.choose(j, h, w);
            a.place(j, h, w, a.items[i]);
        }
    });
    if (any_own) {
        w.t_score += ggml_time_us() - t_start;
        wait_for_all(o.n_at[0], nth);
        t_start = ggml_time_us();
        for_parts(1, [](int32_t, const job & j, head & h) -> int64_t {
            return j.own ? (h.cand.size() + ATLAS_PART - 1)/ATLAS_PART : 0;
        }, [&](int32_t i, const job &, head & h, int64_t part) {
            a.ask_part(l, h, w, a.items[i], part*ATLAS_PART, std::min<int64_t>(h.cand.size(), (part + 1)*ATLAS_PART));
        });
        w.t_score += ggml_time_us() - t_start;
        wait_for_all(o.n_at[1], nth);
        t_start = ggml_time_us();
        for_parts(2, whole, [&](int32_t i, const job & j, head & h, int64_t) {
            if (j.own) {
                a.ask_end(l, h, w, a.items[i]);
                a.choose(j, h, w);
                a.place(j, h, w, a.items[i]);
            }
        });
    }
    w.t_score += ggml_time_us() - t_start;
    if (!any) {
        return;
    }

    wait_for_all(o.n_at[2], nth);
    t_start = ggml_time_us();
    for_parts(3, [&](int32_t i, const job &, head &) -> int64_t {
        return (a.items[i].todo.size() + ATLAS_PART - 1)/ATLAS_PART;
    }, [&](int32_t i, const job & j, head & h, int64_t part) {
        const item & it = a.items[i];
        a.write(j, o.i_layer, i % l.n_head_kv, h, w, it, part*ATLAS_PART, std::min<int64_t>(it.todo.size(), (part + 1)*ATLAS_PART));
    });
    w.t_write += ggml_time_us() - t_start;

    if (a.staged) {
        wait_for_all(o.n_at[3], nth);
        if (ith == 0) {
            for (const auto & j : a.jobs) {
                if (j.choose || j.own) {
                    a.upload(j, o.i_layer);
                }
            }
        }
    }
}

// what the new queries look at counts for the survivors; a few wait until they are enough
void llama_atlas::listen(const job & j, const layer & l, int32_t g, head & h, work & w, const input & in) {
    const int64_t t1 = j.t0 + (int64_t) j.rows.size();

    if (j.score) {
        // each query is scored once; the last group, all of a chunk where they choose, is whole
        const int64_t n_group = j.choose ? std::max<int64_t>(params.n_chunk, params.n_refresh) : ATLAS_GROUP;
        int64_t q0 = std::max(j.t0 - j.n_wait, n_sink);
        for (int64_t n = (t1 - q0) % n_group; q0 < t1; n = n_group) {
            if (n > 0) {
                score(j, l, g, h, w, in, q0, q0 + n, j.choose && q0 + n == t1);
                q0 += n;
            }
        }
        if (j.choose || j.own) {
            survivors(j, h, w);
        }
    } else if (n_mem > 0) {
        float * dst = j.s->wait[&l - layers.data()].data();
        for (size_t i = 0; i < j.rows.size(); ++i) {
            for (int32_t r = 0; r < l.n_rep; ++r) {
                const int64_t head = g*l.n_rep + r;
                memcpy(dst + ((j.n_wait + i)*l.n_head_kv*l.n_rep + head)*l.dk, input::at(in.q, head, j.rows[i]), l.dk*sizeof(float));
            }
        }
    }
}

// rotate the new keys back and put them away with their values
void llama_atlas::archive(const job & j, const layer & l, int32_t g, head & h, work & w, const input & in) {
    const size_t row_k = ggml_row_size(l.k->type, l.dk);
    const size_t row_v = ggml_row_size(l.v->type, l.dv);

    float * x = w.kt.data();

    for (size_t i = 0; i < j.rows.size(); ++i) {
        const int64_t at = row(j.t0 + i);

        memcpy(x, input::at(in.k, g, j.rows[i]), l.dk*sizeof(float));
        if (l.rope >= 0) {
            atlas_rotate(x, j.t_key[l.rope].row(i), ropes[l.rope].n_rot, ropes[l.rope].neox, -1.0f);
        }
        atlas_store_row(l.k->type, x, h.k.data() + at*row_k, l.dk);

        // values only travel: keep them as the cache has them
        memcpy(x, input::at(in.v, g, j.rows[i]), l.dv*sizeof(float));
        if (kv->n_rot_v) {
            atlas_hadamard(x, l.dv, kv->n_rot_v);
        }
        atlas_store_row(l.v->type, x, h.v.data() + at*row_v, l.dv);

        h.u[at] = 0.0f;
    }

    // the mean keys of the blocks that the slide completed
    for (int64_t b = j.b0; b < j.b1; ++b) {
        const int64_t r0 = row(n_sink + b*n_block);
        float * rep = h.rep.data() + (r0 - n_sink)/n_block*l.dk;
        std::fill(rep, rep + l.dk, 0.0f);
        for (int64_t i = 0; i < n_block; ++i) {
            atlas_load_row(l.k->type, h.k.data() + (r0 + i)*row_k, x, l.dk);
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

// attention of the queries [q0, q1) on candidates from the archive, and on the window
void llama_atlas::score(const job & j, const layer & l, int32_t g, head & h, work & w, const input & in, int64_t q0, int64_t q1, bool last) {
    const seq & s = *j.s;

    const int64_t a1    = std::max(s.n_win0, n_sink);
    const int64_t nq    = q1 - q0;
    const int64_t n_use = l.n_rep*nq; // queries
    const int64_t nl    = pad_lanes(n_use);
    const size_t row_k  = ggml_row_size(l.k->type, l.dk);

    // column r*nq + t: query head r of token t
    float * qt = w.qt.data();
    std::fill(qt, qt + l.dk*nl, 0.0f);
    for (int64_t t = 0; t < nq; ++t) {
        const int64_t i = q0 + t - j.t0; // new ones from 0 on
        for (int32_t r = 0; r < l.n_rep; ++r) {
            const int64_t head = g*l.n_rep + r;
            const float * src = i >= 0 ? input::at(in.q, head, j.rows[i])
                : s.wait[&l - layers.data()].data() + ((i + j.n_wait)*l.n_head_kv*l.n_rep + head)*l.dk;
            float * x = w.kt.data();
            memcpy(x, src, l.dk*sizeof(float));
            if (l.rope >= 0) {
                atlas_rotate(x, j.t_query[l.rope].row(i + j.n_wait), ropes[l.rope].n_rot, ropes[l.rope].neox, 1.0f);
            }
            for (int32_t c = 0; c < l.dk; ++c) {
                qt[c*nl + r*nq + t] = x[c]*l.scale;
            }
        }
    }

    const int64_t j0 = first_kept(s);            // archive: [j0, a1)
    const int64_t b0 = (j0 - n_sink)/n_block;    // its complete blocks: [b0, b1)
    const int64_t b1 = std::max(b0, (a1 - n_sink)/n_block);
    const int64_t nb = b1 - b0;

    w.tok.clear();

    const int64_t n_cand = ATLAS_CAND*n_mem/n_block;
    const bool two_stages = a1 > j0 && nb > n_cand;

    if (two_stages) {
        // stage 1: the blocks' mean keys against averages of n_pool queries
        const bool pool = nq % n_pool == 0;
        const int64_t n1  = pool ? n_use/n_pool : n_use;
        const int64_t nl1 = pad_lanes(n1);

        std::vector<float> & s1 = w.s1;
        float * q1t = w.s.data(); // not needed yet
        std::fill(q1t, q1t + l.dk*nl1, 0.0f);
        for (int32_t c = 0; c < l.dk; ++c) {
            for (int64_t i = 0; i < n1; ++i) {
                if (pool) {
                    const float * x = qt + c*nl + i*n_pool;
                    q1t[c*nl1 + i] = 0.25f*(x[0] + x[1] + x[2] + x[3]);
                } else {
                    q1t[c*nl1 + i] = qt[c*nl + i];
                }
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
        for (int64_t b = 0; b < nb; ++b) {
            float sum = 0.0f;
            for (int64_t i = 0; i < n1; ++i) {
                sum += s1[b*nl1 + i];
            }
            w.block[b] = sum;
        }
        candidates(j, h, w, n_cand, w.tok);
    } else {
        for (int64_t t = j0; t < a1; ++t) {
            w.tok.push_back(t);
        }
    }
    w.n_arch = w.tok.size();
    for (int64_t t = a1; t < q1; ++t) {
        w.tok.push_back(t);
    }

    // stage 2: exact logits
    const int64_t n = w.tok.size();
    float * p = w.s.data();
    for (int64_t i = 0; i < n; i += ATLAS_TILE) {
        const int64_t m = std::min(ATLAS_TILE, n - i);
        for (int64_t c = 0; c < m; ++c) {
            atlas_load_row(l.k->type, h.k.data() + row(w.tok[i + c])*row_k, w.kt.data() + c*l.dk, l.dk);
        }
        atlas_dot(p + i*nl, w.kt.data(), qt, m, l.dk, nl);
    }
    for (int64_t i = n - 1; i >= 0 && w.tok[i] > q0; --i) { // causal
        for (int32_t r = 0; r < l.n_rep; ++r) {
            for (int64_t t = 0; t < nq && q0 + t < w.tok[i]; ++t) {
                p[i*nl + r*nq + t] = -INFINITY;
            }
        }
    }
    atlas_softmax(p, n, nl, w.tmp.data());

    for (int64_t i = 0; i < n; ++i) {
        float sum = 0.0f;
        for (int64_t c = 0; c < n_use; ++c) {
            sum += p[i*nl + c]*p[i*nl + c];
        }
        h.u[row(w.tok[i])] += sum/(l.n_rep*n_block);
    }

    if (last) {
        // every query counts the same, whatever part of its attention is in the window
        float * mass = w.tmp.data();
        std::fill(mass, mass + nl, 1e-20f);
        for (size_t i = 0; i < w.n_arch; ++i) {
            for (int64_t c = 0; c < nl; ++c) {
                mass[c] += p[i*nl + c];
            }
        }
        for (int64_t c = 0; c < nl; ++c) {
            mass[c] = c < n_use ? 1.0f/(n_use*mass[c]) : 0.0f;
        }
        for (size_t i = 0; i < w.n_arch; ++i) {
            float sum = 0.0f;
            for (int64_t c = 0; c < nl; ++c) {
                sum += p[i*nl + c]*mass[c];
            }
            w.rel[i] = sum;
        }
    }
}

// what one token's queries look at in the archive; the candidates are kept for the tokens that follow
void llama_atlas::ask(const job & j, const layer & l, int32_t g, head & h, work & w, item & it, const input & in) {
    const seq & s = *j.s;

    const int64_t a1 = s.n_win0;
    const int64_t j0 = first_kept(s);
    const int64_t b0 = (j0 - n_sink)/n_block;
    const int64_t b1 = (a1 - n_sink)/n_block;
    const int64_t nb = b1 - b0;
    const int64_t n_cand = ATLAS_CAND*n_mem/n_block;

    float * q = it.q.data();
    for (int32_t r = 0; r < l.n_rep; ++r) {
        float * x = q + r*l.dk;
        memcpy(x, input::at(in.q, g*l.n_rep + r, j.rows[0]), l.dk*sizeof(float));
        if (l.rope >= 0) {
            atlas_rotate(x, j.t_query[l.rope].row(j.n_wait), ropes[l.rope].n_rot, ropes[l.rope].neox, 1.0f);
        }
        for (int32_t c = 0; c < l.dk; ++c) {
            x[c] *= l.scale;
        }
    }

    // stage 1 as rarely as its cost demands, and when tokens have joined the archive
    if (j.slid || nb <= n_cand || j.t0 - h.t_cand >= nb/ATLAS_SCAN) {
        h.t_cand = j.t0;
        h.cand.clear();
        if (nb <= n_cand) {
            for (int64_t t = j0; t < a1; ++t) {
                h.cand.push_back(t);
            }
        } else {
            const int64_t n_pad = pad_lanes(nb);
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
    const size_t row_k = ggml_row_size(l.k->type, l.dk);
    const int64_t n_pad = pad_lanes(h.cand.size());

    for (int64_t i = i0; i < i1; i += ATLAS_TILE) {
        const int64_t m = std::min(ATLAS_TILE, i1 - i);
        for (int64_t c = 0; c < m; ++c) {
            atlas_load_row(l.k->type, h.k.data() + row(h.cand[i + c])*row_k, w.kt.data() + c*l.dk, l.dk);
        }
        atlas_dot_few(it.p.data() + i, n_pad, w.kt.data(), it.q.data(), m, l.dk, l.n_rep);
    }
}

// ... and their share of the attention
void llama_atlas::ask_end(const layer & l, const head & h, work & w, item & it) {
    const int64_t n = h.cand.size();
    const int64_t n_pad = pad_lanes(n);

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

// write listed cells of one head: keys rotated to sit just before the window, in time order, and new values
void llama_atlas::write(const job & j, size_t i_layer, int32_t g, const head & h, work & w, const item & it, int64_t i0, int64_t i1) {
    const seq & s = *j.s;
    const layer & l = layers[i_layer];

    const size_t row_k = ggml_row_size(l.k->type, l.dk);
    const size_t row_v = ggml_row_size(l.v->type, l.dv);
    const size_t el_v  = ggml_type_size(l.v->type);
    const int64_t kv_size = kv->get_size();

    float * x = w.kt.data();

    for (int64_t n = i0; n < i1; ++n) {
        const int64_t i = it.todo[n]/2;
        const bool has_value = it.todo[n] % 2;

        const int64_t token = i < n_sink ? i : h.idx[i - n_sink];
        const int64_t at    = i < n_sink ? i : n_sink + h.slot[i - n_sink]; // among the cells
        const int64_t cell  = s.cells[at];

        atlas_load_row(l.k->type, h.k.data() + row(token)*row_k, x, l.dk);
        if (l.rope >= 0) {
            atlas_rotate(x, s.t_cell[l.rope].row(i), ropes[l.rope].n_rot, ropes[l.rope].neox, 1.0f);
        }
        if (kv->n_rot_k) {
            atlas_hadamard(x, l.dk, kv->n_rot_k);
        }
        uint8_t * dst_k = staged ? j.s->stage_k[i_layer].data() + at*l.k->nb[1]
                                 : (uint8_t *) l.k->data + j.stream*l.k->nb[2] + cell*l.k->nb[1];
        atlas_store_row(l.k->type, x, dst_k + g*row_k, l.dk);

        const uint8_t * src_v = h.v.data() + row(token)*row_v;
        if (staged) {
            memcpy(j.s->stage_v[i_layer].data() + at*l.v->nb[1] + g*row_v, src_v, row_v);
        } else if (has_value) {
            continue;
        } else if (!kv->v_trans) {
            memcpy((uint8_t *) l.v->data + j.stream*l.v->nb[2] + cell*l.v->nb[1] + g*row_v, src_v, row_v);
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
