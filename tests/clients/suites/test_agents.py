"""openai-agents: text, streams, tools, typed output with tools, and a handoff, over chat completions."""

import agents
import openai
import pytest
from pydantic import BaseModel, Field


@pytest.fixture
def model(coder):
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{coder[0]}/v1", api_key="none", max_retries=0)
    return agents.OpenAIChatCompletionsModel(model="coder", openai_client=client)


def settings(**more):
    return agents.ModelSettings(temperature=0, max_tokens=200, **more)


class City(BaseModel):
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)


def weather_tool(called):
    @agents.function_tool
    def weather(city: str) -> str:
        """Returns the weather in a city."""
        called.append(city)
        return "snow at minus three degrees"

    return weather


async def test_text_and_its_stream(model):
    agent = agents.Agent(name="guide", instructions="Answer in one sentence.", model=model, model_settings=settings())
    whole = await agents.Runner.run(agent, "What is the capital of France?")
    assert "Paris" in whole.final_output
    stream = agents.Runner.run_streamed(agent, "What is the capital of France?")
    deltas = [event.data.delta async for event in stream.stream_events()
              if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.final_output


@pytest.mark.parametrize("streams", [False, True])
async def test_a_tool_is_called_and_its_result_is_taken(model, streams):
    called = []
    agent = agents.Agent(
        name="weather", model=model, tools=[weather_tool(called)], instructions="Answer by the result of the tool.",
        # The model would repeat the call up to the bound of an answer.
        model_settings=settings(tool_choice="required", parallel_tool_calls=False),
    )
    question = "What is the weather in Oslo?"
    if streams:
        result = agents.Runner.run_streamed(agent, question)
        async for _ in result.stream_events():
            pass
    else:
        result = await agents.Runner.run(agent, question)
    # With the result in its prompt the model of 0.5 B parameters repeats the call and then says nothing, so its words are not tested.
    assert set(called) == {"Oslo"}
    results = [item for item in result.new_items if item.type == "tool_call_output_item"]
    assert len(results) == len(called) and "snow" in results[0].output


async def test_typed_output_with_a_tool(model):
    called = []
    agent = agents.Agent(
        name="places", model=model, output_type=City, tools=[weather_tool(called)], model_settings=settings(),
        instructions="Answer with the city and the country.",
    )
    result = await agents.Runner.run(agent, "In which city and country is the Eiffel Tower?", max_turns=4)
    assert isinstance(result.final_output, City)


async def test_a_handoff_is_a_call(model):
    spanish = agents.Agent(name="spanish", instructions="Answer in Spanish.", model=model, model_settings=settings())
    triage = agents.Agent(
        name="triage", instructions="Hand off to the Spanish agent.", handoffs=[spanish], model=model,
        model_settings=settings(tool_choice="required"),
    )
    result = await agents.Runner.run(triage, "Hola, como estas?", max_turns=4)
    assert result.last_agent is spanish and result.final_output
