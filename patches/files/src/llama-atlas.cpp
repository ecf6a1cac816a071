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
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>

#ifdef __linux__
#include <sys/resource.h>
#endif

// how long an archive that was given up waits for somebody who needs one
static constexpr std::chrono::milliseconds ATLAS_ASIDE(500);

//
// llama_atlas
//

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
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE || model.arch == LLM_ARCH_STARCODER) { // which learned them
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

ggml_type llama_atlas::archive_type(ggml_type wanted, ggml_type cache, int64_t d) {
    if (wanted != GGML_TYPE_COUNT) {
        return wanted;
    }
    return !ggml_is_quantized(cache) && d % ggml_blck_size(GGML_TYPE_Q8_0) == 0 ? GGML_TYPE_Q8_0 : cache;
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
        l.built     = false;
        l.k         = kvl.k;
        l.v         = kvl.v;
        l.type_k    = archive_type(params.type_k, l.k->type, l.dk);
        l.type_v    = archive_type(params.type_v, l.v->type, l.dv);

        if (l.n_head_kv*l.n_rep != (int32_t) hparams.n_head(il)) {
            throw std::runtime_error(format("ATLAS: layer %u has %u heads for %d KV heads", il, hparams.n_head(il), l.n_head_kv));
        }
        for (const auto & [d, type] : std::initializer_list<std::pair<int32_t, ggml_type>> {
                { l.dk, l.k->type }, { l.dk, l.type_k }, { l.dv, l.v->type }, { l.dv, l.type_v } }) {
            if (d % ggml_blck_size(type) != 0) {
                throw std::runtime_error(format("ATLAS: a head of %d in layer %u cannot be of type %s, which has blocks of %" PRId64,
                            d, il, ggml_type_name(type), ggml_blck_size(type)));
            }
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

        bytes_per_token += l.n_head_kv*(l.row_k() + l.row_v()
                + sizeof(float) + l.dk*sizeof(float)/n_block);
    }

    n_cap = params.archive_max/cparams.n_seq_max/bytes_per_token;
    n_cap = std::min<int64_t>(n_cap, std::numeric_limits<int32_t>::max()/2)/n_block*n_block;
    if (n_cap < n_ctx + 2*n_block + params.n_chunk) {
        throw std::runtime_error(format(
            "ATLAS: the archive holds %" PRId64 " tokens of each of %u sequences, less than the context of %" PRId64 ": allow at least %" PRId64 " MiB",
            n_cap, cparams.n_seq_max, n_ctx, (int64_t) ((n_ctx + 3*n_block + params.n_chunk)*bytes_per_token*cparams.n_seq_max >> 20) + 1));
    }

    for (const auto & l : layers) {
        staged = staged || !ggml_backend_buffer_is_host(l.k->buffer) || !ggml_backend_buffer_is_host(l.v->buffer);
    }

    ops = std::make_unique<op[]>(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
        ops[i].atlas   = this;
        ops[i].i_layer = i;
    }

    few_ops = std::make_unique<few_op[]>(hparams.n_layer_all);
    for (size_t i = 0; i < hparams.n_layer_all; ++i) {
        few_ops[i].atlas = this;
    }

    seqs.resize(cparams.kv_unified ? LLAMA_MAX_SEQ : cparams.n_seq_max);
    wishes.resize(seqs.size());
    for (size_t i = 0; i < seqs.size(); ++i) {
        set(i, -1, -1.0f);
    }
    kv->atlas = this;

    LLAMA_LOG_INFO("%s: %zu layers, %d KV heads, %" PRId64 " sinks + %" PRId64 " memory cells + window of %d, archive: %zu bytes/token, up to %" PRId64 " tokens of each sequence\n",
            __func__, layers.size(), n_heads, n_sink, n_mem, params.n_window, bytes_per_token, n_cap);
}

llama_atlas::~llama_atlas() {
    if (given_up) {
        given_up->end();
    }
    kv->atlas = nullptr;
}

int64_t llama_atlas::first_kept(const seq & s) const {
    const int64_t n_over = s.n_tok - n_sink - n_cap;
    return std::max(s.n_lost, n_over <= 0 ? n_sink : n_sink + GGML_PAD(n_over, n_block));
}

void llama_atlas::reset(seq & s) {
    size_t size = 0;
    for (const auto & h : s.heads) {
        size += h.k.size() + h.v.size();
    }
    if (size >= size_aside) {
        put_aside(std::move(s.heads));
    }
    s = seq();
}

void llama_atlas::put_aside(std::vector<head> && heads) {
    const std::lock_guard<std::mutex> lock(aside_mutex);
    if (given_up) {
        given_up->end();
    }
    freeing.erase(std::remove_if(freeing.begin(), freeing.end(), [](const std::future<void> & f) {
        return f.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
    }), freeing.end());

    given_up = std::make_shared<aside>();
    given_up->heads = std::move(heads);
    try {
        freeing.push_back(std::async(std::launch::async, [a = given_up] {
#ifdef __linux__
            setpriority(PRIO_PROCESS, 0, 5); // of this thread
#endif
            std::unique_lock<std::mutex> lock(a->mutex);
            a->change.wait_for(lock, ATLAS_ASIDE, [&] { return a->over; });
            const std::vector<head> heads = std::move(a->heads);
            a->heads.clear();
            lock.unlock(); // and now they are freed
        }));
    } catch (const std::system_error &) {
        given_up.reset(); // no thread can be had: they are freed here
    }
}

// what has room for n_min rows, and for n_max at most; else nothing
std::vector<llama_atlas::head> llama_atlas::take_aside(int64_t n_min, int64_t n_max) {
    const std::lock_guard<std::mutex> lock(aside_mutex);
    std::vector<head> res;
    if (!given_up) {
        return res;
    }
    {
        const std::lock_guard<std::mutex> lock_heads(given_up->mutex);
        const int64_t n = given_up->heads.empty() ? 0 : given_up->heads[0].u.size();
        if (n < n_min || n > n_max) {
            return res;
        }
        for (head & old : given_up->heads) {
            head & h = res.emplace_back();
            h.k = std::move(old.k);
            h.v = std::move(old.v);
            h.u.swap(old.u);
            h.rep.swap(old.rep);
            std::fill(h.u.begin(), h.u.end(), 0.0f);
        }
        given_up->heads.clear();
    }
    given_up->end();
    given_up.reset();
    return res;
}

void llama_atlas::trim(seq & s, int64_t n) {
    if (n < s.n_win0) {
        LLAMA_LOG_WARN("%s: tokens from %" PRId64 " on were removed, but the window starts at %" PRId64 ": the memory is lost\n", __func__, n, s.n_win0);
        s.active = false;
        return;
    }
    for (auto & n_wait : s.n_wait) {
        n_wait = std::max<int64_t>(0, n_wait - (s.n_tok - n));
    }
    s.n_tok = n;
    for (auto & h : s.heads) {
        h.t_cand = std::min(h.t_cand, n);
    }
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
static void set_bias(T * row, const std::vector<uint32_t> & cells, int64_t n_sink, float bias) {
    const T value = llama_cast<T>(bias);
    for (size_t c = n_sink; c < cells.size(); ++c) {
        row[cells[c]] = value;
    }
}

void llama_atlas::set_mask_bias(ggml_tensor * dst, const llama_ubatch & ubatch) const {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];
        const seq & s = seqs[seq_id];
        const float bias = wishes[seq_id].bias;
        if (bias == 0.0f || s.n_win0 == 0) {
            continue;
        }
        if (dst->type == GGML_TYPE_F16) {
            set_bias((ggml_fp16_t *) dst->data + i*dst->ne[0], s.cells, n_sink, bias);
        } else {
            set_bias((float *) dst->data + i*dst->ne[0], s.cells, n_sink, bias);
        }
    }
}

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

