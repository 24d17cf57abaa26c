#!/usr/bin/env python3
"""The operator under load, side by side with Kubeflow Trainer and JobSet: real etcd, API server, controller manager and
scheduler, with nodes and pods played by kwok.

1,000 jobs of four nodes on each side, then Athanor alone with 5,000 jobs of one node and with 500 ModelDeployments, each on
a fresh control plane. All objects are created as fast as the API server takes them. When all pods run, kwok starts again
with a stage that completes them all. Measures the time until all pods run and until all jobs are reported as finished, the
time of each job from its creation until its last pod runs, CPU and memory of the operators' processes, their requests by the
API server's audit log, and their writes in 30 idle seconds. Prints a table and writes bench/results/operator.json.
`make bench-operator` builds what it needs and runs it.
"""
import argparse, base64, collections, datetime, json, os, pathlib, shutil, signal, statistics, subprocess, sys, time, urllib.request

from control_plane import NAMESPACE, ROOT, ControlPlane, cpu_seconds, free_ports, peak_memory, replace_once, tool

OPERATOR = pathlib.Path(os.environ["CARGO_TARGET_DIR"]) / "release" / "athanor-operator"
IDLE_SECONDS, SETTLED_SECONDS = 30, 10
# Longest time in which nothing happens.
STUCK_SECONDS = 180
WRITES = {"create", "update", "patch", "delete", "deletecollection"}
# Termination message of the first pod of a FineTuneJob. No pod of the peer reads it.
RESULT = {
    "outcome": "succeeded", "artifact": "s3://bench/out/artifact", "modelDigest": "0" * 64, "dataDigest": "0" * 64, "steps": 100,
    "rows": {"train": 80, "validation": 10, "test": 10}, "metrics": {},
}


class AuditLog:
    """What the API server's audit log has recorded so far."""

    def __init__(self, path, users):
        self.file = open(path, "rb")
        self.rest = b""
        self.users = users
        self.completing = False
        # Time at which a pod began to run and ended, by pod.
        self.running, self.ended = {}, {}
        # Of the operators: time, process, verb, resource, name, status code.
        self.requests = []

    def read(self):
        """Takes in what is new. Returns whether there was anything."""
        *lines, self.rest = (self.rest + self.file.read()).split(b"\n")
        for line in lines:
            self.take(json.loads(line))
        return bool(lines)

    def take(self, event):
        at = datetime.datetime.fromisoformat(event["stageTimestamp"]).timestamp()
        user = event["user"]["username"]
        there = event.get("objectRef", {})
        name = there.get("name", "")
        if user == "kwok":
            if event["responseStatus"]["code"] < 300 and there["namespace"] == NAMESPACE:
                if name not in self.running:
                    self.running[name] = at
                elif self.completing:
                    self.ended.setdefault(name, at)
            return
        resource = "/".join(filter(None, [there.get("resource"), there.get("subresource")])) or event["requestURI"].partition("?")[0]
        code = event["responseStatus"]["code"]
        if event["verb"] != "watch":
            self.requests.append((at, self.users[user], event["verb"], resource, name, code))

    def of_jobs(self, begin, end=float("inf")):
        """Requests of a time, without those for Leases."""
        return [request for request in self.requests if begin <= request[0] < end and request[3] != "leases"]

    def counts(self, begin, end=float("inf"), leases=False):
        """Requests of a time by process, verb and resource."""
        found = collections.Counter(
            f"{who} {verb} {resource}" + (f" ({code})" if code >= 300 else "")
            for at, who, verb, resource, _, code in self.requests if begin <= at < end and (leases or resource != "leases"))
        return dict(found.most_common())


def user_of(account):
    """The name of a ServiceAccount in the audit log."""
    return f"system:serviceaccount:{account[0]}:{account[1]}"


