#include "llama-atlas-buffer.h"

#include "ggml.h"

#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

llama_atlas_buffer::llama_atlas_buffer(const llama_atlas_buffer & other) {
    reserve(other.size_);
    if (size_ > 0) {
        memcpy(data_, other.data_, size_);
    }
}

#ifdef __linux__

static constexpr size_t ATLAS_PAGE_LARGE = 2 << 20;
static constexpr size_t ATLAS_MAPPED_MIN = 256 << 10; // smaller ones come from malloc()

static size_t mapped_size(size_t size) {
    return GGML_PAD(size, (size_t) sysconf(_SC_PAGESIZE));
}

static bool is_mapped(size_t size) {
    return size >= ATLAS_MAPPED_MIN;
}

// new pages that begin where a large one can
static uint8_t * map_pages(size_t size) {
    size = mapped_size(size);
    const size_t room = size + ATLAS_PAGE_LARGE;
    void * p = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        throw std::bad_alloc();
    }
    uint8_t * begin = (uint8_t *) p;
    uint8_t * res   = (uint8_t *) GGML_PAD((uintptr_t) begin, (uintptr_t) ATLAS_PAGE_LARGE);
    if (res > begin) {
        munmap(begin, res - begin);
    }
    if (res + size < begin + room) {
        munmap(res + size, begin + room - (res + size));
    }
    return res;
}

static void free_buffer(uint8_t * data, size_t size) {
    if (is_mapped(size)) {
        munmap(data, mapped_size(size));
    } else {
        free(data);
    }
}

void llama_atlas_buffer::reserve(size_t size) {
    if (size <= size_) {
        return;
    }
    uint8_t * p = nullptr;
    if (!is_mapped(size)) {
        p = (uint8_t *) realloc(data_, size);
        if (!p) {
            throw std::bad_alloc();
        }
    } else if (!is_mapped(size_)) {
        p = map_pages(size);
        if (size_ > 0) {
            memcpy(p, data_, size_);
        }
        free(data_);
    } else if (mremap(data_, mapped_size(size_), mapped_size(size), 0) != MAP_FAILED) {
        p = data_;
    } else {
        // its pages move, and stay where a large one can begin
        uint8_t * place = map_pages(size);
        p = (uint8_t *) mremap(data_, mapped_size(size_), mapped_size(size), MREMAP_MAYMOVE | MREMAP_FIXED, place);
        if (p == MAP_FAILED) {
            munmap(place, mapped_size(size));
            throw std::bad_alloc();
        }
    }
    if (is_mapped(size)) {
        madvise(p, mapped_size(size), MADV_HUGEPAGE); // a wish
    }
    data_ = p;
    size_ = size;
}

#else

static void free_buffer(uint8_t * data, size_t) {
    free(data);
}

void llama_atlas_buffer::reserve(size_t size) {
    if (size <= size_) {
        return;
    }
    void * p = realloc(data_, size);
    if (!p) {
        throw std::bad_alloc();
    }
    data_ = (uint8_t *) p;
    size_ = size;
}

#endif

llama_atlas_buffer::~llama_atlas_buffer() {
    free_buffer(data_, size_);
}
