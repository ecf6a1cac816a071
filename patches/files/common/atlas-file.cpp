#include "atlas-file.h"

#define XXH_INLINE_ALL
#include "hash/xxhash/xxhash.h"

#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <thread>

#ifndef _WIN32
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace fs = std::filesystem;

using json = common_json;

static constexpr char     ATLAS_MAGIC[]     = "ATLASMEM";
static constexpr uint32_t ATLAS_VERSION     = 1;
static constexpr size_t   ATLAS_FIXED       = 16;       // magic, version, size of the header
static constexpr size_t   ATLAS_HEADER_MAX  = 4 << 20;
static constexpr int      ATLAS_DEPTH_MAX   = 16;
static constexpr size_t   ATLAS_VALUES_MAX  = 256 << 10; // of the header
static constexpr size_t   ATLAS_FRAME_MAX   = 8 << 20;   // raw
static constexpr size_t   ATLAS_FRAME_MIN   = 1 << 20;   // ... of those that are written
static constexpr size_t   ATLAS_FRAMES      = 4096;      // about as many at most, as long as they are not too large

static constexpr size_t   ATLAS_SYNC_STEP   = 8 << 20; // bytes

static const char * const atlas_purpose[] = { "counters", "cells", "keys", "values", "scores" };

common_atlas_error atlas_corrupt(const std::string & what) {
    return common_atlas_error(400, "corruption: " + what);
}

common_atlas_error atlas_io_error(const std::string & what, const std::string & path) {
    return common_atlas_error(500, what + " " + path + ": " + strerror(errno));
}

std::string atlas_hex64(uint64_t x) {
    char text[17];
    snprintf(text, sizeof(text), "%016" PRIx64, x);
    return text;
}

uint64_t atlas_read_le(const uint8_t * p, int n) {
    uint64_t x = 0;
    for (int i = 0; i < n; ++i) {
        x |= (uint64_t) p[i] << 8*i;
    }
    return x;
}

void atlas_write_le(uint8_t * p, uint64_t x, int n) {
    for (int i = 0; i < n; ++i) {
        p[i] = x >> 8*i;
    }
}

// n elements of S bytes: their first bytes, then their second ones, ... or back; a loop that compilers vectorise
template <size_t S>
static void shuffle_as(const uint8_t * GGML_RESTRICT src, uint8_t * GGML_RESTRICT dst, size_t n, bool back) {
    for (size_t i = 0; i < n; ++i) {
        for (size_t j = 0; j < S; ++j) {
            if (back) {
                dst[i*S + j] = src[j*n + i];
            } else {
                dst[j*n + i] = src[i*S + j];
            }
        }
    }
}

static void shuffle_any(const uint8_t * src, uint8_t * dst, size_t n, size_t stride, bool back) {
    constexpr size_t n_tile = 1024; // elements, so that those of a tile stay in the cache
    for (size_t i0 = 0; i0 < n; i0 += n_tile) {
        const size_t i1 = std::min(n, i0 + n_tile);
        for (size_t j = 0; j < stride; ++j) {
            for (size_t i = i0; i < i1; ++i) {
                if (back) {
                    dst[i*stride + j] = src[j*n + i];
                } else {
                    dst[j*n + i] = src[i*stride + j];
                }
            }
        }
    }
}

// bytes with the same place in their elements come together, which compresses better
static void shuffle(std::vector<uint8_t> & data, std::vector<uint8_t> & tmp, size_t stride, bool back) {
    if (stride < 2) {
        return;
    }
    tmp.resize(data.size());
    const size_t n = data.size()/stride;
    switch (stride) {
        case 2:  shuffle_as<2>(data.data(), tmp.data(), n, back); break;
        case 4:  shuffle_as<4>(data.data(), tmp.data(), n, back); break;
        default: shuffle_any  (data.data(), tmp.data(), n, stride, back);
    }
    std::copy(data.begin() + n*stride, data.end(), tmp.begin() + n*stride);
    data.swap(tmp);
}

atlas_work atlas_work::from(std::vector<atlas_work> & idle) {
    atlas_work res;
    if (!idle.empty()) {
        res = std::move(idle.back());
        idle.pop_back();
    }
    return res;
}

