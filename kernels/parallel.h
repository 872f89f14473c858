// Threads, from the OpenMP runtime that torch already runs on.
//
// Nothing here is compiled with OpenMP or linked to a runtime: a second one in the process would start threads of its
// own on the same cores. The runtime is found at run time, through the GNU entry points, which GNU's, Intel's and LLVM's
// libraries all have.
#pragma once

namespace knltrain {

// Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads of one runtime. Before this call there is one
// thread.
void use_openmp(void *parallel, void *thread_num, void *num_threads);

// Calls function(data, task) for every task in [0, tasks), at once on as many threads. How work is divided depends on
// `tasks` alone, and not on the threads that the runtime can give, so results depend on `tasks` alone too.
void run_tasks(int tasks, void (*function)(void *data, int task), void *data);

}  // namespace knltrain
