"""Several processes that train one student: what they agree on, how their gradients are added, and how a student is cut into parts.

Sum in the objective, count globally, divide once: every process knows the count of the whole step, so gradients are added over processes and never
averaged. Two ways, `replicate` and `shard`. Replicated, each process holds the whole student, and gradients are added before the optimiser's step.
Sharded (FSDP2, `torch.distributed.fsdp.fully_shard`), each holds its part of every parameter, gradient and moment; the rest is fetched layer by
layer. A checkpoint of parts is written by PyTorch's distributed checkpoint as safetensors files, one for each process, and read by any number.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from stillroom.core.errors import ResourceError, RunError, StillroomError
from stillroom.core.launch import EndedElsewhere, launched
from stillroom.models.loading import layers_of
from stillroom.models.weight_files import check_safetensors

T = TypeVar("T")

# The others wait this long while the first process collects, evaluates or reports alone.
_LONG = timedelta(days=30)
# The first process waits so long for the others to end; one that was killed never says that it has.
_LEAVING_SECONDS = 10.0
# Gradients of small parameters are added together, in pieces of 32 MiB.
_BUCKET_NUMBERS = 2**23
# Where PyTorch keeps distributed checkpoints in safetensors files, which its older versions have not.
_PARTS_IN = "torch.distributed.checkpoint.hf_storage"
# What PyTorch's transports say when the process at the other end is gone.
_LOST = ("Connection closed by peer", "Connection reset", "Broken pipe", "gloo", "Gloo", "NCCL")


class Processes:
    """The processes that train together, seen from one of them. All of its methods are called by all of them, in the same order."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None = None, store: Store | None = None) -> None:
        self.rank, self.size = rank, size
        self._group, self._store = group, store

    @property
    def group(self) -> dist.ProcessGroup | None:
        """For small messages between the processors: waits as long as it takes."""
        return self._group

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def add(self, values: Sequence[float]) -> list[float]:
        """Each value added over all processes, in float64: the same on all of them, and the same again from run to run."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def first(self, action: Callable[[], object]) -> None:
        """`action` in the first process while the others wait. Where it raises there, the others raise EndedElsewhere."""
        if self.size == 1:
            action()
            return
        code = torch.zeros(1, dtype=torch.int64)
        if self.is_first:
            try:
                action()
            except BaseException as error:
                code += exit_code_of(error)
                # What went wrong is the news, not that nobody could be told.
                with suppress(RuntimeError):
                    dist.broadcast(code, src=0, group=self._group)
                raise
        dist.broadcast(code, src=0, group=self._group)
        if int(code):
            raise EndedElsewhere(int(code))

    def asked_of_first(self, question: Callable[[], bool]) -> bool:
        """The first process's answer."""
        answers: list[bool] = [False]

        def ask() -> None:
            answers[0] = question()

        self.first(ask)
        return self.add([float(answers[0] and self.is_first)])[0] > 0

    def require_same(self, what: str, number: int) -> None:
        """Raises RunError 'processes-differ' unless `number` (under 2^63) is the same in all processes."""
        if self.size == 1:
            return
        numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(numbers, torch.tensor([number]), group=self._group)
        if len({int(one) for one in numbers}) > 1:
            raise RunError(
                "processes-differ",
                found=f"{what} that is not the same in all {self.size} processes",
                expected="one state of the run for all",
                why="gradients of different weights would be added",
                do="Let all processes see the same files: the run directory and the models on a disk that they share.",
            )

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up the gradients over all processes, where they lie. A parameter without a gradient in every process keeps none."""
        parameters = list(parameters)
        if self.size == 1:
            return
        has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        dist.all_reduce(has, dist.ReduceOp.MAX, group=self._group)
        for bucket in _buckets([parameter for parameter, one in zip(parameters, has.tolist(), strict=True) if one]):
            gradients = [_gradient(parameter) for parameter in bucket]
            if len(gradients) == 1 and gradients[0].is_contiguous():
                dist.all_reduce(gradients[0])
                continue
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where one process fails, all end, and one says why: the first that failed. Raises EndedElsewhere in the others."""
        try:
            yield
        except EndedElsewhere:
            self._leave()
            raise
        except BaseException as error:
            if self.size == 1:
                raise
            speaks = self._speaks()
            self._leave()
            if not speaks:
                raise EndedElsewhere(exit_code_of(error)) from error
            if not _is_lost(error):
                raise
            raise RunError(
                "process-lost",
                found=f"process {self.rank} of {self.size} without one of the others, which ended and said nothing",
                expected=f"{self.size} processes up to the end",
                why="a process that is killed says nothing; where memory runs out, the system kills one",
                do="Look for what ended it (the system's log, torchrun's own lines). The same command resumes from the last checkpoint.",
            ) from error

    def _leave(self) -> None:
        """Before a process ends that failed: the first, which may keep the store that tells the others who speaks, goes last, but waits a little only."""
        assert self._store is not None
        with suppress(RuntimeError):
            if not self.is_first:
                self._store.add("left", 1)
                return
            until = time.monotonic() + _LEAVING_SECONDS
            while self._store.add("left", 0) < self.size - 1 and time.monotonic() < until:
                time.sleep(0.02)

    def _speaks(self) -> bool:
        """Whether this process is the first that failed."""
        assert self._store is not None
        try:
            return bool(self._store.add("failed", 1) == 1)
        except RuntimeError:  # the process that kept the store is gone
            return True


