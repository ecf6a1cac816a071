#pragma once

#include "llama.h"

// ATLAS: a long-context memory for any model whose keys are rotated (RoPE), without training
//
// A sequence keeps a fixed number of KV cells, whatever its length:
//
//   [ sinks: the first tokens ][ memory cells ][ window: the most recent tokens, exact ]
//
// The keys and values of all its tokens are kept in an archive in host memory. In each layer, between the queries and
// the attention, the memory cells are filled anew from there, for each KV head on its own: one part with blocks of
// tokens that these very queries ask for (recall), the other with the tokens that got the most attention since they
// were written (survivors). The queries of a prompt choose together, a chunk at a time; those of an answer one by one.
//
// Positions are never reassigned: a token's position is its index in the sequence, so callers do not have to know about
// the memory except that they call llama_atlas_prepare() before each batch.

// longest sequence, as the angles of the rotation lose precision with the position
#define LLAMA_ATLAS_MAX_TOKENS (1 << 22)

#ifdef __cplusplus
extern "C" {
#endif

    struct llama_atlas_params {
        int32_t n_cells;     // memory cells; < 0: half of the context
        int32_t n_window;    // exact recent tokens, less slides earlier; < 0: what sinks and memory cells leave
        float   recall;      // share of the memory cells for recalled blocks, 0..1
        int32_t n_refresh;   // the cells are filled anew every n_refresh tokens of an answer; < 0: as often as the place of the cache allows
        int32_t n_chunk;     // largest number of prompt tokens in a batch while the window slides
        float   blend;       // attention mass of the memory cells, 0..1 (0: written but not read, 1: natural)
        int64_t archive_max; // bytes for the archives of all sequences; 0: a quarter of the machine's
        enum ggml_type type_k; // of the archive's keys and values; GGML_TYPE_COUNT: Q8_0 where the cache has more, else as
        enum ggml_type type_v; // the cache
        uint32_t shuffle;    // for measurements: fill the cells with random tokens, drawn with this seed; 0: off
    };

    // what a sequence's memory did; times in microseconds
    struct llama_atlas_stats {
        int64_t n_tokens;    // tokens of the sequence, the next position
        int64_t n_archived;  // tokens that have left the window
        int64_t n_forgotten; // the oldest tokens that were dropped as the archive was full
        int64_t n_refresh;
        int64_t n_recalled;  // blocks that were brought into cells, over all layers and heads
        int64_t bytes;       // size of the archive
        int64_t t_score;     // archiving, scoring, choosing
        int64_t t_write;     // writing cells
        int64_t t_slide;     // moving the window
        int32_t n_cells;     // the parameters in force
        int32_t n_window;
        int32_t n_sink;
        int32_t n_window_max; // what the context leaves for the window
        int32_t n_used;      // memory cells in use, the mean over layers and heads
        float   blend;
        float   loss;        // relative error of the attention's output, against all candidates instead of those in cells; < 0: not measured yet
        bool    active;      // false: the sequence cannot slide (shared cells, odd positions)
    };

    LLAMA_API struct llama_atlas_params llama_atlas_default_params(void);

    // why the model or the context cannot have a memory; NULL when it can
    // the text is valid until the next call from the same thread
    LLAMA_API const char * llama_atlas_unsupported(const struct llama_model * model, struct llama_context_params params);

    // check the parameters and fill in the automatic ones for a context of n_ctx_seq cells per sequence
    // writes the reasons to `text` (may be NULL); returns false when they are contradictory
    LLAMA_API bool llama_atlas_configure(
            const struct llama_model          * model,
                  struct llama_context_params   cparams,
                  struct llama_atlas_params   * params,
                              char            * text,
                              size_t            n_text);

    // whether the context was made with a memory
    LLAMA_API bool llama_atlas_enabled(const struct llama_context * ctx);

    // make room for the next tokens of a sequence, refreshing its memory when the window has to slide
    // returns how many of n_want tokens the next batch may hold; 0: the sequence cannot grow
    LLAMA_API int32_t llama_atlas_prepare(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_want);

    // of n_past leading tokens that a new prompt shares with the sequence: how many can be kept
    // (all of them, or 0 when the new prompt departs before the window, from which there is no way back)
    LLAMA_API int32_t llama_atlas_n_reusable(const struct llama_context * ctx, llama_seq_id seq_id, int32_t n_past);

    // for the tokens to come: exact recent tokens, and the attention mass of the memory cells (as the parameters; < 0: those)
    // more than the context's window is cut to it; both stay when the sequence is emptied
    LLAMA_API void llama_atlas_set(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_window, float blend);

    // fill the cells anew every n_refresh tokens of an answer, 1..256
    LLAMA_API void llama_atlas_set_refresh(struct llama_context * ctx, int32_t n_refresh);

    // let a sequence's memory choose its cells anew, as if no token had got attention yet
    LLAMA_API void llama_atlas_forget(struct llama_context * ctx, llama_seq_id seq_id);

    LLAMA_API struct llama_atlas_stats llama_atlas_get_stats(const struct llama_context * ctx, llama_seq_id seq_id);

    //
    // state of a sequence: its memory together with its KV cells
    //

    // what a part of the state is made of; its bytes come one after the other
    enum llama_atlas_part {
        LLAMA_ATLAS_PART_COUNTERS = 0,
        LLAMA_ATLAS_PART_CELLS    = 1, // KV cells
        LLAMA_ATLAS_PART_KEYS     = 2, // of the archive, layer by layer
        LLAMA_ATLAS_PART_VALUES   = 3,
        LLAMA_ATLAS_PART_SCORES   = 4, // what is known about the tokens of a layer
    };

    // takes the next `size` bytes of a state, or fills them in when a state is read; returns false to give up
    // layer: -1 outside of the archive; stride: the bytes repeat with this period
    // piece: of the part, counted from 0; a piece of keys or values that is followed by another does not change any more,
    // whatever is appended to the sequence
    typedef bool (*llama_atlas_state_io)(void * user, enum llama_atlas_part part, int32_t layer, int32_t piece, size_t stride, void * data, size_t size);

    enum llama_atlas_state_result {
        LLAMA_ATLAS_STATE_OK       = 0,
        LLAMA_ATLAS_STATE_MISMATCH = 1, // it belongs to another model, other cache types, or other parameters of the memory
        LLAMA_ATLAS_STATE_INVALID  = 2,
    };

    // the archive: any thread may write or read it, while nobody does anything with the sequence
    // the KV cells: the thread that decodes
    enum llama_atlas_state_section {
        LLAMA_ATLAS_STATE_ARCHIVE = 0,
        LLAMA_ATLAS_STATE_CELLS   = 1,
    };

    // write a section of a sequence's state; it can be read by any context of the same model with the same cache types, and
    // an archive of any type
    // on failure the reason is in `text`
    LLAMA_API enum llama_atlas_state_result llama_atlas_state_write(
            struct llama_context * ctx, llama_seq_id seq_id, enum llama_atlas_state_section section,
            llama_atlas_state_io io, void * user, char * text, size_t n_text);

    // fill an empty sequence: first the archive, then the cells; it continues as it would have where the state was written
    // nothing of what is read is trusted; on failure the sequence is empty, once llama_memory_seq_rm() has been called for it
    // several threads may call `io` at the same time, each for another layer, as llama_atlas_n_spare() allows
    LLAMA_API enum llama_atlas_state_result llama_atlas_state_read(
            struct llama_context * ctx, llama_seq_id seq_id, enum llama_atlas_state_section section,
            llama_atlas_state_io io, void * user, char * text, size_t n_text);

    // bytes of the KV cells of a sequence, at most
    LLAMA_API size_t llama_atlas_cells_size(const struct llama_context * ctx);

    // CPUs, 4 at most, that are left for work beside the context: while it computes, and for 100 ms after that, those that
    // it does not use; any thread may ask
    LLAMA_API int32_t llama_atlas_n_spare(const struct llama_context * ctx);

    // identifies the model by its vocabulary, tensors, small weights and rotation, wherever its file is
    LLAMA_API uint64_t llama_atlas_model_hash(const struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
