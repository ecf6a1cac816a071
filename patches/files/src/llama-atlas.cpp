#include "llama-atlas.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <stdexcept>

//
// llama_atlas_buffer
//

llama_atlas_buffer::llama_atlas_buffer(const llama_atlas_buffer & other) {
    reserve(other.size_);
    if (size_ > 0) {
        memcpy(data_, other.data_, size_);
    }
}

void llama_atlas_buffer::reserve(size_t size) {
    if (size <= size_) {
        return;
    }
    void * p = realloc(data_, size);
    if (!p) {
        throw std::bad_alloc();
    }
    data_ = (uint8_t *) p;
    size_ = size;
}

//
// llama_atlas
//

// scratch memory of a thread; everything is sized before the threads start
struct llama_atlas::work {
    std::vector<float> qt;    // [dk][n_lanes]
    std::vector<float> s;     // [n_tokens][n_lanes]
    std::vector<float> s1;    // [n_blocks][ATLAS_LANES multiple]
    std::vector<float> kt;    // [n_tile][max(dk, dv)]
    std::vector<float> tmp;   // [2*n_lanes]
    std::vector<float> block; // [n_blocks]: scores
    std::vector<float> cred;  // [n_blocks]: with credits
    std::vector<float> rel;   // [n_tokens]: recall score of a candidate

    std::vector<uint8_t>  mark;   // [n_blocks]
    std::vector<uint32_t> order;  // [n_blocks]
    std::vector<uint32_t> tok;    // candidates, then the window
    std::vector<uint32_t> chosen; // the new content of the cells
    std::vector<uint32_t> slot;
    std::vector<uint8_t>  taken;  // [n_mem]

    std::vector<std::pair<float, uint32_t>> ranked;

    size_t n_arch = 0; // how many of tok are in the archive
};

static constexpr int64_t ATLAS_TILE = 48; // keys that are converted at a time
static constexpr float   ATLAS_CAND = 2.0f; // candidates of stage 1, in units of the memory cells

static int64_t pad_lanes(int64_t n) {
    return GGML_PAD(n, ATLAS_LANES);
}

std::string llama_atlas::unsupported(const llama_model & model, bool causal_attn) {
    const auto & hparams = model.hparams;

    if (!causal_attn) {
        return "the model's attention is not causal";
    }
    if (llama_model_has_encoder(&model)) {
        return "encoder-decoder models have no memory that could slide";
    }
    if (llama_model_is_recurrent(&model) || llama_model_is_hybrid(&model)) {
        return "recurrent and hybrid models keep their past in a state, not in KV cells";
    }
    if (hparams.is_mla()) {
        return "multi-head latent attention (MLA) shares one compressed key among the heads";
    }
    if (hparams.n_pos_per_embd() > 1) {
        return "M-RoPE positions (vision models) cannot be rotated to another place";
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        return "ALiBi biases depend on the true distance";
    }
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return "the model's positions are not rotary (RoPE)";
    }
    if (hparams.n_attn_temp_floor_scale > 0 || hparams.f_attn_temp_scale > 0.0f || hparams.attn_temp_length > 0) {
        return "the attention's temperature depends on the absolute position";
    }
    if (model.arch == LLM_ARCH_STEP35) {
        return "the layers rotate different numbers of dimensions";
    }
    return "";
}

static llama_kv_cache * full_attention_cache(llama_memory_i & memory) {
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(&memory)) {
        return iswa->get_base();
    }
    // the caches of special architectures (DSA, MSA, ...) are classes of their own
    return dynamic_cast<llama_kv_cache *>(&memory);
}

