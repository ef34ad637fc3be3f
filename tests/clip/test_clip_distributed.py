"""Clipping in several processes, over gloo: DTensors of every placement, FSDP2 and DDP."""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fastrnn import GradientClipper, clip_grad_norm_
from fastrnn.clip import distributed as clip_distributed

inf, nan = math.inf, math.nan
torch_clip_grad_norm_ = nn.utils.clip_grad_norm_


# Imported once, in the server from which the processes are forked.
PRELOADED = ["pytest", "torch.distributed.fsdp", "torch.distributed.tensor.debug", "fastrnn"]


class World:
    """Processes that wait for tasks: to start them once is most of what these tests cost."""

    def __init__(self, size: int, store: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.size = size
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, size, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, task: Callable[..., Any], *arguments: object) -> list[Any]:
        """Call a function of this module in all processes; return what each returned."""
        for pipe in self.pipes:
            pipe.send((task, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(90), f"process {rank} does not answer"
            answers.append(pipe.recv())
        errors = [f"process {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
        assert not errors, "\n".join(errors)
        return [result for result, _ in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.terminate()


def serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (message := pipe.recv()) is not None:
        task, arguments = message
        torch.manual_seed(0)
        try:
            pipe.send((task(*arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], World]]:
    """Processes by their number, started when they are first needed."""

    @functools.cache
    def start(size: int) -> World:
        made.append(World(size, tmp_path_factory.mktemp("gloo") / "store"))
        return made[-1]

    made: list[World] = []
    yield start
    for processes in made:
        processes.close()


@pytest.fixture(params=[2, 4], ids="world{}".format)
def world(request: pytest.FixtureRequest, worlds: Callable[[int], World]) -> World:
    return worlds(request.param)


# What the processes do. Results are numbers and lists, compared by value.

_meshes: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(*shape: int) -> DeviceMesh:
    """The mesh of all processes, made once: each makes process groups."""
    shape = shape or (dist.get_world_size(),)
    if shape not in _meshes:
        names = tuple(f"dim{n}" for n in range(len(shape)))
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _meshes[shape]


def normals(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Equal on all processes. Sizes that divide evenly, unevenly, and by less than a row each."""
    shapes = [(8, 3), (5, 4), (1, 7), (4,), (3, 2, 2)]
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shapes[n % 5], generator=generator).to(dtype) for n in range(count)]


def parameter(grad: Tensor) -> nn.Parameter:
    made = nn.Parameter(torch.zeros_like(grad))
    made.grad = grad
    return made


def spread(grad: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> Tensor:
    """A DTensor whose whole is `grad`."""
    if any(isinstance(placement, Partial) for placement in placements):
        share = grad * (dist.get_rank() + 1) / sum(range(1, dist.get_world_size() + 1))
        return DTensor.from_local(share, mesh, placements)
    return distribute_tensor(grad, mesh, placements)


def whole(grad: Tensor) -> list[float]:
    return (grad.full_tensor() if isinstance(grad, DTensor) else grad).double().flatten().tolist()


PLACEMENTS: dict[str, tuple[tuple[int, ...], list[list[Placement] | None]]] = {
    "sharded": ((), [[Shard(0)]]),
    "sharded-by-columns": ((), [[Shard(0)], [Shard(-1)]]),
    "replicated": ((), [[Replicate()]]),
    "both": ((), [[Shard(0)], [Replicate()]]),
    "plain-too": ((), [[Shard(0)], None, [Replicate()]]),
    "partial": ((), [[Partial()], [Shard(0)]]),
    "hsdp": ((2, 2), [[Replicate(), Shard(0)]]),
    "tensor-parallel": ((2, 2), [[Shard(0), Shard(1)], [Shard(0), Replicate()]]),
    "tensor-parallel-other": ((2, 2), [[Replicate(), Shard(1)], [Shard(0), Replicate()], None]),
}
FOUR = pytest.mark.parametrize("world", [4], indirect=True, ids="world{}".format)


def in_worlds(cases: Iterable[str]) -> pytest.MarkDecorator:
    """Each case with two and with four processes; a mesh of two dimensions with four only."""
    pairs = [(size, case) for size in (2, 4) for case in cases]
    pairs = [(size, case) for size, case in pairs if size == 4 or case not in NEEDS_FOUR]
    return pytest.mark.parametrize(
        ("world", "case"),
        pairs,
        indirect=["world"],
        ids=[f"world{size}-{case}" for size, case in pairs],
    )


NEEDS_FOUR = {"hsdp"} | {case for case, (shape, _) in PLACEMENTS.items() if shape}


def clip_spread(
    case: str,
    max_norm: float,
    norm_type: float,
    dtype: torch.dtype,
    error_if_nonfinite: bool = False,
    bad: float | None = None,
) -> dict[str, Any]:
    """Clip what `normals` returns, spread over the processes."""
    shape, placements = PLACEMENTS[case]
    grads = normals(5, dtype)
    if case.startswith("tensor-parallel"):
        grads = [g if g.dim() > 1 else g.view(2, 2) for g in grads]
    if bad is not None:
        grads[1][-1, -1] = bad
    parameters = []
    for n, grad in enumerate(grads):
        where = placements[n % len(placements)]
        spread_grad = grad if where is None else spread(grad, mesh_of(*shape), where)
        parameters.append(parameter(spread_grad))
    error = ""
    versions = [p.grad._version for p in parameters]
    with CommDebugMode() as communication:
        try:
            norm = clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
        except RuntimeError as raised:
            norm, error = torch.tensor(nan), str(raised)
    kind = type(norm).__name__
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return {
        "norm": norm.item(),
        "dtype": norm.dtype,
        "kind": kind,
        "error": error,
        "collectives": communication.get_total_counts(),
        "grads": [whole(p.grad) for p in parameters],
        "versions": [p.grad._version - before for p, before in zip(parameters, versions)],
    }


def in_one_process(
    case: str, max_norm: float, norm_type: float, dtype: torch.dtype, bad: float | None = None
) -> tuple[Tensor, list[list[float]]]:
    grads = normals(5, dtype)
    if bad is not None:
        grads[1][-1, -1] = bad
    parameters = list(map(parameter, grads))
    norm = torch_clip_grad_norm_(parameters, max_norm, norm_type)
    return norm, [whole(p.grad) for p in parameters]


class TestPlacements:
    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    @in_worlds(PLACEMENTS)
    def test_equals_one_process(self, case: str, max_norm: float, world: World) -> None:
        results = world.run(clip_spread, case, max_norm, 2.0, torch.float32)
        norm, grads = in_one_process(case, max_norm, 2.0, torch.float32)
        for result in results:
            assert result["norm"] == results[0]["norm"]
            assert result["norm"] == pytest.approx(norm.item(), rel=1e-6)
            for ours, theirs in zip(result["grads"], grads):
                assert ours == pytest.approx(theirs, rel=1e-5)

    @pytest.mark.parametrize("norm_type", [1.0, 3.0, inf])
    @in_worlds(["plain-too", "tensor-parallel-other"])
    def test_other_norms(self, case: str, norm_type: float, world: World) -> None:
        results = world.run(clip_spread, case, 0.5, norm_type, torch.float32)
        norm, grads = in_one_process(case, 0.5, norm_type, torch.float32)
        for result in results:
            assert result["norm"] == results[0]["norm"]
            assert result["norm"] == pytest.approx(norm.item(), rel=1e-6)
            assert result["grads"][0] == pytest.approx(grads[0], rel=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_the_norm_has_torchs_dtype_and_rounding(self, dtype: torch.dtype, world: World) -> None:
        results = world.run(clip_spread, "plain-too", 0.5, 2.0, dtype)
        norm, _ = in_one_process("plain-too", 0.5, 2.0, dtype)
        for result in results:
            assert result["dtype"] == dtype
            assert result["norm"] == results[0]["norm"]
            assert result["norm"] == pytest.approx(norm.item(), rel=2 * torch.finfo(dtype).eps)

    def test_the_clippers_float32_norms_of_16_bit_gradients_are_not_rounded(
        self, world: World
    ) -> None:
        truth = torch.cat([g.double().flatten() for g in normals(5, torch.bfloat16)]).norm().item()
        for result in world.run(norm_in_float32):
            assert result == pytest.approx(truth, rel=1e-6)

    @in_worlds(case for case in PLACEMENTS if case != "partial")
    def test_one_all_reduce_for_a_mesh(self, case: str, world: World) -> None:
        expected = 0 if case == "replicated" else 1
        for max_norm in (0.5, 1e3):
            for result in world.run(clip_spread, case, max_norm, 2.0, torch.float32):
                assert result["collectives"] == expected

    @FOUR
    def test_one_for_each_of_two_meshes(self, world: World) -> None:
        for result in world.run(two_meshes):
            assert result["collectives"] == 2
            assert result["norm"] == pytest.approx(result["expected"], rel=1e-6)

    @pytest.mark.parametrize("case", ["sharded", "plain-too"])
    def test_returns_a_dtensor_where_torch_takes_the_gradients(
        self, case: str, world: World
    ) -> None:
        for result in world.run(clip_spread, case, 0.5, 2.0, torch.float32):
            assert result["kind"] == ("DTensor" if case == "sharded" else "Tensor")

    def test_versions_rise_once(self, world: World) -> None:
        for max_norm in (0.5, 1e3):
            for result in world.run(clip_spread, "sharded", max_norm, 2.0, torch.float32):
                assert result["versions"] == [1] * 5

    @pytest.mark.parametrize("norm_type", [2.0, inf])
    @pytest.mark.parametrize("bad", [nan, inf])
    def test_what_one_process_holds_reaches_all(
        self, bad: float, norm_type: float, world: World
    ) -> None:
        arguments = ("sharded", 0.5, norm_type, torch.float32)
        _, grads = in_one_process(*arguments, bad=bad)
        for result in world.run(clip_spread, *arguments, False, bad):
            assert result["norm"] == pytest.approx(bad, nan_ok=True)
            assert result["grads"] == [pytest.approx(g, nan_ok=True) for g in grads]

    def test_the_error_comes_on_all_and_before_the_scaling(self, world: World) -> None:
        for result in world.run(clip_spread, "sharded", 0.5, 2.0, torch.float32, True, nan):
            assert "of order 2.0 for gradients from `parameters` is non-finite" in result["error"]
            assert result["grads"][0] == whole(normals(1)[0])
        for result in world.run(clip_spread, "sharded", 0.5, 2.0, torch.float32, True):
            assert not result["error"]
            assert math.hypot(*itertools.chain(*result["grads"])) == pytest.approx(0.5, rel=1e-5)

    def test_torch_does_what_cannot_be_summed_up(self, world: World) -> None:
        for result in world.run(order_zero):
            assert result["reason"] == "a norm of order 0.0 cannot be summed up from parts"
            assert result["ours"] == result["torchs"]
            assert "of order 0.0 cannot be summed up" in result["clipper"]

    def test_no_more_operations_than_torch(self, world: World) -> None:
        for result in world.run(operations_of_many):
            assert result["torch"] == (12, 12)
            for way in ("function", "clipper"):
                assert max(result[way]) <= 12, result

    def test_the_norm_does_not_depend_on_the_sharding(self, worlds: Callable[[int], World]) -> None:
        """Beyond rounding; and it is the same bits again."""
        exact = torch.cat([g.double().flatten() for g in normals(5)]).norm().item()
        for size in (2, 4):
            for case in ("sharded", "sharded-by-columns", "replicated", "plain-too"):
                arguments = (case, 1e3, 2.0, torch.float32)
                first, second = (worlds(size).run(clip_spread, *arguments) for _ in range(2))
                assert first[0]["norm"] == pytest.approx(exact, rel=3e-7)
                assert {result["norm"] for result in first + second} == {first[0]["norm"]}


class Operations(TorchDispatchMode):
    """Counts operations on local tensors, collectives among them, but for views."""

    VIEWS = ("aten.view", "aten.unsqueeze", "aten.select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # so that its local operations come here
        self.count += not str(operation).startswith(self.VIEWS)
        return operation(*args, **(kwargs or {}))


def operations_of_many() -> dict[str, tuple[int, ...]]:
    """What it takes to clip 300 DTensors, and not to; after a first time."""

    def count(clip: Callable[[list[nn.Parameter], float], Callable[[], object]]) -> tuple[int, ...]:
        counts = []
        for max_norm in (0.5, 1e6):
            grads = [torch.randn(2 * dist.get_world_size()) for _ in range(300)]
            made = [parameter(spread(grad, mesh_of(), [Shard(0)])) for grad in grads]
            call = clip(made, max_norm)
            call()
            with Operations() as operations:
                call()
            counts.append(operations.count)
        return tuple(counts)

    def of_clipper(made: list[nn.Parameter], max_norm: float) -> Callable[[], object]:
        return GradientClipper(made, max_norm).clip

    return {
        "torch": count(lambda made, most: lambda: torch_clip_grad_norm_(made, most)),
        "function": count(lambda made, most: lambda: clip_grad_norm_(made, most)),
        "clipper": count(of_clipper),
    }


class TestFullyShardedDataParallel1:
    """Its flat parameters are sharded without saying so."""

    @pytest.mark.parametrize("use_orig_params", [False, True])
    def test_is_refused_by_the_clipper_and_torchs_to_the_function(
        self, use_orig_params: bool, world: World
    ) -> None:
        for result in world.run(flat_parameters, use_orig_params):
            assert "Call the module's clip_grad_norm_" in result["clipper"]
            assert result["function"] == result["torchs"] != result["its own"]


def flat_parameters(use_orig_params: bool) -> dict[str, Any]:
    module = FullyShardedDataParallel(
        model(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    loss(module, 0, dist.get_rank(), dist.get_world_size()).backward()
    made = list(module.parameters())
    try:
        GradientClipper(made, 1.0)
        refused = ""
    except TypeError as error:
        refused = str(error)
    return {
        "clipper": refused,
        "function": clip_grad_norm_(made, 1e9).item(),
        "torchs": torch_clip_grad_norm_(made, 1e9).item(),
        "its own": module.clip_grad_norm_(1e9).item(),
    }


@pytest.mark.parametrize("norm_type", [2.0, inf])
def test_under_cpu_offload_norms_travel_on_the_meshs_device(
    norm_type: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no GPU here: tensors are fake, and what is reduced where is noted."""
    reduced = []
    monkeypatch.setattr(
        dist, "all_reduce", lambda values, *_, **__: reduced.append(values.device.type)
    )
    mesh = types.SimpleNamespace(
        device_type="cuda:0",  # a fake tensor needs the number where torch has no CUDA
        size=lambda: 2,
        get_group=lambda dimension: None,
    )
    with FakeTensorMode():
        norms = clip_distributed._reduce(torch.ones(3), norm_type, mesh, [0])
    assert reduced == ["cuda"]
    assert norms.device.type == "cpu"


def norm_in_float32() -> float:
    grads = [spread(grad, mesh_of(), [Shard(0)]) for grad in normals(5, torch.bfloat16)]
    parameters = list(map(parameter, grads))
    return GradientClipper(parameters, inf, norm_dtype=torch.float32).clip().item()


def two_meshes() -> dict[str, Any]:
    first, second = normals(2)
    by_rows, by_columns = mesh_of(2, 2)["dim0"], mesh_of(2, 2)["dim1"]
    parameters = [
        parameter(distribute_tensor(first, by_rows, [Shard(0)])),
        parameter(distribute_tensor(second, by_columns, [Shard(0)])),
    ]
    with CommDebugMode() as communication:
        norm = clip_grad_norm_(parameters, 1e3)
    expected = torch_clip_grad_norm_(list(map(parameter, (first, second))), 1e3)
    return {
        "norm": norm.item(),
        "expected": expected.item(),
        "collectives": communication.get_total_counts(),
    }


def order_zero() -> dict[str, Any]:
    def make() -> list[nn.Parameter]:
        return [parameter(spread(g, mesh_of(), [Shard(0)])) for g in normals(2)]

    parameters = make()
    try:
        GradientClipper(parameters, 1.0, norm_type=0.0).clip()
        refused = ""
    except NotImplementedError as error:
        refused = str(error)
    return {
        "reason": clip_distributed.why_torch([p.grad for p in parameters], 0.0),
        "ours": clip_grad_norm_(make(), 1.0, 0.0).full_tensor().item(),
        "torchs": torch_clip_grad_norm_(make(), 1.0, 0.0).full_tensor().item(),
        "clipper": refused,
    }


MAX_NORM = 6.0


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))


def loss(module: nn.Module, step: int, rank: int, size: int) -> Tensor:
    """The mean over a rank's part of the batch; the mean of the ranks' is the whole batch's."""
    generator = torch.Generator().manual_seed(step)
    x = 3 * torch.randn(4 * 3, 5, generator=generator)
    return (module(x.chunk(size)[rank]) ** 2).sum() * size / 4


def train(kind: str, way: str, steps: int, bad: int = -1) -> dict[str, Any]:
    """Train by FSDP2 or DDP; the last step of a process has a NaN where `bad` says so."""
    rank, size = dist.get_rank(), dist.get_world_size()
    module: nn.Module = model()
    if kind == "ddp":
        module = DistributedDataParallel(module)
    else:
        mesh = mesh_of(2, 2) if kind == "hsdp" else mesh_of()
        fully_shard(module[0], mesh=mesh)
        # torch steps plain parameters and DTensors together only if it is told not to fuse.
        ignored = set(module[2].parameters()) if kind == "fsdp-and-plain" else set()
        fully_shard(module, mesh=mesh, ignored_params=ignored)
    made = list(module.parameters())
    optimizer = torch.optim.AdamW(made, lr=0.01, fused=kind != "fsdp-and-plain")
    clipper = GradientClipper(made, MAX_NORM, nonfinite="skip" if bad >= 0 else "keep")
    norms, collectives = [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss(module, step, rank, size).backward()
        for p in made:
            if kind == "fsdp-and-plain" and not isinstance(p, DTensor):
                dist.all_reduce(p.grad)
                p.grad /= size
        if step == bad and rank == size - 1:
            clip_distributed.local_gradient(made[0].grad).fill_(nan)
        with CommDebugMode() as communication:
            if way == "step":
                norm = clipper.step(optimizer)
            elif way == "clip":
                norm = clipper.clip()
            else:
                norm = clip_grad_norm_(made, MAX_NORM)
        if way != "step":
            optimizer.step()
        norms.append(norm.full_tensor().item() if isinstance(norm, DTensor) else norm.item())
        collectives.append(communication.get_total_counts())
    return {
        "norms": norms,
        "collectives": collectives,
        "weights": [whole(p.detach()) for p in made],
        "skipped": clipper.nonfinite_steps,
        "each": [norm.item() for norm in clipper.parameter_norms().values()],
    }


def trained_in_one_process(steps: int, bad: int = -1) -> tuple[list[float], list[list[float]]]:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    norms = []
    for step in range(steps):
        if step == bad:
            continue
        optimizer.zero_grad()
        loss(module, step, 0, 1).backward()
        norms.append(torch_clip_grad_norm_(module.parameters(), MAX_NORM).item())
        optimizer.step()
    return norms, [whole(p.detach()) for p in module.parameters()]


class TestTraining:
    @pytest.mark.parametrize("way", ["function", "clip", "step"])
    @in_worlds(["fsdp", "fsdp-and-plain", "ddp", "hsdp"])
    def test_equals_one_process(self, case: str, way: str, world: World) -> None:
        norms, weights = trained_in_one_process(3)
        assert min(norms) < MAX_NORM < max(norms)
        results = world.run(train, case, way, 3)
        for result in results:
            assert result["norms"] == results[0]["norms"]  # to the bit
            assert result["norms"] == pytest.approx(norms, rel=1e-4)
            assert result["collectives"] == [int(case != "ddp")] * 3
            for ours, theirs in zip(result["weights"], weights):
                assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)

    def test_parameter_norms_are_of_the_whole_parameters(self, world: World) -> None:
        for result in world.run(train, "fsdp", "clip", 1):
            module = model()
            loss(module, 0, 0, 1).backward()
            expected = [p.grad.norm().item() for p in module.parameters()]
            assert result["each"] == pytest.approx(expected, rel=1e-5)

    def test_a_nan_in_one_process_skips_the_step_in_all(self, world: World) -> None:
        _, weights = trained_in_one_process(4, bad=2)
        for way in ("clip", "step"):
            for result in world.run(train, "fsdp", way, 4, 2):
                assert result["skipped"] == 1
                for ours, theirs in zip(result["weights"], weights):
                    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
