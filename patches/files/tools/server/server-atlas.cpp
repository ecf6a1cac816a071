#include "server-atlas.h"

#include "common.h"
#include "log.h"

#include <algorithm>
#include <filesystem>

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

server_atlas_params server_atlas::parse(const json & data, bool supported, bool has_dir) {
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
            res.memory_file = common_atlas_store::session_name(name);
        } else {
            fail(param, "there is no such field");
        }
    }

    const bool wants = !res.memory_file.empty() || res.reset != "none" || res.append >= 0 || (save_given && res.save_memory);
    if (!supported && (wants || (atlas.contains("enabled") && res.enabled))) {
        fail("atlas.enabled", "this server runs without a long-context memory (--atlas)");
    }
    if (!res.enabled && wants) {
        fail("atlas.enabled", "without memory there is no session");
    }
    if (res.memory_file.empty() && wants) {
        fail("atlas.memory_file", "is needed for what is asked");
    }
    if (!res.memory_file.empty() && !has_dir) {
        fail("atlas.memory_file", "this server has no folder for memory files (--atlas-memory-dir)");
    }
    if (!res.memory_file.empty() && json_value(data, "n", json_value(data, "n_cmpl", 1)) > 1) {
        fail("atlas.memory_file", "a session has one answer, not several");
    }
    return res;
}

void server_atlas::init(llama_context * ctx, const common_params & params, int32_t n_slots) {
    this->ctx = ctx;
    entries.assign(n_slots, {});
    store.reset();
    name_persist.clear();
    if (!llama_atlas_enabled(ctx) || params.atlas.memory_dir.empty()) {
        return;
    }
    interval = (int64_t) params.atlas.auto_save*1000;
    store = std::make_unique<common_atlas_store>(ctx, params.atlas.memory_dir, params.atlas.n_backup, params.atlas.level);
    if (params.atlas.persist) {
        name_persist = params.atlas.memory_file;
        if (name_persist.empty()) {
            name_persist = std::filesystem::path(params.model.path).stem().string() + "_memory";
            std::replace_if(name_persist.begin(), name_persist.end(), [](char c) { return !common_atlas_store::name_ok(std::string("a") + c); }, '_');
        }
        name_persist = common_atlas_store::session_name(name_persist);
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

json server_atlas::save(int id_slot, const server_tokens & tokens, const std::string & name) {
    entry & e = get(id_slot);
    const int64_t t_start = ggml_time_us();
    common_atlas_session session;
    session.tokens  = tokens.get_tokens();
    session.last    = e.last;
    session.created = e.created;
    try {
        const json header = files().save(name, id_slot, session);
        const double ms = (ggml_time_us() - t_start)/1e3;
        if (common_atlas_store::session_name(name) == e.name) {
            e.dirty   = false;
            e.created = header.at("session").at("created").get<int64_t>();
        }
        const json res = {
            {"file",     common_atlas_store::session_name(name)},
            {"slot",     id_slot},
            {"n_tokens", session.tokens.size()},
            {"bytes",    header.at("bytes").get<int64_t>()},
            {"raw",      header.at("raw").get<int64_t>()},
            {"ms",       ms},
        };
        SRV_INF("ATLAS: saved %s\n", res.dump().c_str());
        return res;
    } catch (const common_atlas_error & err) {
        throw server_atlas_error(err.status, err.what());
    }
}

json server_atlas::load(int id_slot, server_tokens & tokens, const std::string & name) {
    const int64_t t_start = ggml_time_us();
    common_atlas_session session;
    forget(id_slot);
    tokens.clear();
    try {
        const json header = files().load(name, id_slot, session);
        tokens.insert(session.tokens);
        entry & e = get(id_slot);
        e.name    = common_atlas_store::session_name(name);
        e.last    = session.last;
        e.created = session.created;
        json res = {
            {"file",     e.name},
            {"slot",     id_slot},
            {"n_tokens", session.tokens.size()},
            {"bytes",    header.at("bytes").get<int64_t>()},
            {"ms",       (ggml_time_us() - t_start)/1e3},
        };
        if (header.contains("backup")) {
            res["backup"] = header.at("backup").get<std::string>();
        }
        SRV_INF("ATLAS: loaded %s\n", res.dump().c_str());
        return res;
    } catch (const common_atlas_error & err) {
        SRV_WRN("ATLAS: cannot load %s: %s\n", name.c_str(), err.what());
        throw server_atlas_error(err.status, err.what());
    }
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
    }
    e.last = last;
}

void server_atlas::forget(int id_slot) {
    if ((size_t) id_slot < entries.size()) {
        entries[id_slot] = {};
    }
}

void server_atlas::keep(int id_slot, const server_tokens & tokens) {
    if (!holds(id_slot) || !entries[id_slot].dirty || tokens.empty()) {
        return;
    }
    try {
        save(id_slot, tokens, entries[id_slot].name);
    } catch (const server_atlas_error & err) {
        SRV_ERR("ATLAS: cannot save %s: %s\n", entries[id_slot].name.c_str(), err.what());
        entries[id_slot].t_dirty = ggml_time_ms(); // not again at once
    }
}

bool server_atlas::is_due(int id_slot) const {
    return holds(id_slot) && interval > 0 && entries[id_slot].dirty && ggml_time_ms() - entries[id_slot].t_dirty >= interval;
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
