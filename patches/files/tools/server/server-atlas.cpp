#include "server-atlas.h"

#include "common.h"
#include "log.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <type_traits>

#ifdef __linux__
#include <sys/resource.h>
#endif

// set by SIGUSR1: save what has changed
static volatile sig_atomic_t save_wanted = 0;

json server_atlas_error::to_json() const {
    json res = {
        {"code",    status},
        {"message", what()},
        {"type",    param.empty() ? "atlas_memory_error" : "atlas_parameter_error"},
    };
    if (!param.empty()) {
        res["param"] = param;
    }
    return res;
}

static constexpr int32_t ATLAS_WINDOW_MIN = 64;

// a number of a JSON object; throws server_atlas_error
template <typename T>
static T number(const json & value, const std::string & param, double min, double max) {
    const bool ok = std::is_integral_v<T> ? value.is_number_integer() : value.is_number();
    if (!ok || !(value.get<double>() >= min && value.get<double>() <= max)) {
        throw server_atlas_error(400, string_format("%s: must be %s from %g to %g", param.c_str(), std::is_integral_v<T> ? "an integer" : "a number", min, max), param);
    }
    return value.get<T>();
}

std::string server_atlas::owner_of(const std::map<std::string, std::string> & headers) {
    for (const auto & [key, value] : headers) {
        if (key.size() == 13 && std::equal(key.begin(), key.end(), "x-atlas-owner", [](char a, char b) { return tolower(a) == b; })) {
            if (!common_atlas_store::owner_ok(value)) {
                throw server_atlas_error(400, "X-Atlas-Owner: must be 1 to 32 of a-z and 0-9");
            }
            return value;
        }
    }
    return "";
}

server_atlas_params server_atlas::parse(const json & data, const std::string & owner, const common_params_atlas & server) {
    server_atlas_params res;
    if (!data.contains("atlas") || data.at("atlas").is_null()) {
        return res;
    }
    const json & atlas = data.at("atlas");
    const auto fail = [](const std::string & param, const std::string & message) {
        throw server_atlas_error(400, param + ": " + message, param);
    };
    if (!atlas.is_object()) {
        fail("atlas", "must be an object");
    }

    bool save_given = false;
    for (const auto & [key, value] : atlas.items()) {
        const std::string param = "atlas." + key;
        const auto boolean = [&]() {
            if (!value.is_boolean()) {
                fail(param, "must be true or false");
            }
            return value.get<bool>();
        };
        if (key == "enabled") {
            res.enabled = boolean();
        } else if (key == "save_memory") {
            res.save_memory = boolean();
            save_given = true;
        } else if (key == "append") {
            res.append = boolean();
        } else if (key == "reset") {
            res.reset = value.is_string() ? value.get<std::string>() : "";
            if (res.reset != "none" && res.reset != "soft" && res.reset != "hard") {
                fail(param, "must be \"none\", \"soft\" or \"hard\"");
            }
        } else if (key == "memory_file") {
            if (value.is_null()) {
                continue;
            }
            const std::string name = value.is_string() ? value.get<std::string>() : "";
            if (!common_atlas_store::name_ok(name)) {
                fail(param, "must be a name of 1 to 128 letters, digits, '.', '_' and '-' that does not start with '.'");
            }
            res.memory_file = (owner.empty() ? "" : owner + "/") + common_atlas_store::session_name(name);
        } else if (key == "window_size") {
            if (server.enabled) {
                res.window_size = number<int32_t>(value, param, ATLAS_WINDOW_MIN, server.params.n_window);
            }
        } else if (key == "blend_ratio") {
            res.blend_ratio = number<float>(value, param, 0.0, 1.0);
        } else {
            fail(param, "there is no such field");
        }
    }

    const bool wants = !res.memory_file.empty() || res.reset != "none" || res.append >= 0 || (save_given && res.save_memory);
    if (!server.enabled && (wants || (atlas.contains("enabled") && res.enabled))) {
        fail("atlas.enabled", "this server runs without a long-context memory (--atlas)");
    }
    if (!res.enabled && wants) {
        fail("atlas.enabled", "without memory there is no session");
    }
    if (res.memory_file.empty() && wants) {
        fail("atlas.memory_file", "is needed for what is asked");
    }
    if (!res.memory_file.empty() && server.memory_dir.empty()) {
        fail("atlas.memory_file", "this server has no folder for memory files (--atlas-memory-dir)");
    }
    if (!res.memory_file.empty() && json_value(data, "n", json_value(data, "n_cmpl", 1)) > 1) {
        fail("atlas.memory_file", "a session has one answer, not several");
    }
    return res;
}

