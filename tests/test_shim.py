"""The CPU stand-in for CUDA tells the truth: what it computes is right, and what it is to find it finds."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.shim import ORDERS, ShimError, ShimModule, set_order, tensor_map

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")

COMMON = Path(__file__).parent.parent / "kernels_cu"
BF16 = ml_dtypes.bfloat16
ROW = 24  # a padded row of the shared tiles, in elements

SOURCE = r"""
#include <common.cuh>

extern "C" __global__ void shuffles(int* out, long long* wide, unsigned* votes) {
    const int i = threadIdx.x, n = blockDim.x;
    out[i] = __shfl_sync(ALL_LANES, i, i + 1);
    out[n + i] = __shfl_xor_sync(ALL_LANES, i, 5);
    out[2 * n + i] = __shfl_down_sync(ALL_LANES, i, 3, 16);
    out[3 * n + i] = __shfl_up_sync(ALL_LANES, i, 3, 8);
    wide[i] = __shfl_xor_sync(ALL_LANES, (1ll << 40) + i, 1);
    votes[3 * i] = __ballot_sync(ALL_LANES, i % 3 == 0);
    votes[3 * i + 1] = __any_sync(ALL_LANES, i == 40);
    votes[3 * i + 2] = __all_sync(ALL_LANES, i < 40);
}

extern "C" __global__ void __launch_bounds__(256) sums(const float* x, float* sum, float* most, double* wide) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    sum[i] = block_sum(x[i]);
    most[i] = block_max(x[i]);
    wide[i] = block_sum(static_cast<double>(x[i]));
}

// Each thread takes what the thread on the other side of the block wrote, twice.
extern "C" __global__ void mirror(int* out, int first, int second) {
    __shared__ int all[256];
    const int i = threadIdx.x, other = blockDim.x - 1 - i;
    all[i] = i;
    if (first) __syncthreads();
    const int got = all[other];
    if (second) __syncthreads();
    all[i] = -i;
    __syncthreads();
    out[i] = got - all[other];
}

extern "C" __global__ void mirror_warp(int* out, int synchronize) {
    __shared__ int all[WARP];
    all[threadIdx.x] = threadIdx.x;
    if (synchronize) __syncwarp();
    out[threadIdx.x] = all[WARP - 1 - threadIdx.x];
}

