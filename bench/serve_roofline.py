"""How much of the machine language models use: of the memory's bandwidth at one stream, of the products' throughput in long prompts.

Imported by bench/serve.py. The bandwidth is that of torch's sum over 1 GiB, the throughput that of torch's matrix products (oneDNN), both
on all cores. What the servers need is computed from the model's shapes: bytes of all matrices once for each token; two operations for
each weight of the layers and token of a prompt, and those of attention.
"""

import os, time

import requests
import torch

from serve_processes import Sizes, ask, ours, prompt, theirs

TOKENS, PROMPT, TURNS = 128, 512, 3
# Bits of a weight with its scales (cpu/src/pack.rs).
SIXTEEN, EIGHT, FOUR = 16.0, 8.5, 5.0
FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K")


def bandwidth():
    """Bytes a second that are read."""
    numbers = torch.zeros(1 << 28, dtype=torch.float32)
    numbers.sum()
    return numbers.nbytes / min(timed(numbers.sum) for _ in range(10))


def timed(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def products(size=2048):
    """Operations a second of matrix products, by type of the numbers."""
    found = {}
    for kind in (torch.float32, torch.bfloat16, torch.int8):
        if kind == torch.int8:
            a, b = (torch.randint(-127, 127, (size, size), dtype=kind) for _ in range(2))
            work = lambda: torch._int_mm(a, b)
        else:
            a, b = (torch.randn(size, size).to(kind) for _ in range(2))
            work = lambda: a @ b
        work()
        found[str(kind).removeprefix("torch.")] = 2 * size**3 / min(timed(work) for _ in range(5))
    return found


class Shapes:
    """What a GGUF file says about the matrices."""

    def __init__(self, file):
        import gguf

        reader = gguf.GGUFReader(file)
        kind = reader.fields["general.architecture"].contents()
        self.layers = reader.fields[f"{kind}.block_count"].contents()
        self.hidden = reader.fields[f"{kind}.embedding_length"].contents()
        self.matrices = [tensor for tensor in reader.tensors if len(tensor.shape) == 2]
        is_tied = all(tensor.name != "output.weight" for tensor in self.matrices)
        # Of embeddings that are not the head as well, one row is read.
        self.read = [tensor for tensor in self.matrices if is_tied or tensor.name != "token_embd.weight"]

    def bytes_in_file(self):
        return sum(int(tensor.n_bytes) for tensor in self.read)

    def bytes_packed(self, weights):
        """Of our formats Auto, which is BF16 here, Int8 and Int4."""
        def bits(tensor):
            if weights == "Auto":
                return SIXTEEN
            is_four = weights == "Int4" and tensor.name.startswith("blk.") and tensor.tensor_type.name in FOUR_BITS
            return FOUR if is_four else EIGHT

        return sum(int(tensor.n_elements) * bits(tensor) / 8 for tensor in self.read)

    def operations(self, tokens):
        """Of a prompt: products with the layers' matrices, and attention of each token to those before it."""
        weights = sum(int(tensor.n_elements) for tensor in self.matrices if tensor.name.startswith("blk."))
        return 2 * weights * tokens + 2 * self.layers * self.hidden * tokens**2


def decode(base, model, seed):
    """Tokens a second of one stream, the prompt's time left out."""
    body = {
        "model": model, "prompt": prompt(seed, 8), "temperature": 1.0, "seed": seed, "ignore_eos": True,
        "max_tokens": TOKENS, "stream": True,
    }
    times = []
    with requests.post(f"{base}/v1/completions", json=body, stream=True, timeout=600) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines(chunk_size=1):
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
    # Some tokens share an event; from the first event to the last one all others were computed.
    return (TOKENS - 1) / (times[-1] - times[0])


def run(model, files, options):
    """Entries for bench/results/serve.json."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    read, peak = bandwidth(), products()
    print(f"\nmemory {read / 1e9:.1f} GB/s; products " + ", ".join(f"{kind} {value / 1e9:.0f} G/s" for kind, value in peak.items()))
    sizes = Sizes(1, PROMPT + 256)
    results = []
    starts = {f"athanor {weights}": (ours, (model, weights, sizes), weights) for weights in ("Auto", "Int8", "Int4")}
    starts |= {f"llama.cpp {name}": (theirs, (file, "enabled", sizes), file) for name, file in files.of(model).items()}
    for name, (start, arguments, what) in starts.items():
        shapes = Shapes(what if start is theirs else model.gguf)
        size = shapes.bytes_in_file() if start is theirs else shapes.bytes_packed(what)
        with start(*arguments) as (base, served, _):
            ask(base, served, 1, 20, 8)
            turns = 1 if options.quick else TURNS
            rate = max(decode(base, served, 10 + turn) for turn in range(turns))
            operations = 0.0
            for turn in range(turns):
                began = time.perf_counter()
                tokens, _ = ask(base, served, 100 + turn, PROMPT - 4, 1)
                operations = max(operations, shapes.operations(tokens) / (time.perf_counter() - began))
        shares = {kind: operations / value for kind, value in peak.items()}
        print(f"{name:20} {size / 1e6:6.1f} MB a token, {rate:6.1f} tokens/s, {size * rate / 1e9:5.1f} GB/s, "
              f"{size * rate / read:.0%} of the memory's; "
              f"prompts {operations / 1e9:5.0f} G/s, " + ", ".join(f"{share:.0%} of {kind}" for kind, share in shares.items()), flush=True)
        own = name.startswith("athanor")
        for label, value, unit, more in (
            ("share of the memory's bandwidth, 1 stream", size * rate / read, "share",
             {"bytes_a_token": size, "tokens_a_second": rate, "memory_bytes_a_second": read}),
            (f"operations a second, prefill of {PROMPT}", operations, "1/s", {"shares_of_products": shares, "products": peak}),
        ):
            results.append({"name": f"{model.name}, {label}, {name}", "ours": value if own else None, "peer": None if own else value,
                            "unit": unit, "ratio": None, "target": None, **more})
    return results
