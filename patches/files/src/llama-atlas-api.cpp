#include "llama-atlas.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <stdexcept>
#include <string>
#include <tuple>

// the C interface of the memory, and the choice of its parameters

llama_atlas_params llama_atlas_default_params() {
    return {
        /*.n_cells     =*/ -1,
        /*.n_window    =*/ -1,
        /*.recall      =*/ 0.5f,
        /*.n_refresh   =*/ -1,
        /*.n_chunk     =*/ 16,
        /*.blend       =*/ 1.0f,
        /*.archive_max =*/ 0,
        /*.type_k      =*/ GGML_TYPE_COUNT,
        /*.type_v      =*/ GGML_TYPE_COUNT,
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
    const int64_t  n_min  = llama_atlas::n_window_min;

    const bool own_refresh = params->n_refresh >= 0;
    if (!own_refresh) {
        const bool host = !cparams.offload_kqv || model->n_devices() == 0 || model->n_gpu_layers() == 0;
        params->n_refresh = host ? 1 : 16;
    }
    if (params->n_refresh < 1 || params->n_refresh > 256) {
        out = format("the refresh interval must be between 1 and 256, not %d", params->n_refresh);
        return finish(false);
    }
    if (params->n_chunk < 1 || params->n_chunk > 256) {
        out = format("the chunk must be between 1 and 256, not %d", params->n_chunk);
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
    for (const auto & [name, wanted, cache, d] : {
            std::make_tuple("keys",   params->type_k, cparams.type_k, model->hparams.n_embd_head_k(0)),
            std::make_tuple("values", params->type_v, cparams.type_v, model->hparams.n_embd_head_v(0)) }) {
        const ggml_type type = llama_atlas::archive_type(wanted, cache, d);
        out += format("%s archived as %s%s\n", name, ggml_type_name(type),
                wanted != GGML_TYPE_COUNT ? "" : type == cache ? ", as the KV cache has them" :
                format(": less memory and smaller files than %s, as the KV cache has them, and as good", ggml_type_name(cache)).c_str());
    }
    out += format("%d of the memory cells for recalled blocks, the others for the tokens with the most attention\n",
            (int) (params->recall*params->n_cells/16 + 0.5f)*16);
    out += format("cells filled anew every %d token(s) of an answer%s, and every %d of a prompt\n", params->n_refresh,
            own_refresh ? "" : params->n_refresh == 1 ? ", as the KV cache is in the machine's memory" : ", as each time the cells are copied to the device", params->n_chunk);
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
    return atlas->prepare(seq_id, n_want);
}

int32_t llama_atlas_n_reusable(const llama_context * ctx, llama_seq_id seq_id, int32_t n_past) {
    const auto * atlas = ctx->get_atlas();
    return atlas ? atlas->n_reusable(seq_id, n_past) : n_past;
}

void llama_atlas_set(llama_context * ctx, llama_seq_id seq_id, int32_t n_window, float blend) {
    if (auto * atlas = ctx->get_atlas()) {
        ctx->synchronize();
        atlas->set(seq_id, n_window, blend);
    }
}

void llama_atlas_set_refresh(llama_context * ctx, int32_t n_refresh) {
    if (auto * atlas = ctx->get_atlas()) {
        ctx->synchronize();
        atlas->set_refresh(n_refresh);
    }
}

void llama_atlas_forget(llama_context * ctx, llama_seq_id seq_id) {
    if (auto * atlas = ctx->get_atlas()) {
        ctx->synchronize();
        atlas->forget(seq_id);
    }
}

llama_atlas_stats llama_atlas_get_stats(const llama_context * ctx, llama_seq_id seq_id) {
    const auto * atlas = ctx->get_atlas();
    return atlas ? atlas->stats(seq_id) : llama_atlas_stats{};
}

size_t llama_atlas_cells_size(const llama_context * ctx) {
    const auto * atlas = ctx->get_atlas();
    return atlas ? atlas->cells_size(*ctx->get_memory()) : 0;
}

int32_t llama_atlas_n_spare(const llama_context * ctx) {
    const auto * atlas = ctx->get_atlas();
    return atlas ? atlas->n_spare() : 0;
}

uint64_t llama_atlas_model_hash(const llama_context * ctx) {
    const auto * atlas = ctx->get_atlas();
    return atlas ? atlas->model_hash() : 0;
}

static llama_atlas_state_result state_call(llama_context * ctx, llama_seq_id seq_id, llama_atlas_state_section section, llama_atlas_state_io io, void * user, char * text, size_t n_text, bool load) {
    const auto fail = [&](llama_atlas_state_result res, const char * reason) {
        if (text && n_text > 0) {
            snprintf(text, n_text, "%s", reason);
        }
        return res;
    };
    auto * atlas = ctx->get_atlas();
    if (!atlas) {
        return fail(LLAMA_ATLAS_STATE_MISMATCH, "the context has no memory");
    }
    if (section == LLAMA_ATLAS_STATE_CELLS) {
        ctx->synchronize();
    }
    try {
        atlas->state(*ctx->get_memory(), seq_id, section, io, user, load);
    } catch (const llama_atlas_mismatch & e) {
        return fail(LLAMA_ATLAS_STATE_MISMATCH, e.what());
    } catch (const std::exception & e) {
        return fail(LLAMA_ATLAS_STATE_INVALID, e.what());
    }
    return LLAMA_ATLAS_STATE_OK;
}

llama_atlas_state_result llama_atlas_state_write(llama_context * ctx, llama_seq_id seq_id, llama_atlas_state_section section, llama_atlas_state_io io, void * user, char * text, size_t n_text) {
    return state_call(ctx, seq_id, section, io, user, text, n_text, false);
}

llama_atlas_state_result llama_atlas_state_read(llama_context * ctx, llama_seq_id seq_id, llama_atlas_state_section section, llama_atlas_state_io io, void * user, char * text, size_t n_text) {
    return state_call(ctx, seq_id, section, io, user, text, n_text, true);
}
