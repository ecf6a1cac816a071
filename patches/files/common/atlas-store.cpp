#include "atlas-store.h"

#include "build-info.h"
#include "log.h"

#include "llama.h"

#include <algorithm>
#include <ctime>
#include <filesystem>
#include <memory>
#include <set>

#ifndef _WIN32
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#endif

namespace fs = std::filesystem;

using json = common_json;

// held while a file is written or read; other processes wait for nobody, they are refused
struct atlas_lock {
    atlas_lock(const std::string & path, bool exclusive) {
#ifndef _WIN32
        fd = open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
        if (fd < 0 && exclusive) {
            throw atlas_io_error("cannot create", path);
        }
        if (fd >= 0 && flock(fd, (exclusive ? LOCK_EX : LOCK_SH) | LOCK_NB) != 0) {
            close(fd);
            throw common_atlas_error(409, "the memory file is in use by another process");
        }
#else
        (void) path; (void) exclusive;
#endif
    }
    atlas_lock(const atlas_lock &) = delete;
    ~atlas_lock() {
#ifndef _WIN32
        if (fd >= 0) {
            close(fd);
        }
#endif
    }
    int fd = -1;
};

static void sync_folder(const std::string & path) {
#ifndef _WIN32
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
#else
    (void) path;
#endif
}

common_atlas_store::common_atlas_store(llama_context * ctx, std::string dir, int32_t n_backup, int32_t level)
    : ctx(ctx), dir(std::move(dir)), model_hash(atlas_hex64(llama_atlas_model_hash(ctx))), n_backup(n_backup), level(level) {
}

std::string common_atlas_store::session_name(const std::string & name) {
    const std::string suffix = ".atlas";
    const bool has = name.size() > suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
    return has ? name.substr(0, name.size() - suffix.size()) : name;
}

bool common_atlas_store::name_ok(const std::string & name) {
    return !name.empty() && name.size() <= 128 && name[0] != '.' && std::all_of(name.begin(), name.end(), [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
    });
}

std::string common_atlas_store::path(const std::string & name) const {
    if (!name_ok(name)) {
        throw common_atlas_error(400, "the name of a memory file is made of 1 to 128 letters, digits, '.', '_' and '-', and does not start with '.'");
    }
    return (fs::path(dir) / (session_name(name) + ".atlas")).string();
}

std::vector<std::string> common_atlas_store::backups(const std::string & name) const {
    const std::string prefix = session_name(name) + "_";
    const std::string suffix = ".atlas.bak";
    std::vector<std::pair<uint64_t, std::string>> found;
    std::error_code ec;
    for (const auto & entry : fs::directory_iterator(dir, ec)) {
        const std::string file = entry.path().filename().string();
        if (file.size() <= prefix.size() + suffix.size() || file.compare(0, prefix.size(), prefix) != 0 ||
                file.compare(file.size() - suffix.size(), suffix.size(), suffix) != 0) {
            continue;
        }
        const std::string time = file.substr(prefix.size(), file.size() - prefix.size() - suffix.size());
        if (time.size() < 16 && time.find_first_not_of("0123456789") == std::string::npos) {
            found.emplace_back(std::stoull(time), entry.path().string());
        }
    }
    std::sort(found.rbegin(), found.rend());
    std::vector<std::string> res;
    for (auto & [time, path] : found) {
        res.push_back(std::move(path));
    }
    return res;
}

bool common_atlas_store::exists(const std::string & name) const {
    return fs::exists(path(name)) || !backups(name).empty();
}

