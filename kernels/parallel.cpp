#include "parallel.h"

namespace knltrain {
namespace {

void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
int (*get_thread_num)() = nullptr;
int (*get_num_threads)() = nullptr;

struct Work {
    int tasks;
    void (*function)(void *, int);
    void *data;
};

void member(void *argument) {
    const Work &work = *static_cast<Work *>(argument);
    const int members = get_num_threads();
    for (int task = get_thread_num(); task < work.tasks; task += members) work.function(work.data, task);
}

}  // namespace

void use_openmp(void *parallel, void *thread_num, void *num_threads) {
    gomp_parallel = reinterpret_cast<decltype(gomp_parallel)>(parallel);
    get_thread_num = reinterpret_cast<decltype(get_thread_num)>(thread_num);
    get_num_threads = reinterpret_cast<decltype(get_num_threads)>(num_threads);
}

void run_tasks(int tasks, void (*function)(void *, int), void *data) {
    if (tasks == 1 || gomp_parallel == nullptr) {
        for (int task = 0; task < tasks; ++task) function(data, task);
        return;
    }
    Work work{tasks, function, data};
    gomp_parallel(member, &work, unsigned(tasks), 0);
}

}  // namespace knltrain