void server_atlas::init(llama_context * ctx, const common_params & params, int32_t n_slots, std::function<void()> wake) {
    stop();
    this->ctx  = ctx;
    this->wake = std::move(wake);
    entries.assign(n_slots, {});
    shape = llama_atlas_get_stats(ctx, 0);
    name_persist.clear();
    const auto & atlas = params.atlas;
    now = { atlas.params.n_window, atlas.params.blend, atlas.params.n_refresh, atlas.auto_save };
    if (!llama_atlas_enabled(ctx) || atlas.memory_dir.empty()) {
        return;
    }
    store = std::make_unique<common_atlas_store>(ctx, atlas.memory_dir, atlas.n_backup, atlas.level, atlas.limits);
    if (atlas.persist) {
        name_persist = atlas.memory_file;
        if (name_persist.empty()) {
            name_persist = std::filesystem::path(params.model.path).stem().string() + "_memory";
            std::replace_if(name_persist.begin(), name_persist.end(), [](char c) { return !common_atlas_store::name_ok(std::string("a") + c); }, '_');
        }
        name_persist = common_atlas_store::session_name(name_persist);
    }
#ifndef _WIN32
    struct sigaction action = {};
    action.sa_handler = [](int) { save_wanted = 1; };
    action.sa_flags   = SA_RESTART;
    sigaction(SIGUSR1, &action, nullptr);
#endif
    running = true;
    thread  = std::thread([this]() { loop(); });
}

void server_atlas::stop() {
    {
        std::unique_lock<std::mutex> lock(mutex);
        running = false;
        cond.notify_all();
    }
    if (thread.joinable()) {
        thread.join();
    }
    finished.clear();
    store.reset();
    entries.clear();
    t_due = 0;
}

void server_atlas::loop() {
#ifdef __linux__
    setpriority(PRIO_PROCESS, 0, 5); // this thread and those that compress for it: decoding goes first
#endif
    std::unique_lock<std::mutex> lock(mutex);
    while (running || !jobs.empty()) {
        if (!jobs.empty()) {
            const auto job = std::move(jobs.front());
            jobs.pop_front();
            working = true;
            lock.unlock();
            job();
            lock.lock();
            working = false;
            cond.notify_all();
            continue;
        }
        cond.wait_for(lock, std::chrono::milliseconds(500));
        if (save_wanted) {
            save_wanted = 0;
            signaled = true;
        }
        if (running && jobs.empty() && (signaled || (t_due > 0 && ggml_time_ms() >= t_due))) {
            lock.unlock();
            wake();
            lock.lock();
        }
    }
}

void server_atlas::submit(std::function<void()> job) {
    std::unique_lock<std::mutex> lock(mutex);
    jobs.push_back(std::move(job));
    cond.notify_all();
}

void server_atlas::finish(std::function<void()> func) {
    {
        std::unique_lock<std::mutex> lock(mutex);
        finished.push_back(std::move(func));
    }
    wake();
}

bool server_atlas::run_finished() {
    std::unique_lock<std::mutex> lock(mutex);
    while (!finished.empty()) {
        const auto func = std::move(finished.front());
        finished.pop_front();
        lock.unlock();
        func();
        lock.lock();
    }
    const bool all = signaled;
    signaled = false;
    return all;
}

void server_atlas::wait() {
    {
        std::unique_lock<std::mutex> lock(mutex);
        cond.wait(lock, [&] { return jobs.empty() && !working; });
    }
    run_finished();
}

common_atlas_store & server_atlas::files() {
    if (!store) {
        throw server_atlas_error(501, "this server has no folder for memory files: start it with --atlas and --atlas-memory-dir");
    }
    return *store;
}

int server_atlas::find(const std::string & name) const {
    for (size_t i = 0; i < entries.size(); ++i) {
        if (!name.empty() && entries[i].name == name) {
            return i;
        }
    }
    return -1;
}

std::vector<std::string> server_atlas::names() const {
    std::vector<std::string> res;
    for (const auto & e : entries) {
        if (!e.name.empty()) {
            res.push_back(e.name);
        }
    }
    return res;
}

// what clients are told of a name
static std::string file_of(const std::string & name) {
    return common_atlas_store::session_name(name.substr(name.find('/') + 1));
}

