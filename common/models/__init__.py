"""Model code of the Llama family, driven by `config.json`."""
