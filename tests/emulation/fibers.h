// One stack for each CUDA thread, and the switch between them. AddressSanitizer is told of each
// switch, so that it knows which stack is in use.
#ifndef EMULATION_FIBERS_H
#define EMULATION_FIBERS_H

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

constexpr size_t kStackBytes = size_t(256) << 10;

#if defined(__x86_64__)

// Saves the registers that a callee must keep, and goes on with another stack: a few nanoseconds,
// where swapcontext makes two system calls.
extern "C" void emulation_switch(void** save, void* to);
asm(R"(.text
.weak emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

class Context {
 public:
  void begin(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes);  // the stack is aligned to 16
    *--top = nullptr;  // the return address of `entry`, which never returns
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
  }
  static void change(Context& from, Context& to) { emulation_switch(&from.pointer_, to.pointer_); }

 private:
  void* pointer_ = nullptr;
};

#else

class Context {
 public:
  void begin(char* stack, void (*entry)()) {
    getcontext(&state_);
    state_.uc_stack.ss_sp = stack;
    state_.uc_stack.ss_size = kStackBytes;
    state_.uc_link = nullptr;
    makecontext(&state_, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.state_, &to.state_); }

 private:
  ucontext_t state_;
};

#endif

// A stack that runs by turns with the one that it was resumed from.
class Fiber {
 public:
  void begin(void (*entry)()) {
    if (!stack_) stack_.reset(static_cast<char*>(std::aligned_alloc(64, kStackBytes)));
#if defined(__SANITIZE_ADDRESS__)
    // The frame of an earlier `entry`, which has not returned.
    constexpr size_t kFrame = 4096;
    __asan_unpoison_memory_region(stack_.get() + kStackBytes - kFrame, kFrame);
    fake_ = nullptr;
#endif
    context_.begin(stack_.get(), entry);
  }

  // From outside: runs the fiber until it pauses or ends.
  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_.get(), kStackBytes);
#endif
    Context::change(outside_, context_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // On the fiber: first of all.
  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, &outside_stack_, &outside_bytes_);
#endif
  }

  // On the fiber: back to where it was resumed. `last`: it will not be resumed.
  void pause(bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_, outside_stack_, outside_bytes_);
#else
    (void)last;
#endif
    Context::change(context_, outside_);
    arrived();
  }

 private:
  struct Free {
    void operator()(char* stack) const { std::free(stack); }
  };
  std::unique_ptr<char, Free> stack_;
  Context context_, outside_;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_ = nullptr;
  const void* outside_stack_ = nullptr;
  size_t outside_bytes_ = 0;
#endif
};

}  // namespace emulation
#endif
