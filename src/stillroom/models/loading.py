"""From a name to a model: what it is, before its weights are read; then the model; then its body and its head.

No code of a model's repository is ever run and no pickle is ever read: architectures come from `transformers`, weights from safetensors.
V vocabulary rows, D width, R rows of hidden states.
"""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stillroom.core.cards import declared_licence
from stillroom.core.errors import ModelError, ResourceError
from stillroom.core.hashing import sha256_files
from stillroom.core.identities import ModelRef
from stillroom.models.weight_files import find_weights, stored_dtype
from stillroom.targets.kinds import TeacherHead

T = TypeVar("T")

# What of a hub repository is fetched: no pickles, no other frameworks, nothing from subfolders.
_FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md"]
_NOT_FETCHED = ["*/*", "consolidated*"]
# Names that families give to a factor on the logits (True: they divide by it), and to a soft cap on them.
_SCALES = {"logit_scale": False, "logits_scaling": True, "lm_head_multiplier": False}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_PROBE_IDS = 8
# What the name of a model's attention begins with once `models.packing` stands before it. None of the names that transformers looks for ("flash",
# "paged") are in it.
PACKED = "stillroom_packed_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that memory and time depend on. `rows` is the width of the logits; `softcap` and `logit_scale` are what the family does to them."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    key_value_heads: int
    head_dimension: int
    rows: int
    context_length: int | None
    tied_embeddings: bool
    head_bias: bool
    logit_scale: float
    softcap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """A model as its files describe it, none of its tensors read.

    `parameters` counts shared ones once; `weights_sha256` is over the names and bytes of all weight files; `end_ids` are the ids at which its
    own generation config says that an answer ends; `stored_dtype` is safetensors' name of the dtype on disk.
    """

    ref: ModelRef
    directory: Path
    config: PretrainedConfig
    shape: ModelShape
    weight_files: tuple[Path, ...]
    weight_bytes: int
    stored_dtype: str
    end_ids: tuple[int, ...]

    @property
    def source(self) -> str:
        return self.ref.source

    @property
    def revision(self) -> str | None:
        return self.ref.revision

    @property
    def parameters(self) -> int:
        assert self.ref.parameters is not None
        return self.ref.parameters

    @property
    def weights_sha256(self) -> str | None:
        return self.ref.weights_sha256

    @property
    def licence(self) -> str | None:
        return self.ref.licence

    @property
    def architecture(self) -> str:
        assert self.ref.architecture is not None
        return self.ref.architecture


