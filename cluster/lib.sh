# shellcheck shell=bash
# Shared by every script of this folder: where things are, which tool is which folder, and processes that are
# known by id and start time, so that a recycled id is never mistaken for ours.

CLUSTER_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=cluster/versions.sh
source "$CLUSTER_DIR/versions.sh"

CACHE=${ATHANOR_CACHE:-$HOME/.cache/athanor}
STATE=${ATHANOR_CLUSTER:-/var/lib/athanor-cluster}
PKI=$STATE/pki
LOGS=$STATE/logs
RUN=$STATE/run
ADMIN_KUBECONFIG=$STATE/admin.kubeconfig
CONTAINERD_SOCKET=$STATE/containerd.sock
# Every process of the cluster is in a cgroup of this name, pods included: what is in it is ours to end.
CGROUP=athanor-cluster

die() { echo "$(basename "$0"): $*" >&2; exit 1; }
require_root() { [ "$(id -u)" = 0 ] || die "needs root: it makes network links, mounts and cgroups"; }

now_ms() { local t=${EPOCHREALTIME/[.,]/}; echo "${t:0:-3}"; }
STARTED_MS=$(now_ms)
# say COMPONENT TEXT: one line with the seconds since the script began.
say() {
  local ms=$(($(now_ms) - STARTED_MS))
  printf '%-24s %-34s %3d.%d s\n' "$1" "$2" $((ms / 1000)) $((ms % 1000 / 100))
}

# ---- tools --------------------------------------------------------------------------------------------------------

# The folder of tools.d that says what a tool is.
tool_source() {
  case $1 in
    kube*) echo "$CLUSTER_DIR/tools.d/kubernetes" ;;
    *) echo "$CLUSTER_DIR/tools.d/$1" ;;
  esac
}

# Where a tool is, built or not: its name and a hash of all that decides its content.
tool_dir() {
  local source hash
  source=$(tool_source "$1")
  [ -d "$source" ] || die "no such tool: $1"
  hash=$(cd "$source" && find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum)
  echo "$CACHE/tools/$1-${hash:0:12}"
}

# need_tool NAME: the same, or an end with advice where it is not built.
need_tool() {
  local dir
  dir=$(tool_dir "$1")
  [ -d "$dir" ] || die "$1 is not built: run cluster/tools"
  echo "$dir"
}

# ---- locks --------------------------------------------------------------------------------------------------------

# Two runs of up, down or image would undo each other. The lock is outside the state folder, which --purge removes.
lock_cluster() {
  mkdir -p "$(dirname "$STATE")"
  exec {CLUSTER_LOCK}>"$STATE.lock"
  flock -w 300 "$CLUSTER_LOCK" || die "another run holds $STATE.lock"
}

# ---- processes ----------------------------------------------------------------------------------------------------

