"""One script, one question: load clients and side-by-side measurements."""
