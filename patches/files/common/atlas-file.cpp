#include "atlas-file.h"

#include "build-info.h"
#include "log.h"

#include "llama.h"

#define XXH_INLINE_ALL
#include "hash/xxhash/xxhash.h"

#include <zstd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <deque>
#include <filesystem>
#include <functional>
#include <future>
#include <memory>
#include <set>
#include <thread>

#ifndef _WIN32
#include <cerrno>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#endif

namespace fs = std::filesystem;

using json = common_json;

static constexpr char     ATLAS_MAGIC[]     = "ATLASMEM";
static constexpr uint32_t ATLAS_VERSION     = 1;
static constexpr size_t   ATLAS_FIXED       = 16;       // magic, version, size of the header
static constexpr size_t   ATLAS_HEADER_MAX  = 16 << 20;
static constexpr size_t   ATLAS_FRAME_MAX   = 64 << 20; // raw
static constexpr size_t   ATLAS_FRAME_WRITE = 8 << 20;  // raw; small enough for several threads to share the work

static const char * const atlas_purpose[] = { "counters", "cells", "keys", "values", "scores" };
static const char * const atlas_tokens    = "tokens";

static common_atlas_error corrupt(const std::string & what) {
    return common_atlas_error(400, "corruption: " + what);
}

static common_atlas_error io_error(const std::string & what, const std::string & path) {
    return common_atlas_error(500, what + " " + path + ": " + strerror(errno));
}

static std::string hex64(uint64_t x) {
    char text[17];
    snprintf(text, sizeof(text), "%016" PRIx64, x);
    return text;
}

static uint64_t read_le(const uint8_t * p, int n) {
    uint64_t x = 0;
    for (int i = 0; i < n; ++i) {
        x |= (uint64_t) p[i] << 8*i;
    }
    return x;
}

static void write_le(uint8_t * p, uint64_t x, int n) {
    for (int i = 0; i < n; ++i) {
        p[i] = x >> 8*i;
    }
}

// bytes with the same place in their elements come together, which compresses better
static std::vector<uint8_t> shuffle(const std::vector<uint8_t> & src, size_t stride, bool back) {
    if (stride < 2) {
        return src;
    }
    std::vector<uint8_t> res(src.size());
    const size_t n = src.size()/stride;
    for (size_t j = 0; j < stride; ++j) {
        for (size_t i = 0; i < n; ++i) {
            if (back) {
                res[i*stride + j] = src[j*n + i];
            } else {
                res[j*n + i] = src[i*stride + j];
            }
        }
    }
    std::copy(src.begin() + n*stride, src.end(), res.begin() + n*stride);
    return res;
}

struct atlas_frame {
    std::string purpose;
    int32_t     layer = -1;
    size_t      stride = 1;
    size_t      raw    = 0;
    size_t      stored = 0;
    uint64_t    hash   = 0;

    bool same_kind(const atlas_frame & other) const {
        return purpose == other.purpose && layer == other.layer && stride == other.stride;
    }
};

struct file_deleter {
    void operator()(FILE * f) const { fclose(f); }
};
using file_ptr = std::unique_ptr<FILE, file_deleter>;

