"""/v1/embeddings: a call's inputs become as many requests, which workers compute side by side, taken all or none.

body ─> inputs ─> requests with a pooling ─> the dispatcher, as every request ─> vectors ─> OpenAI's form
"""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import Request

from ...common.errors import RequestError
from ...common.request import SamplingParams
from ..api.answer import Answer
from ..api.choice import TextOptions
from ..api.generation import Api
from ..api.paying import charge
from ..bodies.text_bodies import EmbeddingBody
from ..catalogue.version import Version
from .form import EmbeddingForm
from .inputs import read_inputs
from .reply import VectorsReply

_TEXT = TextOptions(max_tokens=1)  # nor shown
_SAMPLING = SamplingParams(temperature=0.0, max_tokens=1)  # no token is drawn
_VALUE_BYTES = 4  # of a vector, as it comes from a worker


async def embed(api: Api, request: Request) -> VectorsReply:
    """Answer a call. Anything wrong with it is told before a worker hears of it."""
    context = api.begin(request)
    with api.body_room.held() as held:
        body, version = await api.body(request, held, EmbeddingBody)
        context.marks["read"] = api.clock.now()
        _check_dimensions(version, body)
        prompts = await api.prompts.run(held.num_bytes, read_inputs, version, body)
    context.marks["tokenize"] = api.clock.now()
    with ExitStack() as room:
        room.enter_context(api.vector_room.held()).add(len(prompts) * version.model.hidden_size * _VALUE_BYTES)
        api.in_flight.check_open()
        charge(context, sum(len(prompt.token_ids) for prompt in prompts))
        made = api.requests(context, version, body, prompts, [_SAMPLING] * len(prompts))
        streams = await api.submit(context, version, made, pooling=version.model.pooling)
        answer = Answer(streams, prompts, _TEXT, version.tokenizer, clock=api.clock, observer=api.observer)
        form = EmbeddingForm(answer, version.model.name, body)
        return VectorsReply(api, answer, form, room.pop_all())


def _check_dimensions(version: Version, body: EmbeddingBody) -> None:
    size = version.model.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        text = f"'dimensions' should be less than or equal to {size}, the length of this model's vectors"
        raise RequestError(f"{text}, got {body.dimensions}", param="dimensions", code="invalid_value")
