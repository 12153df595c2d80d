# ruff: noqa: E741
"""Fused kernels (Triton) for the experts of one Linear: each large tensor is passed over once.

    features          reads x: router logits, softmax, A dropout(x) and gating; keeps the dropout mask as bits
    thin_gradients    gradients of the logits and of A's features, from those of the gated features and of the weights
    add_to_input      adds the gradients of x by router and A to that by the base Linear, in place
    weight_gradients  reads x: gradients of router and A

They compute what `peft/functions.py` does, in the same dtype, with sums in float32. Sums that several programs share
are written as parts and added in a fixed order, so that a run can be repeated to the bit. `peft/fused.py` calls them.

Shape suffixes: T tokens, E experts (with the null expert), R rank of one expert, S stacked rank of the trained ones,
H rows of A (S, or R if the experts share A), I input features. In kernels, EP, HP and SP are E, H and S padded to a
power of two, at least the 16 that `tl.dot` needs.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused import Shape

# Of a program for its loads, in bytes. With what else it takes, 160 KiB of a multiprocessor, as of A100, suffice.
SHARED_MEMORY = 128 * 2**10
INTERPRETED = bool(triton.knobs.runtime.interpret)  # on a CPU, for tests
# The fewest rounds with which Philox4x32 passes BigCrush (Salmon et al., SC 2011). Each call serves eight elements.
ROUNDS = tl.constexpr(7)


class Sizes(NamedTuple):
    """The tile of a program in tokens and features, its warps, and the stages of loads under way in its loop.

    `programs`, for each multiprocessor, are started at least where a sum can be split over them.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 3
    programs: int = 2


# The fastest of six to eight for each kernel on an H100, over I = 4096 and 11008, with dropout and without it: 64 rows
# are the least that Hopper's matrix units take, and tiles larger than these spill registers or leave too few programs.
FEATURES = Sizes(rows=64, columns=64, stages=4, programs=3)
THIN = Sizes(rows=32, columns=0)
INPUT = Sizes(rows=64, columns=128)
WEIGHTS = Sizes(rows=128, columns=128, warps=8)


