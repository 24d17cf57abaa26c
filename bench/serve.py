#!/usr/bin/env python3
"""Serving side by side, in turns: a language model next to llama.cpp's server (xllamacpp), encoders next to onnxruntime.

Measures tokens a second of SmolLM2-135M at 1, 4, 16 and 64 streams and the prefill of prompts of 512 and 2,048 tokens, and each
server's memory and its time from start to ready; llama.cpp at the best of its formats (Q4_1 as shipped, Q4_0, Q8_0 made from it) with
flash attention on and off. Then requests a second of MiniLM-L6, see
serve_encoders.py. Prints tables and writes bench/results/serve.json. `make bench-serve` installs what it needs and runs it.
"""
import argparse, concurrent.futures, contextlib, json, os, pathlib, socket, statistics, subprocess, sys, tempfile, time

import numpy as np
import requests

import serve_encoders

TOKENS, STREAMS, PROMPTS = 64, (1, 4, 16, 64), (512, 2048)
# Ratios of ours to llama.cpp's best that `make bench-serve` aims at.
TARGETS = {"1 stream, tokens/s": 1.1, "16 streams, tokens/s": 3, "prefill of 512, tokens/s": 3, "prefill of 2048, tokens/s": 3}
ROOT = pathlib.Path(__file__).parent.parent
MODEL = pathlib.Path(os.environ["ATHANOR_MODELS"]) / "smollm2-135m"
SERVER = pathlib.Path(os.environ["CARGO_TARGET_DIR"]) / "release" / "athanor-server"
OURS = dict(os.environ, LD_LIBRARY_PATH=f"{os.environ['LIBTORCH']}/lib")
WORDS = "the bank will lend and the borrower will repay the principal with interest on the last day of each quarter".split()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait(address, process):
    for _ in range(600):
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(address, timeout=2).status_code == 200:
                return
        if process is not None and process.poll() is not None:
            sys.exit("the server ended")
        time.sleep(0.1)
    sys.exit(f"{address} is not ready")


