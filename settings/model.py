"""Settings of the model that is served, and of how its chats are read."""

from __future__ import annotations

from typing import Annotated

from ..common.config import Dtype, LoadFormat, QuantizationName, Settings
from ..common.router_config import ReasoningParserName, SpecialTokens, ToolParserName
from .option import ALL, ENGINES, FRONTS, Option
from .values import Count, FilePath, ModelNames, WeightsForms


class ModelSettings(Settings):
    """The model."""

    model: Annotated[
        str | None,
        Option(
            "Model", "Directory in Hugging Face's layout, GGUF file or name on its hub. Without one: the built-in.", ALL
        ),
    ] = None
    revision: Annotated[str | None, Option("Model", "Branch, tag or commit on the hub.", ALL)] = None
    served_model_name: Annotated[
        ModelNames,
        Option("Model", "Name of the model in the API; repeatable: requests give any of them, answers the first.", ALL),
    ] = ()
    max_model_len: Annotated[
        Count | None, Option("Model", "Longest prompt plus answer, in tokens. Default: the model's.", ALL)
    ] = None
    dtype: Annotated[
        Dtype, Option("Model", "Type of weights; auto: the checkpoint's, on GPUs 16 bits for 32.", ENGINES)
    ] = "auto"
    quantization: Annotated[
        QuantizationName | None,
        Option(
            "Model",
            "int8, int4, fp8 (Hopper GPUs): round a plain checkpoint's weights at start; gguf: the built-in model's as "
            "its file has them. "
            "Default: the checkpoint's own.",
            ALL,
            short="-q",
        ),
    ] = None
    mixed_quantization: Annotated[
        WeightsForms,
        Option(
            "Model",
            "Forms of the weights whose workers may exchange KV, as a plain prefill worker and a decode worker in "
            "int4. Default: all workers have one.",
            ENGINES,
        ),
    ] = ()
    load_format: Annotated[LoadFormat, Option("Model", "dummy: random weights.", ENGINES)] = "auto"
    chat_template: Annotated[FilePath | None, Option("Model", "Jinja file instead of the model's own.", FRONTS)] = None
    special_tokens_in_messages: Annotated[
        SpecialTokens,
        Option(
            "Model",
            "What a special token is that a message's text spells: itself, ordinary text, or a reason to refuse it.",
            FRONTS,
        ),
    ] = "allow"
    enable_auto_tool_choice: Annotated[
        bool, Option("Model", "Refuse requests whose model may choose whether it calls a tool.", FRONTS)
    ] = True
    tool_call_parser: Annotated[
        ToolParserName, Option("Model", "Form of the model's tool calls; auto: by the chat template.", FRONTS)
    ] = "auto"
    reasoning_parser: Annotated[
        ReasoningParserName, Option("Model", "Form of the model's reasoning; auto: by the chat template.", FRONTS)
    ] = "auto"
    seed: Annotated[int, Option("Model", "Seed of dummy weights and of requests without one.", ALL)] = 0

    def name_in_answers(self, own: str) -> str:
        """Return the model's first name; `own`: what it is called where it was given none."""
        return next(iter(self.served_model_name), own)
