# athanor-operator: the control plane. It holds no libtorch.
# Context: ca-certificates.crt, lib/ (shared libraries the base lacks; may be empty), bin/athanor-operator. See README.md.
FROM docker.io/library/debian:bookworm-slim
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="athanor-operator" \
      org.opencontainers.image.description="Kubernetes operator that trains, serves and retrains small language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY lib/ /opt/athanor/lib/
COPY --chmod=0755 bin/athanor-operator /usr/local/bin/athanor-operator
ENV LD_LIBRARY_PATH=/opt/athanor/lib
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/athanor-operator"]
