"""The servers that bench/serve.py measures, ours and llama.cpp's, each in a process of its own, and the files of the models."""

import contextlib, dataclasses, json, os, pathlib, socket, subprocess, sys, tempfile, time

import numpy as np
import requests

SERVER = pathlib.Path(os.environ["CARGO_TARGET_DIR"]) / "release" / "athanor-server"
OURS = dict(os.environ, LD_LIBRARY_PATH=f"{os.environ['LIBTORCH']}/lib")
FLASH = {"enabled": "LLAMA_FLASH_ATTN_TYPE_ENABLED", "disabled": "LLAMA_FLASH_ATTN_TYPE_DISABLED"}
WORDS = "the bank will lend and the borrower will repay the principal with interest on the last day of each quarter".split()


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    folder: str
    # Requests a second of the load at random times.
    rates: tuple

    @property
    def path(self):
        return pathlib.Path(os.environ["ATHANOR_MODELS"]) / self.folder

    @property
    def gguf(self):
        return next(self.path.glob("*.gguf"))


MODELS = {
    "smollm2": Model("SmolLM2-135M", "smollm2-135m", (2.0, 4.0, 8.0)),
    "qwen": Model("Qwen2.5-Coder-0.5B", "qwen2.5-coder-0.5b", (0.5, 1.0, 2.0)),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Room of a server: sequences at a time, and tokens of each."""

    streams: int
    context: int


class Files:
    """A model's files for llama.cpp: as it is shipped, and Q4_0 and Q8_0 made from that."""

    def __init__(self, work):
        self.work = pathlib.Path(work)

    def of(self, model):
        shipped = model.gguf.stem.rsplit(".", 1)[-1]
        files = {shipped: model.gguf}
        for kind in ("Q4_0", "Q8_0"):
            file = self.work / f"{model.folder}.{kind}.gguf"
            if not file.exists():
                requantized(model.gguf, kind, file)
            files.setdefault(kind, file)
        return files


def requantized(source, kind, to):
    """The matrices of a file in another format of llama.cpp, by the gguf package."""
    import gguf

    kind = gguf.GGMLQuantizationType[kind]
    reader = gguf.GGUFReader(source)
    part = to.with_suffix(".part")
    writer = gguf.GGUFWriter(part, reader.fields["general.architecture"].contents())
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
    part.rename(to)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait(address, process):
    for _ in range(3000):
        with contextlib.suppress(requests.RequestException):
            if requests.get(address, timeout=2).status_code == 200:
                return
        if process is not None and process.poll() is not None:
            sys.exit("the server ended")
        time.sleep(0.1)
    sys.exit(f"{address} is not ready")


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
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def ours(model, weights, sizes, limits=None, adapters=(), **more):
    """Our server with a language model in one format of weights: its address, its name of the model, its process.
    `limits`: further ones of `serve.json`; `adapters`: its entry; `more`: of `engine`."""
    engine = {"weights": weights, "maxModelLength": sizes.context, "kvCacheMemory": 4 << 30, **more}
    limits = {"maxBatchInputs": sizes.streams, "queueInputs": 4 * sizes.streams, **(limits or {})}
    with server(model.path, engine=engine, limits=limits, adapters=list(adapters)) as (port, process):
        yield f"http://127.0.0.1:{port}", "bench", process


@contextlib.contextmanager
def theirs(file, flash, sizes, threads=None, adapters=()):
    """llama.cpp's server in a process of its own. `flash`: flash attention, "enabled" or "disabled"; `threads`: by default one a core;
    `adapters`: GGUF files."""
    program = (
        "import sys, xllamacpp as xlc\n"
        "params = xlc.CommonParams()\n"
        f"params.model.path = {str(file)!r}\n"
        f"params.n_parallel = {sizes.streams}\nparams.n_ctx = {sizes.streams * sizes.context}\n"
        f"params.cpuparams.n_threads = params.cpuparams_batch.n_threads = {threads or len(os.sched_getaffinity(0))}\n"
        f"params.flash_attn_type = xlc.llama_flash_attn_type.{FLASH[flash]}\n"
        f"params.lora_adapters = [xlc.CommonAdapterLoraInfo(path, 0.0) for path in {[str(file) for file in adapters]!r}]\n"
        "server = xlc.Server(params)\n"
        "print(server.listening_address, flush=True)\n"
        # Ends with this program, whatever ends it.
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)
    try:
        address = process.stdout.readline().strip()
        if not address.startswith("http"):
            sys.exit(f"llama.cpp did not start with {file} and flash attention {flash}")
        wait(f"{address}/health", process)
        yield address, "any", process.pid
    finally:
        process.kill()
        process.wait()


def memory(process, field):
    """A field of a process's status in the kernel, in MiB: VmRSS, or VmHWM for its peak."""
    for line in pathlib.Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def prompt(number, words):
    """A text of so many words. Each number has another beginning, so that no prefix is found in a cache."""
    return f"{number} " + " ".join(WORDS[(number + place) % len(WORDS)] for place in range(words))


def ask(base, model, number, words, tokens, **more):
    """Tokens of the prompt and of the answer. `more`: fields of the request."""
    body = {
        "model": model, "prompt": prompt(number, words), "max_tokens": tokens, "temperature": 1.0, "seed": number, "stop": ["\x00"],
        **more,
    }
    answer = requests.post(f"{base}/v1/completions", json=body, timeout=600)
    answer.raise_for_status()
    usage = answer.json()["usage"]
    return usage["prompt_tokens"], usage["completion_tokens"]
