// How a thread waits, and what it can know of the processors meanwhile.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace waiting {

// Nanoseconds of a clock that only goes forward.
inline int64_t Now() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// What a thread waits for comes after microseconds, mostly: it stays awake for so long.
class Patience {
 public:
  explicit Patience(int64_t ns) : ns_(ns) {}

  // Waits for a moment; false after many.
  bool Wait() {
    for (int i = 0; i < 4; ++i) Pause();
    if (++moments_ % 8 != 0) return true;
    if (moments_ == 8) began_ = Now();
    return Now() - began_ < ns_;
  }
  // When it began, in ns; of one that has ended.
  int64_t began() const { return began_; }

 private:
  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int64_t ns_;
  int64_t moments_ = 0, began_ = 0;
};

// Sleeps while `flag` is 1, or returns at once; may return for no reason. Who sets it to 0 calls Wake after that.
inline void SleepWhileSet(std::atomic<uint32_t>& flag) {
#if defined(__linux__)
  static_assert(sizeof flag == sizeof(uint32_t), "what the system compares is the number itself");
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&flag), FUTEX_WAIT_PRIVATE, 1u, nullptr, nullptr, 0);
#else
  if (flag.load() == 1) std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

inline void Wake(std::atomic<uint32_t>& flag) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&flag), FUTEX_WAKE_PRIVATE, 1u, nullptr, nullptr, 0);
#endif
}

// The processor that the calling thread is on; -1 where the system does not say.
inline int Processor() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves the calling thread to another processor that it may run on; false if there is none. The system would do so too,
// but only while the thread is at work.
inline bool LeaveProcessor(int processor) {
#if defined(__linux__)
  cpu_set_t all, others;
  if (sched_getaffinity(0, sizeof all, &all) != 0) return false;
  others = all;
  CPU_CLR(size_t(processor), &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return false;
  return sched_setaffinity(0, sizeof all, &all) == 0;
#else
  return false;
#endif
}

// What other programs have had of the calling thread's processor, while the thread had work.
class Losses {
 public:
  // The thread has work from `now` on; what it lost a while before is forgotten.
  void Begin(int64_t now) {
    if (now - began_ < kWhile) return;
    began_ = now, worked_ = ThreadTime();
  }
  // The thread slept for so long.
  void Slept(int64_t ns) { worked_ -= ns; }
  // What it has lost, in ns.
  int64_t Until(int64_t now) const { return now - began_ - (ThreadTime() - worked_); }

 private:
  // In ns. Reading the clock of a thread takes half a microsecond.
  static constexpr int64_t kWhile = 1000 * 1000;

  // The time that the calling thread has had a processor.
  static int64_t ThreadTime() {
    timespec time = {};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
  }

  int64_t began_ = 0, worked_ = 0;
};

}  // namespace waiting
