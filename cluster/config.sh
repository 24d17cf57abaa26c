# shellcheck shell=bash
# The configuration files of the components, written anew at each start.

write_configs() {
  mkdir -p "$STATE/config/cni"
  : >"$STATE/config/resolv.conf" # the host's search domains are no business of pods
  containerd_config >"$STATE/config/containerd.toml"
  cni_config >"$STATE/config/cni/10-athanor.conflist"
  kubelet_config >"$STATE/config/kubelet.yaml"
  coredns_config >"$STATE/config/Corefile"
  kafka_config >"$STATE/config/kafka.properties"
  kafka_log_config >"$STATE/config/log4j2.properties"
  prometheus_config >"$STATE/config/prometheus.yaml"
}

# Sockets, namespaces and runc's state are under the state folder, so that no other containerd is ever touched.
containerd_config() {
  cat <<TOML
version = 2
root = "$STATE/containerd"
state = "$STATE/containerd-state"
[grpc]
  address = "$CONTAINERD_SOCKET"
[plugins."io.containerd.internal.v1.opt"]
  path = "$STATE/containerd-opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$PAUSE_IMAGE"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$STATE/config/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = "$STATE/runc"
        SystemdCgroup = false
TOML
}

# `ptp` and not `bridge`: without the kernel's br_netfilter, traffic across a bridge would miss the rules of Services.
cni_config() {
  cat <<JSON
{
  "cniVersion": "1.0.0",
  "name": "athanor",
  "plugins": [
    {
      "type": "ptp",
      "ipMasq": true,
      "ipam": {
        "type": "host-local",
        "dataDir": "$STATE/cni-addresses",
        "ranges": [[{"subnet": "$NODE_POD_CIDR"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
JSON
}

kubelet_config() {
  cat <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: $PKI/ca.crt}
authorization: {mode: Webhook}
tlsCertFile: $PKI/kubelet.crt
tlsPrivateKeyFile: $PKI/kubelet.key
address: 0.0.0.0
containerRuntimeEndpoint: unix://$CONTAINERD_SOCKET
cgroupDriver: cgroupfs
cgroupRoot: /$CGROUP
failCgroupV1: false
failSwapOn: false
localStorageCapacityIsolation: false
clusterDNS: [$DNS_SERVICE_IP]
clusterDomain: cluster.local
resolvConf: $STATE/config/resolv.conf
podLogsDir: $STATE/pod-logs
volumePluginDir: $STATE/volume-plugins
maxPods: 110
podsPerCore: 0
serializeImagePulls: false
syncFrequency: 10s
# A development machine's disk is often nearly full; only memory is worth an eviction here, and images are never
# collected, since no registry could give them back.
evictionHard: {memory.available: 100Mi}
imageGCHighThresholdPercent: 100
YAML
}

# No cache and a TTL of one second: a worker asks for its peer's name before the peer has an address.
coredns_config() {
  cat <<COREFILE
.:53 {
  bind $NODE_IP
  errors
  health $NODE_IP:8053
  kubernetes cluster.local in-addr.arpa ip6.arpa {
    kubeconfig $ADMIN_KUBECONFIG athanor
    ttl 1
  }
}
COREFILE
}

kafka_config() {
  cat <<PROPERTIES
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:9093
listeners=PLAINTEXT://$NODE_IP:$KAFKA_PORT,SASL_SSL://$NODE_IP:$KAFKA_SECURE_PORT,CONTROLLER://127.0.0.1:9093
advertised.listeners=PLAINTEXT://$NODE_IP:$KAFKA_PORT,SASL_SSL://$NODE_IP:$KAFKA_SECURE_PORT
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT
listener.name.sasl_ssl.ssl.keystore.type=PEM
listener.name.sasl_ssl.ssl.keystore.location=$PKI/kafka.pem
listener.name.sasl_ssl.sasl.enabled.mechanisms=PLAIN
listener.name.sasl_ssl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_$KAFKA_USER="$KAFKA_PASSWORD";
log.dirs=$STATE/kafka
auto.create.topics.enable=true
num.partitions=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
PROPERTIES
}

kafka_log_config() {
  cat <<PROPERTIES
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %p %c{1} %m%n
rootLogger.level=INFO
rootLogger.appenderRef.out.ref=out
PROPERTIES
}

# Scrapes the pods that ask for it by annotation, every two seconds so that tests need not wait.
prometheus_config() {
  cat <<YAML
global:
  scrape_interval: 2s
  scrape_timeout: 2s
  evaluation_interval: 2s
scrape_configs:
  - job_name: pods
    # The operator names the job and namespace that a metric is about: those labels stay.
    honor_labels: true
    file_sd_configs:
      - files: [$STATE/prometheus-targets.json]
YAML
}
