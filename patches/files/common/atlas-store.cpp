#include "atlas-store.h"

#include "build-info.h"
#include "log.h"

#include "llama.h"

#include <algorithm>
#include <ctime>
#include <filesystem>
#include <memory>

namespace fs = std::filesystem;

using json = common_json;

static constexpr int64_t ATLAS_GROW_TOKENS = 4096; // from which on a session's file grows by what is new

// throws common_atlas_error; the sequence is of no use then
static void read_section(llama_context * ctx, llama_seq_id seq_id, llama_atlas_state_section section, atlas_reader & r) {
    char text[256];
    const auto res = llama_atlas_state_read(ctx, seq_id, section, atlas_reader::io, &r, text, sizeof(text));
    if (res == LLAMA_ATLAS_STATE_MISMATCH) {
        throw common_atlas_error(409, std::string("the memory file does not fit this server: ") + text);
    }
    if (res != LLAMA_ATLAS_STATE_OK) {
        throw !r.error().empty() ? common_atlas_error(400, r.error()) : atlas_corrupt(text);
    }
}

struct common_atlas_saving {
    std::string name;
    atlas_lock  lock;
    json        header;
    size_t      raw_max = 0;

    llama_seq_id seq_id = -1;
    std::vector<uint8_t> tokens;
    std::vector<uint8_t> cells;
    size_t               stride = 1; // of the cells

    common_atlas_saving(std::string name, const std::string & lock_path) : name(std::move(name)), lock(lock_path, true) {}

    static bool take_cells(void * user, llama_atlas_part, int32_t, int32_t, size_t stride, void * data, size_t size) {
        auto & s = *(common_atlas_saving *) user;
        s.stride = stride;
        s.cells.insert(s.cells.end(), (const uint8_t *) data, (const uint8_t *) data + size);
        return true;
    }
};

struct common_atlas_loading {
    std::string path;
    std::unique_ptr<atlas_reader> reader;
    common_atlas_session session;
    std::string backup; // the file is one
};

common_atlas_store::common_atlas_store(llama_context * ctx, std::string dir, int32_t n_backup, int32_t level, common_atlas_limits limits)
    : common_atlas_folder(std::move(dir), atlas_hex64(llama_atlas_model_hash(ctx)), n_backup, limits), ctx(ctx), level(level) {}

size_t common_atlas_store::room_for(llama_seq_id seq_id) const {
    const size_t n = llama_state_seq_get_size(ctx, seq_id);
    return n + n/8;
}

std::shared_ptr<common_atlas_saving> common_atlas_store::save_begin(const std::string & name, llama_seq_id seq_id, const common_atlas_session & session, std::vector<uint8_t> && room) const {
    const fs::path target = path(name);
    if (target.parent_path() != dir) {
        std::error_code ec;
        if (fs::create_directory(target.parent_path(), ec)) {
            fs::permissions(target.parent_path(), fs::perms::owner_all, ec);
        }
    }
    auto res = std::make_shared<common_atlas_saving>(session_name(name), lock_path(name));

    const llama_atlas_stats st = llama_atlas_get_stats(ctx, seq_id);
    if (st.n_tokens != (int64_t) session.tokens.size()) {
        throw common_atlas_error(500, "the memory has other tokens than the session");
    }

    char desc[256];
    llama_model_desc(llama_get_model(ctx), desc, sizeof(desc));

    const int64_t now = std::time(nullptr);
    res->header = {
        {"format",  "llama-atlas"},
        {"build",   llama_build_info()},
        {"model",   {{"hash", model_hash}, {"description", desc}, {"n_params", llama_model_n_params(llama_get_model(ctx))}}},
        {"params",  {{"cells", st.n_cells}, {"window", st.n_window}, {"sinks", st.n_sink}}},
        {"session", {
            {"name",       target.stem().string()},
            {"n_tokens",   st.n_tokens},
            {"n_archived", st.n_archived},
            {"last",       session.last},
            {"created",    session.created ? session.created : now},
            {"saved",      now},
        }},
    };
    res->seq_id = seq_id;
    res->tokens.resize(session.tokens.size()*4);
    for (size_t i = 0; i < session.tokens.size(); ++i) {
        atlas_write_le(res->tokens.data() + i*4, session.tokens[i], 4);
    }

    res->cells = std::move(room);

    char text[256];
    if (llama_atlas_state_write(ctx, seq_id, LLAMA_ATLAS_STATE_CELLS, common_atlas_saving::take_cells, res.get(), text, sizeof(text)) != LLAMA_ATLAS_STATE_OK) {
        throw common_atlas_error(409, text);
    }
    res->raw_max = st.bytes + res->cells.size() + res->tokens.size();
    return res;
}

