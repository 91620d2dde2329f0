"""The router: HTTP API, central queue, placement and the state of every stream."""
