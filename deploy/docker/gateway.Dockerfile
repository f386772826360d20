# The gateway, the housekeeper, Flower, the release step, and a worker of the simulated engine: all but vLLM.
#
#     docker build -f deploy/docker/gateway.Dockerfile -t metaqore-gateway .
#
# Debian's own Python 3.11 gets its security updates from the base image. Secrets are mounted, never built in.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# The cache is the builder's own and no part of the image; pip's own version is Debian's, like Python's.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/metaqore \
    && /opt/metaqore/bin/pip install --disable-pip-version-check -c requirements/constraints.txt '.[tracing]'

FROM ${BASE}
# tini is process 1: it passes signals on, and collects the processes that nobody else waits for.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 metaqore \
    && useradd --uid 10001 --gid 10001 --no-log-init --create-home --shell /usr/sbin/nologin metaqore \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/metaqore /var/lib/metaqore/secrets
COPY --from=build /opt/metaqore /opt/metaqore
WORKDIR /app
COPY gateway.json celeryconfig.py .flaskenv ./
COPY profiles profiles
ENV PATH=/opt/metaqore/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/tmp \
    METAQORE_SECRETS__DIRECTORY=/var/lib/metaqore/secrets
USER 10001:10001
EXPOSE 8080
ENTRYPOINT ["/usr/bin/tini", "--"]
# The gateway's own health; compose.yaml has the other processes' checks, and Kubernetes has probes instead.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
CMD ["gunicorn", "-c", "python:gateway_app.gunicorn", "gateway_app:create_app()"]