// A 16 x 16 times B (transposed in memory if asked: 8 x 16, else 16 x 8), through padded shared memory.
extern "C" __global__ void product(const bf16* a, const bf16* b, float* d, int b_rows_are_k) {
    constexpr int ROW = 24;
    __shared__ __align__(16) bf16 as[16 * ROW], bs[16 * ROW];
    const int l = threadIdx.x, g = l / 4, t = l % 4, columns = b_rows_are_k ? 8 : 16;
    for (int i = l; i < 256; i += WARP) as[i / 16 * ROW + i % 16] = a[i];
    for (int i = l; i < 128; i += WARP) bs[i / columns * ROW + i % columns] = b[i];
    __syncwarp();
    unsigned fa[4], fb[4];
    load_matrices(fa, as + l % 16 * ROW + l / 16 * 8);
    // Matrices 0 and 1 are B's two halves; 2 and 3 the same once more.
    if (b_rows_are_k) load_matrices_transposed(fb, bs + l % 16 * ROW);
    else load_matrices(fb, bs + l % 8 * ROW + l / 8 % 2 * 8);
    float sum[4] = {d[g * 8 + 2 * t], d[g * 8 + 2 * t + 1], d[(g + 8) * 8 + 2 * t], d[(g + 8) * 8 + 2 * t + 1]};
    mma_16x8x16(sum, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// Thread i copies pack i in group 0 and once more in group 1; reads both with one group left under way, then with none.
// Then it reads what a third copy is about to write over.
extern "C" __global__ void copies(const float* x, float* out, int valid) {
    DYNAMIC_SHARED(float, tile);
    const int i = threadIdx.x, n = 4 * blockDim.x;
    for (int group = 0; group < 2; group++) {
        copy_async(tile + group * n + 4 * i, x + 4 * i, i < valid);
        copy_async_commit();
    }
    for (int j = 0; j < 4; j++) out[4 * i + j] = tile[4 * i + j];
    copy_async_wait<1>();
    for (int j = 0; j < 4; j++) out[n + 4 * i + j] = tile[4 * i + j];
    for (int j = 0; j < 4; j++) out[2 * n + 4 * i + j] = tile[n + 4 * i + j];
    copy_async_wait<0>();
    for (int j = 0; j < 4; j++) out[3 * n + 4 * i + j] = tile[n + 4 * i + j];
    copy_async(tile + 4 * i, x + 4 * i, i < valid);
    for (int j = 0; j < 4; j++) out[4 * n + 4 * i + j] = tile[4 * i + j];
}

extern "C" __global__ void round_all(const float* x, unsigned* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = pack_bf16(x[i], -x[i]);
}

extern "C" __global__ void leaves_early(int n) {
    if (threadIdx.x == n) return;
    __syncthreads();
}

extern "C" __global__ void lane_alone(float* out) {
    if (threadIdx.x == 3 && threadIdx.y == 1) out[0] = warp_sum(1.0f);
    __syncthreads();
}

extern "C" __global__ void overruns(int at) {
    DYNAMIC_SHARED(char, bytes);
    bytes[at] = 1;
}

extern "C" __global__ void strays(uint4* out, int by, int at) {
    __shared__ int few[4];
    if (at < 9) few[at] = 1;
    *reinterpret_cast<uint4*>(reinterpret_cast<bf16*>(out) + by) = make_uint4(1, 2, 3, few[0]);
}

template <typename T>
__device__ T* uninitialised() {
    __shared__ T x[2];
    return x;
}

extern "C" __global__ void reads_unwritten(float* out) {
    __shared__ float fixed;
    DYNAMIC_SHARED(float, dynamic);
    float* of_template = uninitialised<float>();
    bf16* narrow = uninitialised<bf16>();
    float* all = out + 4 * blockIdx.x;
    all[0] = fixed, all[1] = dynamic[0], all[2] = of_template[1], all[3] = widen(narrow[1]);
    fixed = dynamic[0] = of_template[1] = 1.0f;  // the next block must not find it
    narrow[1].bits = 0;
}

extern "C" __global__ void turns(int* blocks, unsigned* threads, unsigned* turn, bf16* unused, long long add) {
    const int block = blockIdx.y * gridDim.x + blockIdx.x, size = blockDim.x * blockDim.y * blockDim.z;
    const int i = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    if (i == 0) atomicAdd(blocks, 1);
    turn[block * size + i] = atomicAdd(threads, static_cast<unsigned>(add));
}
"""
KERNELS = {
    "shuffles": ["int*", "long long*", "unsigned*"],
    "sums": ["const float*", "float*", "float*", "double*"],
    "mirror": ["int*", "int", "int"],
    "mirror_warp": ["int*", "int"],
    "product": ["const bf16*", "const bf16*", "float*", "int"],
    "copies": ["const float*", "float*", "int"],
    "round_all": ["const float*", "unsigned*", "int"],
    "leaves_early": ["int"],
    "lane_alone": ["float*"],
    "overruns": ["int"],
    "strays": ["uint4*", "int", "int"],
    "reads_unwritten": ["float*"],
    "turns": ["int*", "unsigned*", "unsigned*", "bf16*", "long long"],
}
ONE = (1, 1, 1)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ShimModule:
    source = tmp_path_factory.mktemp("shim") / "kernels.cu"
    source.write_text(SOURCE)
    return ShimModule(source, {}, [COMMON], KERNELS)


@pytest.fixture(params=ORDERS, autouse=True)
def order(request: pytest.FixtureRequest):
    set_order(request.param)
    yield request.param
    set_order(ORDERS[0])


def test_shuffles_and_votes(shim):
    n = 64
    out, wide, votes = np.zeros((4, n), np.int32), np.zeros(n, np.int64), np.zeros((n, 3), np.uint32)
    shim.launch("shuffles", ONE, (n, 1, 1), 0, [out, wide, votes])
    i = np.arange(n)
    np.testing.assert_array_equal(out[0], i // 32 * 32 + (i + 1) % 32)
    np.testing.assert_array_equal(out[1], i ^ 5)
    np.testing.assert_array_equal(out[2], np.where(i % 16 < 13, i + 3, i))
    np.testing.assert_array_equal(out[3], np.where(i % 8 >= 3, i - 3, i))
    np.testing.assert_array_equal(wide, (1 << 40) + (i ^ 1))
    ballots = [sum(1 << lane for lane in range(32) if (first + lane) % 3 == 0) for first in (0, 32)]
    np.testing.assert_array_equal(votes, [[ballots[k // 32], k >= 32, k < 32] for k in i])


def test_block_reductions(shim):
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    total, most, wide = np.zeros_like(x), np.zeros_like(x), np.zeros(x.shape)
    shim.launch("sums", (3, 1, 1), (256, 1, 1), 0, [x, total, most, wide])
    np.testing.assert_allclose(total, np.broadcast_to(x.sum(1, keepdims=True), x.shape), rtol=1e-5)
    assert (total == total[:, :1]).all()
    np.testing.assert_array_equal(most, np.broadcast_to(x.max(1, keepdims=True), x.shape))
    np.testing.assert_allclose(wide, np.broadcast_to(x.sum(1, keepdims=True, dtype=np.float64), x.shape), rtol=1e-12)


def mirrored(shim, first: int, second: int) -> bool:
    out = np.zeros(256, np.int32)
    shim.launch("mirror", ONE, (256, 1, 1), 0, [out, np.int32(first), np.int32(second)])
    return bool((out == 2 * np.arange(256)[::-1]).all())


def test_missing_barriers_show_in_every_order(shim):
    assert mirrored(shim, 1, 1)
    assert not mirrored(shim, 0, 1)  # a read too early
    assert not mirrored(shim, 1, 0)  # a write too early


def test_a_missing_warp_barrier_shows(shim):
    out = np.zeros(32, np.int32)
    for synchronize in (0, 1):
        shim.launch("mirror_warp", ONE, (32, 1, 1), 0, [out, np.int32(synchronize)])
        assert (out == np.arange(32)[::-1]).all() == synchronize


@pytest.mark.parametrize("b_rows_are_k", [0, 1])
def test_matrix_fragments(shim, b_rows_are_k):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((16, 16)).astype(BF16), rng.standard_normal((16, 8)).astype(BF16)
    start = rng.standard_normal((16, 8)).astype(np.float32)
    d = start.copy()
    shim.launch(
        "product", ONE, (32, 1, 1), 0, [a, np.ascontiguousarray(b if b_rows_are_k else b.T), d, np.int32(b_rows_are_k)]
    )
    expected = start.copy()
    for k in range(16):
        expected += a[:, k : k + 1].astype(np.float32) * b[k].astype(np.float32)
    np.testing.assert_array_equal(d, expected)


def test_copies_come_when_waited_for(shim):
    x = np.arange(1, 161, dtype=np.float32)  # of 40 threads: a warp and a quarter
    valid = 25
    out = np.zeros((5, 160), np.float32)
    shim.launch("copies", ONE, (40, 1, 1), 2 * x.nbytes, [x, out, np.int32(valid)])
    expected = np.where(np.arange(160) < 4 * valid, x, 0)
    assert np.isnan(out[0]).all()  # no wait
    np.testing.assert_array_equal(out[1], expected)
    assert np.isnan(out[2]).all()  # waited, but not for this group
    np.testing.assert_array_equal(out[3], expected)
    assert np.isnan(out[4]).all()  # neither the old nor the new can be relied on


def test_copies_that_are_not_valid_do_not_read(shim):
    out = np.ones((5, 32), np.float32)
    shim.launch("copies", ONE, (8, 1, 1), 256, [np.uintp(16), out, np.int32(0)])  # nobody's address
    assert (out[[1, 3]] == 0).all()


def test_rounding_to_bf16(shim):
    bits = np.random.default_rng(2).integers(0, 1 << 32, 10_000, dtype=np.uint32)
    bits[:4096:2] = bits[:4096:2] & 0xFFFF0000 | 0x8000  # ties
    bits[1:1000:2] &= 0x807FFFFF  # denormals
    bits[1001:2000:2] |= 0x7F800000  # NaN
    bits[-8:] = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0xFF7FFFFF]
    x, out = bits.view(np.float32), np.zeros(bits.size, np.uint32)
    shim.launch("round_all", (40, 1, 1), (256, 1, 1), 0, [x, out, np.int32(x.size)])
    halves = out.view(np.uint16).reshape(-1, 2)
    nan = np.isnan(x)
    assert 400 < nan.sum() < 1000
    for half, value in ((0, x), (1, -x)):
        with np.errstate(invalid="ignore"):
            expected = value.astype(BF16).view(np.uint16)
        np.testing.assert_array_equal(halves[~nan, half], expected[~nan])
        assert np.isnan(halves[nan, half].copy().view(BF16)).all()


def test_deadlocks_are_named(shim):
    with pytest.raises(
        ShimError,
        match=r"leaves_early, block \(\d, 0, 0\): deadlock: thread \(0, 0, 0\) and 38 more waits at __syncthreads; "
        r"thread \(33, 0, 0\) ended",
    ):
        shim.launch("leaves_early", (2, 1, 1), (40, 1, 1), 0, [np.int32(33)])
    with pytest.raises(ShimError, match=r"thread \(3, 1, 0\) waits at __shfl_xor_sync"):
        shim.launch("lane_alone", ONE, (16, 2, 1), 0, [np.zeros(1, np.float32)])
    shim.launch("leaves_early", (2, 1, 1), (40, 1, 1), 0, [np.int32(-1)])  # and all is well afterwards


def test_overruns_of_shared_memory_are_found(shim):
    shim.launch("overruns", ONE, ONE, 100, [np.int32(99)])
    with pytest.raises(ShimError, match=r"overruns.*written at byte 103 of 100"):
        shim.launch("overruns", ONE, ONE, 100, [np.int32(103)])


def test_strays_are_found(shim):
    out = np.zeros(16, np.float32)
    out = out[-(out.ctypes.data // 4) % 4 :]  # from a multiple of 16 bytes on
    shim.launch("strays", ONE, ONE, 0, [out, np.int32(8), np.int32(3)])
    with pytest.raises(ShimError, match=r"kernels.cu:\d+: an address that is not a multiple"):
        shim.launch("strays", ONE, ONE, 0, [out, np.int32(4), np.int32(3)])
    with pytest.raises(ShimError, match=r"kernels.cu:\d+: an index outside the array"):
        shim.launch("strays", ONE, ONE, 0, [out, np.int32(0), np.int32(4)])


def test_unwritten_shared_memory_is_nan(shim):
    out = np.zeros((3, 4), np.float32)
    shim.launch("reads_unwritten", (3, 1, 1), ONE, 4, [out])
    assert np.isnan(out).all()


def test_turns_grids_and_integer_atomics(shim, order):
    n = 6 * 70
    blocks, threads, turn = np.zeros(1, np.int32), np.zeros(1, np.uint32), np.zeros(n, np.uint32)
    shim.launch("turns", (3, 2, 1), (5, 7, 2), 0, [blocks, threads, turn, np.uintp(0), np.int64(2)])
    assert (blocks[0], threads[0]) == (6, 2 * n)
    forward = 2 * np.arange(n)
    assert (turn == forward).all() == (order == "forward")
    assert (turn == forward[::-1]).all() == (order == "reversed")
    np.testing.assert_array_equal(np.sort(turn), forward)


def test_what_does_not_fit_is_refused(shim, tmp_path):
    with pytest.raises(ShimError, match="1 bytes, the parameter 4"):
        shim.launch("overruns", ONE, ONE, 100, [np.int8(3)])
    with pytest.raises(ShimError, match="takes 1 arguments"):
        shim.launch("overruns", ONE, ONE, 100, [])
    with pytest.raises(ShimError, match="1056 threads"):
        shim.launch("overruns", ONE, (1056, 1, 1), 100, [np.int32(3)])
    source = tmp_path / "wrong.cu"
    source.write_text('extern "C" __global__ void f(float* x) { atomicAdd(x, 1.0f); }')
    with pytest.raises(ShimError, match="atomicAdd"):
        ShimModule(source, {}, [COMMON], {"f": ["float*"]})
    source.write_text('extern "C" __global__ void f(float* x) {}')
    with pytest.raises(ShimError, match="f has other parameters"):
        ShimModule(source, {}, [COMMON], {"f": ["int*"]})


# A pipeline as kernels have it: the first warp copies tiles of k and v, two stages ahead at most; each of two
# warpgroups takes 64 rows of q, s = q k^T, and o += s v with s rounded to bf16. `mistake` is one of MISTAKES.
PIPELINE = r"""
#include <common.cuh>
#include <hopper.cuh>

enum { MISTAKES };

// Boxes begin at multiples of 1,024 bytes, dynamic shared memory wherever the other ends.
template <typename T>
__device__ T* aligned(T* p) {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(p) + (-shared_address(p) & 1023));
}

template <int KEYS, int HS>
__device__ void pipeline(
    const bf16* q, const unsigned long long* k_map, const unsigned long long* v_map, float* s_out, float* o_out, int T,
    int mistake) {
    constexpr int STAGES = 2, BOX = KEYS * 128, TILE = HS / 64 * BOX, N_S = KEYS / 8, N_O = HS / 8;
    __shared__ Barrier full[STAGES], empty[STAGES];
    DYNAMIC_SHARED(char, bytes);
    char* tiles = aligned(bytes);
    const int count = (T + KEYS - 1) / KEYS, head = blockIdx.x, warp = threadIdx.x / WARP - 4, l = threadIdx.x % WARP;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            if (mistake != NOT_MADE || i == 0) barrier_make(full[i], 1);
            barrier_make(empty[i], 8);
        }
        if (mistake != NOT_PUBLISHED) barriers_made();
    }
    if (mistake != NOT_SYNCHRONIZED) __syncthreads();
    if (warp < 0) {
        if (threadIdx.x != 0) return;
        for (int tile = 0; tile < count; tile++) {
            const int stage = tile % STAGES;
            char* k = tiles + stage * 2 * TILE + (mistake == BOX_AMID_ROWS ? 128 : 0);
            if (mistake != NO_WAIT_FOR_ROOM) barrier_wait(empty[stage], tile / STAGES % 2 ^ 1);
            if (mistake == NO_EXPECTATION) barrier_arrive(full[stage]);
            else
                barrier_arrive_expecting(
                    full[stage], 2 * TILE + (mistake == TOO_MANY_BYTES) * 16 - (mistake == TOO_FEW_BYTES) * 16);
            for (int x = 0; x < HS; x += 64) {
                copy_box(k + x / 64 * BOX, k_map, x, tile * KEYS, head, full[stage]);
                copy_box(k + TILE + x / 64 * BOX, v_map, x, tile * KEYS, head, full[stage]);
            }
        }
        return;
    }
    unsigned a[HS / 16][4], p[KEYS / 16][4];
    float s[N_S][4], o[N_O][4];
    const int row = warp * 16 + l / 4, column = l % 4 * 2;
    for (int i = 0; i < HS / 16 * 4; i++)
        a[i / 4][i % 4] = *reinterpret_cast<const unsigned*>(
            q + (head * 128 + row + i % 2 * 8) * HS + i / 4 * 16 + i % 4 / 2 * 8 + column);
    for (int tile = 0; tile < count; tile++) {
        const int stage = tile % STAGES;
        const char *k = tiles + stage * 2 * TILE, *v = k + TILE;
        if (mistake != NO_WAIT_FOR_BOX) barrier_wait(full[stage], tile / STAGES % 2 ^ (mistake == WRONG_PARITY));
        if (mistake != NO_BEGIN) products_begin();
        for (int i = 0; i < HS / 16; i++) {
            unsigned long long b = factor(k + i / 4 * BOX + i % 4 * 32);
            if (mistake == NO_SWIZZLE) b &= ~(3ull << 62);
            if (mistake == LANES_DIFFER && l == 3) b++;
            product_64x16<false>(s, a[i], b, i > 0);
        }
        products_commit();
        if (mistake == DONE_EARLY) products_done(s);
        if (mistake == WRITES_A_EARLY) a[0][0]++;
        if (mistake == WRITES_D_EARLY) s[0][0] = 1.0f;
        if (mistake == READS_D_EARLY) s_out[0] = s[0][0];
        if (mistake == RELEASES_EARLY && l == 0) barrier_arrive(empty[stage]);
        products_wait<0>();
        products_done(s);
        for (int i = 0; i < N_S * 4 && mistake != READS_D_EARLY; i++) {
            const int key = tile * KEYS + i / 4 * 8 + column + i % 2;
            if (key < T) s_out[(head * 128 + row + i % 4 / 2 * 8) * T + key] = s[i / 4][i % 4];
        }
        for (int i = 0; i < KEYS / 16; i++)
            for (int j = 0; j < 4; j++)
                p[i][j] = pack_bf16(s[2 * i + j / 2][j % 2 * 2], s[2 * i + j / 2][j % 2 * 2 + 1]);
        products_begin();
        for (int i = 0; i < KEYS / 16; i++)
            product_64x16<true>(
                o, p[i], factor(v + i * 2048, mistake == NO_ASIDE ? 0 : mistake == WRONG_ASIDE ? 1024 : BOX),
                tile > 0 || i > 0);
        products_commit();
        if (mistake != NO_WAIT_FOR_PRODUCTS || tile < count - 1) products_wait<0>();
        if (mistake != NO_WAIT_FOR_PRODUCTS) products_done(o);
        if (mistake != RELEASES_EARLY && l == 0) barrier_arrive(empty[stage]);
        if (mistake == ARRIVES_TWICE && l == 0) barrier_arrive(empty[stage]);
    }
    for (int i = 0; i < N_O * 4; i++)
        o_out[(head * 128 + row + i % 4 / 2 * 8) * HS + i / 4 * 8 + column + i % 2] = o[i / 4][i % 4];
}

