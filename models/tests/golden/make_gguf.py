"""Makes blocks.gguf, blocks.f32 and smollm2.json (qwen-coder-0.5b.json if that model is there) for models/tests/gguf.rs.

Needs: gguf 0.19, transformers 5.23, torch 2.11, numpy. Usage: python models/tests/golden/make_gguf.py MODELS_FOLDER
"""

import hashlib
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

here = Path(__file__).parent
random = np.random.default_rng(16)

FORMATS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
FORMATS += ["Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"]
# Bytes of a block that are FP16 numbers: with random bits there, many values would be NaN or infinite.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0]}
HALVES |= {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "Q2_K": [80, 82], "Q3_K": [108]}
HALVES |= {"IQ4_NL": [0], "IQ4_XS": [0]}
# Subnormal, zero, negative and large ones among them.
SCALES = np.array([0.0, -0.0, 6e-8, 3e-5, 0.0123, -0.77, 1.0, 60000.0], dtype=np.float16)


def blocks():
    writer = gguf.GGUFWriter(here / "blocks.gguf", "test")
    for bits in [8, 16, 32, 64]:
        writer.add_key_value(f"value.u{bits}", 2**bits - 1, gguf.GGUFValueType[f"UINT{bits}"])
        writer.add_key_value(f"value.i{bits}", -(2 ** (bits - 1)), gguf.GGUFValueType[f"INT{bits}"])
    writer.add_float32("value.f32", 1e-5)
    writer.add_float64("value.f64", 1e-5)
    writer.add_bool("value.bool", True)
    writer.add_string("value.string", "ä\n漢")
    writer.add_array("value.strings", ["", "x", "漢"])
    writer.add_array("value.integers", [1, 2, 3])
    expected = []
    for name in FORMATS:
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        rows, row = 3, 2 * elements if elements > 1 else 5
        if elements == 1:
            data = random.standard_normal((rows, row)).astype(np.float32) * 1000
            data[0, 0], data[1, 1] = 3e-7, -0.0
            data = {"F32": data, "F16": data.astype(np.float16), "BF16": gguf.quants.quantize(data, kind)}[name]
        else:
            data = random.integers(0, 256, (rows, row // elements, size), dtype=np.uint8)
            for offset in HALVES[name]:
                scales = random.choice(SCALES, data.shape[:2])
                data[..., offset : offset + 2] = scales[..., None].view(np.uint8)
            data = data.reshape(rows, -1)
        if name == "F32" or name == "F16":
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, data, raw_dtype=kind)
        expected.append(gguf.quants.dequantize(data, kind).astype(np.float32).tobytes())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (here / "blocks.f32").write_bytes(b"".join(expected))


def model(file: Path, to: str):
    """Digests of the weights that transformers loads, and the fields of its configuration."""
    arguments = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32)
    weights = {name: tensor.float().numpy().tobytes() for name, tensor in sorted(loaded.state_dict().items())}
    digests = {name: hashlib.sha256(weight).hexdigest()[:16] for name, weight in weights.items()}
    config = AutoConfig.from_pretrained(**arguments).to_dict()
    fields = ["hidden_size", "intermediate_size", "max_position_embeddings", "model_type", "num_attention_heads"]
    fields += ["num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size"]
    fields += ["bos_token_id", "eos_token_id"]
    fields = {name: config[name] for name in fields if config.get(name) is not None}
    fields["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (here / to).write_text(json.dumps({"config": fields, "weights": digests}, indent=0) + "\n")


blocks()
models = Path(sys.argv[1])
model(next((models / "smollm2-135m").glob("*.gguf")), "smollm2.json")
for file in (models / "qwen2.5-coder-0.5b").glob("*.gguf"):
    model(file, "qwen-coder-0.5b.json")
