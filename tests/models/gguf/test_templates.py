"""A GGUF file's chat templates: one for chats, and maybe one for those with tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.models.chat_template import load_chat_template
from kvferry.models.gguf.config import gguf_tokenizer_config
from kvferry.models.gguf.files import read_gguf

TOOL: dict[str, object] = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("templates", "plain", "with_tools"),
    [
        ({"default": "plain", "tool_use": "tools"}, "plain", "tools"),
        ({"default": "plain", "rag": "documents"}, "plain", "plain"),
        ({"default": "plain"}, "plain", "plain"),
        ({"tool_use": "tools"}, None, None),
    ],
)
def test_a_chat_with_tools_is_written_by_the_template_for_them(
    tmp_path: Path, templates: dict[str, str], plain: str | None, with_tools: str | None
) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_token_list(["a"])
    writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    config = gguf_tokenizer_config(read_gguf(tmp_path / "model.gguf")[0], 128)
    template, messages = load_chat_template(tmp_path, config), [{"role": "user", "content": "hi"}]
    if plain is None:
        assert template is None
        return
    assert template is not None
    assert [template.render(messages, tools=tools) for tools in ((), (TOOL,))] == [plain, with_tools]
