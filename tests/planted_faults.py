"""A test of the tests: faults that people make, planted one at a time in a copy of kernels_cu/. Are they noticed?

    python -m tests.planted_faults [-k text]

A fault is caught when a test fails, crashes or hangs. What survives is a hole in the tests, or no fault: then no test
can tell, and it does not belong here. What a CPU can't show isn't here either: indices beyond 32 bits, bank conflicts,
reads that fault on a GPU alone.
"""

import argparse
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from tests import shim

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels_cu"
TIMEOUT = 60  # seconds of a processor after which tests are taken to hang, or ten times as many of a clock
FORKS = multiprocessing.get_context("forkserver")  # of a process that has loaded what all need
ASKING = threading.Lock()  # an exit code is told once: of two threads that ask, of whatever process, one would get 255
CRASHES = {-number: number.name for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE)}

# The tests of each source, or of a function of it where fewer will do, as pytest's -k names them.
TESTS = {
    "adamw.cu": "test_adamw and not without",
    "adamw.cu round_stochastically": "test_adamw_without",
    "adamw.cu adamw_update_without_remainder": "test_adamw_without",
    "attention.cu": "test_attention",
    "attention.cuh": "test_attention",
    "attention_hopper.cu": "test_attention and True",
    "classifier.cu": "test_classifier",
    "embedding.cu": "test_embedding_backward",
    "embedding.cu embedding_forward": "test_embedding_forward",
    "gelu.cu": "test_gelu",
    "gelu.cuh": "test_gelu",
    "guard.cu": "test_guard",
    "layernorm.cu": "test_layernorm_backward",
    "layernorm.cu layernorm_forward": "test_layernorm_forward",
    "linear.cu": "test_linear_backward and bias",
    "linear_hopper.cu": "test_linear_hopper",
    "norm.cu": "test_global_norm",
    "philox.cuh": "test_adamw_without",
    "reduce.cu": "test_sum_slices",
    "sampling.cu": "test_sampling",
    "scalars.cu": "test_total",
}


class Fault(NamedTuple):
    """old -> new in a function of a source, where old must occur exactly once; function "": anywhere in the file."""

    file: str
    function: str
    what: str
    old: str
    new: str
    tests: str = ""  # where they aren't those of the source

    @property
    def selection(self) -> str:
        return self.tests or TESTS.get(f"{self.file} {self.function}") or TESTS[self.file]


class Result(NamedTuple):
    """verdict: "caught", "hung", "crashed", "SURVIVED", or "ERROR" (of the table, or of the tests). by: the test."""

    verdict: str
    by: str

    @property
    def caught(self) -> bool:
        return self.verdict in ("caught", "hung", "crashed")


def _in(place: str, *faults: tuple[str, str, str], tests: str = "") -> Iterator[Fault]:
    """The faults (what, old, new) at a place: "file function"."""
    file, _, function = place.partition(" ")
    yield from (Fault(file, function, *fault, tests) for fault in faults)


WAIT = "        copy_async_wait<1>();\n"
COPY_BARRIER = f"{WAIT}        __syncthreads();\n"
STEP_BARRIER = "        __syncthreads();  // before the next step's copies overwrite what other warps still read\n"
COMMIT = "        }\n        copy_async_commit();\n"
COMMIT_INSIDE = "            copy_async_commit();\n        }\n"