#define PIPELINE(keys, hs) \
    extern "C" __global__ void pipeline_##keys##_##hs( \
        const bf16* q, const unsigned long long* k_map, const unsigned long long* v_map, float* s, float* o, int T, \
        int mistake) { \
        pipeline<keys, hs>(q, k_map, v_map, s, o, T, mistake); \
    }
PIPELINE(64, 64)
PIPELINE(64, 128)
PIPELINE(128, 64)
PIPELINE(128, 128)

// One box, as it lies in shared memory; every thread waits.
extern "C" __global__ void box(const unsigned long long* map, unsigned* out, int bytes, int x, int y, int z) {
    DYNAMIC_SHARED(unsigned, unaligned);
    unsigned* words = aligned(unaligned) + 256;
    __shared__ Barrier there;
    for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) words[i] = 1;
    if (threadIdx.x == 40) {
        barrier_make(there, 1);
        barriers_made();
    }
    __syncthreads();
    if (threadIdx.x == 40) {
        copy_box(words, map, x, y, z, there);  // before the barrier knows of it
        barrier_arrive_expecting(there, bytes);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) out[i] = words[i];
    __syncthreads();
    barrier_wait(there, 0);
    for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) out[bytes / 4 + i] = words[i];
}

// One box of rows that are spread.
extern "C" __global__ void spread(const unsigned long long* map, uint4* out, int bytes, int x, int row) {
    DYNAMIC_SHARED(uint4, unaligned);
    uint4* packs = aligned(unaligned);
    __shared__ Barrier there;
    if (threadIdx.x == 0) {
        barrier_make(there, 1);
        barriers_made();
        barrier_arrive_expecting(there, bytes);
        copy_spread_to_all(1, packs, map, x, row, there);
    }
    __syncthreads();
    barrier_wait(there, 0);
    for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) out[i] = packs[i / 8 * 8 + (i % 8 ^ i / 8 % 8)];
}

