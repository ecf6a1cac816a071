#pragma once

#include "atlas.h"
#include "atlas-file.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct common_atlas_session {
    std::vector<llama_token> tokens;               // those in the sequence
    llama_token              last = LLAMA_TOKEN_NULL; // was sampled after them, but not evaluated
    int64_t                  created = 0;          // unix time
};

struct common_atlas_saving;  // a file that is being written
struct common_atlas_loading; // a file that is being read

// The folder of the memory files of one context. A name may have an owner, whose files are in a folder of that name:
// "owner/name".
// A sequence is saved and loaded in two steps, of which the long one may run in any thread while nobody does anything with
// the sequence, and the short one belongs to the thread that decodes.
class common_atlas_store {
public:
    common_atlas_store(llama_context * ctx, std::string dir, int32_t n_backup, int32_t level, common_atlas_limits limits);

    // [A-Za-z0-9._-]{1,128}, not starting with a dot; a trailing .atlas does not count
    static bool name_ok (const std::string & name);
    static bool owner_ok(const std::string & owner); // [a-z0-9]{1,32}
    static std::string session_name(const std::string & name);

    bool exists(const std::string & name) const; // the file or a backup

    // these throw common_atlas_error and return what the file says about itself

    // the file is complete or the old one stays, which becomes a backup; that of a long session grows by what is new
    // keep: names that are in use, which no limit deletes
    // room: memory for the cells, best reserved and touched by another thread, for that takes longer than to fill it
    size_t room_for(llama_seq_id seq_id) const;
    std::shared_ptr<common_atlas_saving> save_begin(const std::string & name, llama_seq_id seq_id, const common_atlas_session & session, std::vector<uint8_t> && room) const; // short
    common_json save_end(common_atlas_saving & saving, const std::vector<std::string> & keep) const; // long

    // tries the backups, newest first, when the file is missing or corrupt; the sequence has to be empty
    std::shared_ptr<common_atlas_loading> load_begin(const std::string & name, llama_seq_id seq_id) const; // long
    common_json load_end(common_atlas_loading & loading, llama_seq_id seq_id, common_atlas_session & session) const; // short

    common_json info(const std::string & name) const;
    common_json list(const std::string & owner) const;

    // the number of files that were deleted
    int32_t remove(const std::string & name) const;

private:
    llama_context * ctx;
    std::string dir;
    std::string model_hash;
    int32_t     n_backup;
    int32_t     level;
    common_atlas_limits limits;

    // where the files end that were read or written whole, by their paths; for the thread of the long steps
    mutable std::map<std::string, uint64_t> sound;

    std::string path(const std::string & name) const;
    std::string lock_path(const std::string & name) const;
    std::vector<std::string> backups(const std::string & name) const; // newest first
    void sweep(const std::string & folder) const;
    void prune(const std::string & name, const std::vector<std::string> & keep) const;

    std::unique_ptr<atlas_index> growing(const std::string & path, const common_json & session) const;
    void replace(const std::string & name, const std::string & temp, int64_t time) const;

    std::shared_ptr<common_atlas_loading> load_file(const std::string & path, size_t back, llama_seq_id seq_id) const;
    common_json describe(const std::string & path) const;
};
