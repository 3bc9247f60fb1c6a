#!/usr/bin/env python3
"""Writes a GGUF file of a Llama with random weights, for timing a host with a model of a given shape.

    python3 made_up_model.py OUT.gguf --layers 8 --heads 32 --kv-heads 8 --head-dim 128 --ffn 14336 --context 262144

Weights of one shape are the same everywhere. Its attention is flat, so that sampling reads the most rows that its target error asks for. Needs NumPy.
"""

import argparse
import struct

import numpy as np

ALIGNMENT = 32
UINT32, FLOAT32, STRING = 4, 6, 8
GGML_F32, GGML_F16 = 0, 1


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def field(key, kind, value):
    packed = text(value) if kind == STRING else struct.pack("<I" if kind == UINT32 else "<f", value)
    return text(key) + struct.pack("<I", kind) + packed


def fields(args):
    embedding = args.heads * args.head_dim
    return [
        ("general.architecture", STRING, "llama"),
        ("general.name", STRING, "made-up"),
        ("llama.vocab_size", UINT32, args.vocab),
        ("llama.context_length", UINT32, args.context),
        ("llama.embedding_length", UINT32, embedding),
        ("llama.block_count", UINT32, args.layers),
        ("llama.feed_forward_length", UINT32, args.ffn),
        ("llama.attention.head_count", UINT32, args.heads),
        ("llama.attention.head_count_kv", UINT32, args.kv_heads),
        ("llama.attention.key_length", UINT32, args.head_dim),
        ("llama.attention.value_length", UINT32, args.head_dim),
        ("llama.rope.dimension_count", UINT32, args.head_dim),
        ("llama.rope.freq_base", FLOAT32, 500000.0),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        ("tokenizer.ggml.model", STRING, "no_vocab"),
    ]


def tensors(args):
    """(name, shape with the contiguous dimension last)."""
    embedding, kv = args.heads * args.head_dim, args.kv_heads * args.head_dim
    yield "token_embd.weight", (args.vocab, embedding)
    yield "output_norm.weight", (embedding,)
    yield "output.weight", (args.vocab, embedding)
    for i in range(args.layers):
        yield f"blk.{i}.attn_norm.weight", (embedding,)
        yield f"blk.{i}.attn_q.weight", (embedding, embedding)
        yield f"blk.{i}.attn_k.weight", (kv, embedding)
        yield f"blk.{i}.attn_v.weight", (kv, embedding)
        yield f"blk.{i}.attn_output.weight", (embedding, embedding)
        yield f"blk.{i}.ffn_norm.weight", (embedding,)
        yield f"blk.{i}.ffn_gate.weight", (args.ffn, embedding)
        yield f"blk.{i}.ffn_up.weight", (args.ffn, embedding)
        yield f"blk.{i}.ffn_down.weight", (embedding, args.ffn)


def padded(size):
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    for name, default in [("layers", 8), ("heads", 32), ("kv-heads", 8), ("head-dim", 128), ("ffn", 14336),
                          ("vocab", 32000), ("context", 262144)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)

    listed, offset = [], 0
    for name, shape in tensors(args):
        half = len(shape) > 1
        listed.append((name, shape, half, offset))
        offset += padded(int(np.prod(shape)) * (2 if half else 4))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(listed), len(fields(args)))
    head += b"".join(field(*entry) for entry in fields(args))
    for name, shape, half, at in listed:
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", GGML_F16 if half else GGML_F32, at)
    with open(args.out, "wb") as file:
        file.write(head.ljust(padded(len(head)), b"\0"))
        made = {}
        for _, shape, half, _ in listed:
            if shape not in made:
                if half:
                    weights = random.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
                else:
                    weights = np.ones(shape, dtype=np.float32)
                data = weights.astype(np.float16 if half else np.float32).tobytes()
                made[shape] = data.ljust(padded(len(data)), b"\0")
            file.write(made[shape])


if __name__ == "__main__":
    main()
