"""Words and wire that every process shares: requests, batches, messages, channels, process configs."""
