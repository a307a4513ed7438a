# Ranks and Ray nodes run this image: `docker build -t REGISTRY/cavmae .`, then
# `cavmae cluster-files DEPLOY --image REGISTRY/cavmae ...`.
# A tag, since a digest would keep the system's packages as they were, with what has been found in
# them since; for images that never change: `--build-arg BASE=python:3.12-slim-bookworm@sha256:...`.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# g++: DeepSpeed and Triton compile. wget: Kubernetes' probes of Ray. rsync, ssh: `ray up`.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/*

# NVDEC (video) is left out of containers unless it is asked for.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/cavmae
COPY . .
RUN pip install --constraint constraints.txt '.[s3]'

# Not root: what videos make a decoder do is done as a user without rights.
# A number, which Kubernetes can tell from root's.
RUN useradd --create-home --uid 1000 --user-group ray
USER 1000:1000
WORKDIR /home/ray
CMD ["cavmae", "--help"]