def responds(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
        return answer.status == 200


def without(kinds, text):
    """YAML documents of other kinds."""
    documents = ("\n" + text).split("\n---\n")
    return "\n---\n".join(part for part in documents if not any(f"\nkind: {kind}\n" in f"\n{part}\n" for kind in kinds))


class Athanor:
    name = "athanor"
    accounts = {"athanor": ("athanor-system", "athanor-operator")}

    def start(self, plane):
        """Installs CRDs and rights as the chart does and starts the operator. Returns its processes by name."""
        plane.apply(f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {self.accounts['athanor'][0]}}}\n")
        plane.kubectl("apply", "--server-side", "-f", ROOT / "crds/finetunejobs.yaml", "-f", ROOT / "crds/modeldeployments.yaml")
        plane.wait_for_kinds()
        command = [tool("helm") / "helm", "template", "athanor", ROOT / "helm/athanor", "--namespace=athanor-system", "--kube-version=1.34.0"]
        chart = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        plane.apply(without(["Deployment", "PodDisruptionBudget"], chart))
        progress, ops = free_ports(2)
        process = plane.start("athanor-operator", [
            OPERATOR, "--progress-address=http://athanor-operator.athanor-system:9443", f"--progress-port={progress}", f"--ops-port={ops}",
            "--lease-name=athanor-operator",
        ], {"KUBECONFIG": str(plane.account(*self.accounts["athanor"])), "RUST_LOG": "info", "POD_NAMESPACE": "athanor-system", "POD_NAME": "bench"})
        plane.until("Athanor", lambda: responds(ops, "/readyz"))
        return {"athanor": process}


class FineTuneJobs(Athanor):
    """Athanor with training jobs."""
    path = f"/apis/athanor.dev/v1alpha1/namespaces/{NAMESPACE}/finetunejobs"
    status = "finetunejobs/status"
    done = "Succeeded"
    completes = True

    def __init__(self, nodes):
        self.pods = nodes

    def body(self, name):
        return {
            "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name},
            "spec": {
                "model": {"from": "s3://athanor/models/minilm-l6", "task": "TextClassification"},
                "data": {"sources": [{"name": "amazon", "uri": "s3://athanor/data/amazon.csv"}]}, "output": {"to": "s3://athanor/out"},
                "credentialsSecretName": "s3-credentials", "distributed": {"numNodes": self.pods},
            },
        }


class ModelDeployments(Athanor):
    """Athanor with models to serve: a server and two routers each."""
    path = f"/apis/athanor.dev/v1alpha1/namespaces/{NAMESPACE}/modeldeployments"
    status = "modeldeployments/status"
    done = "Ready"
    completes = False
    pods = 3

    def body(self, name):
        return {
            "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": name},
            "spec": {"model": {"from": "s3://athanor/out/artifact"}, "credentialsSecretName": "s3-credentials"},
        }


