#include "ccl_library.h"

#include <dlfcn.h>

#include <stdexcept>

namespace knltrain::oneccl {

Api api{};

namespace {

void *library = nullptr;

template <class T> void find(T &entry, const char *name) {
    void *found = dlsym(library, name);
    if (found == nullptr) {
        library = nullptr;
        throw std::runtime_error(std::string("it has no ") + name + ": another interface than oneCCL 2021's");
    }
    entry = reinterpret_cast<T>(found);
}

}  // namespace

Event::~Event() {
    if (impl != nullptr) api.destroy_event(this);
}
Comm::~Comm() {
    if (impl != nullptr) api.destroy_communicator(this);
}

void load(const std::string &path) {
    if (library != nullptr) return;
    // RTLD_GLOBAL: the libraries that it opens itself need its symbols.
    library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) throw std::runtime_error(dlerror());
#define CCL_EVENTS "RKSt6vectorINS0_5eventESaI"
    find(api.create_main_kvs, "_ZN3ccl2v115create_main_kvsERKNS0_8kvs_attrE");
    find(api.create_kvs, "_ZN3ccl2v110create_kvsERKSt5arrayIcLm256EERKNS0_8kvs_attrE");
    find(api.get_address, "_ZNK3ccl2v13kvs11get_addressEv");
    find(api.create_communicator,
         "_ZN3ccl2v119create_communicatorEiiSt10shared_ptrINS0_13kvs_interfaceEERKNS0_9comm_attrE");
    find(api.destroy_communicator, "_ZN3ccl2v112communicatorD1Ev");
    find(api.destroy_event, "_ZN3ccl2v15eventD1Ev");
    find(api.test, "_ZN3ccl2v15event4testEv");
    find(api.allgatherv,
         "_ZN3ccl2v110allgathervEPKvmRKSt6vectorIPvSaIS4_EERKS3_ImSaImEENS0_8datatypeERKNS0_12communicatorE"
         "RKNS0_15allgatherv_attrERKS3_INS0_5eventESaISK_EE");
    find(api.allreduce,
         "_ZN3ccl2v19allreduceEPKvPvmNS0_8datatypeENS0_9reductionERKNS0_12communicatorERKNS0_14allreduce_attrE"
         CCL_EVENTS "SD_EE");
    find(api.alltoallv,
         "_ZN3ccl2v19alltoallvEPKvRKSt6vectorImSaImEEPvS7_NS0_8datatypeERKNS0_12communicatorERKNS0_14alltoallv_attrE"
         "RKS3_INS0_5eventESaISG_EE");
    find(api.broadcast,
         "_ZN3ccl2v19broadcastEPvmNS0_8datatypeEiRKNS0_12communicatorERKNS0_14broadcast_attrE" CCL_EVENTS "SA_EE");
    find(api.recv, "_ZN3ccl2v14recvEPvmNS0_8datatypeEiRKNS0_12communicatorERKNS0_10pt2pt_attrE" CCL_EVENTS "SA_EE");
    find(api.reduce,
         "_ZN3ccl2v16reduceEPKvPvmNS0_8datatypeENS0_9reductionEiRKNS0_12communicatorERKNS0_11reduce_attrE"
         CCL_EVENTS "SD_EE");
    find(api.reduce_scatter,
         "_ZN3ccl2v114reduce_scatterEPKvPvmNS0_8datatypeENS0_9reductionERKNS0_12communicatorERKNS0_19reduce_scatter_attrE"
         CCL_EVENTS "SD_EE");
    find(api.send, "_ZN3ccl2v14sendEPvmNS0_8datatypeEiRKNS0_12communicatorERKNS0_10pt2pt_attrE" CCL_EVENTS "SA_EE");
#undef CCL_EVENTS
    find(api.allgatherv_attr, "_ZN3ccl2v123default_allgatherv_attrE");
    find(api.allreduce_attr, "_ZN3ccl2v122default_allreduce_attrE");
    find(api.alltoallv_attr, "_ZN3ccl2v122default_alltoallv_attrE");
    find(api.broadcast_attr, "_ZN3ccl2v122default_broadcast_attrE");
    find(api.comm_attr, "_ZN3ccl2v117default_comm_attrE");
    find(api.kvs_attr, "_ZN3ccl2v116default_kvs_attrE");
    find(api.pt2pt_attr, "_ZN3ccl2v118default_pt2pt_attrE");
    find(api.reduce_attr, "_ZN3ccl2v119default_reduce_attrE");
    find(api.reduce_scatter_attr, "_ZN3ccl2v127default_reduce_scatter_attrE");
    find(api.get_library_version, "_ZN3ccl2v119get_library_versionEv");
}

void check_loaded() {
    if (library == nullptr) throw std::invalid_argument("oneCCL is not loaded");
}

}  // namespace knltrain::oneccl