ALONE = Processes(0, 1)


@cache
def join() -> Processes:
    """The processes that `torchrun` started with this one, once all of them are there; ALONE where it started none."""
    launch = launched()
    if launch.size == 1:
        return ALONE
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = next(iter(rendezvous("env://")))
    store = PrefixStore(f"stillroom/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=PrefixStore("torch", store), rank=rank, world_size=size)
    return Processes(rank, size, dist.new_group(backend="gloo", timeout=_LONG), store)


def mode_of(asked: str, processes: Processes) -> Literal["none", "replicate", "shard"]:
    """none, replicate or shard: what `hardware.parallel` comes to with these processes. Raises ResourceError 'parallel-unavailable'."""
    if asked == "none" and processes.size > 1:
        raise _unavailable(
            f"hardware.parallel is none, and {processes.size} processes were started",
            "one process",
            "Start one process, or set hardware.parallel to auto, replicate or shard.",
        )
    if processes.size == 1:
        return "none"
    if asked == "shard" and not (hasattr(FSDPModule, "set_force_sum_reduction_for_comms") and find_spec(_PARTS_IN)):
        raise _unavailable(
            f"hardware.parallel is shard, and PyTorch {torch.__version__} cannot add gradients of parts or write parts as safetensors",
            "PyTorch 2.9 or newer",
            "Install a newer PyTorch, or set hardware.parallel to replicate.",
        )
    return "shard" if asked == "shard" else "replicate"


def exit_code_of(error: BaseException) -> int:
    """What a process that fails with `error` ends with."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, StillroomError) else 1


def state_number(tensors: Iterable[torch.Tensor]) -> int:
    """A number (under 2^63) of the bits of float32 tensors: other values, other order, other number."""
    number = 0
    for tensor in tensors:
        number = (31 * number + int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))) % (2**63 - 1)
    return number


def _unavailable(found: str, expected: str, do: str) -> ResourceError:
    return ResourceError("parallel-unavailable", found=found, expected=expected, do=do)


def _is_lost(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST))


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one type, up to `_BUCKET_NUMBERS` numbers; a larger parameter by itself."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(one.numel() for one in bucket) + parameter.numel() > _BUCKET_NUMBERS
        if bucket and (full or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


# -- a student in parts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """Cut the student into parts on `device`. `weights`: the directory that its parts are read from, where its parameters have no memory yet."""

    device: torch.device
    weights: Path | None = None


class Sharded(nn.Module):
    """A model and what is learned beside it, in parts. `forward` runs an action in which their whole parameters can be used.

    What the action returns may be taken backward once; then the gradient's parts have been added over the processes. Every process must go forward
    and backward as often as the others, with nothing to learn from if need be: each pass is an exchange between all.
    """

    def __init__(self, model: nn.Module, beside: nn.Module) -> None:
        super().__init__()
        self.model, self.beside = model, beside

    def forward(self, action: Callable[[], T]) -> T:
        """The action's result."""
        return action()


def shard(model: PreTrainedModel, beside: nn.Module, sharding: Sharding, dtype: torch.dtype) -> Sharded:
    """Cuts both into one part for each process: each decoder layer by itself, and the rest (embeddings, final norm, head) together.

    Layers are fetched in `dtype`; the rest stays float32, so that the head's gradient is accumulated in it. Gradients are added in float32, after
    every pass: kept whole until the step's last, they would take as much memory in each process as is saved.
    """
    whole = Sharded(model, beside)
    device = sharding.device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Residual streams stay as autocast has them: only the weights are narrowed, half the bytes to fetch.
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy: dict[str, Any] = {} if dtype == torch.float32 else {"mp_policy": narrow}
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, **policy)
    fully_shard(whole, mesh=mesh)
    for module in whole.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            if device.type == "cpu":
                # gloo has no reduction that divides by a factor.
                module.set_force_sum_reduction_for_comms(True)
    if sharding.weights is not None:
        whole._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))  # type: ignore[no-untyped-call]
        read_parts({name: parameter.detach() for name, parameter in model.named_parameters()}, sharding.weights)
    return whole


def stored_by_parameter(model: PreTrainedModel, files: Sequence[Path]) -> bool:
    """Whether the safetensors `files`, and no others beside them, hold each parameter of `model` under its name: then parts of it can be read."""
    stored = {name: entry["shape"] for file in files for name, entry in check_safetensors(file).items()}
    alone = {file.resolve() for file in files} == {file.resolve() for file in files[0].parent.glob("*.safetensors")}
    return alone and all(stored.get(name) == list(parameter.shape) for name, parameter in model.named_parameters())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor of which each process holds a part; others as they are. Called by all processes."""
    whole: torch.Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def write_parts(tensors: Mapping[str, torch.Tensor], directory: Path, processes: Processes) -> None:
    """Each process writes what it holds of `tensors` into its own safetensors file in `directory`, which exists."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    with _plain_errors():
        save(dict(tensors), storage_writer=writer, process_group=processes.group)


def read_parts(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Fills `tensors`, whole or in parts, from the safetensors files in `directory`, whole or in parts; nothing else of them is read.

    Raises ValueError where one is missing or of another shape, or what reading a damaged file raises.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with _plain_errors(), warnings.catch_warnings():
        # Each process reads for itself, so that none waits for one that could not; PyTorch warns of that.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What PyTorch collects over processes, as the first of the errors themselves."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise (ValueError(str(first)) if isinstance(first, AssertionError) else first) from error
