"""What `plan` keeps of a teacher, and that a run keeps just that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import stillroom
from stillroom.core.errors import StillroomError
from stillroom.runs import planning
from stillroom.runs.recipe import Recipe
from stillroom.targets.codecs import DrawnCodec, HiddenCodec
from stillroom.targets.kinds import DrawnTargets
from stillroom.targets.store import TargetStore
from tiny_run import tiny_recipe

REVERSE = {"objective": {"terms": [{"divergence": "reverse_kl"}]}}


@pytest.mark.parametrize(
    ("changes", "disk", "kind"),
    [
        ({}, True, "hidden"),
        ({}, False, "drawn"),
        (REVERSE, False, "top_k"),
        ({"objective": {"match_temperature": 2.0}, "targets": {"target_temperature": 2.0}}, False, "drawn"),
        ({"targets": {"live": True}}, False, "hidden"),
        ({"objective": {"terms": [{"divergence": "cross_entropy"}]}}, True, "text"),
    ],
)
def test_auto_keeps_what_carries_the_most_for_the_disk(
    changes: dict[str, Any], disk: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not disk:
        monkeypatch.setattr(planning, "_STORE_MOST_BYTES", 0.0)
    signal = stillroom.plan(Recipe.from_tree(tiny_recipe(tmp_path) | {"targets": {}} | changes)).signal
    assert signal.kind == kind
    assert (signal.draws, signal.k) == (50 if kind == "drawn" else 0, 64 if kind == "top_k" else 0)


def test_drawn_ids_cannot_be_softened_or_reversed(tmp_path: Path) -> None:
    for changes in (REVERSE, {"objective": {"match_temperature": 2.0}}):
        with pytest.raises(StillroomError) as error:
            stillroom.plan(Recipe.from_tree(tiny_recipe(tmp_path) | {"targets": {"kind": "drawn"}} | changes))
        assert error.value.code == "targets-unsupported"


def test_a_run_keeps_as_many_draws_as_its_recipe_asks_for(tmp_path: Path) -> None:
    recipe = Recipe.from_tree(tiny_recipe(tmp_path / "in", prompts=200) | {"targets": {"kind": "drawn", "draws": 20}})
    run = stillroom.run(recipe, out=tmp_path / "out", until="collected")
    store = TargetStore.open(run.directory / "targets")
    codec = store.identity.codec
    assert isinstance(codec, DrawnCodec)
    assert codec.draws == 20
    _, targets = store.read(store.record_ids)
    assert isinstance(targets, DrawnTargets)
    assert targets.counts_U.sum() == 20 * store.rows
    assert store.codec_error is not None
    assert store.codec_error.max_entropy_error_nats is not None
    assert store.codec_error.max_entropy_error_nats <= 2**-10 + 1e-5


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float32", "int8"])
def test_what_rounding_hidden_states_loses_is_measured_against_the_states_before_it(state_dtype: str, tmp_path: Path) -> None:
    targets = {"kind": "hidden", "state_dtype": state_dtype}
    run = stillroom.run(Recipe.from_tree(tiny_recipe(tmp_path / "in") | {"targets": targets}), out=tmp_path / "out", until="collected")
    store = TargetStore.open(run.directory / "targets")
    assert isinstance(store.identity.codec, HiddenCodec)
    assert store.identity.codec.state_dtype == state_dtype
    error = store.codec_error
    assert error is not None
    assert error.max_log_prob_error_nats is not None
    assert error.log_prob_bound_nats is not None
    assert error.max_log_prob_error_nats <= error.log_prob_bound_nats
    assert (error.max_log_prob_error_nats == 0.0) == (state_dtype == "float32")