atlas_frame atlas_frame::tokens() {
    atlas_frame res;
    res.purpose = "tokens";
    res.stride  = 4;
    return res;
}

atlas_frame atlas_frame::of(llama_atlas_part part, int32_t layer, size_t stride) {
    atlas_frame res;
    res.purpose = atlas_purpose[part];
    res.layer   = layer;
    res.stride  = stride;
    return res;
}

// how long a thread that works beside the decoding rests after a frame, which takes some 3 ms: a CPU that is idle for a
// moment takes over a thread of the decoding that shares a CPU with another; else both can stay there for a second, each
// waiting for the other
static constexpr auto ATLAS_REST = std::chrono::microseconds(250);

// do something with a frame, in another thread if there is one to spare
template <typename F>
static std::future<atlas_work> process(size_t n_workers, F f, atlas_work work) {
    auto res = std::async(n_workers > 0 ? std::launch::async : std::launch::deferred, f, std::move(work));
    if (n_workers == 0) {
        res.wait();
        std::this_thread::sleep_for(ATLAS_REST);
    }
    return res;
}

//
// writing
//

static json frames_to_json(const std::vector<atlas_frame> & frames) {
    json res = json::array();
    for (const auto & frame : frames) {
        res.push_back(json::object({
            {"purpose", frame.purpose},
            {"layers",  frame.layer < 0 ? json::array() : json::array({frame.layer, frame.layer})},
            {"raw",     frame.raw},
            {"stored",  frame.stored},
            {"shuffle", frame.stride},
            {"xxh64",   atlas_hex64(frame.hash)},
        }));
    }
    return res;
}

// only for the user who runs the server, whoever may look into the folder: it has what was said
static FILE * create_private(const std::string & path) {
#ifdef _WIN32
    return fopen(path.c_str(), "wb");
#else
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, S_IRUSR | S_IWUSR);
    return fd < 0 ? nullptr : fdopen(fd, "wb");
#endif
}

atlas_writer::atlas_writer(const std::string & path, const json & header, size_t n_layer, size_t raw_max, int32_t level, atlas_workers n_workers)
    : path(path), f(create_private(path)), level(level), n_workers(std::move(n_workers)),
      n_frame(std::clamp(raw_max/ATLAS_FRAMES, ATLAS_FRAME_MIN, ATLAS_FRAME_MAX)) {
    if (!f) {
        throw atlas_io_error("cannot create", path);
    }
    // the header comes first, but its table is only known in the end
    const size_t n_frames = 16 + 3*n_layer + raw_max/(n_frame/2);
    n_header = header.dump().size() + 64 + 192*n_frames;
    if (n_header > ATLAS_HEADER_MAX) {
        throw common_atlas_error(413, "the memory is too large for a file: " + std::to_string(raw_max >> 20) + " MiB");
    }
    if (fseek(f.get(), ATLAS_FIXED + n_header + 8, SEEK_SET) != 0) {
        throw atlas_io_error("cannot write", path);
    }
}

json atlas_writer::finish(json header) {
    flush();
    drain(0);

    const size_t n_front = ATLAS_FIXED + n_header + 8;
    size_t raw = 0, stored = n_front;
    for (const auto & frame : frames) {
        raw    += frame.raw;
        stored += frame.stored;
    }
    header["bytes"] = stored;
    header["raw"]   = raw;
    const json result = header;
    header["frames"] = frames_to_json(frames);
    const std::string head = header.dump();
    if (head.size() > n_header) {
        throw common_atlas_error(500, "the header is larger than expected");
    }

    std::vector<uint8_t> front(n_front, ' ');
    memcpy(front.data(), ATLAS_MAGIC, 8);
    atlas_write_le(front.data() + 8,  ATLAS_VERSION, 4);
    atlas_write_le(front.data() + 12, n_header, 4);
    memcpy(front.data() + ATLAS_FIXED, head.data(), head.size());
    atlas_write_le(front.data() + ATLAS_FIXED + n_header, XXH64(front.data(), ATLAS_FIXED + n_header, 0), 8);
    if (fseek(f.get(), 0, SEEK_SET) != 0 || fwrite(front.data(), 1, n_front, f.get()) != n_front || fflush(f.get()) != 0) {
        throw atlas_io_error("cannot write", path);
    }
#ifndef _WIN32
    if (fsync(fileno(f.get())) != 0) {
        throw atlas_io_error("cannot write", path);
    }
#endif
    f.reset();
    return result;
}