// Some of x, to some of the words; every thread waits, or none.
extern "C" __global__ void some_bytes(
    const float* x, float* out, int count, int expected, int from, int to, int publishes, int waits) {
    __shared__ __align__(16) float words[16];
    __shared__ Barrier there;
    const int i = threadIdx.x;
    words[i] = 1;
    if (i == 3) {
        barrier_make(there, 1);
        if (publishes) barriers_made();
    }
    __syncthreads();
    if (i == 3) {
        copy_bytes(words + to, x + from, count, there);  // before the barrier knows of it
        barrier_arrive_expecting(there, expected);
    }
    __syncthreads();
    out[i] = words[i];
    __syncthreads();
    if (waits) barrier_wait(there, 0);
    out[16 + i] = words[i];
}

// Two groups under way, of which the older is waited for first.
extern "C" __global__ void groups(float* out) {
    DYNAMIC_SHARED(bf16, everything);
    bf16* b = aligned(everything);
    for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) narrow(b[i], 1.0f);
    __syncthreads();
    const unsigned a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    float d[2][8][4] = {};
    for (int i = 0; i < 2; i++) {
        products_begin();
        product_64x16<false>(d[i], a, factor(b), false);
        product_64x16<true>(d[i], a, factor(b), true);
        products_commit();
    }
    float* mine = out + threadIdx.x * 4;
    products_wait<1>();
    products_done(d[0]);
    mine[0] = d[0][7][3], mine[1] = d[1][7][3];
    products_wait<0>();
    products_done(d[1]);
    mine[2] = d[0][7][3], mine[3] = d[1][7][3];
}

