"""Who takes a worker's place, on a clock of the test's own and with actors that are plain objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from relay_cluster.following import Follower
from transport.errors import RelayError


@dataclass
class Actor:
    """Answers `accepting` when the test says so. told: a WorkerInfo's stand-in, None while it drains, or an
    error."""

    told: Any = None
    ready: bool = False
    accepting: Any = field(init=False)

    def __post_init__(self) -> None:
        self.accepting = SimpleNamespace(remote=lambda: self)


class Rig:
    """One name, and who has it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.actor: Actor | None = Actor("first", ready=True)
        self.asked = 0
        self.follower = Follower(
            self.find, answered=lambda call: call.ready, fetch=self.fetch, clock=lambda: self.now
        )

    def find(self) -> Actor:
        self.asked += 1
        if self.actor is None:
            raise ValueError("no such actor")
        return self.actor

    @staticmethod
    def fetch(call: Actor) -> Any:
        if isinstance(call.told, Exception):
            raise call.told
        return call.told


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_it_is_found_at_once_and_not_asked_again(rig: Rig) -> None:
    assert rig.follower.back()
    assert (rig.follower.handle, rig.follower.info) == (rig.actor, "first")
    assert rig.follower.back()
    assert rig.asked == 1


def test_its_successor_is_taken_once_it_is_ready(rig: Rig) -> None:
    assert rig.follower.back()
    rig.follower.leave()
    rig.actor = successor = Actor("second")
    assert not rig.follower.back()
    rig.now += 60
    assert not rig.follower.back(), "it loads the model"
    assert not rig.follower.gone
    successor.ready = True
    assert rig.follower.back()
    assert (rig.follower.handle, rig.follower.info) == (successor, "second")


def test_one_that_drains_is_away_until_it_takes_requests_again(rig: Rig) -> None:
    assert rig.follower.back()
    rig.follower.leave()
    assert rig.actor is not None
    rig.actor.told = None
    assert not rig.follower.back()
    assert not rig.follower.back()
    assert rig.asked == 2, "not at every look"
    rig.now += 1
    rig.actor.told = "first"
    assert rig.follower.back()


def test_a_name_that_nobody_has_is_gone_after_a_while_and_may_come_back(rig: Rig) -> None:
    assert rig.follower.back()
    rig.follower.leave()
    rig.actor = None
    assert not rig.follower.back()
    assert not rig.follower.gone, "it may be between two lives"
    rig.now += 16
    assert not rig.follower.back()
    assert rig.follower.gone
    rig.actor = Actor("second", ready=True)
    rig.now += 1
    assert rig.follower.back()
    assert not rig.follower.gone


def test_one_that_cannot_start_is_asked_for_again(rig: Rig) -> None:
    rig.actor = Actor(RelayError("no such model"), ready=True)
    assert not rig.follower.back()
    rig.now += 16
    assert rig.follower.gone
    rig.actor = Actor("better", ready=True)
    assert rig.follower.back()
