"""From a prompt to integers: grammar, drafts, constrained speculative decoding, KV cache."""
