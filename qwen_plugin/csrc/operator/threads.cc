#include "operator/threads.h"

#include <algorithm>
#include <chrono>

#include "operator/fetch_window.h"

namespace {

constexpr uint64_t kRound = uint64_t(1) << 32, kOpen = uint64_t(1) << 31, kInside = kOpen - 1;

// A thread fetches as much of what comes next.
constexpr int64_t kFetchBytes = 512 << 10, kWindowLines = kWindowBytes / kLineBytes;

// Who waits spins, then lets others have the core, then sleeps. A token of the demo engine (int4, 2 threads) takes 7.1
// ms so, 7.3 with 20 us of spinning, 8.1 with sleep after 500 us, 8.3 after 20; beside two busy processes 15 ms, and 19
// with 2000 us of spinning.
constexpr std::chrono::microseconds kSpin(200), kYield(2000);

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Patience {
 public:
  // Waits for a moment; false after many.
  bool Wait() {
    for (int i = 0; i < 4; ++i) Pause();
    if (++moments_ % 8 != 0) return true;
    const auto now = std::chrono::steady_clock::now();
    if (moments_ == 8) began_ = now;
    if (now - began_ > kSpin) std::this_thread::yield();
    return now - began_ < kYield;
  }

 private:
  int64_t moments_ = 0;
  std::chrono::steady_clock::time_point began_;
};

}  // namespace

Threads::Threads(int count) : count_(count), shares_(new Share[size_t(count)]) {
  for (int t = 1; t < count; ++t) threads_.emplace_back([this, t] { Serve(t); });
}

Threads::~Threads() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ends_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Threads::For(int64_t count, int64_t least, int64_t most, Task task, void* data,
                  const std::shared_ptr<Order>& order, const Weight& weight) {
  const bool is_short = count_ == 1 || count <= least;
  if (is_short || has_caller_.exchange(true, std::memory_order_acquire)) {
    for (int64_t i = 0; i < count; i += most) task(data, i, std::min(count, i + most));
    return;
  }
  task_ = task, data_ = data, least_ = least, most_ = most;
  for (int t = 0; t < count_; ++t)
    shares_[t].items.store(uint64_t(count * t / count_) << 32 | uint64_t(count * (t + 1) / count_),
                           std::memory_order_relaxed);
  // Both in the one order of all such: a thread that goes to sleep either sees this round, or is seen here.
  round_.store((round_.load(std::memory_order_relaxed) / kRound + 1) * kRound | kOpen);
  if (sleepers_.load() > 0) {
    mutex_.lock();  // who has counted itself a sleeper holds this until it is asleep
    mutex_.unlock();
    wake_.notify_all();
  }
  if (order != nullptr) AnnounceNext(order, weight);
  Work(0);
  round_.fetch_and(~kOpen, std::memory_order_relaxed);
  Patience patience;
  while ((round_.load(std::memory_order_acquire) & kInside) != 0)
    if (!FetchLines(shares_[0], fetched_)) patience.Wait();
  has_caller_.store(false, std::memory_order_release);
}

// Notes the order, and tells all threads what comes next, if that is known.
void Threads::AnnounceNext(const std::shared_ptr<Order>& order, const Weight& weight) {
  order->weight = weight;
  if (const std::shared_ptr<Order> last = last_.lock()) last->next = order;
  last_ = order;
  const std::shared_ptr<Order> next = order->next.lock();
  if (next == nullptr) return;
  for (int t = 0; t < count_; ++t) {
    const uint8_t *begin = next->weight.ShareBegin(t, count_), *end = next->weight.ShareBegin(t + 1, count_);
    shares_[t].next_end.store(std::min(end, begin + kFetchBytes), std::memory_order_relaxed);
    shares_[t].next.store(begin, std::memory_order_release);
  }
}

// Fetches a line of each page of a window; false when all there is to fetch has been.
bool Threads::FetchLines(const Share& share, Fetched& fetched) {
  const uint8_t* const next = share.next.load(std::memory_order_acquire);
  if (next != fetched.from) fetched = {next, share.next_end.load(std::memory_order_relaxed), 0};
  const int64_t window = fetched.lines / kWindowLines * kWindowBytes;
  const uint8_t* line = fetched.from + window + fetched.lines % kWindowLines / kWindowPages * kLineBytes;
  if (line >= fetched.end) return false;
  for (int64_t i = 0; i < kWindowPages; ++i, line += kPageBytes) __builtin_prefetch(line, 0, 2);
  fetched.lines += kWindowPages;
  return true;
}

bool Threads::Take(Share& share, bool own, int64_t* first, int64_t* last) const {
  uint64_t items = share.items.load(std::memory_order_relaxed);
  for (;;) {
    const int64_t begin = int64_t(items >> 32), end = int64_t(uint32_t(items));
    if (begin >= end) return false;
    const int64_t taken = std::min(end - begin, std::min(most_, std::max(least_, (end - begin + 1) / 2)));
    *first = own ? begin : end - taken, *last = *first + taken;
    const uint64_t left = own ? uint64_t(*last) << 32 | uint64_t(end) : uint64_t(begin) << 32 | uint64_t(*first);
    if (share.items.compare_exchange_weak(items, left, std::memory_order_relaxed)) return true;
  }
}

void Threads::Work(int thread) {
  int64_t first, last;
  for (int i = 0; i < count_; ++i)
    while (Take(shares_[(thread + i) % count_], i == 0, &first, &last)) task_(data_, first, last);
}

// Waits for a round after `round` and enters it; false at the end of the object.
bool Threads::Join(const Share& share, Fetched& fetched, uint64_t& round) {
  Patience patience;
  for (;;) {
    uint64_t now = round_.load(std::memory_order_acquire);
    while (now / kRound != round && (now & kOpen) != 0)
      if (round_.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) {
        round = now / kRound;
        return true;
      }
    if (FetchLines(share, fetched) || patience.Wait()) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return ends_ || ((now = round_.load()) / kRound != round && (now & kOpen) != 0); });
    sleepers_.fetch_sub(1);
    if (ends_) return false;
    patience = Patience();
  }
}

void Threads::Serve(int thread) {
  Fetched fetched;
  uint64_t round = 0;
  while (Join(shares_[thread], fetched, round)) {
    Work(thread);
    round_.fetch_sub(1, std::memory_order_release);
  }
}

std::shared_ptr<Threads> SessionThreads::Get() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<Threads> threads = threads_.lock();
  if (threads == nullptr) threads_ = threads = std::make_shared<Threads>(count_);
  return threads;
}
