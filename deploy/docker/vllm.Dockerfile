# vLLM with the plugin, for H100 and H200 (kernels of this package) and any other GPU vLLM serves (vLLM's own kernels).
#   docker build -f deploy/docker/vllm.Dockerfile -t vllm-moe-backend .
#   docker run --gpus all -p 8000:8000 -v kernels:/var/cache/moe-backend-plugin vllm-moe-backend --model MODEL
ARG VLLM_VERSION=v0.32.0
FROM vllm/vllm-openai:${VLLM_VERSION}

COPY . /src/moe-backend-plugin
# The image has vLLM and the kernels' compiler: nothing of it may be replaced.
RUN pip install --no-cache-dir --no-deps /src/moe-backend-plugin \
 && pip install --no-cache-dir "pydantic-settings>=2.12" "typer>=0.20" "rich>=14" "wrapt>=1.16" "nvidia-ml-py>=12" \
 && moe-backend config show \
 && rm -rf /src/moe-backend-plugin

# Compiled kernels: on a volume, a restarted container compiles nothing.
ENV MOE_BACKEND_PLUGIN_KERNEL_CACHE=/var/cache/moe-backend-plugin
VOLUME /var/cache/moe-backend-plugin

ENTRYPOINT ["vllm", "serve", "--quantization", "nvfp4_cutedsl"]
