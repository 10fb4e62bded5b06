"""Ranks: processes that share a batch and hold the same results."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

import ppo_fast
from ppo_fast.loop.config import OptionError, TrainConfig

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
_FAILED = "failed"
_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux
_ANSWER = 5.0  # seconds that a store may take


class RankFailedError(RuntimeError):
    """Another rank failed, died, or did not answer in time."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run; by default the only one, for which nothing is sent.

    A global row belongs to the rank that `share` gives it to. Sums go over ranks, not means, so a
    loss divides by the tokens of all of them.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False
    """Each rank holds a shard of every weight (FSDP2), so a forward is itself a collective."""
    timeout: float = 120.0
    """Seconds after which a rank that waits for another one gives up."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """True for the rank that rewards, writes and prints."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of `rows` (n, ...), whose n the number of ranks divides."""
        return rows.tensor_split(self.size)[self.rank]

    def gather(self, x: Tensor, fill: float) -> Tensor:
        """The rows of all ranks, (B, T), from each one's (B / ranks, T') padded with `fill`."""
        if self.size == 1:
            return x
        width = torch.tensor(x.shape[1], device=x.device)
        self._send(dist.all_reduce, width, dist.ReduceOp.MAX)
        padded = torch.nn.functional.pad(x, (0, int(width) - x.shape[1]), value=fill)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._send(dist.all_gather, parts, padded)
        return torch.cat(parts)

    def sum_(self, tensors: list[Tensor]) -> None:
        """Add `tensors` of one dtype up over the ranks, in place, in a single collective."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([x.flatten() for x in tensors])
        self._send(dist.all_reduce, flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(total.view_as(x))

    def merge(self, stats: ppo_fast.Stats) -> ppo_fast.Stats:
        """The statistics of all ranks."""
        return stats if self.size == 1 else self._send(stats.all_reduce)

    def from_first(self, make: Callable[[], T]) -> T:
        """Result of `make`, called on the first rank alone; if it raises, all stop."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, "rank 0 was interrupted"]
        try:
            if self.first:
                box = [make(), ""]
        except Exception as error:
            box[1] = _words(self, error)
            raise
        finally:  # the store ends with the first rank, so the others hear its reason from itself
            self._send(dist.broadcast_object_list, box)
        if box[1]:
            raise RankFailedError(f"rank {self.rank} of {self.size} stopped: {box[1]}")
        return box[0]

    def any(self, flag: bool) -> bool:
        """True if `flag` is set on any rank: one answer, so that all stop together."""
        if self.size == 1:
            return flag
        count = torch.tensor(int(flag), device=self.device)
        self._send(dist.all_reduce, count)
        return bool(count)

    def _send(self, collective: Callable[..., T], *args: Any) -> T:
        try:
            return collective(*args)
        except RuntimeError as error:
            line = str(error).splitlines()[0]
            raise RankFailedError(
                f"rank {self.rank} of {self.size} stopped: another rank died or did not answer"
                f" within {self.timeout:g} s ({line})"
            ) from error


@contextmanager
def processes(config: TrainConfig) -> Iterator[Ranks]:
    """The ranks that torchrun describes in the environment; without it, one process.

    Raises `RankFailedError` once another rank has failed: with its reason where it could still
    leave one, and otherwise when the connection breaks or `config.timeout` has passed.
    """
    config, size = config.resolved(), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    _check(config, size)
    device = device_of(config)
    wait = timedelta(seconds=config.timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    master, rank = os.environ["MASTER_ADDR"], int(os.environ["RANK"])
    try:
        if backend == "gloo" and (interface := _interface_to(master)):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        store, rank, size = next(rendezvous("env://", timeout=wait))
        shared = dist.PrefixStore("ppo_fast", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, None, wait, size, rank, shared)
    except (RuntimeError, OSError) as error:
        raise RankFailedError(
            f"rank {rank} of {size} did not meet the others at {master} within"
            f" {config.timeout:g} s: {str(error).splitlines()[0]}. Every host must reach that"
            " address and each other's: see --local-addr of torchrun, GLOO_SOCKET_IFNAME and"
            " NCCL_SOCKET_IFNAME"
        ) from error
    ranks = Ranks(rank, size, config.parallel == "fsdp2", config.timeout, device)
    try:
        yield ranks
    except Exception as error:
        if reason := _reason(store):
            raise RankFailedError(f"rank {rank} of {size} stopped: {reason}") from error
        if not isinstance(error, RankFailedError):
            _answered(partial(store.set, _FAILED, _words(ranks, error)))
        raise
    finally:
        dist.destroy_process_group()


def _interface_to(host: str) -> str:
    """Name of the interface by which packets for `host` leave; empty unless it has IPv4.

    gloo would take the interface of this host's own name, which is often the loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                found = fcntl.ioctl(probe, _GET_ADDRESS, request)[20:24]
            except OSError:  # it has no such address
                continue
            if socket.inet_ntoa(found) == own:
                return name
    return ""


def _check(config: TrainConfig, size: int) -> None:
    """Every rank must have as many rows as the others in every forward."""
    if config.lora_rank and config.parallel == "fsdp2":
        raise OptionError(
            f"lora_rank must be 0 with parallel='fsdp2': use 'ddp', got {config.lora_rank}"
        )
    if config.batch % (config.minibatches * size):
        raise OptionError(
            f"batch must be a multiple of minibatches x processes = {config.minibatches} x {size},"
            f" got {config.batch}"
        )


def _words(ranks: Ranks, error: Exception) -> str:
    return f"rank {ranks.rank} failed: {type(error).__name__}: {error}"


def _reason(store: Store) -> str:
    """Why another rank failed; empty where none has said so, or its store is gone."""
    return _answered(lambda: store.get(_FAILED).decode() if store.check([_FAILED]) else "") or ""


def _answered(ask: Callable[[], T]) -> T | None:
    """Answer of a store; None if it is gone, or does not answer because its host is."""
    answer: list[T] = []

    def run() -> None:
        with suppress(RuntimeError):  # the connection is broken
            answer.append(ask())

    # No timeout of a store bounds `check` and `set` once nothing arrives any more.
    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(_ANSWER)
    return answer[0] if answer else None


def device_of(config: TrainConfig) -> torch.device:
    """This process's device: under torchrun each rank of a machine has a GPU of its own.

    Raises OptionError for a name of no device, and for one that is not there.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(
            f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}"
        ) from None
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type != "cpu":
        there = torch.accelerator.current_accelerator(check_available=True)
        count = torch.accelerator.device_count()
        if there is None or there.type != device.type or (device.index or 0) >= count:
            found = f"{count} of {there.type}" if there else "none"
            raise OptionError(
                f"device must be 'cpu' or an accelerator that torch finds here ({found}),"
                f" got {name!r} for local rank {os.environ.get('LOCAL_RANK', 0)}"
            )
    if name == "cuda":
        torch.cuda.set_device(device)
    return device