atlas_work atlas_writer::pack(atlas_work work, int32_t level) {
    atlas_frame & frame = work.frame;
    frame.raw = work.data.size();
    shuffle(work.data, work.tmp, frame.stride, false);

    std::unique_ptr<ZSTD_CCtx, size_t (*)(ZSTD_CCtx *)> cctx(ZSTD_createCCtx(), ZSTD_freeCCtx);
    work.tmp.resize(ZSTD_compressBound(work.data.size()));
    ZSTD_CCtx_setParameter(cctx.get(), ZSTD_c_compressionLevel, level);
    ZSTD_CCtx_setParameter(cctx.get(), ZSTD_c_checksumFlag, 1);
    const size_t n = ZSTD_compress2(cctx.get(), work.tmp.data(), work.tmp.size(), work.data.data(), work.data.size());
    if (ZSTD_isError(n)) {
        throw common_atlas_error(500, std::string("cannot compress: ") + ZSTD_getErrorName(n));
    }
    work.tmp.resize(n);
    work.data.swap(work.tmp);
    frame.stored = n;
    frame.hash   = XXH64(work.data.data(), n, 0);
    return work;
}

void atlas_writer::drain(size_t n_left) {
    while (pending.size() > n_left) {
        atlas_work work = pending.front().get();
        pending.pop_front();
        if (fwrite(work.data.data(), 1, work.data.size(), f.get()) != work.data.size()) {
            throw common_atlas_error(500, std::string("cannot write the memory file: ") + strerror(errno));
        }
        n_written += work.data.size();
        begin_sync();
        frames.push_back(work.frame);
        idle.push_back(std::move(work));
    }
}

// let the disk begin: else it idles until the end, and then has everything to write at once
void atlas_writer::begin_sync() {
#ifdef SYNC_FILE_RANGE_WRITE
    if (n_written - n_begun >= ATLAS_SYNC_STEP && fflush(f.get()) == 0) {
        sync_file_range(fileno(f.get()), ATLAS_FIXED + n_header + 8 + n_begun, n_written - n_begun, SYNC_FILE_RANGE_WRITE);
        n_begun = n_written;
    }
#endif
}

void atlas_writer::flush() {
    if (!data.empty()) {
        atlas_work work = atlas_work::from(idle);
        work.frame = cur;
        work.data.swap(data);
        const size_t n = n_workers();
        pending.push_back(process(n, [level = level](atlas_work work) { return pack(std::move(work), level); }, std::move(work)));
        data.clear();
        drain(n);
    }
}

void atlas_writer::add(const atlas_frame & kind, const void * src, size_t size) {
    if (!cur.same_kind(kind)) {
        flush();
        cur = kind;
    }
    const size_t max = n_frame/kind.stride*kind.stride;
    for (size_t i = 0; i < size; ) {
        const size_t n = std::min(size - i, max - data.size());
        data.insert(data.end(), (const uint8_t *) src + i, (const uint8_t *) src + i + n);
        if (data.size() == max) {
            flush();
        }
        i += n;
    }
}

bool atlas_writer::io(void * user, llama_atlas_part part, int32_t layer, size_t stride, void * src, size_t size) {
    auto & w = *(atlas_writer *) user;
    try {
        w.add(atlas_frame::of(part, layer, stride), src, size);
        return true;
    } catch (const std::exception & e) {
        w.error = e.what();
        return false;
    }
}

//
// reading
//

// the parser recurses, and needs far more memory than the text: look before
static void check_text(const std::string & text) {
    int    depth    = 0;
    size_t n_values = 0;
    bool   quoted   = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (quoted) {
            i += c == '\\';
            quoted = c != '"';
            continue;
        }
        quoted    = c == '"';
        n_values += c == ',' || c == '[' || c == '{';
        depth    += (c == '[' || c == '{') - (c == ']' || c == '}');
        if (c == 0 || depth > ATLAS_DEPTH_MAX || n_values > ATLAS_VALUES_MAX) {
            throw atlas_corrupt("the header cannot be understood: it is nested too deeply, has too many values, or a zero byte");
        }
    }
}