class TrainJobs:
    """Kubeflow Trainer with JobSet: their manifests and configurations as shipped. What differs: addresses and ports,
    webhooks are called by URL with certificates of ours (no Secret could be mounted), and the processes are no pods.
    """
    name = "kubeflow trainer"
    accounts = {"trainer": ("kubeflow-system", "kubeflow-trainer-controller-manager"), "jobset": ("jobset-system", "jobset-controller-manager")}
    path = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
    status = "trainjobs/status"
    done = "Complete"
    completes = True

    def __init__(self, nodes):
        self.pods = nodes

    def body(self, name):
        return {
            "apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {"name": name},
            "spec": {"runtimeRef": {"name": "torch-distributed"}, "trainer": {"image": "trainer:bench", "command": ["train"], "numNodes": self.pods}},
        }

    def start(self, plane):
        processes = {"jobset": self.start_jobset(plane), "trainer": self.start_trainer(plane)}
        plane.apply((tool("trainer-kubeflow") / "manifests/base/runtimes/torch_distributed.yaml").read_text())
        return processes

    def certificates(self, plane, name):
        """A folder for TMPDIR, in which controllers look for the certificates of webhooks."""
        folder = plane.folder / name / "k8s-webhook-server/serving-certs"
        folder.mkdir(parents=True)
        shutil.copy(plane.pki / "webhook.crt", folder / "tls.crt")
        shutil.copy(plane.pki / "webhook.key", folder / "tls.key")
        return folder

    def install(self, plane, folder, port, kinds):
        """Applies a kustomization without its Deployment. Webhooks are called at a port of this machine."""
        text = plane.kubectl("kustomize", folder)
        plane.apply(without(["Deployment"], text))
        plane.wait_for_kinds()
        authority = base64.b64encode((plane.pki / "ca.crt").read_bytes()).decode()
        for kind, name in kinds.items():
            path = f"/apis/admissionregistration.k8s.io/v1/{kind}/{name}"
            webhooks = plane.api("GET", path)
            for webhook in webhooks["webhooks"]:
                url = f"https://127.0.0.1:{port}{webhook['clientConfig']['service']['path']}"
                webhook["clientConfig"] = {"url": url, "caBundle": authority}
            plane.api("PUT", path, webhooks)

    def start_jobset(self, plane):
        webhook, metrics, health = free_ports(3)
        shipped = tool("jobset")
        names = {f"{kind}webhookconfigurations": f"jobset-{kind}-webhook-configuration" for kind in ("mutating", "validating")}
        self.install(plane, shipped / "config/default", webhook, names)
        certificates = self.certificates(plane, "jobset")
        config = (shipped / "config/components/manager/controller_manager_config.yaml").read_text()
        config = replace_once(config, "leaderElect: true", "leaderElect: true\n  resourceNamespace: jobset-system")
        config = replace_once(config, "enable: true", "enable: false")
        config = f"{config.rstrip()}\n" + "\n".join([
            f"webhook: {{host: 127.0.0.1, port: {webhook}, certDir: {certificates}}}",
            f"metrics: {{bindAddress: '127.0.0.1:{metrics}', certDir: {certificates}}}",
            f"health: {{healthProbeBindAddress: '127.0.0.1:{health}'}}",
        ]) + "\n"
        file = plane.folder / "jobset.yaml"
        file.write_text(config)
        process = plane.start(
            "jobset", [shipped / "jobset", f"--config={file}", "--zap-log-level=2"], {"KUBECONFIG": str(plane.account(*self.accounts["jobset"]))})
        plane.until("JobSet", lambda: responds(health, "/readyz"))
        return process

    def start_trainer(self, plane):
        webhook, metrics, health = free_ports(3)
        shipped = tool("trainer-kubeflow")
        # The overlay of the manager, without JobSet, which it fetches from the network.
        folder = plane.folder / "trainer-manifests"
        shutil.copytree(shipped / "manifests", folder)
        overlay = folder / "overlays/manager/kustomization.yaml"
        text = overlay.read_text()
        overlay.write_text("\n".join(line for line in text.splitlines() if "third-party/jobset" not in line) + "\n")
        names = {"mutatingwebhookconfigurations": "defaulter.trainer.kubeflow.org", "validatingwebhookconfigurations": "validator.trainer.kubeflow.org"}
        self.install(plane, overlay.parent, webhook, names)
        config = (shipped / "manifests/base/manager/controller_manager_config.yaml").read_text()
        for old, new in (
            ("healthProbeBindAddress: :8081", f"healthProbeBindAddress: 127.0.0.1:{health}"),
            ("bindAddress: :8443", f"bindAddress: 127.0.0.1:{metrics}"), ("port: 9443", f"port: {webhook}"), ('host: ""', "host: 127.0.0.1"),
            ('resourceNamespace: ""', "resourceNamespace: kubeflow-system"), ("enable: true", "enable: false"),
        ):
            config = replace_once(config, old, new)
        file = plane.folder / "trainer.yaml"
        file.write_text(config)
        self.certificates(plane, "trainer")
        process = plane.start("trainer", [shipped / "trainer-controller-manager", f"--config={file}", "--zap-log-level=2"], {
            "KUBECONFIG": str(plane.account(*self.accounts["trainer"])), "TMPDIR": str(plane.folder / "trainer")})
        plane.until("Kubeflow Trainer", lambda: responds(health, "/readyz"))
        return process


