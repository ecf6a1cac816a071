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
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <fcntl.h>
#endif

namespace fs = std::filesystem;

using json = common_json;

static constexpr int    ATLAS_DEPTH_MAX  = 16;
static constexpr size_t ATLAS_AHEAD      = 8 << 20; // bytes
static constexpr size_t ATLAS_VALUES_MAX = 256 << 10; // of the header

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

int atlas_seek(FILE * f, uint64_t at) {
#ifdef _WIN32
    return _fseeki64(f, at, SEEK_SET);
#else
    return fseeko(f, at, SEEK_SET);
#endif
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

void atlas_shuffle(atlas_bytes & data, atlas_bytes & tmp, size_t stride, bool back) {
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

std::future<atlas_work> atlas_process(size_t n_workers, std::function<atlas_work(atlas_work)> f, atlas_work work) {
    auto res = std::async(n_workers > 0 ? std::launch::async : std::launch::deferred, std::move(f), std::move(work));
    if (n_workers == 0) {
        res.wait();
        std::this_thread::sleep_for(ATLAS_REST);
    }
    return res;
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

static bool get(FILE * f, void * dst, size_t size) {
    return fread(dst, 1, size, f) == size;
}

static uint64_t read_hash(const json & digits, const char * what) {
    const std::string text = digits.get<std::string>();
    const uint64_t res = strtoull(text.c_str(), nullptr, 16);
    if (text != atlas_hex64(res)) {
        throw atlas_corrupt(std::string("the header has something else as ") + what);
    }
    return res;
}

// at: where the frames are, one behind the other; 0: each says where it is, before `limit`
static atlas_index read_index(const std::string & text, uint64_t at, uint64_t limit) {
    atlas_index res;
    try {
        check_text(text);
        res.header = json::parse(text);
        check_header(res.header);
        res.end = at;
        for (const auto & item : res.header.at("frames")) {
            atlas_frame frame;
            frame.purpose = item.at("purpose").get<std::string>();
            if (!item.at("layers").is_array()) {
                throw atlas_corrupt("the header has something else as layers");
            }
            for (const auto & layer : item.at("layers")) {
                const int32_t i = atlas_reader::number(layer, 1 << 20);
                frame.layer = frame.layer < 0 ? i : frame.layer;
            }
            frame.stride  = atlas_reader::number(item.at("shuffle"), 1 << 16);
            frame.raw     = atlas_reader::number(item.at("raw"),    ATLAS_FRAME_MAX);
            frame.stored  = atlas_reader::number(item.at("stored"), ZSTD_compressBound(ATLAS_FRAME_MAX));
            frame.hash    = read_hash(item.at("xxh64"), "xxh64");
            frame.content = item.contains("content") ? read_hash(item.at("content"), "content") : 0;
            frame.offset  = at > 0 ? res.end : atlas_reader::number(item.at("offset"), limit);
            res.end       = frame.offset + frame.stored;
            if (at == 0 && res.end > limit) {
                throw atlas_corrupt("a frame is not in the file");
            }
            res.frames.push_back(std::move(frame));
        }
        res.header.erase("frames");
    } catch (const common_json_error & e) {
        throw atlas_corrupt(std::string("the header cannot be understood: ") + e.what());
    }
    return res;
}

// the first generation, which begins the file
static atlas_index read_front(FILE * f, uint64_t size) {
    uint8_t fixed[ATLAS_FIXED];
    if (size < sizeof(fixed) + 8 || !get(f, fixed, sizeof(fixed)) || memcmp(fixed, ATLAS_MAGIC, 8) != 0) {
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
    if (!get(f, head.data() + sizeof(fixed), n_header) || !get(f, hash, sizeof(hash)) || XXH64(head.data(), head.size(), 0) != atlas_read_le(hash, 8)) {
        throw atlas_corrupt("the checksum of the header is wrong");
    }
    const std::string text((const char *) head.data() + sizeof(fixed), n_header);
    atlas_index res = read_index(text, head.size() + sizeof(hash), size);
    if (res.end > size) {
        throw atlas_corrupt("the file has " + std::to_string(size) + " bytes instead of " + std::to_string(res.end));
    }
    return res;
}

struct atlas_generation {
    uint64_t end_frames, end;
    uint64_t hash; // of the header, which is between
};

// those behind the first one, which ends at `at`; false: what follows them is damaged
static bool find_generations(FILE * f, uint64_t size, uint64_t at, std::vector<atlas_generation> & res) {
    while (at < size) {
        uint8_t record[ATLAS_RECORD];
        if (size - at < sizeof(record) || atlas_seek(f, at) != 0 || !get(f, record, sizeof(record))) {
            return false;
        }
        if (std::all_of(record, record + sizeof(record), [](uint8_t x) { return x == 0; })) {
            return true; // it was never completed
        }
        const uint64_t left     = size - at - sizeof(record);
        const uint64_t n_frames = atlas_read_le(record +  8, 8);
        const uint64_t n_header = atlas_read_le(record + 16, 8);
        if (memcmp(record, ATLAS_MAGIC_MORE, 8) != 0 || XXH64(record, 32, 0) != atlas_read_le(record + 32, 8) ||
                n_frames > left || n_header > left - n_frames || n_header > ATLAS_HEADER_MAX) {
            return false;
        }
        at += sizeof(record) + n_frames + n_header;
        res.push_back({ at - n_header, at, atlas_read_le(record + 24, 8) });
    }
    return true;
}

static atlas_file_ptr open_file(const std::string & path, uint64_t & size) {
    atlas_file_ptr f(fopen(path.c_str(), "rb"));
    if (!f && errno == ENOENT) {
        throw common_atlas_error(404, "there is no memory file " + fs::path(path).filename().string());
    }
    std::error_code ec;
    size = f ? fs::file_size(path, ec) : 0;
    if (!f) {
        throw atlas_io_error("cannot read", path);
    }
    if (ec) {
        throw atlas_corrupt("this is no memory file");
    }
    return f;
}

size_t atlas_reader::n_generations(const std::string & path) {
    try {
        uint64_t size;
        const atlas_file_ptr f = open_file(path, size);
        std::vector<atlas_generation> more;
        const bool whole = find_generations(f.get(), size, read_front(f.get(), size).end, more);
        return 1 + more.size() + !whole;
    } catch (const common_atlas_error &) {
        return 0;
    }
}

atlas_reader::atlas_reader(const std::string & path, atlas_workers n_workers, size_t back) : n_workers(std::move(n_workers)) {
    f     = open_file(path, size);
    index = read_front(f.get(), size);

    std::vector<atlas_generation> more;
    const bool whole = find_generations(f.get(), size, index.end, more);
    if (back == 0 && !whole) {
        throw atlas_corrupt("behind the first " + std::to_string(index.end) + " bytes, the file is damaged");
    }
    back -= !whole;
    if (back > more.size()) {
        throw atlas_corrupt("there are not so many generations");
    }
    if (back < more.size()) {
        const atlas_generation & gen = more[more.size() - 1 - back];
        std::string text(gen.end - gen.end_frames, 0);
        if (atlas_seek(f.get(), gen.end_frames) != 0 || !get(f.get(), text.data(), text.size()) || XXH64(text.data(), text.size(), 0) != gen.hash) {
            throw atlas_corrupt("the checksum of the header is wrong");
        }
        index = read_index(text, 0, gen.end_frames);
        index.end = gen.end;
    }
    for (size_t i = 0; i < index.frames.size(); ++i) {
        cursors[{ index.frames[i].purpose, index.frames[i].layer }].frames.push_back(i);
    }
}

size_t atlas_reader::raw_size(const std::string & purpose, int32_t layer) const {
    size_t res = 0;
    const auto it = cursors.find({ purpose, layer });
    if (it != cursors.end()) {
        for (size_t i : it->second.frames) {
            res += index.frames[i].raw;
        }
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
    if (!work.dctx) {
        work.dctx = { ZSTD_createDCtx(), ZSTD_freeDCtx };
    }
    if (!work.dctx) {
        throw std::bad_alloc();
    }
    const size_t n = ZSTD_decompressDCtx(work.dctx.get(), work.tmp.data(), work.tmp.size(), work.data.data(), work.data.size());
    if (ZSTD_isError(n) || n != work.tmp.size()) {
        throw atlas_corrupt(std::string("a frame cannot be decompressed: ") + (ZSTD_isError(n) ? ZSTD_getErrorName(n) : "it is too short"));
    }
    work.data.swap(work.tmp);
    atlas_shuffle(work.data, work.tmp, frame.stride, true);
    return work;
}

// the bytes of the next frame as they are in the file
atlas_work atlas_reader::fetch(cursor & c) {
    if (c.next == c.frames.size()) {
        throw atlas_corrupt("there is less in the frames than belongs there");
    }
    const std::lock_guard<std::mutex> lock(mutex);
    atlas_work work = atlas_work::from(idle);
    work.frame = index.frames[c.frames[c.next++]];
    work.data.resize(work.frame.stored);
    if ((at != work.frame.offset && atlas_seek(f.get(), work.frame.offset) != 0) || !get(f.get(), work.data.data(), work.data.size())) {
        throw atlas_corrupt("the file ends too early");
    }
    at = work.frame.offset + work.frame.stored;
    return work;
}

// What is not in the page cache is read in the order of the file, which is twice as fast as the order in which several
// threads ask for it; where the decoding uses all CPUs, the disk is not what is waited for.
void atlas_reader::read_ahead() {
#ifdef POSIX_FADV_WILLNEED
    if (n_workers() == 0) {
        return;
    }
    try {
        ahead = std::async(std::launch::async, [this] {
            for (uint64_t i = 0; i < size && !closing; i += ATLAS_AHEAD) {
                posix_fadvise(fileno(f.get()), i, ATLAS_AHEAD, POSIX_FADV_WILLNEED);
            }
        });
    } catch (const std::system_error &) {
        // no thread can be had: it is read as it is asked for
    }
#endif
}

atlas_reader::~atlas_reader() {
    closing = true;
}

atlas_reader::cursor & atlas_reader::find(const std::string & purpose, int32_t layer) {
    const auto it = cursors.find({ purpose, layer });
    if (it == cursors.end()) {
        throw atlas_corrupt("there are no frames of " + purpose + (layer < 0 ? "" : " of layer " + std::to_string(layer)));
    }
    return it->second;
}

void atlas_reader::prefetch(const std::string & purpose, int32_t layer, size_t raw_max) {
    cursor & c = find(purpose, layer);
    for (size_t raw = 0; c.next < c.frames.size() && raw < raw_max; ) {
        raw += index.frames[c.frames[c.next]].raw;
        const size_t n = n_workers();
        c.ready.push_back(atlas_process(n, unpack, fetch(c)));
        if (c.ready.size() % std::max<size_t>(1, n) == 0) {
            c.ready.back().wait();
        }
    }
    for (auto & frame : c.ready) {
        frame.wait();
    }
}

void atlas_reader::take(const std::string & purpose, int32_t layer, void * dst, size_t size) {
    if (size == 0) {
        return;
    }
    cursor & c = find(purpose, layer);
    for (size_t i = 0; i < size; ) {
        if (c.used == c.now.data.size()) {
            if (!c.ready.empty()) {
                c.now = c.ready.front().get();
                c.ready.pop_front();
            } else {
                c.now = unpack(fetch(c));
                if (n_workers() == 0) {
                    std::this_thread::sleep_for(ATLAS_REST);
                }
            }
            c.used = 0;
        }
        const size_t n = std::min(size - i, c.now.data.size() - c.used);
        memcpy((uint8_t *) dst + i, c.now.data.data() + c.used, n);
        c.used += n;
        i      += n;
        if (c.used == c.now.data.size()) {
            n_done++;
            c.used = 0;
            c.now.data.clear();
            const std::lock_guard<std::mutex> lock(mutex);
            idle.push_back(std::move(c.now));
            c.now = atlas_work();
        }
    }
}

std::string atlas_reader::error() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return what;
}

bool atlas_reader::io(void * user, llama_atlas_part part, int32_t layer, int32_t /*piece*/, size_t /*stride*/, void * dst, size_t size) {
    auto & r = *(atlas_reader *) user;
    try {
        r.take(atlas_purpose[part], layer, dst, size);
        return true;
    } catch (const std::exception & e) {
        const std::lock_guard<std::mutex> lock(r.mutex);
        r.what = r.what.empty() ? e.what() : r.what;
        return false;
    }
}
