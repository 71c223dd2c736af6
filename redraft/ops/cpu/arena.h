// Memory of jobs: it grows between jobs, never shrinks, and is aligned to lines.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace redraft {

class Buffer {
public:
    ~Buffer() { std::free(data_); }
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    template <class T = uint8_t>
    T* of(int64_t count) {
        const int64_t bytes = (count * int64_t(sizeof(T)) + 4095) / 4096 * 4096;
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            data_ = static_cast<uint8_t*>(std::aligned_alloc(4096, bytes));
            if (!data_) throw std::bad_alloc();
            size_ = bytes;
        }
        return reinterpret_cast<T*>(data_);
    }

private:
    uint8_t* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace redraft
