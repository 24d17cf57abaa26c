# llama.cpp's server (xllamacpp) for tests of spec.engine.container. `scripts/images llamacpp` stages the context and builds it.
# Context: root/ (Debian's Python and libgomp), python/ (xllamacpp), serve.py.
FROM docker.io/library/debian:bookworm-slim
COPY root/ /
COPY python/ /opt/llamacpp/
COPY serve.py /opt/llamacpp/serve.py
ENV PYTHONPATH=/opt/llamacpp PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["/usr/bin/python3.11", "/opt/llamacpp/serve.py"]
