#pragma once

#include "server-common.h"

#include "atlas-store.h"

#include <memory>
#include <string>
#include <vector>

// sessions of the long-context memory: which slot holds which memory file, and when it is loaded and saved

// the `atlas` object of a request
struct server_atlas_params {
    bool        enabled     = true;
    std::string memory_file;         // the session, empty: none
    bool        save_memory = true;  // at the end of the request
    std::string reset       = "none";
    int32_t     append      = -1;    // 1: the prompt continues the session, 0: it is the whole session, -1: see compose()
};

struct server_atlas_error : std::runtime_error {
    int         status;
    std::string param; // the field that is wrong, empty: none

    server_atlas_error(int status, const std::string & message, const std::string & param = "")
        : std::runtime_error(message), status(status), param(param) {}

    json to_json() const;
};

class server_atlas {
public:
    // the session of a slot
    struct entry {
        std::string name;                     // empty: none
        llama_token last    = LLAMA_TOKEN_NULL; // see common_atlas_session
        int64_t     created = 0;
        bool        dirty   = false;
        int64_t     t_dirty = 0;              // ms, since when
    };

    // throws server_atlas_error; `data` is the body of the request
    static server_atlas_params parse(const json & data, bool supported, bool has_dir);

    void init(llama_context * ctx, const common_params & params, int32_t n_slots);
    void stop() { store.reset(); entries.clear(); }

    bool has_dir() const { return store != nullptr; }

    entry & get(int id_slot) { return entries[id_slot]; }
    bool holds(int id_slot) const { return (size_t) id_slot < entries.size() && !entries[id_slot].name.empty(); }
    int  find(const std::string & name) const; // the slot that holds the session, or -1

    // these throw server_atlas_error
    json save(int id_slot, const server_tokens & tokens, const std::string & name);
    json load(int id_slot, server_tokens & tokens, const std::string & name);
    common_atlas_store & files();

    void begin (int id_slot, const std::string & name); // a new session
    void change(int id_slot, llama_token last);
    void forget(int id_slot);

    // save what would be lost
    void keep(int id_slot, const server_tokens & tokens);

    // sessions that have changed and were not saved for so long
    bool is_due(int id_slot) const;

    // The prompt of a request in a session. A prompt that repeats the session is used as it is: it starts with the whole
    // session, or is a beginning of it, or is not shorter and has at least half of the session in common with it.
    // Any other is appended.
    void compose(int id_slot, const server_tokens & session, server_tokens & prompt, int32_t append, bool add_bos, const llama_vocab * vocab) const;

    const std::string & persist_name() const { return name_persist; }

private:
    llama_context * ctx = nullptr;
    std::unique_ptr<common_atlas_store> store;
    std::vector<entry> entries; // per slot
    std::string name_persist;   // of the memory that is kept over a restart, empty: none
    int64_t interval = 0;       // ms
};
