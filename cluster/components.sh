# shellcheck shell=bash
# How each component is started. Every flag that is not plain wiring says why it is there.

locate_tools() {
  ETCD=$(need_tool etcd)/etcd
  APISERVER=$(need_tool kube-apiserver)/kube-apiserver
  CONTROLLER_MANAGER=$(need_tool kube-controller-manager)/kube-controller-manager
  SCHEDULER=$(need_tool kube-scheduler)/kube-scheduler
  KUBELET=$(need_tool kubelet)/kubelet
  PROXY=$(need_tool kube-proxy)/kube-proxy
  COREDNS=$(need_tool coredns)/coredns
  if with s3; then VERSITYGW=$(need_tool versitygw)/versitygw; fi
  if with kafka; then KAFKA_LIBS=$(need_tool kafka)/libs; fi
  PAUSE_TAR=$(need_tool pause)/pause.tar
  local command
  for command in containerd runc iptables kubectl openssl jq curl $(if with prometheus; then echo prometheus; fi); do
    command -v "$command" >/dev/null || die "$command is not installed: run cluster/tools"
  done
}

# ---- the machine --------------------------------------------------------------------------------------------------

# The kubelet puts its device plugins there, whatever its root. Remembered where it was not there, to remove it then.
make_folders() {
  mkdir -p "$LOGS" "$RUN" "$STATE"/{containerd,kubelet,pod-logs,volume-plugins,s3,prometheus}
  [ -e /var/lib/kubelet ] || touch "$STATE/made-var-lib-kubelet"
}

make_cgroups() {
  local root file
  for root in $(cgroup_roots); do
    mkdir -p "$root/$CGROUP"
    # A new folder of the v1 cpuset hierarchy holds no cores, and no process may enter it before it does.
    for file in cpuset.cpus cpuset.mems; do
      [ ! -f "$root/$CGROUP/$file" ] || [ -f "$root/cgroup.controllers" ] || cat "$root/$file" >"$root/$CGROUP/$file"
    done
  done
  mkdir -p "$(daemon_cgroup)"
}

# The address of a neighbour, of the gateway above all, would cut this machine off from it.
check_address() {
  local route
  if ip link show "$NODE_LINK" >/dev/null 2>&1; then return; fi
  if ip -4 -o address show | grep -qF " $NODE_IP/"; then die "$NODE_IP is in use here: set ATHANOR_NODE_IP to another address"; fi
  route=$(ip -4 route get "$NODE_IP" 2>/dev/null || true)
  if [ -n "$route" ] && [[ $route != *" via "* ]]; then
    die "$NODE_IP is in a network of this machine (${route%%$'\n'*}): set ATHANOR_NODE_IP to another address"
  fi
}

# While a Service has no endpoint, kube-proxy may have no rule for its address: it must not be asked of the world outside,
# where a gateway may answer. What kube-proxy has translated no longer has such an address here.
keep_services_inside() {
  iptables -N CNI-ATHANOR-INSIDE 2>/dev/null || return 0 # from an earlier start
  iptables -A CNI-ATHANOR-INSIDE -p tcp -j REJECT --reject-with tcp-reset
  iptables -A CNI-ATHANOR-INSIDE -j REJECT
  iptables -A OUTPUT -d "$SERVICE_CIDR" -j CNI-ATHANOR-INSIDE
  iptables -A FORWARD -d "$SERVICE_CIDR" -j CNI-ATHANOR-INSIDE
}

make_network() {
  check_address
  # Not every kernel has the `dummy` type; a bridge without ports serves as well.
  ip link show "$NODE_LINK" >/dev/null 2>&1 || ip link add "$NODE_LINK" type bridge
  ip address replace "$NODE_IP/32" dev "$NODE_LINK"
  ip link set "$NODE_LINK" up
  sysctl -qw net.ipv4.ip_forward=1
}

# ---- the control plane --------------------------------------------------------------------------------------------

start_etcd() {
  # No fsync: a cluster for tests may lose its last second with the machine, and is some ten times faster to change.
  start etcd "$ETCD" --data-dir="$STATE/etcd" --unsafe-no-fsync \
    --listen-client-urls="$ETCD_URL" --advertise-client-urls="$ETCD_URL" --listen-peer-urls=http://127.0.0.1:23800
}

start_apiserver() {
  # lease: the default reconciler keeps the address of an earlier run. InternalIP: the node's name is in no DNS.
  start kube-apiserver "$APISERVER" --etcd-servers="$ETCD_URL" \
    --bind-address=0.0.0.0 --advertise-address="$NODE_IP" --secure-port=6443 \
    --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" --client-ca-file="$PKI/ca.crt" \
    --kubelet-client-certificate="$PKI/admin.crt" --kubelet-client-key="$PKI/admin.key" \
    --kubelet-certificate-authority="$PKI/ca.crt" --kubelet-preferred-address-types=InternalIP \
    --service-account-issuer=https://kubernetes.default.svc \
    --service-account-key-file="$PKI/sa.pub" --service-account-signing-key-file="$PKI/sa.key" \
    --requestheader-client-ca-file="$PKI/front-proxy-ca.crt" --requestheader-allowed-names=front-proxy-client \
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
    --requestheader-extra-headers-prefix=X-Remote-Extra- \
    --proxy-client-cert-file="$PKI/front-proxy.crt" --proxy-client-key-file="$PKI/front-proxy.key" \
    --service-cluster-ip-range="$SERVICE_CIDR" --authorization-mode=Node,RBAC \
    --enable-admission-plugins=NodeRestriction --allow-privileged=true --endpoint-reconciler-type=lease
}

