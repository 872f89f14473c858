// Threads of the OpenMP runtime that torch uses.
//
// Nothing here is compiled with OpenMP or linked to a runtime: a second one in the process would start threads of its
// own on the same cores. The runtime is found at run time by its GNU entry points, which GNU's, Intel's and LLVM's
// libraries all have.
#pragma once

namespace knltrain {

// Takes the addresses of one runtime's GOMP_parallel, omp_get_thread_num and omp_get_num_threads. Before this call
// there is one thread.
void use_openmp(void *parallel, void *thread_num, void *num_threads);

// Calls function(data, task) for every task in [0, tasks), in parallel on as many threads. The division of work, and so
// the results, depend on `tasks` alone, not on the number of threads that the runtime provides.
void run_tasks(int tasks, void (*function)(void *data, int task), void *data);

}  // namespace knltrain