FAULTS = (
    *_in(
        "attention.cu add_product_transposed",
        ("only the first 16 channels of k", "lane % 8) * STRIDE + k +", "lane % 8) * STRIDE +"),
        ("two fragments of b swapped", "af, bf[2], bf[3]", "af, bf[3], bf[2]"),
    ),
    *_in(
        "attention.cuh as_factor",
        ("the left half of a for the right one", "pack_bf16(right[0], right[1])", "pack_bf16(left[0], left[1])"),
    ),
    *_in(
        "attention.cu load_rows",
        ("one row too many is read", "first + row < T;", "first + row <= T;"),
        ("rows beyond T are read", "const bool valid = first + row < T;", "const bool valid = true;"),
    ),
    *_in(
        "attention.cu store_tile",
        ("one row too many is written", "if (first + row < T)", "if (first + row <= T)"),
        ("the last row is not written", "if (first + row < T)", "if (first + row < T - 1)"),
        ("the first row's scale for both", "tile.x[n][3] * scale1", "tile.x[n][3] * scale0"),
        ("__syncwarp missing", "    __syncwarp();\n    constexpr", "    constexpr"),
    ),
    *_in(
        "attention.cuh row_sum",
        ("the sum of two lanes for that of four", "return x + __shfl_xor_sync(ALL_LANES, x, 2)", "return x"),
    ),
    *_in(
        "attention.cu attention_forward",
        ("the next batch at C for 3 C", "blockIdx.z * T * pitch", "blockIdx.z * T * C"),
        ("scores not scaled", "LOG2E * rsqrtf(static_cast<float>(HS))", "LOG2E"),
        ("a key for its value", "load_rows<ROWS>(v + next, head + 2 * C", "load_rows<ROWS>(v + next, head + C"),
        ("this step's keys again", "head + C, pitch, (step + 1) * ROWS", "head + C, pitch, step * ROWS"),
        ("the copies not waited for", "copy_async_wait<1>();", "copy_async_wait<2>();"),
        ("the last copies not waited for", COMMIT, COMMIT_INSIDE),
        ("no barrier behind the copies", COPY_BARRIER, WAIT),
        ("no causal mask", "masked0 = step == last && key > query,", "masked0 = false,"),
        ("a query does not see its own key", "key > query + 8;", "key >= query + 8;"),
        ("the total not rescaled", "        total1 *= shrink1;\n", ""),
        ("the output rescaled by the other row", "o.x[n][i + 2] *= shrink1", "o.x[n][i + 2] *= shrink0"),
        ("lse in base 2", "top0 / LOG2E + logf(total0)", "top0 + log2f(total0)"),
        ("lse of rows beyond T", "if (row + 8 < T)", "if (row < T)"),
    ),
    *_in(
        "attention.cu attention_forward",
        ("no barrier at a step's end", STEP_BARRIER, ""),
        tests="test_attention and reversed",
    ),
    *_in(
        "attention.cu attention_backward_d",
        ("D as (B,T,NH)", "(static_cast<size_t>(b) * NH + h) * T + t", "i"),
        (
            "the last D missing",
            "if (i >= static_cast<long long>(B) * T * NH)",
            "if (i + 1 >= static_cast<long long>(B) * T * NH)",
        ),
    ),
    *_in(
        "attention.cu attention_backward_kv",
        ("lse in the wrong base", "lse[statistics + query] * LOG2E : INF", "lse[statistics + query] : INF"),
        ("lse beyond T", "query < T ? lse[statistics + query] * LOG2E : INF", "lse[statistics + query] * LOG2E"),
        (
            "the statistics of head 0",
            "(static_cast<size_t>(blockIdx.z) * NH + blockIdx.y) * T;",
            "static_cast<size_t>(blockIdx.z) * NH * T;",
        ),
        ("dout at 3 C for C", "dout_head, C, start, T", "dout_head, pitch, start, T"),
        ("both halves in one", "load_queries(start + QUERY_STEP, half ^ 1)", "load_queries(start + QUERY_STEP, half)"),
        ("no causal mask", "key > query ? 0.0f : probability", "false ? 0.0f : probability"),
        ("D forgotten", "(ds.x[n][i + 2] - D_now)", "ds.x[n][i + 2]"),
        ("dS for P in dv", "add_product(dv, p, dy_now)", "add_product(dv, ds, dy_now)"),
        ("dk not scaled", "dk, scale, scale", "dk, 1.0f, 1.0f"),
        ("dk and dv swapped", "k + warp * 16 * STRIDE, dk, scale, scale", "k + warp * 16 * STRIDE, dv, scale, scale"),
        ("the copies not waited for", WAIT, ""),
        ("no barrier behind the copies", COPY_BARRIER, WAIT),
    ),
    *_in(
        "attention.cu attention_backward_kv",
        ("no barrier at a step's end", STEP_BARRIER, ""),
        tests="test_attention and reversed",
    ),
    *_in(
        "attention.cu attention_backward_q",
        ("every step masked as the first", "key = step * ROWS + tile_column(n)", "key = tile_column(n)"),
        ("no causal mask", "key > row1 ? 0.0f : probability", "false ? 0.0f : probability"),
        ("P for dS in dq", "add_product(dq, ds, k + now)", "add_product(dq, p, k + now)"),
        ("the last copies not waited for", COMMIT, COMMIT_INSIDE),
        ("no barrier behind the copies", COPY_BARRIER, WAIT),
    ),
    *_in(
        "attention.cu attention_backward_q",
        ("no barrier at a step's end", STEP_BARRIER, ""),
        tests="test_attention and reversed",
    ),
    *_in(
        "attention_hopper.cu",
        ("a stage not waited for to be empty", "            barrier_wait(empty[stage], next / STAGES - 1 & 1);\n", ""),
        ("the parity of an empty stage one passing off", "next / STAGES - 1 & 1", "next / STAGES & 1"),
        ("the parity of a full stage one passing off", "step / STAGES & 1);", "step / STAGES + 1 & 1);"),
        ("a stage never waited for to be full", "{ barrier_wait(full[step % STAGES], step / STAGES & 1); }", "{}"),
        ("a stage never filled again", "            fill(next, stage, full[stage]);\n", ""),
        ("this step's stage filled again, not that of steps before", "step - LAG + STAGES,", "step + STAGES,"),
        ("the second stage filled twice at first", "fills && step >= LAG && next < steps", "fills && next < steps"),
        ("the last step's rows never come", "next < steps", "next + 1 < steps"),
        ("a step too many is filled", "next < steps", "next <= steps"),
        ("more stages filled than there are steps", "step < min(STAGES, steps)", "step < STAGES"),
        (
            "a stage empty when one has left",
            "barrier_make(empty[i], leavers)",
            "barrier_make(empty[i], 1)",
        ),
        ("keys for values", "qkv, 2 * C + column, step", "qkv, C + column, step"),
        ("this step's keys in the first stage", "load_rows(k + stage * HEAD", "load_rows(k"),
        ("fewer bytes expected than come", "(full, 2 * HEAD_BYTES);", "(full, HEAD_BYTES);"),
        ("only the first 16 channels", "(k / 4 * BOX + k % 4 * 16) * 2", "k / 4 * BOX * 2"),
        ("the first 16 rows of b in each product", "behind(b, k * 16 * 64 * 2)", "behind(b, 0)"),
        ("the other 64 columns not beside the first", "factor(rows, BOX * 2)", "factor(rows, BOX)"),
        ("one row too many is written", "if (first + row < T)", "if (first + row <= T)"),
        (
            "no __syncwarp before the rows are read",
            "    __syncwarp();\n#pragma unroll\n    for (int i = lane",
            "#pragma unroll\n    for (int i = lane",
        ),
        (
            "half of the channels in D",
            "i < PACKS / 4; i++) {\n            const Pack y",
            "i < PACKS / 8; i++) {\n            const Pack y",
        ),
        ("another part of dout than of out in D", "place(row, (4 * i + threadIdx.x % 4)", "place(row, (4 * i)"),
        ("the sequence of another head", "b = head / NH", "b = head / B"),
        ("the columns of another head", "column = head % NH * HS", "column = head / B % NH * HS"),
    ),
    *_in(
        "attention_hopper.cu",
        ("the tail's heads one off", "B * NH - tail + (block", "B * NH - tail - 1 + (block"),
        ("the tail's heads are the first", "B * NH - tail + (block", "(block"),
        ("the tail's heads one by one", "(block - before) % tail", "(block - before) / shares"),
        ("shares of the tail counted from the first head", "(block - before) / tail", "block / tail"),
        tests="test_hopper_attention",
    ),
    *_in(
        "attention_hopper.cu",
        ("the tail ignored", "(B * NH - tail) * shares", "B * NH * shares"),
        ("shares before the tail backwards", "? block % shares", "? shares - 1 - block % shares"),
        tests="test_hopper_attention_begins",
    ),
    *_in(
        "attention_hopper.cu load_rows",
        ("the first 64 columns for the next", "map, column + i, first", "map, column, first"),
    ),
    *_in(
        "attention_hopper.cu attention_hopper_forward",
        ("the first row alone decides on shrinking", "fmaxf(higher0 - top0, higher1 - top1)", "(higher0 - top0)"),
        ("the second row alone decides on shrinking", "fmaxf(higher0 - top0, higher1 - top1)", "(higher1 - top1)"),
        tests="test_attention_of_one_row and True",
    ),
    *_in(
        "attention_hopper.cu attention_hopper_forward",
        ("the total not rescaled", "            total1 *= shrink1;\n", ""),
        ("the output not rescaled", "                    o.x[n][i + 2] *= shrink1;\n", ""),
        ("sums never shrink", "* scale > SLACK", "* scale > INF"),
        ("no causal mask", "if (step * ROWS == first) {", "if (false) {"),
        ("a query does not see its own key", "> seen)", ">= seen)"),
        ("a query sees the next key", "> seen + 8)", "> seen + 9)"),
        ("the queries not waited for", "    barrier_wait(queries, 0);\n", ""),
        ("a warpgroup's queries not expected", "(queries, FORWARD_GROUPS * HEAD_BYTES)", "(queries, HEAD_BYTES)"),
        ("the first warpgroup's queries for both", "q + group * HEAD", "q"),
        ("a warpgroup beyond T goes further than its block", "min(first, end - 1) / ROWS", "first / ROWS"),
        ("all threads fill the stages", "ring.go_on(fills", "ring.go_on(true"),
        ("the scores not waited for", "        products_wait<0>();\n        products_done(s.x);\n", ""),
        (
            "a stage left before the product that reads it",
            "        products_wait<0>();\n        products_done(o.x);\n",
            "",
        ),
        ("a stage is never left", "        ring.leave_together(step);\n", ""),
        ("lse in base 2", "(top1 * scale + log2_fast(total1)) * LN2", "top1 * scale + log2_fast(total1)"),
        ("the total's logarithm in base e", "log2_fast(total1)) * LN2", "logf(total1)) * LN2"),
        ("the total's logarithm not taken", "+ log2_fast(total0)", "+ total0"),
        ("lse of rows beyond T", "if (row + 8 < T)", "if (row < T)"),
        ("lse of the first heads again", "(task.head) * T", "(task.head % NH) * T"),
    ),
    *_in(
        "attention_hopper.cu attention_hopper_forward",
        ("the first queries first", "(shares - 1 - task.share)", "task.share"),
        tests="test_hopper_attention_begins",
    ),
    *_in(
        "attention_hopper.cu attention_hopper_backward_q",
        ("no causal mask", "if (step * ROWS == first) {", "if (false) {"),
        ("a query does not see its own key", "> seen)", ">= seen)"),
        ("a query sees the next key", "> seen + 8)", "> seen + 9)"),
        ("the queries not waited for", "    barrier_wait(queries, 0);\n", ""),
        ("a warpgroup's rows not expected", "(queries, Q_GROUPS * 2 * HEAD_BYTES)", "(queries, 2 * HEAD_BYTES)"),
        ("the first warpgroup's queries for both", "my_q = q + group * HEAD", "my_q = q"),
        ("the first warpgroup's dout for both", "my_dy = dy + group * HEAD", "my_dy = dy"),
        ("a warpgroup beyond T goes further than its block", "min(first, end - 1) / ROWS", "first / ROWS"),
        ("all threads fill the stages", "ring.go_on(fills", "ring.go_on(true"),
        ("the statistics of a warpgroup beyond T", "% 4 == 0 && first < T", "% 4 == 0"),
        ("lse in the wrong base", "head_lse[row1] * LOG2E", "head_lse[row1]"),
        ("lse of rows beyond T", "row1 < T ? head_lse[row1] * LOG2E : INF", "head_lse[row1] * LOG2E"),
        ("the first row's lse for both", "(scale * LOG2E) - lse1", "(scale * LOG2E) - lse0"),
        ("D of the first row for both", "out1.dot(my_dy, row + 8)", "out0.dot(my_dy, row)"),
        ("D left out", "(ds.x[n][i] - D0)", "ds.x[n][i]"),
        ("lse in base e in the statistics", "mine[8] = lse1;", "mine[8] = lse1 * LN2;"),
        ("D in the statistics of half of the rows", "        mine[ROWS + 8] = D1;\n", ""),
        (
            "lse and D exchanged in the statistics",
            "mine[0] = lse0;\n        mine[8] = lse1;\n        mine[ROWS] = D0;\n        mine[ROWS + 8] = D1;",
            "mine[0] = D0;\n        mine[8] = D1;\n        mine[ROWS] = lse0;\n        mine[ROWS + 8] = lse1;",
        ),
        ("the statistics of all blocks in one place", "(head * blocks + first / ROWS)", "(head * blocks)"),
        (
            "the statistics of all sequences in one place",
            "(head * blocks + first / ROWS)",
            "(head % NH * blocks + first / ROWS)",
        ),
        ("values for keys", "add_product(dq, left_ds, behind(k_factor", "add_product(dq, left_ds, behind(v_factor"),
        ("the scores not waited for", "        products_wait<1>();\n        products_done(p.x);\n", ""),
        ("dP not waited for", "        products_wait<0>();\n        products_done(ds.x);\n", ""),
        ("the last gradient not waited for", "        products_wait<0>();\n        products_done(dq.x);\n", ""),
        ("a stage is never left", "        ring.leave_together(step);\n", ""),
        ("dq not scaled", "my_q, dq, scale, scale", "my_q, dq, 1.0f, 1.0f"),
    ),
    *_in(
        "attention_hopper.cu attention_hopper_backward_q",
        ("the first queries first", "(shares - 1 - task.share)", "task.share"),
        tests="test_hopper_attention_begins",
    ),
    *_in(
        "attention_hopper.cu attention_hopper_backward_kv",
        ("no causal mask", "if (step == 0) {", "if (false) {"),
        ("a query does not see its own key", "< seen)", "<= seen)"),
        ("a query sees the next key", "< seen + 8)", "< seen + 7)"),
        ("the keys not waited for", "    barrier_wait(keys, 0);\n", ""),
        ("keys for their values", "qkv, 2 * C + column, first", "qkv, C + column, first"),
        ("the statistics' bytes not expected", "2 * HEAD_BYTES + BYTES", "2 * HEAD_BYTES"),
        ("dout's bytes not expected", "2 * HEAD_BYTES + BYTES", "HEAD_BYTES + BYTES"),
        (
            "half of the statistics",
            "constexpr int BYTES = sizeof queries[0]",
            "constexpr int BYTES = sizeof queries[0][0]",
        ),
        ("the first block's statistics in each step", "of_head + 2 * start", "of_head + 2 * first"),
        ("the statistics of the next block", "of_head + 2 * start", "of_head + 2 * (start + ROWS)"),
        ("the statistics of head 0", "(task.head) * blocks * 2", "(b * NH) * blocks * 2"),
        ("the first stage's statistics written over", "copy_bytes(queries[stage],", "copy_bytes(queries[0],"),
        ("the first stage's lse for all", "queries[stage][0] +", "queries[0][0] +"),
        ("the first stage's D for all", "queries[stage][1] +", "queries[0][1] +"),
        ("D for lse", "queries[stage][0] +", "queries[stage][1] +"),
        ("lse for D", "queries[stage][1] +", "queries[stage][0] +"),
        ("one query's lse for two", "i % 2 ? lse.y : lse.x", "lse.x"),
        ("the scores not waited for", "        products_wait<1>();\n        products_done(p.x);\n", ""),
        ("dP not waited for", "        products_wait<1>();\n        products_done(ds.x);\n", ""),
        ("= for +=", "add_product(dk, left_ds,", "dk = Tile<HS>();\n        add_product(dk, left_ds,"),
        ("a stage is never left", "        ring.leave(step);", "        "),
        ("dk not scaled", "k, dk, scale, scale", "k, dk, 1.0f, 1.0f"),
        ("dv scaled", "v, dv, 1.0f, 1.0f", "v, dv, scale, scale"),
    ),
    *_in(
        "attention_hopper.cu attention_hopper_backward_kv",
        ("the last keys first", "block = task.share", "block = blocks - 1 - task.share"),
        tests="test_hopper_attention_begins",
    ),
    *_in(
        "classifier.cu load_logits",
        ("padding counts", "if (v + PACK > V)", "if (false)"),
        ("the first of the padding counts", "if (v + i >= V)", "if (v + i > V)"),
    ),
    *_in(
        "classifier.cu softmax_parts",
        ("the total not rescaled", "if (higher > my_top) my_total *= exp2_fast(my_top - higher);", ""),
        ("a maximum of at least 0", "float my_top = -INF", "float my_top = 0.0f"),
        ("the threads' totals to different maxima", "my_total * exp2_fast(my_top - top)", "my_total"),
    ),
    *_in(
        "classifier.cu classifier_forward",
        ("the wrong row's target", "targets[blockIdx.x]", "targets[0]"),
        ("the maximum left in base 2", "top / LOG2E", "top"),
    ),
    *_in(
        "classifier.cu classifier_forward_backward",
        (
            "the target's logit read when it may be overwritten",
            "top / LOG2E - target_logit",
            "top / LOG2E - widen(x[target])",
        ),
        ("the target not subtracted", "p.x[i] -= dloss", "p.x[i] -= 0.0f"),
        ("the target's neighbours lower too", "if (v + i == target) p.x[i] -= dloss;", "p.x[i] -= dloss;"),
        ("dloss ignored", "scale = dloss / total", "scale = 1.0f / total"),
        (
            "the padding not written",
            "v < Vp; v += THREADS * PACK) {\n        Pack p",
            "v < V; v += THREADS * PACK) {\n        Pack p",
        ),
        ("the copies not waited for", "    copy_async_wait<0>();\n", ""),
        ("the tail of the row not copied", "held + v, x + v, true", "held + v, x + v, v + THREADS * PACK < Vp"),
    ),
    *_in(
        "classifier.cu classifier_add_mean",
        ("= for +=", "*mean += share", "*mean = share"),
        ("the sum for the mean", "(sum / N)", "sum"),
    ),
    *_in(
        "embedding.cu embedding_forward",
        ("the position's embedding by batch", "t = n % T", "t = n / T"),
        ("the tail", "if (i >= packs)", "if (i + 1 >= packs)"),
    ),
    *_in(
        "embedding.cu embedding_starts",
        ("no barrier behind the warps' sums", "warps[warp] = through;\n    __syncthreads();", "warps[warp] = through;"),
        ("a start that counts its own token", "through - own", "through"),
        ("the tokens of the blocks before forgotten", "before += count[u]", "before = count[u]"),
        ("the warps before forgotten", "before += warp_sum(lane < warp ? warps[lane] : 0);", ""),
    ),
    *_in(
        "embedding.cu embedding_gather",
        ("all of a token in one place", "start[inp[n]] + arrival[n]", "start[inp[n]]"),
    ),
    *_in(
        "embedding.cu embedding_rank",
        ("the positions left unsorted", "sorted[start[v] + rank] = n", "sorted[i] = n"),
    ),
    *_in(
        "embedding.cu partial_row",
        ("two chunks in one row of partial", "i / CHUNK * 2 + first", "i / CHUNK * 2"),
    ),
    *_in(
        "embedding.cu embedding_backward_wte",
        ("the last of a whole chunk lost", "min(CHUNK, count[v] - within)", "min(CHUNK - 1, count[v] - within)"),
        ("a whole chunk for what is left", "min(CHUNK, count[v] - within)", "CHUNK"),
        ("exactly one chunk goes to partial", "alone = count[v] <= CHUNK", "alone = count[v] < CHUNK"),
        ("= for +=", "        for (int j = 0; j < PACK; j++) sum.x[j] += before.x[j];\n", ""),
    ),
    *_in(
        "embedding.cu embedding_backward_wte_chunks",
        ("exactly one chunk taken for several", "count[v] <= CHUNK", "count[v] < CHUNK"),
        ("tokens that begin with the neighbours twice", " || i == next", ""),
        ("tokens that begin before again", "i < next - CHUNK || ", ""),
        ("the last chunk lost", "k < count[v]; k += CHUNK", "k + CHUNK <= count[v]; k += CHUNK"),
        ("= for +=", "        for (int j = 0; j < PACK; j++) sum.x[j] += before.x[j];\n", ""),
    ),
    *_in(
        "embedding.cu embedding_backward_wpe",
        ("= for +=", "    for (int k = 0; k < PACK; k++) sum.x[k] += before.x[k];\n", ""),
        ("+= for =", "accumulate ? load(dwpe + i) : Pack{}", "load(dwpe + i)"),
        ("the first batch alone", "dout + b * row + i", "dout + i"),
        ("positions beyond T left as they are", "accumulate ? row :", "true ? row :"),
        ("the next sequence for positions beyond T", "    if (i < row)\n", ""),
    ),
    *_in(
        "gelu.cuh tanh_argument",
        ("no square in the cube", "x * (SCALE + CUBIC * (x * x))", "x * (SCALE + CUBIC * x)"),
    ),
    *_in(
        "gelu.cuh gelu",
        ("the half missing", "0.5f * x + ", "x + "),
    ),
    *_in(
        "gelu.cuh gelu_slope",
        ("the 3 of the cube's slope missing", "1.5f * CUBIC", "0.5f * CUBIC"),
        ("tanh not squared in its slope", "1.0f - t * t", "1.0f - t"),
    ),
    *_in(
        "gelu.cu gelu_forward",
        ("of half of it", "x = gelu(x,", "x = gelu(0.5f * x,"),
        ("a thread too many", "if (i >= n)", "if (i > n)"),
    ),
    *_in(
        "gelu.cu gelu_backward",
        ("= for *=", "d.x[k] *=", "d.x[k] ="),
    ),
    *_in(
        "guard.cu score",
        ("no barrier behind the new value", "    __syncthreads();\n    const double mine", "    const double mine"),
        ("NaN enters the window", '    if (!isfinite(value)) return nan("");', "   "),
        ("a score one step late", "seen < WINDOW", "seen <= WINDOW"),
        ("the next place in the window", "window[seen % WINDOW]", "window[(seen + 1) % WINDOW]"),
        ("the sample's deviation", "(mine - mean)) / WINDOW", "(mine - mean)) / (WINDOW - 1)"),
        (
            "a division by a deviation of 0",
            "deviation > 0.0 ? (value - mean) / deviation : 0.0",
            "(value - mean) / deviation",
        ),
    ),
    *_in(
        "guard.cu guard_decide",
        ("the norm not taken the root of", "sqrt(*norm_squared)", "*norm_squared"),
        ("clip upside down", "max_norm / x", "x / max_norm"),
        ("an infinite norm not skipped", "isfinite(*loss) && isfinite(x)", "isfinite(*loss)"),
        ("the norm's score held to the loss's limit", "norm_score > max_norm_z", "norm_score > max_loss_z"),
    ),
    *_in(
        "layernorm.cu layernorm_forward",
        ("mean for rstd", "rstd[n] = r", "rstd[n] = m"),
        ("EPS forgotten", "/ C + EPS", "/ C"),
        ("the sample's variance", "row_sum(squares) / C", "row_sum(squares) / (C - 1)"),
        (
            "the variance as a difference of large numbers",
            "squares += (p.x[i] - m) * (p.x[i] - m);\n    }",
            "squares += p.x[i] * p.x[i];\n    }\n    squares -= C / WARP * m * m + (thread < C % WARP ? m * m : 0.0f);",
        ),
        ("a row too many", "if (n >= N) return", "if (n > N) return"),
        ("the bias forgotten", "* w.x[i] + b.x[i]", "* w.x[i]"),
        ("no one behind the row", "c == C ? 1.0f : 0.0f", "0.0f"),
        ("ones behind the row", "c == C ? 1.0f : 0.0f", "1.0f"),
        ("one pack behind the row", "c < width; c += ROW_THREADS * PACK", "c < C + PACK; c += ROW_THREADS * PACK"),
        ("what the row does not have counts", "if ((thread + k * ROW_THREADS) * PACK >= C) continue;", ""),
    ),
    *_in(
        "layernorm.cu layernorm_backward",
        ("= for += in dinp", "dx.x[i] += r * (g", "dx.x[i] = r * (g"),
        ("the last row of a block lost", "min(first + rows, N)", "min(first + rows - 1, N)"),
        ("rows beyond N", "min(first + rows, N)", "first + rows"),
        ("the mean of g not subtracted", "(g[k].x[i] - g_sum -", "(g[k].x[i] -"),
        ("a sum for a mean", "g_sum /= C, g_xhat_sum /= C;", "g_sum /= C;"),
        ("dweight without xhat", "dy.x[i] * xhat[k].x[i];\n                dbias", "dy.x[i];\n                dbias"),
        ("= for += in dbias", "dbias[k].x[i] += dy.x[i]", "dbias[k].x[i] = dy.x[i]"),
        (
            "the sum of what was not rounded yet",
            "            dx = load(dinp + at);  // as rounded: what everyone else sees\n",
            "",
        ),
        ("the sums swapped", "store(mine + C, dbias[k])", "store(mine + C, dsum[k])"),
        ("the copies not waited for", "copy_async_wait<STAGES - 1>()", "copy_async_wait<STAGES>()"),
        ("another row's copy", "(n - first) % STAGES", "(n - first + 1) % STAGES"),
        ("a row copied again", "n + STAGES, end", "n, end"),
        ("the first row's mean for all", "m = next_m, ", ""),
        ("the warps' sums where others still read those of the row before", "sums[(n - first) % 2]", "sums[0]"),
        (
            "a thread's second pack overlaps its first",
            "(threadIdx.x + k * blockDim.x) * PACK;\n            const Pack dy",
            "(threadIdx.x + k) * PACK;\n            const Pack dy",
        ),
    ),
    *_in(
        "layernorm.cu copy_row",
        ("the last copies not waited for", "    copy_async_commit();", "    if (n < end) copy_async_commit();"),
        ("inp for dinp", "dinp + row", "inp + row"),
    ),
    *_in(
        "layernorm.cu block_sums",
        ("no barrier behind the warps' sums", "    __syncthreads();\n", ""),
        ("the first warp's sums for all", "x = warp_sum(mine.x), y = warp_sum(mine.y);", ""),
    ),
    *_in(
        "layernorm.cu layernorm_backward_sums",
        ("rows of partial of one gradient for three", "static_cast<size_t>(block) * 3", "static_cast<size_t>(block)"),
        ("no barrier before the warps' sums are read", "    __syncthreads();\n", ""),
        ("= for +=", "accumulate ? widen(out[column]) : 0.0f", "0.0f"),
        ("+= for =", "accumulate ? widen(out[column]) : 0.0f", "widen(out[column])"),
        ("a warp's sum lost", "warp = 0; warp < WARP", "warp = 1; warp < WARP"),
        (
            "32 blocks at most",
            "for (int block = threadIdx.y; block < blocks; block += WARP)",
            "if (int block = threadIdx.y; block < blocks)",
        ),
    ),
    *_in(
        "layernorm.cu layernorm_backward_sums",
        ("a null gradient written to", "    if (!out) return;\n", ""),
        tests="test_layernorm_backward and False",
    ),
    *_in(
        "linear.cu linear_share_out",
        ("the last rows lost", "i >= OC * packs", "i >= (OC - 1) * packs"),
        ("a row too many", "i >= OC * packs", "i >= (OC + 1) * packs"),
        ("the product's rows taken for C long", "(row) * width", "(row) * C"),
        ("the weight's rows taken for longer", "(row) * C + c", "(row) * width + c"),
        ("= for += in dweight", "sum.x[k] += before.x[k]", "sum.x[k] += 0.0f * before.x[k]"),
        ("+= for = in dweight", "    if (accumulate) {", "    {"),
        ("= for += in dbias", "accumulate ? widen(dbias[row]) : 0.0f", "0.0f"),
        ("+= for = in dbias", "accumulate ? widen(dbias[row]) : 0.0f", "widen(dbias[row])"),
        ("the zeros behind the one", "widen(from[C])", "widen(from[C + 1])"),
    ),
    *_in(
        "linear_hopper.cu",
        (
            "stages filled while they are read",
            "if (step >= STAGES) barrier_wait(empty",
            "if (false) barrier_wait(empty",
        ),
    ),
    *_in(
        "linear_hopper.cu forward",
        (
            "a row of tiles too few",
            "((M - 1) / (CLUSTER * GROUPS * ROWS) + 1) * columns",
            "M / (GROUPS * ROWS) * columns",
        ),
        ("a stage read before it is full", "            stages.wait_full(step);\n", ""),
        ("half of the weight", "(block + 1) * BOXES / CLUSTER", "(block + 1) * BOXES / 2"),
        ("the other warpgroup's rows", "inp, k, m + i * ROWS, 0, there", "inp, k, m, 0, there"),
        ("the bias of the tile before", "biases + number % 2 * COLUMNS +", "biases + (number + 1) % 2 * COLUMNS +"),
        ("the first columns' bias for all", "its_bias + n / 4 * 32", "its_bias"),
        ("a tile added to the one before", "k > 0 || chunk > 0", "true"),
        ("the next depth's columns", "behind(b, now + k * 16 * 2)", "behind(b, now)"),
        ("a stage left while it is read", "products_wait<1>();", "products_wait<2>();"),
        ("sums read before they are there", "            products_wait<0>();\n", ""),
        ("rows beyond M stored", "m + 8 * lower < M ? N - n : 0", "N - n"),
        ("columns beyond N stored", "m + 8 * lower < M ? N - n : 0", "m + 8 * lower < M ? COLUMNS : 0"),
        ("the row 8 below in its place", "static_cast<size_t>(lower * 8) * N", "static_cast<size_t>(lower) * N"),
        ("every second eight columns", "finish((chunk * PRODUCTS + k) / 2)", "finish(chunk * PRODUCTS / 2)"),
        ("GELU of what is not stored", "y = gelu(y, tanh_fast(tanh_argument(y)))", "y = gelu(y, tanh_fast(y))"),
    ),
    *_in(
        "norm.cu norm_squared",
        ("sizes for squares", "squares += x * x", "squares += fabsf(x)"),
        ("= for +=", "squares += x * x", "squares = x * x"),
        ("= for += of packs", "sum += squares", "sum = squares"),
        ("blocks that overlap", "min(first + per_block, packs)", "packs"),
        ("beyond the slice", "min(first + per_block, packs)", "first + per_block"),
        ("groups that overlap", "i += GROUP * THREADS", "i += THREADS"),
        ("the first thread's sum for the block's", "sum = block_sum(sum);", ""),
        ("the first slice for all", "slices[2 * blockIdx.y]", "slices[0]"),
        ("all slices in one row of partial", "static_cast<size_t>(blockIdx.y) * blocks + ", ""),
        (
            "shared out by the buffer",
            "static_cast<long long>(fewest)",
            "static_cast<long long>(fewest + n / 64)",
        ),
    ),
    *_in(
        "norm.cu norm_sums",
        ("the first slice's partial", "static_cast<size_t>(blockIdx.x) * blocks + i", "i"),
        ("the last block lost", "i < blocks;", "i < blocks - 1;"),
    ),
    *_in(
        "reduce.cu reduce_sum_slices",
        ("= for +=", "add ? load(out + i) : Pack{}", "Pack{}"),
        ("+= for =", "add ? load(out + i) : Pack{}", "load(out + i)"),
        ("a slice too many", "first + k < W ?", "first + k <= W ?"),
        ("the first group only", "first += GROUP", "first += W"),
        ("the slices' distance forgotten", "(first + k) * n + i", "first + k + i"),
        ("a level of the tree lost", "step < GROUP", "step < GROUP / 2"),
        (
            "rounded twice",
            "        for (int j = 0; j < PACK; j++) sum.x[j] += group[0].x[j];\n",
            "        store(out + i, group[0]);\n        const Pack part = load(out + i);\n"
            "        for (int j = 0; j < PACK; j++) sum.x[j] += part.x[j];\n",
        ),
        (
            "one after another for a tree",
            "group[k].x[j] += group[k + step].x[j]",
            "group[0].x[j] += group[k + step].x[j]",
        ),
    ),
    *_in(
        "sampling.cu weight",
        ("the temperature ignored", " / temperature", ""),
    ),
    *_in(
        "sampling.cu sampling_sample",
        ("rows at V for Vp", "static_cast<size_t>(blockIdx.x) * Vp", "static_cast<size_t>(blockIdx.x) * V"),
        ("the tail of the vocabulary", "(V + THREADS - 1) / THREADS", "V / THREADS"),
        ("padding can be drawn", "min(begin + stretch, V)", "min(begin + stretch, Vp)"),
        ("one coin for all", "coin[blockIdx.x]", "coin[0]"),
        (
            "no barrier before the sums are added",
            "found = V - 1;  // rounding can leave the last sum at or below the coin\n    __syncthreads();",
            "found = V - 1;",
        ),
        (
            "no barrier behind the sums",
            "    __syncthreads();\n\n    const double threshold",
            "\n    const double threshold",
        ),
        (
            "no barrier before the token is read",
            "    __syncthreads();\n    if (threadIdx.x == 0) out",
            "    if (threadIdx.x == 0) out",
        ),
        ("of equals the last", "                break;\n", ""),
        ("at the coin, not beyond it", "if (before > threshold)", "if (before >= threshold)"),
    ),
    *_in(
        "scalars.cu scalars_total",
        ("the divisor ignored", "sum / divisor", "sum"),
        ("256 numbers at most", "for (int i = threadIdx.x; i < n; i += blockDim.x)", "if (int i = threadIdx.x; i < n)"),
        ("the last number lost", "i < n;", "i < n - 1;"),
    ),
    *_in(
        "adamw.cu update",
        ("clip ignored", "clip * grads.x[i]", "grads.x[i]"),
        ("the gradient not squared", "(1.0f - beta2) * g * g", "(1.0f - beta2) * g"),
        ("beta1 for beta2", "beta2 * v.x[i]", "beta1 * v.x[i]"),
        ("m not decayed", "beta1 * m.x[i]", "m.x[i]"),
        ("no weight decay", "keep * params.x[i]", "params.x[i]"),
        ("the step's size, and with it the bias corrections, ignored", "- step_size * (m", "- (m"),
        ("weight decay everywhere", "decays ? static_cast<float>(schedule[KEEP]) : 1.0f", "schedule[KEEP]"),
        ("epsilon of another field", "(schedule[EPSILON])", "(schedule[T])"),
        ("the step's size of another field", "(schedule[STEP_SIZE])", "(schedule[KEEP])"),
        ("epsilon ignored", "(sqrtf(v.x[i]) + epsilon)", "sqrtf(v.x[i])"),
        ("epsilon under the root", "(sqrtf(v.x[i]) + epsilon)", "sqrtf(v.x[i] + epsilon)"),
    ),
    *_in(
        "adamw.cu adamw_update",
        ("skip ignored", " || *skip != 0.0", ""),
        tests="test_adamw_skips",
    ),
    *_in(
        "adamw.cu adamw_update",
        ("a thread too many", "if (i >= n ||", "if (i > n ||"),
        ("decays one pack further", "i < decayed", "i <= decayed"),
        ("v not kept", "    store(v + i, vi);\n", ""),
    ),
    *_in(
        "adamw.cu join",
        ("as if none had been rounded up", " - (remainder >> 15)", ""),
        ("the remainder lost", " | remainder", ""),
    ),
    *_in(
        "adamw.cu rounded_half_up",
        ("rounded down", " + 0x8000u", ""),
        ("ties to zero", "0x8000u", "0x7fffu"),
        ("NaN rounded as a number", "x == x ?", "true ?"),
    ),
    *_in(
        "adamw.cu load_joined",
        ("an odd element's neighbour", "rounded[i] >> 16", "rounded[i] & 0xffffu"),
        ("the neighbour's remainder", "remainders[i] >> 16", "remainders[i] & 0xffffu"),
    ),
    *_in(
        "adamw.cu store_split",
        ("the neighbour in its place", "| rounded_half_up(high) << 16", "| rounded_half_up(low) << 16"),
        ("the neighbour's remainder in its place", "| __float_as_uint(high) << 16", "| __float_as_uint(low) << 16"),
        ("an even element's digits lost", "(__float_as_uint(low) & 0xffffu)", "0u"),
    ),
    *_in(
        "adamw.cu round_stochastically",
        ("never up", "(bits + random)", "bits"),
        ("NaN rounded as a number", "return finite ?", "return true ?"),
    ),
    *_in(
        "adamw.cu adamw_update_without_remainder",
        ("skip ignored", " || *skip != 0.0", ""),
        tests="test_adamw_skips",
    ),
    *_in(
        "adamw.cu adamw_update_without_remainder",
        ("decays everywhere", "i < decayed", "true"),
        ("the same random bits for two elements", " >> (k % 2 * 16)", ""),
        ("random bits of another word", "random.x[k / 2]", "random.x[k % 4]"),
        ("the same random bits in every buffer", "(first + i) / PACK", "i / PACK"),
        ("the counter's high word", "static_cast<unsigned>(index >> 32)", "0"),
        ("t of another field", "(schedule[T])", "(schedule[KEEP])"),
        ("seed and t swapped", "stream, 0, seed, t)", "stream, 0, t, seed)"),
    ),
    *_in(
        "philox.cuh philox",
        ("9 rounds", "round < 10", "round < 9"),
        ("the key not stepped", "        k1 += 0xbb67ae85u;\n", ""),
    ),
    *_in(
        "common.cuh",
        ("gradients fp32 for bf16", "#ifdef GRAD_FP32", "#ifndef GRAD_FP32"),
        tests="test_linear_backward",
    ),
    *_in(
        "common.cuh",
        ("an odd element keeps its neighbour's bits", "words[i] & 0xffff0000u", "words[i]"),
        tests="test_adamw and not without",
    ),
    *_in(
        "common.cuh",
        ("two elements swapped in memory", "pack_bf16(x[6], x[7])", "pack_bf16(x[7], x[6])"),
        tests="test_gelu",
    ),
    *_in(
        "common.cuh narrow",
        ("bf16 rounded down", "static_cast<unsigned short>(pack_bf16(x, 0.0f))", "__float_as_uint(x) >> 16"),
        tests="test_linear_backward",
    ),
    *_in(
        "common.cuh warp_sum",
        ("the sum of half a warp", "WARP / 2", "WARP / 4"),
        tests="test_layernorm_forward",
    ),
    *_in(
        "common.cuh warp_max",
        ("the maximum of half a warp", "WARP / 2", "WARP / 4"),
        tests="test_classifier",
    ),
    *_in(
        "common.cuh block_sum",
        ("a warp's sum lost", "blockDim.x / WARP ?", "blockDim.x / WARP - 1 ?"),
        ("no barrier before the reads", "partial[warp] = x;\n    __syncthreads();", "partial[warp] = x;"),
        ("no barrier behind the reads", "T(0));\n    __syncthreads();", "T(0));"),
        tests="test_layernorm_forward",
    ),
    *_in(
        "common.cuh block_max",
        ("no barrier before the reads", "partial[warp] = x;\n    __syncthreads();", "partial[warp] = x;"),
        tests="test_classifier",
    ),
    *_in(
        "common.cuh block_max",
        ("a maximum of at least 0", "partial[lane] : -INF", "partial[lane] : 0.0f"),
        tests="test_sampling",
    ),
)


