#include "operator/threads.h"

#include <algorithm>

#include "operator/fetch_window.h"
#include "operator/waiting.h"

namespace {

constexpr uint64_t kRound = uint64_t(1) << 32, kOpen = uint64_t(1) << 31, kInside = kOpen - 1;

// A thread fetches as much of what comes next.
constexpr int64_t kFetchBytes = 512 << 10, kWindowLines = kWindowBytes / kLineBytes;

// In ns. A thread waits awake for the next round, which comes after microseconds within a step and after a fraction of
// a millisecond between two; the caller for the others' last items. Measured with `python -m benchmarks.contention`.
constexpr int64_t kMicrosecond = 1000, kMillisecond = 1000 * kMicrosecond;
constexpr int64_t kAwake = 2 * kMillisecond, kCallerAwake = 50 * kMicrosecond;

// A thread rests if another program has had its processor while the caller waited for it, or that of the caller. It
// rests twice as long each time; a loss that is less than a part of the time since the last one is none.
constexpr int64_t kLate = 100 * kMicrosecond, kLoss = kMillisecond, kPart = 4;
constexpr int64_t kLeastRest = kMillisecond / 4, kMostRest = 256 * kMillisecond;

// A thread changes the processor no more often than so.
constexpr int64_t kMove = kMillisecond;

using waiting::Losses;
using waiting::Now;
using waiting::Patience;

thread_local Losses caller_losses;

}  // namespace

Threads::Threads(int count) : count_(count), shares_(new Share[size_t(count)]) {
  for (int t = 1; t < count; ++t) threads_.emplace_back([this, t] { Serve(t); });
}

Threads::~Threads() {
  ends_ = true;
  for (int t = 1; t < count_; ++t) {
    shares_[t].sleeps = 0;
    waiting::Wake(shares_[t].sleeps);
  }
  for (std::thread& thread : threads_) thread.join();
}

void Threads::For(int64_t count, int64_t least, int64_t most, Task task, void* data,
                  const std::shared_ptr<Order>& order, const Weight& weight, const std::vector<Ahead>* ahead) {
  const bool is_short = count_ == 1 || count <= least;
  if (is_short || has_caller_.exchange(true, std::memory_order_acquire)) {
    for (int64_t i = 0; i < count; i += most) task(data, i, std::min(count, i + most));
    return;
  }
  if (order != nullptr) NoteOrder(order, weight);
  int64_t done = 0;  // while the others rest: a round may take longer than their rest
  for (; done < count && AllRest(); done = std::min(count, done + most)) task(data, done, std::min(count, done + most));
  if (done == count) {
    has_caller_.store(false, std::memory_order_release);
    return;
  }
  const int64_t began = Now(), left = count - done;
  caller_losses.Begin(began);
  task_ = task, data_ = data, least_ = least, most_ = most;
  for (int t = 0; t < count_; ++t)
    shares_[t].items.store(uint64_t(done + left * t / count_) << 32 | uint64_t(done + left * (t + 1) / count_),
                           std::memory_order_relaxed);
  caller_processor_.store(waiting::Processor(), std::memory_order_relaxed);
  // Both in the one order of all such: a thread that goes to sleep either sees this round, or is seen here.
  round_.store((round_.load(std::memory_order_relaxed) / kRound + 1) * kRound | kOpen);
  if (sleepers_.load() > 0) WakeSleepers();
  if (ahead != nullptr) {
    Announce(*ahead);
  } else if (order != nullptr) {
    AnnounceNext(*order);
  }
  Work(0);
  round_.fetch_and(~kOpen, std::memory_order_relaxed);
  AwaitWorkers();
  NoteLoss(began);
  has_caller_.store(false, std::memory_order_release);
}

bool Threads::RestsAt(const Share& share, int64_t now) {
  return share.rests.load(std::memory_order_relaxed) != 0 && share.rests_until.load(std::memory_order_relaxed) > now;
}

// Whether all others sleep and have time to.
bool Threads::AllRest() const {
  if (sleepers_.load(std::memory_order_relaxed) < count_ - 1) return false;
  const int64_t now = Now();
  for (int t = 1; t < count_; ++t)
    if (!RestsAt(shares_[t], now)) return false;
  return true;
}

// Wakes who sleeps and does not rest.
void Threads::WakeSleepers() {
  const int64_t now = Now();
  for (int t = 1; t < count_; ++t) {
    Share& share = shares_[t];
    if (share.sleeps.load() == 0 || RestsAt(share, now)) continue;
    share.rests.store(0, std::memory_order_relaxed);
    if (share.sleeps.exchange(0) == 0) continue;
    sleepers_.fetch_sub(1);
    waiting::Wake(share.sleeps);
  }
}

// Waits until all have left the round.
void Threads::AwaitWorkers() {
  const auto are_inside = [&](std::memory_order order) { return (round_.load(order) & kInside) != 0; };
  Patience patience(kCallerAwake);
  while (are_inside(std::memory_order_acquire)) {
    if (FetchLines(shares_[0], fetched_) || patience.Wait()) continue;
    const int64_t sleeps_from = Now();
    caller_waits_since_.store(patience.began(), std::memory_order_relaxed);
    for (;;) {
      caller_sleeps_.store(1);
      if (!are_inside(std::memory_order_seq_cst)) break;
      waiting::SleepWhileSet(caller_sleeps_);
    }
    caller_sleeps_.store(0, std::memory_order_relaxed);
    caller_losses.Slept(Now() - sleeps_from);
  }
}

// Has the others rest if the caller has lost its processor in a round: where all processors have other work, each
// thread takes from the caller's part of them.
void Threads::NoteLoss(int64_t began) {
  const int64_t now = Now();
  if (now - began < kLoss) return;
  const int64_t lost = std::min(now - began, caller_losses.Until(now));
  for (int t = 1; t < count_ && lost > kLoss; ++t) Rest(shares_[t], lost);
}

