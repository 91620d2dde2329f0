"""The decode role: reservations and arrivals in, tokens out."""
