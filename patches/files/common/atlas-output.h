#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>

static constexpr size_t ATLAS_WRITE_STEP = 2 << 20; // bytes that are written at a time

// puts bytes behind each other into a file, past the page cache if it can: a session does not push the weights of the models
// out of it, and the system has no pages to find, which takes a virtual machine longer than the disk
// false: errno says why
class atlas_output {
public:
    // the next bytes come to `at`, and what is before it in its block is to be written later
    bool begin(FILE * f, uint64_t at, bool direct);
    bool write(const void * src, size_t size);
    bool end(); // all was given to the disk, and the file is as any other

private:
    FILE * f = nullptr;
    uint64_t at = 0;      // where `block` comes to, or the next bytes
    uint64_t n_begun = 0; // up to there the disk was told to begin
    std::unique_ptr<uint8_t, void (*)(void *)> block = { nullptr, free }; // none: through the page cache
    size_t n_block = 0;   // bytes of it

    bool leave_direct();
};
