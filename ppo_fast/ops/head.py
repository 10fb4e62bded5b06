"""Linear head in chunks of a fixed height: logits, softmax and gradients of the rows that count.

The (N, V) logits never exist: a chunk of rows goes through the GEMM into one workspace, through
the one-pass kernels of `token_logprobs` in place, and through the two GEMMs of the backward. An
`extra` of low rank is one more product of the same logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast._boundary import calls
from ppo_fast._boundary.options import Scoring, Softmax
from ppo_fast._boundary.schema import backends_of
from ppo_fast.ops import gemm
from ppo_fast.ops.distributed_weight import require_whole
from ppo_fast.ops.shards import Shard, softmax_of

# GEMM libraries give a row the same bits in any batch only if the row count is padded to a
# multiple of this.
_TILE = {"cpu": 16, "cuda": 256}
# Logits of a chunk: 128 MB of fp32 on a CPU, 1 GB on a GPU.
_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 28}
_TALLEST = {"cpu": 512, "cuda": 4096}
# Chunks whose gradients are multiplied at a time: a GPU reads and writes a wide dW whole for every
# product, with two half as often. Their logits are 1.4 GB of fp32 there at most.
_BLOCK = {"cpu": 1, "cuda": 2}
_BLOCK_LOGITS = 350_000_000


# Ignored tokens are masked by now: no token has this id.
NOTHING_IGNORED = -(1 << 62)


def chunk_height(vocab: int, kind: str) -> int:
    """Rows of a chunk, from the vocabulary alone, never from the number of rows."""
    tile = _TILE[kind]
    rows = max(tile, min(_TALLEST[kind], _LOGITS[kind] // vocab // tile * tile))
    # Powers of two fill whole waves of a GPU: 1024 rows of hidden gradients at H = 4096 are 128 of
    # cuBLAS's 256 x 128 tiles for 132 multiprocessors, 1536 rows are 192 in two waves.
    return rows if kind == "cpu" else 1 << rows.bit_length() - 1


def block_height(vocab: int, kind: str) -> int:
    """Rows of a block: the chunks whose gradients are multiplied at a time."""
    chunk = chunk_height(vocab, kind)
    fit = max(1, _BLOCK_LOGITS // (vocab * chunk))
    return chunk * min(_BLOCK[kind], fit)


def _slices(count: int, height: int) -> Iterator[slice]:
    for start in range(0, count, height):
        yield slice(start, min(count, start + height))


def _up(count: int, tile: int) -> int:
    return -(-count // tile) * tile


def _padded(x: Tensor, tall: int) -> Tensor:
    """x (R, K) with rows of 0 below, up to `tall`."""
    missing = tall - x.shape[0]
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x


def unravelled(index: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """As `torch.unravel_index`, which copies the shape to the device and waits for that."""
    parts = []
    for size in reversed(shape):
        parts.append(index % size)
        index = index // size
    return tuple(reversed(parts))


def softcap_slope(z: Tensor, cap: float, scale: float) -> Tensor:
    """scale·(1 − (z / cap)²), the slope of z = cap·tanh(scale·x / cap) by x."""
    slope = (z / cap).square_().neg_().add_(1.0)
    return slope if scale == 1.0 else slope.mul_(scale)


class HeadRows(NamedTuple):
    """The rows that are computed: their places among the tokens, and per-token arguments, (R,)."""

    places: Tensor | None  # (R,) int64 into the N tokens, ascending; None: all of them
    tokens: Tensor
    keep: Tensor | None  # bool; None keeps all
    temperature: Tensor | None  # replaces the number
    n: int  # tokens in all

    def pick(self, x: Tensor) -> Tensor:
        """A per-token tensor's values at these rows, (R,)."""
        flat = x.reshape(-1)
        return flat if self.places is None else flat[self.places]

    def pick_some(self, x: Tensor | None) -> Tensor | None:
        """The same where there is a tensor."""
        return None if x is None else self.pick(x)

    def spread(self, x: Tensor) -> Tensor:
        """(R, ...) back among all tokens, 0 elsewhere: (N, ...)."""
        if self.places is None:
            return x
        return x.new_zeros(self.n, *x.shape[1:]).index_copy_(0, self.places, x)


class HeadOptions(NamedTuple):
    """Arguments of the head that are not per-token tensors."""

    temperature: float
    softcap: float | None
    shard: Shard | None
    backend: str
    size: int  # the vocabulary's rows of the weight here; those behind them are padding
    # The logits before the cap are times this; without a cap it is in the temperature.
    logit_scale: float = 1.0

    @property
    def vocab(self) -> int:
        """The vocabulary of all ranks."""
        return self.size if self.shard is None else self.shard.vocab

    @property
    def largest(self) -> int:
        """The largest share: what makes all ranks take the same chunks."""
        return self.size if self.shard is None else self.shard.largest


