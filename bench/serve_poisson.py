"""Requests at random times (Poisson): time to the first token and time between tokens, ours and llama.cpp's at its fastest format.

Imported by bench/serve.py. Measured by this program, and by guidellm (an independent client) at the same rate.
"""

import asyncio, json, os, pathlib, random, subprocess, tempfile, time

import aiohttp

from serve_processes import Sizes, ask, ours, prompt, theirs

WORDS, TOKENS, SECONDS = 64, 64, 30
GUIDELLM = os.environ.get("GUIDELLM")


def percentile(values, share):
    """In milliseconds."""
    values = sorted(values)
    return 1000 * values[min(int(len(values) * share), len(values) - 1)] if values else float("nan")


async def stream(session, base, model, number, firsts, betweens, failures):
    body = {
        "model": model, "prompt": prompt(number, WORDS), "max_tokens": TOKENS, "temperature": 1.0, "seed": number, "ignore_eos": True,
        "stream": True,
    }
    began = last = time.monotonic()
    try:
        async with session.post(f"{base}/v1/completions", json=body) as answer:
            if answer.status != 200:
                failures.append(f"{answer.status} {(await answer.text())[:200]}")
                return
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                choices = json.loads(line[6:]).get("choices")
                if not choices or not choices[0].get("text"):
                    continue
                now = time.monotonic()
                (firsts if last == began else betweens).append(now - last)
                last = now
    except (aiohttp.ClientError, TimeoutError) as error:
        failures.append(f"{type(error).__name__}: {error}")


async def poisson(base, model, rate, seconds, seed):
    """The measurement of this program."""
    chance, tasks, firsts, betweens, failures = random.Random(seed), [], [], [], []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)) as session:
        began = due = time.monotonic()
        while due < began + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            number = 1_000_000 + 10_000 * seed + len(tasks)
            tasks.append(asyncio.create_task(stream(session, base, model, number, firsts, betweens, failures)))
            due += chance.expovariate(rate)
        await asyncio.gather(*tasks)
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(tasks)} requests failed: {failures[0]}")
    return {
        "requests": len(tasks),
        "time to first token, ms, p50": percentile(firsts, 0.5), "time to first token, ms, p99": percentile(firsts, 0.99),
        "between tokens, ms, p50": percentile(betweens, 0.5), "between tokens, ms, p99": percentile(betweens, 0.99),
    }


def guidellm(base, model, rate, seconds, seed, work):
    """The measurement of guidellm, with prompts of the same lengths."""
    rows, output = pathlib.Path(work) / "rows.jsonl", pathlib.Path(work) / "guidellm.json"
    count = int(4 * rate * seconds) + 20
    with open(rows, "w", encoding="utf-8") as file:
        for number in range(count):
            print(json.dumps({"prompt": prompt(2_000_000 + 10_000 * seed + number, WORDS), "output_tokens_count": TOKENS}), file=file)
    output.unlink(missing_ok=True)
    backend = {"kind": "openai_http", "target": base, "model": model, "request_format": "/v1/completions", "validate_backend": False}
    settings = {
        "backend": backend, "profile": {"kind": "poisson", "rate": rate}, "constraint": {"kind": "max_duration", "seconds": seconds},
        "data": {"kind": "json_file", "path": str(rows)}, "output": {"kind": "json", "path": str(output)},
    }
    command = [GUIDELLM, "run", "--disable-console"]
    for name, value in settings.items():
        command += [f"--{name}", json.dumps(value)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GUIDELLM")} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, timeout=10 * seconds + 300)
    (benchmark,) = json.loads(output.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    total = metrics["request_totals"]
    if total["errored"] or not total["successful"]:
        raise ValueError(f"guidellm's requests failed: {total}")
    found = {"requests": total["successful"]}
    for name, key in (("time to first token", "time_to_first_token_ms"), ("between tokens", "inter_token_latency_ms")):
        for share in ("p50", "p99"):
            found[f"{name}, ms, {share}"] = metrics[key]["successful"]["percentiles"][share]
    return found


def run(model, files, options):
    """Entries for bench/results/serve.json."""
    seconds, rates = (8, model.rates[:1]) if options.quick else (SECONDS, model.rates)
    sizes = Sizes(64, WORDS * 3 + TOKENS)
    servers = {"athanor Int4": (ours, (model, "Int4", sizes)), "llama.cpp Q4_0": (theirs, (files.of(model)["Q4_0"], "enabled", sizes))}
    clients = {"this program": lambda *what: asyncio.run(poisson(*what))}
    results = []
    with tempfile.TemporaryDirectory() as work:
        if GUIDELLM:
            clients["guidellm"] = lambda *what: guidellm(*what, work)
        else:
            print("$GUIDELLM is not set: measured by this program alone")
        found = {}
        for name, (start, arguments) in servers.items():
            with start(*arguments) as (base, served, _):
                ask(base, served, 1, 20, 8)
                for turn, rate in enumerate(rates):
                    for client, measure in clients.items():
                        try:
                            values = measure(base, served, rate, seconds, turn + 1)
                        except (subprocess.SubprocessError, OSError, KeyError, ValueError) as error:
                            # An independent client that does not run is reported and costs no other measurement.
                            print(f"{model.name}, {name}, {rate:g} requests/s, by {client}: FAILED: {error!r}", flush=True)
                            continue
                        found[name, rate, client] = values
                        row = ", ".join(f"{what} {value:.1f}" for what, value in values.items())
                        print(f"{model.name}, {name}, {rate:g} requests/s, by {client}: {row}", flush=True)
    own, peer = servers
    for rate in rates:
        for client in clients:
            if (own, rate, client) not in found or (peer, rate, client) not in found:
                continue
            for what in found[own, rate, client]:
                if what != "requests":
                    a, b = found[own, rate, client][what], found[peer, rate, client][what]
                    results.append({
                        "name": f"{model.name}, {rate:g} requests/s, {what}, by {client}", "ours": a, "peer": b, "ours_name": own,
                        "peer_name": peer, "unit": "ms", "ratio": a / b if b else None, "target": None,
                    })
    return results