llama_atlas::llama_atlas(
        const llama_model        & model,
        const llama_cparams      & cparams,
        llama_memory_i           & memory,
        const llama_atlas_params & params,
        ggml_backend_t             backend_cpu) :
    model(model), cparams(cparams), kv(full_attention_cache(memory)), params(params), backend_cpu(backend_cpu) {

    const std::string reason = unsupported(model, cparams.causal_attn);
    if (!reason.empty()) {
        throw std::runtime_error("ATLAS: " + reason);
    }
    if (!kv || kv->other) {
        throw std::runtime_error("ATLAS: this model has a KV cache of a special kind");
    }

    const auto & hparams = model.hparams;

    n_sink = 4;
    n_mem  = params.n_cells;
    n_ctx  = n_sink + n_mem + params.n_window;
    dist   = std::max<int64_t>(1, (n_ctx - n_mem)/2 - n_sink);

    GGML_ASSERT(n_ctx <= (int64_t) kv->get_size());

    size_t bytes_per_token = 0;

    for (const auto & kvl : kv->layers) {
        const uint32_t il = kvl.il;

        layer l;
        l.il        = il;
        l.n_head_kv = hparams.n_head_kv(il);
        l.n_rep     = hparams.n_head(il)/hparams.n_head_kv(il);
        l.dk        = hparams.n_embd_head_k(il);
        l.dv        = hparams.n_embd_head_v(il);
        l.rope      = -1;
        l.head0     = n_heads;
        l.scale     = 0.0f;
        l.k         = kvl.k;
        l.v         = kvl.v;

        if (l.n_head_kv*l.n_rep != (int32_t) hparams.n_head(il)) {
            throw std::runtime_error(format("ATLAS: layer %u has %u heads for %d KV heads", il, hparams.n_head(il), l.n_head_kv));
        }
        if (l.dk % ggml_blck_size(l.k->type) != 0 || l.dv % ggml_blck_size(l.v->type) != 0) {
            throw std::runtime_error(format("ATLAS: head sizes %d and %d of layer %u do not fit the cache types %s and %s",
                        l.dk, l.dv, il, ggml_type_name(l.k->type), ggml_type_name(l.v->type)));
        }

        if (hparams.has_rope(il)) {
            rope r;
            r.il         = il;
            r.n_rot      = hparams.n_rot(il);
            r.neox       = hparams.rope_type == LLAMA_ROPE_TYPE_NEOX;
            r.freq_base  = model.get_rope_freq_base (cparams, il);
            r.freq_scale = model.get_rope_freq_scale(cparams, il);

            if (ggml_tensor * factors = model.get_rope_factors(cparams, il)) {
                r.factors.resize(ggml_nelements(factors));
                ggml_backend_tensor_get(factors, r.factors.data(), 0, ggml_nbytes(factors));
            }

            for (size_t i = 0; i < ropes.size() && l.rope < 0; ++i) {
                const rope & o = ropes[i];
                if (o.n_rot == r.n_rot && o.freq_base == r.freq_base && o.freq_scale == r.freq_scale && o.factors == r.factors) {
                    l.rope = i;
                }
            }
            if (l.rope < 0) {
                l.rope = ropes.size();
                ropes.push_back(std::move(r));
            }
        }

        n_heads += l.n_head_kv;
        layers.push_back(l);

        bytes_per_token += l.n_head_kv*(ggml_row_size(l.k->type, l.dk) + ggml_row_size(l.v->type, l.dv)
                + sizeof(float) + l.dk*sizeof(float)/n_block);
    }

    n_cap = params.archive_max/cparams.n_seq_max/bytes_per_token;
    n_cap = std::min<int64_t>(n_cap, std::numeric_limits<int32_t>::max()/2)/n_block*n_block;
    if (n_cap < n_ctx + 2*n_block + params.n_chunk) {
        throw std::runtime_error(format(
            "ATLAS: the archive holds %" PRId64 " tokens of each of %u sequences, less than the context of %" PRId64 ": allow at least %" PRId64 " MiB",
            n_cap, cparams.n_seq_max, n_ctx, (int64_t) ((n_ctx + 3*n_block + params.n_chunk)*bytes_per_token*cparams.n_seq_max >> 20) + 1));
    }

    if (params.blend < 1.0f) {
        bias_mem = params.blend > 0.0f ? logf(params.blend) : -INFINITY;
    }

    seqs.resize(cparams.kv_unified ? LLAMA_MAX_SEQ : cparams.n_seq_max);
    kv->atlas = this;

    LLAMA_LOG_INFO("%s: %zu layers, %d KV heads, %" PRId64 " sinks + %" PRId64 " memory cells + window of %d, archive: %zu bytes/token, up to %" PRId64 " tokens of each sequence\n",
            __func__, layers.size(), n_heads, n_sink, n_mem, params.n_window, bytes_per_token, n_cap);
}

llama_atlas::~llama_atlas() {
    kv->atlas = nullptr;
}

int64_t llama_atlas::first_kept(const seq & s) const {
    const int64_t n_over = s.n_tok - n_sink - n_cap;
    return n_over <= 0 ? n_sink : n_sink + GGML_PAD(n_over, n_block);
}

void llama_atlas::reset(seq & s) {
    s = seq();
}

void llama_atlas::trim(seq & s, int64_t n) {
    if (n < s.n_win0) {
        LLAMA_LOG_WARN("%s: tokens from %" PRId64 " on were removed, but the window starts at %" PRId64 ": the memory is lost\n", __func__, n, s.n_win0);
        s.active = false;
        return;
    }
    for (size_t i = 0; i < s.pend.size(); ++i) {
        const layer & l = layers[i];
        s.pend[i].resize(std::max<int64_t>(0, n - s.n_done)*(l.n_head_kv*(l.n_rep*l.dk + l.dk + l.dv)));
    }
    for (auto & h : s.heads) {
        // what a removed token left in u must not be taken for that of the next one in its place
        for (int64_t j = n; j < s.n_done; ++j) {
            h.u[row(j)] = 0.0f;
        }
    }
    s.n_tok  = n;
    s.n_done = std::min(s.n_done, n);
}

void llama_atlas::on_clear() {
    for (auto & s : seqs) {
        reset(s);
    }
}

void llama_atlas::on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    for (llama_seq_id i = 0; i < (llama_seq_id) seqs.size(); ++i) {
        seq & s = seqs[i];
        if ((seq_id >= 0 && seq_id != i) || p0 >= s.n_tok) {
            if (seq_id == i && p0 <= 0) {
                reset(s); // it was empty, and so is whatever made it inactive
            }
            continue;
        }
        if (p1 < s.n_tok) {
            s.active = false;
        } else if (p0 <= 0) {
            reset(s);
        } else {
            trim(s, p0);
        }
    }
}

void llama_atlas::on_seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    if (kv->n_stream == 1) {
        // the sequences share cells: neither may rewrite them
        seqs[seq_id_src].active = false;
        seqs[seq_id_dst].active = false;
        return;
    }
    try {
        seqs[seq_id_dst] = seqs[seq_id_src];
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_ERROR("%s: no memory for a copy of sequence %d: the copy cannot slide\n", __func__, seq_id_src);
        reset(seqs[seq_id_dst]);
        seqs[seq_id_dst].active = false;
    }
}

void llama_atlas::on_seq_mod(llama_seq_id seq_id) {
    if (seq_id >= 0) {
        seqs[seq_id].active = false;
        return;
    }
    for (auto & s : seqs) {
        s.active = false;
    }
}

