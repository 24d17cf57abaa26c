# shellcheck shell=bash disable=SC2034
# What the local cluster is made of, and its fixed addresses. The versions of what is built from Go and Maven are in
# tools.d/*/go.mod and tools.d/kafka/pom.xml: this file repeats none of them.

KUBERNETES_PROGRAMS=(kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy)
TOOLS=(etcd "${KUBERNETES_PROGRAMS[@]}" coredns helm versitygw pause kafka)

APT_PACKAGES=(
  # the node
  containerd runc containernetworking-plugins iptables conntrack ethtool socat
  # images without an engine or a registry
  buildah mmdebstrap busybox-static
  # metrics, and promtool; what tests and the cluster's own checks call
  prometheus kcat jq unzip curl
  # headers for the Rust workspace: rdkafka, c10d's Gloo, protobuf
  libcurl4-openssl-dev zlib1g-dev libzstd-dev libgloo-dev protobuf-compiler
)

# An address on a bridge link of our own, the same for pods and for the host. It is of TEST-NET-2, which nobody routes;
# not of TEST-NET-1 (192.0.2.0/24): some sandboxes have their gateway there, and whoever takes its address is cut off.
NODE_NAME=athanor
NODE_LINK=athanor0
NODE_IP=${ATHANOR_NODE_IP:-198.51.100.1}
API_SERVER=https://$NODE_IP:6443
SERVICE_CIDR=10.96.0.0/16
KUBERNETES_SERVICE_IP=10.96.0.1
DNS_SERVICE_IP=10.96.0.10
POD_CIDR=10.244.0.0/16
NODE_POD_CIDR=10.244.0.0/24
ETCD_URL=http://127.0.0.1:23790

KAFKA_PORT=9092
# The same broker over TLS, for clients with this name and password.
KAFKA_SECURE_PORT=9094
KAFKA_USER=athanor
KAFKA_PASSWORD=athanor-secret
S3_PORT=7070
PROMETHEUS_PORT=9090
S3_ACCESS_KEY=athanor
S3_SECRET_KEY=athanor-secret
S3_REGION=us-east-1

PAUSE_IMAGE=athanor.local/pause:1