# The moment a process began, in clock ticks since boot: field 22 of stat, counted after the name, which may hold spaces.
start_time() {
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  # shellcheck disable=SC2086
  set -- ${stat##*) }
  [ "$1" != Z ] && echo "${20}"
}

# pid_of COMPONENT: its process id, if the very process that was recorded still runs.
pid_of() {
  local pid began
  read -r pid began 2>/dev/null <"$RUN/$1.pid" || return 1
  [ "$(start_time "$pid")" = "$began" ] && echo "$pid"
}
alive() { pid_of "$1" >/dev/null; }

# start COMPONENT COMMAND...: in a session and cgroup of its own, its output in a log, unless it already runs.
# The lock is closed in the child: a daemon would hold it for ever.
start() {
  local name=$1 pid
  shift
  if alive "$name"; then return; fi
  (
    join_cgroup
    exec setsid "$@" >>"$LOGS/$name.log" 2>&1 </dev/null {CLUSTER_LOCK}>&-
  ) &
  pid=$!
  echo "$pid $(start_time $pid)" >"$RUN/$name.pid"
}

# stop COMPONENT [SECONDS]: SIGTERM, then SIGKILL where it stays longer than that.
stop() {
  local name=$1 limit=${2:-5} pid i
  if pid=$(pid_of "$name"); then
    kill "$pid" 2>/dev/null || true
    for ((i = 0; i < limit * 20; i++)); do
      alive "$name" || break
      sleep 0.05
    done
    if alive "$name"; then kill -9 "$pid" 2>/dev/null || true; fi
    say "$name" stopped
  fi
  rm -f "$RUN/$name.pid"
}

# wait_for COMPONENT SECONDS COMMAND...: until the command succeeds; gives up at once when the process has ended.
wait_for() {
  local name=$1 end=$((SECONDS + $2))
  shift 2
  until "$@" >/dev/null 2>&1; do
    if ! alive "$name"; then
      tail -n 15 "$LOGS/$name.log" >&2
      die "$name ended; its log: $LOGS/$name.log"
    fi
    if ((SECONDS >= end)); then
      tail -n 15 "$LOGS/$name.log" >&2
      die "$name is not ready in time; its log: $LOGS/$name.log"
    fi
    sleep 0.1
  done
}

# ---- cgroups ------------------------------------------------------------------------------------------------------

# The hierarchies: one on a cgroup v2 machine; on v1 one a controller, and v2 beside them without controllers.
cgroup_roots() {
  awk '$5 ~ "^/sys/fs/cgroup" && / - cgroup2? / { print $5 }' /proc/self/mountinfo | sort -u
}

# The one hierarchy that holds the host's daemons. On v1 `pids` limits nothing that is not asked for.
daemon_cgroup() {
  if [ -f /sys/fs/cgroup/cgroup.controllers ]; then
    echo "/sys/fs/cgroup/$CGROUP/daemons"
  else
    echo "/sys/fs/cgroup/pids/$CGROUP/daemons"
  fi
}
join_cgroup() { echo "$BASHPID" >"$(daemon_cgroup)/cgroup.procs" 2>/dev/null || true; }

# ---- asking -------------------------------------------------------------------------------------------------------

kube() { kubectl --kubeconfig="$ADMIN_KUBECONFIG" "$@"; }
ctr_k8s() { ctr -a "$CONTAINERD_SOCKET" -n k8s.io "$@"; }
# api PATH: a request with the admin's certificate, a tenth of what kubectl costs to start.
api() {
  curl -sf --max-time 5 --cacert "$PKI/ca.crt" --cert "$PKI/admin.crt" --key "$PKI/admin.key" "$API_SERVER$1"
}
# The node says it is ready, and said so since this kubelet began: an object of an earlier run says it too.
node_ready() {
  local since
  since=$(date -u -r "$RUN/kubelet.pid" +%FT%TZ)
  api "/api/v1/nodes/$NODE_NAME" | jq -e --arg since "$since" '.status.conditions[]
    | select(.type == "Ready") | .status == "True" and .lastHeartbeatTime >= $since'
}

# healthy COMPONENT: asks the component itself, not only the process table.
healthy() {
  case $1 in
    etcd) curl -sf --max-time 2 "$ETCD_URL/health" ;;
    kube-apiserver) api /readyz ;;
    kube-controller-manager) curl -skf --max-time 2 https://127.0.0.1:10257/healthz ;;
    kube-scheduler) curl -skf --max-time 2 https://127.0.0.1:10259/healthz ;;
    containerd) ctr_k8s version ;;
    kubelet) curl -sf --max-time 2 http://127.0.0.1:10248/healthz && node_ready ;;
    kube-proxy) curl -sf --max-time 2 http://127.0.0.1:10249/healthz ;;
    coredns) curl -sf --max-time 2 "http://$NODE_IP:8053/health" ;;
    kafka) kcat -b "$NODE_IP:$KAFKA_PORT" -L -m 2 | grep -q 'broker 1 at' ;;
    s3) curl -s --max-time 2 "http://$NODE_IP:$S3_PORT/" ;;
    prometheus) alive scrape-targets && curl -sf --max-time 2 "http://$NODE_IP:$PROMETHEUS_PORT/-/ready" ;;
  esac
}
CORE_COMPONENTS=(etcd kube-apiserver kube-controller-manager kube-scheduler containerd kubelet kube-proxy coredns)
# shellcheck disable=SC2034
EXTRA_COMPONENTS=(kafka s3 prometheus)
any_alive() {
  local name
  for name in "${CORE_COMPONENTS[@]}"; do if alive "$name"; then return 0; fi; done
  return 1
}
