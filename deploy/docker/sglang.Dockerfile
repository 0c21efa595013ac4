# SGLang with the plugin, for H100 and H200.
#   docker build -f deploy/docker/sglang.Dockerfile -t sglang-moe-backend .
#   docker run --gpus all --shm-size 8g -p 30000:30000 -v kernels:/var/cache/moe-backend-plugin sglang-moe-backend --model-path MODEL --host 0.0.0.0
ARG SGLANG_VERSION=v0.5.23
FROM lmsysorg/sglang:${SGLANG_VERSION}

COPY . /src/moe-backend-plugin
# The image has SGLang and the kernels' compiler: nothing of it may be replaced.
RUN pip install --no-cache-dir --no-deps /src/moe-backend-plugin \
 && pip install --no-cache-dir "pydantic-settings>=2.12" "typer>=0.20" "rich>=14" "wrapt>=1.16" "nvidia-ml-py>=12" \
 && moe-backend config show \
 && rm -rf /src/moe-backend-plugin

# Compiled kernels, SGLang's own too (of Marlin they take minutes): on a volume, a restarted container compiles nothing.
ENV MOE_BACKEND_PLUGIN_KERNEL_CACHE=/var/cache/moe-backend-plugin
ENV SGLANG_JIT_CACHE_DIR=/var/cache/moe-backend-plugin/sglang
VOLUME /var/cache/moe-backend-plugin

ENTRYPOINT ["sglang", "serve", "--moe-backend", "cutedsl"]
