"""No lock-in: transformers loads what Athanor trained and gives the server's answers; ordinary clients work unchanged."""

import numpy as np
import openai
import requests
import torch
import tritonclient.grpc as triton
from transformers import AutoModelForSequenceClassification, AutoTokenizer

LABELS = ["negative", "positive"]


def served(base, texts):
    """[texts, labels] probabilities by the server."""
    answer = requests.post(f"{base}/v1/classify", json={"input": texts}, timeout=30)
    answer.raise_for_status()
    return np.array(
        [[next(p["score"] for p in row["probabilities"] if p["label"] == label) for label in LABELS] for row in answer.json()["data"]]
    )


def test_transformers_gives_the_servers_answers(artifact, server, rows):
    texts = [text for text, _ in rows[:64]]
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    model = AutoModelForSequenceClassification.from_pretrained(artifact, dtype=torch.float32).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        probabilities = torch.softmax(model(**batch).logits, dim=-1).numpy()
    assert [model.config.id2label[index] for index in range(2)] == LABELS
    np.testing.assert_allclose(served(server[0], texts), probabilities, rtol=1e-4, atol=1e-4)


def test_a_batch_answers_like_its_members(server, rows):
    texts = [text for text, _ in rows[:16]]
    single = np.concatenate([served(server[0], [text]) for text in texts])
    np.testing.assert_allclose(served(server[0], texts), single, rtol=1e-4, atol=1e-4)


def test_the_openai_client_lists_the_model(server):
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["clients"]


def test_tritonclient_gives_the_same_answers(server, rows):
    texts = [text for text, _ in rows[:8]]
    client = triton.InferenceServerClient(server[1])
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("clients")
    given = triton.InferInput("text", [len(texts)], "BYTES")
    given.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=object))
    result = client.infer("clients", [given])
    assert result.as_numpy("probabilities").shape == (len(texts), 2)
    labels = [label.decode() for label in result.as_numpy("label")]
    assert labels == [LABELS[row.argmax()] for row in served(server[0], texts)]
    np.testing.assert_allclose(result.as_numpy("score"), served(server[0], texts).max(axis=1), rtol=1e-4, atol=1e-4)


def test_pickled_weights_are_never_written(artifact):
    names = {path.name for path in artifact.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
