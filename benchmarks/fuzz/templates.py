"""Chats that set off what a hostile model directory may have put into its template.

The target's template is an ordinary one but for messages that name a bomb. Each bomb is within what the sandbox lets a
template do, or has to be stopped by its limits; the last ones are one operation each, which only the end of its process
stops.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

from kvferry.benchmarks.fuzz.raw_http import NoAnswer, RawClient, post
from kvferry.benchmarks.fuzz.strike import Attack, Strike

_BOMBS = {
    "loops": "{% for i in 'a' * 900 %}{% for j in 'a' * 900 %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "texts": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "items": "{% for i in range(90000) %}{{ (range(900) | list * 900) | unique | list | length }}{% endfor %}",
    "output": "{% for i in range(90000) %}{{ 'x' * 900 }}{% endfor %}",
    "sort": "{{ ('yx' * 400000) | list | sort | length }}",
    "compare": "{{ ([{'a': 'a' * 4000000}] * 1000000) | groupby('a', case_sensitive=true) | length }}",
    "lower": "{{ ([{'a': 'a' * 4000000}] * 100000) | groupby('a') | length }}",
}
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_template(path: Path) -> Path:
    tests = [f"{{% if messages[0].content == 'bomb: {name}' %}}{bomb}{{% endif %}}" for name, bomb in _BOMBS.items()]
    path.write_text("".join(tests) + _CHATML)
    return path


async def template_bombs(strike: Strike) -> None:
    """All kinds, beside ordinary chats."""

    async def one(index: int) -> None:
        client = RawClient(strike.address)
        names = ["hello", *(f"bomb: {name}" for name in _BOMBS)]
        for name in itertools.islice(itertools.cycle(names), index, None):
            if strike.is_over:
                break
            body = json.dumps({"messages": [{"role": "user", "content": name}], "max_tokens": 2}).encode()
            try:
                strike.note(await client.ask(post("/v1/chat/completions", body)))
            except NoAnswer:
                strike.outcomes["no answer"] += 1
        client.close()

    await asyncio.gather(*map(one, range(len(_BOMBS))))


TEMPLATE_ATTACKS: dict[str, Attack] = {"template bombs": template_bombs}
