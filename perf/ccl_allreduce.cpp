// The ceiling for perf/allreduce.py: the same all-reduces by a program that is nothing but oneCCL.
//
// Started once for each rank with SIZE and RANK. Rank 0 prints the address at which the ranks meet, the others read it
// from their input. Every further line there is `TYPE COUNT CALLS` (TYPE 0: float32, 1: bfloat16), answered with the
// seconds of each call: in place, after a barrier.
#include <oneapi/ccl.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <iomanip>
#include <iostream>
#include <string>
#include <vector>

int main(int, char **argv) {
    const int size = std::atoi(argv[1]), rank = std::atoi(argv[2]);
    ccl::init();
    ccl::kvs::address_type address;
    ccl::shared_ptr_class<ccl::kvs> kvs;
    if (rank == 0) {
        kvs = ccl::create_main_kvs();
        address = kvs->get_address();
        for (const char byte : address)
            std::cout << std::hex << std::setw(2) << std::setfill('0') << static_cast<int>(static_cast<uint8_t>(byte));
        std::cout << std::dec << std::endl;
    } else {
        std::string hex;
        std::cin >> hex;
        for (size_t i = 0; i < address.size(); ++i)
            address[i] = static_cast<char>(std::stoi(hex.substr(2 * i, 2), nullptr, 16));
        kvs = ccl::create_kvs(address);
    }
    auto comm = ccl::create_communicator(size, rank, kvs);
    uint8_t token = 0;
    size_t count;
    int type, calls;
    std::cout << std::scientific << std::setprecision(9);
    while (std::cin >> type >> count >> calls) {
        std::vector<uint8_t> data(count * (type == 0 ? 4 : 2));
        const auto dtype = type == 0 ? ccl::datatype::float32 : ccl::datatype::bfloat16;
        for (int call = 0; call < calls; ++call) {
            std::fill(data.begin(), data.end(), 0);
            ccl::allreduce(&token, &token, 1, ccl::datatype::uint8, ccl::reduction::sum, comm).wait();
            const auto start = std::chrono::steady_clock::now();
            ccl::allreduce(data.data(), data.data(), count, dtype, ccl::reduction::sum, comm).wait();
            const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            std::cout << (call ? " " : "") << seconds.count();
        }
        std::cout << std::endl;
    }
}