extern "C" __global__ void exponentials(const float* x, float* out) {
    out[threadIdx.x] = exp2_fast(x[threadIdx.x]);
}
"""
MISTAKES = (
    *("none", "no wait for box", "no expectation", "wrong parity", "no aside", "wrong aside", "no swizzle"),
    *("no wait for products", "no begin", "releases early", "writes a early", "reads d early", "writes d early"),
    *("not made", "not published", "not synchronized", "arrives twice", "too many bytes", "too few bytes"),
    *("no wait for room", "box amid rows", "done early", "lanes differ"),
)
MAP = "const unsigned long long*"
PIPELINES = {
    f"pipeline_{keys}_{hs}": ["const bf16*", MAP, MAP, "float*", "float*", "int", "int"]
    for keys in (64, 128)
    for hs in (64, 128)
}


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> ShimModule:
    source = tmp_path_factory.mktemp("shim") / "hopper.cu"
    names = ", ".join(mistake.upper().replace(" ", "_") for mistake in MISTAKES)
    source.write_text(PIPELINE.replace("enum { MISTAKES }", f"enum {{ {names} }}"))
    others = {
        "box": [MAP, "unsigned*", "int", "int", "int", "int"],
        "spread": [MAP, "uint4*", "int", "int", "int"],
        "some_bytes": ["const float*", "float*", *6 * ["int"]],
        "groups": ["float*"],
        "exponentials": ["const float*", "float*"],
    }
    return ShimModule(source, {}, [COMMON], {**PIPELINES, **others})


def small_integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Whose sums of products are exact in fp32, in any order, and s in bf16 too."""
    return rng.integers(-1, 2, shape).astype(BF16)


