"""llama.cpp's side of the comparison, run by an interpreter that has `llama-cpp-python` and nothing of kvferry.

    python -P peer.py quantize FROM.gguf TO.gguf TYPE      TYPE: a number of `llama_ftype`
    python -P peer.py steps MODEL.gguf THREADS NUM_CELLS   then a JSON object in a line for each case, on standard input

A case is {"prompt": tokens} or {"rows": rows, "context": tokens}; the answer is a line with the CPU time in seconds of
one prompt, or of one step that feeds a token to each row.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

import llama_cpp

_UBATCH = 512  # llama.cpp's default


def _quantize(source: str, target: str, kind: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = kind, True, 2
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"{source} cannot be quantized")


class _Steps:
    def __init__(self, path: str, threads: int, num_cells: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = num_cells, 2048, _UBATCH, 16
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._filled = (0, 0)

    def prompt_s(self, tokens: int) -> float:
        self._clear()
        began = time.process_time()
        self._feed(0, 0, tokens)
        return time.process_time() - began

    def step_s(self, rows: int, context: int) -> float:
        if self._filled != (rows, context):
            self._clear()
            for row in range(rows):
                self._feed(row, 0, context - 1)
            self._filled = (rows, context)
        began = time.process_time()
        for row in range(rows):
            self._put(row, row, 7 + row, context - 1, wanted=True)
        self._decode(rows)
        took = time.process_time() - began
        for row in range(rows):
            llama_cpp.llama_memory_seq_rm(self._memory, row, context - 1, -1)
        return took

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        self._filled = (0, 0)

    def _feed(self, row: int, first: int, tokens: int) -> None:
        for start in range(first, tokens, 2048):
            count = min(2048, tokens - start)
            for i in range(count):
                token = (31 * (start + i) ** 2 + 17 * (start + i) + 101 * row) % self._vocab_size
                self._put(i, row, token, start + i, wanted=start + i + 1 == tokens)
            self._decode(count)

    def _put(self, i: int, row: int, token: int, position: int, *, wanted: bool) -> None:
        batch = self._batch
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
        batch.seq_id[i][0] = row

    def _decode(self, count: int) -> None:
        self._batch.n_tokens = count
        if llama_cpp.llama_decode(self._context, self._batch):
            sys.exit("llama_decode failed")


def main() -> None:
    if sys.argv[1] == "quantize":
        _quantize(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    steps = _Steps(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    print("ready", flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        if "prompt" in case:
            print(steps.prompt_s(case["prompt"]), flush=True)
        else:
            print(steps.step_s(case["rows"], case["context"]), flush=True)


if __name__ == "__main__":
    main()
