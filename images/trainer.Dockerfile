# athanor-trainer: one process for each rank of a FineTuneJob.
# Context: ca-certificates.crt, lib/ (shared libraries the base lacks; may be empty), libtorch/lib/, bin/athanor-trainer. See README.md.
FROM docker.io/library/debian:bookworm-slim
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="athanor-trainer" \
      org.opencontainers.image.description="Fine-tunes a model, alone or as one rank of many" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
# In a layered build this layer is the same in trainer and server: stored and pulled once.
COPY libtorch/lib/ /opt/libtorch/lib/
COPY lib/ /opt/athanor/lib/
COPY --chmod=0755 bin/athanor-trainer /usr/local/bin/athanor-trainer
# Threads of libgomp that wait must sleep: spinning takes the core from a neighbour on the same node.
# The container toolkit of NVIDIA mounts the driver's libraries for these uses, on nodes that have GPUs.
ENV LD_LIBRARY_PATH=/opt/libtorch/lib:/opt/athanor/lib OMP_WAIT_POLICY=PASSIVE NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/athanor-trainer"]