// all that is asked of the header later
static void check_header(const json & header) {
    const auto has = [](const json & object, const char * key, bool (json::*is)() const) {
        if (!(object.at(key).*is)()) {
            throw atlas_corrupt(std::string("the header has something else as ") + key);
        }
    };
    has(header, "format",  &json::is_string);
    has(header, "model",   &json::is_object);
    has(header, "params",  &json::is_object);
    has(header, "session", &json::is_object);
    has(header, "frames",  &json::is_array);
    has(header.at("model"), "hash", &json::is_string);
    for (const char * key : { "bytes", "raw" }) {
        atlas_reader::number(header.at(key));
    }
    for (const char * key : { "cells", "window" }) {
        atlas_reader::number(header.at("params").at(key));
    }
    const json & session = header.at("session");
    has(session, "name", &json::is_string);
    for (const char * key : { "n_tokens", "n_archived", "created", "saved" }) {
        atlas_reader::number(session.at(key));
    }
    atlas_reader::number(session.at("last"), INT32_MAX, -1);
    for (const auto & item : { std::make_pair(&header, "build"), std::make_pair(&header.at("model"), "description") }) {
        if (item.first->contains(item.second)) {
            has(*item.first, item.second, &json::is_string);
        }
    }
}

atlas_reader::atlas_reader(const std::string & path, atlas_workers n_workers) : f(fopen(path.c_str(), "rb")), n_workers(std::move(n_workers)) {
    if (!f && errno == ENOENT) {
        throw common_atlas_error(404, "there is no memory file " + fs::path(path).filename().string());
    }
    if (!f) {
        throw atlas_io_error("cannot read", path);
    }
    std::error_code ec;
    size = fs::file_size(path, ec);
    uint8_t fixed[ATLAS_FIXED];
    if (ec || size < sizeof(fixed) + 8 || !get(fixed, sizeof(fixed)) || memcmp(fixed, ATLAS_MAGIC, 8) != 0) {
        throw atlas_corrupt("this is no memory file");
    }
    const uint32_t version = atlas_read_le(fixed + 8, 4);
    const size_t n_header  = atlas_read_le(fixed + 12, 4);
    if (version != ATLAS_VERSION) {
        throw atlas_corrupt("version " + std::to_string(version) + " of the format is unknown");
    }
    if (n_header > ATLAS_HEADER_MAX || n_header > size - sizeof(fixed) - 8) {
        throw atlas_corrupt("the header is longer than the file");
    }
    std::vector<uint8_t> head(sizeof(fixed) + n_header);
    memcpy(head.data(), fixed, sizeof(fixed));
    uint8_t hash[8];
    if (!get(head.data() + sizeof(fixed), n_header) || !get(hash, sizeof(hash)) || XXH64(head.data(), head.size(), 0) != atlas_read_le(hash, 8)) {
        throw atlas_corrupt("the checksum of the header is wrong");
    }
    try {
        const std::string text((const char *) head.data() + sizeof(fixed), n_header);
        check_text(text);
        header = json::parse(text);
        check_header(header);
        uint64_t total = head.size() + sizeof(hash);
        for (const auto & item : header.at("frames")) {
            atlas_frame frame;
            frame.purpose = item.at("purpose").get<std::string>();
            if (!item.at("layers").is_array()) {
                throw atlas_corrupt("the header has something else as layers");
            }
            for (const auto & layer : item.at("layers")) {
                const int32_t i = number(layer, 1 << 20);
                frame.layer = frame.layer < 0 ? i : frame.layer;
            }
            frame.stride  = number(item.at("shuffle"), 1 << 16);
            frame.raw     = number(item.at("raw"),    ATLAS_FRAME_MAX);
            frame.stored  = number(item.at("stored"), ZSTD_compressBound(ATLAS_FRAME_MAX));
            const std::string digits = item.at("xxh64").get<std::string>();
            frame.hash    = strtoull(digits.c_str(), nullptr, 16);
            if (digits != atlas_hex64(frame.hash)) {
                throw atlas_corrupt("the header has something else as xxh64");
            }
            total += frame.stored;
            frames.push_back(std::move(frame));
        }
        if (total != size) {
            throw atlas_corrupt("the file has " + std::to_string(size) + " bytes instead of " + std::to_string(total));
        }
        header.erase("frames");
    } catch (const common_json_error & e) {
        throw atlas_corrupt(std::string("the header cannot be understood: ") + e.what());
    }
}

