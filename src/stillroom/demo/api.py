"""The demo with its teacher behind an address: llama.cpp serves it on this machine, and it is probed, asked and accounted for as any provider's model."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import yaml

from stillroom import demo
from stillroom.core import durable
from stillroom.core.errors import CollectError
from stillroom.core.optional import load, require
from stillroom.models import serving
from stillroom.runs import Observer, Recipe, Run, run
from stillroom.runs.directory import STATES
from stillroom.runs.endpoints import endpoint_of
from stillroom.runs.probing import Wanted, probe_endpoint, token_index

# Below those that systems hand out by themselves, so that it is the same when a run goes on: the address is part of what its requests are known by.
PORT = 18391
_MODEL = "stillroom-teacher"
# What most providers give at most.
_ALTERNATIVES = 20
# Each request is at most so long with its answer, in tokens, which is what the teacher takes.
_CONTEXT_TOKENS = 256
# Longer than the context: what the server does with such a prompt is found out too.
_OVERFLOW_WORDS = 600
# Measured on two cores, one of which collects: fewer leave the server idle, more wait for one another.
_SERVED_AT_ONCE, _IN_FLIGHT = 16, 32
# The most that all prompts can be charged, each byte of a request counted as a token; some twentieth of it is spent.
_MOST_TOKENS = 5_000_000


def run_api(out: Path, seed: int, *, port: int | None, observer: Observer) -> Run:
    """Runs the demo with the teacher served by llama.cpp, or goes on with it: server, probe, recipe (`out`/inputs/recipe.yaml), run.

    The server is there while it is needed, and is gone when this returns or raises. `port` None is the one that the run began with, else PORT; 0 is any
    that is free. Raises StillroomError 'missing-extra', 'server-failed', ResourceError 'port-in-use', RunError, and what a probe and a run raise.
    """
    require("xllamacpp", extra="serve")
    inputs = out.resolve() / "inputs"
    if port is None:
        port = _port_of(out) or PORT
    port = port or serving.free_port()
    recipe = recipe_over(inputs, seed, f"http://{serving.HOST}:{port}/v1")
    found = Run.begin(recipe, out)  # before anything of another run is touched
    if STATES.index(found.state) >= STATES.index("evaluated"):
        return run(recipe, out=out, observer=observer)
    serving.require_free(port)
    written = yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True, width=150)
    with durable.unwritable_reported(out, "--out"):
        demo.prepare(out, seed)
        durable.write_bytes_atomic(inputs / "recipe.yaml", written.encode())
    return _with_server(recipe, out, observer)


def recipe_over(inputs: Path, seed: int, url: str) -> Recipe:
    """The demo's recipe with the teacher behind `url`: the same prompts, student and training, on the likeliest ids of each row."""
    tree = demo.recipe(inputs, seed).model_dump(mode="json", exclude_unset=True)
    changed = {
        "teacher": {"endpoint": {"url": url, "model": _MODEL}, "tokenizer": str(demo.TEACHER)},
        # Nothing behind an address says what it is under: whoever asks has to.
        "terms": {"access": "weights", "licence": "Apache-2.0"},
        "collection": {"max_tokens": _MOST_TOKENS, "in_flight": _IN_FLIGHT},
        "targets": {"k": _ALTERNATIVES},
    }
    return Recipe.from_tree(tree | changed, name="the demo's recipe")


def _port_of(out: Path) -> int | None:
    """The port that the run in `out` began with; None where none has begun."""
    if not (out / "recipe.json").exists():
        return None
    endpoint = Run.open(out).recipe.teacher.endpoint
    return urlsplit(endpoint.url).port if endpoint is not None else None


def _with_server(recipe: Recipe, out: Path, observer: Observer) -> Run:
    endpoint = endpoint_of(recipe)
    observer.stage("serve", f"llama.cpp over the bundled teacher at {endpoint.base_url}, {_SERVED_AT_ONCE} requests at once")
    file = out.resolve() / "inputs" / f"{_MODEL}.gguf"
    load("stillroom.models.export_gguf", extra="train").export_gguf(demo.TEACHER, file)
    settings = serving.ServerSettings(
        port=urlsplit(endpoint.base_url).port or 0, context=_CONTEXT_TOKENS, parallel=_SERVED_AT_ONCE, threads=1, quantize="f32", exact=True
    )
    with serving.started(file, settings, "llama.cpp") as server:
        try:
            wanted = Wanted(index=token_index(demo.TEACHER), overflow_tokens=_OVERFLOW_WORDS)
            probed = probe_endpoint(endpoint, out / "requests.sqlite", wanted, recipe=recipe, observer=observer)
            observer.note(f"signal {probed.signal.kind}: {probed.signal.why}")
            return run(recipe, out=out, observer=observer)
        except CollectError:
            server.require_running()  # its own last words say more than that it does not answer
            raise
