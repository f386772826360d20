# A worker with vLLM for NVIDIA GPUs.
#
#     docker build -f deploy/docker/worker.Dockerfile -t metaqore-worker .
#
# vLLM's packages bring CUDA's libraries with them. What the base adds is the compiler that some of vLLM's kernels are
# built with when they are first used (FlashInfer, Triton), which is why it is the large "devel" one.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 metaqore \
    && useradd --uid 10001 --gid 10001 --no-log-init --create-home --shell /usr/sbin/nologin metaqore \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/metaqore /var/lib/metaqore/secrets /var/cache/metaqore
# The packages change rarely and are large, so they are a layer of their own, which setup.cfg and the constraints decide.
# First the gateway's, as pinned; then vLLM's, which asks for exact versions itself, some other than the pinned ones for CPUs.
WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY requirements requirements
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir gateway_app migrations tasks worker_gpu \
    && python3 -m venv /opt/metaqore \
    && /opt/metaqore/bin/pip install --disable-pip-version-check -c requirements/constraints.txt '.[tracing]' \
    && /opt/metaqore/bin/pip install --disable-pip-version-check '.[cuda,tracing]'
COPY gateway_app gateway_app
COPY tasks tasks
COPY worker_gpu worker_gpu
COPY migrations migrations
RUN /opt/metaqore/bin/pip install --disable-pip-version-check --no-cache-dir --no-deps --force-reinstall .
WORKDIR /app
COPY gateway.json celeryconfig.py .flaskenv ./
COPY profiles profiles
ENV PATH=/opt/metaqore/bin:/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/metaqore \
    XDG_CACHE_HOME=/var/cache/metaqore \
    METAQORE_SECRETS__DIRECTORY=/var/lib/metaqore/secrets
USER 10001:10001
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["celery", "-A", "worker_gpu", "worker", "-Q", "gpu"]
