"""Clients of Node.js: CompatCanary's probes and the Vercel AI SDK."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest

# The folder with `node_modules`, which scripts/node-packages makes.
NODE = pathlib.Path(os.environ["ATHANOR_NODE"])


@pytest.mark.parametrize("profile", ["chat", "modern"])
def test_compatcanary_finds_no_failure(coder, profile):
    command = [NODE / "node_modules" / ".bin" / "compatcanary", "scan", "--base-url", f"{coder[0]}/v1", "--model", "coder"]
    command += ["--profile", profile, "--format", "json", "--fail-on", "any", "--timeout", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["score"] == 100, json.dumps(report["results"], indent=1)
    print(f"compatcanary {profile}: {report['summary']['passes']} of {report['summary']['total']}")


def test_the_ai_sdks_calls_are_answered(coder, any_embedding_model):
    # Node looks for packages from the folder of the program upwards.
    program = shutil.copy(pathlib.Path(__file__).with_name("ai_sdk.test.mjs"), NODE)
    env = dict(os.environ, CHAT_URL=f"{coder[0]}/v1", EMBEDDING_URL=f"{any_embedding_model[0]}/v1", AI_SDK_LOG_WARNINGS="false")
    done = subprocess.run(["node", "--test", program], env=env, capture_output=True, text=True, timeout=300)
    print(done.stdout[-600:])
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
