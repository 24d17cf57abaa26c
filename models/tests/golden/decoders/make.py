"""Tiny random decoders and what transformers, peft and a plain PyTorch loop make of them, for models/tests/decoders.rs.

Run with torch 2.11.0, transformers 5.23 and peft 0.21: python models/tests/golden/decoders/make.py
It writes the models and adapters once (delete them to draw new ones), then golden.json.
"""

import json
import pathlib

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

HERE = pathlib.Path(__file__).parent
SHAPE = dict(
    vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.2, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1, pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
MODELS = {
    "gpt2": GPT2Config(
        vocab_size=200, n_positions=128, n_embd=32, n_layer=2, n_head=4, n_inner=48, initializer_range=0.2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    ),
    "llama": LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=False),
    "mistral": MistralConfig(**SHAPE, head_dim=12, sliding_window=8, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
}
ROWS = [
    [5, 17, 42, 99, 3, 8],
    [150],
    [(37 * i) % 190 + 3 for i in range(40)],
    [(53 * i + 11) % 190 + 3 for i in range(13)],
]
CHOSEN = slice(0, 200, 9)
STEPS = 20


def load(name):
    folder = HERE / name
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(sorted(MODELS).index(name))
        model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32)
        with torch.no_grad():
            # transformers begins norms and biases at ones and zeros, which would hide a mistake in them.
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def load_adapted(name):
    """A model with an adapter whose B is not zero, so that A has a gradient from the first step."""
    folder = HERE / f"{name}-adapter"
    if not (folder / "adapter_model.safetensors").exists():
        torch.manual_seed(100)
        targets = ["c_attn", "c_proj", "c_fc"] if name == "gpt2" else ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(
            r=4, lora_alpha=12, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2"
        )
        model = get_peft_model(load(name), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0, 0.1)
        model.save_pretrained(folder)
        # Without the path of the machine.
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "README.md").unlink()
    return PeftModel.from_pretrained(load(name), folder, is_trainable=True).eval()


def loss_of(model):
    """Mean cross entropy of the next tokens of all rows, each row by itself; every fifth target is left out."""
    total, count = 0.0, 0
    for row in ROWS:
        targets = torch.tensor([token if token % 5 else -100 for token in row[1:]], dtype=torch.long)
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
        if len(targets):
            total = total + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            count += int((targets >= 0).sum())
    return total / count


def gradients(model):
    named = [(key.replace(".default", ""), p) for key, p in model.named_parameters() if p.grad is not None]
    return {key: [p.grad.norm().item(), *p.grad.flatten()[: 4 * 7 : 7].tolist()] for key, p in named}


def train(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model):
    """For each row, the first and the last token's logits, some columns of them."""
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    return [[row[0, CHOSEN].tolist(), row[-1, CHOSEN].tolist()] for row in found]


def greedy(model, prompt, count):
    """The continuation, every token from a forward pass over the whole text, and the smallest lead of a first choice."""
    ids, lead = list(prompt), float("inf")
    with torch.no_grad():
        for _ in range(count):
            best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
            lead = min(lead, (best.values[0] - best.values[1]).item())
            ids.append(best.indices[0].item())
    assert lead > 1e-3, f"{lead}: rounding could change the text; draw other weights"
    return ids[len(prompt):]


golden = {"rows": ROWS, "models": {}, "adapters": {}}
for name in MODELS:
    model = load(name)
    entry = {"logits": logits(model), "greedy": greedy(model, ROWS[0], 64)}
    loss = loss_of(model)
    loss.backward()
    entry |= {"loss": loss.item(), "gradients": gradients(model), "training": train(load(name))}
    golden["models"][name] = entry
for name in ["gpt2", "qwen2"]:
    model = load_adapted(name)
    entry = {"logits": logits(model)}
    loss = loss_of(model)
    loss.backward()
    entry |= {"loss": loss.item(), "gradients": gradients(model), "training": train(load_adapted(name))}
    golden["adapters"][name] = entry
(HERE / "golden.json").write_text(json.dumps(golden) + "\n")
