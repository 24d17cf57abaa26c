"""A model that athanor-trainer makes on this machine, and athanor-server serving it: both the real binaries, on loopback."""

import contextlib
import json
import subprocess
import types

import pytest

import local
from local import DATA, MODELS, OURS, TARGET


def pytest_addoption(parser):
    parser.addoption(
        "--through", choices=["router", "server"],
        help="how suites reach the servers of models; absent: OpenAI's own tests through a router, the others directly",
    )


@pytest.fixture(scope="session")
def rows():
    """Clear sentences of the Amazon reviews with their sentiment."""
    found = []
    for line in (DATA / "sentiment" / "amazon.txt").read_text(encoding="utf-8", errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 1 and text.strip():
            found.append((text.strip(), "positive" if float(rating) > 0 else "negative"))
    return found[:1200]


def write_job(folder, rows, hyperparameters, **more):
    """A job's manifest beside its rows; it writes into the folder `out`."""
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for text, label in rows:
            print(json.dumps({"text": text, "label": label}), file=file)
    manifest = {
        "apiVersion": "athanor.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "clients"},
        "spec": {
            "model": {"from": f"file://{MODELS}/minilm-l6", "task": "TextClassification"},
            "data": {"sources": [{"name": "amazon", "uri": f"file://{folder}/rows.jsonl"}]},
            "hyperparameters": hyperparameters,
            "output": {"to": f"file://{folder}/out"},
            **more,
        },
    }
    # JSON is YAML.
    (folder / "job.yaml").write_text(json.dumps(manifest))
    return [TARGET / "athanor-trainer", "run", "-f", folder / "job.yaml"]


@pytest.fixture(scope="session")
def artifact(tmp_path_factory, rows):
    """The folder of a trained model."""
    folder = tmp_path_factory.mktemp("job")
    subprocess.run(write_job(folder, rows, {"maxSteps": 25}), check=True, timeout=300, env=OURS)
    (manifest_path,) = (folder / "out").glob("*/artifact/manifest.json")
    return manifest_path.parent


@contextlib.contextmanager
def serving(folder, name, uri, **more):
    """athanor-server of a model: its addresses by HTTP and gRPC. `more`: further fields of serve.json."""
    with local.server(folder, name, uri, **more) as server:
        yield server.base, server.grpc


@contextlib.contextmanager
def through(request, folder, name, addresses, default):
    """Addresses at which suites reach a server: its own, or those of a router before it. `default`: without --through."""
    if (request.config.getoption("--through") or default) == "server":
        yield addresses
        return
    revision = f"{name}-1"
    with local.router(folder, {revision: types.SimpleNamespace(base=addresses[0])}, {revision: 100}) as (router, _):
        yield router.base, router.grpc


@pytest.fixture(scope="session")
def server(tmp_path_factory, artifact):
    """Addresses of a server of that model: HTTP and gRPC."""
    with serving(tmp_path_factory.mktemp("serve"), "clients", f"file://{artifact}") as addresses:
        yield addresses


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """Addresses of a server of SmolLM2-135M-Instruct, from a folder with one GGUF file."""
    more = {"engine": {"maxModelLength": 1024, "kvCacheMemory": 256 << 20, "weights": "FP32"}}
    with serving(tmp_path_factory.mktemp("chat"), "smol", f"file://{MODELS}/smollm2-135m", **more) as addresses:
        yield addresses


@pytest.fixture(scope="session")
def embedding_model(tmp_path_factory):
    """Addresses of a server of MiniLM, an encoder without a head."""
    with serving(tmp_path_factory.mktemp("embed"), "mini", f"file://{MODELS}/minilm-l6") as addresses:
        yield addresses


@pytest.fixture(scope="session")
def any_server(tmp_path_factory):
    """Addresses of a server of SmolLM2-135M-Instruct with a short context, which accepts every name of a model."""
    engine = {"maxModelLength": 96, "kvCacheMemory": 64 << 20, "weights": "Int4"}
    more = {"acceptAnyModel": True, "limits": {"maxInputs": 4}, "engine": engine}
    with serving(tmp_path_factory.mktemp("any"), "smol", f"file://{MODELS}/smollm2-135m", **more) as addresses:
        yield addresses


@pytest.fixture(scope="session")
def any_embedding_server(tmp_path_factory):
    """Addresses of a server of MiniLM, which accepts every name of a model."""
    more = {"acceptAnyModel": True}
    with serving(tmp_path_factory.mktemp("any"), "mini", f"file://{MODELS}/minilm-l6", **more) as addresses:
        yield addresses


@pytest.fixture(scope="session")
def any_model(request, tmp_path_factory, any_server):
    with through(request, tmp_path_factory.mktemp("router"), "smol", any_server, "server") as addresses:
        yield addresses


@pytest.fixture(scope="session")
def any_embedding_model(request, tmp_path_factory, any_embedding_server):
    with through(request, tmp_path_factory.mktemp("router"), "mini", any_embedding_server, "server") as addresses:
        yield addresses


@pytest.fixture(scope="session")
def routed_model(request, tmp_path_factory, any_server):
    with through(request, tmp_path_factory.mktemp("router"), "smol", any_server, "router") as addresses:
        yield addresses


@pytest.fixture(scope="session")
def routed_embedding_model(request, tmp_path_factory, any_embedding_server):
    with through(request, tmp_path_factory.mktemp("router"), "mini", any_embedding_server, "router") as addresses:
        yield addresses


@pytest.fixture(scope="session")
def coder(request, tmp_path_factory):
    """Addresses of a server of Qwen2.5-Coder-0.5B-Instruct, whose template shows functions."""
    more = {"engine": {"maxModelLength": 2048, "kvCacheMemory": 256 << 20, "weights": "Int4"}}
    with serving(tmp_path_factory.mktemp("coder"), "coder", f"file://{MODELS}/qwen2.5-coder-0.5b", **more) as served:
        with through(request, tmp_path_factory.mktemp("router"), "coder", served, "server") as addresses:
            yield addresses
