#include "llama-atlas.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <stdexcept>
#include <thread>

// the memory's operation in the graph of each layer: what it is given, and how the threads share its work

// make room for n_new tokens of a sequence
void llama_atlas::reserve(seq & s, int64_t n_new) {
    const int64_t n_tok  = s.n_tok + n_new;
    const int64_t n_rows = n_sink + std::min(n_cap, GGML_PAD(n_tok + n_tok/8, 1024));
    const int64_t n_group  = std::max<int64_t>({ n_together, params.n_chunk, params.n_refresh });

    if (s.heads.empty()) {
        s.heads = take_aside(std::min(n_tok, n_sink + n_cap), 2*n_rows);
    }
    s.heads.resize(n_heads);
    s.wait  .resize(layers.size());
    s.n_wait.resize(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
        const layer & l = layers[i];
        for (int32_t g = 0; g < l.n_head_kv; ++g) {
            head & h = s.heads[l.head0 + g];
            if ((int64_t) h.u.size() < n_tok && (int64_t) h.u.size() < n_rows) {
                h.k.reserve(n_rows*l.row_k());
                h.v.reserve(n_rows*l.row_v());
                h.u.resize(n_rows);
                h.rep.resize(GGML_PAD(n_rows, n_block)/n_block*l.dk);
            }
            h.idx.reserve(n_mem);
            h.slot.reserve(n_mem);
            h.rank.resize(n_mem, UINT32_MAX);
            h.surv.reserve(n_mem);
            h.cand.reserve((r_cand + 1)*n_mem + 2*n_block);
        }
        const size_t n_wait = n_group*l.n_head_kv*l.n_rep*l.dk; // may have been more
        s.wait[i].resize(std::max(n_wait, s.wait[i].size()));
    }
}

// make room for what the threads need for a sequence
void llama_atlas::reserve_work(const seq & s) {
    const int64_t n_rows   = s.heads[0].u.size(); // which grows in steps
    const int64_t n_blocks = n_rows/n_block + 2;
    const int64_t n_group  = std::max<int64_t>({ n_together, params.n_chunk, params.n_refresh });

    int64_t n_lanes = 0;
    int64_t n_rep = 0;
    int64_t d_max = 0;
    for (const auto & l : layers) {
        n_lanes = std::max(n_lanes, atlas_pad_lanes(l.n_rep*n_group));
        n_rep   = std::max<int64_t>(n_rep, l.n_rep);
        d_max   = std::max<int64_t>({ d_max, l.dk, l.dv });
    }
    const int64_t n_score = std::max<int64_t>((r_cand + 1)*n_mem + 2*n_block + n_ctx + n_group, d_max);

    // other sequences may need more
    const auto grow = [](auto & v, int64_t n) {
        if ((int64_t) v.size() < n) {
            v.resize(n);
        }
    };
    for (auto & w : works) {
        grow(w->qt,    3*d_max*n_rep);
        grow(w->s,     n_score*n_lanes);
        grow(w->s1,    n_blocks*n_lanes);
        grow(w->kt,    n_tile*d_max);
        grow(w->conv,  d_max*sizeof(float)); // no type has more
        grow(w->tmp,   2*n_lanes);
        grow(w->block, n_blocks);
        grow(w->cred,  n_blocks);
        grow(w->rel,   n_score);
        grow(w->mark,  n_blocks);
        grow(w->order, std::max(n_blocks, n_score));
        grow(w->slot,  n_mem);
        grow(w->taken, n_mem);
        w->tok.reserve(n_score);
        w->chosen.reserve(n_mem + n_block);
        w->ranked.reserve(n_rows);
    }
}