void server_atlas::save(int id_slot, const server_tokens & tokens, const std::string & name, callback done) {
    entry & e = get(id_slot);
    const int64_t t_start = ggml_time_us();

    common_atlas_session session;
    session.tokens  = tokens.get_tokens();
    session.last    = e.last;
    session.created = e.created;

    const auto end = [this, id_slot, name, t_start, n_tokens = session.tokens.size(), done = std::move(done)](const json & header, const common_atlas_error * err) {
        entry & e = get(id_slot);
        e.busy = false;
        const bool own = common_atlas_store::session_name(name) == e.name;
        if (err) {
            SRV_ERR("ATLAS: cannot save %s: %s\n", name.c_str(), err->what());
            total.n_save_errors++;
            if (own) {
                e.t_dirty = ggml_time_ms(); // not again at once
                e.error   = err->what();
            }
            update_due();
            const server_atlas_error error(err->status, err->what());
            done(nullptr, &error);
            return;
        }
        const double ms = (ggml_time_us() - t_start)/1e3;
        if (own) {
            e.dirty   = false;
            e.error.clear();
            e.created = header.at("session").at("created").get<int64_t>();
            e.t_saved = header.at("session").at("saved").get<int64_t>();
        }
        update_due();
        const json res = {
            {"file",     file_of(name)},
            {"slot",     id_slot},
            {"n_tokens", n_tokens},
            {"bytes",    header.at("bytes").get<int64_t>()},
            {"raw",      header.at("raw").get<int64_t>()},
            {"ms",       ms},
        };
        total.n_saves++;
        total.s_save      += ms/1e3;
        total.bytes_saved += header.at("bytes").get<int64_t>();
        SRV_INF("ATLAS: saved %s\n", res.dump().c_str());
        done(res, nullptr);
    };

    try {
        const auto saving = files().save_begin(name, id_slot, session);
        e.busy = true;
        submit([this, saving, end, keep = names()]() {
            json header;
            std::shared_ptr<common_atlas_error> err;
            try {
                header = store->save_end(*saving, keep);
            } catch (const common_atlas_error & error) {
                err = std::make_shared<common_atlas_error>(error);
            } catch (const std::exception & error) {
                err = std::make_shared<common_atlas_error>(500, error.what());
            }
            finish([end, header, err]() { end(header, err.get()); });
        });
    } catch (const common_atlas_error & err) {
        end(nullptr, &err);
    }
}

void server_atlas::load(int id_slot, server_tokens & tokens, const std::string & name, callback done) {
    const int64_t t_start = ggml_time_us();
    forget(id_slot);
    tokens.clear();

    entry & e = get(id_slot);
    e.name = common_atlas_store::session_name(name);
    e.busy = true;

    const auto end = [this, id_slot, name, &tokens, t_start, done = std::move(done)](common_atlas_loading * loading, std::shared_ptr<common_atlas_error> err) {
        entry & e = get(id_slot);
        e.busy = false;
        json res;
        if (!err) {
            try {
                common_atlas_session session;
                const json header = files().load_end(*loading, id_slot, session);
                tokens.insert(session.tokens);
                e.last    = session.last;
                e.created = session.created;
                e.t_saved = header.at("session").at("saved").get<int64_t>();
                res = {
                    {"file",     file_of(name)},
                    {"slot",     id_slot},
                    {"n_tokens", session.tokens.size()},
                    {"bytes",    header.at("bytes").get<int64_t>()},
                    {"ms",       (ggml_time_us() - t_start)/1e3},
                };
                if (header.contains("backup")) {
                    res["backup"] = header.at("backup").get<std::string>();
                }
            } catch (const common_atlas_error & error) {
                err = std::make_shared<common_atlas_error>(error);
            }
        }
        if (err) {
            SRV_WRN("ATLAS: cannot load %s: %s\n", name.c_str(), err->what());
            total.n_load_errors++;
            forget(id_slot);
            const server_atlas_error error(err->status, err->what());
            done(nullptr, &error);
            return;
        }
        total.n_loads++;
        total.s_load += (ggml_time_us() - t_start)/1e6;
        SRV_INF("ATLAS: loaded %s\n", res.dump().c_str());
        done(res, nullptr);
    };

    submit([this, id_slot, name, end]() {
        std::shared_ptr<common_atlas_loading> loading;
        std::shared_ptr<common_atlas_error> err;
        try {
            loading = store->load_begin(name, id_slot);
        } catch (const common_atlas_error & error) {
            err = std::make_shared<common_atlas_error>(error);
        } catch (const std::exception & error) {
            err = std::make_shared<common_atlas_error>(500, error.what());
        }
        finish([end, loading, err]() { end(loading.get(), err); });
    });
}

void server_atlas::begin(int id_slot, const std::string & name) {
    entries[id_slot] = {};
    entries[id_slot].name = name;
}