def planted(source: str, fault: Fault) -> str:
    """The source with the fault in it. Raises ValueError if the place is not there, or not just one."""
    begin, end = 0, len(source)
    if fault.function:
        definitions = list(re.finditer(rf"^(?!//|#)\S.*\b{fault.function}\(", source, re.MULTILINE))
        if not definitions:
            raise ValueError(f"{fault.file} has no function {fault.function}")
        begin, end = definitions[0].start(), source.index("\n}", definitions[0].start())
    count = source.count(fault.old, begin, end)
    if count != 1:
        raise ValueError(f"{fault.file}, {fault.function}: {fault.old!r} occurs {count} times")
    at = source.index(fault.old, begin, end)
    return source[:at] + fault.new + source[at + len(fault.old) :]


def pytest_configure() -> None:
    """This file is a plugin of the runs: there is more to compile than to compute."""
    shim.FLAGS = tuple("-O0" if flag == "-O2" else flag for flag in shim.FLAGS)


def run_tests(selection: str, folder: Path, libraries: str) -> Result:
    """The CPU tests with these names, of the kernels in folder / kernels_cu. libraries: where compiled ones go."""
    output = folder / "output"
    process = FORKS.Process(target=_pytest, args=(selection, folder, libraries, output))
    with ASKING:
        process.start()
    ended = wait([process.sentinel], 10 * TIMEOUT)
    with ASKING:
        if not ended:
            process.kill()
        process.join()
    if not ended or process.exitcode == -signal.SIGXCPU:
        return Result("hung", f"{TIMEOUT} s")
    return judge(process.exitcode, output.read_text(errors="replace"))


