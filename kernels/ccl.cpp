// Collectives of oneCCL between CPUs, for knltrain/comm/ccl.py.
//
// One thread at a time calls oneCCL. Without workers of its own (one core a rank), oneCCL makes progress only inside
// event::test: so the thread that waits for its own operation polls it, or else the thread in next().
#include "ccl.h"

#include "ccl_library.h"

#include <sched.h>

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <unistd.h>

namespace nb = nanobind;

namespace knltrain {
namespace {

using namespace oneccl;

using Address = uintptr_t;
using Clock = std::chrono::steady_clock;

// Communicators that are open or being created. While there is one, oneCCL's own cleanup at the end of the process may
// wait for ranks that have ended.
std::atomic<int> open_communicators{0};

void exit_without_cleanup(int status, void *) {
    if (open_communicators == 0) return;
    std::fflush(nullptr);
    _exit(status);
}

struct Communicator {
    Comm comm;
    int rank, size;
    bool open = true;
};

// One operation of a communicator. The caller keeps its buffers until it is done.
struct Request {
    std::shared_ptr<Communicator> of;
    std::function<void(const Comm &, Event *)> submit;
    bool in_background;
    int64_t number;
    Event event;
    bool over = false;  // oneCCL has finished it; for the polling thread alone
    bool done = false;  // likewise, for all threads, under the engine's lock
    std::string error;
    ~Request() {
        if (!done) event.impl = nullptr;  // leaked: oneCCL may still use it
    }
};
using RequestPtr = std::shared_ptr<Request>;

// How long after the last progress oneCCL is polled without a pause, and then with sched_yield. After that the thread
// sleeps between polls, for so long that polls take a tenth of the time at most. A thread that waits in the foreground
// has nothing else to do; one in the background takes the core from another thread.
struct PollingLimits {
    Clock::duration spin, yield;
};
constexpr PollingLimits kForeground{std::chrono::microseconds(500), std::chrono::microseconds(2000)};
constexpr PollingLimits kBackground{std::chrono::microseconds(20), std::chrono::microseconds(400)};
constexpr auto kMinSleep = std::chrono::microseconds(50);
constexpr int kSleepPolls = 10;  // a sleep is as long as so many polls
// A poll that takes longer than this, and this for each operation under way, has made progress.
constexpr auto kIdlePoll = std::chrono::nanoseconds(5000), kIdlePollPerOperation = std::chrono::nanoseconds(500);

Clock::time_point after(double seconds) {
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

class Engine {
   public:
    void add(const RequestPtr &request) {
        {
            std::lock_guard lock(mutex_);
            if (!request->of->open) throw std::invalid_argument("the communicator is closed");
            queue_.push_back(request);
        }
        if (request->in_background) changed_.notify_all();
    }

    // Waits until it is done, and polls oneCCL while no other thread does.
    bool wait(const RequestPtr &request, double seconds) {
        const auto until = after(seconds);
        std::unique_lock lock(mutex_);
        while (!request->done && Clock::now() < until)
            poll_or_wait(lock, until, kForeground, true, [&] { return request->done; });
        return request->done;
    }

    // Returns the next operation in the background that is done, or null after so many seconds or after stop().
    RequestPtr next(double seconds) {
        const auto until = after(seconds);
        std::unique_lock lock(mutex_);
        while (finished_.empty() && !stopped_ && Clock::now() < until)
            poll_or_wait(lock, until, kBackground, !(queue_.empty() && running_.empty()),
                          [&] { return stopped_ || !finished_.empty(); });
        if (finished_.empty()) return nullptr;
        RequestPtr request = finished_.front();
        finished_.pop_front();
        return request;
    }

    bool is_done(const RequestPtr &request) {
        std::lock_guard lock(mutex_);
        return request->done;
    }

    void stop(bool stopped) {
        std::lock_guard lock(mutex_);
        stopped_ = stopped;
        changed_.notify_all();
    }

    // Makes a call while no other thread calls oneCCL.
    template <class F> void alone(F call) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return !polling_; });
        polling_ = true;
        lock.unlock();
        const auto release = [&] {
            lock.lock();
            polling_ = false;
            changed_.notify_all();
        };
        try {
            call();
        } catch (...) {
            release();
            throw;
        }
        release();
    }

    // Drops the communicator's operations: they are not polled again.
    void abandon(const std::shared_ptr<Communicator> &of) {
        alone([&] {
            std::lock_guard lock(mutex_);
            of->open = false;
            const auto gone = [&](const RequestPtr &request) { return request->of == of; };
            queue_.erase(std::remove_if(queue_.begin(), queue_.end(), gone), queue_.end());
            std::copy_if(running_.begin(), running_.end(), std::back_inserter(failed_), gone);
            running_.erase(std::remove_if(running_.begin(), running_.end(), gone), running_.end());
        });
    }

   private:
    template <class F>
    void poll_or_wait(std::unique_lock<std::mutex> &lock, Clock::time_point until, const PollingLimits &limits,
                      bool work, F enough) {
        if (polling_ || !work)
            // A thread that stops polling wakes this one too, and so does a new operation.
            changed_.wait_until(lock, until);
        else
            poll(lock, until, limits, enough);
    }