void Threads::NoteOrder(const std::shared_ptr<Order>& order, const Weight& weight) {
  order->weight = weight;
  if (const std::shared_ptr<Order> last = last_.lock()) last->next = order;
  last_ = order;
}

// Tells all threads what comes next, if that is known.
void Threads::AnnounceNext(const Order& order) {
  const std::shared_ptr<Order> next = order.next.lock();
  if (next == nullptr) return;
  for (int t = 0; t < count_; ++t)
    AnnounceTo(shares_[t], {next->weight.ShareBegin(t, count_), next->weight.ShareBegin(t + 1, count_)});
}

void Threads::AnnounceTo(Share& share, const Ahead& ahead) {
  const int64_t bytes = std::min<int64_t>(ahead.end - ahead.begin, kFetchBytes);
  share.next_end.store(ahead.begin + bytes, std::memory_order_relaxed);
  share.next.store(ahead.begin, std::memory_order_release);
}

void Threads::Announce(const std::vector<Ahead>& ahead) {
  for (int t = 0; t < count_; ++t) AnnounceTo(shares_[t], ahead[size_t(t)]);
}

// Fetches a line of each page of a window; false when all there is to fetch has been.
bool Threads::FetchLines(const Share& share, Fetched& fetched) {
  const uint8_t* const next = share.next.load(std::memory_order_acquire);
  if (next != fetched.from) fetched = {next, share.next_end.load(std::memory_order_relaxed), 0};
  const int64_t window = fetched.lines / kWindowLines * kWindowBytes;
  const uint8_t* line = fetched.from + window + fetched.lines % kWindowLines / kWindowPages * kLineBytes;
  // Two callers at once may leave the beginning of one's memory and the end of the other's.
  if (line >= fetched.end || fetched.lines * kLineBytes >= kFetchBytes) return false;
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

void Threads::Serve(int thread) {
  Worker self = {shares_[thread]};
  while (Join(self)) {
    Work(thread);
    Leave(self);
  }
}

// Waits for a round and enters it; false at the end of the object.
bool Threads::Join(Worker& self) {
  while (!ends_.load(std::memory_order_relaxed)) {
    Patience patience(kAwake);
    while (self.share.rests.load(std::memory_order_relaxed) == 0) {
      if (Comes(self) && IsOnCallersProcessor()) {
        LeaveCaller(self);
      } else if (Enter(self)) {
        return true;
      } else if (ends_.load(std::memory_order_relaxed)) {
        return false;
      } else if (!FetchLines(self.share, self.fetched) && !patience.Wait()) {
        break;
      }
    }
    Sleep(self);
  }
  return false;
}

// Whether a round is open in which the thread was not yet.
bool Threads::Comes(const Worker& self) const {
  const uint64_t now = round_.load();
  return now / kRound != self.round && (now & kOpen) != 0;
}

bool Threads::IsOnCallersProcessor() const {
  const int processor = waiting::Processor();
  return processor >= 0 && processor == caller_processor_.load(std::memory_order_relaxed);
}

bool Threads::Enter(Worker& self) {
  uint64_t now = round_.load(std::memory_order_acquire);
  while (now / kRound != self.round && (now & kOpen) != 0)
    if (round_.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) {
      self.round = now / kRound;
      self.losses.Begin(Now());
      return true;
    }
  return false;
}

void Threads::Leave(Worker& self) {
  if (caller_sleeps_.load(std::memory_order_acquire) != 0) {
    const int64_t now = Now(), late = now - caller_waits_since_.load(std::memory_order_relaxed);
    const int64_t lost = late > kLate ? std::min(late, self.losses.Until(now)) : 0;
    if (lost > kLate) Rest(self.share, lost);
  }
  const bool is_last = (round_.fetch_sub(1) & (kOpen | kInside)) == 1;
  if (is_last && caller_sleeps_.exchange(0) != 0) waiting::Wake(caller_sleeps_);
}

// Leaves the processor of the caller, as only one of the two can work there; rests where that is of no use.
void Threads::LeaveCaller(Worker& self) {
  const int64_t now = Now();
  if (now - self.moved < kMove || !waiting::LeaveProcessor(waiting::Processor())) Rest(self.share, now);
  self.moved = now;
}

// Sleeps until the caller wakes it.
void Threads::Sleep(Worker& self) {
  Share& share = self.share;
  sleepers_.fetch_add(1);
  share.sleeps.store(1);
  const bool rests = share.rests.load(std::memory_order_relaxed) != 0;
  if (((Comes(self) && !rests) || ends_.load()) && share.sleeps.exchange(0) != 0) sleepers_.fetch_sub(1);
  while (share.sleeps.load() != 0) waiting::SleepWhileSet(share.sleeps);
  self.losses = {};
}

// Lets a thread rest because of a loss, unless that is a rare one.
void Threads::Rest(Share& share, int64_t lost) {
  const int64_t now = Now(), last = share.rest.load(std::memory_order_relaxed);
  const bool is_rare = kPart * lost < now - share.rests_until.load(std::memory_order_relaxed);
  const int64_t rest = is_rare ? 0 : std::min(kMostRest, std::max(kLeastRest, 2 * last));
  share.rest.store(is_rare ? last / 2 : rest, std::memory_order_relaxed);
  share.rests_until.store(now + rest, std::memory_order_relaxed);
  share.rests.store(is_rare ? 0 : 1, std::memory_order_relaxed);
}

std::shared_ptr<Threads> SessionThreads::Get() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<Threads> threads = threads_.lock();
  if (threads == nullptr) threads_ = threads = std::make_shared<Threads>(count_);
  return threads;
}
