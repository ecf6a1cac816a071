#include "server-atlas.h"

#include "common.h"

#include <algorithm>
#include <type_traits>

// what clients ask for and what they are told

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

std::string server_atlas::file_of(const std::string & name) {
    return common_atlas_store::session_name(name.substr(name.find('/') + 1));
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
        { "saved_bytes_total",      "Bytes that were written to memory files.",                          true,  c.bytes_saved },
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