    // Polls oneCCL until `enough`. The lock is held on entry and on return, not during polls.
    template <class F>
    void poll(std::unique_lock<std::mutex> &lock, Clock::time_point until, const PollingLimits &limits, F enough) {
        polling_ = true;
        auto now = Clock::now(), progress = now;
        size_t turn = 0;
        while (!enough() && now < until) {
            while (!queue_.empty()) {
                running_.push_back(queue_.front());
                queue_.pop_front();
                lock.unlock();
                start(*running_.back());
                lock.lock();
            }
            if (running_.empty()) break;
            lock.unlock();
            const auto before = Clock::now();
            // Testing one operation makes progress on all. Within a communicator the oldest is over first.
            bool any = running_.front()->over = is_over(*running_.front());
            Request &another = *running_[++turn % running_.size()];
            if (!another.over) any |= another.over = is_over(another);
            now = Clock::now();
            const auto duration = now - before;
            if (any || duration > kIdlePoll + running_.size() * kIdlePollPerOperation)
                progress = now;
            else if (now - progress < limits.spin)
                __builtin_ia32_pause();
            else if (now - progress < limits.yield)
                sched_yield();
            else
                std::this_thread::sleep_for(std::max<Clock::duration>(kMinSleep, kSleepPolls * duration));
            lock.lock();
            if (any) collect();
        }
        polling_ = false;
        changed_.notify_all();
    }

    static void start(Request &request) {
        try {
            request.submit(request.of->comm, &request.event);
        } catch (const std::exception &error) {
            request.error = error.what();
        }
    }

    static bool is_over(Request &request) {
        if (!request.error.empty()) return true;
        try {
            return api.test(&request.event);
        } catch (const std::exception &error) {
            request.error = error.what();
            return true;
        }
    }

    void collect() {
        for (const RequestPtr &request : running_)
            if (request->over) {
                request->done = true;
                if (!request->error.empty()) failed_.push_back(request);
                if (request->in_background) finished_.push_back(request);
            }
        running_.erase(std::remove_if(running_.begin(), running_.end(), [](const auto &r) { return r->done; }),
                       running_.end());
        changed_.notify_all();
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<RequestPtr> queue_, finished_;
    std::vector<RequestPtr> running_;
    // Kept for ever: oneCCL waits without end, or aborts, where an event is destroyed that is not complete.
    std::vector<RequestPtr> failed_;
    bool polling_ = false, stopped_ = false;
};

// Never destroyed: a thread may still wait in it when the process ends.
Engine &engine() {
    static Engine *one = new Engine;
    return *one;
}

using CommunicatorPtr = std::shared_ptr<Communicator>;

// The key-value store through which the ranks of a communicator connect.
struct MeetingPoint {
    Kvs kvs;
};

CommunicatorPtr connect(int size, int rank, const MeetingPoint &point) {
    check_loaded();
    if (size < 1 || rank < 0 || rank >= size)
        throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(size));
    CommunicatorPtr made;
    ++open_communicators;  // before it is created: with ranks that do not match, that call does not return
    on_exit(exit_without_cleanup, nullptr);
    try {
        engine().alone([&] {
            made.reset(new Communicator{api.create_communicator(size, rank, point.kvs, api.comm_attr), rank, size});
        });
    } catch (...) {
        --open_communicators;
        throw;
    }
    // Again, after the exit handlers that oneCCL has registered by now, so that it is called before them.
    on_exit(exit_without_cleanup, nullptr);
    return made;
}

void close(const CommunicatorPtr &of) {
    engine().alone([&] {
        if (!of->open) return;
        of->open = false;
        if (of->comm.impl != nullptr) api.destroy_communicator(&of->comm);
        of->comm.impl = nullptr;
        --open_communicators;
    });
}

// These checks are the last before addresses are used; comm/ccl.py makes them of tensors.
RequestPtr enqueue(const CommunicatorPtr &of, bool in_background, int type, int op, int peer,
                   std::function<Event(const Comm &)> call) {
    if (type < 0 || type >= kDatatypes) throw std::invalid_argument("no data type " + std::to_string(type));
    if (op < 0 || op >= kReductions) throw std::invalid_argument("no reduction " + std::to_string(op));
    if (peer < 0 || peer >= of->size) throw std::invalid_argument("no rank " + std::to_string(peer));
    static std::atomic<int64_t> numbers{0};
    RequestPtr request(new Request{of, {}, in_background, ++numbers});
    request->submit = [call = std::move(call)](const Comm &comm, Event *event) {
        // Constructed in place: an event cannot be copied, and only oneCCL may move one.
        event->~Event();
        new (event) Event(call(comm));
    };
    engine().add(request);
    return request;
}

void check_count(size_t given, int size) {
    if (given != size_t(size))
        throw std::invalid_argument(std::to_string(given) + " given for " + std::to_string(size) + " ranks");
}

