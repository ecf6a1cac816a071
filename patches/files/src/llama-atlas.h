#pragma once

#include "llama-atlas-kernels.h"
#include "llama-kv-cache.h"

#include "../include/llama-atlas.h"

#include "ggml-backend.h"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct llama_cparams;
struct llama_model;
struct llama_ubatch;
class llm_graph_result;

// a growing array in host memory that is enlarged in place where the system can do that (mremap)
// throws std::bad_alloc; the content stays as it was then
class llama_atlas_buffer {
public:
    llama_atlas_buffer() = default;
    llama_atlas_buffer(const llama_atlas_buffer & other);
    llama_atlas_buffer(llama_atlas_buffer && other) noexcept : data_(other.data_), size_(other.size_) {
        other.data_ = nullptr;
        other.size_ = 0;
    }
    llama_atlas_buffer & operator=(llama_atlas_buffer other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~llama_atlas_buffer() { free(data_); }

    void reserve(size_t size);

    uint8_t * data() const { return data_; }
    size_t    size() const { return size_; }

private:
    uint8_t * data_ = nullptr;
    size_t    size_ = 0;
};

//
// llama_atlas: the memories of all sequences of a context, see llama-atlas.h
//

class llama_atlas {
public:
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

    // throws when a layer of the graph has no queries, keys and values to copy
    void check(const llm_graph_result & res) const;

    // copy the queries, keys and values of a processed ubatch; called after each graph
    void capture(const llama_ubatch & ubatch, const llm_graph_result & res, ggml_backend_sched_t sched);

    // see llama-atlas.h; the context must be synchronized
    int32_t prepare(llama_seq_id seq_id, int32_t n_want, int32_t n_threads);
    int32_t n_reusable(llama_seq_id seq_id, int32_t n_past) const;

    llama_atlas_stats stats(llama_seq_id seq_id) const;

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
    static constexpr float   credit_1 = 0.5f;  // share of a block's score that its successor gets ...
    static constexpr float   credit_2 = 0.25f; // ... and the one after that

    struct layer {
        uint32_t il;
        int32_t  n_head_kv;
        int32_t  n_rep;   // query heads per KV head
        int32_t  dk, dv;  // head sizes
        int32_t  rope;    // index in ropes, -1: the layer does not rotate
        int32_t  head0;   // index of its first head in seq::heads
        float    scale;   // of the logits, known after the first graph

        ggml_tensor * k;
        ggml_tensor * v;
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

        float   threshold = 0.0f; // the smallest u/age among the last survivors
        int64_t n_recalled = 0;
    };

    struct seq {
        bool active = true;

        int64_t n_tok  = 0; // tokens seen, the next position
        int64_t n_done = 0; // of these: archived (the window's as well) and their queries scored
        int64_t n_win0 = 0; // the first token of the window; those before it have left

        std::vector<head> heads;

        // of the tokens [n_done, n_tok), per layer: [n_pend][n_head*dk + n_head_kv*(dk + dv)]
        std::vector<std::vector<float>> pend;

        std::vector<uint32_t> cells; // KV cells that are memory cells

        int64_t n_refresh = 0;
        int64_t t_capture = 0, t_score = 0, t_slide = 0;
    };

    struct work; // scratch memory of a thread

    // what one refresh does, the same for all heads
    struct job {
        seq * s;
        int64_t n_win0;     // after the slide
        bool    choose;     // fill the cells anew
        bool    write;      // the window moved: write the cells
        std::vector<rope_table> t_pend; // per rope: angles of the pending tokens' positions
        std::vector<rope_table> t_query; // ... that turn their queries to the common distance
        std::vector<rope_table> t_cell; // ... of the sinks and the memory cells
        std::vector<uint32_t>   cells;  // KV cells of the sinks and the memory cells
        uint32_t stream;
        bool     staged;                // the cells go by way of stage_k and stage_v
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
    float   bias_mem = 0.0f;

    std::vector<layer> layers;
    std::vector<rope>  ropes;
    int32_t n_heads = 0;

    std::vector<seq> seqs;
    std::vector<std::unique_ptr<work>> works;

    // per layer: rows for all sinks and memory cells, for caches that are not in host memory
    std::vector<std::vector<uint8_t>> stage_k, stage_v;
    std::vector<float> scratch;

    int64_t row(int64_t token) const { return token < n_sink ? token : n_sink + (token - n_sink) % n_cap; }
    int64_t first_kept(const seq & s) const; // the oldest token that the archive still holds

    void reset(seq & s);
    void trim(seq & s, int64_t n);
    rope_table make_table(const rope & r, const std::vector<int32_t> & pos) const;
    void run(seq & s, int64_t n_win0, bool choose, uint32_t stream, std::vector<uint32_t> cells, int n_threads);
    void parallel(int64_t n, int n_threads, const std::function<void(int64_t, int)> & fn);
    bool find_cells(llama_seq_id seq_id, std::vector<uint32_t> & res) const;
    void upload(const job & j, const seq & s);

    void do_head  (job & j, size_t i_layer, int32_t g, work & w);
    void archive  (job & j, const layer & l, int32_t g, head & h, work & w, int64_t i0, int64_t i1);
    void score    (job & j, const layer & l, int32_t g, head & h, work & w, int64_t q0, int64_t q1, int64_t a1, bool last);
    void choose   (job & j, head & h, work & w, int64_t a1, int64_t t);
    void survivors(const job & j, head & h, work & w, int64_t a1, int64_t t, int64_t n_want);
    void write    (job & j, size_t i_layer, int32_t g, head & h, work & w, const std::vector<uint32_t> & idx);
};