class HeadOperands(NamedTuple):
    """Tensors of the logits cap(hidden · weightᵀ + u · bᵀ + bias), in autograd's order."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    u: Tensor | None = None  # (..., r)
    b: Tensor | None = None  # (V, r)


class Product:
    """One product of the logits, of rows (..., K) and a weight (V, K), and its gradients.

    Rows of the weight from `size` on are padding, which has a gradient of 0.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, size: int, rows: HeadRows) -> None:
        require_whole(weight, size)
        self.hidden, self.weight, self.rows = hidden, weight[:size], rows
        self._padded = weight.shape[0]
        self.dx: Tensor | None = None  # in the rows' order
        self.dw: Tensor | None = None  # wide
        self._written = False

    def allocate(self, hidden: bool, weight: bool, wide: torch.dtype) -> None:
        """Make the gradients that are asked for."""
        count, (size, k) = self.rows.tokens.shape[0], self.weight.shape
        if hidden:
            self.dx = self.hidden.new_zeros(count, k)
        if weight:
            self.dw = self.weight.new_empty(self._padded, k, dtype=wide)
            if self._padded > size:
                self.dw[size:].zero_()

    def inputs(self, at: Tensor | slice) -> Tensor:
        """Rows of a chunk, (R, K); 0 where masked: 0·NaN would reach dW."""
        rows = self.rows
        index = at if rows.places is None else rows.places[at]
        try:
            x = self.hidden.view(-1, self.hidden.shape[-1])[index]
        except (RuntimeError, ValueError):  # fake tensors raise the latter
            # Rows that do not lie at one stride are gathered, not copied whole.
            every = torch.arange(rows.n, device=self.hidden.device)
            x = self.hidden[unravelled(every[index], self.hidden.shape[:-1])]
        if rows.keep is None:
            return x
        return torch.where(rows.keep[at][:, None], x, x.new_zeros(()))

    def add_weight_gradient(self, dz: Tensor, x: Tensor) -> None:
        """dW += dzᵀ · x, where it is asked for."""
        size = self.weight.shape[0]
        if self.dw is not None and size > 0:
            gemm.add_weight_gradient(self.dw[:size], dz, x, beta=int(self._written))
            self._written = True

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Both, (..., K) and (V, K), in the operands' precision."""
        if self.dw is not None and not self._written:
            self.dw.zero_()
        dx = None if self.dx is None else self.rows.spread(self.dx).view(self.hidden.shape)
        return dx, None if self.dw is None else self.dw.to(self.weight.dtype)