void server_atlas::change(int id_slot, llama_token last) {
    entry & e = entries[id_slot];
    if (!e.dirty) {
        e.dirty   = true;
        e.t_dirty = ggml_time_ms();
        update_due();
    }
    e.last = last;
}

void server_atlas::forget(int id_slot) {
    if ((size_t) id_slot < entries.size()) {
        entries[id_slot] = {};
        update_due();
    }
}

bool server_atlas::is_due(int id_slot) const {
    if (!holds(id_slot) || !entries[id_slot].dirty || entries[id_slot].busy || now.auto_save_interval == 0) {
        return false;
    }
    return ggml_time_ms() - entries[id_slot].t_dirty >= now.auto_save_interval*1000ll;
}

void server_atlas::update_due() {
    int64_t first = 0;
    for (const auto & e : entries) {
        if (!e.name.empty() && e.dirty && now.auto_save_interval > 0) {
            const int64_t t = e.t_dirty + now.auto_save_interval*1000ll;
            first = first == 0 ? t : std::min(first, t);
        }
    }
    t_due = first;
}

json server_atlas::config() const {
    return {
        {"window_size",        now.window_size},
        {"blend_ratio",        now.blend_ratio},
        {"refresh",            now.refresh},
        {"auto_save_interval", now.auto_save_interval},
        {"memory_cells",       shape.n_cells},
        {"sinks",              shape.n_sink},
        {"memory_dir",         has_dir()},
        {"limits", {
            {"window_size", json::array({ATLAS_WINDOW_MIN, shape.n_window_max})},
            {"blend_ratio", json::array({0.0, 1.0})},
            {"refresh",     json::array({1, 256})},
            {"max_tokens",  LLAMA_ATLAS_MAX_TOKENS},
        }},
    };
}

void server_atlas::configure(const json & data) {
    if (!data.is_object()) {
        throw server_atlas_error(400, "the body must be an object");
    }
    settings next = now;
    for (const auto & [key, value] : data.items()) {
        if (key == "window_size") {
            next.window_size = number<int32_t>(value, key, ATLAS_WINDOW_MIN, shape.n_window_max);
        } else if (key == "blend_ratio") {
            next.blend_ratio = number<float>(value, key, 0.0, 1.0);
        } else if (key == "refresh") {
            next.refresh = number<int32_t>(value, key, 1, 256);
        } else if (key == "auto_save_interval") {
            next.auto_save_interval = number<int32_t>(value, key, 0, 1 << 20);
        } else if (key != "model") { // which a proxy needs
            throw server_atlas_error(400, key + ": there is no such setting", key);
        }
    }
    now = next;
    llama_atlas_set_refresh(ctx, now.refresh);
    update_due();
}

void server_atlas::apply(int id_slot, const server_atlas_params & params) const {
    llama_atlas_set(ctx, id_slot,
            params.window_size < 0    ? now.window_size : params.window_size,
            params.blend_ratio < 0.0f ? now.blend_ratio : params.blend_ratio);
}

json server_atlas::stats(int id_slot) const {
    const entry & e = entries[id_slot];
    json res = json::object();
    res["memory_file"] = e.name.empty() ? json(nullptr) : json(file_of(e.name));
    if (e.busy) {
        return res; // another thread has it
    }
    const llama_atlas_stats st = llama_atlas_get_stats(ctx, id_slot);
    const int64_t n_exact = st.n_tokens - std::max<int64_t>(st.n_archived, st.n_sink);

    res["tokens_seen"]        = st.n_tokens;
    res["tokens_archived"]    = st.n_archived;
    res["tokens_forgotten"]   = st.n_forgotten;
    res["window_size"]        = st.n_window;
    res["window_fill_ratio"]  = st.n_window > 0 ? std::clamp((double) n_exact/st.n_window, 0.0, 1.0) : 0.0;
    res["memory_cells"]       = st.n_cells;
    res["memory_utilization"] = st.n_cells > 0 ? (double) st.n_used/st.n_cells : 0.0;
    res["memory_bytes"]       = st.bytes;
    res["blend_ratio"]        = st.blend;
    res["refreshes"]          = st.n_refresh;
    res["recalled_blocks"]    = st.n_recalled;
    res["omega_loss"]         = st.loss < 0.0f ? json(nullptr) : json(st.loss);
    res["score_ms"]           = st.t_score/1e3;
    res["write_ms"]           = st.t_write/1e3;
    res["slide_ms"]           = st.t_slide/1e3;
    res["active"]             = st.active;
    return res;
}

