"""KV transport: backends that move bytes, and the sender and receiver of the handoff above them."""