int32_t llama_atlas::prepare(llama_seq_id seq_id, int32_t n_want) {
    seq & s = seqs[seq_id];

    const int64_t n_used = kv->get_cells(seq_id).seq_pos_get(seq_id).size();
    const int64_t n_max  = s.active ? n_sink + n_mem + wishes[seq_id].n_window : (int64_t) kv->get_size();

    if (!s.active || n_used < n_max) {
        return std::max<int64_t>(0, std::min<int64_t>(n_want, n_max - n_used));
    }

    // a long prompt is read in chunks, for each of which the cells are filled
    const int64_t n_new  = std::min(n_want, params.n_chunk);
    const int64_t n_old  = s.n_win0 > 0 ? s.n_win0 : n_sink + n_mem;
    const int64_t n_win0 = n_old + GGML_PAD(n_used + n_new - n_max, n_block);

    const int64_t t_start = ggml_time_us();

    std::vector<uint32_t> cells;
    if (n_used != n_sink + n_mem + s.n_tok - n_old || !find_cells(seq_id, cells)) {
        LLAMA_LOG_WARN("%s: sequence %d shares its cells or was changed: it cannot slide\n", __func__, seq_id);
        s.active = false;
        return 0;
    }

    kv->atlas = nullptr; // this removal is ours
    kv->seq_rm(seq_id, n_old, n_win0);
    kv->atlas = this;

    s.cells  = std::move(cells);
    s.n_win0 = n_win0;
    s.slid   = true;
    s.t_slide += ggml_time_us() - t_start;

    return n_new;
}