def note(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def percentiles(values):
    values = sorted(values)
    return {"p50": round(statistics.median(values), 3), "p99": round(values[min(len(values) - 1, int(len(values) * 0.99))], 3)}


def wait_for(plane, log, what, condition):
    """Reads the audit log until the condition holds. Returns nothing; ends the benchmark when nothing happens for long."""
    moved = shown = time.monotonic()
    while True:
        if log.read():
            moved = time.monotonic()
        if condition():
            return
        plane.check()
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            note(f"  {what}: {len(log.running)} pods have run, {len(log.ended)} have ended, {len(log.requests)} requests")
        if time.monotonic() - moved > STUCK_SECONDS:
            raise SystemExit(f"{what}: nothing has happened for {STUCK_SECONDS} s")
        time.sleep(0.5)


def is_done(item, condition):
    return any(one["type"] == condition and one["status"] == "True" for one in item.get("status", {}).get("conditions", []))


def finished(plane, system, count):
    """Whether the operator reports all objects as done."""
    items = plane.api("GET", system.path)["items"]
    done = sum(is_done(item, system.done) for item in items)
    if done < count:
        missing = [item["metadata"]["name"] for item in items if not is_done(item, system.done)]
        note(f"  {done} of {count} are reported as {system.done}, not {', '.join(missing[:3])}")
    return done == count


def measure(system, count):
    """Runs one system on a control plane of its own."""
    note(f"{system.name}: {count} of {system.path.rpartition('/')[2]}, {system.pods} pods each")
    users = {user_of(account): name for name, account in system.accounts.items()}
    with ControlPlane(list(users)) as plane:
        processes = system.start(plane)
        cpu = lambda: {name: cpu_seconds(process.pid) for name, process in processes.items()}
        log = AuditLog(plane.audit, users)
        time.sleep(3)
        before = cpu()
        log.read()
        began = time.time()
        names = [f"job-{number:05}" for number in range(count)]
        sent = plane.api.create_all(system.path, [system.body(name) for name in names])
        created = time.time()
        note(f"  created in {created - began:.1f} s")
        wait_for(plane, log, "pods run", lambda: len(log.running) >= count * system.pods)
        running = {name: max(times) for name, times in group(log.running).items()}
        last = max(running.values())
        result = {
            "system": system.name, "kind": system.path.rpartition("/")[2], "objects": count, "podsOfEach": system.pods,
            "secondsToCreate": round(created - began, 2), "secondsToRun": round(last - began, 2), "perSecond": round(count / (last - began), 3),
            "creationToRunning": percentiles([running[name] - sent[name] for name in names]), "cpuSecondsToRun": spent(before, cpu()),
            "requestsToRun": round(len(log.of_jobs(began, last)) / count, 2),
        }
        note(f"  all pods run after {last - began:.1f} s")
        settle(plane, log)
        if system.completes:
            log.completing = True
            plane.play(complete=True, message=json.dumps(RESULT))
            wait_for(plane, log, "pods end", lambda: len(log.ended) >= count * system.pods)
            settle(plane, log)
        plane.until("all are done", lambda: finished(plane, system, count), seconds=600, pause=5)
        settle(plane, log)
        reported = {}
        for at, _, verb, resource, name, code in log.requests:
            if resource == system.status and verb in WRITES and code < 300:
                reported[name] = at
        if system.completes:
            result["secondsToFinish"] = round(max(reported.values()) - min(log.ended.values()), 2)
            ended = {name: max(times) for name, times in group(log.ended).items()}
            result["endToReport"] = percentiles([reported[name] - ended[name] for name in names])
        result["requests"] = round(len(log.of_jobs(began)) / count, 2)
        result["requestsOfAll"] = log.counts(began)
        result["cpuSeconds"] = spent(before, cpu())
        result["peakMemoryMiB"] = {name: round(peak_memory(process.pid) / 2**20, 1) for name, process in processes.items()}
        note(f"  idle for {IDLE_SECONDS} s")
        idle, busy = time.time(), cpu()
        time.sleep(IDLE_SECONDS)
        log.read()
        requests = log.counts(idle, leases=True)
        result["idle"] = {
            "seconds": IDLE_SECONDS, "requests": requests, "cpuSeconds": spent(busy, cpu()),
            "writesButLeases": sum(number for what, number in requests.items() if what.split()[1] in WRITES and what.split()[2] != "leases"),
        }
    return result


def group(times):
    """Times of pods by the object that they belong to."""
    found = collections.defaultdict(list)
    for pod, at in times.items():
        found[pod[:len("job-00000")]].append(at)
    return found


def settle(plane, log):
    """Waits until the operators have written nothing for a while."""
    def quiet():
        writes = [at for at, _, verb, resource, *_ in reversed(log.requests[-2000:]) if verb in WRITES and resource != "leases"]
        return time.time() - max(writes, default=0) >= SETTLED_SECONDS

    wait_for(plane, log, "settling", quiet)


def spent(before, after):
    return {name: round(after[name] - before[name], 2) for name in after}


def processor():
    text = pathlib.Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "unknown")
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def total(values):
    return sum(values.values())