def run_pipeline(hopper, keys: int, hs: int, mistake: str = "none", T: int = 200) -> tuple[np.ndarray, ...]:
    """What came and what should have: (s, o, s, o), of two heads, with k and v interleaved in one tensor."""
    rng = np.random.default_rng(3)
    q, kv = small_integers(rng, 2, 128, hs), small_integers(rng, 2, T, 2, hs)
    k, v = kv[:, :, 0], kv[:, :, 1]
    s, o = np.zeros((2, 128, T), np.float32), np.zeros((2, 128, hs), np.float32)
    maps = [tensor_map(x, (hs, T, 2), x.strides[1::-1], (64, keys, 1)) for x in (k, v)]
    shared = 1024 + 4 * keys * hs * 2
    hopper.launch(
        f"pipeline_{keys}_{hs}",
        (2, 1, 1),
        (384, 1, 1),
        shared,
        [q, *maps, s, o, np.int32(T), np.int32(MISTAKES.index(mistake))],
    )
    wide = [x.astype(np.float32) for x in (q, k, v)]
    s_true = wide[0] @ wide[1].swapaxes(1, 2)
    return s, o, s_true, s_true.astype(BF16).astype(np.float32) @ wide[2]


@pytest.mark.parametrize(("keys", "hs"), [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_pipeline_of_boxes_and_products(hopper, keys, hs):
    s, o, s_true, o_true = run_pipeline(hopper, keys, hs)
    np.testing.assert_array_equal(s, s_true)
    np.testing.assert_array_equal(o, o_true)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("no wait for box", "a factor is a box that no wait|deadlock: thread .0, 0, 0. waits at barrier_wait"),
        ("no expectation", "a factor is a box that no wait|barrier_wait.*lacks 0 arrivals, -65536 bytes"),
        ("wrong parity", "a factor is a box that no wait|barrier_wait.*lacks 8 arrivals, 0 bytes"),
        ("no aside", "factor was not told"),
        ("no swizzle", "no descriptor with a swizzle"),
        ("no wait for products", "never waited for 4 products"),
        ("no begin", "no products_begin"),
        ("releases early", "products_wait: b was written|products_wait: a factor is a box that no wait"),
        ("writes a early", "a was written"),
        ("writes d early", "d was written"),
        ("not made", "there is no barrier"),
        ("not published", "without barriers_made"),
        ("not synchronized", "without a __syncthreads|there is no barrier"),
        ("arrives twice", "products_wait: a factor is a box that no wait|barrier_wait.*lacks 1 arrivals, 0 bytes"),
        ("too many bytes", "barrier_wait.*lacks 0 arrivals, 16 bytes"),
        ("too few bytes", "barrier_wait.*lacks 0 arrivals, -16 bytes"),
        ("no wait for room", "barrier_arrive_expecting: more arrivals"),
        ("box amid rows", "multiple of 1,024 bytes"),
        ("done early", "products_done"),
        ("lanes differ", "lanes of a warp ask for different"),
    ],
)
def test_mistakes_in_a_pipeline_are_found(hopper, mistake, message):
    with pytest.raises(ShimError, match=message):
        run_pipeline(hopper, 64, 128, mistake)
    run_pipeline(hopper, 64, 128)  # and all is well afterwards


