// OpenMP as the library uses it (teams, barriers, thread numbers), on pthreads: linked before libgomp into programs
// built with -fsanitize=thread. ThreadSanitizer cannot see how libgomp's threads wait for each other and would report
// every row written before a barrier and read behind it; the locks here it sees, so that what it still reports is a
// race.
#include <pthread.h>

#include <array>
#include <condition_variable>
#include <cstdlib>
#include <mutex>

namespace {

class Barrier {
 public:
  explicit Barrier(unsigned size) : size_(size) {}
  void wait() {
    std::unique_lock lock(mutex_);
    const unsigned turn = turn_;
    if (++waiting_ == size_) {
      waiting_ = 0;
      ++turn_;
      changed_.notify_all();
      return;
    }
    changed_.wait(lock, [&] { return turn_ != turn; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned size_, waiting_ = 0, turn_ = 0;
};

struct Team {
  Barrier barrier;
  unsigned size;
};

thread_local Team* team = nullptr;
thread_local int thread_number = 0;

struct Member {
  Team* team;
  int number;
  void (*work)(void*);
  void* data;
  pthread_t thread;

  void run() const {
    ::team = team;
    thread_number = number;
    work(data);
  }
};

void* start(void* member) {
  static_cast<const Member*>(member)->run();
  return nullptr;
}

}  // namespace

extern "C" {

// Without operator new, which a test may have run out of memory.
void GOMP_parallel(void (*work)(void*), void* data, unsigned num_threads, unsigned /*flags*/) {
  std::array<Member, 64> members;
  if (num_threads > members.size()) std::abort();
  Team own{Barrier(num_threads), num_threads};
  Team* const outer = team;
  const int outer_number = thread_number;
  for (unsigned i = 0; i < num_threads; ++i) {
    members[i] = {&own, static_cast<int>(i), work, data, {}};
    if (i > 0 && pthread_create(&members[i].thread, nullptr, start, &members[i]) != 0) std::abort();
  }
  members[0].run();
  for (unsigned i = 1; i < num_threads; ++i) pthread_join(members[i].thread, nullptr);
  team = outer;
  thread_number = outer_number;
}

void GOMP_barrier() {
  if (team != nullptr) team->barrier.wait();
}

int omp_get_thread_num() { return thread_number; }
int omp_get_num_threads() { return team != nullptr ? static_cast<int>(team->size) : 1; }
int omp_get_max_threads() { return 4; }
int omp_in_parallel() { return team != nullptr; }
}
