# llava_region with LLaVA (or Bunny) and a CUDA build of torch, in the versions that the tests run with.
#
#   docker build -t llava-region .
#   docker build -t llava-region-bunny --build-arg UPSTREAM=bunny .
#   docker run --gpus all --ipc host -v /models:/models -v /data:/data -v "$PWD:/workspace" llava-region \
#       python -m llava_region.train llava --model_name_or_path /models/vicuna-7b-v1.5 ... --tune_layers sparse:25%
#
# --ipc host: the data loader's workers and NCCL share memory, and Docker's default of 64 MB is too little for them.
# Not built in CI. The versions are those of the Makefile, which installs everything here too.

# torch 2.13.0 on PyPI is built for CUDA 13.0. The devel image has nvcc, which DeepSpeed's offload and flash-attn compile with.
ARG BASE=nvidia/cuda:13.0.0-devel-ubuntu22.04
FROM ${BASE}

ARG UPSTREAM=llava
ARG TORCH=torch==2.13.0
# more packages, such as bitsandbytes for QLoRA
ARG EXTRA_PACKAGES=

RUN test "$UPSTREAM" = llava || test "$UPSTREAM" = bunny \
    || { echo "error: UPSTREAM is '$UPSTREAM'; allowed: llava, bunny" >&2; exit 2; }

# git gets Bunny; g++ and Python's headers build DeepSpeed's operators. The base image, not a version here, decides which.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The tested commit. Bunny is on no package index, so it is found by PYTHONPATH.
RUN if [ "$UPSTREAM" = bunny ]; then \
        git clone https://github.com/BAAI-DCAI/Bunny /opt/bunny && git -C /opt/bunny checkout 08273ac; \
    fi
ENV PYTHONPATH=/opt/bunny

# Dependencies first: a change of the code does not install them again.
ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/llava_region
COPY Makefile ./
COPY tests/requirements-common.txt tests/requirements-llava.txt tests/requirements-bunny.txt tests/
RUN make "dependencies-$UPSTREAM" VENV=/opt/venv-llava BUNNY_VENV=/opt/venv-bunny TORCH="$TORCH" \
    && { test -z "$EXTRA_PACKAGES" || "/opt/venv-$UPSTREAM/bin/pip" install $EXTRA_PACKAGES; }

COPY . .
RUN make "install-$UPSTREAM" VENV=/opt/venv-llava BUNNY_VENV=/opt/venv-bunny TORCH="$TORCH"

ENV PATH=/opt/venv-${UPSTREAM}/bin:$PATH
WORKDIR /workspace
CMD ["llava-region", "doctor"]
