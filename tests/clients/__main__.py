"""Unmodified client libraries call a server: a table of client and feature, with the outcome of each call.

    python -m kvferry.tests.clients                     makes what environments it needs, serves the built-in model
    python -m kvferry.tests.clients --only anthropic    one file of calls anew, the others' results are kept

The libraries, and the programs, are installed from a package index, each group into an environment of its own under
.venv/clients, so that nothing of theirs is in ours. A call is listed with the outcome that is wanted: it works, or it
is refused by name. The exit status is 1 if another one came.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kvferry
from kvferry.benchmarks.shared.program import RESULTS_DIR
from kvferry.models.files import resolve_model
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.server_process import free_port, running

HERE = Path(__file__).resolve().parent
ROOT = Path(kvferry.__file__).resolve().parent
ENVIRONMENTS = ROOT / ".venv" / "clients"
PROGRAMS = "tools"  # whose calls are programs: they ask for other versions of what libraries need too
START_S, CALLS_S = 120.0, 1200.0
Row = dict[str, Any]


def interpreter_of(group: str) -> Path:
    """Make the group's environment, unless it is there, and return its interpreter."""
    folder, pins = ENVIRONMENTS / group, HERE / f"{group}.txt"
    python, made = folder / "bin" / "python", folder / "made.txt"
    if not made.is_file() or made.read_text() != pins.read_text():
        uv = str(Path(sys.executable).parent / "uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(pins)], check=True)
        made.write_text(pins.read_text())
    return python


def call(name: str, url: str, model: str, tokenizer: Path) -> list[Row]:
    """Make the calls of one file, and return what came of each."""
    python = interpreter_of("programs" if name == PROGRAMS else "libraries")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kvferry").symlink_to(ROOT)  # the calls are modules of the package, and need nothing else of it
        argv = [str(python), "-m", f"kvferry.tests.clients.calls.{name}_calls", url, model, str(tokenizer)]
        env = {**os.environ, "PYTHONPATH": folder}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=CALLS_S, env=env, check=False)
    rows: list[Row] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"client"')]
    if done.returncode:
        text = done.stderr[-300:]
        rows.append({"client": name, "feature": "the file", "wanted": "works", "outcome": "failed", "detail": text})
    for row in rows:
        print(_line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    is_right = row["outcome"] in (row["wanted"], "not run")
    return f"| {row['client']} | {row['feature']} | {row['outcome']} | {'' if is_right else row['detail']} |"


def _rows_of_others(result: Path, clients: set[str]) -> list[Row]:
    """Return what an earlier run found of clients that were left out now."""
    if not result.is_file():
        return []
    rows: list[Row] = json.loads(result.read_text())["calls"]
    return [row for row in rows if row["client"] not in clients]


def main() -> int:
    names = sorted(path.stem.removesuffix("_calls") for path in (HERE / "calls").glob("*_calls.py"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--output", type=Path, default=RESULTS_DIR / "clients.json")
    flags = parser.parse_args()
    model, port = resolve_model(None), free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "kvferry", "serve", str(model.dir), "--served-model-name", model.served_name]
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory() as logs,
        running("kvferry", [*command, "--port", str(port), "--data-dir", f"{logs}/data"], Path(logs)) as server,
    ):
        server.wait_until_healthy(f"{url}/ready", START_S)
        print("| client | feature | outcome | |\n|---|---|---|---|", flush=True)
        for name in flags.only:
            rows += call(name, url, model.served_name, model.dir)
    wrong = [row for row in rows if row["outcome"] not in (row["wanted"], "not run")]
    print(f"{len(rows)} calls, {len(wrong)} with another outcome than is wanted")
    environment = describe_environment("python -m kvferry.tests.clients", sys.argv[1:])
    pins = [line for file in sorted(HERE.glob("*.txt")) for line in file.read_text().splitlines() if "==" in line]
    others = _rows_of_others(flags.output, {row["client"] for row in rows})
    save_json({"environment": asdict(environment), "clients": pins, "calls": [*others, *rows]}, flags.output)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
