"""pydantic-ai: agents with text, streams, typed output by a call and by a schema, and tools."""

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)


@pytest.fixture
def model(coder):
    return OpenAIChatModel("coder", provider=OpenAIProvider(base_url=f"{coder[0]}/v1", api_key="none"))


SETTINGS = {"temperature": 0, "max_tokens": 200}


async def test_text_and_its_stream(model):
    agent = Agent(model, instructions="Answer in one sentence.", model_settings=SETTINGS)
    question = "What is the capital of France?"
    whole = await agent.run(question)
    assert "Paris" in whole.output
    async with agent.run_stream(question) as stream:
        pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
    assert len(pieces) > 2 and "".join(pieces) == whole.output
    # The conversation goes on.
    again = await agent.run("And of Italy?", message_history=whole.all_messages())
    assert again.output


@pytest.mark.parametrize("mark", [ToolOutput, NativeOutput, PromptedOutput])
async def test_an_answer_has_a_type(model, mark):
    agent = Agent(model, output_type=mark(City), model_settings=SETTINGS, retries=2)
    result = await agent.run("In which city and country is the Eiffel Tower?")
    assert isinstance(result.output, City)


async def test_an_answer_with_a_type_may_call_a_tool_first(model):
    called = []
    agent = Agent(model, output_type=NativeOutput(City), model_settings=SETTINGS, retries=2)

    @agent.tool_plain
    def tower(name: str) -> str:
        """Returns the city and country of a tower."""
        called.append(name)
        return "Paris, France"

    result = await agent.run("In which city and country is the Eiffel Tower? Use the tool `tower` first.")
    assert isinstance(result.output, City) and len(called) <= 3


async def test_a_tool_is_called_and_its_result_is_read(model):
    called = []
    agent = Agent(model, model_settings=SETTINGS)

    @agent.tool_plain
    def temperature(city: str) -> str:
        """Returns the temperature in a city."""
        called.append(city)
        return "minus three degrees"

    try:
        result = await agent.run("Use the tool to find the temperature in Oslo.")
    except UnexpectedModelBehavior:
        # With the result in its prompt the model of 0.5 B parameters repeats the call, with arguments that the tool does not have.
        assert called[0] == "Oslo"
    else:
        assert called[0] == "Oslo" and "three" in result.output.lower()