json common_atlas_store::save(const std::string & name, llama_seq_id seq_id, const common_atlas_session & session) {
    const std::string target = path(name);
    const std::string temp   = target + ".tmp";

    atlas_lock lock((fs::path(dir) / ("." + session_name(name) + ".lock")).string(), true);

    const llama_atlas_stats st = llama_atlas_get_stats(ctx, seq_id);
    if (st.n_tokens != (int64_t) session.tokens.size()) {
        throw common_atlas_error(500, "the memory has other tokens than the session");
    }

    char desc[256];
    llama_model_desc(llama_get_model(ctx), desc, sizeof(desc));

    const int64_t now = std::time(nullptr);
    const json header = {
        {"format",  "llama-atlas"},
        {"build",   llama_build_info()},
        {"model",   {{"hash", model_hash}, {"description", desc}, {"n_params", llama_model_n_params(llama_get_model(ctx))}}},
        {"params",  {{"cells", st.n_cells}, {"window", st.n_window}, {"sinks", st.n_sink}}},
        {"session", {
            {"name",       session_name(name)},
            {"n_tokens",   st.n_tokens},
            {"n_archived", st.n_archived},
            {"last",       session.last},
            {"created",    session.created ? session.created : now},
            {"saved",      now},
        }},
    };

    try {
        const size_t raw_max = st.bytes + llama_state_seq_get_size(ctx, seq_id) + session.tokens.size()*4;
        atlas_writer w(temp, header, llama_model_n_layer(llama_get_model(ctx)), raw_max, level);

        std::vector<uint8_t> tokens(session.tokens.size()*4);
        for (size_t i = 0; i < session.tokens.size(); ++i) {
            atlas_write_le(tokens.data() + i*4, session.tokens[i], 4);
        }
        w.add(atlas_frame::tokens(), tokens.data(), tokens.size());

        char text[256];
        const auto res = llama_atlas_state_write(ctx, seq_id, atlas_writer::io, &w, text, sizeof(text));
        if (res != LLAMA_ATLAS_STATE_OK) {
            throw common_atlas_error(w.error.empty() ? 409 : 500, w.error.empty() ? text : w.error);
        }
        const json result = w.finish(header);

        if (n_backup > 0 && fs::exists(target)) {
            std::error_code ec;
            int64_t time = now;
            std::string backup;
            do {
                backup = (fs::path(dir) / (session_name(name) + "_" + std::to_string(time++) + ".atlas.bak")).string();
            } while (fs::exists(backup));
            fs::create_hard_link(target, backup, ec);
            if (ec) {
                fs::copy_file(target, backup);
            }
        }
        fs::rename(temp, target);
        sync_folder(dir);

        const auto old = backups(name);
        for (size_t i = n_backup; i < old.size(); ++i) {
            std::error_code ec;
            fs::remove(old[i], ec);
        }
        return result;
    } catch (const fs::filesystem_error & e) {
        std::error_code ec;
        fs::remove(temp, ec);
        throw common_atlas_error(500, e.what());
    } catch (...) {
        std::error_code ec;
        fs::remove(temp, ec);
        throw;
    }
}

json common_atlas_store::load_file(const std::string & path, llama_seq_id seq_id, common_atlas_session & session) {
    atlas_reader r(path);
    try {
        if (r.header.at("model").at("hash").get<std::string>() != model_hash) {
            throw common_atlas_error(409, "the memory file belongs to another model: " + r.header.at("model").value("description", "unknown"));
        }
        const json & about = r.header.at("session");
        const int64_t n_tokens = atlas_reader::number(about.at("n_tokens"), LLAMA_ATLAS_MAX_TOKENS);
        session.last    = about.at("last").get<int32_t>();
        session.created = about.at("created").get<int64_t>();

        const atlas_frame kind = atlas_frame::tokens();
        const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
        session.tokens.clear();
        for (int64_t i = 0; i < n_tokens; ++i) {
            uint8_t token[4];
            r.take(kind, token, sizeof(token));
            session.tokens.push_back((llama_token) atlas_read_le(token, 4));
            if (session.tokens.back() < 0 || session.tokens.back() >= n_vocab) {
                throw atlas_corrupt("there is a token that the model does not have");
            }
        }
        if (session.last < LLAMA_TOKEN_NULL || session.last >= n_vocab) {
            throw atlas_corrupt("there is a token that the model does not have");
        }
    } catch (const common_json_error & e) {
        throw atlas_corrupt(std::string("the header cannot be understood: ") + e.what());
    }

    char text[256];
    const auto res = llama_atlas_state_read(ctx, seq_id, atlas_reader::io, &r, text, sizeof(text));
    if (res == LLAMA_ATLAS_STATE_MISMATCH) {
        throw common_atlas_error(409, std::string("the memory file does not fit this server: ") + text);
    }
    const bool ok = res == LLAMA_ATLAS_STATE_OK && r.at_end() &&
        llama_atlas_get_stats(ctx, seq_id).n_tokens == (int64_t) session.tokens.size();
    if (!ok) {
        llama_memory_seq_rm(llama_get_memory(ctx), seq_id, -1, -1);
        throw !r.error.empty() ? common_atlas_error(400, r.error) : atlas_corrupt(res == LLAMA_ATLAS_STATE_OK ? "there are more data than tokens" : text);
    }
    return r.header;
}