template <typename T>
static void add_bias(T * data, const llama_ubatch & ubatch, int64_t n_kv, float bias, const std::function<const std::vector<uint32_t> * (llama_seq_id)> & cells) {
    const T value = llama_cast<T>(bias);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (const auto * mem = cells(ubatch.seq_id[i][0])) {
            for (uint32_t c : *mem) {
                data[i*n_kv + c] = value;
            }
        }
    }
}

void llama_atlas::set_mask_bias(ggml_tensor * dst, const llama_ubatch & ubatch) const {
    if (bias_mem == 0.0f) {
        return;
    }
    const auto cells = [this](llama_seq_id seq_id) {
        return seqs[seq_id].n_win0 > 0 ? &seqs[seq_id].cells : nullptr;
    };
    if (dst->type == GGML_TYPE_F16) {
        add_bias((ggml_fp16_t *) dst->data, ubatch, dst->ne[0], bias_mem, cells);
    } else {
        add_bias((float *) dst->data, ubatch, dst->ne[0], bias_mem, cells);
    }
}

//
// capture
//

void llama_atlas::check(const llm_graph_result & res) const {
    for (const auto & l : layers) {
        if (!res.t_atlas[l.il].q) {
            throw std::runtime_error(format("ATLAS: layer %u has attention of a special kind", l.il));
        }
    }
}

void llama_atlas::capture(const llama_ubatch & ubatch, const llm_graph_result & res, ggml_backend_sched_t sched) {
    if (cparams.warmup) {
        return;
    }

    const int64_t t_start = ggml_time_us();

    // the tokens of each sequence must come one after the other
    std::vector<seq *> owner(ubatch.n_tokens);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];
        seq & s = seqs[seq_id];
        owner[i] = &s;

        if (!ubatch.token || ubatch.n_seq_id[i] > 1 || ubatch.pos[i] != s.n_tok) {
            for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
                seqs[ubatch.seq_id[i][j]].active = false;
            }
        }
        if (!s.active) {
            owner[i] = nullptr;
            continue;
        }
        s.n_tok++;
        s.pend.resize(layers.size());
    }

    for (size_t i_layer = 0; i_layer < layers.size(); ++i_layer) {
        layer & l = layers[i_layer];

        const auto & tap = res.t_atlas[l.il];
        l.scale = tap.kq_scale;

        const ggml_tensor * src[3] = { tap.q, tap.k, tap.v };
        const float * data[3];

        size_t n_scratch = 0;
        for (const auto * t : src) {
            n_scratch += ggml_nelements(t);
        }
        if (scratch.size() < n_scratch) {
            scratch.resize(n_scratch);
        }
        float * next = scratch.data();
        for (int i = 0; i < 3; ++i) {
            if (ggml_backend_buffer_is_host(src[i]->buffer)) {
                data[i] = (const float *) src[i]->data;
            } else {
                ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(sched, const_cast<ggml_tensor *>(src[i]));
                ggml_backend_tensor_get_async(backend, src[i], next, 0, ggml_nbytes(src[i]));
                ggml_backend_synchronize(backend);
                data[i] = next;
                next += ggml_nelements(src[i]);
            }
        }

        const int64_t ne[3] = { (int64_t) l.n_head_kv*l.n_rep*l.dk, (int64_t) l.n_head_kv*l.dk, (int64_t) l.n_head_kv*l.dv };
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            if (owner[i]) {
                for (int j = 0; j < 3; ++j) {
                    owner[i]->pend[i_layer].insert(owner[i]->pend[i_layer].end(), data[j] + i*ne[j], data[j] + (i + 1)*ne[j]);
                }
            }
        }
    }

    const int64_t t_token = (ggml_time_us() - t_start)/ubatch.n_tokens;
    for (auto * s : owner) {
        if (s) {
            s->t_capture += t_token;
        }
    }
}

//
// refresh
//

// the angles of each position, by the model's own rotation of unit vectors
llama_atlas::rope_table llama_atlas::make_table(const rope & r, const std::vector<int32_t> & pos) const {
    rope_table res;
    res.n_rot = r.n_rot;
    if (pos.empty()) {
        return res;
    }

    const int64_t n = r.n_rot;
    const int64_t n_pos = pos.size();

    ggml_init_params ip = {
        /*.mem_size   =*/ (size_t) (3*n*n_pos + n_pos + n)*sizeof(float) + 16*ggml_tensor_overhead() + ggml_graph_overhead_custom(8, false),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ false,
    };
    ggml_context_ptr ctx { ggml_init(ip) };

    ggml_tensor * x = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n, 1, n_pos);
    ggml_tensor * p = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n_pos);
    ggml_tensor * f = nullptr;

    float * xd = (float *) x->data;
    for (int64_t j = 0; j < n_pos; ++j) {
        for (int64_t i = 0; i < n; ++i) {
            xd[j*n + i] = (r.neox ? i < n/2 : i % 2 == 0) ? 1.0f : 0.0f;
        }
    }
    memcpy(p->data, pos.data(), n_pos*sizeof(int32_t));
    if (!r.factors.empty()) {
        f = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, r.factors.size());
        memcpy(f->data, r.factors.data(), ggml_nbytes(f));
    }

    // YaRN scales what it rotates; the keys have been scaled already
    const float attn_factor = cparams.yarn_ext_factor != 0.0f ? 1.0f/(1.0f + 0.1f*logf(1.0f/r.freq_scale)) : 1.0f;

    ggml_tensor * y = ggml_rope_ext(ctx.get(), x, p, f, r.n_rot, model.hparams.rope_type, cparams.n_ctx_orig_yarn,
            r.freq_base, r.freq_scale, cparams.yarn_ext_factor, attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);

    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), 8, false);
    ggml_build_forward_expand(gf, y);
    if (ggml_backend_graph_compute(backend_cpu, gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("ATLAS: cannot compute the rotation");
    }

    res.cs.resize(n*n_pos);
    const float * yd = (const float *) y->data;
    for (int64_t j = 0; j < n_pos; ++j) {
        for (int64_t i = 0; i < n/2; ++i) {
            res.cs[j*n + i]       = r.neox ? yd[j*n + i]       : yd[j*n + 2*i];
            res.cs[j*n + n/2 + i] = r.neox ? yd[j*n + n/2 + i] : yd[j*n + 2*i + 1];
        }
    }
    return res;
}

