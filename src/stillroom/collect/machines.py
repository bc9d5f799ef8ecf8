"""One collection on several machines: each has a store of its own and buys one range of the calls' keys; then their stores become one.

`merge_stores` works on files that nobody is using. It copies the shards of log-probabilities first and takes over what stores say after, so that what a
store names is always there; broken off and given again it goes on, and what was taken over before counts once.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Sequence
from pathlib import Path

from stillroom.collect.merging import Merged
from stillroom.collect.store import RequestStore
from stillroom.collect.wire import Endpoint
from stillroom.core import durable
from stillroom.core.errors import RequestStoreError


def logprobs_directory(store: Path) -> Path:
    """Where the shards of a store's log-probabilities are."""
    return store.with_name(f"{store.stem}-logprobs")


def merge_stores(sources: Sequence[Path], into: Path) -> Merged:
    """Takes what is in `sources`, and the shards beside them, into the store `into`, which is made where there is none.

    Raises RequestStoreError 'request-stores-differ', before anything is changed, where the stores are of different endpoints, a shard is not there, or
    two different shards have one name; and as RequestStore.open does. Answers that differ are told in `Merged.conflicts`, and `into` keeps its own.
    """
    copies = _copies(sources, into)
    into.parent.mkdir(parents=True, exist_ok=True)
    for source, target in copies:
        target.parent.mkdir(exist_ok=True)
        with durable.whole_file(target) as place:
            shutil.copyfile(source, place)
    with RequestStore.open(into) as store:
        return store.merge(sources)


def _copies(sources: Sequence[Path], into: Path) -> list[tuple[Path, Path]]:
    """The shards that are to be copied, and where to."""
    asked: dict[str, tuple[Path, Endpoint]] = {}
    copies: dict[Path, Path] = {}
    for path in sources:
        if path.resolve() == into.resolve():
            raise _differ(f"{path} is among the stores to be merged, and what they are merged into", do="Give another file after --into.")
        if not path.is_file():
            raise RequestStoreError("request-store-other", found=f"no file {path}", expected="a request store", do="Name the .sqlite files.")
    for path in (*sources, *([into] if into.is_file() else [])):
        with RequestStore.open(path) as store:
            endpoints, shards = store.asked(), store.shards()
        for endpoint in endpoints:
            asked.setdefault(str(sorted(endpoint.identity.items())), (path, endpoint))
        for name in shards if path in sources else ():
            _add_copy(copies, path, logprobs_directory(path) / name, logprobs_directory(into) / name)
    if len(asked) > 1:
        told = "; ".join(f"{path} of {endpoint.model!r} at {endpoint.base_url}, {endpoint.route} route" for path, endpoint in asked.values())
        raise _differ(told, expected="stores of one endpoint", do="Merge only what one run collected; --into a new file, if that is what differs.")
    return [(source, target) for target, source in copies.items() if not target.exists()]


def _add_copy(copies: dict[Path, Path], store: Path, source: Path, target: Path) -> None:
    if not source.is_file():
        raise _differ(
            f"{store} has log-probabilities in {source}, which is not there",
            expected="the store together with the directory beside it",
            do=f"Copy {source.parent.name}/ from that machine too.",
        )
    for other in (copies.get(target), target if target.exists() else None):
        if other is not None and not filecmp.cmp(source, other, shallow=False):
            raise _differ(
                f"{source} and {other} have one name and are not the same",
                expected="machines that bought different calls",
                do="Give each machine a range of its own (--shard 1/2, --shard 2/2); what was bought twice cannot be merged.",
            )
    copies.setdefault(target, source)


def _differ(found: str, *, do: str, expected: str = "stores of one collection") -> RequestStoreError:
    return RequestStoreError("request-stores-differ", found=found, expected=expected, why="nothing was changed", do=do)
