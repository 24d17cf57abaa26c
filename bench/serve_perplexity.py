"""Perplexity of each format of weights on the same tokens of the same text, ours and llama.cpp's.

Imported by bench/serve.py. Ours reports the log-probabilities of a prompt (`echo`). llama.cpp's server does not; it is asked for one token
after the other with a bias that forces the text's own token, and reports that token's log-probability from the logits before the bias.
"""

import math, os, pathlib

import requests

from serve_processes import Sizes, ours, theirs

WINDOW, WINDOWS = 512, 4
# Large enough to choose any token, small enough for single precision.
BIAS = 10_000
TEXT = pathlib.Path(os.environ["ATHANOR_DATA"]) / "sentiment" / "nyt.txt"


def windows(base, count):
    """Token ids of the text, cut into windows. Each is scored by itself, its first token excepted."""
    lines = TEXT.read_text(encoding="utf-8", errors="replace").splitlines()
    text = " ".join(line.split("\t", 2)[2].strip() for line in lines[: 200 * count])
    answer = requests.post(f"{base}/v1/tokenize", json={"prompt": text, "add_special_tokens": False}, timeout=60)
    answer.raise_for_status()
    tokens = answer.json()["tokens"]
    if len(tokens) < count * WINDOW:
        raise ValueError(f"the text has {len(tokens)} tokens, {count * WINDOW} are needed")
    return text, [tokens[first * WINDOW : (first + 1) * WINDOW] for first in range(count)]


def of_ours(base, rows):
    """Log-probabilities of all tokens but the first of each window."""
    found = []
    for row in rows:
        body = {"prompt": row, "echo": True, "logprobs": 0, "max_tokens": 0}
        answer = requests.post(f"{base}/v1/completions", json=body, timeout=600)
        answer.raise_for_status()
        values = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        if len(values) != len(row) or values[0] is not None:
            raise ValueError(f"{len(values)} log-probabilities of {len(row)} tokens")
        found += values[1:]
    return found


def forced(session, base, prompt, token, bias):
    """What llama.cpp reports for the token after a prompt."""
    body = {
        "prompt": prompt, "n_predict": 1, "n_probs": 20, "temperature": 0, "cache_prompt": True,
        "logit_bias": [[token, bias]] if bias else [],
    }
    answer = session.post(f"{base}/completion", json=body, timeout=600)
    answer.raise_for_status()
    return answer.json()["completion_probabilities"][0]


def of_theirs(base, rows):
    session, found, checked = requests.Session(), [], 0
    for row in rows:
        for place in range(1, len(row)):
            first = forced(session, base, row[:place], row[place], BIAS)
            if first["id"] != row[place]:
                raise ValueError(f"token {first['id']} was chosen, not {row[place]}")
            found.append(first["logprob"])
            # Without the bias the same token has the same log-probability.
            if place % 100 == 50:
                free = forced(session, base, row[:place], row[place], 0)
                same = [entry["logprob"] for entry in free["top_logprobs"] if entry["id"] == row[place]]
                if same and abs(same[0] - found[-1]) > 0.02:
                    raise ValueError(f"log-probability {found[-1]} with the bias, {same[0]} without")
                checked += len(same)
    if checked == 0:
        raise ValueError("no log-probability could be compared with one without the bias")
    return found


def run(model, files, options):
    """Entries for bench/results/serve.json."""
    count = 1 if options.quick else WINDOWS
    sizes, found, rows, text = Sizes(1, 1024), {}, None, ""
    for weights in ("FP32", "Auto", "Int8", "Int4"):
        with ours(model, weights, sizes) as (base, _, _):
            if rows is None:
                text, rows = windows(base, count)
            found[f"athanor {weights}"] = of_ours(base, rows)
    for name, file in files.of(model).items():
        with theirs(file, "enabled", sizes) as (base, _, _):
            answer = requests.post(f"{base}/tokenize", json={"content": text, "add_special": False}, timeout=60)
            if answer.json()["tokens"][: count * WINDOW] != sum(rows, []):
                raise ValueError(f"llama.cpp cuts the text into other tokens than ours with {model.name}")
            found[f"llama.cpp {name}"] = of_theirs(base, rows)
    perplexity = {name: math.exp(-sum(values) / len(values)) for name, values in found.items()}
    reference = found["athanor FP32"]
    # Standard error of the mean difference to FP32's log-probabilities, as the texts are the same.
    print(f"\nperplexity of {model.name} on {len(reference)} tokens")
    results = []
    for name, value in perplexity.items():
        differences = [a - b for a, b in zip(found[name], reference)]
        mean = sum(differences) / len(differences)
        error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1) / len(differences))
        ratio = value / perplexity["athanor FP32"]
        print(f"{name:24} {value:9.4f}  {ratio:7.4f} of FP32's (+- {ratio * error:.4f})")
        results.append({
            "name": f"{model.name}, perplexity, {name}", "ours": value if name.startswith("athanor") else None,
            "peer": None if name.startswith("athanor") else value, "unit": "perplexity", "ratio": ratio,
            "standard_error": ratio * error, "tokens": len(reference), "target": None,
        })
    return results
