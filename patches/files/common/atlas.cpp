#include "atlas.h"

#include "common.h"
#include "log.h"

#include <algorithm>
#include <sstream>

// cells of a sequence when the user does not set a context: enough for the window to hold a usual question and answer
static constexpr int32_t n_ctx_auto = 4096;

static std::string reason_against(const common_params & params, const llama_model * model, const llama_context_params & cparams) {
    if (const char * reason = llama_atlas_unsupported(model, cparams)) {
        return reason;
    }
    if (params.embedding) {
        return "embeddings do not generate, so they do not need a memory";
    }
    if (!params.mmproj.path.empty()) {
        return "images and audio take positions of their own";
    }
    if (params.speculative.has_dft() || std::any_of(params.speculative.types.begin(), params.speculative.types.end(),
                [](auto type) { return type != COMMON_SPECULATIVE_TYPE_NONE; })) {
        return "drafts are taken back, which a memory cannot";
    }
    return "";
}

bool common_atlas_apply(common_params & params, const llama_model * model, llama_context_params & cparams) {
    auto & atlas = params.atlas;
    if (!atlas.enabled && !atlas.automatic) {
        return true;
    }

    const int32_t n_seq = std::max(1u, cparams.n_seq_max);

    llama_atlas_params chosen = atlas.params;
    std::string reasons;

    const std::string reason = reason_against(params, model, cparams);
    bool ok = reason.empty();
    if (ok) {
        llama_context_params cp = cparams;
        if (params.n_ctx == 0) {
            cp.n_ctx = n_seq*std::min(n_ctx_auto, llama_model_n_ctx_train(model));
            reasons += "context of " + std::to_string(cp.n_ctx/n_seq) + " cells for each sequence, as none was set\n";
        }
        std::string text(2048, 0);
        ok = llama_atlas_configure(model, cp, &chosen, text.data(), text.size());
        reasons += text.c_str();
        if (ok) {
            cparams.n_ctx = params.n_ctx = cp.n_ctx;
        }
    } else {
        reasons = reason;
    }

    if (!ok) {
        if (atlas.automatic) {
            LOG_WRN("ATLAS: %s: serving without it\n", reasons.c_str());
            atlas.enabled = false;
            atlas.automatic = false;
            return true;
        }
        LOG_ERR("ATLAS: %s\n", reasons.c_str());
        return false;
    }

    atlas.enabled = true;
    atlas.params  = chosen;
    cparams.atlas = &atlas.params;

    std::istringstream lines(reasons);
    for (std::string line; std::getline(lines, line); ) {
        LOG_INF("ATLAS: %s\n", line.c_str());
    }
    return true;
}
