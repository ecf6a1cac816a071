#include "server-atlas.h"

#include "common.h"
#include "log.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>

#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __linux__
#include <sys/resource.h>
#endif

// set by SIGUSR1: save what has changed
static volatile sig_atomic_t save_wanted = 0;

// the frames of a file pass through many threads: with a fixed threshold each has pages of its own, else glibc raises
// it to the largest buffer that was freed, and they end up all over the heaps
static void keep_apart() {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 128*1024);
#endif
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
    keep_apart();
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

// what they leave behind all the same goes back to the system: without this, the heaps grow
static void give_back() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
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
            give_back();
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
    for (bool more = true; more; ) {
        {
            std::unique_lock<std::mutex> lock(mutex);
            cond.wait(lock, [&] { return jobs.empty() && !working; });
            more = !finished.empty();
        }
        run_finished(); // which may go on with another job
    }
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

void server_atlas::save(int id_slot, const server_tokens & tokens, const std::string & name, callback done) {
    entry & e = get(id_slot);
    const int64_t t_start = ggml_time_us();

    const auto session = std::make_shared<common_atlas_session>();
    session->tokens  = tokens.get_tokens();
    session->last    = e.last;
    session->created = e.created;

    const auto end = [this, id_slot, name, t_start, n_tokens = session->tokens.size(), done = std::move(done)](const json & header, const common_atlas_error * err) {
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
            {"written",  header.at("written").get<int64_t>()},
            {"ms",       ms},
        };
        total.n_saves++;
        total.s_save      += ms/1e3;
        total.bytes_saved += header.at("written").get<int64_t>();
        SRV_INF("ATLAS: saved %s\n", res.dump().c_str());
        done(res, nullptr);
    };

    const auto begin = [this, id_slot, name, session, end](std::vector<uint8_t> && room) {
        const auto saving = files().save_begin(name, id_slot, *session, std::move(room));
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
    };

    try {
        const size_t size = files().room_for(id_slot);
        e.busy = true;
        submit([this, size, begin, end]() {
            // touched here, so that the system finds its pages while decoding goes on
            auto room = std::make_shared<std::vector<uint8_t>>();
            try {
                room->resize(size);
                room->clear();
            } catch (const std::bad_alloc &) {
                // then it grows, or fails, where it is filled
            }
            finish([room, begin, end]() {
                try {
                    begin(std::move(*room));
                } catch (const common_atlas_error & err) {
                    end(nullptr, &err);
                } catch (const std::exception & error) {
                    const common_atlas_error err(500, error.what());
                    end(nullptr, &err);
                }
            });
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