size_t atlas_reader::raw_size(const atlas_frame & kind) const {
    size_t res = 0;
    for (const auto & frame : frames) {
        res += frame.same_kind(kind) ? frame.raw : 0;
    }
    return res;
}

int64_t atlas_reader::number(const json & x, int64_t max, int64_t min) {
    if (!x.is_number_integer()) {
        throw atlas_corrupt("the header has something else instead of a number");
    }
    const int64_t res = x.get<int64_t>();
    if (res < min || res > max) {
        throw atlas_corrupt("a number of the header is out of range");
    }
    return res;
}

atlas_work atlas_reader::unpack(atlas_work work) {
    const atlas_frame & frame = work.frame;
    if (XXH64(work.data.data(), work.data.size(), 0) != frame.hash) {
        throw atlas_corrupt("the checksum of a frame is wrong");
    }
    if (ZSTD_getFrameContentSize(work.data.data(), work.data.size()) != frame.raw) {
        throw atlas_corrupt("a frame has another size than the header says");
    }
    work.tmp.resize(frame.raw);
    const size_t n = ZSTD_decompress(work.tmp.data(), work.tmp.size(), work.data.data(), work.data.size());
    if (ZSTD_isError(n) || n != work.tmp.size()) {
        throw atlas_corrupt(std::string("a frame cannot be decompressed: ") + (ZSTD_isError(n) ? ZSTD_getErrorName(n) : "it is too short"));
    }
    work.data.swap(work.tmp);
    shuffle(work.data, work.tmp, frame.stride, true);
    return work;
}

void atlas_reader::read_ahead(size_t n_max) {
    const size_t n = n_workers();
    while (next < frames.size() && pending.size() < n_max) {
        atlas_work work = atlas_work::from(idle);
        work.frame = frames[next];
        work.data.resize(frames[next].stored);
        if (!get(work.data.data(), work.data.size())) {
            throw atlas_corrupt("the file ends too early");
        }
        pending.push_back(process(n, unpack, std::move(work)));
        next++;
    }
}

void atlas_reader::prefetch(size_t raw_max) {
    for (size_t raw = 0; next < frames.size() && raw < raw_max; ) {
        raw += frames[next].raw;
        read_ahead(pending.size() + 1);
        if (pending.size() % std::max<size_t>(1, n_workers()) == 0) {
            pending.back().wait();
        }
    }
    for (auto & frame : pending) {
        frame.wait();
    }
}

void atlas_reader::advance(const atlas_frame & kind) {
    read_ahead(std::max<size_t>(1, n_workers()));
    if (pending.empty() || !frames[n_done].same_kind(kind)) {
        throw atlas_corrupt("the frames are out of order");
    }
    cur  = frames[n_done++];
    idle.push_back(std::move(now));
    now  = pending.front().get();
    used = 0;
    pending.pop_front();
}

void atlas_reader::take(const atlas_frame & kind, void * dst, size_t size) {
    for (size_t i = 0; i < size; ) {
        if (used == now.data.size()) {
            advance(kind);
        }
        if (!cur.same_kind(kind)) {
            throw atlas_corrupt("the frames are out of order");
        }
        const size_t n = std::min(size - i, now.data.size() - used);
        memcpy((uint8_t *) dst + i, now.data.data() + used, n);
        used += n;
        i    += n;
    }
}

bool atlas_reader::io(void * user, llama_atlas_part part, int32_t layer, size_t stride, void * dst, size_t size) {
    auto & r = *(atlas_reader *) user;
    try {
        r.take(atlas_frame::of(part, layer, stride), dst, size);
        return true;
    } catch (const std::exception & e) {
        r.error = e.what();
        return false;
    }
}
