"""athanor-server and athanor-router on loopback, without Kubernetes, and what can be read from them while they run."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

TARGET = pathlib.Path(os.environ["CARGO_TARGET_DIR"]) / "release"
MODELS = pathlib.Path(os.environ["ATHANOR_MODELS"])
DATA = pathlib.Path(os.environ["ATHANOR_DATA"])
# Our processes find libtorch by this path; Python must not, it has its own.
OURS = dict(os.environ, LD_LIBRARY_PATH=f"{os.environ['LIBTORCH']}/lib")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def cpu_seconds(process) -> float:
    """Processor time of a process (its id, or "self") in user and in kernel mode."""
    # The name of the program, in brackets, may have spaces.
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def end_on_sigterm():
    """SIGTERM becomes an exception, so that the processes that were started are ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@dataclasses.dataclass
class Process:
    """A running server or router."""

    name: str
    process: subprocess.Popen
    # Addresses of the routes for clients, of /metrics, and of gRPC.
    base: str
    ops: str
    grpc: str

    def metric(self, name):
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(f"{self.ops}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def status(self, field):
        """A field of the process's status in the kernel, such as VmRSS in KiB."""
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
        raise KeyError(field)

    def cpu_seconds(self):
        """Processor time so far, of all threads."""
        return cpu_seconds(self.process.pid)

    def open_files(self):
        """Number of open file descriptors, connections included."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextlib.contextmanager
def running(name, command, base, ops, grpc, log=None):
    """Starts a program, waits until it is ready, and ends it. `log`: file of its output; absent: this program's."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(log, "w")) if log else None
        process = subprocess.Popen(command, env=OURS, stdout=output, stderr=output)
        try:
            for _ in range(1200):
                with contextlib.suppress(urllib.error.URLError, OSError):
                    with urllib.request.urlopen(f"{ops}/readyz", timeout=1) as answer:
                        if answer.status == 200:
                            break
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended: {pathlib.Path(log).read_text()[-2000:] if log else 'see its output'}")
                time.sleep(0.1)
            else:
                raise TimeoutError(f"{name} was not ready in 120 s")
            yield Process(name, process, base, ops, grpc)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def server(folder, name, uri, log=None, revision=None, processors=None, **more):
    """athanor-server of a model.

    `folder`: for its configuration; `processors`: numbers of those that it runs on, absent: all; `more`: further fields of serve.json.
    """
    http, grpc = free_port(), free_port()
    config = pathlib.Path(folder) / f"{revision or name}.json"
    serve = {"modelName": name, "revision": revision or f"{name}-1", "modelUri": uri, "httpPort": http, "grpcPort": grpc, **more}
    config.write_text(json.dumps(serve))
    command = [TARGET / "athanor-server", "--address", "127.0.0.1", "--config", config]
    if processors:
        command = ["taskset", "--cpu-list", ",".join(map(str, processors)), *command]
    base = f"http://127.0.0.1:{http}"
    with running(revision or name, command, base, base, f"127.0.0.1:{grpc}", log) as process:
        yield process


def write_weights(file, weights):
    """router.json with these weights of revisions, replaced as a whole."""
    revisions = [{"name": name, "service": name, "weight": weight} for name, weight in weights.items()]
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"namespace": "local", "deployment": "local", "revisions": revisions}))
    part.replace(file)


@contextlib.contextmanager
def router(folder, servers, weights, log=None):
    """athanor-router before servers by revision name. Yields it and the file whose weights it follows."""
    folder = pathlib.Path(folder)
    file = folder / "router.json"
    write_weights(file, weights)
    http, grpc, ops = free_port(), free_port(), free_port()
    endpoints = [f"{name}={server.base.removeprefix('http://')}" for name, server in servers.items()]
    command = [
        TARGET / "athanor-router", "--address", "127.0.0.1", "--config-file", file, "--endpoints", ",".join(endpoints),
        "--http-port", str(http), "--grpc-port", str(grpc), "--ops-port", str(ops), "--spill-dir", folder / "spill",
    ]
    addresses = [f"http://127.0.0.1:{http}", f"http://127.0.0.1:{ops}", f"127.0.0.1:{grpc}"]
    with running("router", command, *addresses, log) as process:
        yield process, file
