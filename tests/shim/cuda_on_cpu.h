// What makes a C++ compiler understand a .cu file, and runs its kernels: every CUDA thread is a fiber, blocks
// run one after the other. A fiber runs until it meets others (a barrier, a warp's instruction) or ends, so
// the order in which fibers are taken decides which races show; it is set from outside.
#pragma once
#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Thread-local, because a library's thread-local variables, those of templates and inline functions included,
// lie in one piece that can be found and refilled. All fibers of a launch live in one thread.
#define __shared__ static __thread
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(shim::dynamic)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

#define SHIM_VECTORS(type, name)                                     \
    struct __align__(2 * sizeof(type)) name##2 { type x, y; };       \
    struct __align__(4 * sizeof(type)) name##4 { type x, y, z, w; }; \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SHIM_VECTORS(float, float)
SHIM_VECTORS(int, int)
SHIM_VECTORS(unsigned, uint)
#undef SHIM_VECTORS

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace shim {

constexpr unsigned WARP_LANES = 32, MAX_THREADS = 1024;
constexpr size_t MAX_DYNAMIC = 227 * 1024, GUARD = 4096;
// Not a multiple of the page, so that the fibers' stacks share out the cache's sets.
constexpr size_t STACK = 68 * 1024 + 192;
constexpr unsigned CANARY = 0x57ac4e4d;

enum Order { FORWARD, REVERSED, SHUFFLED };
enum State { READY, AT_BARRIER, IN_WARP, AT_CONDITION, ENDED };

// What a thread waits for that is neither its block's nor its warp's others; asked between the turns of threads.
struct Condition {
    virtual bool holds() = 0;
    virtual const char* tell() = 0;  // for the report of a deadlock
};

struct Copy {
    void* shared;
    const void* global;
    unsigned group;
};

struct Fiber {
    jmp_buf resume;
    bool started;  // has a stack frame to come back to
    State state;
    const char* at;  // what it waits at
    Condition* condition;
    uint3 thread;
    Copy* copies;  // under way, oldest first
    unsigned copying, capacity, groups;
};

// What a lane brings to a warp's instruction. Two sets in turn: a lane may bring the next before others took
// the last.
struct Slot {
    unsigned words[6];
};
struct Warp {
    Slot slots[2][WARP_LANES];
    unsigned turn;
};

static Fiber fibers[MAX_THREADS], *current;
static Warp warps[MAX_THREADS / WARP_LANES];
static char* stacks;
static jmp_buf scheduler;
static unsigned threads, random_state;
static Order order;
static void (*call)(void**);
static void** arguments;
static const char* kernel;
static char error[1024];
__attribute__((aligned(1024))) static unsigned char dynamic[MAX_DYNAMIC + GUARD];
static size_t dynamic_size;
static unsigned synchronizations;        // __syncthreads that the block has passed
static bool gives_way;                   // the running warp's turn is over
static void (*at_start)(), (*at_end)();  // of every block: what else has a state, and checks it
static __thread volatile char touched;   // at least one thread-local, and a way to have them allocated

static void report(const char* format, ...) {
    int n = snprintf(error, sizeof error, "%s, block (%u, %u, %u)", kernel, blockIdx.x, blockIdx.y, blockIdx.z);
    va_list list;
    va_start(list, format);
    vsnprintf(error + n, sizeof error - n, format, list);
    va_end(list);
}

// Ends the launch, from within a fiber.
[[noreturn]] static void fail(const char* what, const char* why) {
    const uint3 t = current->thread;
    report(", thread (%u, %u, %u): %s: %s", t.x, t.y, t.z, what, why);
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) static void leave(State state, const char* at) {
    current->state = state;
    current->at = at;
    if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}

// Other fibers run before it returns: nothing in memory may be remembered across it.
__attribute__((always_inline)) inline void wait(State state, const char* at) {
    asm volatile("" ::: "memory");
    leave(state, at);
    asm volatile("" ::: "memory");
}

inline void wait_for(Condition& condition, const char* at) {
    current->condition = &condition;
    wait(AT_CONDITION, at);
}

// Other warps run first.
inline void give_way() {
    gives_way = true;
    wait(READY, "");
}

inline unsigned index() { return static_cast<unsigned>(current - fibers); }
inline unsigned lane() { return index() % WARP_LANES; }
inline unsigned lanes_of(unsigned warp) {
    const unsigned rest = threads - warp * WARP_LANES;
    return rest < WARP_LANES ? rest : WARP_LANES;
}

// All lanes of the warp meet; returns what each of them brought.
inline const Slot* meet(const char* name, unsigned mask, const void* brought, size_t bytes) {
    Warp& warp = warps[index() / WARP_LANES];
    const unsigned there = 0xffffffffu >> (WARP_LANES - lanes_of(index() / WARP_LANES));
    if ((mask & there) != there) fail(name, "the mask must name all lanes");
    Slot* slots = warp.slots[warp.turn];
    memcpy(&slots[lane()], brought, bytes);
    wait(IN_WARP, name);
    return slots;
}

template <typename T>
T shuffle(const char* name, unsigned mask, T x, unsigned source) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "32 or 64 bits");
    memcpy(&x, &meet(name, mask, &x, sizeof x)[source], sizeof x);
    return x;
}

