// Divides work among qwen_plugin/csrc/operator/threads.h's threads in every way it may be asked to: test_threads.py
// compiles and runs it, and tests/sanitize.py with ThreadSanitizer watching. Ends with 1 if an item was not done
// exactly once, or a thread did not come.
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>

#include "operator/threads.h"

namespace {

// Items that count how often they are done, in memory that is not atomic: the end of For is what makes it visible.
struct Items {
  std::vector<int> done;
  int64_t most;
  std::atomic<bool> too_many{false};

  static void Do(void* data, int64_t first, int64_t last) {
    Items& self = *static_cast<Items*>(data);
    if (last - first > self.most) self.too_many = true;
    for (int64_t i = first; i < last; ++i) ++self.done[size_t(i)];
  }
};

bool IsRight(Threads& threads, int64_t count, int64_t least, int64_t most, const std::shared_ptr<Order>& order,
             const Weight& weight, const std::vector<Ahead>* ahead = nullptr) {
  Items items;
  items.done.assign(size_t(count), 0);
  items.most = most;
  threads.For(count, least, most, Items::Do, &items, order, weight, ahead);
  for (const int times : items.done)
    if (times != 1) return false;
  return !items.too_many;
}

// Items that note which threads do them, and take a millisecond so that there is time to come.
struct Meeting {
  std::mutex mutex;
  std::set<std::thread::id> came;

  static void Come(void* data, int64_t, int64_t) {
    Meeting& self = *static_cast<Meeting*>(data);
    {
      const std::lock_guard<std::mutex> lock(self.mutex);
      self.came.insert(std::this_thread::get_id());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
};

// Whether all threads come, whether they wait, sleep or rest: not each time, as one that rests is left out.
bool Meet(int count) {
  Threads threads(count);
  for (int i = 0; i < 12; ++i) {
    const auto latest = std::chrono::steady_clock::now() + std::chrono::minutes(1);
    for (Meeting meeting; int(meeting.came.size()) < count;) {
      threads.For(count, 1, 1, Meeting::Come, &meeting);
      if (std::chrono::steady_clock::now() > latest) return false;
    }
    if (i % 3 == 2)
      std::this_thread::sleep_for(std::chrono::microseconds(1900 + 50 * i));  // about when they fall asleep
  }
  return true;
}

// Two callers at once, each with two weights in turn, or with memory that it announces itself; now and then a pause in
// which all threads fall asleep.
bool CallAtOnce(int count) {
  const auto threads = std::make_shared<Threads>(count);
  std::atomic<bool> right{true};
  const auto call = [&](unsigned seed) {
    const std::vector<uint8_t> memory(1 << 18);
    const std::vector<Ahead> ahead(size_t(count), {memory.data(), memory.data() + memory.size()});
    const std::shared_ptr<Order> orders[2] = {std::make_shared<Order>(), std::make_shared<Order>()};
    for (int i = 0; i < 200; ++i) {
      const auto draw = [&](int64_t least, int64_t most) {
        seed = seed * 1664525 + 1013904223;
        return least + int64_t(seed >> 8) % (most - least + 1);
      };
      const int64_t items = draw(0, 300), most = draw(1, 40), least = draw(1, most);
      const Weight weight = {memory.data(), items, 64 * draw(1, 12)};
      const std::shared_ptr<Order> order = i % 3 == 0 ? nullptr : orders[i % 2];
      if (i % 5 == 0) threads->Announce(ahead);
      if (!IsRight(*threads, items, least, most, order, weight, i % 4 == 0 ? &ahead : nullptr)) right = false;
      if (i % 50 == 49) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  };
  std::thread other(call, 1);
  call(2);
  other.join();
  return right;
}

// Threads that a session's kernels hold end with the last of them, and begin again with the next.
bool EndAndBegin() {
  SessionThreads session(3);
  for (int i = 0; i < 20; ++i) {
    const std::shared_ptr<Threads> threads = session.Get();
    if (threads != session.Get() || !IsRight(*threads, 1000, 1, 10, nullptr, {})) return false;
  }
  return true;
}

// All of this process on one processor from here on: whoever works has the others wait, and they rest.
bool StayOnOneProcessor() {
  cpu_set_t all, one;
  if (sched_getaffinity(0, sizeof all, &all) != 0) return false;
  CPU_ZERO(&one);
  for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++i)
    if (CPU_ISSET(i, &all)) CPU_SET(i, &one);
  return sched_setaffinity(0, sizeof one, &one) == 0;
}

}  // namespace

int main() {
  for (const int count : {1, 2, 3, 8})
    if (!CallAtOnce(count)) {
      std::printf("%d threads: an item was not done once\n", count);
      return 1;
    }
  for (const int count : {1, 2, 3, 8})
    if (!Meet(count)) {
      std::printf("%d threads: not all came\n", count);
      return 1;
    }
  if (!EndAndBegin()) return 1;
  if (!StayOnOneProcessor()) return 1;
  for (const int count : {2, 8})
    if (!CallAtOnce(count)) {
      std::printf("%d threads on one processor: an item was not done once\n", count);
      return 1;
    }
  return 0;
}
