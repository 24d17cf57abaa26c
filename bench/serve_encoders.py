"""Serving encoders side by side: athanor-server and onnxruntime behind a minimal HTTP server, the same MiniLM-L6, the same texts.

Imported by bench/serve.py. Requests have one text of some 14 tokens; 1, 8 and 64 clients send one after the other for a few seconds.
onnxruntime runs a request at a time for each HTTP thread, without batching between requests, on all cores; its eight-bit model is its
own dynamic quantization. It has no BF16 on a CPU, so ours is compared with its FP32.
"""
import concurrent.futures, contextlib, http.client, http.server, json, os, pathlib, shutil, socketserver, statistics, subprocess, sys, time

import numpy as np

SECONDS, CLIENTS = 4.0, (1, 8, 64)
MODEL = pathlib.Path(os.environ["ATHANOR_MODELS"]) / "minilm-l6"
DATA = pathlib.Path(os.environ["ATHANOR_DATA"]) / "sentiment"
KINDS = {"embeddings": "/v1/embeddings", "classify": "/v1/classify"}
# Our formats and the peer's that each is compared with. An artifact of eight bits is served as such.
PEERS = {"FP32": "FP32", "BF16": "FP32", "Int8": "Int8"}
# The part of onnxruntime's requests a second that ours are to reach.
TARGETS = {"FP32": None, "BF16": 1.6, "Int8": 1.2}


def texts(count=512):
    """Sentences of 10 to 18 tokens."""
    from tokenizers import Tokenizer

    tokenizer, found = Tokenizer.from_file(str(MODEL / "tokenizer.json")), []
    tokenizer.no_padding()
    for line in open(DATA / "amazon.txt", encoding="utf-8", errors="replace"):
        text = line.rstrip("\n").split("\t", 2)[2]
        if 10 <= len(tokenizer.encode(text).ids) <= 18:
            found.append(text)
            if len(found) == count:
                break
    return found


def prepare(work):
    """Folders of our server and files of onnxruntime: an encoder and a classifier, in FP32 and in eight bits."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoModelForSequenceClassification

    torch.manual_seed(0)
    ids = torch.ones(2, 7, dtype=torch.long)
    for kind, loader, output in (
        ("embeddings", AutoModel, "last_hidden_state"),
        ("classify", AutoModelForSequenceClassification, "logits"),
    ):
        # The speed of a head does not depend on its weights, so it need not be trained.
        extra = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}} if kind == "classify" else {}
        model = loader.from_pretrained(MODEL, attn_implementation="eager", **extra).eval().requires_grad_(False)
        folder = work / kind / "FP32"
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(MODEL / name, folder)
        quantize(folder, work / kind / "Int8", save_file)

        class Plain(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, input_ids, attention_mask):
                return getattr(self.model(input_ids=input_ids, attention_mask=attention_mask), output)

        file = work / kind / "fp32.onnx"
        axes = {"input_ids": {0: "b", 1: "t"}, "attention_mask": {0: "b", 1: "t"}}
        torch.onnx.export(Plain(), (ids, torch.ones_like(ids)), str(file), input_names=list(axes), output_names=["y"],
                          dynamic_axes=axes, opset_version=17, dynamo=False)
        quantize_dynamic(str(file), str(work / kind / "int8.onnx"), weight_type=QuantType.QInt8, per_channel=True)


def quantize(folder, to, save_file):
    """A folder with the matrices in eight bits, in compressed-tensors' notation, as `compress: quantize` writes it."""
    from safetensors.torch import load_file
    import torch

    shutil.copytree(folder, to)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_matrix = name.endswith("weight") and tensor.dim() == 2
        if is_matrix and ("encoder.layer." in name or "word_embeddings" in name):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[f"{name}_scale"] = scale
            tensor = (tensor / scale.clamp_min(1e-30)).round().clamp(-127, 127).to(torch.int8)
        tensors[name] = tensor.contiguous()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized",
        "config_groups": {"matrices": {"targets": ["re:.*encoder\\.layer\\..*"], "weights": weights, "input_activations": inputs}},
    }
    (to / "config.json").write_text(json.dumps(config))


def serve_onnx(file, kind):
    """The peer's process: prints its port and serves until it is ended."""
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.no_padding()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def log_message(self, *_):
            pass

        def do_POST(self):
            text = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
            ids = np.array([tokenizer.encode(text).ids])
            y = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
            if kind == "embeddings":
                pooled = y.mean(1)[0]
                answer = {"data": [{"index": 0, "embedding": (pooled / np.linalg.norm(pooled)).tolist()}]}
            else:
                odds = np.exp(y[0] - y[0].max())
                answer = {"predictions": [{"scores": (odds / odds.sum()).tolist()}]}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


