"""Both roles in one worker: prefill and decode over one engine, one pool of blocks and one lock."""