@dataclass(frozen=True, slots=True)
class OutputHead:
    """What turns hidden states (after the final norm) into logits: scale * softcap(module(states)), softcap c meaning c * tanh(x / c)."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, states_RD: torch.Tensor) -> torch.Tensor:
        """Logits of any leading shape, last dimension V (all rows, padding included)."""
        logits_RV: torch.Tensor = self.module(states_RD)
        if self.softcap is not None:
            logits_RV = torch.tanh(logits_RV / self.softcap) * self.softcap
        return logits_RV if self.scale == 1.0 else logits_RV * self.scale

    @property
    def weight_VD(self) -> torch.Tensor:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def bias_V(self) -> torch.Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, torch.Tensor) else None


# -- what it is -------------------------------------------------------------------------------------------------------


def describe(source: str, revision: str | None = None) -> ModelDescription:
    """Resolves a directory or a hub id and reads everything but the tensors' values (their bytes are hashed).

    Raises ModelError: 'model-missing', 'model-no-weights', 'model-pickle', 'model-corrupt', 'model-unsupported'.
    """
    directory, commit = resolve(source, revision)
    files = find_weights(directory)
    config = _read_config(directory)
    skeleton = _from_pretrained(directory, config, device_map="meta")
    ref = ModelRef(
        source=source,
        kind="directory" if commit is None else "hub",
        revision=commit,
        weights_sha256=sha256_files({file.name: file for file in files}),
        architecture=type(skeleton).__name__,
        parameters=count_parameters(skeleton),
        licence=declared_licence(directory),
    )
    return ModelDescription(
        ref=ref,
        directory=directory,
        config=config,
        shape=shape_of(skeleton),
        weight_files=tuple(files),
        weight_bytes=sum(file.stat().st_size for file in files),
        stored_dtype=stored_dtype(files),
        end_ids=_end_ids(directory, config),
    )


def resolve(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The local directory of a source, and the commit where it is a hub id. Fetches what is not in the hub's cache yet, never a pickle."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve(), None
    download = f"hf download {source}" + (f" --revision {revision}" if revision else "")
    try:
        with silence():
            snapshot = huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED)
    except hub_errors.HFValidationError as error:
        reason = "it is a file" if path.exists() else "it does not exist"
        raise _missing(source, f"it is not a directory ({reason}), and not a hub id (owner/name) either", "Check the path.") from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError) as error:
        found = f"it is not a directory, and the hub answered: {_first_line(error)}"
        raise _missing(source, found, "Check the path, or the hub id and its revision; for a gated model, log in with `hf auth login`.") from error
    except hub_errors.LocalEntryNotFoundError as error:
        found = "it is not a directory, and as a hub id it is not in the local cache and the hub could not be reached"
        do = f"Check the path; or, with a connection, `{download}`, then run this again; or copy the model here and give its directory."
        raise _missing(source, found, do) from error
    except Exception as error:  # a transfer that broke off in one of the several ways that its libraries have
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            found = f"the disk filled up while {source!r} was fetched from the hub"
            raise ResourceError("disk-full", found=found, do="Free some space, or set HF_HOME to a directory on another disk.") from error
        found = f"it is not a directory, and fetching it from the hub failed: {type(error).__name__}: {_first_line(error)}"
        raise _missing(source, found, f"Run this again, or try `{download}`.") from error
    directory = Path(snapshot)
    return directory, directory.name


def _missing(source: str, reason: str, do: str) -> ModelError:
    return ModelError("model-missing", found=f"{source!r}: {reason}", expected="a Hugging Face directory, or the id of a model on the hub", do=do)


def _read_config(directory: Path) -> PretrainedConfig:
    """The configuration, if it is that of a causal language model which `transformers` itself knows."""
    path = directory / "config.json"
    version = transformers.__version__
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unsupported(
            f"{directory} without a readable config.json ({error.strerror or error})", "Copy the model's config.json there."
        ) from error
    except ValueError as error:
        raise _unsupported(f"{path}, which is not JSON ({_first_line(error)})", "Fetch or write config.json again.") from error
    model_type = tree.get("model_type") if isinstance(tree, dict) else None
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own_code = " and brings code of its own, which is never run" if isinstance(tree, dict) and "auto_map" in tree else ""
        raise _unsupported(
            f"{path} with model_type {model_type!r}, which transformers {version} does not know as a causal language model{own_code}",
            "Use a decoder-only model that transformers knows, or install a transformers that knows it.",
        )
    _refuse_what_is_no_plain_model(directory, tree)
    config: PretrainedConfig = _guarded(path, lambda: AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True))
    return config


def _refuse_what_is_no_plain_model(directory: Path, tree: dict[str, Any]) -> None:
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[tree["model_type"]]
    names = {known} if isinstance(known, str) else set(known)
    saved_as = tree.get("architectures") or []
    if saved_as and not names & set(saved_as):
        found = (
            f"{directory} saved as {', '.join(map(str, saved_as))}, which is not the causal language model of its type ({', '.join(sorted(names))})"
        )
        raise _unsupported(found, "Use the checkpoint of the language model.")
    if tree.get("quantization_config"):
        raise _unsupported(f"{directory} with quantised weights", "Use the model's unquantised weights.")
    if tree.get("transformers_weights"):
        raise _unsupported(f"{directory}, whose config.json names a weights file of its own", "Remove transformers_weights from config.json.")
    if (directory / "adapter_config.json").is_file():
        raise _unsupported(
            f"{directory} with an adapter", "Merge it into its base model (peft's merge_and_unload), save that, and give its directory."
        )


def _unsupported(found: str, do: str) -> ModelError:
    return ModelError("model-unsupported", found=found, expected="a decoder-only language model in transformers' own architecture", do=do)


def _end_ids(directory: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """From generation_config.json, else config.json; () where neither names any."""
    end: Any = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    with suppress(OSError, ValueError, AttributeError):
        end = json.loads((directory / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id", end)
    ids = end if isinstance(end, list) else [end]
    return tuple(sorted({i for i in ids if isinstance(i, int)}))


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The sizes of a model (weights not needed: one on the meta device will do)."""
    config = model.config.get_text_config(decoder=True)
    head = head_of(model)
    width = int(config.hidden_size)
    heads = int(config.num_attention_heads)
    return ModelShape(
        layers=int(config.num_hidden_layers),
        width=width,
        feed_forward=_first_int(config, ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")) or 4 * width,
        heads=heads,
        key_value_heads=_first_int(config, ("num_key_value_heads",)) or heads,
        head_dimension=_first_int(config, ("head_dim",)) or width // heads,
        rows=head.weight_VD.shape[0],
        context_length=_first_int(config, ("max_position_embeddings", "seq_length", "max_seq_len")),
        tied_embeddings=model.get_input_embeddings().weight is head.weight_VD,
        head_bias=head.bias_V is not None,
        logit_scale=head.scale,
        softcap=head.softcap,
    )


def _first_int(config: PretrainedConfig, names: Sequence[str]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def count_parameters(model: nn.Module) -> int:
    """Parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


# -- the model --------------------------------------------------------------------------------------------------------


def load_model(description: ModelDescription, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model in evaluation mode, every parameter from its files, and proved to be head_of(model)(body_of(model)(ids)).

    Raises ModelError: 'model-corrupt' where a weight is missing, of another shape, or not finite; 'model-unsupported' where its logits are not
    what its head makes of its last hidden states.
    """
    find_weights(description.directory)
    model = _from_pretrained(description.directory, description.config, dtype=dtype)
    nn.Module.to(model, device)
    model.eval()
    prove_split(model, description.source)
    return model


def _from_pretrained(directory: Path, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """`transformers` initialises what a checkpoint lacks at random and only warns; here that is an error."""
    options |= _attention(config)
    # from_pretrained may write into the config it is given.
    own = type(config).from_dict(config.to_dict())
    with torch.random.fork_rng(devices=[]):
        loaded: Any = _guarded(
            directory,
            lambda: AutoModelForCausalLM.from_pretrained(
                directory,
                config=own,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            ),
        )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing or mismatched:
        faults = ((missing, "missing"), (mismatched, "of another shape"))
        what = " and ".join(f"{len(names)} {fault} ({names[0]}{', ...' * (len(names) > 1)})" for names, fault in faults if names)
        raise ModelError(
            "model-corrupt",
            found=f"{directory}, in whose weights parameters that config.json describes are wrong: {what}",
            expected="one tensor of the right shape for each parameter",
            why="the others would be random numbers",
            do="Fetch or copy the model again, config.json and weights from the same place.",
        )
    assert isinstance(model, PreTrainedModel)
    return model


def _attention(config: PretrainedConfig) -> dict[str, str]:
    # Gemma 2 caps its attention logits, which PyTorch's fused attention cannot do.
    return {} if getattr(config, "attn_logit_softcapping", None) is None else {"attn_implementation": "eager"}


def _guarded(what: Path, action: Callable[[], T]) -> T:
    """Runs third-party code over a user's files: whatever it raises is said of those files."""
    try:
        with silence():
            return action()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = f"{what}, of which transformers says: {type(error).__name__}: {_first_line(error)}"
        raise _unsupported(found, "Check config.json, and that this version of transformers knows the model.") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def silence() -> Iterator[None]:
    """No progress bars and no log lines from transformers and huggingface_hub; their settings are as before afterwards."""
    logging = transformers.utils.logging
    verbosity, bars, fetching_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    advisory = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    disable_progress_bars()
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if fetching_bars:
            enable_progress_bars()
        if advisory is None:
            os.environ.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS", None)
        else:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = advisory


# Not in inference mode: the parameters that a student in parts fetches here for the first time are those that it learns with.
@torch.no_grad()
def prove_split(model: PreTrainedModel, source: str) -> None:
    """A few tokens through the model, and through its body and then its head: the same logits, and finite ones. Raises as `load_model`."""
    rows = head_of(model).weight_VD.shape[0]
    ids_BT = (torch.arange(_PROBE_IDS, device=model.device) % rows)[None]
    with silence():
        whole = model(input_ids=ids_BT, use_cache=False).logits.float()
        split = head_of(model)(body_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state).float()
    if not bool(torch.isfinite(whole).all()):
        raise ModelError(
            "model-corrupt",
            found=f"{source!r} gives logits that are not finite",
            expected="numbers",
            do="Fetch or copy the weights again, or use float32.",
        )
    # The same operations in the same order, but for the factor's place: the rounding of the dtype decides.
    allowed = 8 * torch.finfo(model.dtype).eps * float(whole.abs().max())
    if whole.shape != split.shape or float((whole - split).abs().max()) > allowed:
        raise ModelError(
            "model-unsupported",
            found=f"{source!r} ({type(model).__name__}), whose logits are not what its head makes of its last hidden states",
            expected="logits = scale * softcap(head(states))",
            do="Use another model, or report this architecture.",
        )


# -- a student that is not on disk ------------------------------------------------------------------------------------


def config_from_scratch(
    *, layers: int, width: int, heads: int, feed_forward: int, rows: int, context_length: int, end_id: int | None, pad_id: int | None
) -> LlamaConfig:
    """A Llama with tied embeddings and full attention heads. Raises ModelError 'student-shape' for a shape that cannot be."""
    sizes = {"layers": layers, "width": width, "heads": heads, "feed_forward": feed_forward, "rows": rows, "context_length": context_length}
    for name, value in sizes.items():
        if value < 1:
            raise _bad_shape(f"{name} = {value}", "at least 1", f"Set {name} to a positive number.")
    if width % heads:
        lower, upper = width // heads * heads, (width // heads + 1) * heads
        raise _bad_shape(
            f"width {width} with {heads} heads", "a width that the heads divide", f"Set width to {lower or upper} or {upper}, or change heads."
        )
    if width // heads % 2:
        raise _bad_shape(
            f"heads of dimension {width // heads} (width {width}, {heads} heads)",
            "an even dimension, since rotary positions turn pairs of numbers",
            f"Set width to a multiple of {2 * heads}.",
        )
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )


def skeleton_of(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device: shapes without memory, for `shape_of` and `count_parameters`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    return model


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The float32 model of a configuration: parameters on the meta device, which have shapes and no memory, and buffers as the model computes them."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # Parameters that are tied must stay one: what is there already is not made again.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    try:
        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32, **_attention(config))
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
    assert isinstance(model, PreTrainedModel)
    return model


def build_from_scratch(
    *, layers: int, width: int, heads: int, feed_forward: int, rows: int, context_length: int, end_id: int | None, pad_id: int | None, seed: int
) -> LlamaForCausalLM:
    """A Llama with random weights (float32, CPU, evaluation mode) that are a function of the arguments; the global generator is as before."""
    config = config_from_scratch(
        layers=layers, width=width, heads=heads, feed_forward=feed_forward, rows=rows, context_length=context_length, end_id=end_id, pad_id=pad_id
    )
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every device, and only the CPU's generator is put back.
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.float().eval()
    return model


def build_from_teacher(teacher: PreTrainedModel | ModelDescription, layers: Sequence[int]) -> PreTrainedModel:
    """A model of the teacher's architecture with its embeddings, final norm, head and the chosen layers, in that order; it shares no memory.

    Evaluation mode, on the CPU, in float32. Raises ModelError 'student-shape' (an index out of range, none at all) or 'model-unsupported' (a
    decoder whose layers are not one list of equals).
    """
    model = load_model(teacher) if isinstance(teacher, ModelDescription) else teacher
    config = config_from_teacher(model.config, layers)
    prefix = _layers_prefix(model)
    place = {old: [new for new, chosen in enumerate(layers) if chosen == old] for old in layers}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(prefix):
            weights[name] = tensor
            continue
        index, _, rest = name.removeprefix(prefix).partition(".")
        for new in place.get(int(index), ()):
            weights[f"{prefix}{new}.{rest}"] = tensor
    # Not written in a configuration, and not a matter of taste where a family caps its attention logits.
    config._attn_implementation = own_attention(model.config)
    with torch.random.fork_rng(devices=[]):
        student = type(model)(config)
    student.float().eval()
    try:
        student.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise _unsupported(f"{type(model).__name__}, whose layers {list(layers)} do not make a model", "Use from_scratch instead.") from error
    student.generation_config = copy.deepcopy(model.generation_config)
    return student


def config_from_teacher(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The teacher's configuration for the chosen layers. Raises ModelError 'student-shape'."""
    had = int(config.num_hidden_layers)
    wrong = [index for index in layers if not 0 <= index < had]
    if wrong or not layers:
        raise _bad_shape(
            f"layers {list(layers)} of a teacher with {had}",
            f"indices from 0 to {had - 1}, at least one",
            f"Leave out {wrong or 'nothing'}; count from 0.",
        )
    tree = config.to_dict()
    for key, value in tree.items():
        # One entry for each layer (layer_types and its like).
        if isinstance(value, list) and len(value) == had and key.startswith(("layer", "no_rope")):
            tree[key] = [value[index] for index in layers]
    tree[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    # Layer types were chosen by pattern at first; the list just taken is what holds now.
    chosen = type(config).from_dict(tree)
    assert isinstance(chosen, PretrainedConfig)
    return chosen


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers. Raises ModelError 'model-unsupported' where they are not one list."""
    layers = model.get_submodule(_layers_prefix(model).removesuffix("."))
    assert isinstance(layers, nn.ModuleList)
    return layers


def _layers_prefix(model: PreTrainedModel) -> str:
    """Where the decoder's layers are in the state dict ("model.layers.")."""
    count = int(model.config.num_hidden_layers)
    inside = {id(module) for module in body_of(model).modules()}
    found: list[str] = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in inside
    ]
    outermost = [name for name in found if not any(name.startswith(other + ".") for other in found if other != name)]
    if len(outermost) != 1:
        raise _unsupported(f"{type(model).__name__}, whose decoder layers are not one list of {count}", "Use from_scratch instead.")
    return outermost[0] + "."


def _bad_shape(found: str, expected: str, do: str) -> ModelError:
    return ModelError("student-shape", found=found, expected=expected, do=do)


# -- body and head ----------------------------------------------------------------------------------------------------


def body_of(model: PreTrainedModel) -> nn.Module:
    """The decoder without its head: what is a model to tokens, and gives hidden states.

    body(input_ids=..., attention_mask=..., position_ids=..., use_cache=False).last_hidden_state is what the unmodified forward pass feeds its
    head. Raises ModelError 'model-unsupported'.
    """
    body = model.get_decoder()
    if not isinstance(body, nn.Module) or body is model:
        raise _unsupported(f"{type(model).__name__}, which has no decoder apart from its head", "Use another model.")
    return body


def own_attention(config: PretrainedConfig) -> str | None:
    """The attention that a model came with, where `models.packing` has put its own before it."""
    name = config._attn_implementation
    return None if name is None else str(name).removeprefix(PACKED)


def head_of(model: PreTrainedModel) -> OutputHead:
    """The head, with the factor and soft cap of families that have one (Gemma 2, Cohere, Granite). Raises ModelError 'model-unsupported'."""
    module = model.get_output_embeddings()
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        raise _unsupported(f"{type(model).__name__}, which has no output embeddings", "Use another model.")
    assert isinstance(module, nn.Module)
    config = model.config.get_text_config(decoder=True)
    scale = 1.0
    for name, divides in _SCALES.items():
        factor = getattr(config, name, None)
        if isinstance(factor, int | float) and factor:
            scale = 1.0 / factor if divides else float(factor)
    cap = next((value for name in _SOFTCAPS if (value := getattr(config, name, None))), None)
    return OutputHead(module, scale, None if cap is None else float(cap))


def teacher_head_arrays(model: PreTrainedModel, size: int) -> TeacherHead:
    """The head of a teacher over its `size` real tokens: detached tensors on the model's device (V = size), bfloat16 where the teacher computes in it,
    else float32.
    """
    head = head_of(model)
    bias_V = head.bias_V
    dtype = torch.bfloat16 if head.weight_VD.dtype == torch.bfloat16 else torch.float32
    return TeacherHead(
        weight_VD=head.weight_VD.detach()[:size].to(dtype),
        bias_V=None if bias_V is None else bias_V.detach()[:size].to(dtype),
        scale=head.scale,
        softcap=head.softcap,
    )