inline unsigned ballot(const char* name, unsigned mask, unsigned vote) {
    const Slot* votes = meet(name, mask, &vote, sizeof vote);
    unsigned bits = 0;
    for (unsigned i = 0; i < lanes_of(index() / WARP_LANES); i++) bits |= unsigned(votes[i].words[0] != 0) << i;
    return bits;
}

// Carries out the copies of all groups but the newest `left`, or all copies, ended by a commit or not.
inline void finish_copies(unsigned left, bool all = false) {
    Fiber& f = *current;
    unsigned done = 0;
    for (; done < f.copying && (all || f.copies[done].group + left < f.groups); done++) {
        const Copy& c = f.copies[done];
        if (c.global)
            memcpy(c.shared, c.global, 16);
        else
            memset(c.shared, 0, 16);
    }
    f.copying -= done;
    if (done) memmove(f.copies, f.copies + done, f.copying * sizeof(Copy));
}

inline void check_aligned(const char* name, const void* address) {
    if (reinterpret_cast<size_t>(address) % 16) fail(name, "an address that is no multiple of 16 bytes");
}

inline void queue_copy(void* shared, const void* global) {
    check_aligned("copy_async", shared);
    check_aligned("copy_async", global);
    Fiber& f = *current;
    if (f.copying == f.capacity) {
        f.capacity = f.capacity ? 2 * f.capacity : 16;
        f.copies = static_cast<Copy*>(realloc(f.copies, f.capacity * sizeof(Copy)));
    }
    f.copies[f.copying++] = {shared, global, f.groups};
    memset(shared, 0xff, 16);  // until waited for, neither the old nor the new may be read
}

static void body() {
    for (;;) {  // a turn for every block
        call(arguments);
        finish_copies(0, true);
        leave(ENDED, "");
    }
}

__attribute__((noinline)) static void run(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.thread;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks + index() * STACK;
    start.uc_stack.ss_size = STACK;
    makecontext(&start, body, 0);
    setcontext(&start);
}

inline unsigned random_below(unsigned n) {
    random_state = random_state * 1664525u + 1013904223u;
    return static_cast<unsigned>((static_cast<unsigned long long>(random_state) * n) >> 32);
}

inline void arrange(unsigned* turns, unsigned n) {
    for (unsigned i = 0; i < n; i++) turns[i] = order == REVERSED ? n - 1 - i : i;
    if (order != SHUFFLED) return;
    for (unsigned i = n; i > 1; i--) {
        const unsigned j = random_below(i), last = turns[i - 1];
        turns[i - 1] = turns[j];
        turns[j] = last;
    }
}

// Runs the lanes that can run; where all have come to the same instruction it is done. False: nothing to do.
inline bool step(unsigned w) {
    const unsigned lanes = lanes_of(w);
    Fiber* first = fibers + w * WARP_LANES;
    unsigned turns[WARP_LANES], met = 0;
    bool ran = false;
    arrange(turns, lanes);
    for (unsigned i = 0; i < lanes; i++) {
        Fiber& fiber = first[turns[i]];
        if (fiber.state != READY && !(fiber.state == AT_CONDITION && fiber.condition->holds())) continue;
        run(fiber);
        if (*error) return false;
        ran = true;
    }
    for (unsigned i = 0; i < lanes; i++) met += first[i].state == IN_WARP && !strcmp(first[i].at, first->at);
    if (met < lanes) return ran;
    for (unsigned i = 0; i < lanes; i++) first[i].state = READY;
    warps[w].turn ^= 1;
    return true;
}

