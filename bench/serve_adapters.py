"""What low-rank adapters (LoRA) cost: tokens a second without one, with one, and with four at once, next to llama.cpp's server.

Imported by bench/serve.py. The adapters have random weights for all linear layers, of rank 16; both servers get the same numbers and choose
an adapter by request. llama.cpp's are FP16, and its weights Q4_0, its fastest format. Each request has one adapter; with four they take
turns.
"""

import concurrent.futures, json, statistics, time

import numpy as np

from serve_processes import Sizes, ask, memory, ours, theirs

RANK, ADAPTERS, TOKENS, STREAMS = 16, 4, 64, (1, 4, 16)
MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
# Adapters of the requests: none, one of all, and four in turns.
USES = {"without adapter": 0, "one adapter": 1, "four adapters": ADAPTERS}


def adapters(model, work):
    """Random ones: folders in PEFT's format and GGUF files of the same numbers."""
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(model.gguf)
    kind = reader.fields["general.architecture"].contents()
    layers = [tensor for tensor in reader.tensors if tensor.name.split(".")[-2] in MODULES and tensor.name.endswith(".weight")]
    found = []
    for number in range(ADAPTERS):
        random = np.random.default_rng(number)
        folder, file = work / f"{model.folder}.adapter-{number}", work / f"{model.folder}.adapter-{number}.gguf"
        folder.mkdir(exist_ok=True)
        tensors = {}
        writer = gguf.GGUFWriter(file, kind)
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(RANK))
        for layer in layers:
            inputs, outputs = (int(size) for size in layer.shape)
            _, index, module, _ = layer.name.split(".")
            # Changes of some percent of what the layer computes.
            a = (random.standard_normal((RANK, inputs)) / np.sqrt(inputs)).astype(np.float16)
            b = (random.standard_normal((outputs, RANK)) * 0.01).astype(np.float16)
            name = f"base_model.model.model.layers.{index}.{MODULES[module]}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            writer.add_tensor(f"{layer.name}.lora_a", a)
            writer.add_tensor(f"{layer.name}.lora_b", b)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [name.split(".")[1] for name in MODULES.values()]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found.append((folder, file))
    return found


def measure(request, first, streams, used):
    """Tokens a second of some streams, which use so many adapters in turns."""
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        one = lambda number: request(first + number, number % used if used else None, TOKENS)
        done = list(pool.map(one, range(streams if streams > 1 else 3)))
    return sum(tokens for _, tokens in done) / (time.monotonic() - began)


def run(model, files, options):
    """Entries for bench/results/serve.json."""
    streams = (1, 4) if options.quick else STREAMS
    sizes = Sizes(max(streams), 512)
    made = adapters(model, files.work)
    named = [{"name": f"adapter-{number}", "uri": f"file://{folder}"} for number, (folder, _) in enumerate(made)]
    loaded = [file for _, file in made]
    in_ours = lambda base: lambda number, adapter, tokens: ask(
        base, "bench" if adapter is None else f"adapter-{adapter}", number, 8, tokens, ignore_eos=True)
    in_theirs = lambda base: lambda number, adapter, tokens: ask(
        base, "any", number, 8, tokens, ignore_eos=True,
        lora=[{"id": place, "scale": float(place == adapter)} for place in range(ADAPTERS)])
    file = files.of(model)["Q4_0"]
    servers = {
        "athanor Int4": (in_ours, lambda adapters: ours(model, "Int4", sizes, adapters=named if adapters else [])),
        "llama.cpp Q4_0": (in_theirs, lambda adapters: theirs(file, "enabled", sizes, adapters=loaded if adapters else [])),
    }
    found, sizes_of = {}, {}
    for name, (requests_to, start) in servers.items():
        with start(False) as (base, served, process):
            ask(base, served, 1, 8, TOKENS)
            plain = memory(process, "VmRSS")
        with start(True) as (base, _, process):
            request = requests_to(base)
            for adapter in (None, *range(ADAPTERS)):
                request(2, adapter, TOKENS)
            sizes_of[name] = (memory(process, "VmRSS") - plain) / ADAPTERS
            for turn in range(options.runs):
                for place, count in enumerate(streams):
                    # One after the other, so that each has the machine of the same minute.
                    for use, used in USES.items():
                        first = 100_000 * (turn + 1) + 10_000 * place + 1_000 * used
                        found.setdefault((name, count, use), []).append(measure(request, first, count, used))
    rate = {key: statistics.median(values) for key, values in found.items()}
    own, peer = servers
    results = []
    print(f"\n{model.name}, rank {RANK}")
    for count in streams:
        for use in USES:
            a, b = rate[own, count, use], rate[peer, count, use]
            costs = [rate[name, count, use] / rate[name, count, "without adapter"] for name in servers]
            what = f"{count} stream{'s' * (count > 1)}, {use}"
            print(f"{what:28} {a:8.1f} {b:8.1f} tokens/s, ratio {a / b:5.2f}; of that without: {costs[0]:.2f}, {costs[1]:.2f}", flush=True)
            results.append({
                "name": f"{model.name}, {what}", "ours": a, "peer": b, "ours_name": own, "peer_name": peer, "unit": "tokens/s",
                "ratio": a / b, "target": None, "share_of_without": costs,
                "runs": {own: found[own, count, use], peer: found[peer, count, use]},
            })
    print(f"memory of an adapter: {sizes_of[own]:.1f} MiB, {sizes_of[peer]:.1f} MiB")
    results.append({
        "name": f"{model.name}, memory of an adapter", "ours": sizes_of[own], "peer": sizes_of[peer], "ours_name": own, "peer_name": peer,
        "unit": "MiB", "ratio": sizes_of[own] / sizes_of[peer] if sizes_of[peer] else None, "target": None,
    })
    return results
