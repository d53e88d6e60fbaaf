// The threads that kernels divide their work among. The plugin has its own, as those of ONNX Runtime only wait between
// two nodes: decoding is bound by memory, which would idle while the thread that runs the nodes is at work alone, or
// waits for the other ones. Here whoever has nothing to do fetches what is multiplied next.
//
// Beside other programs a thread may wait for its processor while it has work that the others then wait for. Who waits
// sleeps soon, and leaves a processor on which that thread can go on. A thread that is waited for again and again
// rests: the caller works without it, for longer each time that it comes back in vain.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "operator/waiting.h"

// A weight in parts that lie one after the other, of which every thread multiplies its share.
struct Weight {
  const uint8_t* data;
  int64_t parts, part_bytes;

  // Where the share of thread t of n begins, and that of t - 1 ends.
  const uint8_t* ShareBegin(int t, int n) const { return data + parts * t / n * part_bytes; }
};

// What a kernel has learned of the order in which a session multiplies its weights.
struct Order {
  Weight weight = {};
  std::weak_ptr<Order> next;
};

// Memory that a thread reads soon.
struct Ahead {
  const uint8_t *begin, *end;
};

class Threads {
 public:
  // Calls for the items [first, last); throws nothing.
  using Task = void (*)(void* data, int64_t first, int64_t last);

  // `count` threads with the one that calls For.
  explicit Threads(int count);
  ~Threads();

  // Has `task` called for all of [0, count), `most` items at a time or fewer, and `least` or fewer at the very end of a
  // share: each thread takes half of what is left of an even share of its own, neighbours in order, and at last the
  // same of others' from their ends. While a caller is in here another does all its work itself.
  //
  // order: of the weight whose parts the items are; null for work that reads none.
  // ahead: of each thread what it reads after this, where the caller knows better than `order`; or null.
  void For(int64_t count, int64_t least, int64_t most, Task task, void* data,
           const std::shared_ptr<Order>& order = nullptr, const Weight& weight = {},
           const std::vector<Ahead>* ahead = nullptr);

  // Tells each thread what it reads next, to be fetched while it has nothing to do. A hint, which any caller may give.
  void Announce(const std::vector<Ahead>& ahead);

  int count() const { return count_; }

 private:
  // What one thread has to do. In lines of its own: others look at it in passing.
  struct alignas(128) Share {
    std::atomic<uint64_t> items{0};  // first << 32 | last
    std::atomic<const uint8_t*> next{nullptr}, next_end{nullptr};
    std::atomic<uint32_t> sleeps{0}, rests{0};     // flags; the caller ends both
    std::atomic<int64_t> rest{0}, rests_until{0};  // ns of its last rest, and of the clock at its end
  };

  // What a thread has fetched of its share's next bytes.
  struct Fetched {
    const uint8_t *from = nullptr, *end = nullptr;
    int64_t lines = 0;
  };

  // A thread beside the caller, as it sees itself.
  struct Worker {
    Share& share;
    Fetched fetched = {};
    uint64_t round = 0;  // its last
    int64_t moved = 0;   // ns of the clock
    waiting::Losses losses = {};
  };

  // Of the caller.
  bool AllRest() const;
  void WakeSleepers();
  void AwaitWorkers();
  void NoteLoss(int64_t began);
  void NoteOrder(const std::shared_ptr<Order>& order, const Weight& weight);
  void AnnounceNext(const Order& order);
  static void AnnounceTo(Share& share, const Ahead& ahead);

  // Of the others.
  void Serve(int thread);
  bool Join(Worker& self);
  bool Comes(const Worker& self) const;
  bool IsOnCallersProcessor() const;
  void LeaveCaller(Worker& self);
  bool Enter(Worker& self);
  void Leave(Worker& self);
  void Sleep(Worker& self);

  // Of all.
  static void Rest(Share& share, int64_t lost);
  static bool RestsAt(const Share& share, int64_t now);
  void Work(int thread);
  bool Take(Share& share, bool own, int64_t* first, int64_t* last) const;
  static bool FetchLines(const Share& share, Fetched& fetched);

  const int count_;
  const std::unique_ptr<Share[]> shares_;

  // Of the caller.
  std::atomic<bool> has_caller_{false};
  std::weak_ptr<Order> last_;
  Fetched fetched_;

  // The work of a round; it does not change while the round is open or anyone is in it.
  Task task_ = nullptr;
  void* data_ = nullptr;
  int64_t least_ = 1, most_ = 1;
  alignas(128) std::atomic<uint64_t> round_{0};  // number << 32 | open << 31 | threads in it beside the caller
  std::atomic<int> caller_processor_{-1};
  std::atomic<uint32_t> caller_sleeps_{0};
  std::atomic<int64_t> caller_waits_since_{0};  // while it sleeps

  alignas(128) std::atomic<int> sleepers_{0};
  std::atomic<bool> ends_{false};
  std::vector<std::thread> threads_;
};

// The threads of a session: there while one of its kernels holds them.
class SessionThreads {
 public:
  explicit SessionThreads(int count) : count_(count) {}
  std::shared_ptr<Threads> Get();

 private:
  const int count_;
  std::mutex mutex_;
  std::weak_ptr<Threads> threads_;
};
