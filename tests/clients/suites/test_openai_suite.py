"""The tests of OpenAI's own client, from its source package, against our servers through a router (--through)."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

TESTS = pathlib.Path(os.environ["ATHANOR_DATA"]) / "openai-tests"

# Files of the resources that we serve. Those of the other resources are left out, and so are the tests outside of
# `api_resources`: they answer their own requests, and none reaches a server.
FILES = {
    "routed_model": [
        "tests/api_resources/chat/test_completions.py",
        "tests/api_resources/test_completions.py",
        "tests/api_resources/test_models.py",
        "tests/api_resources/test_responses.py",
    ],
    "routed_embedding_model": ["tests/api_resources/test_embeddings.py"],
}

# Tests of these files that are left out: a pattern of their ids and the reason. Each has to match.
LEFT_OUT = {
    "routed_model": {
        r"test_path_params|in_sync|disallowed": "no request is sent",
        r"chat/test_completions.*_with_all_params_overload": "asks for audio, a bias of the token \"foo\" and 0 tokens at once, "
        "which OpenAI refuses as well",
        r"chat/test_completions.*_(retrieve|update|list|delete)": "chat completions are not stored",
        r"resources/test_completions.*_with_all_params": "asks for a bias of the token \"foo\" and a best_of of 0, which OpenAI "
        "refuses as well",
        r"test_models.*_delete": "the served model is not deleted by a request",
        r"test_responses.*_create(_overload_\d)?\[": "has no input, which OpenAI refuses as well",
        r"test_responses.*_create_with_all_params": "asks for a stored prompt, a stored response and 0 tokens at once",
        r"test_responses.*_(retrieve|delete|cancel|compact)": "responses are not stored",
    },
    "routed_embedding_model": {
        r"test_embeddings.*_create\[(strict|aiohttp)\]": "the client asks for base64 by itself, and its strict validation accepts lists "
        "of numbers only: it passes against a server that ignores encoding_format",
    },
}


def run(base, *arguments):
    """pytest in the folder of the client's tests, without its own options and warnings as errors."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-o", "addopts=", "-W", "default", *arguments]
    env = dict(os.environ, TEST_API_BASE_URL=f"{base}/v1")
    return subprocess.run(command, cwd=TESTS, env=env, capture_output=True, text=True, timeout=1800)


def select(listing, left_out):
    """Ids of the tests to run, and the number that each pattern leaves out."""
    counts = dict.fromkeys(left_out, 0)
    selected = []
    for test in [line for line in listing.splitlines() if "::" in line]:
        pattern = next((pattern for pattern in left_out if re.search(pattern, test)), None)
        if pattern is None:
            selected.append(test)
        else:
            counts[pattern] += 1
    return selected, counts


@pytest.mark.parametrize("served", FILES)
def test_the_clients_own_tests_pass(served, request, tmp_path):
    base = request.getfixturevalue(served)[0]
    listed = run(base, "--collect-only", *FILES[served])
    assert listed.returncode == 0, listed.stdout + listed.stderr
    selected, counts = select(listed.stdout, LEFT_OUT[served])
    assert selected and all(counts.values()), counts
    (tmp_path / "tests").write_text("\n".join(selected))
    done = run(base, f"@{tmp_path / 'tests'}")
    for pattern, count in counts.items():
        print(f"left out: {count} {pattern}: {LEFT_OUT[served][pattern]}")
    print(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.match(rf"{len(selected)} passed", done.stdout.splitlines()[-1]), "each test runs"