double server_atlas::count(const llama_atlas_stats & before, const llama_atlas_stats & after, double ms) {
    const auto more = [](int64_t a, int64_t b) { return b >= a ? b - a : b; };
    total.n_requests++;
    total.n_tokens   += more(before.n_tokens,   after.n_tokens);
    total.n_archived += more(before.n_archived, after.n_archived);
    total.n_recalled += more(before.n_recalled, after.n_recalled);
    total.n_refresh  += more(before.n_refresh,  after.n_refresh);
    const double score = more(before.t_score, after.t_score)/1e6;
    const double write = more(before.t_write, after.t_write)/1e6;
    const double slide = more(before.t_slide, after.t_slide)/1e6;
    total.s_score += score;
    total.s_write += write;
    total.s_slide += slide;
    return ms > 0.0 ? std::min(1.0, (score + write + slide)*1e3/ms) : 0.0;
}

std::vector<server_atlas_metric> server_atlas::metrics() const {
    int64_t n_sessions = 0, n_dirty = 0;
    for (const auto & e : entries) {
        n_sessions += !e.name.empty();
        n_dirty    += !e.name.empty() && e.dirty;
    }
    const counters & c = total;
    return {
        { "requests_total",         "Requests that were served with memory.",                            true,  (double) c.n_requests },
        { "tokens_total",           "Tokens that sequences with memory have read and generated.",        true,  (double) c.n_tokens },
        { "archived_tokens_total",  "Tokens that have left a window.",                                   true,  (double) c.n_archived },
        { "recalled_blocks_total",  "Blocks that were brought into memory cells, of all heads.",         true,  (double) c.n_recalled },
        { "refreshes_total",        "How often memory cells were filled anew.",                          true,  (double) c.n_refresh },
        { "score_seconds_total",    "Time of scoring and choosing.",                                     true,  c.s_score },
        { "write_seconds_total",    "Time of writing memory cells.",                                     true,  c.s_write },
        { "slide_seconds_total",    "Time of sliding windows.",                                          true,  c.s_slide },
        { "saves_total",            "Memory files that were written.",                                   true,  (double) c.n_saves },
        { "save_errors_total",      "Memory files that could not be written.",                           true,  (double) c.n_save_errors },
        { "save_seconds_total",     "Time of writing memory files.",                                     true,  c.s_save },
        { "saved_bytes_total",      "Bytes of the memory files that were written.",                      true,  c.bytes_saved },
        { "loads_total",            "Memory files that were read.",                                      true,  (double) c.n_loads },
        { "load_errors_total",      "Memory files that could not be read.",                              true,  (double) c.n_load_errors },
        { "load_seconds_total",     "Time of reading memory files.",                                     true,  c.s_load },
        { "resets_total",           "Memories that were reset.",                                         true,  (double) c.n_resets },
        { "pushed_out_total",       "Sessions that gave their slot to another request.",                 true,  (double) c.n_pushed_out },
        { "sessions",               "Sessions in slots.",                                                false, (double) n_sessions },
        { "unsaved_sessions",       "Sessions in slots that have changed since they were saved.",        false, (double) n_dirty },
    };
}

std::string server_atlas_prometheus(const std::vector<server_atlas_metric> & metrics) {
    std::string res;
    for (const auto & m : metrics) {
        const std::string name = std::string("llamacpp:atlas_") + m.name;
        res += "# HELP " + name + " " + m.help + "\n";
        res += "# TYPE " + name + (m.counter ? " counter\n" : " gauge\n");
        res += name + " " + string_format("%.15g", m.value) + "\n";
    }
    return res;
}

json server_atlas_json(const std::vector<server_atlas_metric> & metrics) {
    json res = json::object();
    for (const auto & m : metrics) {
        res[m.name] = m.value;
    }
    return res;
}

void server_atlas::compose(int id_slot, const server_tokens & session, server_tokens & prompt, int32_t append, bool add_bos, const llama_vocab * vocab) const {
    llama_tokens all = session.get_tokens();
    if (entries[id_slot].last != LLAMA_TOKEN_NULL) {
        all.push_back(entries[id_slot].last);
    }
    const llama_tokens & add = prompt.get_tokens();
    if (all.empty() || append == 0) {
        return;
    }
    if (append < 0) {
        size_t n = 0;
        while (n < all.size() && n < add.size() && all[n] == add[n]) {
            n++;
        }
        if (n + 1 >= all.size() || n == add.size() || (add.size() >= all.size() && 2*n >= all.size())) {
            return;
        }
    }
    const bool skip = add_bos && !add.empty() && add[0] == llama_vocab_bos(vocab);
    all.insert(all.end(), add.begin() + skip, add.end());
    prompt = server_tokens(all, false);
}