start_controller_manager() {
  local config=$STATE/kube-controller-manager.kubeconfig
  # No leader election: it would only delay the first of one.
  start kube-controller-manager "$CONTROLLER_MANAGER" --bind-address=127.0.0.1 --kubeconfig="$config" \
    --authentication-kubeconfig="$config" --authorization-kubeconfig="$config" --leader-elect=false \
    --service-account-private-key-file="$PKI/sa.key" --use-service-account-credentials --root-ca-file="$PKI/ca.crt" \
    --cluster-signing-cert-file="$PKI/ca.crt" --cluster-signing-key-file="$PKI/ca.key"
}

start_scheduler() {
  local config=$STATE/kube-scheduler.kubeconfig
  start kube-scheduler "$SCHEDULER" --bind-address=127.0.0.1 --kubeconfig="$config" \
    --authentication-kubeconfig="$config" --authorization-kubeconfig="$config" --leader-elect=false
}

# ---- the node -----------------------------------------------------------------------------------------------------

start_containerd() {
  start containerd containerd --config "$STATE/config/containerd.toml"
}

import_pause_image() {
  [ -n "$(ctr_k8s images list -q "name==$PAUSE_IMAGE")" ] || ctr_k8s images import "$PAUSE_TAR" >/dev/null
}

start_kubelet() {
  start kubelet "$KUBELET" --config="$STATE/config/kubelet.yaml" --kubeconfig="$STATE/kubelet.kubeconfig" \
    --hostname-override="$NODE_NAME" --node-ip="$NODE_IP" --root-dir="$STATE/kubelet" --cert-dir="$STATE/kubelet-pki"
}

start_proxy() {
  # 0: the connection-tracking limits belong to the whole machine. A short sync period: a test waits for each Service.
  start kube-proxy "$PROXY" --kubeconfig="$STATE/kube-proxy.kubeconfig" --hostname-override="$NODE_NAME" \
    --proxy-mode=iptables --cluster-cidr="$POD_CIDR" --iptables-min-sync-period=200ms --conntrack-max-per-core=0 \
    --conntrack-tcp-timeout-established=0s --conntrack-tcp-timeout-close-wait=0s
}

# On the host at the node's address: it then needs no image, and no pod network before the network is there.
start_coredns() {
  start coredns "$COREDNS" -conf "$STATE/config/Corefile"
}

# ---- what surrounds the cluster -----------------------------------------------------------------------------------

start_kafka() {
  local java=(java -cp "$KAFKA_LIBS/*" -Dlog4j2.configurationFile="$STATE/config/log4j2.properties"
    -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Xmx512m -Xshare:auto)
  [ -f "$STATE/kafka/meta.properties" ] \
    || "${java[@]}" kafka.tools.StorageTool format -t athanor-local-cluster0 -c "$STATE/config/kafka.properties" \
      >>"$LOGS/kafka.log" 2>&1
  start kafka "${java[@]}" kafka.Kafka "$STATE/config/kafka.properties"
}

start_s3() {
  ROOT_ACCESS_KEY=$S3_ACCESS_KEY ROOT_SECRET_KEY=$S3_SECRET_KEY \
    start s3 "$VERSITYGW" --region "$S3_REGION" --port "$NODE_IP:$S3_PORT" posix "$STATE/s3"
}

start_prometheus() {
  start scrape-targets "$CLUSTER_DIR/scrape-targets"
  start prometheus prometheus --config.file="$STATE/config/prometheus.yaml" --storage.tsdb.path="$STATE/prometheus" \
    --storage.tsdb.retention.time=6h --web.listen-address="$NODE_IP:$PROMETHEUS_PORT" --web.enable-lifecycle
}

# ---- in the cluster -----------------------------------------------------------------------------------------------

# What runs on the host gets names inside: Services without a selector, and the address by hand.
infra_objects() {
  cat <<YAML
apiVersion: v1
kind: Namespace
metadata: {name: infra}
YAML
  host_service infra kafka "" "{name: kafka, port: $KAFKA_PORT, protocol: TCP}, {name: secure, port: $KAFKA_SECURE_PORT, protocol: TCP}"
  host_service infra s3 "" "{name: http, port: $S3_PORT, protocol: TCP}"
  host_service infra prometheus "" "{name: http, port: $PROMETHEUS_PORT, protocol: TCP}"
  host_service kube-system kube-dns "clusterIP: $DNS_SERVICE_IP" \
    "{name: dns, port: 53, protocol: UDP}" "{name: dns-tcp, port: 53, protocol: TCP}"
}

host_service() { # NAMESPACE NAME SPEC_LINE PORT...
  local namespace=$1 name=$2 spec=$3 ports
  shift 3
  ports=$(printf '%s, ' "$@")
  cat <<YAML
---
apiVersion: v1
kind: Service
metadata: {namespace: $namespace, name: $name}
spec:
  ports: [${ports%, }]
  $spec
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  namespace: $namespace
  name: $name-host
  labels: {kubernetes.io/service-name: $name, endpointslice.kubernetes.io/managed-by: athanor-cluster}
addressType: IPv4
ports: [${ports%, }]
endpoints:
  - addresses: [$NODE_IP]
    conditions: {ready: true}
YAML
}