json common_atlas_store::save_end(common_atlas_saving & saving, const std::vector<std::string> & keep) const {
    // whoever hears of the end may save it again
    struct unlock {
        atlas_lock & lock;
        ~unlock() { lock.release(); }
    } unlock { saving.lock };

    const std::string target = path(saving.name);
    const std::string temp   = target + ".tmp";
    const auto old = growing(target, saving.header.at("session"));
    try {
        const size_t n_layer = llama_model_n_layer(llama_get_model(ctx));
        const auto workers = [ctx = ctx] { return llama_atlas_n_spare(ctx); };
        const auto w = old ?
            std::make_unique<atlas_writer>(target, *old, saving.header, n_layer, saving.raw_max, level, workers) :
            std::make_unique<atlas_writer>(temp,         saving.header, n_layer, saving.raw_max, level, workers);
        w->add(atlas_frame::tokens(), 0, saving.tokens.data(), saving.tokens.size());

        char text[256];
        const auto res = llama_atlas_state_write(ctx, saving.seq_id, LLAMA_ATLAS_STATE_ARCHIVE, atlas_writer::io, w.get(), text, sizeof(text));
        if (res != LLAMA_ATLAS_STATE_OK) {
            throw common_atlas_error(w->error.empty() ? 409 : 500, w->error.empty() ? text : w->error);
        }
        w->add(atlas_frame::of(LLAMA_ATLAS_PART_CELLS, -1, saving.stride), 0, saving.cells.data(), saving.cells.size());
        const json result = w->finish(saving.header, limits.bytes);
        if (!old) {
            replace(saving.name, temp, result.at("session").at("saved").get<int64_t>());
        }
        sound[target] = result.at("bytes").get<int64_t>();

        trim(saving.name);
        prune(saving.name, keep);
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

// What a long session has in its file, when a save is to go behind that: most of it does not change from one to the next.
// As soon as half of the file is of no use any more, the next save is a new file, and this one becomes a backup.
// What may be damaged is not built on: the file has to be one that was read or written whole.
std::unique_ptr<atlas_index> common_atlas_store::growing(const std::string & path, const json & session) const {
    const auto known = sound.find(path);
    if (known == sound.end() || session.at("n_tokens").get<int64_t>() < ATLAS_GROW_TOKENS) {
        return nullptr;
    }
    try {
        const atlas_reader r(path);
        const atlas_index & index = r.table();
        uint64_t used = 0;
        for (const auto & frame : index.frames) {
            used += frame.stored;
        }
        std::error_code ec;
        const bool grows = known->second == index.end &&
            fs::hard_link_count(path, ec) == 1 && !ec && // else it is a backup at the same time
            index.header.at("model").at("hash").get<std::string>() == model_hash &&
            index.header.at("session").at("created").get<int64_t>() == session.at("created").get<int64_t>() && // not begun again
            index.end <= 2*used && (limits.bytes == 0 || 3*used <= (uint64_t) limits.bytes);
        return grows ? std::make_unique<atlas_index>(index) : nullptr;
    } catch (const common_atlas_error &) {
        return nullptr;
    }
}

std::shared_ptr<common_atlas_loading> common_atlas_store::load_file(const std::string & path, size_t back, llama_seq_id seq_id) const {
    auto res = std::make_shared<common_atlas_loading>();
    res->path   = path;
    res->reader = std::make_unique<atlas_reader>(path, [ctx = ctx] { return llama_atlas_n_spare(ctx); }, back);
    atlas_reader & r = *res->reader;
    common_atlas_session & session = res->session;
    try {
        if (r.header().at("model").at("hash").get<std::string>() != model_hash) {
            throw common_atlas_error(409, "the memory file belongs to another model: " + r.header().at("model").value("description", "unknown"));
        }
        const json & about = r.header().at("session");
        const int64_t n_tokens = atlas_reader::number(about.at("n_tokens"), LLAMA_ATLAS_MAX_TOKENS);
        session.last    = atlas_reader::number(about.at("last"), INT32_MAX, LLAMA_TOKEN_NULL);
        session.created = about.at("created").get<int64_t>();

        const std::string kind = atlas_frame::tokens().purpose;
        // every token has had its cells; a file that claims far more tokens than bytes wants to fill the memory
        if (r.raw_size(kind, -1) != 4*(size_t) n_tokens || (uint64_t) n_tokens/16 > r.size) {
            throw atlas_corrupt("the number of tokens is wrong");
        }
        res->reader->read_ahead();
        std::vector<uint8_t> bytes(4*n_tokens);
        r.take(kind, -1, bytes.data(), bytes.size());
        session.tokens.reserve(n_tokens);
        const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
        for (int64_t i = 0; i < n_tokens; ++i) {
            session.tokens.push_back((llama_token) atlas_read_le(bytes.data() + 4*i, 4));
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
    read_section(ctx, seq_id, LLAMA_ATLAS_STATE_ARCHIVE, r);
    // the decoding will wait for them
    r.prefetch(atlas_frame::of(LLAMA_ATLAS_PART_CELLS, -1, 1).purpose, -1, llama_atlas_cells_size(ctx));
    return res;
}

std::shared_ptr<common_atlas_loading> common_atlas_store::load_begin(const std::string & name, llama_seq_id seq_id) const {
    atlas_lock lock(lock_path(name), false);

    // from the newest generation of the file to the oldest, then those of the backups
    std::vector<std::string> files = backups(name);
    files.insert(files.begin(), path(name));

    std::unique_ptr<common_atlas_error> first;
    for (const auto & file : files) {
        size_t n = 1; // how many generations it has matters only when the newest is of no use
        for (size_t back = 0; back < n; ++back) {
            try {
                auto res = load_file(file, back, seq_id);
                if (!first) {
                    sound[file] = res->reader->table().end;
                } else {
                    res->backup = fs::path(file).filename().string();
                    LOG_WRN("ATLAS: %s: %s: loaded %s as it was %zu saves before its last one\n", path(name).c_str(), first->what(), res->backup.c_str(), back);
                }
                return res;
            } catch (const common_atlas_error & e) {
                if (!first) {
                    first = std::make_unique<common_atlas_error>(e);
                }
                if (e.status != 400 && e.status != 404) {
                    throw common_atlas_error(*first);
                }
            }
            if (back == 0) {
                n = std::max<size_t>(1, atlas_reader::n_generations(file));
            }
        }
    }
    throw common_atlas_error(*first);
}

json common_atlas_store::load_end(common_atlas_loading & loading, llama_seq_id seq_id, common_atlas_session & session) const {
    atlas_reader & r = *loading.reader;
    read_section(ctx, seq_id, LLAMA_ATLAS_STATE_CELLS, r);
    if (!r.at_end() || llama_atlas_get_stats(ctx, seq_id).n_tokens != (int64_t) loading.session.tokens.size()) {
        throw atlas_corrupt("there are more data than tokens");
    }
    session = std::move(loading.session);

    std::error_code ec;
    fs::last_write_time(loading.path, fs::file_time_type::clock::now(), ec); // it was used

    json res = r.header();
    if (!loading.backup.empty()) {
        res["backup"] = loading.backup;
    }
    return res;
}
