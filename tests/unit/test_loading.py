"""Loading: what a directory says of itself, every way in which one can be broken, and body + head = the model."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.utils import logging

from helpers import FAMILIES, save_tiny, tiny_model, tiny_tokenizer
from stillroom.core.errors import ModelError, StillroomError
from stillroom.models import loading
from stillroom.models.loading import (
    body_of,
    build_from_scratch,
    build_from_teacher,
    config_from_scratch,
    count_parameters,
    describe,
    head_of,
    load_model,
    shape_of,
    skeleton_of,
    teacher_head_arrays,
)

SCRATCH = {"layers": 2, "width": 32, "heads": 2, "feed_forward": 48, "rows": 220, "context_length": 64, "end_id": 0, "pad_id": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    """A copy of a sound directory, to be broken."""
    return Path(shutil.copytree(whole, tmp_path / "broken"))


def refused(directory: Path, code: str) -> str:
    """The text of the error that describing gives; never a traceback of another kind."""
    with pytest.raises(ModelError) as caught:
        describe(str(directory))
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


# -- what a directory says of itself


def test_a_description_agrees_with_the_model_that_was_saved(tmp_path: Path) -> None:
    model = tiny_model("llama", num_key_value_heads=1)
    directory = save_tiny(tmp_path / "model", model=model)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Card\n")
    found = describe(str(directory))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert (found.source, found.revision, found.ref.kind, found.licence) == (str(directory), None, "directory", "apache-2.0")
    assert (found.architecture, found.stored_dtype, found.end_ids) == ("LlamaForCausalLM", "F32", (0,))
    assert found.weight_bytes == (directory / "model.safetensors").stat().st_size
    shape = found.shape
    assert (shape.layers, shape.width, shape.feed_forward, shape.heads, shape.key_value_heads) == (2, 32, 64, 2, 1)
    assert (shape.rows, shape.context_length, shape.tied_embeddings, shape.head_bias) == (220, 128, True, False)


def test_a_description_reads_no_tensor(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = describe(str(whole))
    assert all(p.device.type == "meta" for p in skeleton_of(described.config).parameters())
    assert described.shape == shape_of(load_model(described))


def test_the_digest_is_over_names_and_bytes_of_all_weight_files(whole: Path, broken: Path) -> None:
    digest = hashlib.sha256((whole / "model.safetensors").read_bytes()).hexdigest()
    expected = hashlib.sha256(json.dumps({"model.safetensors": digest}, separators=(",", ":")).encode()).hexdigest()
    assert describe(str(whole)).weights_sha256 == expected == describe(str(broken)).weights_sha256
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "model.safetensors").write_bytes(data)
    assert describe(str(broken)).weights_sha256 != expected


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("no front matter", None),
        ("---\nlicense: other\nlicense_name: llama3.1\n---\n", "llama3.1"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlicense: [\n---\n", None),
        ("---\ntags: []\n---\n", None),
        ("---\nlicense: other\n---\n", None),
    ],
)
def test_the_licence_is_what_the_card_declares(broken: Path, card: str, licence: str | None) -> None:
    (broken / "README.md").write_text(card)
    assert describe(str(broken)).licence == licence


def test_several_end_tokens_come_from_the_generation_config(broken: Path) -> None:
    (broken / "generation_config.json").write_text('{"eos_token_id": [7, 3]}')
    assert describe(str(broken)).end_ids == (3, 7)
    (broken / "generation_config.json").unlink()
    assert describe(str(broken)).end_ids == (0,)


def test_a_sharded_model_is_one_model(tmp_path: Path, whole: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    found = describe(str(tmp_path / "sharded"))
    assert len(found.weight_files) > 1
    assert found.parameters == describe(str(whole)).parameters
    assert all(torch.equal(a, b) for a, b in zip(load_model(found).parameters(), model.parameters(), strict=True))


def test_a_hub_id_is_found_in_the_local_cache(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(whole, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = describe("someone/tiny")
    assert (found.ref.kind, found.revision, found.source) == ("hub", commit, "someone/tiny")
    assert found.weights_sha256 == describe(str(whole)).weights_sha256


# -- every way in which one can be broken


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    # A closed port on this machine: the connection is refused at once, whatever network there is.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError) as caught:
        describe("someone/nothing", "v2")
    assert caught.value.code == "model-missing"
    for part in ("not a directory", "hub could not be reached", "hf download someone/nothing --revision v2", "local cache"):
        assert part in str(caught.value)


class _Answer(BaseHTTPRequestHandler):
    """A hub that knows no repository, as the real one says it."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_hub_that_knows_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(ModelError, match="the hub answered: 404") as caught:
            describe("someone/nothing")
    finally:
        server.shutdown()
    assert caught.value.code == "model-missing"


