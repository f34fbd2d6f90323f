# The images of Pare. Targets: `service` (API, dispatcher, migrations; no torch) and `worker` (the same plus the engine).
#
#   docker build --target service -t pare-service .
#   docker build --target worker  -t pare-worker  .
#
# Which torch the worker gets: a torch wheel in wheels/ if there is one, else what TORCH_INDEX (a package index, e.g. PyTorch's
# own for "cpu" or a CUDA version) offers, else pip's default, which on Linux x86-64 is the CUDA build.
ARG BASE=python:3.11-slim-bookworm

# ---- build: makes /opt/pare, an environment without pip, which the final images copy ------------------------------------
FROM ${BASE} AS build
ARG PIP_NO_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_FIND_LINKS=/src/wheels PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python3 -m venv --without-pip /opt/pare
COPY requirements/service.lock requirements/
RUN --mount=type=bind,source=wheels,target=/src/wheels \
    PIP_NO_INDEX=${PIP_NO_INDEX:-0} python3 -m pip --python /opt/pare/bin/python install --no-deps --require-hashes -r requirements/service.lock

# Built apart from the environments, so that a changed line of code does not install the libraries again.
FROM build AS code
COPY pyproject.toml README.md ./
COPY app app
COPY migrations migrations
COPY pare pare
COPY worker worker
RUN --mount=type=bind,source=wheels,target=/src/wheels \
    PIP_NO_INDEX=${PIP_NO_INDEX:-0} python3 -m pip wheel --no-deps --wheel-dir /dist .

FROM build AS build-service
RUN --mount=type=bind,from=code,source=/dist,target=/dist \
    python3 -m pip --python /opt/pare/bin/python install --no-deps --no-index /dist/*.whl

FROM build AS build-engine
ARG TORCH_INDEX=
ARG TORCH=torch==2.13.0
COPY requirements/worker.lock requirements/
RUN --mount=type=bind,source=wheels,target=/src/wheels \
    PIP_NO_INDEX=${PIP_NO_INDEX:-0} python3 -m pip --python /opt/pare/bin/python install --no-deps --require-hashes -r requirements/worker.lock
RUN --mount=type=bind,source=wheels,target=/src/wheels \
    PIP_NO_INDEX=${PIP_NO_INDEX:-0} python3 -m pip --python /opt/pare/bin/python install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"

FROM build-engine AS build-worker
RUN --mount=type=bind,from=code,source=/dist,target=/dist \
    python3 -m pip --python /opt/pare/bin/python install --no-deps --no-index /dist/*.whl

# ---- what both final images share: a user without a name on the host, and one place to write ----------------------------
FROM ${BASE} AS runtime
RUN groupadd --system --gid 10001 pare \
    && useradd --system --uid 10001 --gid 10001 --home-dir /var/lib/pare --no-create-home --shell /usr/sbin/nologin pare \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/pare /var/lib/pare/store /var/lib/pare/work
ENV PATH=/opt/pare/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PARE_DATA_DIR=/var/lib/pare
WORKDIR /var/lib/pare
STOPSIGNAL SIGTERM

FROM runtime AS service
COPY --from=build-service /opt/pare /opt/pare
USER 10001:10001
# Inside the container; what is published, the compose file says.
ENV PARE_HOST=0.0.0.0 PARE_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
CMD ["python", "-m", "app"]

FROM runtime AS worker
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends bubblewrap util-linux \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-worker /opt/pare /opt/pare
USER 10001:10001
# The start includes trying every layer of isolation and importing torch.
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 CMD ["python", "-m", "worker.health"]
CMD ["python", "-m", "worker"]
