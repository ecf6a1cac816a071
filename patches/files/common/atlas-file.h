#pragma once

#include "atlas-output.h"
#include "json.h"

#include "llama-atlas.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// The format of a memory file: a sequence with its long-context memory.
//
//   "ATLASMEM" | u32 version | u32 size of the header | header | u64 XXH64 of all before | frames
//
// All numbers are little-endian. The header is JSON, padded with spaces: the model, the session, and a table of the frames
// (purpose, layer, raw and stored size, period of the byte shuffle, XXH64 of the stored bytes and of the raw ones). A frame
// is a zstd frame with a checksum, of at most 8 MiB raw. Whoever has the header can check and read the file without the
// model.
//
// Later generations of a session that has grown follow, each with the frames that those before do not have:
//
//   "ATLASGEN" | u64 size of the frames | u64 size of the header | u64 XXH64 of the header | u64 XXH64 of all before
//   | frames | header
//
// whose table says also where each frame is. The first 40 bytes are written last: as long as they are zero, there is no
// such generation, and what follows is of no use.

static constexpr char     ATLAS_MAGIC[]      = "ATLASMEM";
static constexpr char     ATLAS_MAGIC_MORE[] = "ATLASGEN";
static constexpr uint32_t ATLAS_VERSION      = 1;
static constexpr size_t   ATLAS_FIXED        = 16; // magic, version, size of the header
static constexpr size_t   ATLAS_RECORD       = 40; // what begins a later generation
static constexpr size_t   ATLAS_HEADER_MAX   = 4 << 20;
static constexpr size_t   ATLAS_FRAME_MAX    = 8 << 20; // raw

struct common_atlas_error : std::runtime_error {
    int status; // of HTTP: 400 corrupt, 404 there is none, 409 not for this model or in use, 500 the disk

    common_atlas_error(int status, const std::string & message) : std::runtime_error(message), status(status) {}
};

common_atlas_error atlas_corrupt (const std::string & what);
common_atlas_error atlas_io_error(const std::string & what, const std::string & path); // as errno has it

std::string atlas_hex64(uint64_t x);

uint64_t atlas_read_le (const uint8_t * p, int n);
void     atlas_write_le(uint8_t * p, uint64_t x, int n);

int atlas_seek(FILE * f, uint64_t at);

// how many threads may compress or decompress now; 0: only the caller's, which rests now and then
using atlas_workers = std::function<size_t()>;

struct atlas_file_deleter {
    void operator()(FILE * f) const { fclose(f); }
};
using atlas_file_ptr = std::unique_ptr<FILE, atlas_file_deleter>;

// a piece of the file
struct atlas_frame {
    std::string purpose;
    int32_t     layer = -1;
    size_t      stride = 1; // period of the byte shuffle
    size_t      raw    = 0;
    size_t      stored = 0;
    uint64_t    hash   = 0; // XXH64 of the stored bytes
    uint64_t    content = 0; // ... of the raw ones; 0: not known
    uint64_t    offset = 0; // in the file

    static atlas_frame tokens();
    static atlas_frame of(llama_atlas_part part, int32_t layer, size_t stride);

    bool same_kind(const atlas_frame & other) const {
        return purpose == other.purpose && layer == other.layer && stride == other.stride;
    }
};

// what a generation of a file has
struct atlas_index {
    common_json header; // without the table of the frames
    std::vector<atlas_frame> frames;
    uint64_t    end = 0; // of the generation, in the file
};

// begins with a cache line, and is not cleared. What malloc() gives begins 16 bytes behind a page, and where a row of the
// archive begins with one, memcpy() by `rep movsb` takes six times as long (glibc 2.36, AMD EPYC)
template <typename T>
struct atlas_allocator {
    using value_type = T;
    static constexpr std::align_val_t align { 64 };

    atlas_allocator() = default;
    template <typename U> atlas_allocator(const atlas_allocator<U> &) {}

    T * allocate(size_t n) { return static_cast<T *>(::operator new(n*sizeof(T), align)); }
    void deallocate(T * p, size_t) { ::operator delete(p, align); }

    template <typename U> void construct(U * p) { ::new (p) U; }
    template <typename U, typename... Args> void construct(U * p, Args &&... args) { ::new (p) U(std::forward<Args>(args)...); }

    bool operator==(const atlas_allocator &) const { return true; }
    bool operator!=(const atlas_allocator &) const { return false; }
};
using atlas_bytes = std::vector<uint8_t, atlas_allocator<uint8_t>>;

struct ZSTD_CCtx_s;
struct ZSTD_DCtx_s;

template <typename T>
using atlas_zstd = std::unique_ptr<T, size_t (*)(T *)>;

// a frame on its way: its bytes before and after, and room for those between. It is used again and again: new buffers
// for each frame, of pages that the system has to clear, cost a third of a save and of a load
struct atlas_work {
    atlas_frame frame;
    atlas_bytes data, tmp;
    atlas_zstd<ZSTD_CCtx_s> cctx = { nullptr, nullptr }; // once it was needed
    atlas_zstd<ZSTD_DCtx_s> dctx = { nullptr, nullptr };