// Every group of threads that wait at the same, or have ended.
static void report_deadlock() {
    static char text[900];
    bool told[MAX_THREADS] = {};
    int n = 0;
    for (unsigned i = 0; i < threads; i++)
        if (fibers[i].state == AT_CONDITION) fibers[i].at = fibers[i].condition->tell();
    for (unsigned i = 0; i < threads && n < 700; i++) {
        const Fiber& f = fibers[i];
        unsigned count = 0;
        for (unsigned j = i; j < threads; j++) {
            if (told[j] || fibers[j].state != f.state || strcmp(fibers[j].at, f.at)) continue;
            told[j] = true;
            count++;
        }
        if (!count) continue;
        n += snprintf(
            text + n, sizeof text - n, "%s thread (%u, %u, %u)", n ? ";" : "", f.thread.x, f.thread.y, f.thread.z);
        if (count > 1) n += snprintf(text + n, sizeof text - n, " and %u more", count - 1);
        n += snprintf(text + n, sizeof text - n, f.state == ENDED ? " ended" : " waits at %s", f.at);
    }
    report(": deadlock:%s", text);
}

static void run_block(char* shared, size_t shared_bytes, size_t dynamic_bytes) {
    memset(shared, 0xff, shared_bytes);
    memset(dynamic, 0xff, dynamic_bytes);
    unsigned char* guard = dynamic + dynamic_bytes;
    for (size_t i = 0; i < GUARD; i++) guard[i] = i % 2 ? 0x7f : 0xa5;  // a NaN too, but another one
    const unsigned n = (threads + WARP_LANES - 1) / WARP_LANES;
    if (threads % WARP_LANES) memset(&warps[n - 1], 0xff, sizeof(Warp::slots));  // what lanes that are not there bring
    for (unsigned w = 0; w < n; w++) warps[w].turn = 0;
    for (unsigned i = 0; i < threads; i++) {
        Fiber& f = fibers[i];
        f.state = READY;
        f.at = "";
        f.copying = f.groups = 0;
        f.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        memcpy(stacks + i * STACK, &CANARY, sizeof CANARY);
    }
    dynamic_size = dynamic_bytes;
    synchronizations = 0;
    if (at_start) at_start();
    for (unsigned at_barrier = threads; at_barrier == threads; synchronizations++) {
        for (unsigned i = 0; i < threads; i++) fibers[i].state = READY;
        for (bool ran = true; ran;) {
            ran = false;
            unsigned turns[MAX_THREADS / WARP_LANES];
            arrange(turns, n);
            for (unsigned i = 0; i < n; i++) {
                // A warp runs as far ahead as it can; shuffled, sometimes not.
                gives_way = false;
                while (step(turns[i])) {
                    ran = true;
                    if (gives_way || (order == SHUFFLED && random_below(4) == 0)) break;
                }
                if (*error) return;
            }
        }
        at_barrier = 0;
        for (unsigned i = 0; i < threads; i++) at_barrier += fibers[i].state == AT_BARRIER;
    }
    for (unsigned i = 0; i < threads; i++) {
        if (fibers[i].state != ENDED) return report_deadlock();
        current = &fibers[i];
        if (memcmp(stacks + i * STACK, &CANARY, sizeof CANARY)) return report(": a thread overran its stack");
    }
    if (at_end) at_end();
    for (size_t i = 0; i < GUARD; i++) {
        if (guard[i] == (i % 2 ? 0x7f : 0xa5)) continue;
        return report(": dynamic shared memory overrun: written at byte %zu of %zu", dynamic_bytes + i, dynamic_bytes);
    }
}

// This library's thread-local variables.
struct Statics {
    char* address;
    size_t bytes;
};
static int find_statics(dl_phdr_info* library, size_t, void* found) {
    bool here = false;
    const ElfW(Phdr)* statics = nullptr;
    for (int i = 0; i < library->dlpi_phnum; i++) {
        const ElfW(Phdr) & part = library->dlpi_phdr[i];
        if (part.p_type == PT_TLS) statics = &part;
        const size_t offset = reinterpret_cast<size_t>(fibers) - library->dlpi_addr - part.p_vaddr;
        here |= part.p_type == PT_LOAD && offset < part.p_memsz;
    }
    if (here) *static_cast<Statics*>(found) = {static_cast<char*>(library->dlpi_tls_data), statics->p_memsz};
    return here;
}

