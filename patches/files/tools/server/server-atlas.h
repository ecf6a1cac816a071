#pragma once

#include "server-common.h"

#include "atlas-store.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

// sessions of the long-context memory: which slot holds which memory file, and when it is loaded and saved

// the `atlas` object of a request
struct server_atlas_params {
    bool        enabled     = true;
    std::string memory_file;         // the session, with its owner; empty: none
    bool        save_memory = true;  // at the end of the request
    std::string reset       = "none";
    int32_t     append      = -1;    // 1: the prompt continues the session, 0: it is the whole session, -1: see compose()
    int32_t     window_size = -1;    // -1: as the server's
    float       blend_ratio = -1.0f; // < 0: as the server's
};

struct server_atlas_error : std::runtime_error {
    int         status;
    std::string param; // the field that is wrong, empty: none

    server_atlas_error(int status, const std::string & message, const std::string & param = "")
        : std::runtime_error(message), status(status), param(param) {}

    json to_json() const;
};

struct server_atlas_metric {
    const char * name;
    const char * help;
    bool   counter; // otherwise a gauge
    double value;
};

class server_atlas {
public:
    // the session of a slot
    struct entry {
        std::string name;                     // with its owner; empty: none
        llama_token last    = LLAMA_TOKEN_NULL; // see common_atlas_session
        int64_t     created = 0;
        bool        dirty   = false;
        int64_t     t_dirty = 0;              // ms, since when
        int64_t     t_saved = 0;              // unix time
        std::string error;                    // why the last save failed
        bool        busy    = false;          // its file is being written or read: nobody may touch the slot's sequence
    };

    // defaults of requests, which can be changed while the server runs
    struct settings {
        int32_t window_size;
        float   blend_ratio;
        int32_t refresh;
        int32_t auto_save_interval; // seconds, 0: never
    };

    // counted since the start
    struct counters {
        int64_t n_requests = 0, n_tokens = 0, n_archived = 0, n_recalled = 0, n_refresh = 0;
        int64_t n_saves = 0, n_save_errors = 0, n_loads = 0, n_load_errors = 0, n_resets = 0, n_pushed_out = 0;
        double  bytes_saved = 0, s_save = 0, s_load = 0, s_score = 0, s_write = 0, s_slide = 0;
    };

    // what came of a save or a load: what is told about it, or the error
    using callback = std::function<void(const json & res, const server_atlas_error * err)>;

    ~server_atlas() { stop(); }

    // what clients are told of a name
    static std::string file_of(const std::string & name);

    // throws server_atlas_error; `data` is the body of the request
    static server_atlas_params parse(const json & data, const std::string & owner, const common_params_atlas & server);

    // of the header X-Atlas-Owner, which only a trusted proxy may set; throws server_atlas_error
    static std::string owner_of(const std::map<std::string, std::string> & headers);

    // wake: lets the thread that decodes call run_finished()
    void init(llama_context * ctx, const common_params & params, int32_t n_slots, std::function<void()> wake);
    void stop();

    bool has_dir() const { return store != nullptr; }

    entry & get(int id_slot) { return entries[id_slot]; }
    bool holds(int id_slot) const { return (size_t) id_slot < entries.size() && !entries[id_slot].name.empty(); }
    bool busy (int id_slot) const { return (size_t) id_slot < entries.size() && entries[id_slot].busy; }
    int  find(const std::string & name) const; // the slot that holds the session, or -1

    // Save or load the session of a slot in another thread; the slot is busy until `done` was called.
    // What is wrong at once is told at once.
    void save(int id_slot, const server_tokens & tokens, const std::string & name, callback done);
    void load(int id_slot, server_tokens & tokens, const std::string & name, callback done);

    // what has ended since; true when all that has changed is to be saved now (SIGUSR1)
    bool run_finished();

    // let what was begun end
    void wait();

    common_atlas_store & files(); // throws server_atlas_error

    void begin (int id_slot, const std::string & name); // a new session
    void change(int id_slot, llama_token last);
    void forget(int id_slot);

    // sessions that have changed and were not saved for so long
    bool is_due(int id_slot) const;

    // whether it may be possible now to save what could not be saved
    bool may_retry(int id_slot) const { return ggml_time_ms() - entries[id_slot].t_dirty >= 1000; }

    // The prompt of a request in a session. A prompt that repeats the session is used as it is: it starts with the whole
    // session, or is a beginning of it, or is not shorter and has at least half of the session in common with it.
    // Any other is appended.
    void compose(int id_slot, const server_tokens & session, server_tokens & prompt, int32_t append, bool add_bos, const llama_vocab * vocab) const;

    const std::string & persist_name() const { return name_persist; }

    // the settings, and what is allowed; throws server_atlas_error
    json config() const;
    void configure(const json & data);

    // for the tokens of a request
    void apply(int id_slot, const server_atlas_params & params) const;

    // what a slot's memory did
    json stats(int id_slot) const;

    // of a request that took so long; returns the share of the time that the memory took
    double count(const llama_atlas_stats & before, const llama_atlas_stats & after, double ms);
    void count_reset()    { total.n_resets++; }
    void count_push_out() { total.n_pushed_out++; }
    std::vector<server_atlas_metric> metrics() const;

private:
    llama_context * ctx = nullptr;
    std::unique_ptr<common_atlas_store> store;
    std::vector<entry> entries; // per slot
    std::string name_persist;   // of the memory that is kept over a restart, empty: none

    llama_atlas_stats shape = {}; // of an empty sequence: how many cells there are for what
    settings now;
    counters total;

    // the thread that saves and loads
    std::thread thread;
    std::function<void()> wake;
    mutable std::mutex mutex;
    std::condition_variable cond;
    std::deque<std::function<void()>> jobs;     // in that thread
    std::deque<std::function<void()>> finished; // in the thread that decodes
    bool running = false;
    bool working = false;
    bool signaled = false;
    std::atomic<int64_t> t_due { 0 }; // ms, when the first session is due, 0: none is

    void loop();
    void submit(std::function<void()> job);
    void finish(std::function<void()> func);
    void update_due();
    std::vector<std::string> names() const;
};

std::string server_atlas_prometheus(const std::vector<server_atlas_metric> & metrics);
json        server_atlas_json      (const std::vector<server_atlas_metric> & metrics);
