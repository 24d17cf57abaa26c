"""OpenAI's own client and LangChain against a language model and an embedding model: both the real server, on loopback."""

import base64
import json
import math
import struct
import threading
import time

import openai
import pytest
import requests
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(language_model):
    return openai.OpenAI(base_url=f"{language_model[0]}/v1", api_key="none", max_retries=0)


def metric(base, name):
    """The sum of a metric over its labels."""
    lines = requests.get(f"{base}/metrics", timeout=10).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def ask(client, **more):
    return client.chat.completions.create(**{"model": "smol", "messages": QUESTION, "temperature": 0, "max_tokens": 24, **more})


def test_a_chat_is_answered(client):
    answer = ask(client)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = ask(client)
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_a_stream_is_the_answer_in_pieces(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_parameters_of_an_answer(client):
    assert ask(client, max_tokens=2).choices[0].finish_reason == "length"
    assert ask(client, max_completion_tokens=2, max_tokens=openai.NOT_GIVEN).usage.completion_tokens == 2
    stopped = ask(client, stop=["France"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("The capital of ", "stop")
    several = ask(client, n=3, temperature=1.5, seed=7)
    assert len({choice.message.content for choice in several.choices}) > 1
    again = ask(client, n=3, temperature=1.5, seed=7)
    assert [choice.message.content for choice in again.choices] == [choice.message.content for choice in several.choices]
    content = ask(client, logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
    assert "".join(token.token for token in content) == "The capital of France"
    assert all(len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == token.logprob <= 0 for token in content)
    assert bytes(content[0].bytes) == b"The"
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}
    assert ask(client, temperature=2, extra_body=extra).choices[0].message.content == ask(client).choices[0].message.content


def test_texts_are_continued(client):
    answer = client.completions.create(model="smol", prompt=["The sky is", "Two plus two is"], max_tokens=4, temperature=0, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(len(choice.logprobs.tokens) == 4 and choice.finish_reason == "length" for choice in answer.choices)
    chunks = client.completions.create(model="smol", prompt="The sky is", max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}


def test_an_answer_follows_a_schema(client):
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}
    answer = ask(client, response_format=schema, n=2, temperature=1, seed=7, max_tokens=128)
    for choice in answer.choices:
        found = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert list(found) == ["city", "unit"] and len(found["city"]) <= 12 and found["unit"] in ("C", "F")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_call_is_made(client, choice):
    tools = [
        {"type": "function", "function": {"name": "weather", "description": "Weather of a city.", "parameters": PLACE}},
        {"type": "function", "function": {"name": "stop"}},
    ]
    asked = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 160}
    answer = ask(client, **asked).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    assert call.function.name in ("weather", "stop")
    assert set(json.loads(call.function.arguments)) == ({"city", "unit"} if call.function.name == "weather" else set())
    chunks = [chunk.choices[0].delta.tool_calls for chunk in ask(client, stream=True, **asked)]
    parts = [part[0] for part in chunks if part]
    assert parts[0].id and parts[0].function.name == call.function.name
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    # The answer to the call is part of the next request.
    messages = [*QUESTION, answer.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "20"}]
    assert ask(client, messages=messages, tools=tools).choices[0].finish_reason in ("stop", "length", "tool_calls")


@pytest.mark.parametrize(
    ("error", "param", "parameters"),
    [
        (openai.NotFoundError, "model", {"model": "other"}),
        (openai.BadRequestError, "temperature", {"temperature": 3}),
        (openai.BadRequestError, "top_p", {"top_p": -1}),
        (openai.BadRequestError, "stop", {"stop": list("abcde")}),
        (openai.BadRequestError, "n", {"n": 0}),
        (openai.BadRequestError, "messages", {"messages": []}),
        (openai.BadRequestError, "messages[0].role", {"messages": [{"role": "robot", "content": "x"}]}),
        (openai.BadRequestError, "max_tokens", {"max_tokens": 100_000}),
        (openai.BadRequestError, "max_tokens", {"messages": [{"role": "user", "content": "word " * 2000}]}),
        (openai.BadRequestError, "tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "f g"}}]}),
        (openai.BadRequestError, "response_format.type", {"response_format": {"type": "xml"}}),
        (openai.BadRequestError, "functions", {"functions": [{"name": "f"}]}),
        (openai.BadRequestError, "colour", {"extra_body": {"colour": "red"}}),
    ],
)
def test_an_error_names_its_parameter(client, error, param, parameters):
    with pytest.raises(error) as raised:
        ask(client, **parameters)
    assert raised.value.param == param
    assert raised.value.code and raised.value.type
    if param == "max_tokens":
        assert raised.value.code == "context_length_exceeded"


def test_a_number_that_is_none_names_its_parameter(language_model):
    body = json.dumps({"messages": QUESTION, "temperature": math.nan})
    answer = requests.post(f"{language_model[0]}/v1/chat/completions", data=body, headers={"content-type": "application/json"}, timeout=10)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temperature")


def test_a_client_that_goes_away_ends_its_answer(client, language_model):
    base = language_model[0]
    cancelled = metric(base, "athanor_server_cancelled_sequences_total")
    long = {"messages": [{"role": "user", "content": "Write a long story."}], "max_tokens": 900}
    with ask(client, stream=True, **long) as stream:
        for _, chunk in zip(range(5), stream):
            assert chunk.choices
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1).chat.completions.create(model="smol", **long)
    for _ in range(100):
        if metric(base, "athanor_server_cancelled_sequences_total") == cancelled + 2:
            break
        time.sleep(0.05)
    assert metric(base, "athanor_server_cancelled_sequences_total") == cancelled + 2
    assert metric(base, "athanor_server_running_sequences") == 0
    assert metric(base, "athanor_server_kv_cache_used_blocks") == 0


def test_responses_are_whole_or_typed_events(client):
    parameters = {"model": "smol", "input": QUESTION[0]["content"], "temperature": 0, "max_output_tokens": 24}
    whole = client.responses.create(**parameters)
    assert "Paris" in whole.output_text and (whole.status, whole.store) == ("completed", False)
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    events = list(client.responses.create(**parameters, stream=True))
    assert [event.type for event in events[:4]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert (events[-1].type, events[-1].response.output_text) == ("response.completed", whole.output_text)
    # An earlier response is sent back as input.
    user = lambda text: {"role": "user", "content": text}
    conversation = [user(parameters["input"]), *[item.to_dict() for item in whole.output], user("Thank you.")]
    assert client.responses.create(**{**parameters, "input": conversation}).output_text
    with client.responses.stream(**parameters) as stream:
        stream.until_done()
        assert stream.get_final_response().output_text == whole.output_text
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(**parameters, previous_response_id="resp_1")
    assert raised.value.param == "previous_response_id"


def test_a_prompt_has_log_probabilities(client):
    prompt = "The capital of France is"
    parameters = {"model": "smol", "prompt": prompt, "temperature": 0, "logprobs": 1}
    scored = client.completions.create(**parameters, echo=True, max_tokens=0).choices[0]
    assert scored.text == prompt and scored.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in scored.logprobs.token_logprobs[1:])
    offsets = [*scored.logprobs.text_offset, len(prompt)]
    assert [prompt[begin:end] for begin, end in zip(offsets, offsets[1:])] == scored.logprobs.tokens
    # The same token has the same log-probability as an answer and as a part of a prompt.
    answer = client.completions.create(**parameters, max_tokens=1).choices[0]
    longer = client.completions.create(**{**parameters, "prompt": prompt + answer.text}, echo=True, max_tokens=0).choices[0]
    assert longer.logprobs.tokens[-1] == answer.logprobs.tokens[0]
    assert longer.logprobs.token_logprobs[-1] == pytest.approx(answer.logprobs.token_logprobs[0], abs=0.05)


def test_many_streams_answer_as_one_does(client):
    prompts = [f"Name the number after {number}." for number in range(8)]
    single = [ask(client, messages=[{"role": "user", "content": prompt}]).choices[0].message.content for prompt in prompts]
    found = [None] * len(prompts)

    def stream(index):
        chunks = ask(client, messages=[{"role": "user", "content": prompts[index]}], stream=True)
        found[index] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == single


def test_the_models_are_listed(client, embedding_model):
    assert [model.id for model in client.models.list()] == ["smol"]
    assert client.models.retrieve("smol").max_model_len == 1024
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="language model"):
        client.embeddings.create(model="smol", input="x")
    other = openai.OpenAI(base_url=f"{embedding_model[0]}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="embedding model"):
        ask(other, model="mini")


def test_embeddings_are_those_of_the_model(embedding_model):
    client = openai.OpenAI(base_url=f"{embedding_model[0]}/v1", api_key="none", max_retries=0)
    texts = ["A cat sits on the mat.", "A kitten lies on a rug.", "Interest rates rise."]
    # The client asks for base64 unless it is told otherwise.
    answer = client.embeddings.create(model="mini", input=texts)
    vectors = [entry.embedding for entry in answer.data]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0
    numbers = client.embeddings.create(model="mini", input=texts, encoding_format="float")
    for vector, entry in zip(vectors, numbers.data):
        assert vector == pytest.approx(entry.embedding, abs=1e-6)
        assert math.fsum(value * value for value in vector) == pytest.approx(1, abs=1e-5)
    dot = lambda a, b: math.fsum(x * y for x, y in zip(a, b))
    assert dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2]) + 0.2
    raw = requests.post(f"{embedding_model[0]}/v1/embeddings", json={"input": [101, 1037, 102], "encoding_format": "base64"}, timeout=10)
    encoded = base64.b64decode(raw.json()["data"][0]["embedding"])
    assert len(struct.unpack(f"<{len(encoded) // 4}f", encoded)) == 384
    short = client.embeddings.create(model="mini", input=texts, dimensions=64).data[0].embedding
    assert len(short) == 64 and math.fsum(value * value for value in short) == pytest.approx(1, abs=1e-5)
    ranking = requests.post(f"{embedding_model[0]}/v1/rerank", json={"query": texts[0], "documents": texts[1:]}, timeout=10).json()
    assert [result["index"] for result in ranking["results"]] == [0, 1]
    assert ranking["results"][0]["relevance_score"] == pytest.approx(dot(vectors[0], vectors[1]), abs=1e-3)
    for param, parameters in [("dimensions", {"dimensions": 100_000}), ("input[1]", {"input": ["a", ""]}), ("input", {"input": []})]:
        with pytest.raises(openai.BadRequestError) as raised:
            client.embeddings.create(**{"model": "mini", "input": "x", **parameters})
        assert raised.value.param == param


def test_langchain_answers_streams_and_embeds(language_model, embedding_model):
    model = ChatOpenAI(base_url=f"{language_model[0]}/v1", api_key="none", model="smol", temperature=0, max_tokens=24)
    answer = model.invoke([("system", "You are helpful."), ("human", "What is the capital of France?")])
    assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 0
    pieces = [piece.content for piece in model.stream("What is the capital of France?")]
    assert len(pieces) > 3 and "Paris" in "".join(pieces)
    embeddings = OpenAIEmbeddings(
        base_url=f"{embedding_model[0]}/v1", api_key="none", model="mini", check_embedding_ctx_length=False
    )
    one, two = embeddings.embed_documents(["A cat.", "A dog."])
    assert len(one) == len(two) == 384 and one != two
    assert embeddings.embed_query("A cat.") == pytest.approx(one, abs=1e-5)
