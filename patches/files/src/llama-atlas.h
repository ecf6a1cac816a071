#pragma once

#include "llama-atlas-buffer.h"
#include "llama-atlas-kernels.h"
#include "llama-kv-cache.h"

#include "../include/llama-atlas.h"

#include "ggml-backend.h"

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct llama_cparams;
struct llama_model;
struct llama_ubatch;

// the state of a sequence may be right, but not here
struct llama_atlas_mismatch : std::runtime_error {
    using std::runtime_error::runtime_error;
};

//
// llama_atlas: the memories of all sequences of a context, see llama-atlas.h
//

class llama_atlas {
public:
    static constexpr int32_t n_window_min = 64;

    // params must have passed llama_atlas_configure()
    llama_atlas(
            const llama_model        & model,
            const llama_cparams      & cparams,
            llama_memory_i           & memory,
            const llama_atlas_params & params,
            ggml_backend_t             backend_cpu);

    ~llama_atlas();

    // the reason why there can be no memory; empty when there can
    static std::string unsupported(const llama_model & model, bool causal_attn);

    // what the archive keeps heads of size d as; wanted: GGML_TYPE_COUNT for Q8_0 where the cache has more
    static ggml_type archive_type(ggml_type wanted, ggml_type cache, int64_t d);

    // put the memory between the queries, keys and values of a layer and its attention; returns the queries
    // what it does when the graph is computed: archive the new tokens, and fill the memory cells for them
    ggml_tensor * build(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, float kq_scale, int il);

    // Attention of a batch that is too small for the tiles of ggml's flash attention, as the chunks are in which a
    // prompt is read; nullptr where ggml's is to be taken. All tensors are permuted: [n_embd_head, n, n_head(_kv), n_stream]
    // returns [n_embd_head*n_head, n*n_stream]; n_seqs: sequences in the batch
    ggml_tensor * build_few(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask, float kq_scale, int il, int64_t n_seqs);

    // throws when build() was not called for a layer with memory
    void check() const;

    // what the next graph computes
    void begin(const llama_ubatch & ubatch);

    // see llama-atlas.h; the context must be synchronized
    int32_t prepare(llama_seq_id seq_id, int32_t n_want);
    int32_t n_reusable(llama_seq_id seq_id, int32_t n_past) const;

    llama_atlas_stats stats(llama_seq_id seq_id) const;

    void forget(llama_seq_id seq_id);

    void set(llama_seq_id seq_id, int32_t n_window, float blend);
    void set_refresh(int32_t n_refresh);

    // write the state of a sequence or read it, throws on failure (llama_atlas_mismatch or others); see llama-atlas.h
    void state(llama_memory_i & memory, llama_seq_id seq_id, llama_atlas_state_section section, llama_atlas_state_io fn, void * user, bool load);

    // bytes of the KV cells of a sequence, at most
    size_t cells_size(llama_memory_i & memory) const;

    uint64_t model_hash() const;

    int32_t n_spare() const;

