#include "atlas-output.h"

#include "atlas-file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#ifndef _WIN32
#include <fcntl.h>
#include <unistd.h>
#endif

static constexpr size_t ATLAS_BLOCK     = 4096; // of the disk, or a multiple of it
static constexpr size_t ATLAS_SYNC_STEP = 8 << 20;

bool atlas_output::begin(FILE * file, uint64_t begin, bool direct) {
    f  = file;
    at = n_begun = begin;
    if (atlas_seek(f, at) != 0) {
        return false;
    }
#ifdef O_DIRECT
    void * p = nullptr;
    const int flags = fcntl(fileno(f), F_GETFL);
    if (direct && flags >= 0 && posix_memalign(&p, ATLAS_BLOCK, ATLAS_WRITE_STEP) == 0) {
        block.reset((uint8_t *) p);
        if (fcntl(fileno(f), F_SETFL, flags | O_DIRECT) != 0) {
            block.reset(); // the file system cannot do it
        }
    }
#endif
    if (block) {
        n_block = at % ATLAS_BLOCK;
        at     -= n_block;
        memset(block.get(), 0, n_block);
    }
    return true;
}

bool atlas_output::write(const void * src, size_t size) {
#ifdef O_DIRECT
    while (block && size > 0) {
        const size_t n = std::min(size, ATLAS_WRITE_STEP - n_block);
        memcpy(block.get() + n_block, src, n);
        src      = (const uint8_t *) src + n;
        size    -= n;
        n_block += n;
        if (n_block < ATLAS_WRITE_STEP) {
            return true;
        }
        const ssize_t n_done = pwrite(fileno(f), block.get(), n_block, at);
        if (n_done == (ssize_t) n_block) {
            at     += n_block;
            n_block = 0;
        } else if (n_done >= 0 || errno == EINVAL) { // not here, or not so much at a time
            if (!leave_direct()) {
                return false;
            }
        } else {
            return false;
        }
    }
#endif
    if (fwrite(src, 1, size, f) != size) {
        return false;
    }
    at += size;
#ifdef SYNC_FILE_RANGE_WRITE
    // let the disk begin: else it idles until the end, and then has everything to write at once
    if (at - n_begun >= ATLAS_SYNC_STEP && fflush(f) == 0) {
        sync_file_range(fileno(f), n_begun, at - n_begun, SYNC_FILE_RANGE_WRITE);
        n_begun = at;
    }
#endif
    return true;
}

// what waits, and all that comes, go through the page cache
bool atlas_output::leave_direct() {
#ifdef O_DIRECT
    const int flags = fcntl(fileno(f), F_GETFL);
    if (flags < 0 || fcntl(fileno(f), F_SETFL, flags & ~O_DIRECT) != 0) {
        return false;
    }
#endif
    if (atlas_seek(f, at) != 0 || fwrite(block.get(), 1, n_block, f) != n_block) {
        return false;
    }
    n_begun = at;
    at += n_block;
    block.reset();
    return true;
}

bool atlas_output::end() {
    return !block || leave_direct();
}
