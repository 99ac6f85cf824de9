"""llama.cpp, the peer that people would pick: models of random weights in its own formats, and how fast it is."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PEER = "llama.cpp"
PEER_HEADINGS = ("model", "format", "tokens a second", "spread", "packed is faster, times")
NO_PEER = "llama.cpp was not measured: `llama-cpp-python` is not installed."
FORMATS = {"TQ2_0": 256, "Q2_K": 256, "Q4_0": 32}
"""Formats and how many neighbouring weights they take together."""
OUTPUT = Path(__file__).resolve().parents[1] / "out" / "llama.cpp"
CONTEXT = 2048
WARM_UP = 3

Timer = Callable[[int], float]
"""Seconds of a run of so many tokens: of each where they are written one by one, of all where they are read at once."""


def peers_of(
    shape: dict[str, Any], blocks: Sequence[int], threads: int, timer: Callable[[Path, int], Timer]
) -> Iterator[tuple[str, int, Timer]]:
    """Of each format that the shape allows and each number of blocks: its name, the number, and what times it.

    The last is `writing` or `reading`.
    """
    if find_spec("llama_cpp") is None:
        return
    for count in blocks:
        dense = OUTPUT / f"random-{shape['hidden_size']}-{count}.gguf"
        for name, together in FORMATS.items():
            if shape["hidden_size"] % together == 0 and shape["intermediate_size"] % together == 0:
                packed = dense.with_suffix(f".{name}.gguf")
                if not packed.exists():
                    if not dense.exists():
                        write_random_model({**shape, "num_hidden_layers": count}, dense)
                    quantize(dense, packed, name)
                yield f"{PEER} {name}", count, timer(packed, threads)
        dense.unlink(missing_ok=True)


def write_random_model(shape: dict[str, Any], path: Path) -> None:
    """A LLaMA of this shape with random weights in float16, without a vocabulary."""
    width, inner, blocks = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(blocks)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    keys = groups * (width // heads)
    linears = {
        "attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width), "attn_output": (width, width),
        "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner),
    }  # fmt: skip
    random = np.random.default_rng(0)

    def add(name: str, *size: int) -> None:
        writer.add_tensor(f"{name}.weight", (random.standard_normal(size, np.float32) * 0.02).astype(np.float16))

    add("token_embd", shape["vocab_size"], width)
    for block in range(blocks):
        for name, size in linears.items():
            add(f"blk.{block}.{name}", *size)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(width, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    if not shape["tie_word_embeddings"]:
        add("output", shape["vocab_size"], width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(dense: Path, to: Path, name: str) -> None:
    """Write the model in one of llama.cpp's formats: all linears, and head and embedding as llama.cpp chooses."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    if llama_cpp.llama_model_quantize(bytes(dense), bytes(to), ctypes.byref(options)):
        raise SystemExit(f"llama.cpp could not write {to.name}")


def writing(path: Path, threads: int) -> Timer:
    """Seconds a token of so many tokens, one at a time, after a few that do not count."""
    decode = opened(path, threads)

    def run(tokens: int) -> float:
        start = 0.0
        for position in range(WARM_UP + tokens):
            if position == WARM_UP:
                start = time.perf_counter()
            decode(1, position == 0)
        return (time.perf_counter() - start) / tokens

    return run


def reading(path: Path, threads: int) -> Timer:
    """Seconds that so many tokens take at once."""
    decode = opened(path, threads)

    def run(tokens: int) -> float:
        start = time.perf_counter()
        decode(tokens, True)
        return time.perf_counter() - start

    return run


def opened(path: Path, threads: int) -> Callable[[int, bool], None]:
    """What reads so many further tokens at once, of a new text or not, and computes logits for the last one."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = CONTEXT, threads, threads
    context = llama_cpp.llama_init_from_model(model, options)

    def decode(tokens: int, anew: bool) -> None:
        if anew:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        text = (ctypes.c_int32 * tokens)(*[1] * tokens)  # of which a batch is a view
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(text, tokens)):
            raise SystemExit(f"llama.cpp could not decode {path.name}")

    return decode
