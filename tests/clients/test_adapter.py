"""A language model that was trained with LoRA: transformers loads the merged model, peft the adapter, and both compute the same."""

import json
import subprocess

import pytest
import torch
from conftest import MODELS, OURS, write_job
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = ["Which bank lends?", "Who repays the principal?", "When is interest due?"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The artifact of a few steps of LoRA on SmolLM2."""
    folder = tmp_path_factory.mktemp("lora")
    command = write_job(
        folder,
        [],
        {"maxSteps": 6, "batchSize": 4, "learningRate": 1e-3, "maxSequenceLength": 64, "precision": "FP32"},
        model={"from": f"file://{MODELS}/smollm2-135m", "task": "CausalLanguageModel"},
        adapter={"lora": {"rank": 4, "alpha": 8}},
        data={"sources": [{"name": "talks", "uri": f"file://{folder}/talks.jsonl", "columns": {"messages": "messages"}}],
              "split": {"validationPercent": 10, "testPercent": 10}},
        evaluate={"generation": {"samples": 2, "maxNewTokens": 4}},
    )
    with open(folder / "talks.jsonl", "w") as file:
        for number in range(40):
            messages = [{"role": "user", "content": f"What is number {number}?"}, {"role": "assistant", "content": f"It is {number}."}]
            print(json.dumps({"messages": messages}), file=file)
    subprocess.run(command, check=True, timeout=600, env=OURS)
    (manifest,) = (folder / "out").glob("*/artifact/manifest.json")
    return manifest.parent


def logits(model, tokenizer):
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in QUESTIONS]


def test_the_base_model_with_the_adapter_is_the_merged_model(adapted):
    tokenizer = AutoTokenizer.from_pretrained(adapted)
    merged = AutoModelForCausalLM.from_pretrained(adapted, dtype=torch.float32).eval()
    (file,) = (MODELS / "smollm2-135m").glob("*.gguf")
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    before = logits(base, tokenizer)
    adapter = PeftModel.from_pretrained(base, adapted / "adapter").eval()
    for ours, theirs, untrained in zip(logits(merged, tokenizer), logits(adapter, tokenizer), before):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert (theirs - untrained).abs().max() > 0.05, "the adapter changes nothing"


def test_the_tokenizer_renders_the_conversations_of_training(adapted):
    tokenizer = AutoTokenizer.from_pretrained(adapted)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n") and "Hi<|im_end|>" in text
