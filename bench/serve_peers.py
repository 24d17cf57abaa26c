"""Tokens a second of language models next to openvino-genai, transformers and mistralrs, each at several settings.

Imported by bench/serve.py. Every engine gets the same prompts and generates the same number of tokens at temperature 1. Ours answers over
HTTP; the others run in a process of their own without a server, in static batches where they take token ids, which favours them.
"""

import concurrent.futures, json, os, pathlib, statistics, subprocess, sys

import requests

from serve_peers_engines import measure
from serve_processes import Sizes, ours, prompt

TOKENS, STREAMS, SHORT, LONG = 64, (1, 16), 12, 512
FAMILIES = ("openvino-genai", "transformers", "mistralrs")
# Formats of GGUF that openvino-genai reads, of those that `Files` has. Qwen's Q4_K_M file has Q5_0 tensors, which it does not read.
OPENVINO = ("Q4_0", "Q4_1", "Q8_0")
QUICK = ("athanor Int4", "openvino-genai Q4_0, LATENCY", "transformers bfloat16, dynamic cache", "mistralrs F32")


def unpacked(model, to):
    """A folder with the model in float32, for engines that are slow with GGUF or do not read it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not to.exists():
        source = {"pretrained_model_name_or_path": str(model.path), "gguf_file": model.gguf.name}
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        to.mkdir()
        AutoTokenizer.from_pretrained(**source).save_pretrained(to)
        tensors = {name: tensor.contiguous() for name, tensor in loaded.state_dict().items()}
        if loaded.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
        # mistralrs requires `rope_theta` outside of transformers' `rope_parameters`, and no format that the tensors do not have.
        config = loaded.config.to_dict()
        config.pop("quantization_config", None)
        config |= {"architectures": [type(loaded).__name__], "rope_theta": config["rope_parameters"]["rope_theta"]}
        (to / "config.json").write_text(json.dumps(config, indent=1))
    return to


def prompts(base, numbers, length):
    """Prompts of exactly `length` tokens, each as ids and as text. Each number has another beginning, so no prefix is found in a cache."""
    found = []
    for number in numbers:
        ids = post(base, "tokenize", prompt=prompt(number, length + 8))["tokens"][:length]
        found.append({"ids": ids, "text": post(base, "detokenize", tokens=ids)["prompt"]})
    return found


def post(base, path, **body):
    answer = requests.post(f"{base}/v1/{path}", json={"model": "bench", **body}, timeout=600)
    answer.raise_for_status()
    return answer.json()


def work(base, turn, streams, tokens):
    """Items for `measure`: a warm-up of each shape before it is measured."""
    items, first = [], 20_000 * (turn + 1)
    for count in streams:
        together = count > 1
        items.append({"prompts": prompts(base, range(first, first + count), SHORT), "tokens": 8, "together": together})
        measured = range(first + 100, first + 100 + (count if together else 3))
        what = f"{count} stream{'s' * together}, tokens/s"
        items.append({"what": what, "prompts": prompts(base, measured, SHORT), "tokens": tokens, "together": together})
        first += 1000
    items.append({"prompts": prompts(base, [first], LONG), "tokens": 1, "together": False})
    what = f"prefill of {LONG}, tokens/s"
    items.append({"what": what, "prompts": prompts(base, range(first + 100, first + 103), LONG), "tokens": 1, "together": False})
    return items


def by_ours(model, weights, sizes, items):
    with ours(model, weights, sizes) as (base, _, _):

        def ask(one, tokens):
            options = {"max_tokens": tokens, "ignore_eos": True, "temperature": 1.0, "seed": one["ids"][0]}
            return post(base, "completions", prompt=one["ids"], **options)["usage"]

        def generate(batch, tokens):
            with concurrent.futures.ThreadPoolExecutor(len(batch)) as pool:
                usages = list(pool.map(lambda one: ask(one, tokens), batch))
            return sum(usage["prompt_tokens"] for usage in usages), sum(usage["completion_tokens"] for usage in usages)

        return dict(measure(generate, items))


def by_peer(python, engine, path, settings, items):
    job = {"engine": engine, "path": str(path), "settings": settings, "work": items}
    # Not our libtorch for a peer's torch.
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"} | {"HF_HUB_OFFLINE": "1"}
    program = pathlib.Path(__file__).parent / "serve_peers_engines.py"
    done = subprocess.run([python, program], input=json.dumps(job), env=environment, text=True, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{engine} with {path} and {settings} failed:\n{done.stderr[-4000:]}")
    return {line["what"]: line["rate"] for line in map(json.loads, done.stdout.splitlines())}


def engines(model, files, sizes):
    """What is measured: a function of the items, by name."""
    folder = unpacked(model, files.work / f"{model.folder}.unpacked")
    found = {f"athanor {weights}": (by_ours, (model, weights, sizes)) for weights in ("Int4", "Int8")}
    for name, file in files.of(model).items():
        if name in OPENVINO:
            for hint in ("LATENCY", "THROUGHPUT"):
                settings = {"PERFORMANCE_HINT": hint}
                found[f"openvino-genai {name}, {hint}"] = (by_peer, (os.environ["PEERS"], "openvino", file, settings))
    for dtype in ("bfloat16", "float32"):
        for cache in ("dynamic", "static"):
            settings = {"dtype": dtype, "cache": cache}
            found[f"transformers {dtype}, {cache} cache"] = (by_peer, (sys.executable, "transformers", folder, settings))
    for dtype in ("F32", "BF16"):
        found[f"mistralrs {dtype}"] = (by_peer, (os.environ["PEERS"], "mistralrs", folder, {"dtype": dtype}))
    return found


def run(model, files, options):
    """Entries for bench/results/serve.json."""
    streams, tokens = ((1, 4), 16) if options.quick else (STREAMS, TOKENS)
    sizes = Sizes(max(streams), LONG + 256)
    with ours(model, "Int4", sizes) as (base, _, _):
        turns = [work(base, turn, streams, tokens) for turn in range(options.runs)]
    measured = engines(model, files, sizes)
    if options.quick:
        measured = {name: measured[name] for name in QUICK}
    found = {}
    for turn, items in enumerate(turns):
        for name in list(measured) if turn % 2 == 0 else list(measured)[::-1]:
            how, arguments = measured[name]
            rates = how(*arguments, items)
            for what, rate in rates.items():
                found.setdefault(name, {}).setdefault(what, []).append(rate)
            print(f"turn {turn + 1}, {model.name}, {name}: " + ", ".join(f"{what} {rate:.1f}" for what, rate in rates.items()), flush=True)
    return entries(model, found)


def entries(model, found):
    medians = {name: {what: statistics.median(values) for what, values in rows.items()} for name, rows in found.items()}
    best = lambda family, what: max((name for name in medians if name.startswith(family)), key=lambda name: medians[name][what])
    results = []
    print(f"\n{model.name:24} {'ours':>10} {'peer':>10} {'ratio':>7}")
    for what in next(iter(medians.values())):
        own = best("athanor", what)
        for family in FAMILIES:
            peer = best(family, what)
            ratio = medians[own][what] / medians[peer][what]
            print(f"{what:24} {medians[own][what]:10.1f} {medians[peer][what]:10.1f} {ratio:7.2f}  {own}, {peer}")
            results.append({
                "name": f"{model.name}, {what}, {family}", "ours": medians[own][what], "peer": medians[peer][what], "ours_name": own,
                "peer_name": peer, "unit": "tokens/s", "ratio": ratio,
                "runs": {name: rows[what] for name, rows in found.items() if name.startswith(("athanor", family))},
            })
    return results