    // called by the KV cache when somebody changes a sequence
    void on_clear();
    void on_seq_rm (llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    void on_seq_cp (llama_seq_id seq_id_src, llama_seq_id seq_id_dst);
    void on_seq_mod(llama_seq_id seq_id); // anything else

    // give the memory cells their bias in the attention mask of a ubatch
    void set_mask_bias(ggml_tensor * dst, const llama_ubatch & ubatch) const;

private:
    static constexpr int64_t n_block = 16; // tokens of an archive block
    static constexpr int64_t n_pool  = 4;  // queries that stage 1 averages
    static constexpr int64_t n_tile  = 48; // keys that are converted at a time
    static constexpr int64_t n_part  = 64; // candidates or cells that a thread takes at a time
    static constexpr int64_t n_share_max = 8; // parts of a head's queries that different threads take, at most
    static constexpr int64_t n_together = 16; // queries that are scored together where they choose nothing
    static constexpr size_t  size_aside = 16 << 20; // bytes of an archive that is put aside
    static constexpr int32_t n_beside = 4; // threads that read a state, at most
    static constexpr int64_t n_scan  = 128;  // blocks that stage 1 may look at per token, on average
    static constexpr float   r_cand  = 2.0f; // candidates of stage 1, in units of the memory cells
    static constexpr float   credit_1 = 0.5f;  // share of a block's score that its successor gets ...
    static constexpr float   credit_2 = 0.25f; // ... and the one after that

    struct layer {
        uint32_t il;
        int32_t  n_head_kv;
        int32_t  n_rep;   // query heads per KV head
        int32_t  dk, dv;  // head sizes
        int32_t  rope;    // index in ropes, -1: the layer does not rotate
        int32_t  head0;   // index of its first head in seq::heads
        float    scale;   // of the logits
        bool     built;   // the graph has the memory in this layer

        ggml_tensor * k; // the cache
        ggml_tensor * v;

        ggml_type type_k, type_v; // of the archive

        size_t row_k() const { return ggml_row_size(type_k, dk); } // bytes of a token in the archive
        size_t row_v() const { return ggml_row_size(type_v, dv); }
    };

    // layers that rotate alike share a table of angles
    struct rope {
        uint32_t il; // the first of them
        int32_t  n_rot;
        bool     neox;
        float    freq_base, freq_scale;
        std::vector<float> factors;
    };

    struct rope_table {
        int64_t n_rot = 0;
        std::vector<float> cs; // [n_pos][n_rot]: cos, sin

        const float * row(int64_t i) const { return cs.data() + i*n_rot; }
    };

    // one KV head of one layer of one sequence; rows of the archive are indexed by seq::row()
    struct head {
        llama_atlas_buffer k; // keys, rotated back to position 0
        llama_atlas_buffer v;

        std::vector<float> u;   // sum of p^2 that a token got, p = attention mass
        std::vector<float> rep; // mean key of each complete archived block

        std::vector<uint32_t> idx;  // the tokens in the memory cells, ascending
        std::vector<uint32_t> slot; // which memory cell each of them is in
        std::vector<uint32_t> rank; // [n_mem]: at which place of the order the key of a memory cell is

        std::vector<uint32_t> surv; // the tokens with the largest u/age when it was last looked at, best first
        std::vector<uint32_t> cand; // candidates for the next tokens' cells
        int64_t t_cand = 0;         // when they were chosen

        float   threshold = 0.0f; // the smallest u/age among the last survivors
        int64_t n_recalled = 0;

        float   loss   = 0.0f; // sum over measurements, see omega()
        int32_t n_loss = 0;
    };

    struct seq {
        bool active = true;

        int64_t n_tok  = 0; // tokens seen, the next position
        int64_t n_win0 = 0; // the first token of the window; those before it have left
        int64_t n_rep  = 0; // archive blocks whose mean keys are known
        int64_t n_lost = 0; // the tokens before it, sinks aside, were not in the archive that was read from a file
        bool    slid   = false; // since the cells were written

        std::vector<head> heads;

        std::vector<int64_t> n_wait; // per layer: of the last tokens: their queries wait to be scored
        std::vector<std::vector<float>> wait; // ... and these, per layer: [n_wait][n_head*dk]

        std::vector<uint32_t>   cells;  // KV cells of the sinks and the memory cells, in this order
        std::vector<rope_table> t_cell; // per rope: angles of their places, valid until the next slide

        // per layer: the cells' rows, for caches that are not in host memory
        std::vector<std::vector<uint8_t>> stage_k, stage_v;

        int64_t n_refresh = 0;
        int64_t t_score = 0, t_write = 0, t_slide = 0;
    };

    // an archive that was given up. Who soon needs one as large takes it, as a load into the same slot does; else a thread
    // gives its pages back to the system, which takes long
    struct aside {
        std::mutex mutex;
        std::condition_variable change;
        std::vector<head> heads; // none: they were taken, or are being freed
        bool over = false;       // nobody shall wait any longer

        void end() {
            const std::lock_guard<std::mutex> lock(mutex);
            over = true;
            change.notify_all();
        }
    };

    // scratch memory of a thread; everything is sized before the threads start
    struct work {
        std::vector<float> qt;    // [n_rep][dk + 2*dv]: see omega()
        std::vector<float> s;     // [n_tokens][n_lanes]
        std::vector<float> s1;    // [n_blocks][n_lanes]
        std::vector<float> kt;    // [n_tile][max(dk, dv)]
        std::vector<uint8_t> conv; // a row of values as the cache has it
        std::vector<float> tmp;   // [2*n_lanes]
        std::vector<float> block; // [n_blocks]: scores
        std::vector<float> cred;  // [n_blocks]: with credits
        std::vector<float> rel;   // [n_tokens]: recall score of a candidate

        std::vector<uint8_t>  mark;   // [n_blocks]
        std::vector<uint32_t> order;  // [max(n_blocks, n_tokens)]
        std::vector<uint32_t> tok;    // candidates, then the window
        std::vector<uint32_t> chosen; // the new content of the cells
        std::vector<uint32_t> slot;
        std::vector<uint8_t>  taken;  // [n_mem]

        std::vector<std::pair<float, uint32_t>> ranked;

        std::vector<float>   few;   // see attend()
        std::vector<int64_t> tiles; // the first keys of those that are not masked

        size_t n_arch = 0; // how many of tok are in the archive

        int64_t t_score = 0, t_write = 0; // microseconds
    };

    // what a graph does for one sequence, the same for all heads
    struct job {
        seq * s;
        uint32_t stream;
        std::vector<uint32_t> rows; // of the ubatch
        int64_t t0;     // the first new token
        std::vector<int64_t> n_wait; // per layer: queries that waited before it
        int64_t n_early; // the most of them
        int64_t b0, b1; // archive blocks that the last slide completed
        std::vector<uint8_t> score;  // per layer: score the queries, or let them wait
        bool    choose; // fill the cells by the scores of these queries
        bool    own;    // fill the cells by the query of the one new token
        bool    slid;   // all their keys have to move
        bool    sinks;  // there are no memory cells: only the sinks move
        int64_t measure; // the layer in which the error of the choice is measured, -1: none
        std::vector<rope_table> t_key;   // per rope: angles of the new tokens' positions
        std::vector<rope_table> t_query; // ... that turn the queries to the common distance

        bool fills() const { return choose || own || sinks; } // writes cells
    };

    const llama_model & model;
    const llama_cparams & cparams;
    llama_kv_cache * kv; // the one with full attention

    llama_atlas_params params;
    ggml_backend_t backend_cpu;

    int64_t n_sink;
    int64_t n_mem;
    int64_t n_ctx;   // cells of a sequence: n_sink + n_mem + window
    int64_t n_cap;   // tokens of a sequence's archive
    float   dist;    // distance at which queries and keys are compared

    // what a sequence's user wants
    struct wish {
        int64_t n_window;
        float   blend;
        float   bias; // of the memory cells' logits
    };
    std::vector<wish> wishes; // per sequence

    std::vector<layer> layers;
    std::vector<rope>  ropes;
    int32_t n_heads = 0;

    bool    staged = false; // the cells are not in host memory

    std::vector<seq> seqs;
    std::mutex aside_mutex; // a load runs in a thread of its own
    std::shared_ptr<aside> given_up; // the archive that was given up last
    std::vector<std::future<void>> freeing;
    std::atomic<int64_t> t_computed { 0 }; // microseconds
    std::vector<std::unique_ptr<work>> works; // one per thread

    // one KV head of a job in the layer that is computed
    struct item {
        std::vector<float>    q;    // queries at the common distance, see ask() and score()
        std::vector<float>    p;    // [n_rep][n_cand]: their logits, or what score_part() sums up
        std::vector<uint32_t> todo; // what to write: twice the place in the order, plus 1 when the value is there

        // of score()
        std::vector<uint32_t> tok; // candidates, then the window
        int64_t n_arch; // how many of them are in the archive
        int64_t q0;     // the first token of the queries
        int64_t n_use;  // queries
        int64_t n_parts, nl; // parts, and the columns of one
        bool    recall; // they choose what the cells get
    };

    // the graph that is computed
    struct op {
        llama_atlas * atlas;
        size_t i_layer;
        std::atomic<int32_t> next[4]; // work that is not taken yet, per phase
        std::atomic<int32_t> n_at[4]; // threads that have ended it
    };
    struct few_op {
        llama_atlas * atlas;
        float scale;
        std::atomic<int32_t> next; // head, or part of one, that is not taken yet
    };
    std::vector<job>  jobs;
    std::vector<item> items;
    std::unique_ptr<op[]> ops; // one per layer
    std::unique_ptr<few_op[]> few_ops; // one per layer of the model
    size_t n_few = 0, n_few_tiles = 0; // what a thread needs for them

    int64_t row(int64_t token) const { return token < n_sink ? token : n_sink + (token - n_sink) % n_cap; }
    int64_t first_kept(const seq & s) const; // the oldest token that the archive still holds

    void reset(seq & s);
    void put_aside(std::vector<head> && heads);
    std::vector<head> take_aside(int64_t n_min, int64_t n_max);
    void trim(seq & s, int64_t n);
    void reserve(seq & s, int64_t n_new);
    void reserve_work(const seq & s);
    void reserve_items();
    void settle();
    rope_table make_table(const rope & r, const std::vector<int32_t> & pos) const;
    bool find_cells(llama_seq_id seq_id, std::vector<uint32_t> & res) const;

    // parts of state()
    struct state_io;
    void state_counters(state_io & io, seq & s);
    void state_cells   (state_io & io, seq & s, llama_kv_cache & cache, llama_seq_id seq_id);
    void state_layer   (state_io & io, seq & s, size_t i_layer);
    void state_rows    (state_io & io, const seq & s, ggml_type type, ggml_type there, int64_t n_values, void * data, int64_t first, int64_t t0, int64_t t1);
    int64_t n_piece(int64_t n_tok) const;
    void state_resume  (seq & s, llama_seq_id seq_id);
    void share(size_t n, const std::function<void(size_t)> & fn) const;

    // what runs in the graph's threads, which must not allocate
    // the tensors of a layer, F32: [n_embd_head, n_head(_kv), n_tokens]
    struct input {
        const ggml_tensor * q, * k, * v;

        static const float * at(const ggml_tensor * t, int64_t head, int64_t row) {
            return (const float *) ((const char *) t->data + head*t->nb[1] + row*t->nb[2]);
        }
    };

    static void compute(ggml_tensor * dst, const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v, int ith, int nth, void * userdata);
    static void attend(ggml_tensor * dst, int ith, int nth, void * userdata);
    void archive   (const job & j, const layer & l, int32_t g, head & h, work & w, const input & in);
    void mean_keys (const layer & l, head & h, int64_t b0, int64_t b1, float * x) const;
    void score     (const job & j, const layer & l, int32_t g, head & h, work & w, item & it, const input & in, int64_t q0, int64_t q1, int64_t n_share);
    void score_part(const layer & l, const head & h, work & w, item & it, int64_t part);
    void score_end (const layer & l, head & h, work & w, const item & it);
    void candidates(const job & j, const head & h, work & w, int64_t n_cand, std::vector<uint32_t> & res);
    void survivors (const job & j, head & h, work & w);
    void listen    (const job & j, const layer & l, int32_t g, head & h, work & w, item & it, const input & in, int64_t n_share);
    void ask       (const job & j, const layer & l, int32_t g, head & h, work & w, item & it, const input & in);
    void ask_part  (const layer & l, const head & h, work & w, item & it, int64_t i0, int64_t i1);
    void ask_end   (const layer & l, const head & h, work & w, item & it);
    void choose    (const job & j, head & h, work & w);
    void place     (const job & j, head & h, work & w, item & it);
    void omega     (const job & j, const layer & l, int32_t g, head & h, work & w, const input & in);
    void write     (const job & j, size_t i_layer, int32_t g, const head & h, work & w, const item & it, int64_t i0, int64_t i1);
    void upload    (const job & j, size_t i_layer);
};