def _pytest(selection: str, folder: Path, libraries: str, output: Path) -> None:
    """In a process of its own."""
    resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT, TIMEOUT + 1))
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    # pytest's plugins take longer to load than most tests to run.
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "COLUMNS": "200"}
    os.environ["BACKHAND_KERNELS"] = f"{folder}/kernels_cu"
    tempfile.tempdir = libraries
    os.chdir(ROOT)
    plugins = ("--noconftest", "-p", "no:cacheprovider", "-p", "tests.planted_faults")
    options = ("-x", "-q", "--tb=short", "-m", "not gpu", "-k", selection)
    sys.exit(pytest.main([*plugins, *options, "tests/test_cuda_ops.py"]))


def judge(code: int | None, out: str) -> Result:
    """What a run of pytest says of the fault."""
    if code == 0:
        return Result("SURVIVED", "")
    if code in CRASHES:
        return Result("crashed", CRASHES[code])
    if code != 1:
        return Result("ERROR", f"pytest exits with {code}: {out[-1000:]}")
    if f"ShimError: {shim.COMPILER} " in out:
        return Result("ERROR", f"does not compile: {out[-2000:]}")
    found = re.search(r"^(?:FAILED|ERROR) \S+::(\S+)", out, re.MULTILINE)
    return Result("caught", found[1]) if found else Result("ERROR", f"no test failed: {out[-1000:]}")


