#!/usr/bin/env bash
# Starts `vllm serve --config FILE` and, once it answers, prints its URL and a request to try.
set -euo pipefail

config=${1:?usage: serve.sh CONFIG.yaml}
value() { sed -n "s/^$1:[[:space:]]*//p" "$config" | tr -d "\"'" | head -n 1; }
host=$(value host) port=$(value port) model=$(value served-model-name)
url="http://${host:-127.0.0.1}:${port:-8000}"

export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
vllm serve --config "$config" &
server=$!
trap 'kill -TERM "$server" 2>/dev/null' INT TERM

answers() { python3 -c "import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + '/health', timeout=2)" "$url" 2>/dev/null; }
until answers; do
  kill -0 "$server" 2>/dev/null || { wait "$server"; exit; }
  sleep 1
done

cat <<EOF

Serving ${model:-the model} at $url

  curl $url/v1/completions -H 'Content-Type: application/json' -d '{"model": "$model", "prompt": "class Stack:\n    def __init__(self):", "max_tokens": 64, "temperature": 0, "frequency_penalty": 0.5}'

EOF
# A trapped signal ends the first wait; the second one waits for the server's own shutdown.
wait "$server" || wait "$server"
