"""Run in a process of its own (`python -m stillroom.models.llama_child SETTINGS`): llama.cpp's server over one GGUF file, until standard input ends.

SETTINGS is one JSON object, `serving.llama_settings`. Prints the address as one line once the server answers; llama.cpp's messages go to standard
error. A process of its own, because llama.cpp ends the process it is in where a file surprises it. Standard input is a pipe that the parent holds:
it ends when the parent does, however that dies.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import xllamacpp


def parameters(settings: dict[str, Any]) -> Any:
    """llama.cpp's parameters; what is not set here is its default."""
    params = xllamacpp.CommonParams()
    params.model.path = settings["file"]
    params.model_alias = {settings["name"]}
    params.hostnames = [settings["host"]]
    params.port = settings["port"]
    # Its own context is shared out among the requests that run at once; 0 stands for the model's.
    params.n_ctx = settings["context"] * settings["parallel"]
    params.n_parallel = settings["parallel"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.use_jinja = True
    params.warmup = False
    params.verbosity = settings["verbosity"]
    # No page of another site that is open in a browser may ask it.
    params.cors_origins = ""
    params.ui = False
    if settings["exact"]:
        # Its defaults are a float16 cache and, where it can, fused attention in float16.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params


def main() -> None:
    """Serves until standard input ends."""
    try:
        server = xllamacpp.Server(parameters(json.loads(sys.argv[1])))
    except RuntimeError as error:  # what it says before is on standard error
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    print(server.listening_address, flush=True)
    sys.stdin.buffer.read()
    # Requests under way are not waited for: whoever stops the server has said so.
    os._exit(0)


if __name__ == "__main__":
    main()
