#pragma once

#include "atlas-folder.h"

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

// The memory files of one context: its sequences go there and come back.
// A sequence is saved and loaded in two steps, of which the long one may run in any thread while nobody does anything with
// the sequence, and the short one belongs to the thread that decodes.
class common_atlas_store : public common_atlas_folder {
public:
    common_atlas_store(llama_context * ctx, std::string dir, int32_t n_backup, int32_t level, common_atlas_limits limits);

    // these throw common_atlas_error and return what the file says about itself

    // the file is complete or the old one stays, which becomes a backup; that of a long session grows by what is new
    // keep: names that are in use, which no limit deletes
    // room: memory for the cells, best reserved and touched by another thread, for that takes longer than to fill it
    size_t room_for(llama_seq_id seq_id) const;
    std::shared_ptr<common_atlas_saving> save_begin(const std::string & name, llama_seq_id seq_id, const common_atlas_session & session, std::vector<uint8_t> && room) const; // short
    common_json save_end(common_atlas_saving & saving, const std::vector<std::string> & keep) const; // long

    // tries the older saves in the file and the backups, newest first, when the file is missing or corrupt; the sequence has
    // to be empty
    std::shared_ptr<common_atlas_loading> load_begin(const std::string & name, llama_seq_id seq_id) const; // long
    common_json load_end(common_atlas_loading & loading, llama_seq_id seq_id, common_atlas_session & session) const; // short

private:
    llama_context * ctx;
    int32_t level;

    // where the files end that were read or written whole, by their paths; for the thread of the long steps
    mutable std::map<std::string, uint64_t> sound;

    std::unique_ptr<atlas_index> growing(const std::string & path, const common_json & session) const;
    std::shared_ptr<common_atlas_loading> load_file(const std::string & path, size_t back, llama_seq_id seq_id) const;
};