def requantized(kind, to):
    """The model's matrices in another format of llama.cpp, by the gguf package."""
    import gguf

    reader = gguf.GGUFReader(next(MODEL.glob("*.gguf")))
    writer = gguf.GGUFWriter(to, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            value_type = field.types[0]
            sub_type = field.types[-1] if value_type == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), value_type, sub_type=sub_type)
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, numbers.astype(np.float32))
        else:
            packed = gguf.quants.quantize(numbers.astype(np.float32), kind)
            writer.add_tensor(tensor.name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def server(folder, **more):
    """Our server with the model of a folder: its port and its process."""
    with tempfile.TemporaryDirectory() as work:
        port = free_port()
        config = pathlib.Path(work) / "serve.json"
        config.write_text(json.dumps({
            "modelName": "bench", "revision": "bench-1", "modelUri": f"file://{folder}", "httpPort": port, "grpcPort": free_port(), **more,
        }))
        with open(pathlib.Path(work) / "log", "w") as log:
            process = subprocess.Popen([SERVER, "--address", "127.0.0.1", "--config", config], env=OURS, stdout=log, stderr=log)
        try:
            wait(f"http://127.0.0.1:{port}/readyz", process)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(timeout=60)


@contextlib.contextmanager
def ours(weights):
    """Our server with the language model in one format of weights: its address, its name of the model, its process."""
    engine = {"weights": weights, "maxModelLength": max(PROMPTS) + 256, "kvCacheMemory": 4 << 30}
    limits = {"maxBatchInputs": max(STREAMS), "queueInputs": 4 * max(STREAMS)}
    with server(MODEL, engine=engine, limits=limits) as (port, process):
        yield f"http://127.0.0.1:{port}/v1", "bench", process


@contextlib.contextmanager
def theirs(file, flash):
    """llama.cpp's server in a process of its own."""
    program = (
        "import sys, time, xllamacpp as xlc\n"
        "params = xlc.CommonParams()\n"
        f"params.model.path = {str(file)!r}\n"
        f"params.n_parallel = {max(STREAMS)}\nparams.n_ctx = {max(STREAMS) * (max(PROMPTS) + 256)}\n"
        f"params.cpuparams.n_threads = params.cpuparams_batch.n_threads = {len(os.sched_getaffinity(0))}\n"
        f"params.flash_attn_type = xlc.llama_flash_attn_type.{flash}\n"
        "server = xlc.Server(params)\n"
        "print(server.listening_address, flush=True)\n"
        "time.sleep(3600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = process.stdout.readline().strip()
        if not address.startswith("http"):
            sys.exit(f"llama.cpp did not start with {file} and {flash}")
        wait(f"{address}/health", process)
        yield f"{address}/v1", "any", process.pid
    finally:
        process.kill()
        process.wait()


def ask(base, model, number, words, tokens):
    # Another beginning each time, so that no prefix is found in a cache.
    prompt = f"{number} " + " ".join(WORDS[(number + place) % len(WORDS)] for place in range(words))
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 1.0, "seed": number, "stop": ["\x00"]}
    answer = requests.post(f"{base}/completions", json=body, timeout=600)
    answer.raise_for_status()
    usage = answer.json()["usage"]
    return usage["prompt_tokens"], usage["completion_tokens"]


def resident(process):
    """Megabytes of a process's memory that are in use."""
    for line in pathlib.Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure(base, model, turn):
    """Tokens a second at several numbers of streams, and of long prompts."""
    ask(base, model, 7000 + turn, 20, 8)
    found = {}
    for streams in STREAMS:
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(streams) as pool:
            first = 100 * streams + 10_000 * turn
            done = list(pool.map(lambda number: ask(base, model, first + number, 8, TOKENS)[1], range(streams if streams > 1 else 3)))
        found[f"{streams} stream{'s' * (streams > 1)}, tokens/s"] = sum(done) / (time.monotonic() - began)
    for length in PROMPTS:
        began = time.monotonic()
        prompt, _ = ask(base, model, 9000 + turn + length, length - 4, 1)
        found[f"prefill of {length}, tokens/s"] = prompt / (time.monotonic() - began)
    return found


def language_models(runs):
    """Entries for bench/results/serve.json."""
    import gguf

    with tempfile.TemporaryDirectory() as work:
        files = {"Q4_1": next(MODEL.glob("*.gguf"))}
        for name in ("Q4_0", "Q8_0"):
            files[name] = pathlib.Path(work) / f"{name}.gguf"
            requantized(gguf.GGMLQuantizationType[name], files[name])
        servers = {f"athanor {weights}": (ours, (weights,)) for weights in ("Auto", "Int8", "Int4")}
        for name, file in files.items():
            for flash in ("ENABLED", "DISABLED"):
                kind = f"LLAMA_FLASH_ATTN_TYPE_{flash}"
                servers[f"llama.cpp {name}, flash attention {flash.lower()}"] = (theirs, (file, kind))
        found = {}
        for turn in range(runs):
            order = list(servers) if turn % 2 == 0 else list(servers)[::-1]
            for name in order:
                start, arguments = servers[name]
                began = time.monotonic()
                with start(*arguments) as (base, model, process):
                    ready = time.monotonic() - began
                    values = measure(base, model, turn) | {"resident memory, MiB": resident(process), "start to ready, s": ready}
                    for what, value in values.items():
                        found.setdefault(name, {}).setdefault(what, []).append(value)
                print(f"turn {turn + 1}, {name}: " + ", ".join(f"{what} {values[-1]:.1f}" for what, values in found[name].items()), flush=True)
    medians = {name: {what: statistics.median(values) for what, values in rows.items()} for name, rows in found.items()}
    results = []
    print(f"\n{'':24} {'ours':>10} {'llama.cpp':>10} {'ratio':>7}")
    for what in next(iter(medians.values())):
        least = not what.endswith("tokens/s")
        pick = min if least else max
        best = lambda whose: pick((name for name in medians if name.startswith(whose)), key=lambda name: medians[name][what])
        own, peer = best("athanor"), best("llama.cpp")
        ratio = medians[own][what] / medians[peer][what]
        print(f"{what:24} {medians[own][what]:10.1f} {medians[peer][what]:10.1f} {ratio:7.2f}  {own}, {peer}")
        results.append({
            "name": f"SmolLM2-135M, {what}", "ours": medians[own][what], "peer": medians[peer][what], "ours_name": own,
            "peer_name": peer, "unit": what.split(", ")[-1], "ratio": ratio, "target": TARGETS.get(what),
            "runs": {name: rows[what] for name, rows in found.items()},
        })
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="turns of each server (default: %(default)s)")
    parser.add_argument("--only", choices=["language-models", "encoders"], help="one half; the other's results stay")
    options = parser.parse_args()
    file = ROOT / "bench/results/serve.json"
    is_encoders = lambda entry: entry["name"].startswith("MiniLM")
    kept = json.loads(file.read_text()) if options.only and file.exists() else []
    results = [entry for entry in kept if is_encoders(entry) == (options.only == "language-models")]
    if options.only != "encoders":
        results = language_models(options.runs) + results
    if options.only != "language-models":
        with tempfile.TemporaryDirectory() as work:
            results += serve_encoders.measure(server, pathlib.Path(work), options.runs)
    file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
