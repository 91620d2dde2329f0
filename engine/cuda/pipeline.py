"""Steps of answers' tokens on a device that is kept busy: each step is prepared while the one before it runs.

    step n     batch as foretold?  yes: put in the new blocks' ids, launch
                                   no:  fill the arrays, upload and plan them, launch
               queue sampling and the tokens' way to the host
               foretell step n+1: arrays, upload, plan; its token ids are taken from step n's on the device
               wait for the tokens

Everything is queued on one stream. So the arrays of step n+1 may be uploaded over those of step n: the copy takes its
turn behind step n's kernels. Only host memory must not be written to before it has been uploaded; `upload` waits for
that. What a forecast that did not fit has uploaded is uploaded over. The device itself is behind `DecodeDevice`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ...common.batch import Batch, RowOutput, drawn_output
from ..sampling.sampling import sample_rows
from .rows import (
    MAX_READ_AGAIN_BYTES,
    BlockTables,
    DecodeRow,
    Forecast,
    StepArrays,
    fill,
    foretell,
    padded_size,
    put_token_ids,
    rows_of,
)
from .sampling import DeviceSampler, Draws


class DecodeDevice(Protocol):
    """Runs the model on what stands in `arrays`, for one of the padded numbers of rows in `sizes`."""

    arrays: StepArrays
    sizes: tuple[int, ...]

    def reuse_arrays(self) -> None:
        """Return when what was uploaded last has left `arrays`, so that they may be written to."""
        ...

    def upload(self, size: int, num_pages: int) -> None:
        """Queue the upload of all but the token ids, and plan attention."""
        ...

    def upload_pages(self, num_pages: int) -> None:
        """Queue the upload of the page ids alone."""
        ...

    def upload_token_ids(self, size: int) -> None: ...

    def feed(self, token_ids: Tensor, sources: Sequence[int]) -> None:
        """Have row i feed the token in row sources[i], column 0, of `token_ids`, which is on the device."""
        ...

    def launch(self, size: int, num_rows: int) -> Tensor:
        """Queue the model; logits [num_rows, vocab] float32."""
        ...

    def wait(self, queue_more: Callable[[], None]) -> None:
        """Call `queue_more`, then return when what was queued before it is done.

        Raises ForeignStateError where a row went on from a state that is not its own.
        """
        ...


class DecodePipeline:
    """Owned by the engine's thread."""

    def __init__(
        self, device: DecodeDevice, sampler: DeviceSampler, pages: Tensor, *, spare_block: int, max_model_len: int
    ) -> None:
        """`pages`: all of a block. `spare_block`: of them, owned by no sequence; padding rows write there."""
        self._device = device
        self._sampler = sampler
        self._num_pages, self._block_size = pages.shape[0], pages.shape[4]
        self._max_read_again = MAX_READ_AGAIN_BYTES // (pages[:, 0].nbytes // self._block_size)
        self._spare_block = spare_block
        self._max_model_len = max_model_len
        self._tables = BlockTables()
        self._forecast: Forecast | None = None
        self._num_forecast_pages = 0
        self._sampled: list[int] = []  # of the step before, by row
        self.num_forecasts = 0  # steps, and those of them that ran as prepared
        self.num_steps = 0

    def step(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> list[RowOutput] | None:
        """Run the step, whose blocks have been copied. None: the batch is not for this pipeline.

        Layers are told of when all of them are queued.
        """
        size = padded_size(self._device.sizes, batch.num_tokens)
        rows = rows_of(batch, self._block_size, self._max_read_again) if size is not None else None
        if size is None or rows is None:
            self._forecast = None
            return None
        self.num_steps += 1
        if not self._take_forecast(batch):
            self._prepare(batch, rows, size)
        logits = self._device.launch(size, len(rows))
        if on_layer is not None:
            for layer in range(self._num_pages):
                on_layer(layer)
        draws = self._sample(batch, logits)
        self._device.wait(lambda: self._look_ahead(batch, draws))
        tokens = iter(draws.read() if draws is not None else ())
        outputs = [drawn_output(row, tokens, ()) for row in batch.rows]
        self._sampled = [output.runs[0][0].token_id if output.runs else -1 for output in outputs]
        return outputs

    def _take_forecast(self, batch: Batch) -> bool:
        forecast, self._forecast = self._forecast, None
        if forecast is None or not forecast.fits(batch, self._sampled):
            return False
        if forecast.missing:
            self._device.reuse_arrays()
            forecast.put_new_pages(self._device.arrays)
            self._device.upload_pages(self._num_forecast_pages)
        self.num_forecasts += 1
        return True

    def _prepare(self, batch: Batch, rows: list[DecodeRow], size: int) -> None:
        self._device.reuse_arrays()
        num_pages, missing = self._fill(rows, size)
        assert not missing, "a block table is shorter than its sequence"
        put_token_ids(self._device.arrays, [token for row in batch.rows for token in row.token_ids], size)
        self._device.upload_token_ids(size)
        self._device.upload(size, num_pages)

    def _fill(self, rows: list[DecodeRow], size: int) -> tuple[int, list[tuple[int, DecodeRow]]]:
        return fill(
            self._device.arrays,
            rows,
            size,
            self._tables,
            block_size=self._block_size,
            spare_block=self._spare_block,
        )

    def _look_ahead(self, batch: Batch, draws: Draws | None) -> None:
        """Prepare the next step while the device computes, if it can be told."""
        forecast = foretell(batch, self._block_size, self._max_model_len)
        if forecast is None or draws is None:
            return
        size = padded_size(self._device.sizes, len(forecast.rows))
        assert size is not None, "more rows than in the step before"
        self._device.reuse_arrays()
        self._num_forecast_pages, forecast.missing = self._fill(forecast.rows, size)
        self._device.feed(draws.token_ids, forecast.sources)
        self._device.upload(size, self._num_forecast_pages)
        self._forecast = forecast

    def _sample(self, batch: Batch, logits: Tensor) -> Draws | None:
        """Queue sampling; rows that do not sample are computed for their KV alone."""
        sampling = [row.samples for row in batch.rows for _ in range(row.num_scheduled_tokens)]
        if not any(sampling):
            return None
        if not all(sampling):
            logits = logits[[index for index, samples in enumerate(sampling) if samples]]
        return self._sampler.launch(logits, sample_rows(batch))