llama_atlas_stats llama_atlas::stats(llama_seq_id seq_id) const {
    const seq & s = seqs[seq_id];

    llama_atlas_stats res = {};
    res.n_tokens    = s.n_tok;
    res.n_archived  = s.n_win0;
    res.n_forgotten = first_kept(s) - n_sink;
    res.n_refresh   = s.n_refresh;
    res.t_score     = s.t_score;
    res.t_write     = s.t_write;
    res.t_slide     = s.t_slide;
    res.n_cells     = n_mem;
    res.n_window    = wishes[seq_id].n_window;
    res.n_sink      = n_sink;
    res.n_window_max = params.n_window;
    res.blend       = wishes[seq_id].blend;
    res.active      = s.active;

    int64_t n_used = 0, n_loss = 0;
    for (const auto & h : s.heads) {
        n_used   += h.idx.size();
        res.loss += h.loss;
        n_loss   += h.n_loss;
        res.n_recalled += h.n_recalled;
        res.bytes += h.k.size() + h.v.size() + (h.u.capacity() + h.rep.capacity())*sizeof(float);
    }
    res.n_used = n_used/n_heads;
    res.loss   = n_loss > 0 ? res.loss/n_loss : -1.0f;
    return res;
}

void llama_atlas::set(llama_seq_id seq_id, int32_t n_window, float blend) {
    wish & x = wishes[seq_id];
    x.n_window = n_window < 0 ? params.n_window : std::clamp(n_window, std::min(params.n_window, std::max<int32_t>(n_window_min, 2*params.n_chunk)), params.n_window);
    x.blend    = blend < 0.0f ? params.blend : std::min(blend, 1.0f);
    x.bias     = x.blend > 0.0f ? logf(x.blend) : -INFINITY;
}

void llama_atlas::set_refresh(int32_t n_refresh) {
    params.n_refresh = std::clamp(n_refresh, 1, 256);
}

int32_t llama_atlas::n_spare() const {
    const bool computes = ggml_time_us() - t_computed.load(std::memory_order_relaxed) < 100*1000;
    const int32_t n_cpu = std::thread::hardware_concurrency();
    return std::clamp(computes ? n_cpu - cparams.n_threads : n_cpu, 0, n_beside);
}

void llama_atlas::forget(llama_seq_id seq_id) {
    seq & s = seqs[seq_id];
    std::fill(s.n_wait.begin(), s.n_wait.end(), 0);
    for (auto & h : s.heads) {
        std::fill(h.u.begin(), h.u.end(), 0.0f);
        h.surv.clear();
        h.cand.clear();
        h.t_cand    = 0;
        h.threshold = 0.0f;
    }
}