    // the last one that has nothing to do, or a new one
    static atlas_work from(std::vector<atlas_work> & idle);
};

// bytes with the same place in their elements come together, which compresses better
void atlas_shuffle(atlas_bytes & data, atlas_bytes & tmp, size_t stride, bool back);

// do something with a frame, in another thread if there is one to spare
std::future<atlas_work> atlas_process(size_t n_workers, std::function<atlas_work(atlas_work)> f, atlas_work work);

// compresses frames in other threads, and writes them in their order in one more: who gives the bytes waits for neither,
// as long as both keep up; these throw common_atlas_error
class atlas_writer {
public:
    // a header of up to n_header bytes comes before the frames; raw_max: of all of them
    atlas_writer(const std::string & path, const common_json & header, size_t n_layer, size_t raw_max, int32_t level, atlas_workers n_workers);

    // another generation behind what the file has; without finish() the file stays as it was
    atlas_writer(const std::string & path, const atlas_index & old, const common_json & header, size_t n_layer, size_t raw_max, int32_t level, atlas_workers n_workers);

    ~atlas_writer();

    // piece: frames do not go beyond it
    void add(const atlas_frame & kind, int32_t piece, const void * src, size_t size);

    // ends the frames, writes the header with their table, and brings the file to the disk; returns it without the table
    // bytes_max: of the file, 0: any number
    common_json finish(common_json header, uint64_t bytes_max = 0);

    // llama_atlas_state_io; `error` says why it returned false
    static bool io(void * user, llama_atlas_part part, int32_t layer, int32_t piece, size_t stride, void * src, size_t size);

    std::string error;

private:
    std::string path;
    atlas_file_ptr f;
    int32_t level;
    atlas_workers n_workers;
    size_t n_frame;   // raw bytes of a frame at most
    size_t n_header;  // bytes of the header at most
    uint64_t n_front; // where the frames begin
    uint64_t n_old = 0; // where a new generation begins, 0: a new file
    uint64_t n_written = 0; // bytes of frames
    atlas_output out; // of frames
    std::vector<atlas_frame> frames;
    std::map<std::tuple<std::string, int32_t, size_t, size_t, uint64_t>, atlas_frame> known; // by kind, raw size and content

    atlas_frame cur;
    int32_t     cur_piece = 0;
    atlas_bytes data;

    using works = std::vector<atlas_work>;

    std::deque<std::future<atlas_work>> pending;
    works packed;              // that wait for the one that writes
    size_t n_packed = 0;       // bytes of them
    std::future<works> writing;
    works idle;

    void plan(const common_json & header, size_t n_layer, size_t raw_max);
    void truncate();
    atlas_work pack(atlas_work work) const;
    void put(uint64_t at, const void * src, size_t size);
    void sync();
    void drain(size_t n_left);
    void write();
    void take_back();
    works write_all(works batch);
    void flush();
};

// checks all that a file says before it is used; these throw common_atlas_error
class atlas_reader {
public:
    // back: so many generations before the newest one, which has to be whole for 0; one that is damaged counts
    explicit atlas_reader(const std::string & path, atlas_workers n_workers = [] { return 1; }, size_t back = 0);

    ~atlas_reader();

    // the whole file will be taken
    void read_ahead();

    // how many generations can be asked for
    static size_t n_generations(const std::string & path);

    uint64_t size; // of the file

    const common_json & header() const { return index.header; }
    const atlas_index & table()  const { return index; }

    size_t n_frames() const { return index.frames.size(); }
    size_t raw_size(const std::string & purpose, int32_t layer) const; // of all frames of a kind

    // the next bytes of a kind; several threads may take, each of another kind
    void take(const std::string & purpose, int32_t layer, void * dst, size_t size);

    // have the frames of a kind at hand: all, or the first ones with so many bytes
    void prefetch(const std::string & purpose, int32_t layer, size_t raw_max);

    // whether all frames were taken
    bool at_end() const { return n_done == index.frames.size(); }

    // llama_atlas_state_io; error() says why it returned false
    static bool io(void * user, llama_atlas_part part, int32_t layer, int32_t piece, size_t stride, void * dst, size_t size);

    std::string error() const;

    // a number of the header, min..max
    static int64_t number(const common_json & x, int64_t max = INT64_MAX, int64_t min = 0);

private:
    atlas_file_ptr f;
    atlas_workers n_workers;
    atlas_index index;

    // the frames of a kind, one after the other
    struct cursor {
        std::vector<size_t> frames;
        size_t next = 0; // of them
        std::deque<std::future<atlas_work>> ready;
        atlas_work now; // what is taken: its `data`
        size_t used = 0;
    };
    std::map<std::pair<std::string, int32_t>, cursor> cursors; // by purpose and layer
    std::atomic<size_t> n_done = 0; // frames

    mutable std::mutex mutex; // of the file, the idle buffers and what went wrong
    uint64_t at = UINT64_MAX; // where the file is read
    std::vector<atlas_work> idle;
    std::string what;

    std::atomic<bool> closing = false;
    std::future<void> ahead; // ends before the file is closed

    static atlas_work unpack(atlas_work work);
    cursor & find(const std::string & purpose, int32_t layer);
    atlas_work fetch(cursor & c);
};
