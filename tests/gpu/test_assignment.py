"""The assignment kernel against SciPy: built for the CPU, with one thread and with several, and on a GPU if there is one."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from smca.gpu.loss import assignment

Costs = npt.NDArray[np.float32]
Valid = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
Solver = Callable[..., tuple[Indices, Indices]]

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("cupy") is None, reason="needs a CUDA device and cupy"
)


@pytest.fixture(scope="module")
def solve(tmp_path_factory: pytest.TempPathFactory) -> Solver:
    """The kernel on the CPU: (cost [M, B, N, T], valid [B, T], threads, warp) → (query [M, B, T], status [M, B])."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("building the kernel for the CPU needs g++")
    library = tmp_path_factory.mktemp("assignment") / "assignment.so"
    command = [compiler, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    command += ["-DSMCA_HOST", "-x", "c++", str(assignment.SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "barrier" in done.stderr:
        pytest.skip("building the kernel for the CPU needs a g++ with C++20's <barrier> (11 or newer)")
    assert done.returncode == 0, done.stderr
    entry = ctypes.CDLL(str(library)).assign_on_host

    def call(cost: Costs, valid: Valid, threads: int = 1, warp: int = 1) -> tuple[Indices, Indices]:
        cost, valid = np.ascontiguousarray(cost), np.ascontiguousarray(valid)
        layers, batch, queries, targets = cost.shape
        # Neither −1 nor an index: what the kernel leaves unwritten shows.
        query = np.full((layers, batch, targets), -77, dtype=np.int64)
        status = np.full((layers, batch), -77, dtype=np.int64)
        memory = assignment.shared_bytes(queries, targets)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (cost, valid, query, status)]
        entry(*pointers, layers * batch, batch, queries, targets, threads, warp, memory)
        return query, status

    return call


def check(cost: Costs, valid: Valid, query: Indices, status: Indices) -> None:
    """Every problem complete, one query per target, at SciPy's total; non-finite ones reported at the right place."""
    layers, batch, queries, targets = cost.shape
    for layer in range(layers):
        for image in range(batch):
            here, costs = query[layer, image], cost[layer, image].astype(np.float64)
            bad = np.flatnonzero(~np.isfinite(costs) & valid[image])
            assert status[layer, image] == (bad[0] if len(bad) else -1)
            if len(bad):
                assert (here == -1).all()
                continue
            matched = np.flatnonzero(here != -1)
            chosen = here[matched]
            assert valid[image][matched].all()
            assert len(matched) == min(valid[image].sum(), queries)
            assert len(set(chosen.tolist())) == len(chosen)
            assert ((chosen >= 0) & (chosen < queries)).all()
            columns = np.flatnonzero(valid[image])
            rows, cols = linear_sum_assignment(costs[:, columns])
            best, scale = costs[rows, columns[cols]].sum(), np.abs(costs[:, columns]).max(initial=0.0)
            np.testing.assert_allclose(costs[chosen, matched].sum(), best, rtol=0, atol=1e-12 * scale * max(targets, 1))


def random_costs(rng: np.random.Generator, kind: str, shape: tuple[int, int, int, int]) -> Costs:
    if kind == "ties":
        return rng.integers(-2, 3, shape).astype(np.float32)
    if kind == "constant":
        return np.full(shape, rng.normal(), dtype=np.float32)
    if kind == "ranges":  # some problems of 1e-3, some of 1e6, and rows of both in others
        scale = 10.0 ** rng.uniform(-3, 6, (*shape[:2], shape[2], 1))
        return (rng.normal(size=shape) * scale).astype(np.float32)
    if kind == "products":  # the worst case for shortest augmenting paths: each search walks far
        n, t = np.arange(1, shape[2] + 1), np.arange(1, shape[3] + 1)
        return np.broadcast_to(np.multiply.outer(n, t), shape).astype(np.float32)
    cost = rng.normal(size=shape).astype(np.float32)
    if kind == "nonfinite":
        cost[rng.random(shape) < 0.01] = rng.choice([np.nan, np.inf, -np.inf])
    return cost


KINDS = ("normal", "ties", "constant", "ranges", "products", "nonfinite")


@pytest.mark.parametrize("kind", KINDS)
def test_random_problems_cost_what_scipys_cost(solve: Solver, kind: str) -> None:
    """Some 4,000 problems per kind, of every proportion of queries to targets, with padding anywhere."""
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(340):
        shape = (2, 6, int(rng.integers(1, 13)), int(rng.integers(0, 13)))
        valid = rng.random((shape[1], shape[3])) < rng.choice([0.0, 0.5, 0.9, 1.0])
        cost = random_costs(rng, kind, shape)
        check(cost, valid, *solve(cost, valid))


@pytest.mark.parametrize(("threads", "warp"), [(2, 1), (4, 2), (6, 2), (8, 8), (12, 4)])
def test_several_threads_agree_with_one(solve: Solver, threads: int, warp: int) -> None:
    """With real threads and barriers: also where there are fewer columns than threads, and where ties must break alike."""
    rng = np.random.default_rng(threads)
    for queries, targets in [(1, 1), (3, 2), (2, 5), (9, 6), (6, 9), (20, 13), (13, 20)]:
        for kind in ("normal", "ties", "nonfinite"):
            cost = random_costs(rng, kind, (1, 2, queries, targets))
            valid = rng.random((2, targets)) < 0.8
            expected, expected_status = solve(cost, valid)
            query, status = solve(cost, valid, threads, warp)
            np.testing.assert_array_equal(query, expected)
            np.testing.assert_array_equal(status, expected_status)
            check(cost, valid, query, status)


@pytest.mark.parametrize(("queries", "targets"), [(1, 1), (1, 7), (7, 1), (5, 0), (300, 60), (60, 300), (1000, 40)])
def test_sizes_at_the_edges(solve: Solver, queries: int, targets: int) -> None:
    rng = np.random.default_rng(3)
    cost = random_costs(rng, "normal", (2, 3, queries, targets))
    valid = np.ones((3, targets), dtype=np.bool_)
    valid[1] = False
    valid[2, ::2] = False
    check(cost, valid, *solve(cost, valid))


def test_no_queries_leave_every_target_out(solve: Solver) -> None:
    query, status = solve(np.zeros((1, 1, 0, 3), dtype=np.float32), np.ones((1, 3), dtype=np.bool_))
    assert query.tolist() == [[[-1, -1, -1]]]
    assert status.tolist() == [[-1]]


def test_costs_of_padding_do_not_matter(solve: Solver) -> None:
    rng = np.random.default_rng(4)
    cost = random_costs(rng, "normal", (2, 4, 9, 6))
    valid = rng.random((4, 6)) < 0.5
    expected, _ = solve(cost, valid)
    cost[:, ~valid[:, None].repeat(9, 1)] = np.nan
    query, status = solve(cost, valid)
    np.testing.assert_array_equal(query, expected)
    assert (status == -1).all()


def test_largest_costs_do_not_overflow(solve: Solver) -> None:
    most = np.finfo(np.float32).max
    cost = np.random.default_rng(5).choice(np.array([most, -most], dtype=np.float32), (1, 20, 8, 8))
    valid = np.ones((20, 8), dtype=np.bool_)
    check(cost, valid, *solve(cost, valid))


def test_ties_take_the_lowest_index(solve: Solver) -> None:
    query, _ = solve(np.zeros((1, 1, 4, 1), dtype=np.float32), np.ones((1, 1), dtype=np.bool_))
    assert query.tolist() == [[[0]]]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_the_kernel(tmp_path: Path, architecture: str) -> None:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("needs nvcc")
    command = [compiler, "-cubin", f"-arch={architecture}", "-std=c++17", "-Xptxas", "-v"]
    command += [str(assignment.SOURCE), "-o", str(tmp_path / "assignment.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert f"{assignment.STATIC_BYTES} bytes smem" in done.stdout + done.stderr


def test_shapes_are_known_without_running() -> None:
    with FakeTensorMode():
        query, status = assignment.assign(torch.empty(6, 2, 30, 7), torch.empty(2, 7, dtype=torch.bool))
    assert (query.shape, query.dtype) == ((6, 2, 7), torch.int64)
    assert (status.shape, status.dtype) == ((6, 2), torch.int64)
    cost = torch.empty(6, 2, 30, 7, device="meta")
    query, status = assignment.assign(cost, torch.empty(2, 7, dtype=torch.bool, device="meta"))
    assert (query.shape, status.shape, query.device.type) == ((6, 2, 7), (6, 2), "meta")


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_a_tracer_records_one_call(mode: str) -> None:
    traced = make_fx(lambda c, v: assignment.assign(c, v)[0] + 1, tracing_mode=mode)(
        torch.zeros(2, 3, 5, 4), torch.ones(3, 4, dtype=torch.bool)
    )
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.smca.assign.default) == 1


@pytest.mark.parametrize(
    ("cost", "valid", "message"),
    [
        (torch.zeros(3, 5, 4), torch.ones(3, 4, dtype=torch.bool), r"cost: expected \[M, B, N, T\] float32"),
        (torch.zeros(2, 3, 5, 4).double(), torch.ones(3, 4, dtype=torch.bool), "float32, got .* torch.float64"),
        (torch.zeros(2, 3, 5, 4), torch.ones(3, 4), r"valid: expected \[B, T\] bool, got .* torch.float32"),
        (torch.zeros(2, 3, 5, 4), torch.ones(3, 5, dtype=torch.bool), r"\[B, T\] = \[3, 4\].* got \[3, 5\]"),
        (torch.zeros(2, 3, 5, 4), torch.ones(3, 4, dtype=torch.bool, device="meta"), "device of cost, cpu, got meta"),
    ],
)
def test_wrong_inputs_are_named(cost: torch.Tensor, valid: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assignment._check(cost, valid)


def test_it_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs a CUDA device" in str(assignment.available("cpu"))
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        assignment.assign(torch.zeros(2, 3, 5, 4), torch.ones(3, 4, dtype=torch.bool))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch sees none" in str(assignment.available("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)  # import cupy then raises, as if it were not there
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert assignment.available("cuda") == "cupy is not installed: pip install cupy-cuda12x"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert assignment.available(torch.device("cuda", 0)) == "cupy is not installed: pip install cupy-cuda13x"


def test_too_little_shared_memory_is_an_error() -> None:
    assignment.check_shared(1000, 300, 48 * 1024)
    with pytest.raises(ValueError, match=r"at most 1266 queries and targets.* got 2000 queries and 60 targets"):
        assignment.check_shared(2000, 60, 48 * 1024)


def test_status_names_the_entry() -> None:
    assert assignment.nonfinite_entry(torch.full((2, 3), -1), 7) is None
    status = torch.tensor([[-1, -1, -1], [-1, 23, 5]])
    assert assignment.nonfinite_entry(status, 7) == (1, 1, 3, 2)


def test_launch_hands_the_kernel_its_arguments(solve: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CuPy runs the kernel's CPU build with what `assign` launches: order, sizes, grid and shared memory."""
    launches = []

    def launch(grid: tuple[int], block: tuple[int], arguments: tuple[np.generic, ...], *, shared_mem: int) -> None:
        assert [argument.nbytes for argument in arguments] == [8] * 4 + [4] * 3
        pointers, (batch, queries, targets) = arguments[:4], map(int, arguments[4:])
        launches.append((grid, block, shared_mem))

        def view(pointer: np.generic, kind: type, *shape: int) -> npt.NDArray[np.generic]:
            held = (ctypes.c_char * (int(np.prod(shape)) * np.dtype(kind).itemsize)).from_address(int(pointer))
            return np.frombuffer(held, dtype=kind).reshape(shape)

        layers = grid[0] // batch
        cost = view(pointers[0], np.float32, layers, batch, queries, targets)
        query, status = solve(cost, view(pointers[1], np.bool_, batch, targets))
        view(pointers[2], np.int64, *query.shape)[:] = query
        view(pointers[3], np.int64, *status.shape)[:] = status

    cupy = MagicMock(uint64=np.uint64, int32=np.int32)
    cupy.RawModule.return_value.get_function.return_value = MagicMock(side_effect=launch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(assignment, "available", lambda device: None)
    properties = MagicMock(shared_memory_per_block_optin=100_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: MagicMock())
    monkeypatch.setattr(assignment, "_kernel", assignment._kernel.__wrapped__)  # a mock must not stay in the cache

    rng = np.random.default_rng(6)
    cost, valid = random_costs(rng, "normal", (3, 2, 8, 5)), rng.random((2, 5)) < 0.8
    cost[1, 0, 2, valid[0].argmax()] = np.nan
    # Transposed, so that `assign` has to make it contiguous.
    strided = torch.from_numpy(cost).transpose(2, 3).contiguous().transpose(2, 3)
    query, status = assignment.assign(strided, torch.from_numpy(valid))
    check(cost, valid, query.numpy(), status.numpy())
    assert launches == [((6,), (assignment.THREADS,), assignment.shared_bytes(8, 5))]
    for shape in [(0, 2, 8, 5), (3, 2, 0, 5), (3, 2, 8, 0)]:
        query, status = assignment.assign(torch.zeros(shape), torch.ones(2, shape[3], dtype=torch.bool))
        assert (query == -1).all()
        assert (status == -1).all()
    assert len(launches) == 1  # a grid or a block without memory would be refused


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6, 16, 300, 60), (2, 3, 20, 50), (1, 2, 1500, 30), (2, 3, 1, 1), (2, 3, 5, 0)])
def test_gpu_costs_what_scipy_costs(solve: Solver, kind: str, shape: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(7)
    cost, valid = random_costs(rng, kind, shape), rng.random((shape[1], shape[3])) < 0.7
    on_gpu = torch.from_numpy(cost).cuda(), torch.from_numpy(valid).cuda()
    query, status = assignment.assign(*on_gpu)
    check(cost, valid, query.cpu().numpy(), status.cpu().numpy())
    again, _ = assignment.assign(*on_gpu)
    assert torch.equal(query, again)
    expected, _ = solve(cost, valid)
    np.testing.assert_array_equal(query.cpu().numpy(), expected)


@needs_gpu
def test_gpu_does_not_wait_for_the_host_and_keeps_to_the_stream() -> None:
    cost, valid = torch.randn(6, 16, 300, 60, device="cuda"), torch.ones(16, 60, dtype=torch.bool, device="cuda")
    expected, _ = assignment.assign(cost, valid)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            late = torch.zeros_like(cost)
            torch.cuda._sleep(50_000_000)
            late += cost
            query, _ = assignment.assign(late, valid)
            unmatched = (query != expected).any()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert not unmatched.item()


@needs_gpu
def test_gpu_op_passes_opcheck_and_compiles() -> None:
    cost, valid = torch.randn(2, 3, 20, 8, device="cuda"), torch.ones(3, 8, dtype=torch.bool, device="cuda")
    torch.library.opcheck(assignment.assign, (cost, valid))
    compiled = torch.compile(lambda c, v: assignment.assign(c * 2, v)[0], fullgraph=True)
    assert torch.equal(compiled(cost, valid), assignment.assign(cost * 2, valid)[0])
