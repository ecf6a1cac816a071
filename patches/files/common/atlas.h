#pragma once

#include "llama-atlas.h"

#include "ggml.h"

#include <string>

struct common_params;

// what a folder of memory files may hold; those that were used the longest time ago go first; 0: any number
struct common_atlas_limits {
    int64_t n_files = 0;
    int64_t bytes   = 0; // of the files and their backups
    int64_t age     = 0; // seconds without use
};

// how the long-context memory was asked for on the command line
struct common_params_atlas {
    bool enabled   = false; // --atlas: an error when the model cannot have one
    bool automatic = false; // --atlas-auto: serve without it then

    llama_atlas_params params = llama_atlas_default_params();

    std::string memory_dir;       // folder of the memory files, empty: none
    std::string memory_file;      // name of the memory that persists, empty: <model>_memory
    bool        persist   = false;
    int32_t     auto_save = 300;  // seconds
    int32_t     n_backup  = 3;
    int32_t     level     = 1;    // of zstd

    common_atlas_limits limits;   // of the folder
};

// Choose the context and the parameters of the memory for a loaded model, log them with the reasons, and put them into
// cparams. Without --atlas and --atlas-auto it does nothing.
// Returns false when the memory was demanded and cannot be had; the reason is logged.
bool common_atlas_apply(common_params & params, const llama_model * model, llama_context_params & cparams);
