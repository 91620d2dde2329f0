"""What every process shares: configuration, messages, the KV block pool, the model and its engine."""
