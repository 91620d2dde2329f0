"""A size is shown as one table: each figure, its bound where it has one, and what binds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from ...tools.load.report import milliseconds, report_console

Row = tuple[str, str, str, str]  # figure, value, bound, what binds

_TERMS = {
    "products": "products with weights",
    "weights": "reading weights",
    "attention": "prompts' attention",
    "cache": "reading KV",
    "exchange": "between ranks",
    "launches": "starting kernels",
}


def print_size(figures: Mapping[str, Any]) -> None:
    gpu, num_ranks = figures["hardware"], figures["tensor_parallel_size"]
    weights = "as stored" if figures["quantization"] == "plain" else figures["quantization"]
    title = (
        f"{figures['model']}, weights {weights}, on {num_ranks} x {gpu['name']} a worker; "
        f"prompts of {figures['context']:,} tokens, answers of {figures['output']:,.0f}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("", "expected", "bound"):
        table.add_column(column, justify="right" if column else "left")
    table.add_column("what binds")
    for rows in (_memory(figures["memory"]), _times(figures), _fleet(figures)):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    report_console(file_width=140).print(table)


def _memory(memory: Mapping[str, Any]) -> Iterator[Row]:
    yield "weights of a rank", _bytes(memory["weights"]), "", ""
    yield "workspace of a rank", _bytes(memory["workspace"]), "", ""
    yield "KV of a token on a rank", _bytes(memory["cache_token"]), "", ""
    blocks = f"{memory['num_blocks']:,} blocks = {memory['num_tokens']:,} tokens"
    yield "KV cache of a rank", _bytes(memory["cache"]), "", f"most is {memory['binding']}; {blocks}"
    handed, own = memory["num_contexts"], memory["num_own_contexts"]
    where = "memory" if handed == own else f"memory; {own:,.0f} where a worker computes them itself"
    yield "sequences of the context that fit", f"{handed:,.0f}", "", where


def _times(figures: Mapping[str, Any]) -> Iterator[Row]:
    batch, handoff, exchanged = figures["batch"], figures["handoff"], figures["exchanged_bytes"]
    yield _time("TPOT, 1 row, ms", figures["decode_alone"])
    yield "rows that keep the TPOT objective", f"{batch['num_rows']:,}", "", batch["binding"]
    yield _time(f"TPOT, {batch['num_rows']:,} rows, ms", figures["decode_batch"])
    yield _time(f"prefill of {figures['context']:,} tokens, ms", figures["prompt"])
    yield "KV of a prompt on the wire", _bytes(handoff["num_bytes"]), "", ""
    rate = f"{handoff['link_bytes_per_s'] / 1e9:g} GB/s a rank"
    yield "its time on the links, ms", milliseconds(handoff["link_s"] * 1e3), "", rate
    yield "of that behind the prefill, ms", milliseconds(handoff["exposed_s"] * 1e3), "", handoff["binding"]
    if figures["tensor_parallel_size"] > 1:
        for step, rows in (("alone", "1 row"), ("batch", f"{batch['num_rows']:,} rows")):
            yield f"sent by a rank in a step of {rows}", _bytes(exchanged[step]), "", _by_exchange(exchanged, step)


def _by_exchange(exchanged: Mapping[str, Any], step: str) -> str:
    """Return what either way to exchange experts' tokens would send; empty: there is one alone."""
    found = {way: exchanged[way][step] for way in ("sum", "all_to_all") if way in exchanged}
    return ", ".join(f"{way} {_bytes(count)}" for way, count in found.items())


def _time(name: str, time: Mapping[str, Any]) -> Row:
    bound, expected = milliseconds(time["bound_s"] * 1e3), milliseconds(time["expected_s"] * 1e3)
    return name, expected, bound, _TERMS[time["binding"]]


def _fleet(figures: Mapping[str, Any]) -> Iterator[Row]:
    rates = figures["rates"]
    for role in ("prefill", "decode"):
        rate = rates[f"{role}_worker_per_s"]
        yield f"requests/s of a {role} worker at best", "-" if rate is None else f"{rate:.2f}", "", ""
    if "fleet" not in figures:
        yield "P:D that matches rates", _ratio(rates), "", f"{rates['binding']} takes more workers"
        return
    fleet, simulated = figures["fleet"], figures.get("simulated")
    how = "rates alone" if simulated is None else f"{simulated['requests']:,} requests simulated"
    split = f"{fleet['prefill']}:{fleet['decode']}" if fleet["prefill"] else "1 for both"
    yield "P:D workers", split, "", how
    yield "GPUs", str(fleet["gpus"]), "", f"{rates['binding']} takes more workers"
    if simulated is not None:
        good = f"{simulated['attainment']:.1%}"
        yield "requests that keep both objectives", good, "", f"most missed: {simulated['binding']}"
        yield "TTFT p50 / p90, ms", _pair(simulated, "ttft"), "", ""
        yield "TPOT p50 / p90, ms", _pair(simulated, "tpot"), "", ""
    if (cost := figures.get("cost")) is None:
        yield "cost", "-", "", "no price is known: --gpu-hour-cost"
        return
    source = f"{cost['gpu_hour']:g} for a GPU-hour"
    yield "cost of a million output tokens", _price(cost["per_million_output_tokens"]), "", source
    yield "cost of a million tokens, prompts' too", _price(cost["per_million_tokens"]), "", source


def _price(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"  # no powers of ten


def _ratio(rates: Mapping[str, Any]) -> str:
    prefill, decode = rates["prefill_worker_per_s"], rates["decode_worker_per_s"]
    if prefill is None or decode is None:
        return "-"
    return f"{decode / prefill:.2f}:1" if decode > prefill else f"1:{prefill / decode:.2f}"


def _pair(simulated: Mapping[str, Any], which: str) -> str:
    return " / ".join(milliseconds(simulated[f"{which}_{part}_ms"]) for part in ("p50", "p90"))


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"
