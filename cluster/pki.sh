# shellcheck shell=bash
# The cluster's certificates and kubeconfigs. Made once and kept in the state folder, until a day before they end.

write_pki() {
  local name
  # The server's certificates name the node's address.
  if [ "$(cat "$PKI/done" 2>/dev/null)" = "$NODE_IP" ] && [ -f "$PKI/kafka.pem" ] \
    && openssl x509 -in "$PKI/apiserver.crt" -noout -checkend 86400 >/dev/null; then return; fi
  rm -rf "$PKI"
  (umask 077 && mkdir -p "$PKI")
  authority ca athanor-ca
  authority front-proxy-ca athanor-front-proxy-ca
  # Signs the tokens of service accounts.
  private_key "$PKI/sa.key"
  openssl pkey -in "$PKI/sa.key" -pubout -out "$PKI/sa.pub"

  # The common name is the user and the organisation its group: Kubernetes reads both from a client certificate.
  certificate ca apiserver kube-apiserver "" "IP:127.0.0.1,IP:$KUBERNETES_SERVICE_IP,IP:$NODE_IP,DNS:localhost,\
DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local"
  certificate ca admin admin system:masters
  certificate ca kube-controller-manager system:kube-controller-manager
  certificate ca kube-scheduler system:kube-scheduler
  certificate ca kube-proxy system:kube-proxy
  certificate ca kubelet "system:node:$NODE_NAME" system:nodes "IP:$NODE_IP,IP:127.0.0.1,DNS:$NODE_NAME"
  certificate ca kafka kafka "" "IP:$NODE_IP,DNS:kafka.infra.svc,DNS:kafka.infra.svc.cluster.local"
  (umask 077 && cat "$PKI/kafka.key" "$PKI/kafka.crt" >"$PKI/kafka.pem")
  certificate front-proxy-ca front-proxy front-proxy-client
  for name in admin kube-controller-manager kube-scheduler kube-proxy kubelet; do kubeconfig "$name"; done
  echo "$NODE_IP" >"$PKI/done"
}

# P-256: made in milliseconds, where RSA takes a second or more for all of these.
private_key() { (umask 077 && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"); }

authority() { # NAME COMMON_NAME
  private_key "$PKI/$1.key"
  openssl req -x509 -new -key "$PKI/$1.key" -subj "/CN=$2" -days 3650 -out "$PKI/$1.crt" \
    -addext keyUsage=critical,keyCertSign,cRLSign,digitalSignature
}

certificate() { # AUTHORITY NAME COMMON_NAME [ORGANISATION] [SUBJECT_ALT_NAMES]
  local authority=$1 name=$2 extensions
  extensions="basicConstraints=CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=clientAuth${5:+,serverAuth}
${5:+subjectAltName=$5}"
  private_key "$PKI/$name.key"
  openssl req -new -key "$PKI/$name.key" -subj "/CN=$3${4:+/O=$4}" \
    | openssl x509 -req -CA "$PKI/$authority.crt" -CAkey "$PKI/$authority.key" -CAcreateserial -days 3650 \
      -extfile <(echo "$extensions") -out "$PKI/$name.crt" 2>/dev/null
}

kubeconfig() { # NAME, of which there is a certificate
  (
    umask 077
    cat >"$STATE/$1.kubeconfig" <<YAML
apiVersion: v1
kind: Config
clusters:
  - name: athanor
    cluster:
      server: $API_SERVER
      certificate-authority-data: $(base64 -w0 "$PKI/ca.crt")
users:
  - name: $1
    user:
      client-certificate-data: $(base64 -w0 "$PKI/$1.crt")
      client-key-data: $(base64 -w0 "$PKI/$1.key")
contexts:
  - name: athanor
    context: {cluster: athanor, user: $1}
current-context: athanor
YAML
  )
}
