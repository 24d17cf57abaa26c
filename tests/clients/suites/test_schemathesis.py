"""schemathesis: requests from `/openapi.json`, right and wrong ones, and the answers compared with the document."""

import pathlib
import subprocess
import sys

import pytest

CONFIG = pathlib.Path(__file__).with_name("schemathesis.toml")


@pytest.mark.parametrize("served", ["server", "any_embedding_model", "any_model"])
def test_requests_from_the_document_are_answered_as_it_says(served, request, tmp_path):
    base = request.getfixturevalue(served)[0]
    command = [pathlib.Path(sys.executable).with_name("schemathesis"), "--config-file", CONFIG, "--no-color", "run"]
    done = subprocess.run([*command, f"{base}/openapi.json"], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
