"""A Kubernetes control plane of its own on loopback for benchmarks: etcd, API server, controller manager, scheduler, and
kwok, which plays the nodes. Its data lie in a temporary folder; everything ends with the `with` block.
"""
import concurrent.futures, contextlib, ctypes, http.client, json, os, pathlib, shutil, signal, socket, ssl, subprocess, tempfile, threading, time

ROOT = pathlib.Path(__file__).parent.parent
NAMESPACE = "bench"
# Rates of the clients of controller manager and scheduler: their defaults (20 and 50 a second) would be what is measured.
QPS = ["--kube-api-qps=5000", "--kube-api-burst=5000"]
NODES, PODS_OF_NODE = 100, 200
TICKS = os.sysconf("SC_CLK_TCK")
# The benchmark's range (RFC 2544), which nobody routes.
POD_CIDR = "198.18.0.1/15"


def tool(name):
    """Folder of a tool that cluster/tools built."""
    path = subprocess.run([ROOT / "cluster/tools", "--path", name], check=True, capture_output=True, text=True).stdout.strip()
    if not pathlib.Path(path).is_dir():
        raise SystemExit(f"{name} is not built: run cluster/tools --only {name}")
    return pathlib.Path(path)


def free_ports(count):
    """Ports that were free a moment ago. Bound together, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def cpu_seconds(pid):
    """CPU time of a process, user and system."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def peak_memory(pid):
    """Largest resident set of a process in bytes, pages of its binary included."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


class Refused(Exception):
    """An answer of the API server with a status of 300 or more."""


class Api:
    """JSON over one connection for each thread, with the administrator's certificate."""

    def __init__(self, port, pki):
        self.port = port
        self.tls = ssl.create_default_context(cafile=pki / "ca.crt")
        self.tls.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self.local = threading.local()

    def __call__(self, method, path, body=None):
        text = None if body is None else json.dumps(body)
        while True:
            connection = getattr(self.local, "connection", None)
            is_fresh = connection is None
            if is_fresh:
                connection = self.local.connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=self.tls, timeout=60)
            try:
                connection.request(method, path, text, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                text = answer.read()
                break
            except (OSError, http.client.HTTPException):
                self.local.connection = None
                # The server closes a connection that was idle for long.
                if is_fresh:
                    raise
        if answer.status >= 300:
            raise Refused(f"{method} {path}: {answer.status} {text.decode(errors='replace')[:1000]}")
        return json.loads(text) if text.startswith(b"{") else text.decode()

    def create_all(self, path, objects, threads=16):
        """Creates objects as fast as the server takes them. Returns the time at which each was sent, by name."""
        def create(body):
            sent = time.time()
            self("POST", path, body)
            return body["metadata"]["name"], sent

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            return dict(pool.map(create, objects))


class ControlPlane:
    """The processes. `users` are the accounts whose requests the audit log records, next to kwok's changes of pods."""

    def __init__(self, users):
        self.users = users
        self.processes = []

    def __enter__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="athanor-bench-"))
        try:
            self.begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for _, process in reversed(self.processes):
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, name, command, env=None):
        """Starts a process, its output in a log of the folder."""
        with open(self.folder / f"{name}.log", "a") as log:
            # A session of its own: Ctrl-C reaches this program first, which ends them in order.
            process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                env=dict(os.environ, **(env or {})), start_new_session=True, preexec_fn=die_with_parent,
            )
        self.processes.append((name, process))
        return process

    def stop(self, process):
        self.processes = [entry for entry in self.processes if entry[1] is not process]
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def check(self):
        """Ends the benchmark if a process has ended."""
        for name, process in self.processes:
            if process.poll() is not None:
                tail = (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]
                raise SystemExit(f"{tail}\n{name} ended with {process.returncode}")

    def until(self, what, condition, seconds=120, pause=0.2):
        end = time.monotonic() + seconds
        last = None
        while time.monotonic() < end:
            self.check()
            try:
                if condition():
                    return
            except (OSError, http.client.HTTPException, Refused, subprocess.CalledProcessError) as error:
                last = error
            time.sleep(pause)
        raise SystemExit(f"{what}: not within {seconds} s ({last})")

    def kubectl(self, *arguments, text=None):
        command = ["kubectl", f"--kubeconfig={self.folder}/admin.kubeconfig", *map(str, arguments)]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def apply(self, text):
        """Applies YAML."""
        self.kubectl("apply", "--server-side", "-f", "-", text=text)

    def wait_for_kinds(self):
        """Waits until the API server serves all custom resources, also to those who ask what there is."""
        self.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
        crds = self.api("GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions")["items"]

        def served():
            for crd in crds:
                version = f"{crd['spec']['group']}/{crd['spec']['versions'][0]['name']}"
                resources = {resource["name"] for resource in self.api("GET", f"/apis/{version}")["resources"]}
                if crd["spec"]["names"]["plural"] not in resources:
                    return False
            return True

        self.until("the custom resources", served)

    def begin(self):
        etcd_port, peer_port, api_port, manager_port, scheduler_port = free_ports(5)
        pki = self.folder / "pki"
        pki.mkdir()
        self.pki = pki
        # The functions that make the local cluster's certificates.
        script = """
            set -euo pipefail
            source "$ROOT/cluster/pki.sh"
            PKI=$STATE/pki
            authority ca bench-ca
            private_key "$PKI/sa.key"
            openssl pkey -in "$PKI/sa.key" -pubout -out "$PKI/sa.pub"
            certificate ca apiserver kube-apiserver "" "IP:127.0.0.1,DNS:localhost"
            certificate ca webhook webhook "" "IP:127.0.0.1"
            certificate ca admin bench system:masters
            certificate ca kwok kwok system:masters
            certificate ca kube-controller-manager system:kube-controller-manager
            certificate ca kube-scheduler system:kube-scheduler
            for name in admin kwok kube-controller-manager kube-scheduler; do kubeconfig "$name"; done
        """
        self.address = f"https://127.0.0.1:{api_port}"
        env = dict(os.environ, ROOT=str(ROOT), STATE=str(self.folder), API_SERVER=self.address)
        subprocess.run(["bash", "-c", script], check=True, env=env, stderr=subprocess.PIPE)
        etcd = f"http://127.0.0.1:{etcd_port}"
        peer = f"http://127.0.0.1:{peer_port}"
        self.start("etcd", [
            tool("etcd") / "etcd", f"--data-dir={self.folder}/etcd", "--unsafe-no-fsync", "--log-level=error",
            f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}", f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
        ])
        self.audit = self.folder / "audit.log"
        (self.folder / "audit.json").write_text(json.dumps({
            "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived", "ResponseStarted"],
            "rules": [
                {"level": "Metadata", "users": self.users},
                {"level": "Metadata", "users": ["kwok"], "verbs": ["patch"], "resources": [{"group": "", "resources": ["pods/status"]}]},
                {"level": "None"},
            ],
        }))
        self.start("kube-apiserver", [
            tool("kube-apiserver") / "kube-apiserver", f"--etcd-servers={etcd}", "--bind-address=127.0.0.1",
            f"--secure-port={api_port}", f"--tls-cert-file={pki}/apiserver.crt", f"--tls-private-key-file={pki}/apiserver.key",
            f"--client-ca-file={pki}/ca.crt", "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={pki}/sa.pub", f"--service-account-signing-key-file={pki}/sa.key",
            "--service-cluster-ip-range=10.96.0.0/16", "--authorization-mode=RBAC", "--endpoint-reconciler-type=none",
            f"--audit-policy-file={self.folder}/audit.json", f"--audit-log-path={self.audit}", "--audit-log-maxsize=100000",
        ])
        self.api = Api(api_port, pki)
        self.until("the API server", lambda: self.api("GET", "/readyz") == "ok")
        for name, port in (("kube-controller-manager", manager_port), ("kube-scheduler", scheduler_port)):
            config = self.folder / f"{name}.kubeconfig"
            more = []
            if name == "kube-controller-manager":
                more = [
                    f"--service-account-private-key-file={pki}/sa.key", "--use-service-account-credentials",
                    f"--root-ca-file={pki}/ca.crt", f"--cluster-signing-cert-file={pki}/ca.crt", f"--cluster-signing-key-file={pki}/ca.key",
                ]
            self.start(name, [
                tool(name) / name, "--bind-address=127.0.0.1", f"--secure-port={port}", f"--kubeconfig={config}",
                f"--authentication-kubeconfig={config}", f"--authorization-kubeconfig={config}", "--leader-elect=false", *QPS, *more,
            ])
        self.kwok = None
        self.play(complete=False)
        self.until("the default namespace", lambda: self.api("GET", "/api/v1/namespaces/default"))
        self.api.create_all("/api/v1/nodes", [{
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": f"node-{number}", "labels": {"kubernetes.io/hostname": f"node-{number}"}},
            "status": {"allocatable": size, "capacity": size},
        } for size in [{"cpu": "256", "memory": "2Ti", "pods": str(PODS_OF_NODE)}] for number in range(NODES)])
        self.api("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        self.until("the namespace", lambda: self.api("GET", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/default"))
        self.until("the nodes", self.nodes_are_ready)

    def nodes_are_ready(self):
        nodes = self.api("GET", "/api/v1/nodes")["items"]
        return all(not node["spec"].get("taints") for node in nodes) and len(nodes) == NODES

    def play(self, complete, message=""):
        """Starts kwok, or starts it again, with kwok's stages: nodes are ready, pods run once they are scheduled and go when
        they are deleted. `complete`: pods of Jobs then end with code 0 and with the termination message.
        """
        if self.kwok is not None:
            self.stop(self.kwok)
            # The next one has another identity and would wait until these expire.
            self.api("DELETE", "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases")
        shipped = tool("kwok") / "kustomize/stage"
        stages = ["node/fast/node-initialize", "node/heartbeat-with-lease/node-heartbeat-with-lease", "pod/fast/pod-ready", "pod/fast/pod-delete"]
        texts = [(shipped / f"{stage}.yaml").read_text() for stage in stages]
        if complete:
            text = (shipped / "pod/fast/pod-complete.yaml").read_text()
            texts.append(replace_once(text, "            reason: Completed\n", f"            reason: Completed\n            message: '{message}'\n"))
        options = {"podPlayStageParallelism": 16, "cidr": POD_CIDR, "manageAllNodes": True, "nodeLeaseDurationSeconds": 40}
        config = {"apiVersion": "config.kwok.x-k8s.io/v1alpha1", "kind": "KwokConfiguration", "options": options}
        file = self.folder / "kwok.yaml"
        file.write_text("\n---\n".join([json.dumps(config), *texts]))
        [port] = free_ports(1)
        self.kwok = self.start("kwok", [
            tool("kwok") / "kwok", f"--kubeconfig={self.folder}/kwok.kubeconfig", f"--config={file}", "--manage-all-nodes",
            f"--server-address=127.0.0.1:{port}",
        ])

    def account(self, namespace, name):
        """A kubeconfig with the token of a ServiceAccount. Returns its path."""
        token = self.kubectl("create", "token", name, "-n", namespace, "--duration=12h").strip()
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "bench",
            "clusters": [{"name": "bench", "cluster": {"server": self.address, "certificate-authority": f"{self.pki}/ca.crt"}}],
            "users": [{"name": "bench", "user": {"token": token}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        }))
        return path


def replace_once(text, old, new):
    """Replaces what must be there exactly once."""
    if text.count(old) != 1:
        raise SystemExit(f"{text.count(old)} times in a shipped file: {old!r}")
    return text.replace(old, new)