namespace {
struct atlas_parallel {
    const std::function<void(int64_t, int)> & fn;
    int64_t n;
    std::atomic<int64_t> next;
};
}

// run fn(i, thread) for all i < n on the CPU backend's threads
void llama_atlas::parallel(int64_t n, int n_threads, const std::function<void(int64_t, int)> & fn) {
    atlas_parallel p { fn, n, {0} };

    ggml_init_params ip = {
        /*.mem_size   =*/ 8*ggml_tensor_overhead() + ggml_graph_overhead_custom(8, false),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ false,
    };
    ggml_context_ptr ctx { ggml_init(ip) };

    ggml_tensor * arg = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 1);
    ggml_tensor * op  = ggml_custom_4d(ctx.get(), GGML_TYPE_F32, 1, 1, 1, 1, &arg, 1,
            [](ggml_tensor *, int ith, int, void * userdata) {
                auto * p = (atlas_parallel *) userdata;
                for (int64_t i; (i = p->next.fetch_add(1, std::memory_order_relaxed)) < p->n; ) {
                    p->fn(i, ith);
                }
            }, n_threads, &p);

    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), 8, false);
    ggml_build_forward_expand(gf, op);

    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend_cpu));
    if (auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        set_n_threads(backend_cpu, n_threads);
    }
    if (ggml_backend_graph_compute(backend_cpu, gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("ATLAS: the CPU backend failed");
    }
}

// the KV cells of the sinks and the memory cells; false when the sequence does not have them for itself
bool llama_atlas::find_cells(llama_seq_id seq_id, std::vector<uint32_t> & res) const {
    const auto & cells = kv->get_cells(seq_id);
    for (const auto & [pos, cell] : cells.seq_pos_get(seq_id)) {
        if ((int64_t) res.size() == n_sink + n_mem) {
            break;
        }
        if (pos != (llama_pos) res.size() || cells.seq_count(cell) != 1) {
            return false;
        }
        res.push_back(cell);
    }
    return (int64_t) res.size() == n_sink + n_mem;
}

int32_t llama_atlas::n_reusable(llama_seq_id seq_id, int32_t n_past) const {
    const seq & s = seqs[seq_id];
    return n_past >= s.n_win0 ? n_past : 0;
}

int32_t llama_atlas::prepare(llama_seq_id seq_id, int32_t n_want, int32_t n_threads) {
    seq & s = seqs[seq_id];

    const int64_t n_used = kv->get_cells(seq_id).seq_pos_get(seq_id).size();
    const int64_t n_free = (s.active ? n_ctx : (int64_t) kv->get_size()) - n_used;

    if (!s.active) {
        return std::max<int64_t>(0, std::min<int64_t>(n_want, n_free));
    }

    // most of a long prompt is read in batches of n_chunk, so there is never much to archive at once
    const int64_t n_new = std::min<int64_t>({ n_want, params.n_chunk, n_free > 0 ? n_free : n_want });

    try {
        if (n_free > 0) {
            if (s.n_tok - s.n_done >= params.n_refresh) {
                run(s, s.n_win0, false, 0, {}, n_threads);
            }
            return n_new;
        }

        const int64_t n_old = s.n_win0 > 0 ? s.n_win0 : n_sink + n_mem;
        const int64_t n_win0 = n_old + GGML_PAD(n_new, params.n_refresh);

        std::vector<uint32_t> cells;
        if (n_used != n_ctx || !find_cells(seq_id, cells)) {
            LLAMA_LOG_WARN("%s: sequence %d shares its cells or was changed: it cannot slide\n", __func__, seq_id);
            s.active = false;
            return 0;
        }

        const std::vector<uint32_t> mem(cells.begin() + n_sink, cells.end());
        run(s, n_win0, n_mem > 0, kv->get_stream(seq_id), std::move(cells), n_threads);

        const int64_t t_start = ggml_time_us();
        kv->atlas = nullptr; // this removal is ours
        kv->seq_rm(seq_id, n_old, n_win0);
        kv->atlas = this;
        s.n_win0 = n_win0;
        s.n_refresh++;
        s.cells.assign(mem.begin(), mem.end());
        s.t_slide += ggml_time_us() - t_start;
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_ERROR("%s: out of memory after %" PRId64 " tokens: sequence %d cannot grow\n", __func__, s.n_tok, seq_id);
        s.active = false;
        return 0;
    }
    return n_new;
}