// make room for what the threads hand to each other
void llama_atlas::reserve_items() {
    const int64_t n_group = std::max<int64_t>({ n_together, params.n_chunk, params.n_refresh });
    const int64_t n_cand  = (r_cand + 1)*n_mem + 2*n_block;

    int32_t n_head_kv = 0;
    int64_t n_q = 0, n_p = 0;
    for (const auto & l : layers) {
        n_head_kv = std::max(n_head_kv, l.n_head_kv);
        n_q = std::max(n_q, (atlas_pad_lanes(l.n_rep*n_group) + n_share_max*ATLAS_LANES)*l.dk); // the parts are padded
        n_p = std::max(n_p, l.n_rep*atlas_pad_lanes(n_cand));
    }
    n_p = std::max(n_p, n_share_max*2*(n_cand + n_ctx + n_group));

    items.resize(std::max(items.size(), jobs.size()*n_head_kv));
    for (auto & it : items) {
        it.q.resize(std::max<size_t>(it.q.size(), n_q));
        it.p.resize(std::max<size_t>(it.p.size(), n_p));
        it.tok .reserve(n_cand + n_ctx + n_group);
        it.todo.reserve(n_sink + n_mem);
    }
}

void llama_atlas::begin(const llama_ubatch & ubatch) {
    settle();
    jobs.clear();

    const int n_threads = std::max(cparams.n_threads, cparams.n_threads_batch);
    while ((int) works.size() < n_threads) {
        works.push_back(std::make_unique<work>());
    }
    for (auto & w : works) {
        w->few.resize(n_few);
        w->tiles.resize(n_few_tiles);
    }
    for (size_t i = 0; i < model.hparams.n_layer_all; ++i) {
        few_ops[i].next = 0;
    }

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

    for (auto & j : jobs) {
        seq & s = *j.s;
        const int64_t n = j.rows.size();

        try {
            reserve(s, n);
            reserve_work(s);
            reserve_items();
        } catch (const std::bad_alloc &) {
            LLAMA_LOG_ERROR("%s: out of memory after %" PRId64 " tokens: the sequence cannot slide\n", __func__, s.n_tok);
            s.active = false;
            continue;
        }

        const bool has_cells = s.n_win0 > 0 && n_mem > 0;

        j.t0     = s.n_tok;
        j.n_wait = s.n_wait;
        j.n_early = *std::max_element(s.n_wait.begin(), s.n_wait.end());
        j.b0     = s.n_rep;
        j.b1     = std::max<int64_t>(0, s.n_win0 - n_sink)/n_block;
        j.slid   = s.slid;
        j.sinks  = s.slid && n_mem == 0;
        if (n_mem > 0 && n == 1 && (!has_cells || params.n_refresh < n_together)) {
            j.own = has_cells && (s.slid || s.n_tok % params.n_refresh == 0);
            // one layer after the other, so that no token waits for all of them
            const bool first = s.slid && s.n_rep == 0; // nothing has survived yet
            for (size_t i = 0; i < layers.size(); ++i) {
                const bool turn = (j.t0 + n + i*n_together/layers.size()) % n_together == 0;
                j.score.push_back(first || turn || j.n_wait[i] + n >= n_together);
            }
        } else {
            const bool all = n_mem > 0 && (s.slid || j.n_early + n >= (has_cells ? params.n_refresh : n_together));
            j.score.resize(layers.size(), all);
            j.choose = all && has_cells;
        }

        std::vector<int32_t> pos_key, pos_query;
        for (int64_t t = j.t0; t < j.t0 + n; ++t) {
            pos_key.push_back(t);
        }
        if (j.own || std::find(j.score.begin(), j.score.end(), true) != j.score.end()) {
            for (int64_t t = j.t0 - j.n_early; t < j.t0 + n; ++t) {
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
        if (staged && j.fills() && s.stage_k.empty()) {
            for (const auto & l : layers) {
                s.stage_k.emplace_back(s.cells.size()*l.k->nb[1]);
                s.stage_v.emplace_back(s.cells.size()*l.v->nb[1]);
            }
        }

        // the error of the choice: one layer after the other, now and then
        j.measure = j.choose || (j.own && (s.slid || s.n_tok % n_together == 0)) ? (s.n_tok/n_together) % (int64_t) layers.size() : -1;

        s.n_tok += n;
        for (size_t i = 0; i < layers.size(); ++i) {
            s.n_wait[i] = n_mem == 0 || j.score[i] ? 0 : s.n_wait[i] + n;
        }
        s.n_rep  = j.b1;
        s.slid   = false;
        s.n_refresh += j.choose || j.own;
    }
    jobs.erase(std::remove_if(jobs.begin(), jobs.end(), [](const job & j) { return !j.s->active; }), jobs.end());

    for (size_t i = 0; i < layers.size(); ++i) {
        for (int k = 0; k < 4; ++k) {
            ops[i].next[k] = 0;
            ops[i].n_at[k] = 0;
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

void llama_atlas::compute(ggml_tensor * dst, const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v, int ith, int nth, void * userdata) {
    op & o = *(op *) userdata;
    llama_atlas & a = *o.atlas;
    const layer & l = a.layers[o.i_layer];

    if (ith == 0) {
        a.t_computed.store(ggml_time_us(), std::memory_order_relaxed);
    }

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

    if (a.jobs.empty()) {
        return;
    }
    work & w = *a.works[ith];

    // all threads have something to do, and not much more than that: each part converts the keys anew
    const int64_t n_share = std::clamp<int64_t>((2*nth + n_items - 1)/n_items, 1, n_share_max);

    int64_t t_start = ggml_time_us();

    for_parts(0, whole, [&](int32_t i, const job & j, head & h, int64_t) {
        const int32_t g = i % l.n_head_kv;
        a.items[i].todo.clear();
        a.archive(j, l, g, h, w, in);
        a.listen (j, l, g, h, w, a.items[i], in, n_share);
        if (j.own) {
            a.ask(j, l, g, h, w, a.items[i], in);
        }
    });
    w.t_score += ggml_time_us() - t_start;
    if (std::none_of(a.jobs.begin(), a.jobs.end(), [](const job & j) { return j.fills(); })) {
        return;
    }

    wait_for_all(o.n_at[0], nth);
    t_start = ggml_time_us();
    for_parts(1, [&](int32_t i, const job & j, head & h) -> int64_t {
        return j.choose ? a.items[i].n_parts : j.own ? (h.cand.size() + n_part - 1)/n_part : 0;
    }, [&](int32_t i, const job & j, head & h, int64_t part) {
        if (j.choose) {
            a.score_part(l, h, w, a.items[i], part);
        } else {
            a.ask_part(l, h, w, a.items[i], part*n_part, std::min<int64_t>(h.cand.size(), (part + 1)*n_part));
        }
    });
    w.t_score += ggml_time_us() - t_start;

    wait_for_all(o.n_at[1], nth);
    t_start = ggml_time_us();
    for_parts(2, whole, [&](int32_t i, const job & j, head & h, int64_t) {
        if (j.choose) {
            a.score_end(l, h, w, a.items[i]);
            a.survivors(j, h, w);
        } else if (j.own) {
            a.ask_end(l, h, w, a.items[i]);
        } else if (!j.sinks) {
            return;
        }
        if (j.sinks) {
            w.chosen.clear();
        } else {
            a.choose(j, h, w);
        }
        a.place(j, h, w, a.items[i]);
        a.omega(j, l, i % l.n_head_kv, h, w, in);
    });
    w.t_score += ggml_time_us() - t_start;

    wait_for_all(o.n_at[2], nth);
    t_start = ggml_time_us();
    for_parts(3, [&](int32_t i, const job &, head &) -> int64_t {
        return (a.items[i].todo.size() + n_part - 1)/n_part;
    }, [&](int32_t i, const job & j, head & h, int64_t part) {
        const item & it = a.items[i];
        a.write(j, o.i_layer, i % l.n_head_kv, h, w, it, part*n_part, std::min<int64_t>(it.todo.size(), (part + 1)*n_part));
    });
    w.t_write += ggml_time_us() - t_start;

    if (a.staged) {
        wait_for_all(o.n_at[3], nth);
        if (ith == 0) {
            for (const auto & j : a.jobs) {
                if (j.fills()) {
                    a.upload(j, o.i_layer);
                }
            }
        }
    }
}