def test_mistakes_in_a_pipeline_show_in_numbers(hopper):
    _, o, _, o_true = run_pipeline(hopper, 64, 128, "wrong aside")
    np.testing.assert_array_equal(o[..., :64], o_true[..., :64])
    assert (o[..., 64:] != o_true[..., 64:]).mean() > 0.5
    s, _, _, _ = run_pipeline(hopper, 64, 128, "reads d early")
    assert np.isnan(s[0, 0, 0])


@pytest.mark.parametrize("corner", [(0, 0, 0), (64, 5, 1), (-8, -3, 0), (40, 30, 2), (3, 0, -1), (200, 0, 0)])
def test_boxes_are_swizzled_and_zero_outside(hopper, corner):
    x = np.arange(1, 3 * 40 * 96 + 1, dtype=np.uint16).reshape(3, 40, 96)
    dims, box = (72, 37, 3), (64, 12, 2)  # not all of a row, not all rows
    out = np.zeros((2, 2 * 12 * 64), np.uint16)
    arguments = [np.int32(n) for n in (out[0].nbytes, *corner)]
    hopper.launch(
        "box", ONE, (64, 1, 1), 2048 + out[0].nbytes, [tensor_map(x, dims, (192, 192 * 40), box), out, *arguments]
    )
    assert (out[0] == 0xFFFF).all()  # no wait yet: neither the old nor the new
    where = np.meshgrid(*(np.arange(n) + at for n, at in zip(box[::-1], corner[::-1], strict=True)), indexing="ij")
    inside = np.all([(at >= 0) & (at < n) for at, n in zip(where, dims[::-1], strict=True)], axis=0)
    rows = np.where(inside, x[tuple(at * inside for at in where)], 0).reshape(24, 8, 8)
    swizzled = np.stack([row[np.arange(8) ^ r % 8] for r, row in enumerate(rows)])
    np.testing.assert_array_equal(out[1].reshape(24, 8, 8), swizzled)


