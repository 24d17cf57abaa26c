"""llama.cpp's server as the wheel xllamacpp has it, with the options of llama-server that a ModelDeployment needs."""
import argparse
import os
import signal

import xllamacpp

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--alias", required=True)
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, default=8080)
parser.add_argument("--ctx-size", type=int, default=0)
parser.add_argument("--parallel", type=int, default=1)
parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
parser.add_argument("--metrics", action="store_true")
arguments = parser.parse_args()

# Before the server's threads start, which inherit it: sigwait then takes the signal.
STOP = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, STOP)

params = xllamacpp.CommonParams()
params.model.path = arguments.model
params.model_alias = {arguments.alias}
params.hostnames = [arguments.host]
params.port = arguments.port
params.n_ctx = arguments.ctx_size
params.n_parallel = arguments.parallel
params.endpoint_metrics = arguments.metrics
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
# Prompts that are kept in memory besides the slots, in MiB.
params.cache_ram_mib = 64
server = xllamacpp.Server(params)
print(f"listening at {server.listening_address}", flush=True)
print(f"signal {signal.sigwait(STOP)}", flush=True)
# As llama-server does: at once, without the answers in progress.
os._exit(0)
