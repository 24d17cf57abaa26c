"""Serving on a GPU: athanor-server under concurrent clients, beside transformers' pipeline in this process, same model and texts.

Usage: gpu_serve.py BASE_MODEL TRAINER SERVER   ($ATHANOR_DATA has the texts)
"""
import asyncio, json, os, pathlib, socket, statistics, subprocess, sys, tempfile, time

import aiohttp

MODEL, TRAINER, SERVER = sys.argv[1:4]
REQUESTS = 1500


def texts():
    lines = open(pathlib.Path(os.environ["ATHANOR_DATA"]) / "sentiment/amazon.txt", encoding="utf-8", errors="replace")
    return [text for line in lines if (text := line.rstrip("\n").split("\t", 2)[2]).strip()]


def artifact(work):
    rows = work / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "label": str(len(text) % 2)}) + "\n" for text in texts()[:400]))
    spec = {"model": {"from": f"file://{MODEL}", "task": "TextClassification"}, "data": {"sources": [{"name": "rows", "uri": f"file://{rows}"}]},
            "hyperparameters": {"maxSteps": 5, "batchSize": 32}, "output": {"to": f"file://{work}/out"}}
    job = work / "job.json"
    job.write_text(json.dumps({"apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench"}, "spec": spec}))
    with open(work / "log", "w") as log:
        if subprocess.run([TRAINER, "run", "-f", job], stdout=log, stderr=log).returncode != 0:
            sys.exit((work / "log").read_text()[-2000:])
    return next(path.parent for path in (work / "out").rglob("model.safetensors") if (path.parent / "manifest.json").exists())


async def load(port, connections, batch):
    """Requests of `batch` texts each: texts a second and latencies."""
    found, url = [], f"http://127.0.0.1:{port}/v1/classify"
    bodies = [json.dumps({"input": (texts() * 2)[i : i + batch]}).encode() for i in range(0, 2000)]
    count = REQUESTS // max(1, batch // 8)
    todo = iter(range(count))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async def client():
            for i in todo:
                began = time.perf_counter()
                async with session.post(url, data=bodies[i % len(bodies)], headers={"content-type": "application/json"}) as answer:
                    await answer.read()
                    assert answer.status == 200, answer.status
                found.append(time.perf_counter() - began)
        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(connections)))
    seconds = time.perf_counter() - began
    found.sort()
    return count * batch / seconds, statistics.median(found) * 1e3, found[int(len(found) * 0.99)] * 1e3


def serve(work, folder):
    with socket.socket() as one, socket.socket() as two:
        for s in (one, two):
            s.bind(("127.0.0.1", 0))
        http, grpc = one.getsockname()[1], two.getsockname()[1]
    config = work / "serve.json"
    config.write_text(json.dumps({"modelName": "bench", "revision": "bench-1", "modelUri": f"file://{folder}", "httpPort": http, "grpcPort": grpc}))
    log = open(work / "server", "w")
    began = time.monotonic()
    server = subprocess.Popen([SERVER, "--config", config, "--address", "127.0.0.1"], stdout=log, stderr=log)
    try:
        async def wait():
            async with aiohttp.ClientSession() as session:
                while True:
                    if server.poll() is not None:
                        sys.exit((work / "server").read_text()[-2000:])
                    try:
                        async with session.get(f"http://127.0.0.1:{http}/readyz") as answer:
                            if answer.status == 200:
                                return
                    except aiohttp.ClientError:
                        pass
                    await asyncio.sleep(0.02)
        asyncio.run(wait())
        print(f"ready after {time.monotonic() - began:.2f} s")
        asyncio.run(load(http, 16, 1))
        for connections, batch in [(1, 1), (16, 1), (64, 1), (256, 1), (16, 32)]:
            rate, median, p99 = asyncio.run(load(http, connections, batch))
            print(f"athanor-server, {connections:>3} clients, {batch:>2} texts a request: {rate:8.0f} texts/s  p50 {median:6.2f} ms  p99 {p99:6.2f} ms", flush=True)
    finally:
        server.terminate()
        server.wait()
        device = [line for line in (work / "server").read_text().splitlines() if "model loaded" in line]
        print(device[0][:300] if device else "")


def pipeline(folder):
    os.environ.pop("LD_LIBRARY_PATH", None)
    import torch, transformers
    transformers.logging.set_verbosity_error()
    answer = transformers.pipeline("text-classification", model=str(folder), device=0, dtype=torch.float32)
    rows = texts()[:2048]
    for batch in (1, 32):
        answer(rows[:64], batch_size=batch)
        began = time.perf_counter()
        answer(rows, batch_size=batch)
        print(f"transformers' pipeline in the process, batches of {batch:>2}: {len(rows) / (time.perf_counter() - began):8.0f} texts/s", flush=True)


with tempfile.TemporaryDirectory() as folder:
    work = pathlib.Path(folder)
    trained = artifact(work)
    serve(work, trained)
    pipeline(trained)
