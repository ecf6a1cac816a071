#include "atlas-file.h"

#define XXH_INLINE_ALL
#include "hash/xxhash/xxhash.h"

#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#ifndef _WIN32
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#include <io.h>
#endif

using json = common_json;

static constexpr size_t ATLAS_FRAME_MIN   = 1 << 20; // raw, of those that are written
static constexpr size_t ATLAS_FRAMES      = 4096;    // about as many at most, as long as they are not too large

// What is quantized is as good as random, but for what is there twice: to look for that alone, without coding what is left,
// makes files 6 % larger (of 100 bytes 95, not 89) in a quarter of the time, and they are read seven times as fast.
// Every other level is taken as it is.
static constexpr int32_t ATLAS_LEVEL_QUANTIZED = -1;

// of the state, see llama-atlas-io.cpp: tokens of a piece, and pieces of all layers
static constexpr size_t ATLAS_PIECE_LEAST = 256;
static constexpr size_t ATLAS_PIECES      = 2048;

static json frames_to_json(const std::vector<atlas_frame> & frames, bool with_offset) {
    json res = json::array();
    for (const auto & frame : frames) {
        json item = json::object({
            {"purpose", frame.purpose},
            {"layers",  frame.layer < 0 ? json::array() : json::array({frame.layer, frame.layer})},
            {"raw",     frame.raw},
            {"stored",  frame.stored},
            {"shuffle", frame.stride},
            {"xxh64",   atlas_hex64(frame.hash)},
            {"content", atlas_hex64(frame.content)},
        });
        if (with_offset) {
            item["offset"] = frame.offset;
        }
        res.push_back(std::move(item));
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

static auto content_of(const atlas_frame & frame) {
    return std::make_tuple(frame.purpose, frame.layer, frame.stride, frame.raw, frame.content);
}

atlas_writer::atlas_writer(const std::string & path, const json & header, size_t n_layer, size_t raw_max, int32_t level, atlas_workers n_workers)
    : path(path), f(create_private(path)), level(level), n_workers(std::move(n_workers)) {
    if (!f) {
        throw atlas_io_error("cannot create", path);
    }
    plan(header, n_layer, raw_max);
    // the header comes first, but its table is only known in the end
    n_front = ATLAS_FIXED + n_header + 8;
    if (!out.begin(f.get(), n_front, raw_max >= ATLAS_WRITE_STEP)) {
        throw atlas_io_error("cannot write", path);
    }
}

atlas_writer::atlas_writer(const std::string & path, const atlas_index & old, const json & header, size_t n_layer, size_t raw_max, int32_t level, atlas_workers n_workers)
    : path(path), f(fopen(path.c_str(), "r+b")), level(level), n_workers(std::move(n_workers)), n_old(old.end) {
    if (!f) {
        throw atlas_io_error("cannot write", path);
    }
    plan(header, n_layer, raw_max);
    for (const auto & frame : old.frames) {
        if (frame.content != 0) {
            known[content_of(frame)] = frame;
        }
    }
    truncate(); // what a process left that was killed
    n_front = n_old + ATLAS_RECORD;
    if (!out.begin(f.get(), n_front, false)) {
        throw atlas_io_error("cannot write", path);
    }
}

atlas_writer::~atlas_writer() {
    if (writing.valid()) {
        writing.wait();
    }
    if (f && n_old > 0) {
        pending.clear();
        truncate();
    }
}

// back to the generations that are there
void atlas_writer::truncate() {
    fflush(f.get());
#ifdef _WIN32
    _chsize_s(_fileno(f.get()), n_old);
#else
    if (ftruncate(fileno(f.get()), n_old) != 0) {
        return; // what is there does no harm
    }
#endif
}

// frames of the same size each time, so that what does not change is in frames that do not change
void atlas_writer::plan(const json & header, size_t n_layer, size_t raw_max) {
    for (n_frame = ATLAS_FRAME_MIN; n_frame < ATLAS_FRAME_MAX && raw_max/n_frame > ATLAS_FRAMES; ) {
        n_frame *= 2;
    }
    const size_t n_tokens = header.at("session").at("n_tokens").get<int64_t>();
    const size_t n_pieces = std::min(n_tokens/ATLAS_PIECE_LEAST + 1, ATLAS_PIECES/std::max<size_t>(1, n_layer) + 8); // of a layer
    const size_t n_frames = 16 + (3 + 2*n_pieces)*n_layer + raw_max/(n_frame/2);
    n_header = header.dump().size() + 64 + 192*n_frames;
    if (n_header > ATLAS_HEADER_MAX) {
        throw common_atlas_error(413, "the memory is too large for a file: " + std::to_string(raw_max >> 20) + " MiB");
    }
}

void atlas_writer::put(uint64_t at, const void * src, size_t size) {
    if (atlas_seek(f.get(), at) != 0 || fwrite(src, 1, size, f.get()) != size || fflush(f.get()) != 0) {
        throw atlas_io_error("cannot write", path);
    }
}

void atlas_writer::sync() {
#ifndef _WIN32
    if (fsync(fileno(f.get())) != 0) {
        throw atlas_io_error("cannot write", path);
    }
#endif
}

json atlas_writer::finish(json header, uint64_t bytes_max) {
    flush();
    drain(0);
    write();
    take_back();
    if (!out.end()) {
        throw atlas_io_error("cannot write", path);
    }

    size_t raw = 0;
    for (const auto & frame : frames) {
        raw += frame.raw;
    }
    header["raw"]    = raw;
    header["bytes"]  = n_front + n_written;
    header["frames"] = frames_to_json(frames, n_old > 0);
    std::string head = header.dump();
    if (n_old > 0) {
        n_header = head.size() + 32; // the number below may have more digits
        header["bytes"] = n_front + n_written + n_header;
        head = header.dump();
    }
    if (head.size() > n_header || n_header > ATLAS_HEADER_MAX) {
        throw common_atlas_error(500, "the header is larger than expected");
    }
    head.resize(n_header, ' ');

    const uint64_t bytes = header.at("bytes").get<int64_t>();
    if (bytes_max > 0 && bytes > bytes_max) {
        throw common_atlas_error(413, "the session has " + std::to_string(bytes >> 20) + " MiB, and all files may have " + std::to_string(bytes_max >> 20));
    }

    std::vector<uint8_t> front(ATLAS_FIXED);
    if (n_old == 0) {
        memcpy(front.data(), ATLAS_MAGIC, 8);
        atlas_write_le(front.data() + 8,  ATLAS_VERSION, 4);
        atlas_write_le(front.data() + 12, n_header, 4);
        front.insert(front.end(), head.begin(), head.end());
        front.resize(n_front);
        atlas_write_le(front.data() + n_front - 8, XXH64(front.data(), n_front - 8, 0), 8);
    } else {
        put(n_front + n_written, head.data(), head.size());
        sync(); // all that the next bytes speak of has to be there before them
        front.resize(ATLAS_RECORD);
        memcpy(front.data(), ATLAS_MAGIC_MORE, 8);
        atlas_write_le(front.data() +  8, n_written, 8);
        atlas_write_le(front.data() + 16, n_header, 8);
        atlas_write_le(front.data() + 24, XXH64(head.data(), head.size(), 0), 8);
        atlas_write_le(front.data() + 32, XXH64(front.data(), 32, 0), 8);
    }
    put(n_old, front.data(), front.size());
    sync();
    f.reset();
    header.erase("frames");
    header["written"] = n_front - n_old + n_written + (n_old > 0 ? n_header : 0);
    return header;
}

atlas_work atlas_writer::pack(atlas_work work) const {
    atlas_frame & frame = work.frame;
    frame.raw     = work.data.size();
    frame.content = XXH64(work.data.data(), work.data.size(), 0);
    const auto it = known.find(content_of(frame));
    if (it != known.end()) {
        frame = it->second;
        return work;
    }
    frame.offset = 0;
    atlas_shuffle(work.data, work.tmp, frame.stride, false);

    if (!work.cctx) {
        work.cctx = { ZSTD_createCCtx(), ZSTD_freeCCtx };
    }
    if (!work.cctx) {
        throw std::bad_alloc();
    }
    ZSTD_CCtx * cctx = work.cctx.get();
    work.tmp.resize(ZSTD_compressBound(work.data.size()));
    ZSTD_CCtx_setParameter(cctx, ZSTD_c_compressionLevel, level == 1 && frame.stride == 1 ? ATLAS_LEVEL_QUANTIZED : level);
    ZSTD_CCtx_setParameter(cctx, ZSTD_c_checksumFlag, 1);
    const size_t n = ZSTD_compress2(cctx, work.tmp.data(), work.tmp.size(), work.data.data(), work.data.size());
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
        if (work.frame.offset == 0) { // it is not in the file yet
            work.frame.offset = n_front + n_written;
            n_written += work.data.size();
            n_packed  += work.data.size();
            frames.push_back(work.frame);
            packed.push_back(std::move(work));
            if (n_packed >= ATLAS_WRITE_STEP || n_workers() == 0) {
                write();
            }
        } else {
            frames.push_back(work.frame);
            idle.push_back(std::move(work));
        }
    }
}

// what is packed: in another thread if there is one to spare, as soon as that has written what it was given before
void atlas_writer::write() {
    take_back();
    const auto how = n_workers() == 0 ? std::launch::deferred : std::launch::async;
    writing = std::async(how, [this](works batch) { return write_all(std::move(batch)); }, std::move(packed));
    packed.clear();
    n_packed = 0;
    if (how == std::launch::deferred) {
        take_back();
    }
}

void atlas_writer::take_back() {
    if (writing.valid()) {
        works written = writing.get();
        std::move(written.begin(), written.end(), std::back_inserter(idle));
    }
}

atlas_writer::works atlas_writer::write_all(works batch) {
    for (const auto & work : batch) {
        if (!out.write(work.data.data(), work.data.size())) {
            throw atlas_io_error("cannot write", path);
        }
    }
    return batch;
}

void atlas_writer::flush() {
    if (!data.empty()) {
        atlas_work work = atlas_work::from(idle);
        work.frame = cur;
        work.data.swap(data);
        const size_t n = n_workers();
        pending.push_back(atlas_process(n, [this](atlas_work work) { return pack(std::move(work)); }, std::move(work)));
        data.clear();
        drain(n);
    }
}

void atlas_writer::add(const atlas_frame & kind, int32_t piece, const void * src, size_t size) {
    if (!cur.same_kind(kind) || cur_piece != piece) {
        flush();
        cur       = kind;
        cur_piece = piece;
    }
    const size_t max = n_frame/kind.stride*kind.stride;
    for (size_t i = 0; i < size; ) {
        const size_t n = std::min(size - i, max - data.size());
        data.resize(data.size() + n);
        memcpy(data.data() + data.size() - n, (const uint8_t *) src + i, n);
        if (data.size() == max) {
            flush();
        }
        i += n;
    }
}

bool atlas_writer::io(void * user, llama_atlas_part part, int32_t layer, int32_t piece, size_t stride, void * src, size_t size) {
    auto & w = *(atlas_writer *) user;
    try {
        w.add(atlas_frame::of(part, layer, stride), piece, src, size);
        return true;
    } catch (const std::exception & e) {
        w.error = e.what();
        return false;
    }
}