void *at(Address address) { return reinterpret_cast<void *>(address); }

}  // namespace

void bind_ccl(nb::module_ &parent) {
    using Guard = nb::call_guard<nb::gil_scoped_release>;
    nb::module_ m = parent.def_submodule("ccl");
    m.def("load", load);
    m.def("version", [] {
        check_loaded();
        const Version version = api.get_library_version();
        return std::to_string(version.major) + "." + std::to_string(version.minor) + "." +
               std::to_string(version.update);
    });

    nb::class_<MeetingPoint>(m, "MeetingPoint").def_prop_ro("address", [](const MeetingPoint &point) {
        const KvsAddress address = api.get_address(point.kvs.get());
        return nb::bytes(address.data(), address.size());
    });
    m.def("open_meeting_point", [] {
        check_loaded();
        return MeetingPoint{api.create_main_kvs(api.kvs_attr)};
    }, Guard());
    m.def("join_meeting_point", [](const nb::bytes &address) {
        check_loaded();
        KvsAddress bytes;
        if (address.size() != bytes.size()) throw std::invalid_argument("an address has 256 bytes");
        std::memcpy(bytes.data(), address.c_str(), bytes.size());
        nb::gil_scoped_release release;
        return MeetingPoint{api.create_kvs(bytes, api.kvs_attr)};
    });

    nb::class_<Request>(m, "Request")
        .def_prop_ro("done", [](const RequestPtr &request) { return engine().is_done(request); })
        .def_ro("error", &Request::error)
        .def_ro("number", &Request::number)
        .def("wait", [](const RequestPtr &request, double seconds) { return engine().wait(request, seconds); }, Guard());
    m.def("next", [](double seconds) { return engine().next(seconds); }, Guard());
    m.def("stop", [](bool stopped) { engine().stop(stopped); }, Guard());

    nb::class_<Communicator>(m, "Communicator")
        .def_ro("rank", &Communicator::rank)
        .def_ro("size", &Communicator::size)
        .def("close", close, Guard())
        .def("abandon", [](const CommunicatorPtr &of) { engine().abandon(of); }, Guard())
        .def("broadcast", [](const CommunicatorPtr &of, Address data, size_t count, int type, int root, bool background) {
            return enqueue(of, background, type, 0, root, [=](const Comm &comm) {
                return api.broadcast(at(data), count, type, root, comm, api.broadcast_attr, {});
            });
        })
        .def("all_reduce", [](const CommunicatorPtr &of, Address from, Address to, size_t count, int type, int op,
                              bool background) {
            return enqueue(of, background, type, op, 0, [=](const Comm &comm) {
                return api.allreduce(at(from), at(to), count, type, op, comm, api.allreduce_attr, {});
            });
        })
        .def("reduce", [](const CommunicatorPtr &of, Address from, Address to, size_t count, int type, int op, int root,
                          bool background) {
            return enqueue(of, background, type, op, root, [=](const Comm &comm) {
                return api.reduce(at(from), at(to), count, type, op, root, comm, api.reduce_attr, {});
            });
        })
        .def("reduce_scatter", [](const CommunicatorPtr &of, Address from, Address to, size_t count, int type, int op,
                                  bool background) {
            return enqueue(of, background, type, op, 0, [=](const Comm &comm) {
                return api.reduce_scatter(at(from), at(to), count, type, op, comm, api.reduce_scatter_attr, {});
            });
        })
        .def("all_gather", [](const CommunicatorPtr &of, Address from, size_t count, const std::vector<Address> &to,
                              const Counts &counts, int type, bool background) {
            check_count(to.size(), of->size);
            check_count(counts.size(), of->size);
            Buffers pieces;
            for (Address piece : to) pieces.push_back(at(piece));
            return enqueue(of, background, type, 0, 0, [=](const Comm &comm) {
                return api.allgatherv(at(from), count, pieces, counts, type, comm, api.allgatherv_attr, {});
            });
        })
        .def("all_to_all", [](const CommunicatorPtr &of, Address from, const Counts &sent, Address to,
                              const Counts &received, int type, bool background) {
            check_count(sent.size(), of->size);
            check_count(received.size(), of->size);
            return enqueue(of, background, type, 0, 0, [=](const Comm &comm) {
                return api.alltoallv(at(from), sent, at(to), received, type, comm, api.alltoallv_attr, {});
            });
        })
        .def("send", [](const CommunicatorPtr &of, Address data, size_t count, int type, int peer, bool background) {
            return enqueue(of, background, type, 0, peer, [=](const Comm &comm) {
                return api.send(at(data), count, type, peer, comm, api.pt2pt_attr, {});
            });
        })
        .def("recv", [](const CommunicatorPtr &of, Address data, size_t count, int type, int peer, bool background) {
            return enqueue(of, background, type, 0, peer, [=](const Comm &comm) {
                return api.recv(at(data), count, type, peer, comm, api.pt2pt_attr, {});
            });
        });
    m.def("connect", connect, Guard());
}

}  // namespace knltrain