// Runs a kernel. Returns an error's text, empty if all went well.
static const char* launch(
    const char* name, const unsigned* grid, const unsigned* block, size_t dynamic_bytes, int order_, void** arguments_,
    void (*call_)(void**)) {
    kernel = name, order = static_cast<Order>(order_), call = call_, arguments = arguments_;
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]}, blockIdx = {0, 0, 0};
    random_state = 1;
    *error = 0;
    const unsigned long long wanted = 1ull * block[0] * block[1] * block[2],
                             blocks = 1ull * grid[0] * grid[1] * grid[2];
    if (wanted == 0 || wanted > MAX_THREADS) return report(": %llu threads in a block", wanted), error;
    if (blocks == 0 || blocks >> 32) return report(": %llu blocks", blocks), error;
    if (dynamic_bytes > MAX_DYNAMIC) return report(": %zu bytes of dynamic shared memory", dynamic_bytes), error;
    threads = static_cast<unsigned>(wanted);
    if (!stacks) {
        // One more than threads: where the first one's overrun goes.
        void* p = mmap(
            nullptr, (MAX_THREADS + 1) * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
            0);
        if (p == MAP_FAILED) return report(": no memory for stacks"), error;
        stacks = static_cast<char*>(p) + STACK;
    }
    touched = 0;
    Statics statics = {};
    dl_iterate_phdr(find_statics, &statics);
    unsigned* turns = static_cast<unsigned*>(malloc(blocks * sizeof(unsigned)));
    arrange(turns, static_cast<unsigned>(blocks));
    for (unsigned i = 0; i < blocks && !*error; i++) {
        blockIdx = {turns[i] % grid[0], turns[i] / grid[0] % grid[1], turns[i] / grid[0] / grid[1]};
        run_block(statics.address, statics.bytes, dynamic_bytes);
    }
    free(turns);
    if (*error)
        for (Fiber& f : fibers) f.started = false;  // some stopped midway: they start anew
    return error;
}

template <typename To, typename From>
To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &x, sizeof to);
    return to;
}

}  // namespace shim

// What the compiler's checks call (-fsanitize=alignment,bounds); the first of their data is a place in the
// source.
struct Place {
    const char* file;
    unsigned line, column;
};
inline void fail_at(const Place* place, const char* why) {
    static char text[400];
    snprintf(text, sizeof text, "%s:%u", place->file, place->line);
    shim::fail(text, why);
}
extern "C" {
__attribute__((used)) void __ubsan_handle_type_mismatch_v1(void* at, void*) {
    fail_at(static_cast<Place*>(at), "an address that is not a multiple of the type's size");
}
__attribute__((used)) void __ubsan_handle_out_of_bounds(void* at, void*) {
    fail_at(static_cast<Place*>(at), "an index outside the array");
}
}

inline void __syncthreads() { shim::wait(shim::AT_BARRIER, "__syncthreads"); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::meet("__syncwarp", mask, nullptr, 0); }
inline void __threadfence() {}

// A source outside the lane's group of `width` means the lane itself (PTX ISA, shfl.sync).
template <typename T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
    return shim::shuffle("__shfl_sync", mask, x, (shim::lane() & -width) | (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int flips, int width = 32) {
    const unsigned l = shim::lane(), source = l ^ flips;
    return shim::shuffle("__shfl_xor_sync", mask, x, source <= (l | (width - 1)) ? source : l);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) {
    const unsigned l = shim::lane();
    return shim::shuffle("__shfl_down_sync", mask, x, l + by <= (l | (width - 1)) ? l + by : l);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) {
    const unsigned l = shim::lane();
    return shim::shuffle("__shfl_up_sync", mask, x, (l & (width - 1)) >= by ? l - by : l);
}
inline unsigned __ballot_sync(unsigned mask, int vote) { return shim::ballot("__ballot_sync", mask, vote != 0); }
inline int __any_sync(unsigned mask, int vote) { return shim::ballot("__any_sync", mask, vote != 0) != 0; }
inline int __all_sync(unsigned mask, int vote) { return shim::ballot("__all_sync", mask, vote == 0) == 0; }

// Integers alone: sums of floats must not depend on an order, so the kernels have no use for the others.
inline int atomicAdd(int* p, int x) { return (*p += x) - x; }
inline unsigned atomicAdd(unsigned* p, unsigned x) { return (*p += x) - x; }

inline float __uint_as_float(unsigned x) { return shim::bits<float>(x); }
inline float __int_as_float(int x) { return shim::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return shim::bits<unsigned>(x); }
inline int __float_as_int(float x) { return shim::bits<int>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((1ull * a * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
#define __expf(x) expf(x)
#define __logf(x) logf(x)

template <typename T>
T __ldg(const T* p) {
    return *p;
}
template <typename T>
T __ldcs(const T* p) {
    return *p;
}
template <typename T>
T __ldcg(const T* p) {
    return *p;
}
template <typename T>
void __stcs(T* p, std::common_type_t<T> x) {
    *p = x;
}

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>)
        return fmin(T(a), T(b));
    else
        return T(a) < T(b) ? T(a) : T(b);
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>)
        return fmax(T(a), T(b));
    else
        return T(a) > T(b) ? T(a) : T(b);
}