@contextlib.contextmanager
def onnx(file, kind):
    command = [sys.executable, __file__, str(file), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield int(process.stdout.readline()), process.pid
    finally:
        process.kill()
        process.wait()


def load(port, path, clients, sentences):
    """Requests a second of so many clients, and the median latency in milliseconds."""
    stop = time.monotonic() + SECONDS
    latencies = [[] for _ in range(clients)]

    def client(number):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        place = number * 17
        while time.monotonic() < stop:
            body = json.dumps({"model": "bench", "input": sentences[place % len(sentences)]})
            began = time.monotonic()
            connection.request("POST", path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                sys.exit(f"{path}: {response.status} {answer[:300]!r}")
            latencies[number].append(time.monotonic() - began)
            place += 1

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    every = [value for found in latencies for value in found]
    return len(every) / (time.monotonic() - began), 1000 * statistics.median(every)


def vector(port, text):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"model": "bench", "input": text, "encoding_format": "float"})
    connection.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
    return np.array(json.loads(connection.getresponse().read())["data"][0]["embedding"])


def resident(pid):
    """Megabytes of a process."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def measure(ours, work, runs):
    """Entries for bench/results/serve.json. `ours(folder)`: a context with the port and the process of our server."""
    prepare(work)
    sentences = texts()
    servers = {}
    for kind in KINDS:
        for weights, peer in PEERS.items():
            folder = work / kind / ("Int8" if weights == "Int8" else "FP32")
            servers[kind, "ours", weights] = lambda folder=folder, weights=weights: ours(folder, engine={"weights": weights})
            if weights == peer:
                file = work / kind / f"{weights.lower()}.onnx"
                servers[kind, "onnxruntime", weights] = lambda kind=kind, file=file: onnx(file, kind)
    found, vectors = {}, {}
    for turn in range(runs):
        for (kind, whose, weights), start in list(servers.items())[:: 1 if turn % 2 == 0 else -1]:
            with start() as (port, pid):
                load(port, KINDS[kind], 2, sentences)
                for clients in CLIENTS:
                    rate, latency = load(port, KINDS[kind], clients, sentences)
                    found.setdefault((kind, weights, clients, whose), []).append((rate, latency))
                found.setdefault((kind, weights, "resident, MB", whose), []).append((resident(pid), 0.0))
                if kind == "embeddings":
                    vectors[whose, weights] = [vector(port, text) for text in sentences[:64]]
            rates = ", ".join(f"{clients} clients {found[kind, weights, clients, whose][-1][0]:.0f}/s" for clients in CLIENTS)
            print(f"turn {turn + 1}, {kind}, {whose} {weights}: {rates}", flush=True)
    return entries(found, vectors)


def entries(found, vectors):
    rows = []
    print(f"\n{'':44} {'ours':>10} {'onnxruntime':>12} {'ratio':>7}")
    for kind, weights, what, whose in found:
        if whose != "ours":
            continue
        both = {"ours": found[kind, weights, what, "ours"], "onnxruntime": found[kind, PEERS[weights], what, "onnxruntime"]}
        own, peer = (statistics.median(value for value, _ in values) for values in both.values())
        unit = "MB" if isinstance(what, str) else "requests/s"
        name = f"{kind} {weights}, {what if isinstance(what, str) else f'{what} clients'}"
        print(f"{name:44} {own:10.1f} {peer:12.1f} {own / peer:7.2f}")
        latency = {name: statistics.median(value for _, value in values) for name, values in both.items()}
        rows.append({"name": f"MiniLM-L6, {name}", "ours": own, "peer": peer, "ours_name": f"athanor {weights}",
                     "peer_name": f"onnxruntime {PEERS[weights].lower()}", "unit": unit, "ratio": own / peer,
                     "target": TARGETS[weights] if unit == "requests/s" else None,
                     "p50_ms": latency if unit == "requests/s" else None})
    exact = vectors["onnxruntime", "FP32"]
    cosine = {f"{whose} {weights}": float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(all_, exact)]))
              for (whose, weights), all_ in vectors.items()}
    print("cosine with onnxruntime's FP32 vectors: " + ", ".join(f"{name} {value:.5f}" for name, value in cosine.items()))
    for weights in ("BF16", "Int8"):
        own, peer = cosine[f"ours {weights}"], cosine[f"onnxruntime {PEERS[weights]}"]
        rows.append({"name": f"MiniLM-L6, embeddings {weights}, cosine with FP32", "ours": own, "peer": peer,
                     "ours_name": f"athanor {weights}", "peer_name": f"onnxruntime {PEERS[weights].lower()}", "unit": "cosine",
                     "ratio": own / peer, "target": None})
    return rows


if __name__ == "__main__":
    serve_onnx(sys.argv[1], sys.argv[2])