void llama_atlas::run(seq & s, int64_t n_win0, bool choose, uint32_t stream, std::vector<uint32_t> cells, int n_threads) {
    const int64_t t_start = ggml_time_us();

    if (params.n_threads > 0) {
        n_threads = params.n_threads;
    }

    // sizes first, as the threads must not allocate
    const int64_t n_rows = n_sink + std::min(n_cap, GGML_PAD(s.n_tok + s.n_tok/8, 1024));
    const int64_t n_blocks = std::min(n_cap, s.n_tok)/n_block + 1;

    s.heads.resize(n_heads);
    for (const auto & l : layers) {
        for (int32_t g = 0; g < l.n_head_kv; ++g) {
            head & h = s.heads[l.head0 + g];
            if ((int64_t) h.u.size() < s.n_tok && (int64_t) h.u.size() < n_rows) {
                h.k.reserve(n_rows*ggml_row_size(l.k->type, l.dk));
                h.v.reserve(n_rows*ggml_row_size(l.v->type, l.dv));
                h.u.resize(n_rows);
                h.rep.resize(GGML_PAD(n_rows, n_block)/n_block*l.dk);
            }
            h.idx.reserve(n_mem);
            h.slot.reserve(n_mem);
        }
    }

    int64_t n_lanes = 0;
    int64_t d_max = 0;
    for (const auto & l : layers) {
        n_lanes = std::max(n_lanes, pad_lanes(l.n_rep*params.n_refresh));
        d_max   = std::max<int64_t>({ d_max, l.dk, l.dv });
    }
    const int64_t n_score = std::max<int64_t>((ATLAS_CAND + 1)*n_mem + 2*n_block + n_ctx + params.n_chunk, d_max);

    while ((int) works.size() < n_threads) {
        works.push_back(std::make_unique<work>());
    }
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
        w->order.resize(n_blocks);
        w->tok.reserve(n_score);
        w->chosen.reserve(n_mem + n_block);
        w->slot.resize(n_mem);
        w->taken.resize(n_mem);
        w->ranked.reserve(std::min(n_cap, s.n_tok));
    }

    job j;
    j.s      = &s;
    j.n_win0 = n_win0;
    j.choose = choose;
    j.write  = !cells.empty();
    j.stream = stream;
    j.cells  = std::move(cells);
    j.staged = false;
    for (const auto & l : layers) {
        j.staged = j.staged || !ggml_backend_buffer_is_host(l.k->buffer) || !ggml_backend_buffer_is_host(l.v->buffer);
    }
    if (j.write && j.staged) {
        stage_k.resize(layers.size());
        stage_v.resize(layers.size());
        for (size_t i = 0; i < layers.size(); ++i) {
            stage_k[i].resize(j.cells.size()*layers[i].k->nb[1]);
            stage_v[i].resize(j.cells.size()*layers[i].v->nb[1]);
        }
    }

    std::vector<int32_t> pos_pend, pos_query, pos_cell;
    for (int64_t t = s.n_done; t < s.n_tok; ++t) {
        pos_pend .push_back(t);
        pos_query.push_back((int32_t) dist - t);
    }
    for (int64_t i = 0; i < (int64_t) j.cells.size(); ++i) {
        pos_cell.push_back(n_win0 - n_mem - n_sink + i);
    }
    for (const auto & r : ropes) {
        j.t_pend .push_back(make_table(r, pos_pend));
        j.t_query.push_back(make_table(r, pos_query));
        j.t_cell .push_back(make_table(r, pos_cell));
    }

    std::vector<std::pair<uint32_t, uint32_t>> items; // layer, KV head
    for (size_t i = 0; i < layers.size(); ++i) {
        for (int32_t g = 0; g < layers[i].n_head_kv; ++g) {
            items.push_back({ i, g });
        }
    }
    parallel(items.size(), n_threads, [&](int64_t i, int ith) {
        do_head(j, items[i].first, items[i].second, *works[ith]);
    });

    s.n_done = s.n_tok;
    for (auto & p : s.pend) {
        p.clear();
    }
    s.t_score += ggml_time_us() - t_start;

    if (j.write && j.staged) {
        const int64_t t_upload = ggml_time_us();
        upload(j, s);
        s.t_slide += ggml_time_us() - t_upload;
    }
}

void llama_atlas::do_head(job & j, size_t i_layer, int32_t g, work & w) {
    const layer & l = layers[i_layer];
    seq & s = *j.s;
    head & h = s.heads[l.head0 + g];

    archive(j, l, g, h, w, s.n_done, s.n_tok);

    if (n_mem > 0) {
        // each query is scored once, in groups of n_refresh of which the last one is whole: it chooses
        int64_t q0 = std::max(s.n_done, n_sink);
        for (int64_t n = (s.n_tok - q0) % params.n_refresh; q0 < s.n_tok; n = params.n_refresh) {
            if (n > 0) {
                const bool last = j.choose && q0 + n == s.n_tok;
                score(j, l, g, h, w, q0, q0 + n, std::max(j.n_win0, n_sink), last);
                q0 += n;
            }
        }
    }
    if (j.write) {
        if (j.choose) {
            choose(j, h, w, j.n_win0, s.n_tok);
        } else {
            w.chosen.clear();
        }
        write(j, i_layer, g, h, w, w.chosen);
    }
}

