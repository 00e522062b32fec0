"""Rows that go through layers together, and how a pass over them is cut: by layers where keys and values have
yet to arrive, and by rows where a step takes only so many.

    stage   rows from the layers that they enter to those that they leave
    slab    the part of a stage in layers whose relayed entries are in the cache; one slab is the whole stage
            when everything is there

Where a stage is cut changes nothing of what is computed: in every layer a row still sees all entries of
earlier positions. Knows nothing of spans, plans or where entries come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Rows:
    """All rows that a prefill may compute, by ascending position.

    Attributes:
        positions, enter, end: [rows] int64; a row is computed in the layers [enter, end).
        relayed: [rows] bool; whether it lies in a relayed span.
        pending: [rows] bool; whether the run has yet to choose if it goes on behind the detection layer.
        hidden: [rows, hidden_size] input of layer `enter` where that is above 0, else undefined; None when
            all rows start from their embeddings.
    """

    positions: torch.Tensor
    enter: torch.Tensor
    end: torch.Tensor
    relayed: torch.Tensor
    pending: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(slots=True)
class Slab:
    """Rows of a stage in some of its layers; `cursor` of them are already handed out.

    Attributes:
        rows: [rows] int64 into the stage's; None = all of them, in all its layers.
        enter, exit: [rows] int64, within the slab's layers.
        low, stop: its layers are [low, stop).
        keep: whether the states with which rows leave are needed; `kept` then collects them.
    """

    rows: torch.Tensor | None
    positions: torch.Tensor
    enter: torch.Tensor
    exit: torch.Tensor
    relayed: torch.Tensor
    hidden: torch.Tensor | None
    low: int
    stop: int
    keep: bool
    cursor: int = 0
    kept: list[torch.Tensor] = field(default_factory=list[torch.Tensor])

    @property
    def rows_left(self) -> int:
        return self.positions.shape[0] - self.cursor


@dataclass(slots=True)
class Stage:
    """Rows from the layers that they enter to those that they leave.

    Attributes:
        positions, enter, exit: [rows] int64; a row is computed in the layers [enter, exit).
        relayed: [rows] bool; whether it lies in a relayed span.
        hidden: [rows, hidden_size] input of layer `enter` where that is above 0; None when all start from
            their embeddings.
        index: [rows] int64 into the prefill's `Rows`; None = all of them.
        watch: layers in which the queries of the `suffix` last prompt tokens are kept.
        keep_hidden: whether a stage follows that goes on from here with `states`.
        looks: whether the fresh rows look ahead, and start again in the next stage.
        low: layers below are done.
        states: [rows, hidden_size] with which rows have left the layers that are done.
    """

    positions: torch.Tensor
    enter: torch.Tensor
    exit: torch.Tensor
    relayed: torch.Tensor
    hidden: torch.Tensor | None
    index: torch.Tensor | None = None
    watch: tuple[int, ...] = ()
    suffix: int = 0
    keep_hidden: bool = False
    looks: bool = False
    low: int = 0
    states: torch.Tensor | None = None

    @property
    def top(self) -> int:
        """The layer at which the last rows leave."""
        return int(self.exit.max())

    @property
    def finished(self) -> bool:
        return self.low >= self.top

    def open(self, landed: int) -> Slab | None:
        """The next layers, as far as [0, landed) goes; None when that is not beyond those that are done."""
        top = self.top
        stop = min(landed, top)
        if stop <= self.low:
            return None
        if self.low == 0 and stop == top:
            return Slab(
                None,
                self.positions,
                self.enter,
                self.exit,
                self.relayed,
                self.hidden,
                0,
                top,
                keep=self.keep_hidden,
            )
        rows = torch.nonzero((self.enter < stop) & (self.exit > self.low)).flatten()
        if not rows.numel():  # all rows enter above
            self.low = stop
            return None
        states = self.hidden if self.states is None else self.states
        return Slab(
            rows,
            self.positions[rows],
            self.enter[rows].clamp_min(self.low),
            self.exit[rows].clamp_max(stop),
            self.relayed[rows],
            None if states is None else states[rows.to(states.device)],
            self.low,
            stop,
            keep=self.keep_hidden or stop < top,
        )

    def close(self, slab: Slab) -> None:
        """Take the states of a slab whose rows are all done, and count its layers."""
        if slab.keep:
            kept = torch.cat(slab.kept)
            if slab.rows is None:
                self.states = kept
            else:
                if self.states is None:
                    shape = (self.positions.shape[0], kept.shape[1])
                    self.states = kept.new_empty(shape) if self.hidden is None else self.hidden.clone()
                self.states[slab.rows.to(kept.device)] = kept
        self.low = slab.stop
