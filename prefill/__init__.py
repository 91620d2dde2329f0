"""The prefill role: prompts in, first tokens and shipped KV out."""