@pytest.mark.parametrize(
    ("failure", "code"), [(OSError(errno.ENOSPC, "No space left"), "disk-full"), (RuntimeError("it broke off"), "model-missing")]
)
def test_a_transfer_that_breaks_off(failure: Exception, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(StillroomError) as caught:
        describe("someone/something")
    assert caught.value.code == code


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nothing here", "a/b/c"])
def test_neither_a_directory_nor_a_hub_id(source: str) -> None:
    with pytest.raises(ModelError, match="not a directory") as caught:
        describe(source)
    assert caught.value.code == "model-missing"


def test_a_file_is_not_a_directory(whole: Path) -> None:
    with pytest.raises(ModelError, match="it is a file") as caught:
        describe(str(whole / "config.json"))
    assert caught.value.code == "model-missing"


def test_an_empty_directory(tmp_path: Path) -> None:
    assert "no files" in refused(tmp_path, "model-no-weights")


def test_a_directory_without_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    (broken / "training_args.bin").write_bytes(b"not weights")
    assert "config.json" in refused(broken, "model-no-weights")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_is_refused_and_never_loaded(broken: Path, tmp_path: Path, name: str) -> None:
    (broken / "model.safetensors").unlink()
    trap = tmp_path / "it ran"
    # A pickle that would create a file if anything unpickled it.
    (broken / name).write_bytes(b"cos\nmkdir\n(V" + str(trap).encode() + b"\ntR.")
    text = refused(broken, "model-pickle")
    assert name in text
    assert "save_pretrained" in text
    assert not trap.exists()


def test_a_pickle_beside_safetensors_is_not_looked_at(broken: Path, tmp_path: Path) -> None:
    trap = tmp_path / "it ran"
    (broken / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(V" + str(trap).encode() + b"\ntR.")
    load_model(describe(str(broken)))
    assert not trap.exists()


def _cut(data: bytes) -> bytes:
    return data[:-1]


def _with_header(change: Callable[[dict[str, dict[str, object]]], None]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return apply


NORM = "model.norm.weight"
CORRUPTIONS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "three bytes": lambda data: data[:3],
    "a page of HTML": lambda data: b"<!DOCTYPE html><html>Not found</html>",
    "a git-lfs pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 112752\n",
    "cut in the header": lambda data: data[:100],
    "cut by one byte": _cut,
    "cut in half": lambda data: data[: len(data) // 2],
    "a byte too many": lambda data: data + b"\0",
    "a header that is not JSON": lambda data: data[:8] + b"\xff" + data[9:],
    "a header that is a list": lambda data: struct.pack("<Q", 2) + b"[]",
    "a wrong shape": _with_header(lambda header: header[NORM].update(shape=[31])),
    "a negative side": _with_header(lambda header: header[NORM].update(shape=[-32])),
    "an unknown dtype": _with_header(lambda header: header[NORM].update(dtype="F12")),
    "no offsets": _with_header(lambda header: header[NORM].pop("data_offsets")),
    "overlapping tensors": _with_header(lambda header: header[NORM].update(data_offsets=[0, 128])),
    "a tensor that is text": _with_header(lambda header: header.update({NORM: "x"})),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corrupt_file_is_named(broken: Path, kind: str) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(CORRUPTIONS[kind](file.read_bytes()))
    assert str(file) in refused(broken, "model-corrupt")


def test_weights_that_became_corrupt_after_planning(broken: Path) -> None:
    described = describe(str(broken))
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        load_model(described)
    assert caught.value.code == "model-corrupt"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(sharded, "model-corrupt")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": "x.bin"}}']
)
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "index.json" in refused(sharded, "model-corrupt")


def test_a_shard_that_lacks_what_its_index_says(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    shutil.copy(first, second)
    assert second.name in refused(sharded, "model-corrupt")


def test_a_missing_parameter_is_not_made_up(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(broken, "model-corrupt")


def test_a_parameter_of_another_shape_is_not_made_up(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    weights[NORM] = torch.ones(31)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert NORM in refused(broken, "model-corrupt")


def test_weights_that_are_not_finite(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    weights[NORM][3] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    described = describe(str(broken))
    with pytest.raises(ModelError, match="not finite") as caught:
        load_model(described)
    assert caught.value.code == "model-corrupt"


def _configured(directory: Path, **changes: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_no_config(broken: Path) -> None:
    (broken / "config.json").unlink()
    assert "config.json" in refused(broken, "model-unsupported")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"llama"'])
def test_a_config_that_is_none(broken: Path, text: str) -> None:
    (broken / "config.json").write_text(text)
    assert "config.json" in refused(broken, "model-unsupported")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "a-model-of-next-year"}, "a-model-of-next-year"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "t5"),
        ({"model_type": ["llama"]}, "llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"transformers_weights": "adapter_model.bin"}, "transformers_weights"),
        ({"hidden_size": "wide"}, "transformers says"),
        ({"num_attention_heads": 0}, "transformers says"),
    ],
)
def test_a_config_that_cannot_be_used(broken: Path, changes: dict[str, object], says: str) -> None:
    assert says in refused(_configured(broken, **changes), "model-unsupported")


def test_code_from_a_repository_is_never_run(broken: Path, tmp_path: Path) -> None:
    trap = tmp_path / "it ran"
    (broken / "modeling_trap.py").write_text(f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n")
    auto_map = {"AutoConfig": "modeling_trap.Config", "AutoModelForCausalLM": "modeling_trap.Model"}
    assert "never run" in refused(_configured(broken, model_type="trap", auto_map=auto_map), "model-unsupported")
    load_model(describe(str(_configured(broken, model_type="llama", auto_map=auto_map))))
    assert not trap.exists()


def test_an_adapter_is_not_a_model(broken: Path) -> None:
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "merge" in refused(broken, "model-unsupported").lower()


def test_more_weights_than_the_model_has_are_no_harm(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    save_file({**weights, "rotary.inv_freq": torch.ones(3)}, broken / "model.safetensors", metadata={"format": "pt"})
    assert isinstance(load_model(describe(str(broken))), LlamaForCausalLM)


# -- the model


@pytest.mark.parametrize("family", FAMILIES)
def test_body_and_head_are_the_model(family: str, tmp_path: Path) -> None:
    model = load_model(describe(str(save_tiny(tmp_path, family))))
    ids = torch.randint(1, 220, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        for more in ({}, {"attention_mask": mask, "position_ids": positions}):
            states = body_of(model)(input_ids=ids, use_cache=False, **more).last_hidden_state
            expected = model(input_ids=ids, use_cache=False, **more).logits
            assert torch.allclose(head_of(model)(states), expected, rtol=1e-5, atol=1e-5)
            # Row by row, in chunks, is the same: what the engine relies on.
            rows = states.reshape(-1, states.shape[-1])
            parts = torch.cat([head_of(model)(part) for part in rows.split(5)])
            assert torch.allclose(parts, expected.reshape(-1, expected.shape[-1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_arrays_of_a_head_give_its_logits(family: str) -> None:
    model = tiny_model(family, rows=224)
    states = torch.randn((5, 32), generator=torch.Generator().manual_seed(2))
    arrays = teacher_head_arrays(model, 220)
    x = states.double().numpy() @ arrays.weight_VD.double().numpy().T + (0 if arrays.bias_V is None else arrays.bias_V.double().numpy())
    if arrays.softcap is not None:
        x = arrays.softcap * np.tanh(x / arrays.softcap)
    with torch.inference_mode():
        assert np.allclose(arrays.scale * x, head_of(model)(states)[:, :220].numpy(), atol=1e-5)
    assert arrays.weight_VD.shape == (220, 32)
    assert not arrays.weight_VD.requires_grad


def test_the_families_that_need_it_have_a_scale_a_cap_or_a_bias() -> None:
    assert shape_of(tiny_model("gemma2")).softcap == 3.0
    assert shape_of(tiny_model("cohere")).logit_scale == 0.25
    assert shape_of(tiny_model("granite")).logit_scale == 1 / 8
    assert shape_of(tiny_model("phi")).head_bias
    assert shape_of(tiny_model("llama")).softcap is None


def test_a_head_that_does_more_than_is_known_is_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaForCausalLM.forward

    def shifted(self: LlamaForCausalLM, *args: object, **kwargs: object) -> object:
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", shifted)
    with pytest.raises(ModelError, match="not what its head makes") as caught:
        load_model(describe(str(whole)))
    assert caught.value.code == "model-unsupported"


def test_loading_is_silent_and_changes_no_global_state(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled(), dict(os.environ)
    model = load_model(describe(str(whole)), torch.bfloat16)
    assert (model.dtype, model.training) == (torch.bfloat16, False)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), dict(os.environ)) == before[1:]


# -- a student that is not on disk


def test_from_scratch_is_a_function_of_its_seed_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (build_from_scratch(**SCRATCH, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert first.lm_head.weight.shape == (220, 32)


def test_parameters_are_counted_without_memory() -> None:
    skeleton = skeleton_of(config_from_scratch(**SCRATCH))
    layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert count_parameters(skeleton) == 220 * 32 + 2 * layer + 32 == count_parameters(build_from_scratch(**SCRATCH, seed=0))
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert shape_of(skeleton).tied_embeddings


@pytest.mark.parametrize(
    ("change", "says"), [({"width": 33}, "divide"), ({"width": 34, "heads": 34}, "even"), ({"layers": 0}, "layers"), ({"heads": 0}, "heads")]
)
def test_a_shape_that_cannot_be(change: dict[str, int], says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        build_from_scratch(**(SCRATCH | change), seed=0)
    assert caught.value.code == "student-shape"


@pytest.mark.parametrize("family", FAMILIES)
def test_from_all_layers_of_the_teacher_is_the_teacher(family: str, tmp_path: Path) -> None:
    teacher = load_model(describe(str(save_tiny(tmp_path, family, layers=3))))
    student = build_from_teacher(teacher, [0, 1, 2])
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(student(ids).logits, teacher(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_teacher_takes_the_chosen_layers_in_order(family: str) -> None:
    teacher = tiny_model(family, layers=4)
    student = build_from_teacher(teacher, [3, 1])
    assert student.config.num_hidden_layers == 2
    old, new = teacher.state_dict(), student.state_dict()
    prefix = loading._layers_prefix(teacher)
    for name, tensor in new.items():
        source = name.replace(f"{prefix}0.", f"{prefix}X.").replace(f"{prefix}1.", f"{prefix}1.").replace(f"{prefix}X.", f"{prefix}3.")
        assert torch.equal(tensor, old[source]), name
        assert tensor.data_ptr() != old[source].data_ptr()


def test_from_teacher_keeps_what_each_layer_was() -> None:
    teacher = tiny_model("gemma2", layers=4, sliding_window=3)
    assert teacher.config.layer_types == ["sliding_attention", "full_attention"] * 2
    student = build_from_teacher(teacher, [1, 2])
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert teacher.config.num_hidden_layers == 4


def test_from_teacher_may_repeat_a_layer_and_loads_from_a_description(whole: Path) -> None:
    student = build_from_teacher(describe(str(whole)), [1, 1])
    parameters = dict(student.named_parameters())
    assert torch.equal(parameters["model.layers.0.mlp.up_proj.weight"], parameters["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("layers", [[2], [-1], [0, 9], []])
def test_layers_that_the_teacher_lacks(layers: list[int]) -> None:
    with pytest.raises(ModelError) as caught:
        build_from_teacher(tiny_model("llama"), layers)
    assert caught.value.code == "student-shape"


def test_a_teacher_from_an_older_tokenizer_keeps_its_padded_rows(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    directory = save_tiny(tmp_path, tokenizer=tokenizer, model=tiny_model("llama", rows=len(tokenizer) + 36))
    assert describe(str(directory)).shape.rows == len(tokenizer) + 36
