"""Tests that start vLLM: a server over HTTP, or the engine inside one helper process."""
