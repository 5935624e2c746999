// Fibers: threads of control that give way to one another by a call, on one thread of the host.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <functional>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FIBER_ASAN 1
#else
#define FIBER_ASAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

class Stack {
 public:
  static constexpr size_t kBytes = 256 << 10;
  static constexpr size_t kGuard = 4 << 10;

  Stack() {
    memory_ =
        mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
    mprotect(memory_, kGuard, PROT_NONE);  // an overflow faults instead of reaching a neighbour
  }
  ~Stack() { munmap(memory_, kBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return static_cast<char*>(memory_) + kGuard; }
  size_t size() const { return kBytes - kGuard; }

 private:
  void* memory_;
};

#if defined(__x86_64__)
// ucontext asks the kernel for the signal mask at each switch, which costs more than the threads' own work;
// so here the registers that a call preserves are saved by hand.
extern "C" void emulator_switch_stack(void** save, void* load);
asm(R"(
.text
.weak emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
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
.size emulator_switch_stack, .-emulator_switch_stack
)");
#endif

class Fiber {
 public:
  void start(Stack& stack, void (*entry)()) {
    stack_ = &stack;
    entry_ = entry;
#if FIBER_ASAN
    __asan_unpoison_memory_region(stack.bottom(), stack.size());
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack.bottom() + stack.size());
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&Fiber::trampoline);
    top -= 6;  // the registers that the first switch loads
    for (int i = 0; i < 6; ++i) top[i] = nullptr;
    at_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack.bottom();
    context_.uc_stack.ss_size = stack.size();
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::trampoline, 0);
#endif
  }

  // Runs `other` from here; returns when somebody switches back.
  void switch_to(Fiber& other) {
    begin_switch(other, false);
    end_switch();
  }

  // Runs `other`, never to return.
  [[noreturn]] void finish(Fiber& other) {
    begin_switch(other, true);
    __builtin_unreachable();
  }

 private:
  static Fiber*& current() {
    static Fiber* fiber = nullptr;
    return fiber;
  }

  void begin_switch(Fiber& other, [[maybe_unused]] bool last) {
    other.previous_ = this;
    current() = &other;
#if FIBER_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, other.asan_bottom(), other.asan_size());
#endif
#if defined(__x86_64__)
    emulator_switch_stack(&at_, other.at_);
#else
    swapcontext(&context_, &other.context_);
#endif
  }

  void end_switch() {
#if FIBER_ASAN
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    if (previous_->stack_ == nullptr) {  // the host's own stack: only now do we learn where it lies
      previous_->host_bottom_ = bottom;
      previous_->host_size_ = size;
    }
#endif
  }

  static void trampoline() {
    Fiber* self = current();
    self->end_switch();
    self->entry_();
  }

#if FIBER_ASAN
  const void* asan_bottom() const { return stack_ == nullptr ? host_bottom_ : stack_->bottom(); }
  size_t asan_size() const { return stack_ == nullptr ? host_size_ : stack_->size(); }
  void* fake_stack_ = nullptr;
  const void* host_bottom_ = nullptr;
  size_t host_size_ = 0;
#endif

#if defined(__x86_64__)
  void* at_ = nullptr;
#else
  ucontext_t context_;
#endif
  Stack* stack_ = nullptr;
  void (*entry_)() = nullptr;
  Fiber* previous_ = nullptr;
};

}  // namespace emulator