@triton.jit
def _softmax(logits, E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr):
    """Over the first E of EP columns; with TOP_K, over the k largest of them."""
    experts = tl.arange(0, EP)[None, :]
    logits = tl.where(experts < E, logits, float("-inf"))
    if TOP_K > 0:
        kept = experts < 0
        rest = logits
        for _ in tl.static_range(TOP_K):
            largest = experts == tl.argmax(rest, 1)[:, None]
            kept = kept | largest
            rest = tl.where(largest, float("-inf"), rest)
        logits = tl.where(kept, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _matches(rows, columns):
    """1 where two index vectors agree, else 0: products with it pick or add up columns, exactly."""
    return (rows[:, None] == columns[None, :]).to(tl.float32)


@triton.jit
def _two(words, LIMIT: tl.constexpr):
    """Two bits for each word of 32: upper and lower half against the upper half of LIMIT."""
    words = words.to(tl.uint32, bitcast=True)
    return tl.where(words >= LIMIT, 1, 0) | tl.where((words << 16) >= LIMIT, 2, 0)


@triton.jit
def _drawn(seed, counters, DROPPED: tl.constexpr):
    """A byte of random bits for each counter, each 1 with a probability of 1 - DROPPED / 65536."""
    LIMIT: tl.constexpr = DROPPED * 65536
    r0, r1, r2, r3 = tl.randint4x(seed, counters, ROUNDS)
    return _two(r0, LIMIT) | _two(r1, LIMIT) << 2 | _two(r2, LIMIT) << 4 | _two(r3, LIMIT) << 6


@triton.jit
def _unpacked(bytes, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """The bits of (ROWS, BYTES) as booleans (ROWS, 8 * BYTES), the lowest bit first."""
    bits = (bytes.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits == 1, (ROWS, 8 * BYTES))


@triton.jit
def _write_features(
    logits, hidden, rows, T, scale, gate_p, hidden_p, gated_p,
    E: tl.constexpr, R: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    EP: tl.constexpr, HP: tl.constexpr, SP: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    inside = (rows < T)[:, None]
    rows = rows.to(tl.int64)[:, None]
    features, stacked = tl.arange(0, HP), tl.arange(0, SP)
    hidden = hidden.to(hidden_p.dtype.element_ty)
    tl.store(hidden_p + rows * H + features[None, :], hidden, inside & (features < H)[None, :])
    gated = hidden.to(tl.float32)
    if E > 1:
        experts = tl.arange(0, EP)
        gate = _softmax(logits, E, EP, TOP_K)
        tl.store(gate_p + rows * E + experts[None, :], gate, inside & (experts < E)[None, :])
        if H < S:
            gated = tl.dot(gated, _matches(features, stacked % R), input_precision="ieee")
        gated *= tl.dot(gate, _matches(experts, stacked // R), input_precision="ieee")
    gated = (scale * gated).to(gated_p.dtype.element_ty)
    tl.store(gated_p + rows * S + stacked[None, :], gated, inside & (stacked < S)[None, :])


@triton.jit(do_not_specialize=["T", "BYTES", "seed"])
def _features(
    x_p, W_p, A_p, gate_p, hidden_p, gated_p, bits_p, parts_p, T, BYTES, seed, scale,
    I: tl.constexpr, E: tl.constexpr, R: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    EP: tl.constexpr, HP: tl.constexpr, SP: tl.constexpr, TOP_K: tl.constexpr, DROPPED: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (t, n): tile t of tokens, SPAN input features from n * SPAN on; it writes part n of the sums."""
    dtype = hidden_p.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places = tl.minimum(rows, T - 1).to(tl.int64)[:, None] * I
    experts, features = tl.arange(0, EP), tl.arange(0, HP)
    logits = tl.zeros((ROWS, EP), tl.float32)
    hidden = tl.zeros((ROWS, HP), tl.float32)
    for offset in range(0, SPAN, COLUMNS):
        start = tl.program_id(1) * SPAN + offset
        columns = start + tl.arange(0, COLUMNS)
        inside = (columns < I)[None, :]
        x = tl.load(x_p + places + columns[None, :], inside, other=0.0).to(dtype)
        A = tl.load(A_p + features[:, None] * I + columns[None, :], (features < H)[:, None] & inside, other=0.0)
        if E > 1:
            W = tl.load(W_p + experts[:, None] * I + columns[None, :], (experts < E)[:, None] & inside, other=0.0)
            logits = tl.dot(x, tl.trans(W.to(dtype)), logits, input_precision="ieee")
        if DROPPED > 0:
            bytes = start // 8 + tl.arange(0, COLUMNS // 8)
            packed = _drawn(seed, rows[:, None] * BYTES + bytes[None, :], DROPPED).to(tl.uint8)
            stays = (rows < T)[:, None] & (bytes < BYTES)[None, :]
            tl.store(bits_p + rows.to(tl.int64)[:, None] * BYTES + bytes[None, :], packed, stays)
            x = tl.where(_unpacked(packed, ROWS, COLUMNS // 8), x, 0.0)
        hidden = tl.dot(x, tl.trans(A.to(dtype)), hidden, input_precision="ieee")
    if SPAN >= I:
        _write_features(logits, hidden, rows, T, scale, gate_p, hidden_p, gated_p, E, R, S, H, EP, HP, SP, TOP_K)
    else:
        part_p = parts_p + (tl.program_id(1) * T + rows).to(tl.int64)[:, None] * (EP + HP)
        if E > 1:
            tl.store(part_p + experts[None, :], logits, (rows < T)[:, None])
        tl.store(part_p + EP + features[None, :], hidden, (rows < T)[:, None])


@triton.jit(do_not_specialize=["T"])
def _sum_features(
    parts_p, gate_p, hidden_p, gated_p, T, scale,
    I: tl.constexpr, E: tl.constexpr, R: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    EP: tl.constexpr, HP: tl.constexpr, SP: tl.constexpr, TOP_K: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    logits = tl.zeros((ROWS, EP), tl.float32)
    hidden = tl.zeros((ROWS, HP), tl.float32)
    for split in tl.static_range(SPLITS):
        part_p = parts_p + (split * T + tl.minimum(rows, T - 1)).to(tl.int64)[:, None] * (EP + HP)
        if E > 1:
            logits += tl.load(part_p + tl.arange(0, EP)[None, :])
        hidden += tl.load(part_p + EP + tl.arange(0, HP)[None, :])
    _write_features(logits, hidden, rows, T, scale, gate_p, hidden_p, gated_p, E, R, S, H, EP, HP, SP, TOP_K)


@triton.jit(do_not_specialize=["T"])
def _thin_gradients(
    dgated_p, dgate_p, gate_p, hidden_p, dlogits_p, dhidden_p, T, scale,
    I: tl.constexpr, E: tl.constexpr, R: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    EP: tl.constexpr, HP: tl.constexpr, SP: tl.constexpr, FROM_OUTSIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < T)[:, None]
    rows = rows.to(tl.int64)[:, None]
    experts, features, stacked = tl.arange(0, EP), tl.arange(0, HP), tl.arange(0, SP)
    of_experts, of_features = inside & (experts < E)[None, :], inside & (features < H)[None, :]
    of_stacked = inside & (stacked < S)[None, :]
    dgated = scale * tl.load(dgated_p + rows * S + stacked[None, :], of_stacked, other=0.0).to(tl.float32)
    gate = tl.load(gate_p + rows * E + experts[None, :], of_experts, other=0.0)
    hidden = tl.load(hidden_p + rows * H + (stacked % H)[None, :], of_stacked, other=0.0).to(tl.float32)
    dgate = tl.dot(dgated * hidden, _matches(stacked // R, experts), input_precision="ieee")
    if FROM_OUTSIDE:
        dgate += tl.load(dgate_p + rows * E + experts[None, :], of_experts, other=0.0)
    dlogits = gate * (dgate - tl.sum(gate * dgate, 1)[:, None])
    dhidden = dgated * tl.dot(gate, _matches(experts, stacked // R), input_precision="ieee")
    if H < S:
        dhidden = tl.dot(dhidden, _matches(stacked % R, features), input_precision="ieee")
    tl.store(dlogits_p + rows * E + experts[None, :], dlogits.to(dlogits_p.dtype.element_ty), of_experts)
    tl.store(dhidden_p + rows * H + features[None, :], dhidden.to(dhidden_p.dtype.element_ty), of_features)


@triton.jit(do_not_specialize=["T"])
def _add_to_input(
    dx_p, W_p, A_p, dlogits_p, dhidden_p, bits_p, T,
    I: tl.constexpr, E: tl.constexpr, R: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    EP: tl.constexpr, HP: tl.constexpr, SP: tl.constexpr, DROPPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (t, n): tile t of tokens, tile n of input features."""
    dtype = dhidden_p.dtype.element_ty
    BYTES: tl.constexpr = I // 8
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    of_rows, of_columns = (rows < T)[:, None], (columns < I)[None, :]
    rows = rows.to(tl.int64)[:, None]
    experts, features = tl.arange(0, EP), tl.arange(0, HP)
    dx_p += rows * I + columns[None, :]
    dx = tl.load(dx_p, of_rows & of_columns, other=0.0)
    dhidden = tl.load(dhidden_p + rows * H + features[None, :], of_rows & (features < H)[None, :], other=0.0)
    A = tl.load(A_p + features[:, None] * I + columns[None, :], (features < H)[:, None] & of_columns, other=0.0)
    added = tl.dot(dhidden, A.to(dtype), input_precision="ieee")
    if DROPPED > 0:
        bytes = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
        packed = tl.load(bits_p + rows * BYTES + bytes, of_rows & (bytes < BYTES), other=0)
        added = tl.where(_unpacked(packed, ROWS, COLUMNS // 8), added, 0.0)
    if E > 1:
        dlogits = tl.load(dlogits_p + rows * E + experts[None, :], of_rows & (experts < E)[None, :], other=0.0)
        W = tl.load(W_p + experts[:, None] * I + columns[None, :], (experts < E)[:, None] & of_columns, other=0.0)
        added = tl.dot(dlogits, W.to(dtype), added, input_precision="ieee")
    tl.store(dx_p, (dx.to(tl.float32) + added).to(dx_p.dtype.element_ty), of_rows & of_columns)


@triton.jit(do_not_specialize=["T"])
def _weight_gradients(
    x_p, dlogits_p, dhidden_p, bits_p, parts_p, T,
    I: tl.constexpr, E: tl.constexpr, R: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    EP: tl.constexpr, HP: tl.constexpr, SP: tl.constexpr, DROPPED: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (n, s): tile n of input features, SPAN tokens from s * SPAN on; it writes part s of the sum."""
    dtype = dhidden_p.dtype.element_ty
    BYTES: tl.constexpr = I // 8
    ROWS_OF_W: tl.constexpr = E if E > 1 else 0
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    of_columns = (columns < I)[None, :]
    experts, features = tl.arange(0, EP), tl.arange(0, HP)
    dW = tl.zeros((EP, COLUMNS), tl.float32)
    dA = tl.zeros((HP, COLUMNS), tl.float32)
    for offset in range(0, SPAN, ROWS):
        rows = tl.program_id(1) * SPAN + offset + tl.arange(0, ROWS)
        of_rows = (rows < T)[:, None]
        rows = rows.to(tl.int64)[:, None]
        x = tl.load(x_p + rows * I + columns[None, :], of_rows & of_columns, other=0.0).to(dtype)
        if E > 1:
            dlogits = tl.load(dlogits_p + rows * E + experts[None, :], of_rows & (experts < E)[None, :], other=0.0)
            dW = tl.dot(tl.trans(dlogits), x, dW, input_precision="ieee")
        dhidden = tl.load(dhidden_p + rows * H + features[None, :], of_rows & (features < H)[None, :], other=0.0)
        if DROPPED > 0:
            bytes = tl.program_id(0) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
            packed = tl.load(bits_p + rows * BYTES + bytes, of_rows & (bytes < BYTES), other=0)
            x = tl.where(_unpacked(packed, ROWS, COLUMNS // 8), x, 0.0)
        dA = tl.dot(tl.trans(dhidden), x, dA, input_precision="ieee")
    part_p = parts_p + tl.program_id(1).to(tl.int64) * (ROWS_OF_W + H) * I + columns[None, :]
    if E > 1:
        tl.store(part_p + experts[:, None] * I, dW, (experts < E)[:, None] & of_columns)
    tl.store(part_p + (ROWS_OF_W + features)[:, None] * I, dA, (features < H)[:, None] & of_columns)


def features(
    x_TI: Tensor, W_EI: Tensor | None, A_HI: Tensor, shape: Shape, scale: float, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Router weights w (T, E), float32; hidden = A dropout(x) (T, H); scale * repeat(w, R) * hidden (T, S); bits.

    Without a router there are no weights. Bits are None without dropout, else its mask, eight features to a byte, the
    lowest bit first: (T, I / 8). The seed is drawn from the generator of the CPU, which nothing waits for and which
    checkpointing restores.
    """
    *leading, I = x_TI.shape
    T, sizes = x_TI.numel() // I, FEATURES
    gate = None if W_EI is None else x_TI.new_empty(*leading, shape.experts, dtype=torch.float32)
    hidden = x_TI.new_empty(*leading, shape.rows_of_a, dtype=dtype)
    gated = x_TI.new_empty(*leading, shape.stacked_rank, dtype=dtype)
    bits = x_TI.new_empty(T, I // 8, dtype=torch.uint8) if shape.dropped else None
    seed = int(torch.randint(2**31 - 1, (), device="cpu")) if shape.dropped else 0
    constants = shape.constants() | {"TOP_K": shape.top_k}
    thin = constants["EP"] + constants["HP"]
    columns = _fitting(sizes.columns, (sizes.rows * x_TI.itemsize + thin * A_HI.itemsize) * sizes.stages)
    tiles = triton.cdiv(T, sizes.rows)
    span = _span(tiles, I, columns, sizes, x_TI.device)
    splits = triton.cdiv(I, span)
    parts = x_TI.new_empty(splits, T, thin, dtype=torch.float32) if splits > 1 else None
    _features[tiles, splits](
        x_TI, W_EI, A_HI, gate, hidden, gated, bits, parts, T, I // 8, seed, scale, **constants,
        DROPPED=shape.dropped, SPAN=span, ROWS=sizes.rows, COLUMNS=columns,
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    if splits > 1:
        _sum_features[(triton.cdiv(T, THIN.rows),)](
            parts, gate, hidden, gated, T, scale, **constants, SPLITS=splits, ROWS=THIN.rows, num_warps=THIN.warps
        )
    return gate, hidden, gated, bits


def thin_gradients(
    dgated_TS: Tensor, dgate_TE: Tensor | None, gate_TE: Tensor, hidden_TH: Tensor, shape: Shape, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits (T, E) and of A dropout(x) (T, H); `dgate_TE` comes from what else uses the weights."""
    T = gate_TE.numel() // shape.experts
    dlogits, dhidden = torch.empty_like(gate_TE, dtype=hidden_TH.dtype), torch.empty_like(hidden_TH)
    _thin_gradients[(triton.cdiv(T, THIN.rows),)](
        dgated_TS, dgate_TE, gate_TE, hidden_TH, dlogits, dhidden, T, scale, **shape.constants(),
        FROM_OUTSIDE=dgate_TE is not None, ROWS=THIN.rows, num_warps=THIN.warps,
    )  # fmt: skip
    return dlogits, dhidden


def add_to_input(
    dx_TI: Tensor, W_EI: Tensor | None, A_HI: Tensor, dlogits_TE: Tensor | None, dhidden_TH: Tensor,
    bits: Tensor | None, shape: Shape,
) -> None:  # fmt: skip
    """dx += dlogits W + mask * (dhidden A), in place."""
    I = shape.in_features
    T = dx_TI.numel() // I
    _add_to_input[triton.cdiv(T, INPUT.rows), triton.cdiv(I, INPUT.columns)](
        dx_TI, W_EI, A_HI, dlogits_TE, dhidden_TH, bits, T, **shape.constants(), DROPPED=shape.dropped,
        ROWS=INPUT.rows, COLUMNS=INPUT.columns, num_warps=INPUT.warps, num_stages=INPUT.stages,
    )  # fmt: skip


def weight_gradients(
    x_TI: Tensor, dlogits_TE: Tensor | None, dhidden_TH: Tensor, bits: Tensor | None, shape: Shape
) -> tuple[Tensor | None, Tensor]:
    """dlogits^T x (E, I) and dhidden^T (mask * x) (H, I), float32."""
    I = shape.in_features
    T = x_TI.numel() // I
    constants, sizes = shape.constants(), WEIGHTS
    rows_of_W = 0 if dlogits_TE is None else shape.experts
    thin = (constants["EP"] + constants["HP"]) * dhidden_TH.itemsize
    rows = _fitting(sizes.rows, (sizes.columns * x_TI.itemsize + thin) * sizes.stages)
    tiles = triton.cdiv(I, sizes.columns)
    span = _span(tiles, T, rows, sizes, x_TI.device)
    splits = triton.cdiv(T, span)
    parts = x_TI.new_empty(splits, rows_of_W + shape.rows_of_a, I, dtype=torch.float32)
    _weight_gradients[tiles, splits](
        x_TI, dlogits_TE, dhidden_TH, bits, parts, T, **constants, DROPPED=shape.dropped,
        SPAN=span, ROWS=rows, COLUMNS=sizes.columns, num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    total = parts[0] if splits == 1 else parts.sum(dim=0)
    return (total[:rows_of_W] if rows_of_W else None), total[rows_of_W:]


def _fitting(size: int, bytes_of_one: int) -> int:
    """A tile's size, halved until its loads fit into SHARED_MEMORY."""
    while size > 16 and size * bytes_of_one > SHARED_MEMORY:
        size //= 2
    return size


def _span(tiles: int, length: int, step: int, sizes: Sizes, device: torch.device) -> int:
    """How much of a sum over `length` a program takes, so that `tiles` sums give each multiprocessor its programs.

    A power of two of steps: kernels are compiled for few spans, whatever the number of tokens.
    """
    steps = triton.cdiv(length, step)
    most = 1 << (steps - 1).bit_length()
    wanted = steps * tiles / (sizes.programs * _multiprocessors(device))
    return step * min(most, 1 << max(0, round(math.log2(wanted))))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
