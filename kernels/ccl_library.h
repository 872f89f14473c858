// oneCCL's C++ interface, opened at run time by the path that Python found.
//
// The build needs nothing of oneCCL, so one binary works without it and with each 2021.x release: their interface is
// that of libccl.so.1, and the part used is declared here. Entry points are looked up by mangled name, which contains
// the types of all arguments: loading refuses an interface that differs. tests/comm/test_oneccl.py checks names and
// layouts against oneCCL's headers.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace knltrain::oneccl {

using Counts = std::vector<size_t>;
using Buffers = std::vector<void *>;
using Kvs = std::shared_ptr<void>;           // std::shared_ptr<ccl::v1::kvs>
using KvsAddress = std::array<char, 256>;    // ccl::v1::kvs::address_type
constexpr int kDatatypes = 12;               // ccl::v1::datatype, int8 to bfloat16
constexpr int kReductions = 4;               // ccl::v1::reduction, without custom

// ccl::v1::event holds a std::unique_ptr, ccl::v1::communicator a std::shared_ptr; both are returned through memory.
struct Event {
    void *impl = nullptr;
    Event() = default;
    Event(const Event &) = delete;
    ~Event();
};
struct Comm {
    void *impl = nullptr, *owners = nullptr;
    Comm() = default;
    Comm(const Comm &) = delete;
    ~Comm();
};
using Events = std::vector<Event>;

// ccl::v1::library_version, whose last member is a string of oneCCL's own.
struct Version {
    unsigned major, minor, update;
    const char *status, *date, *full;
    size_t backend_length;
    char *backend;
    ~Version() { delete[] backend; }
};

// Attributes are always oneCCL's own defaults, of which only the address is needed.
using Attr = const void *;

struct Api {
    Kvs (*create_main_kvs)(Attr);
    Kvs (*create_kvs)(const KvsAddress &, Attr);
    KvsAddress (*get_address)(const void *kvs);
    Comm (*create_communicator)(int size, int rank, Kvs, Attr);
    void (*destroy_communicator)(Comm *);
    void (*destroy_event)(Event *);
    bool (*test)(Event *);
    Event (*allgatherv)(const void *, size_t, const Buffers &, const Counts &, int type, const Comm &, Attr, const Events &);
    Event (*allreduce)(const void *, void *, size_t, int type, int op, const Comm &, Attr, const Events &);
    Event (*alltoallv)(const void *, const Counts &, void *, const Counts &, int type, const Comm &, Attr, const Events &);
    Event (*broadcast)(void *, size_t, int type, int root, const Comm &, Attr, const Events &);
    Event (*recv)(void *, size_t, int type, int peer, const Comm &, Attr, const Events &);
    Event (*reduce)(const void *, void *, size_t, int type, int op, int root, const Comm &, Attr, const Events &);
    Event (*reduce_scatter)(const void *, void *, size_t, int type, int op, const Comm &, Attr, const Events &);
    Event (*send)(void *, size_t, int type, int peer, const Comm &, Attr, const Events &);
    Attr allgatherv_attr, allreduce_attr, alltoallv_attr, broadcast_attr, comm_attr, kvs_attr, pt2pt_attr,
        reduce_attr, reduce_scatter_attr;
    Version (*get_library_version)();
};
extern Api api;

// Throws std::runtime_error where the path holds no library of this interface.
void load(const std::string &path);

// Throws std::invalid_argument before that.
void check_loaded();

}  // namespace knltrain::oneccl
