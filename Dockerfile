# Maquette as a container: docker build -t maquette . && docker run -p 7860:7860 maquette
# Whoever reaches the port is a visitor (mode public). For people with passwords: -e MAQUETTE_MODE=team, and
# docker exec -it CONTAINER python -m engine user add NAME
# Nothing but the volume and /tmp is written: docker run --read-only --tmpfs /tmp -v maquette:/home/maquette/data
# -p 7860:7860 maquette. The volume keeps runs, compiled kernels and downloaded models.
# With CUDA: docker build --build-arg TORCH_BACKEND=cu130 -t maquette . && docker run --gpus all -p 7860:7860 maquette
FROM python:3.12-slim

# The build of torch: cpu, cu126, cu128, cu130; uv knows where each is kept.
ARG TORCH_BACKEND=cpu

# The kernels for packed weights are compiled at first use, for the processor that is there.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# A new volume takes over the owner of the folder that it covers.
RUN useradd --create-home --uid 1000 maquette \
    && install -d -o 1000 -g 1000 /home/maquette/app /home/maquette/data
USER 1000
WORKDIR /home/maquette/app

ENV VIRTUAL_ENV=/home/maquette/venv \
    PATH=/home/maquette/venv/bin:$PATH \
    MAQUETTE_HOME=/home/maquette/data \
    XDG_CACHE_HOME=/home/maquette/data/cache \
    HF_HOME=/home/maquette/data/huggingface \
    GRADIO_TEMP_DIR=/tmp/gradio \
    GRADIO_ANALYTICS_ENABLED=False \
    HOST=0.0.0.0 \
    MAQUETTE_MODE=public \
    PORT=7860 \
    PYTHONUNBUFFERED=1

COPY --chown=1000 requirements.txt .
RUN python -m venv "${VIRTUAL_ENV}" \
    && pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --no-cache --compile-bytecode --torch-backend "${TORCH_BACKEND}" -r requirements.txt

COPY --chown=1000 . .
RUN python -m compileall -q app.py engine ui

VOLUME /home/maquette/data

EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as web; web.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/healthz', timeout=4)"]

CMD ["python", "app.py"]