# Name, unit, value of a result, target for ours divided by the peer's, whether more is better.
ROWS = [
    ("objects per second until all pods run", lambda r: r["perSecond"], 2, True),
    ("seconds until all pods run", lambda r: r["secondsToRun"], None, False),
    ("creation to running, p50 s", lambda r: r["creationToRunning"]["p50"], None, False),
    ("creation to running, p99 s", lambda r: r["creationToRunning"]["p99"], None, False),
    ("seconds from the first end to the last report", lambda r: r.get("secondsToFinish"), None, False),
    ("peak memory, MiB", lambda r: total(r["peakMemoryMiB"]), 0.15, False),
    ("CPU seconds", lambda r: total(r["cpuSeconds"]), 0.25, False),
    ("API requests per object", lambda r: r["requests"], 0.6, False),
    ("of them until all pods run", lambda r: r["requestsToRun"], None, False),
    ("writes in 30 idle seconds, Leases apart", lambda r: r["idle"]["writesButLeases"], None, False),
]


def show(results):
    """Prints the tables."""
    titles = [f"{r['system']}: {r['objects']} {r['kind']}, {r['podsOfEach']} pods each" for r in results]
    peer = next((r for r in results if r["system"] != "athanor"), None)
    ours = next((r for r in results if r["system"] == "athanor" and peer and (r["objects"], r["podsOfEach"]) == (peer["objects"], peer["podsOfEach"])), None)
    print(f"| | {' | '.join(titles)} | ratio | target |")
    print(f"|---|{'---|' * len(results)}---|---|")
    for name, value, target, more in ROWS:
        values = [value(r) for r in results]
        ratio = value(ours) / value(peer) if ours and value(ours) is not None and value(peer) else None
        shown = ["" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values]
        aim = "" if target is None else f"{'>=' if more else '<='} {target}"
        print(f"| {name} | {' | '.join(shown)} | {'' if ratio is None else f'{ratio:.2f}'} | {aim} |")
    for title, r in zip(titles, results):
        print(f"\nrequests per object, {title}:\n")
        for what, number in r["requestsOfAll"].items():
            print(f"- {what}: {number / r['objects']:.3f}")
        print(f"- in {r['idle']['seconds']} idle seconds: {r['idle']['requests']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000, help="jobs of four nodes on each side (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="20 jobs a side, 40 of one node, 10 deployments; results are not kept")
    parser.add_argument("--only", choices=["athanor", "peer", "single", "deployments"], action="append", help="these parts; results are not kept")
    options = parser.parse_args()
    jobs, single, deployments = (20, 40, 10) if options.small else (options.jobs, 5 * options.jobs, options.jobs // 2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    parts = {
        "athanor": (FineTuneJobs(4), jobs), "peer": (TrainJobs(4), jobs), "single": (FineTuneJobs(1), single),
        "deployments": (ModelDeployments(), deployments),
    }
    result = {"processor": processor(), "loadBefore": os.getloadavg()[0], "results": []}
    for name, (system, count) in parts.items():
        if options.only is None or name in options.only:
            result["results"].append(measure(system, count))
    print(f"{result['processor']}\n")
    show(result["results"])
    if not options.small and not options.only and options.jobs == 1000:
        (ROOT / "bench/results/operator.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