// rotate the pending keys back and put them away with their values
void llama_atlas::archive(job & j, const layer & l, int32_t g, head & h, work & w, int64_t i0, int64_t i1) {
    const size_t row_k = ggml_row_size(l.k->type, l.dk);
    const size_t row_v = ggml_row_size(l.v->type, l.dv);
    const int64_t n_q = (int64_t) l.n_head_kv*l.n_rep*l.dk;
    const int64_t n_k = (int64_t) l.n_head_kv*l.dk;
    const int64_t n_v = (int64_t) l.n_head_kv*l.dv;

    float * x = w.kt.data();

    for (int64_t i = i0; i < i1; ++i) {
        const float * src = j.s->pend[&l - layers.data()].data() + (i - i0)*(n_q + n_k + n_v);

        memcpy(x, src + n_q + g*l.dk, l.dk*sizeof(float));
        if (l.rope >= 0) {
            atlas_rotate(x, j.t_pend[l.rope].row(i - i0), ropes[l.rope].n_rot, ropes[l.rope].neox, -1.0f);
        }
        atlas_store_row(l.k->type, x, h.k.data() + row(i)*row_k, l.dk);

        // values only travel: keep them as the cache has them
        memcpy(x, src + n_q + n_k + g*l.dv, l.dv*sizeof(float));
        if (kv->n_rot_v) {
            atlas_hadamard(x, l.dv, kv->n_rot_v);
        }
        atlas_store_row(l.v->type, x, h.v.data() + row(i)*row_v, l.dv);

        h.u[row(i)] = 0.0f;
    }

    // the mean keys of the blocks that the slide completes
    const int64_t b0 = std::max<int64_t>(0, j.s->n_win0 - n_sink)/n_block;
    const int64_t b1 = std::max<int64_t>(0, j.n_win0    - n_sink)/n_block;
    for (int64_t b = b0; b < b1; ++b) {
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

// attention of the queries [q0, q1) on candidates from the archive, which ends at a1, and on the window
void llama_atlas::score(job & j, const layer & l, int32_t g, head & h, work & w, int64_t q0, int64_t q1, int64_t a1, bool last) {
    const seq & s = *j.s;

    const int64_t n_q   = (int64_t) l.n_head_kv*l.n_rep*l.dk;
    const int64_t n_row = n_q + (int64_t) l.n_head_kv*(l.dk + l.dv);
    const int64_t nq    = q1 - q0;
    const int64_t n_use = l.n_rep*nq; // queries
    const int64_t nl    = pad_lanes(n_use);
    const size_t row_k  = ggml_row_size(l.k->type, l.dk);

    // column r*nq + t: query head r of token t
    float * qt = w.qt.data();
    std::fill(qt, qt + l.dk*nl, 0.0f);
    for (int64_t t = 0; t < nq; ++t) {
        const float * src = s.pend[&l - layers.data()].data() + (q0 - s.n_done + t)*n_row;
        for (int32_t r = 0; r < l.n_rep; ++r) {
            float * x = w.kt.data();
            memcpy(x, src + (g*l.n_rep + r)*l.dk, l.dk*sizeof(float));
            if (l.rope >= 0) {
                atlas_rotate(x, j.t_query[l.rope].row(q0 - s.n_done + t), ropes[l.rope].n_rot, ropes[l.rope].neox, 1.0f);
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
        add_credits(w.block.data(), w.cred.data(), nb, credit_1, credit_2);

        std::fill(w.mark.begin(), w.mark.begin() + nb, 0);
        const int64_t k = top_k(w.cred.data(), nb, n_cand, w.order);
        for (int64_t i = 0; i < k; ++i) {
            const int64_t b = w.order[i];
            w.mark[b] = 1;
            for (int64_t c = 0; c < n_block; ++c) {
                w.tok.push_back(n_sink + (b0 + b)*n_block + c);
            }
        }
        // what is in the cells now may stay
        for (uint32_t t : h.idx) {
            if (t >= j0 && !(((t - n_sink)/n_block < b1) && w.mark[(t - n_sink)/n_block - b0])) {
                w.tok.push_back(t);
            }
        }
        for (int64_t t = n_sink + b1*n_block; t < a1; ++t) {
            w.tok.push_back(t);
        }
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
        h.u[row(w.tok[i])] += sum/n_use;
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

// what goes into the memory cells, given the scores of the last queries
void llama_atlas::choose(job & j, head & h, work & w, int64_t a1, int64_t t) {
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
        for (int64_t i = j0; i < a1; ++i) {
            h.u[row(i)] = rng()/4294967296.0f;
        }
    } else {
        for (size_t i = 0; i < w.n_arch; ++i) {
            const int64_t b = (w.tok[i] - n_sink)/n_block - b0;
            if (b < nb) {
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
    survivors(j, h, w, a1, t, n_mem - (int64_t) w.chosen.size());
    std::sort(w.chosen.begin(), w.chosen.end());
}

// add the n_want tokens with the largest u/age that are not recalled anyway
void llama_atlas::survivors(const job & j, head & h, work & w, int64_t a1, int64_t t, int64_t n_want) {
    const int64_t j0 = first_kept(*j.s);
    const int64_t b0 = (j0 - n_sink)/n_block;
    const int64_t b1 = (a1 - n_sink)/n_block;

    // those below the last threshold are not worth a sort, nearly always
    for (float threshold = 0.7f*h.threshold; ; threshold = -1.0f) {
        w.ranked.clear();
        for (int64_t i = j0; i < a1; ) {
            const int64_t n = std::min(a1 - i, n_block);
            const float * u = h.u.data() + row(i);
            const int64_t b = (i - n_sink)/n_block;
            if (b >= b1 || !w.mark[b - b0]) {
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
            }
            i += n;
        }
        if ((int64_t) w.ranked.size() >= n_want || threshold < 0.0f) {
            break;
        }
    }

    n_want = std::min<int64_t>(n_want, w.ranked.size());
    if (n_want == 0) {
        return;
    }
    std::nth_element(w.ranked.begin(), w.ranked.begin() + n_want - 1, w.ranked.end(), [](const auto & a, const auto & b) {
        return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    h.threshold = w.ranked[n_want - 1].first;
    for (int64_t i = 0; i < n_want; ++i) {
        w.chosen.push_back(w.ranked[i].second);
    }
}

// write the sinks' keys and the cells of one head: keys rotated to sit just before the window, in time order
void llama_atlas::write(job & j, size_t i_layer, int32_t g, head & h, work & w, const std::vector<uint32_t> & idx) {
    const layer & l = layers[i_layer];

    const size_t row_k = ggml_row_size(l.k->type, l.dk);
    const size_t row_v = ggml_row_size(l.v->type, l.dv);
    const size_t el_v  = ggml_type_size(l.v->type);

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

    const int64_t kv_size = kv->get_size();
    float * x = w.kt.data();
    uint32_t next = 0;

    for (int64_t i = 0; i < n_sink + (int64_t) idx.size(); ++i) {
        const bool is_sink = i < n_sink;
        const int64_t token = is_sink ? i : idx[i - n_sink];

        bool has_value = is_sink;
        int64_t at = i; // among the cells
        if (!is_sink) {
            uint32_t & slot = w.slot[i - n_sink];
            has_value = slot != UINT32_MAX;
            if (!has_value) {
                while (w.taken[next]) {
                    next++;
                }
                slot = next;
                w.taken[next] = 1;
            }
            at = n_sink + slot;
        }
        const int64_t cell = j.cells[at];

        atlas_load_row(l.k->type, h.k.data() + row(token)*row_k, x, l.dk);
        if (l.rope >= 0) {
            atlas_rotate(x, j.t_cell[l.rope].row(i), ropes[l.rope].n_rot, ropes[l.rope].neox, 1.0f);
        }
        if (kv->n_rot_k) {
            atlas_hadamard(x, l.dk, kv->n_rot_k);
        }
        uint8_t * dst_k = j.staged ? stage_k[i_layer].data() + at*l.k->nb[1]
                                   : (uint8_t *) l.k->data + j.stream*l.k->nb[2] + cell*l.k->nb[1];
        atlas_store_row(l.k->type, x, dst_k + g*row_k, l.dk);

        const uint8_t * src_v = h.v.data() + row(token)*row_v;
        if (j.staged) {
            memcpy(stage_v[i_layer].data() + at*l.v->nb[1] + g*row_v, src_v, row_v);
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

    h.idx.assign(idx.begin(), idx.end());
    h.slot.assign(w.slot.begin(), w.slot.begin() + idx.size());
}

// bring the staged rows to the device, in runs of neighbouring cells
void llama_atlas::upload(const job & j, const seq & s) {
    GGML_UNUSED(s);

    std::vector<uint8_t> column;

    for (size_t i = 0; i < layers.size(); ++i) {
        const layer & l = layers[i];

        const size_t el_v = ggml_type_size(l.v->type);
        const int64_t kv_size = kv->get_size();

        for (size_t c0 = 0, c1; c0 < j.cells.size(); c0 = c1) {
            for (c1 = c0 + 1; c1 < j.cells.size() && j.cells[c1] == j.cells[c1 - 1] + 1; ++c1) {
            }
            const size_t n = c1 - c0;
            ggml_backend_tensor_set(l.k, stage_k[i].data() + c0*l.k->nb[1], j.stream*l.k->nb[2] + j.cells[c0]*l.k->nb[1], n*l.k->nb[1]);
            if (!kv->v_trans) {
                ggml_backend_tensor_set(l.v, stage_v[i].data() + c0*l.v->nb[1], j.stream*l.v->nb[2] + j.cells[c0]*l.v->nb[1], n*l.v->nb[1]);
                continue;
            }
            column.resize(n*el_v);
            for (int64_t d = 0; d < (int64_t) l.n_head_kv*l.dv; ++d) {
                for (size_t c = 0; c < n; ++c) {
                    memcpy(column.data() + c*el_v, stage_v[i].data() + (c0 + c)*l.v->nb[1] + d*el_v, el_v);
                }
                ggml_backend_tensor_set(l.v, column.data(), ((j.stream*l.v->ne[0] + d)*kv_size + j.cells[c0])*el_v, n*el_v);
            }
        }
    }
}

llama_atlas_stats llama_atlas::stats(llama_seq_id seq_id) const {
    const seq & s = seqs[seq_id];

    llama_atlas_stats res = {};
    res.n_tokens    = s.n_tok;
    res.n_archived  = s.n_win0;
    res.n_forgotten = first_kept(s) - n_sink;
    res.n_refresh   = s.n_refresh;
    res.t_capture   = s.t_capture;
    res.t_score     = s.t_score;
    res.t_slide     = s.t_slide;
    res.n_cells     = n_mem;
    res.n_window    = params.n_window;
    res.n_sink      = n_sink;
    res.active      = s.active;
    for (const auto & h : s.heads) {
        res.n_recalled += h.n_recalled;
        res.bytes += h.k.size() + h.v.size() + (h.u.capacity() + h.rep.capacity())*sizeof(float);
    }
    return res;
}

//
// interface
//

llama_atlas_params llama_atlas_default_params() {
    return {
        /*.n_cells     =*/ -1,
        /*.n_window    =*/ -1,
        /*.recall      =*/ 0.5f,
        /*.n_refresh   =*/ 16,
        /*.n_chunk     =*/ 16,
        /*.blend       =*/ 1.0f,
        /*.archive_max =*/ 0,
        /*.n_threads   =*/ 0,
        /*.shuffle     =*/ 0,
    };
}

const char * llama_atlas_unsupported(const llama_model * model, llama_context_params params) {
    static thread_local std::string reason;

    const bool causal = params.attention_type == LLAMA_ATTENTION_TYPE_UNSPECIFIED ?
        model->hparams.causal_attn : params.attention_type == LLAMA_ATTENTION_TYPE_CAUSAL;

    reason = llama_atlas::unsupported(*model, causal);
    return reason.empty() ? nullptr : reason.c_str();
}

bool llama_atlas_configure(const llama_model * model, llama_context_params cparams, llama_atlas_params * params, char * text, size_t n_text) {
    std::string out;
    const auto finish = [&](bool ok) {
        if (text && n_text > 0) {
            snprintf(text, n_text, "%s", out.c_str());
        }
        return ok;
    };

    const uint32_t n_seq = std::max(1u, cparams.n_seq_max);
    const uint32_t n_all = GGML_PAD(cparams.n_ctx == 0 ? model->hparams.n_ctx_train : cparams.n_ctx, 256);
    const int64_t  n_ctx = cparams.kv_unified ? n_all/n_seq : GGML_PAD(n_all/n_seq, 256);
    const int64_t  n_sink = 4;
    const int64_t  n_min  = 64; // smallest window

    if (params->n_refresh < 4 || params->n_refresh % 4 != 0 || params->n_refresh > 256) {
        out = format("the refresh interval must be a multiple of 4 up to 256, not %d", params->n_refresh);
        return finish(false);
    }
    if (params->n_chunk < params->n_refresh || params->n_chunk % params->n_refresh != 0) {
        out = format("the chunk must be a multiple of the refresh interval %d, not %d", params->n_refresh, params->n_chunk);
        return finish(false);
    }
    if (!(params->recall >= 0.0f && params->recall <= 1.0f)) {
        out = format("the share of recalled cells must be between 0 and 1, not %g", params->recall);
        return finish(false);
    }
    if (!(params->blend >= 0.0f && params->blend <= 1.0f)) {
        out = format("the blend ratio must be between 0 and 1, not %g", params->blend);
        return finish(false);
    }
    if (n_ctx < n_sink + n_min + 16) {
        out = format("a context of %" PRId64 " cells is too small", n_ctx);
        return finish(false);
    }

    if (params->n_cells < 0) {
        params->n_cells = n_ctx/2/16*16;
        if (params->n_window >= 0) {
            params->n_cells = std::min<int64_t>(params->n_cells, std::max<int64_t>(0, n_ctx - n_sink - params->n_window)/16*16);
        }
        out += format("%d memory cells: half of the context of %" PRId64 " cells (more would make the window too short)\n", params->n_cells, n_ctx);
    }
    if (params->n_cells % 16 != 0) {
        out = format("the number of memory cells must be a multiple of 16, not %d", params->n_cells);
        return finish(false);
    }
    if (params->n_cells + n_sink + n_min > n_ctx) {
        out = format("%d memory cells do not fit into a context of %" PRId64 " cells with %" PRId64 " sinks and a window of at least %" PRId64,
                params->n_cells, n_ctx, n_sink, n_min);
        return finish(false);
    }
    if (params->n_window < 0) {
        params->n_window = n_ctx - n_sink - params->n_cells;
        out += format("window of %d tokens: what %" PRId64 " sinks and the memory cells leave\n", params->n_window, n_sink);
    }
    if (params->n_window < n_min || params->n_window < 2*params->n_chunk) {
        out = format("a window of %d tokens is too small: it takes at least %" PRId64 ", and two chunks of %d", params->n_window, n_min, params->n_chunk);
        return finish(false);
    }
    if (params->n_window + params->n_cells + n_sink > n_ctx) {
        out = format("%" PRId64 " sinks, %d memory cells and a window of %d tokens do not fit into a context of %" PRId64 " cells",
                n_sink, params->n_cells, params->n_window, n_ctx);
        return finish(false);
    }
    if (params->archive_max < 0) {
        out = "the archive's size cannot be negative";
        return finish(false);
    }
    if (params->archive_max == 0) {
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), &free, &total);
        params->archive_max = std::max<int64_t>(total/4, 256ll << 20);
        out += format("archives of up to %" PRId64 " MiB for %u sequences: a quarter of the machine's memory\n", params->archive_max >> 20, n_seq);
    }
    out += format("%d of the memory cells for recalled blocks, the others for the tokens with the most attention\n",
            (int) (params->recall*params->n_cells/16 + 0.5f)*16);
    out += format("refresh every %d tokens\n", params->n_refresh);
    return finish(true);
}

bool llama_atlas_enabled(const llama_context * ctx) {
    return ctx->get_atlas() != nullptr;
}

int32_t llama_atlas_prepare(llama_context * ctx, llama_seq_id seq_id, int32_t n_want) {
    auto * atlas = ctx->get_atlas();
    if (!atlas || n_want <= 0) {
        return n_want;
    }
    ctx->synchronize();
    return atlas->prepare(seq_id, n_want, ctx->get_cparams().n_threads_batch);
}

int32_t llama_atlas_n_reusable(const llama_context * ctx, llama_seq_id seq_id, int32_t n_past) {
    const auto * atlas = ctx->get_atlas();
    return atlas ? atlas->n_reusable(seq_id, n_past) : n_past;
}

llama_atlas_stats llama_atlas_get_stats(const llama_context * ctx, llama_seq_id seq_id) {
    const auto * atlas = ctx->get_atlas();
    return atlas ? atlas->stats(seq_id) : llama_atlas_stats{};
}
