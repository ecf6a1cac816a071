#pragma once

#include "atlas-file.h"

#include <cstdint>
#include <string>
#include <vector>

struct common_atlas_session {
    std::vector<llama_token> tokens;               // those in the sequence
    llama_token              last = LLAMA_TOKEN_NULL; // was sampled after them, but not evaluated
    int64_t                  created = 0;          // unix time
};

// the folder of the memory files of one context
class common_atlas_store {
public:
    common_atlas_store(llama_context * ctx, std::string dir, int32_t n_backup, int32_t level);

    // [A-Za-z0-9._-]{1,128}, not starting with a dot; a trailing .atlas does not count
    static bool name_ok(const std::string & name);
    static std::string session_name(const std::string & name);

    bool exists(const std::string & name) const; // the file or a backup

    // these throw common_atlas_error and return what the file says about itself

    // the file is complete or the old one stays, which becomes a backup
    common_json save(const std::string & name, llama_seq_id seq_id, const common_atlas_session & session);

    // tries the backups, newest first, when the file is missing or corrupt; on failure the sequence is empty
    common_json load(const std::string & name, llama_seq_id seq_id, common_atlas_session & session);

    common_json info(const std::string & name) const;
    common_json list() const;

    // the number of files that were deleted
    int32_t remove(const std::string & name) const;

private:
    llama_context * ctx;
    std::string dir;
    std::string model_hash;
    int32_t     n_backup;
    int32_t     level;

    std::string path(const std::string & name) const;
    std::vector<std::string> backups(const std::string & name) const; // newest first

    common_json load_file(const std::string & path, llama_seq_id seq_id, common_atlas_session & session);
    common_json describe (const std::string & path) const;
};