// held while a file is written or read; other processes wait for nobody, they are refused
struct atlas_lock {
    atlas_lock(const std::string & path, bool exclusive) {
#ifndef _WIN32
        fd = open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
        if (fd < 0 && exclusive) {
            throw io_error("cannot create", path);
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

static size_t n_workers() {
    return std::min(4u, std::max(1u, std::thread::hardware_concurrency()));
}

//
// writing
//

struct atlas_writer {
    atlas_writer(FILE * f, int32_t level) : f(f), level(level) {}

    FILE * f;
    int32_t level;
    std::vector<atlas_frame> frames;
    std::string error;

    atlas_frame cur;
    std::vector<uint8_t> data;

    using result = std::pair<atlas_frame, std::vector<uint8_t>>;
    std::deque<std::future<result>> pending;

    static result pack(atlas_frame frame, std::vector<uint8_t> raw, int32_t level) {
        frame.raw = raw.size();
        raw = shuffle(raw, frame.stride, false);

        std::unique_ptr<ZSTD_CCtx, size_t (*)(ZSTD_CCtx *)> cctx(ZSTD_createCCtx(), ZSTD_freeCCtx);
        std::vector<uint8_t> stored(ZSTD_compressBound(raw.size()));
        ZSTD_CCtx_setParameter(cctx.get(), ZSTD_c_compressionLevel, level);
        ZSTD_CCtx_setParameter(cctx.get(), ZSTD_c_checksumFlag, 1);
        const size_t n = ZSTD_compress2(cctx.get(), stored.data(), stored.size(), raw.data(), raw.size());
        if (ZSTD_isError(n)) {
            throw common_atlas_error(500, std::string("cannot compress: ") + ZSTD_getErrorName(n));
        }
        stored.resize(n);
        frame.stored = n;
        frame.hash   = XXH64(stored.data(), n, 0);
        return { std::move(frame), std::move(stored) };
    }

    void drain(size_t n_left) {
        while (pending.size() > n_left) {
            result res = pending.front().get();
            pending.pop_front();
            if (fwrite(res.second.data(), 1, res.second.size(), f) != res.second.size()) {
                throw common_atlas_error(500, std::string("cannot write the memory file: ") + strerror(errno));
            }
            frames.push_back(std::move(res.first));
        }
    }

    void flush() {
        if (!data.empty()) {
            pending.push_back(std::async(std::launch::async, pack, cur, std::move(data), level));
            data = {};
            drain(n_workers());
        }
    }

    void add(const atlas_frame & kind, const void * src, size_t size) {
        if (!cur.same_kind(kind)) {
            flush();
            cur = kind;
        }
        const size_t max = ATLAS_FRAME_WRITE/kind.stride*kind.stride;
        for (size_t i = 0; i < size; ) {
            const size_t n = std::min(size - i, max - data.size());
            data.insert(data.end(), (const uint8_t *) src + i, (const uint8_t *) src + i + n);
            if (data.size() == max) {
                flush();
            }
            i += n;
        }
    }

    static bool io(void * user, llama_atlas_part part, int32_t layer, size_t stride, void * src, size_t size) {
        auto & w = *(atlas_writer *) user;
        try {
            atlas_frame kind;
            kind.purpose = atlas_purpose[part];
            kind.layer   = layer;
            kind.stride  = stride;
            w.add(kind, src, size);
            return true;
        } catch (const std::exception & e) {
            w.error = e.what();
            return false;
        }
    }
};

static json frames_to_json(const std::vector<atlas_frame> & frames) {
    json res = json::array();
    for (const auto & frame : frames) {
        res.push_back(json::object({
            {"purpose", frame.purpose},
            {"layers",  frame.layer < 0 ? json::array() : json::array({frame.layer, frame.layer})},
            {"raw",     frame.raw},
            {"stored",  frame.stored},
            {"shuffle", frame.stride},
            {"xxh64",   hex64(frame.hash)},
        }));
    }
    return res;
}

static void sync_file(FILE * f, const std::string & path) {
    if (fflush(f) != 0) {
        throw io_error("cannot write", path);
    }
#ifndef _WIN32
    if (fsync(fileno(f)) != 0) {
        throw io_error("cannot write", path);
    }
#endif
}

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

//
// reading
//

struct atlas_reader {
    std::string path;
    file_ptr f;
    json header;
    std::vector<atlas_frame> frames;
    std::string error;

    size_t next = 0; // frame to be read from the file
    std::deque<std::future<std::vector<uint8_t>>> pending;

    atlas_frame cur;
    std::vector<uint8_t> data;
    size_t used = 0;
    size_t n_done = 0;

    explicit atlas_reader(const std::string & path) : path(path), f(fopen(path.c_str(), "rb")) {
        if (!f) {
            throw common_atlas_error(404, "there is no memory file " + fs::path(path).filename().string());
        }
        std::error_code ec;
        const uint64_t size = fs::file_size(path, ec);
        uint8_t fixed[ATLAS_FIXED];
        if (ec || size < sizeof(fixed) + 8 || !get(fixed, sizeof(fixed)) || memcmp(fixed, ATLAS_MAGIC, 8) != 0) {
            throw corrupt("this is no memory file");
        }
        const uint32_t version = read_le(fixed + 8, 4);
        const size_t n_header  = read_le(fixed + 12, 4);
        if (version != ATLAS_VERSION) {
            throw corrupt("version " + std::to_string(version) + " of the format is unknown");
        }
        if (n_header > ATLAS_HEADER_MAX || n_header > size - sizeof(fixed) - 8) {
            throw corrupt("the header is longer than the file");
        }
        std::vector<uint8_t> head(sizeof(fixed) + n_header);
        memcpy(head.data(), fixed, sizeof(fixed));
        uint8_t hash[8];
        if (!get(head.data() + sizeof(fixed), n_header) || !get(hash, sizeof(hash)) || XXH64(head.data(), head.size(), 0) != read_le(hash, 8)) {
            throw corrupt("the checksum of the header is wrong");
        }
        try {
            header = json::parse(std::string((const char *) head.data() + sizeof(fixed), n_header));
            uint64_t total = head.size() + sizeof(hash);
            for (const auto & item : header.at("frames")) {
                atlas_frame frame;
                frame.purpose = item.at("purpose").get<std::string>();
                frame.layer   = item.at("layers").empty() ? -1 : number(item.at("layers").at((size_t) 0), 1 << 20);
                frame.stride  = number(item.at("shuffle"), 1 << 16);
                frame.raw     = number(item.at("raw"),    ATLAS_FRAME_MAX);
                frame.stored  = number(item.at("stored"), ZSTD_compressBound(ATLAS_FRAME_MAX));
                frame.hash    = strtoull(item.at("xxh64").get<std::string>().c_str(), nullptr, 16);
                total += frame.stored;
                frames.push_back(std::move(frame));
            }
            if (total != size) {
                throw corrupt("the file has " + std::to_string(size) + " bytes instead of " + std::to_string(total));
            }
            header.erase("frames");
        } catch (const common_json_error & e) {
            throw corrupt(std::string("the header cannot be understood: ") + e.what());
        }
    }

    static int64_t number(const json & x, int64_t max) {
        if (!x.is_number_integer()) {
            throw corrupt("the header has something else instead of a number");
        }
        const int64_t res = x.get<int64_t>();
        if (res < 0 || res > max) {
            throw corrupt("a number of the header is out of range");
        }
        return res;
    }

    bool get(void * dst, size_t size) {
        return fread(dst, 1, size, f.get()) == size;
    }

    static std::vector<uint8_t> unpack(const atlas_frame & frame, std::vector<uint8_t> stored) {
        if (XXH64(stored.data(), stored.size(), 0) != frame.hash) {
            throw corrupt("the checksum of a frame is wrong");
        }
        std::vector<uint8_t> raw(frame.raw);
        const size_t n = ZSTD_decompress(raw.data(), raw.size(), stored.data(), stored.size());
        if (ZSTD_isError(n) || n != raw.size()) {
            throw corrupt(std::string("a frame cannot be decompressed: ") + (ZSTD_isError(n) ? ZSTD_getErrorName(n) : "it is too short"));
        }
        return shuffle(raw, frame.stride, true);
    }

    // the next frame of this kind; several are decompressed ahead
    void advance(const atlas_frame & kind) {
        while (next < frames.size() && pending.size() < n_workers()) {
            std::vector<uint8_t> stored(frames[next].stored);
            if (!get(stored.data(), stored.size())) {
                throw corrupt("the file ends too early");
            }
            pending.push_back(std::async(std::launch::async, unpack, frames[next], std::move(stored)));
            next++;
        }
        if (pending.empty() || !frames[n_done].same_kind(kind)) {
            throw corrupt("the frames are out of order");
        }
        cur  = frames[n_done++];
        data = pending.front().get();
        used = 0;
        pending.pop_front();
    }

    void take(const atlas_frame & kind, void * dst, size_t size) {
        for (size_t i = 0; i < size; ) {
            if (used == data.size()) {
                advance(kind);
            }
            if (!cur.same_kind(kind)) {
                throw corrupt("the frames are out of order");
            }
            const size_t n = std::min(size - i, data.size() - used);
            memcpy((uint8_t *) dst + i, data.data() + used, n);
            used += n;
            i    += n;
        }
    }

    bool at_end() const {
        return used == data.size() && n_done == frames.size();
    }

    static bool io(void * user, llama_atlas_part part, int32_t layer, size_t stride, void * dst, size_t size) {
        auto & r = *(atlas_reader *) user;
        try {
            atlas_frame kind;
            kind.purpose = atlas_purpose[part];
            kind.layer   = layer;
            kind.stride  = stride;
            r.take(kind, dst, size);
            return true;
        } catch (const std::exception & e) {
            r.error = e.what();
            return false;
        }
    }
};

//
// common_atlas_store
//

common_atlas_store::common_atlas_store(llama_context * ctx, std::string dir, int32_t n_backup, int32_t level)
    : ctx(ctx), dir(std::move(dir)), model_hash(hex64(llama_atlas_model_hash(ctx))), n_backup(n_backup), level(level) {
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
    json header = {
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
        file_ptr f(fopen(temp.c_str(), "wb"));
        if (!f) {
            throw io_error("cannot create", temp);
        }

        // the header comes first, but its table is only known in the end
        const size_t n_layer  = llama_model_n_layer(llama_get_model(ctx));
        const size_t n_frames = 16 + 3*n_layer + (st.bytes + llama_state_seq_get_size(ctx, seq_id) + session.tokens.size()*4)/(ATLAS_FRAME_WRITE/2);
        const size_t n_header = header.dump().size() + 64 + 192*n_frames;
        const size_t n_front  = ATLAS_FIXED + n_header + 8;
        std::vector<uint8_t> front(n_front, ' ');
        if (fseek(f.get(), n_front, SEEK_SET) != 0) {
            throw io_error("cannot write", temp);
        }

        atlas_writer w(f.get(), level);
        atlas_frame kind;
        kind.purpose = atlas_tokens;
        kind.stride  = 4;
        std::vector<uint8_t> tokens(session.tokens.size()*4);
        for (size_t i = 0; i < session.tokens.size(); ++i) {
            write_le(tokens.data() + i*4, session.tokens[i], 4);
        }
        w.add(kind, tokens.data(), tokens.size());

        char text[256];
        const auto res = llama_atlas_state_write(ctx, seq_id, atlas_writer::io, &w, text, sizeof(text));
        if (res != LLAMA_ATLAS_STATE_OK) {
            throw common_atlas_error(w.error.empty() ? 409 : 500, w.error.empty() ? text : w.error);
        }
        w.flush();
        w.drain(0);

        size_t raw = 0, stored = n_front;
        for (const auto & frame : w.frames) {
            raw    += frame.raw;
            stored += frame.stored;
        }
        header["bytes"] = stored;
        header["raw"]   = raw;
        const json result = header;
        header["frames"] = frames_to_json(w.frames);
        const std::string head = header.dump();
        if (head.size() > n_header) {
            throw common_atlas_error(500, "the header is larger than expected");
        }
        memcpy(front.data(), ATLAS_MAGIC, 8);
        write_le(front.data() + 8,  ATLAS_VERSION, 4);
        write_le(front.data() + 12, n_header, 4);
        memcpy(front.data() + ATLAS_FIXED, head.data(), head.size());
        write_le(front.data() + ATLAS_FIXED + n_header, XXH64(front.data(), ATLAS_FIXED + n_header, 0), 8);
        if (fseek(f.get(), 0, SEEK_SET) != 0 || fwrite(front.data(), 1, n_front, f.get()) != n_front) {
            throw io_error("cannot write", temp);
        }
        sync_file(f.get(), temp);
        f.reset();

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

        atlas_frame kind;
        kind.purpose = atlas_tokens;
        kind.stride  = 4;
        const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
        session.tokens.clear();
        for (int64_t i = 0; i < n_tokens; ++i) {
            uint8_t token[4];
            r.take(kind, token, sizeof(token));
            session.tokens.push_back((llama_token) read_le(token, 4));
            if (session.tokens.back() < 0 || session.tokens.back() >= n_vocab) {
                throw corrupt("there is a token that the model does not have");
            }
        }
        if (session.last < LLAMA_TOKEN_NULL || session.last >= n_vocab) {
            throw corrupt("there is a token that the model does not have");
        }
    } catch (const common_json_error & e) {
        throw corrupt(std::string("the header cannot be understood: ") + e.what());
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
        throw !r.error.empty() ? common_atlas_error(400, r.error) : corrupt(res == LLAMA_ATLAS_STATE_OK ? "there are more data than tokens" : text);
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
        res["frames"]     = r.frames.size();
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
