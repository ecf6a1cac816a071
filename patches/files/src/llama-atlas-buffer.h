#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

// a growing array in host memory that is enlarged without a copy where the system can do that (mremap), in large pages if
// it has them: to fill an archive takes most of its time in page faults else
// throws std::bad_alloc; the content stays as it was then
class llama_atlas_buffer {
public:
    llama_atlas_buffer() = default;
    llama_atlas_buffer(const llama_atlas_buffer & other);
    llama_atlas_buffer(llama_atlas_buffer && other) noexcept : data_(other.data_), size_(other.size_) {
        other.data_ = nullptr;
        other.size_ = 0;
    }
    llama_atlas_buffer & operator=(llama_atlas_buffer other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~llama_atlas_buffer();

    void reserve(size_t size);

    uint8_t * data() const { return data_; }
    size_t    size() const { return size_; }

private:
    uint8_t * data_ = nullptr;
    size_t    size_ = 0;
};
