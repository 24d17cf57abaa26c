"""Engines of other projects, each in a process of its own: reads a job from standard input, prints one JSON line per measurement.

Started by bench/serve_peers.py with the Python of the environment that has the engine; it imports nothing else.
A job has `engine` (a name in ENGINES), `path` of the model, `settings` of the engine, and `work`: a list of items with `what` (absent:
warm-up), `prompts` (token ids and text of each), `tokens` to generate for each, and `together` (one batch, or one prompt after another).
"""

import json, os, sys, time

THREADS = len(os.sched_getaffinity(0))


def openvino(path, **properties):
    """LLMPipeline of a GGUF file on the CPU. Returns a function from prompts to the numbers of tokens of prompts and of answers."""
    import numpy, openvino, openvino_genai

    pipeline = openvino_genai.LLMPipeline(path, "CPU", **properties)

    def generate(prompts, tokens):
        ids = numpy.array([prompt["ids"] for prompt in prompts], dtype=numpy.int64)
        options = {"max_new_tokens": tokens, "ignore_eos": True, "do_sample": True, "temperature": 1.0}
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
        answers = pipeline.generate(inputs, openvino_genai.GenerationConfig(**options)).tokens
        return ids.size, sum(map(len, answers))

    return generate


def transformers(path, dtype, cache):
    """A model of a folder, without torch.compile. `dtype`: torch's name; `cache`: "dynamic" or "static"."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    @torch.inference_mode()
    def generate(prompts, tokens):
        ids = torch.tensor([prompt["ids"] for prompt in prompts])
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "cache_implementation": cache, "disable_compile": True}
        answers = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **sampling)
        return ids.numel(), answers[:, ids.shape[1]:].numel()

    return generate


def mistralrs(path, dtype):
    """A model of a folder. `dtype`: mistralrs's name. Its Python class takes texts, not token ids, and answers several requests at once
    only as streams of chats, so prompts are those of the others in the model's chat template."""
    import mistralrs

    which = mistralrs.Which.Plain(model_id=path, dtype=getattr(mistralrs.ModelDType, dtype))
    # Without the prefix cache, which would find the beginning of the chat template.
    runner = mistralrs.Runner(which=which, max_seqs=16, prefix_cache_n=0, token_source="none")

    def generate(prompts, tokens):
        options = {"model": "default", "max_tokens": tokens, "ignore_eos": True, "temperature": 1.0, "stream": True}
        requests = [mistralrs.ChatCompletionRequest(messages=prompt["text"], **options) for prompt in prompts]
        streams = [runner.send_chat_completion_request(request) for request in requests]
        usages = [list(stream)[-1].usage for stream in streams]
        return sum(usage.prompt_tokens for usage in usages), sum(usage.completion_tokens for usage in usages)

    return generate


ENGINES = {"openvino": openvino, "transformers": transformers, "mistralrs": mistralrs}


def measure(generate, work):
    """Rates of the items of `work` that are no warm-up, as (what, tokens a second): of the prompt where one token is generated, else of
    the answers."""
    for item in work:
        batches = [item["prompts"]] if item["together"] else [[prompt] for prompt in item["prompts"]]
        began = time.monotonic()
        counts = [generate(batch, item["tokens"]) for batch in batches]
        seconds = time.monotonic() - began
        read, written = (sum(column) for column in zip(*counts))
        if written != item["tokens"] * len(item["prompts"]):
            sys.exit(f"{written} tokens were generated instead of {item['tokens']} for each of {len(item['prompts'])} prompts")
        if "what" in item:
            yield item["what"], (read if item["tokens"] == 1 else written) / seconds


def main():
    job = json.load(sys.stdin)
    # Engines print messages of their own to standard output.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    generate = ENGINES[job["engine"]](job["path"], **job["settings"])
    for what, rate in measure(generate, job["work"]):
        print(json.dumps({"what": what, "rate": rate}), file=results, flush=True)


if __name__ == "__main__":
    main()
