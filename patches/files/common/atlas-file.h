#pragma once

#include "json.h"

#include "llama-atlas.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

// A sequence with its long-context memory in a file, so that it survives the process.
//
//   "ATLASMEM" | u32 version | u32 size of the header | header | u64 XXH64 of all before | frames
//
// All numbers are little-endian. The header is JSON, padded with spaces: the model, the session, and a table of the frames
// (purpose, layer, raw and stored size, period of the byte shuffle, XXH64 of the stored bytes). A frame is a zstd frame with
// a checksum, of at most 64 MiB raw. Whoever has the header can check and read the file without the model.

struct common_atlas_error : std::runtime_error {
    int status; // of HTTP: 400 corrupt, 404 there is none, 409 not for this model or in use, 500 the disk

    common_atlas_error(int status, const std::string & message) : std::runtime_error(message), status(status) {}
};

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
