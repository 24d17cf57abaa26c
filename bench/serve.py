#!/usr/bin/env python3
"""Serving side by side: language models next to llama.cpp's server (xllamacpp) and others, encoders next to onnxruntime.

Parts, each in a file of its own:
  speed       tokens a second at 1, 4, 16 and 64 streams, prefill of 512 and 2,048 tokens, memory and its peak, time to start; llama.cpp
              at the best of its formats (as shipped, Q4_0 and Q8_0 made from that) with flash attention on and off
  peers       tokens a second at 1 and 16 streams and prefill of 512 tokens, next to openvino-genai, transformers and mistralrs, each at
              the best of its settings
  perplexity  of every format on the same tokens
  poisson     requests at random times: time to the first token and between tokens, also as guidellm measures them
  roofline    share of the memory's bandwidth at one stream, operations a second in long prompts
  speculation tokens a second with and without proposed tokens, of answers that repeat their prompt and of others
  adapters    tokens a second without an adapter (LoRA), with one and with four at once, next to llama.cpp
  encoders    requests a second of MiniLM-L6
Language models are SmolLM2-135M and Qwen2.5-Coder-0.5B. Prints tables and writes bench/results/serve.json, in which the entries of other
parts and models stay. `make bench-serve` installs what it needs and runs it.
"""

import argparse, json, pathlib, tempfile

import serve_adapters, serve_encoders, serve_peers, serve_perplexity, serve_poisson, serve_roofline, serve_speculation, serve_speed
from serve_processes import MODELS, Files, server

PARTS = {"speed": serve_speed.run, "peers": serve_peers.run, "perplexity": serve_perplexity.run, "poisson": serve_poisson.run,
         "roofline": serve_roofline.run, "speculation": serve_speculation.run, "adapters": serve_adapters.run}
RESULTS = pathlib.Path(__file__).parent / "results/serve.json"


def keep(entries, part, model):
    """Replaces the entries of one part and model in the file of results."""
    of = lambda entry: (entry.get("part", "encoders" if entry["name"].startswith("MiniLM") else "speed"), entry["name"].split(",")[0])
    kept = [entry for entry in json.loads(RESULTS.read_text()) if of(entry) != (part, model)] if RESULTS.exists() else []
    RESULTS.write_text(json.dumps(kept + [{"part": part, **entry} for entry in entries], indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="turns of each engine in speed, peers and encoders (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=[*PARTS, "encoders"], help="a part; may be given several times (default: all)")
    parser.add_argument("--model", action="append", choices=MODELS, help="a language model; may be given several times (default: both)")
    parser.add_argument("--quick", action="store_true", help="a small form of each part, whose results are printed and not kept")
    options = parser.parse_args()
    if options.quick:
        options.runs = 1
    wanted = options.only or [*PARTS, "encoders"]
    with tempfile.TemporaryDirectory() as work:
        files = Files(work)
        for key in options.model or MODELS:
            for part in (part for part in PARTS if part in wanted):
                entries = PARTS[part](MODELS[key], files, options)
                if not options.quick:
                    keep(entries, part, MODELS[key].name)
        if "encoders" in wanted:
            entries = serve_encoders.measure(server, pathlib.Path(work), options.runs)
            if not options.quick:
                keep(entries, "encoders", "MiniLM-L6")


if __name__ == "__main__":
    main()
