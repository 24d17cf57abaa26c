"""examples/langchain/agent.py, in its own environment, with Qwen2.5-Coder-0.5B as its chat model: the calls are the model's own.

The example asks for a model of 1.5B parameters or more. This one calls the right function first, but does not always stop then.
"""

import os
import pathlib
import subprocess

import pytest

PROGRAM = pathlib.Path(__file__).parents[3] / "examples" / "langchain" / "agent.py"


@pytest.mark.parametrize(
    ("question", "call", "result"),
    [
        ("How much is 2 % of 2000000?", "Call: calculate({'expression': '0.02 * 2000000'})", "Result: 40000.0"),
        ("Search the agreement: how much does the bank lend?", "Call: search({'query': ", "2,000,000 euro"),
    ],
)
def test_the_first_call_and_its_result(coder, any_embedding_model, question, call, result):
    command = [os.environ["ATHANOR_EXAMPLES_PYTHON"], PROGRAM, "--chat-url", f"{coder[0]}/v1", "--chat-model", "coder"]
    command += ["--embedding-url", f"{any_embedding_model[0]}/v1", "--embedding-model", "mini", question]
    environment = dict(os.environ, ANONYMIZED_TELEMETRY="False")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    # The model may call on up to the limit of steps. Any other error, such as a refused request, is a failure.
    assert ended.returncode == 0 or "GraphRecursionError" in ended.stderr, ended.stdout + ended.stderr
    first, _, rest = ended.stdout.partition("\nCall: ")[2].partition("\n")
    assert f"Call: {first}".startswith(call), ended.stdout
    assert result in rest, ended.stdout