@pytest.mark.parametrize("row", [0, 32, 64])
def test_rows_come_spread(hopper, row):
    """Of each 32 the columns that a thread has of a product are eight side by side, beyond the last row zeros."""
    x = np.arange(96 * 80, dtype=np.uint16).reshape(96, 80)
    map_of_x = tensor_map(x, (80, 2, 4, 4, 3), [160 * rows for rows in (1, 8, 2, 32)], (64, 2, 4, 4, 2))
    out = np.zeros((64, 64), np.uint16)
    hopper.launch("spread", ONE, (64, 1, 1), 1024 + out.nbytes, [map_of_x, out, *map(np.int32, (out.nbytes, 16, row))])
    lane, n, i = np.meshgrid(range(4), range(8), range(2), indexing="ij")
    columns = out[8 * n + 2 * lane + i].reshape(4, 2, 8, 64)  # of a lane's eights
    rows = row + np.arange(4)[:, None, None] * 8 + np.arange(2)[:, None] * 32 + np.arange(8)
    expected = np.where((rows < 96)[..., None], x[np.minimum(rows, 95), 16:], 0)
    np.testing.assert_array_equal(columns, expected)
    with pytest.raises(ShimError, match="no multiple of 32"):
        hopper.launch("spread", ONE, (64, 1, 1), 1024 + out.nbytes, [map_of_x, out, *map(np.int32, (8192, 16, 8))])


def copy_bytes(hopper, count=32, expected=32, at=4, to=4, publishes=1, waits=1) -> np.ndarray:
    """16 words, before the wait and after it: 1, but from `to` on what lies at 0, 1, 2, ... from `at` on."""
    x, out = np.arange(20, dtype=np.float32), np.zeros((2, 16), np.float32)
    x = x[-(x.ctypes.data // 4) % 4 :]  # from a multiple of 16 bytes on
    x -= x[0]
    arguments = [np.int32(n) for n in (count, expected, at, to, publishes, waits)]
    hopper.launch("some_bytes", ONE, (16, 1, 1), 0, [x, out, *arguments])
    return out


def test_bytes_come_when_waited_for(hopper):
    for count, at, to in ((32, 4, 4), (16, 0, 8), (64, 0, 0)):
        out = copy_bytes(hopper, count, count, at, to)
        expected = np.ones((2, 16), np.float32)
        expected[:, to : to + count // 4] = [[np.nan], [0]]  # no wait yet: neither the old nor the new
        expected[1, to : to + count // 4] = np.arange(at, at + count // 4)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"at": 5}, "copy_bytes: not in multiples of 16 bytes"),
        ({"to": 6}, "copy_bytes: not in multiples of 16 bytes"),
        ({"count": 24}, "copy_bytes: not in multiples of 16 bytes"),
        ({"count": 0}, "copy_bytes: not in multiples of 16 bytes"),
        ({"publishes": 0}, "copy_bytes: a barrier without barriers_made"),
        ({"waits": 0}, "that nobody waited for"),
        ({"expected": 48}, "barrier_wait.*lacks 0 arrivals, 16 bytes"),
        ({"expected": 16}, "barrier_wait.*lacks 0 arrivals, -16 bytes"),
    ],
)
def test_mistakes_in_copies_of_bytes_are_found(hopper, mistake, message):
    with pytest.raises(ShimError, match=message):
        copy_bytes(hopper, **mistake)
    copy_bytes(hopper)  # and all is well afterwards


def test_groups_of_products_are_waited_for_oldest_first(hopper):
    out = np.zeros((128, 4), np.float32)
    hopper.launch("groups", ONE, (128, 1, 1), 1024 + 64 * 128, [out])
    assert np.isnan(out[:, 1]).all()
    assert (out[:, [0, 2, 3]] == 32).all()
    with pytest.raises(ShimError, match="the block ends within this warpgroup"):
        hopper.launch("groups", ONE, (96, 1, 1), 1024 + 64 * 128, [out])


def test_exp2_fast(hopper):
    x = np.array([0, 1, -1, 0.5, 3.25, -126, -126.5, -200, -np.inf, 128, np.nan, -1e-40], np.float32)
    out = np.zeros_like(x)
    hopper.launch("exponentials", ONE, (x.size, 1, 1), 0, [x, out])
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp2(x)
    np.testing.assert_allclose(out, np.where(expected < np.float32(2.0**-126), 0, expected), rtol=3e-7)


@pytest.mark.parametrize(
    ("dims", "strides", "box", "message"),
    [
        ((64, 8), (128,), (64, 8), "three dimensions, or five"),
        ((64, 8, 1), (128, 1024), (32, 8, 1), "rows of a box"),
        ((64, 8, 1), (128, 1024), (64, 257, 1), "1 to 256"),
        ((64, 8, 0), (128, 1024), (64, 8, 1), "1 to 256"),
        ((64, 8, 1), (120, 1024), (64, 8, 1), "multiples of 16"),
    ],
)
def test_tensor_maps_that_the_driver_would_refuse(dims, strides, box, message):
    with pytest.raises(ValueError, match=message):
        tensor_map(np.zeros(512, np.uint16), dims, strides, box)