json common_atlas_store::load(const std::string & name, llama_seq_id seq_id, common_atlas_session & session) {
    std::vector<std::string> files = backups(name);
    files.insert(files.begin(), path(name));

    atlas_lock lock((fs::path(dir) / ("." + session_name(name) + ".lock")).string(), false);

    std::unique_ptr<common_atlas_error> first;
    for (const auto & file : files) {
        try {
            json res = load_file(file, seq_id, session);
            if (first) {
                LOG_WRN("ATLAS: %s: %s: loaded the backup %s\n", path(name).c_str(), first->what(), file.c_str());
                res["backup"] = fs::path(file).filename().string();
            }
            return res;
        } catch (const common_atlas_error & e) {
            if (!first) {
                first = std::make_unique<common_atlas_error>(e);
            }
            if (e.status != 400 && e.status != 404) {
                break;
            }
        }
    }
    session = {};
    throw common_atlas_error(*first);
}

json common_atlas_store::describe(const std::string & path) const {
    json res = {{"file", fs::path(path).filename().string()}};
    try {
        const atlas_reader r(path);
        const json & about = r.header.at("session");
        const std::string hash = r.header.at("model").at("hash").get<std::string>();
        res["name"]       = about.at("name").get<std::string>();
        res["n_tokens"]   = about.at("n_tokens").get<int64_t>();
        res["n_archived"] = about.at("n_archived").get<int64_t>();
        res["created"]    = about.at("created").get<int64_t>();
        res["saved"]      = about.at("saved").get<int64_t>();
        res["model"]      = r.header.at("model").value("description", "unknown");
        res["cells"]      = r.header.at("params").at("cells").get<int64_t>();
        res["window"]     = r.header.at("params").at("window").get<int64_t>();
        res["bytes"]      = r.header.at("bytes").get<int64_t>();
        res["raw"]        = r.header.at("raw").get<int64_t>();
        res["frames"]     = r.n_frames();
        res["compatible"] = hash == model_hash;
        if (hash != model_hash) {
            res["reason"] = "it belongs to another model";
        }
    } catch (const common_json_error & e) {
        res["compatible"] = false;
        res["reason"]     = std::string("corruption: the header cannot be understood: ") + e.what();
    } catch (const common_atlas_error & e) {
        if (e.status == 404) {
            throw;
        }
        res["compatible"] = false;
        res["reason"]     = e.what();
    }
    return res;
}

json common_atlas_store::info(const std::string & name) const {
    json res = describe(path(name));
    res["backups"] = json::array();
    for (const auto & backup : backups(name)) {
        res["backups"].push_back(fs::path(backup).filename().string());
    }
    return res;
}

json common_atlas_store::list() const {
    std::set<std::string> files;
    std::error_code ec;
    for (const auto & entry : fs::directory_iterator(dir, ec)) {
        const std::string file = entry.path().filename().string();
        if (entry.path().extension() == ".atlas" && name_ok(file)) {
            files.insert(entry.path().string());
        }
    }
    json res = json::array();
    for (const auto & file : files) {
        res.push_back(describe(file));
    }
    return res;
}

int32_t common_atlas_store::remove(const std::string & name) const {
    std::vector<std::string> files = backups(name);
    files.push_back(path(name));
    atlas_lock lock((fs::path(dir) / ("." + session_name(name) + ".lock")).string(), true);
    int32_t n = 0;
    std::error_code ec;
    for (const auto & file : files) {
        n += fs::remove(file, ec);
    }
    fs::remove(fs::path(dir) / ("." + session_name(name) + ".lock"), ec);
    if (n == 0) {
        throw common_atlas_error(404, "there is no memory file " + session_name(name) + ".atlas");
    }
    return n;
}