class Head:
    """One call's chunks: logits, softmax, and the gradients that are accumulated."""

    def __init__(self, operands: HeadOperands, rows: HeadRows, options: HeadOptions) -> None:
        hidden, weight, bias, u, b = operands
        size, largest = options.size, options.largest
        self.hidden, self.weight = hidden, weight[:size]
        self.bias = None if bias is None else bias[:size]
        self.products = [Product(hidden, weight, size, rows)]
        if u is not None and b is not None:
            self.products.append(Product(u, b, size, rows))
        self.rows, self.options = rows, options
        self.wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        kind = "cpu" if hidden.device.type == "cpu" else "cuda"
        self.height, self.tile = chunk_height(largest, kind), _TILE[kind]
        # A cap's own slopes take a second workspace.
        self.block = self.height if options.softcap is not None else block_height(largest, kind)
        # Rows that a product has at least. On CUDA a whole chunk: the choice of GEMM must not
        # follow N.
        self.least = self.height if kind == "cuda" else self.tile
        self.db: Tensor | None = None
        self._padded = weight.shape[0]  # the rows of db
        self._z: Tensor | None = None

    def allocate(self, hidden: bool, weight: bool, bias: bool, u: bool, b: bool) -> None:
        """Make the gradients of the operands that are asked for."""
        asked = ((hidden, weight), (u, b))
        for product, each in zip(self.products, asked, strict=False):
            product.allocate(*each, self.wide)
        if bias:
            self.db = self.weight.new_zeros(self._padded, dtype=self.wide)

    def chunks(self, count: int) -> Iterator[slice]:
        """Slices of `count` rows."""
        return _slices(count, self.height)

    def blocks(self, count: int) -> Iterator[slice]:
        """The same in blocks, for gradients."""
        return _slices(count, self.block)

    def inputs(self, at: Tensor | slice) -> tuple[Tensor, ...]:
        """Rows of a chunk, (R, K) of each product; 0 where masked."""
        return tuple(product.inputs(at) for product in self.products)

    def logits(self, x: tuple[Tensor, ...]) -> Tensor:
        """z = cap(Σ x · weightᵀ + bias), (R, V), in the workspace, a chunk a product.

        An empty share has one logit, −∞, of no row of the weight: no kernel meets V = 0.
        """
        count, size = x[0].shape[0], self.weight.shape[0]
        if self._z is None:
            tall = min(self.block, _up(count, self.least))
            self._z = torch.empty(tall, max(1, size), dtype=self.wide, device=x[0].device)
        if size == 0:
            return self._z[:count].fill_(-torch.inf)
        for at in self.chunks(count):
            tall = _up(at.stop - at.start, self.least)
            z = self._z[at.start : at.start + tall]
            for i, (part, product) in enumerate(zip(x, self.products, strict=True)):
                put = gemm.add_logits if i else gemm.logits_into
                put(z, _padded(part[at], tall), product.weight)
        z = self._z[:count]
        if self.bias is not None:
            z += self.bias
        cap = self.options.softcap
        if cap is not None:
            z.div_(cap / self.options.logit_scale).tanh_().mul_(cap)
        return z

    def scoring(self, at: Tensor | slice) -> Scoring:
        """The tokens of a chunk, by their global ids."""
        rows = self.rows
        keep, temperature = (None if x is None else x[at] for x in (rows.keep, rows.temperature))
        number = self.options.temperature
        return Scoring(rows.tokens[at], keep, temperature, number, NOTHING_IGNORED)

    def softmax(self, z: Tensor, at: Tensor | slice) -> Softmax:
        """Softmax numbers of a chunk."""
        return softmax_of(self.options.backend, z, self.scoring(at), self.options.shard)

    def backward(
        self,
        z: Tensor,
        x: tuple[Tensor, ...],
        at: Tensor | slice,
        softmax: Softmax,
        g: Tensor,
        h: Tensor,
    ) -> None:
        """Accumulate the gradients of Σ g·logprobs + h·entropy over a block; overwrites z."""
        s, shard = self.scoring(at), self.options.shard
        if self.options.softcap is None and shard is None and self._writes_bf16:
            calls.logprobs_bwd_bf16_(self.options.backend, z, s, softmax, g, h)
            self.accumulate(z.view(torch.bfloat16)[:, : z.shape[1]], x, at)
            return
        bend = self.bend(z)

        def kernel(s: Scoring, g: Tensor) -> Tensor:
            calls.logprobs_bwd_(self.options.backend, z, s, softmax, g, h)
            return z

        if shard is None:
            kernel(s, g)
        else:
            shard.gradient(kernel, z, s, softmax, g, h)
        if bend is not None:
            z *= bend
        self.accumulate(z, x, at)

    def bend(self, z: Tensor) -> Tensor | None:
        """The softcap's slope at capped logits; None without a cap."""
        cap = self.options.softcap
        return None if cap is None else softcap_slope(z, cap, self.options.logit_scale)

    @property
    def _writes_bf16(self) -> bool:
        """True where the softmax's gradient is rounded by the kernel that forms it."""
        narrow = self.weight.dtype == torch.bfloat16
        return narrow and self.options.backend in backends_of("logprobs_bwd_bf16_")

    def accumulate(self, dz: Tensor, x: tuple[Tensor, ...], at: Tensor | slice) -> None:
        """Add a block's part of the gradients; dz (R, V) is wide or has the weight's dtype.

        On CUDA dz lies at the start of the workspace; it may be overwritten.
        """
        size = self.weight.shape[0]
        if self.db is not None:
            self.db[:size].add_(dz.sum(0, dtype=self.wide)[:size])
        if dz.is_cuda and dz.dtype != self.weight.dtype:
            dz = gemm.narrowed(dz, self.weight.dtype)
        for product, rows in zip(self.products, x, strict=True):
            if product.dx is not None:
                dx = self._hidden_gradient(dz, product.weight)
                if self.options.shard is not None:
                    dist.all_reduce(dx, group=self.options.shard.group)
                product.dx[at] = dx.to(product.dx.dtype)
            product.add_weight_gradient(dz, rows)

    def _hidden_gradient(self, dz: Tensor, weight: Tensor) -> Tensor:
        """dz · weight, in products of the logits' heights: a row keeps its bits."""
        count = dz.shape[0]
        if weight.shape[0] == 0:
            return dz.new_zeros(count, weight.shape[1])
        if dz.is_cuda:
            # The workspace has rows below dz up to a whole chunk; no row meets another.
            whole = dz.as_strided((_up(count, self.height), dz.shape[1]), dz.stride())
            parts = [gemm.hidden_gradient(p, weight) for p in whole.split(self.height)]
            return (parts[0] if len(parts) == 1 else torch.cat(parts))[:count]
        last = count % self.tile
        if last == 0:
            return gemm.hidden_gradient(dz, weight)
        # Only the last tile is copied, for its padding.
        tail = _padded(dz[count - last :], self.tile)
        dx = gemm.hidden_gradient(tail, weight)[:last]
        if count < self.tile:
            return dx
        return torch.cat([gemm.hidden_gradient(dz[: count - last], weight), dx])

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of the operands, in their order and precision; the workspace is given up."""
        self._z = None  # before dW is there twice
        own, *extra = (product.gradients() for product in self.products)
        db = None if self.db is None or self.bias is None else self.db.to(self.bias.dtype)
        return *own, db, *(extra[0] if extra else (None, None))


def live_rows(*slopes: Tensor | None) -> Tensor | None:
    """Indices of the rows with a gradient; None on a GPU and where all have one."""
    given = [x for x in slopes if x is not None]
    if given[0].device.type != "cpu":
        return None
    live = given[0] != 0
    for x in given[1:]:
        live |= x != 0
    return None if bool(live.all()) else live.nonzero()[:, 0]
