// A block's shared memory: poisoned before each block, so that what is read before it is written is
// a NaN (or -1); each array with a guard behind it, or a red zone under AddressSanitizer.
#ifndef EMULATION_SHARED_MEMORY_H
#define EMULATION_SHARED_MEMORY_H

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace emulation {

constexpr int kPoison = 0xFF;
constexpr size_t kStaticShared = size_t(48) << 10;    // of a kernel, unless it asks for more
constexpr size_t kLargestShared = size_t(227) << 10;  // what sm_90 gives to one that asks

class SharedArray {
 public:
  SharedArray(const void* key, size_t bytes) : key_(key), bytes_(bytes) {
    // 128 bytes is the alignment that the hardware gives.
    void* begin = nullptr;
    if (posix_memalign(&begin, 128, bytes + kGuard)) std::abort();
    begin_.reset(static_cast<unsigned char*>(begin));
    poison();
  }
  void poison() {
    std::memset(begin_.get(), kPoison, bytes_);
    std::memset(begin_.get() + bytes_, kGuardByte, kGuard);
  }
  bool overrun() const {
    for (size_t i = 0; i < kGuard; ++i)
      if (begin_.get()[bytes_ + i] != kGuardByte) return true;
    return false;
  }
  const void* key() const { return key_; }
  size_t bytes() const { return bytes_; }
  void* begin() const { return begin_.get(); }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 256;
#endif
  static constexpr unsigned char kGuardByte = 0xA5;
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  const void* key_;
  size_t bytes_;
  std::unique_ptr<unsigned char, Free> begin_;
};

// The arrays that a launch has declared so far, the dynamic one first: of all its blocks.
class SharedMemory {
 public:
  void begin(size_t dynamic_bytes) {
    arrays_.clear();
    arrays_.emplace_back(nullptr, dynamic_bytes);
  }
  void* dynamic() const { return arrays_[0].begin(); }
  void poison() {
    for (SharedArray& array : arrays_) array.poison();
  }
  bool overrun() const {
    for (const SharedArray& array : arrays_)
      if (array.overrun()) return true;
    return false;
  }
  // The array of this declaration, which any thread of the block may reach first.
  void* at(const void* key, size_t bytes) {
    for (const SharedArray& array : arrays_)
      if (array.key() == key) return array.begin();
    return arrays_.emplace_back(key, bytes).begin();
  }
  size_t static_bytes() const {
    size_t sum = 0;
    for (const SharedArray& array : arrays_) sum += array.key() ? array.bytes() : 0;
    return sum;
  }

 private:
  std::vector<SharedArray> arrays_;
};

}  // namespace emulation
#endif
