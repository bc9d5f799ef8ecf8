"""What the probe finds on servers that are here: llama.cpp over the bundled teacher, and the rehearsal endpoint in its honest form.

    python benchmarks/servers.py

docs/reference/servers.md is written from the newest result, and a test holds a server of today to it.
"""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from _common import finish, parser
from stillroom import demo
from stillroom.collect.logprobs import TokenIndex
from stillroom.collect.wire import Endpoint
from stillroom.models.export_gguf import export_gguf
from stillroom.models.serving import ServerSettings, started
from stillroom.runs.probing import Wanted, probe_endpoint, token_index
from stillroom.testing.fake_endpoint import fake_endpoint

CAVEATS = (
    "No hosted provider was asked.",
    "Findings are of one model behind each server, of one version of it, and of the settings named.",
)
# Words that are sent to see what happens past the context: more than the teacher's 256 tokens, and than the rehearsal endpoint's 4,096.
LLAMA_WORDS, REHEARSAL_WORDS = 600, 6_000


def main() -> None:
    given = parser(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory(prefix="stillroom-bench-") as folder:
        servers = [_llama(Path(folder)), _rehearsal(Path(folder))]
    finish("servers", {"servers": servers}, caveats=CAVEATS, as_json=given.json)


def _llama(folder: Path) -> dict[str, Any]:
    file = folder / "teacher.gguf"
    export_gguf(demo.TEACHER, file)
    settings = ServerSettings(context=256, parallel=4, exact=True)
    with started(file, settings, "llama.cpp") as server:
        found = _findings(server.base_url, server.model, folder / "llama.sqlite", LLAMA_WORDS, token_index(demo.TEACHER))
    return {
        "name": "llama.cpp",
        "version": f"xllamacpp {metadata.version('xllamacpp')}",
        "model": "the bundled teacher, float32",
        "settings": "4 requests at once of 256 tokens each, cache in float32, attention unfused; its tokenizer is known",
        **found,
    }


def _rehearsal(folder: Path) -> dict[str, Any]:
    with fake_endpoint() as server:
        found = _findings(server.base_url, "fake-teacher", folder / "fake.sqlite", REHEARSAL_WORDS, None)
    return {
        "name": "the rehearsal endpoint",
        "version": f"stillroom {metadata.version('stillroom')}",
        "model": "fake-teacher",
        "settings": "as it is without a file of settings: it does not lie; its tokenizer is not known",
        **found,
    }


def _findings(url: str, model: str, store: Path, words: int, index: TokenIndex | None) -> dict[str, Any]:
    wanted = Wanted(index=index, overflow_tokens=words)
    probed = probe_endpoint(Endpoint.parse(url, model), store, wanted, access="weights", licence="apache-2.0" if index else "own")
    kept = [{name: getattr(finding, name) for name in ("name", "verdict", "value", "evidence")} for finding in probed.report.findings]
    signal = probed.signal
    return {
        "calls": probed.report.calls,
        "signal": {"kind": signal.kind, "k": signal.k, "reported": signal.reported, "why": signal.why},
        "findings": kept,
    }


if __name__ == "__main__":
    main()
