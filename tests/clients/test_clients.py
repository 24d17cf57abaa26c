"""No lock-in: transformers loads what Athanor trained and gives the server's answers; ordinary clients work unchanged."""

import json
import queue
import time

import local
import numpy as np
import openai
import pytest
import requests
import torch
import tritonclient.grpc as triton
from test_openai import QUESTION, metric
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from tritonclient.utils import InferenceServerException

LABELS = ["negative", "positive"]


def served(base, texts):
    """[texts, labels] probabilities by the server."""
    answer = requests.post(f"{base}/v1/classify", json={"input": texts}, timeout=30)
    answer.raise_for_status()
    return np.array(
        [[next(p["score"] for p in row["probabilities"] if p["label"] == label) for label in LABELS] for row in answer.json()["data"]]
    )


def test_transformers_gives_the_servers_answers(artifact, server, rows, tmp_path):
    texts = [text for text, _ in rows[:64]]
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    model = AutoModelForSequenceClassification.from_pretrained(artifact, dtype=torch.float32).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        probabilities = torch.softmax(model(**batch).logits, dim=-1).numpy()
    assert [model.config.id2label[index] for index in range(2)] == LABELS
    with local.server(tmp_path, "exact", f"file://{artifact}", engine={"weights": "FP32"}) as exact:
        np.testing.assert_allclose(served(exact.base, texts), probabilities, rtol=1e-4, atol=1e-4)
    # `Auto` is BF16 on processors that multiply it.
    np.testing.assert_allclose(served(server[0], texts), probabilities, rtol=0, atol=2e-3)


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


def tensor(name, values, datatype="BYTES"):
    given = triton.InferInput(name, [len(values)], datatype)
    kinds = {"BYTES": object, "BOOL": bool, "INT32": np.int32}
    given.set_data_from_numpy(np.array([v.encode() if isinstance(v, str) else v for v in values], dtype=kinds[datatype]))
    return given


def test_tritonclient_gives_the_same_vectors(embedding_model):
    texts = ["Who wrote Faust?", "The Rhine is a river."]
    client = triton.InferenceServerClient(embedding_model[1])
    (output,) = client.get_model_metadata("mini").outputs
    assert (output.name, output.datatype) == ("embedding", "FP32")
    vectors = client.infer("mini", [tensor("text", texts)]).as_numpy("embedding")
    served = requests.post(f"{embedding_model[0]}/v1/embeddings", json={"input": texts}, timeout=30).json()["data"]
    assert vectors.shape == (2, output.shape[1])
    np.testing.assert_allclose(vectors, [row["embedding"] for row in served], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def chat(language_model):
    """The answer to QUESTION over HTTP."""
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 24}
    answer = requests.post(f"{language_model[0]}/v1/chat/completions", json=body, timeout=60).json()
    return answer["choices"][0]["message"]["content"]


def test_tritonclient_gives_the_same_answer(language_model, chat):
    client = triton.InferenceServerClient(language_model[1])
    inputs = [tensor("messages", [json.dumps(QUESTION)]), tensor("max_tokens", [24], "INT32")]
    result = client.infer("smol", inputs, parameters={"temperature": 0})
    assert result.as_numpy("text_output")[0].decode() == chat
    assert result.get_response().parameters["finish_reason"].string_param == "stop"
    with pytest.raises(InferenceServerException, match="top_p"):
        client.infer("smol", [tensor("text_input", ["Hello"])], parameters={"top_p": 7})


def streamed(results, request_id):
    """The pieces of one answer."""
    pieces = []
    while True:
        result, error = results.get(timeout=60)
        assert error is None, error
        response = result.get_response()
        assert response.id == request_id
        pieces.append(result.as_numpy("text_output")[0].decode())
        if response.parameters["triton_final_response"].bool_param:
            return pieces


def test_tritonclient_streams_the_same_answer(language_model, chat):
    results = queue.Queue()
    with triton.InferenceServerClient(language_model[1]) as client:
        client.start_stream(callback=lambda result, error: results.put((result, error)))
        inputs = [tensor("messages", [json.dumps(QUESTION)]), tensor("max_tokens", [24], "INT32")]
        more = {"enable_empty_final_response": True, "parameters": {"temperature": 0}}
        client.async_stream_infer("smol", [*inputs, tensor("stream", [True], "BOOL")], request_id="1", **more)
        pieces = streamed(results, "1")
        assert len(pieces) > 3 and "".join(pieces) == chat
        # The same stream takes further requests; without `stream` the answer is one piece.
        client.async_stream_infer("smol", inputs, request_id="2", **more)
        assert streamed(results, "2") == [chat]
        client.async_stream_infer("other", inputs, request_id="3", **more)
        _, error = results.get(timeout=60)
        assert "other" in str(error)


def test_a_stream_that_is_cancelled_ends_its_answer(language_model):
    base = language_model[0]
    before = metric(base, "athanor_server_cancelled_sequences_total")
    results = queue.Queue()
    client = triton.InferenceServerClient(language_model[1])
    client.start_stream(callback=lambda result, error: results.put((result, error)))
    inputs = [tensor("text_input", ["Once upon a time"]), tensor("stream", [True], "BOOL"), tensor("max_tokens", [900], "INT32")]
    client.async_stream_infer("smol", inputs)
    assert results.get(timeout=60)[1] is None
    client.stop_stream(cancel_requests=True)
    for _ in range(100):
        cancelled = metric(base, "athanor_server_cancelled_sequences_total") - before
        running = metric(base, "athanor_server_running_sequences")
        if (cancelled, running) == (1, 0):
            return
        time.sleep(0.1)
    raise AssertionError(f"{cancelled} answers were cancelled, {running} go on")


def test_pickled_weights_are_never_written(artifact):
    names = {path.name for path in artifact.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