@contextmanager
def copied_kernels() -> Iterator[Path]:
    """A temporary folder with kernels_cu/ in it."""
    with tempfile.TemporaryDirectory(prefix="backhand-fault-") as folder:
        shutil.copytree(KERNELS, f"{folder}/kernels_cu")
        yield Path(folder)


def try_fault(fault: Fault, libraries: str) -> Result:
    with copied_kernels() as folder:
        source = folder / "kernels_cu" / fault.file
        try:
            source.write_text(planted(source.read_text(), fault))
        except ValueError as error:
            return Result("ERROR", str(error))
        return run_tests(fault.selection, folder, libraries)


def run(faults: Sequence[Fault]) -> list[Result]:
    """A result for each fault, as many at a time as there are cores.

    Raises RuntimeError if the tests do not pass without any.
    """
    selections = sorted({fault.selection for fault in faults})
    FORKS.set_forkserver_preload(["tests.test_cuda_ops"])
    with mock.patch.dict(os.environ, OPENBLAS_NUM_THREADS="1"):  # its threads would stand in each other's way
        forkserver.ensure_running()
    # What has no fault is compiled once for all: libraries are found by what is in their sources.
    with (
        tempfile.TemporaryDirectory(prefix="backhand-faults-") as libraries,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        with copied_kernels() as folder:
            sound = pool.map(run_tests, selections, repeat(folder), repeat(libraries))
            for selection, result in zip(selections, sound, strict=True):
                if result.verdict != "SURVIVED":
                    raise RuntimeError(f"the tests -k {selection!r} fail without any fault: {': '.join(result)}")
        return list(pool.map(try_fault, faults, repeat(libraries)))


def table(faults: Sequence[Fault], results: Sequence[Result]) -> str:
    """A line for each fault, and how many were caught."""
    lines = [
        f"{f'{fault.file} {fault.function}':<45} {fault.what:<60} {result.verdict} {result.by}".rstrip()
        for fault, result in zip(faults, results, strict=True)
    ]
    return "\n".join([*lines, f"{sum(result.caught for result in results)} of {len(results)} caught"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant faults in the kernels, and count those that the tests catch.")
    parser.add_argument("-k", default="", metavar="text", help="only faults with this in file, function or words")
    text = parser.parse_args().k
    faults = [fault for fault in FAULTS if text in " ".join(fault[:3])]
    start = time.monotonic()
    results = run(faults)
    print(table(faults, results), f"in {time.monotonic() - start:.0f} s")
    return 0 if faults and all(result.caught for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
