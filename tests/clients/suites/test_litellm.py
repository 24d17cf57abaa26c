"""litellm: chats, streams, calls of functions, JSON by a schema, embeddings and errors."""

import json

import litellm
import pytest
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]},
    },
}


class Place(BaseModel):
    city: str
    country: str


@pytest.fixture(scope="module")
def ask(coder):
    def ask(**more):
        parameters = {"model": "openai/coder", "messages": QUESTION, "temperature": 0, "max_tokens": 64, "num_retries": 0, **more}
        return litellm.completion(api_base=f"{coder[0]}/v1", api_key="none", **parameters)

    return ask


def test_a_chat_and_its_stream(ask):
    answer = ask()
    text = answer.choices[0].message.content
    assert "Paris" in text and answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    whole = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    assert whole.usage.completion_tokens == answer.usage.completion_tokens


def test_a_call_of_a_function_and_its_result(ask):
    messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    answer = ask(messages=messages, tools=[WEATHER], tool_choice="required").choices[0]
    call = answer.message.tool_calls[0]
    assert answer.finish_reason == "tool_calls" and call.function.name == "weather"
    assert list(json.loads(call.function.arguments)) == ["city"]
    messages += [answer.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "-3 degrees"}]
    assert "3" in ask(messages=messages).choices[0].message.content


def test_json_of_a_type(ask):
    messages = [{"role": "user", "content": "Give the city and the country of the Eiffel Tower as JSON."}]
    content = ask(messages=messages, response_format=Place).choices[0].message.content
    assert Place.model_validate_json(content).city


def test_an_error_is_litellms_own(ask):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(temperature=3)
    with pytest.raises(litellm.NotFoundError):
        ask(model="openai/other")


def test_embeddings(any_embedding_model):
    answer = litellm.embedding(
        model="openai/mini", input=["A cat.", "A dog."], api_base=f"{any_embedding_model[0]}/v1", api_key="none", encoding_format="float"
    )
    assert [len(entry["embedding"]) for entry in answer.data] == [384, 384]
