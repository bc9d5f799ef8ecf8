"""Every error a user can meet, in one hierarchy.

    StillroomError                 exit 2    something the user can mend: recipe, files, models, disk
    |- RecipeError                           the recipe itself
    |- DataError                             prompts, labelled items, transfer sets
    |- ModelError                            a teacher or a student that cannot be loaded or used
    |- VocabularyError                       two tokenizers that do not mean the same thing
    |- StoreError                            targets on disk: corrupt, or of something else
    |- LedgerError                           a ledger that does not verify
    |- RunError                              the run directory: locked, of another recipe, out of order
    |- ResourceError                         disk, memory, devices, ports and paths that cannot be used
    |- SpendError                            prices and caps of what is bought from an endpoint
    |- SpendCapReached                       the next call could go over a cap
    |- RequestStoreError                     requests on disk: corrupt, in use, of something else
    |- DivergedError                         the loss became NaN or infinite
    |- CollectError                          endpoints, requests to them, and what they answer
    |- GuardError                            keys, plans, evidence and records of the guard
    |- EntitlementError                      terms records, confirmations and authorisations that cannot be used
    |- EntitlementDenied           exit 4    the teacher's terms forbid it
    |- EntitlementUnknown          exit 5    a fact is missing; the question is in the message
    `- Interrupted                 exit 130  stopped by Ctrl-C, resumable

Each is raised with a stable `code` from `CODES`; docs/reference/errors.md has an anchor for each (a test compares the two).
"""

from __future__ import annotations

CODES: dict[str, str] = {
    "recipe-missing": "The recipe file does not exist or cannot be read.",
    "recipe-syntax": "The recipe is not valid YAML.",
    "recipe-unknown-key": "The recipe has a key that Stillroom does not know.",
    "recipe-invalid": "A value in the recipe is missing, of the wrong type or out of range.",
    "prompts-missing": "The prompts file does not exist or cannot be read.",
    "prompts-changed": "The prompts are not those that the run began with.",
    "prompts-empty": "There are no prompts.",
    "prompts-invalid": "A line or column of the prompts is not what was expected.",
    "items-invalid": "A labelled or evaluation item is not what was expected.",
    "verifier-invalid": "The rule that answers are verified by cannot be used.",
    "curation-changed": "Answers would be curated by other rules than the run was planned with.",
    "redaction-table": "The table of what was replaced in prompts cannot be used.",
    "sequence-too-long": "A sequence is longer than the model's context.",
    "model-missing": "The model directory does not exist, or the hub cannot be reached.",
    "model-no-weights": "The model directory has no weights.",
    "model-corrupt": "The model's weights cannot be read.",
    "model-no-tokenizer": "The model directory has no tokenizer.",
    "model-no-chat-template": "Chat messages were given, but the teacher has no chat template.",
    "model-unsupported": "The model's architecture or configuration cannot be used here.",
    "model-pickle": "The weights are only there as a pickle, which is never loaded.",
    "packing-unsupported": "A model cannot take sequences that are laid end to end.",
    "lora-targets": "The layers that adapters were asked for are not in the student.",
    "student-shape": "The student cannot be built in the shape asked for.",
    "vocabulary-mismatch": "Teacher and student do not have the same vocabulary.",
    "targets-unsupported": "The objective cannot be computed from the targets chosen.",
    "trainer-unsupported": "A Hugging Face Trainer cannot be given this objective, or does not say what it needs.",
    "store-corrupt": "The target store does not match its checksums.",
    "store-mismatch": "The target store was made by another teacher, tokenizer, template, codec or temperature.",
    "transfer-set-empty": "No record was left to learn from.",
    "transfer-set-corrupt": "The transfer set does not match its own hash or its records.",
    "ledger-corrupt": "The ledger's chain of hashes is broken.",
    "ledger-unknown-record": "A record was to be used that the ledger has no collect entry for.",
    "run-other-recipe": "The output directory belongs to another recipe.",
    "run-locked": "Another process is using the output directory.",
    "run-not-a-run": "The directory is not a run directory, or the stage before this one has not been done.",
    "run-corrupt": "A file of the run directory cannot be read.",
    "disk-full": "There is not enough disk space.",
    "path-unwritable": "A file or directory cannot be written where it was asked for.",
    "out-of-memory": "A single sequence does not fit into memory.",
    "device-unavailable": "The device asked for is not there.",
    "compiler-unavailable": "torch.compile does not work on this machine.",
    "parallel-unavailable": "The processes that were started cannot train together in the way asked for.",
    "process-lost": "Another process of the run ended before its time.",
    "processes-differ": "The processes of a run do not start from the same state.",
    "prices-invalid": "A file of prices is not what was expected.",
    "price-unknown": "A cap in money was set for a model whose price is not known.",
    "spend-cap-missing": "Nothing bounds what may be spent.",
    "spend-cap-invalid": "A cap is not an amount that can be kept to.",
    "spend-cap-reached": "What the next call may cost does not fit under the cap.",
    "call-unbounded": "A call sets no limit on what it can cost.",
    "request-store-corrupt": "The request store cannot be read, or does not match itself.",
    "request-store-other": "The file is not a request store that this version can use.",
    "request-store-locked": "Another process is using the request store.",
    "request-stores-differ": "These request stores cannot be merged, or differ in what was answered.",
    "request-conflict": "A row was requested before with another call.",
    "diverged": "The loss became NaN or infinite.",
    "endpoint-settings": "The settings of the fake endpoint are not what was expected.",
    "server-failed": "A server for a student could not be started, or ended by itself.",
    "port-in-use": "The port that was asked for cannot be used.",
    "missing-extra": "An optional part of Stillroom is not installed.",
    "terms-missing": "A file of terms cannot be read or written, or a record asked for is not there.",
    "terms-invalid": "A file of terms records is not what was expected.",
    "entitlement-denied": "The teacher's terms forbid this use.",
    "entitlement-unknown": "The teacher's terms are not known well enough to go on.",
    "obligations-unmet": "Something that the student must carry when it is given away is not there.",
    "endpoint-invalid": "The URL or name of an endpoint cannot be used.",
    "request-invalid": "A request body says the same thing twice, or asks for what is not read.",
    "key-unusable": "The endpoint's key is not where it was said to be, or cannot be sent.",
    "endpoint-refuses": "The endpoint cannot be reached, or answers nobody with this key, model or quota.",
    "logprobs-corrupt": "A file of log-probabilities cannot be read or does not match its checksums.",
    "probe-invalid": "A probe's report cannot be read by this version.",
    "interrupted": "The run was interrupted and can be resumed.",
    "guard-key": "A secret key cannot be used.",
    "guard-plan": "A test was planned otherwise than it is to be run.",
    "guard-evidence": "Evidence cannot be read, or is not what it says it is.",
    "guard-calibration": "A record of calibration cannot be used.",
    "guard-upstream": "The server that a proxy stands before cannot be named so.",
    "guard-sampler": "A keyed sampler cannot be used with its settings.",
    "guard-logits": "Logits are not those that a sampler was made for.",
}

DOCS = "docs/reference/errors.md"


class StillroomError(Exception):
    """An error with a stable code; its text says what was found, what was expected, and what to do.

    `found` and `expected` are clauses, `do` a sentence, `why` (optional) the reason that it matters.
    """

    exit_code = 2

    def __init__(self, code: str, *, found: str, expected: str = "", why: str = "", do: str) -> None:
        assert code in CODES, f"unlisted error code {code!r}"
        self.code = code
        self.found, self.expected, self.why, self.do = found, expected, why, do
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [f"found     {self.found}"]
        if self.expected:
            lines.append(f"expected  {self.expected}")
        if self.why:
            lines.append(f"because   {self.why}")
        lines.append(f"do        {self.do}")
        return "\n".join([f"[{self.code}] {CODES[self.code]}", *(f"  {line}" for line in lines)])


class RecipeError(StillroomError):
    """The recipe itself."""


class DataError(StillroomError):
    """Prompts, labelled items, transfer sets."""


class ModelError(StillroomError):
    """A teacher or a student that cannot be loaded or used."""


class VocabularyError(StillroomError):
    """Two tokenizers that do not mean the same thing."""


class StoreError(StillroomError):
    """Targets on disk: corrupt, or of something else."""


class LedgerError(StillroomError):
    """A ledger that does not verify."""


class RunError(StillroomError):
    """The run directory: locked, of another recipe, out of order."""


class ResourceError(StillroomError):
    """Disk, memory, devices, ports and paths that cannot be used."""


class SpendError(StillroomError):
    """Prices and caps of what is bought from an endpoint."""


class SpendCapReached(StillroomError):
    """The next call could go over a cap. What was bought is kept; with a higher cap, collection goes on.

    `may_fit_later`: calls that are under way reserve so much that the call could fit when they are settled.
    """

    def __init__(self, code: str, *, may_fit_later: bool, found: str, expected: str = "", why: str = "", do: str) -> None:
        self.may_fit_later = may_fit_later
        super().__init__(code, found=found, expected=expected, why=why, do=do)


class RequestStoreError(StillroomError):
    """Requests on disk: corrupt, in use, of something else."""


class DivergedError(StillroomError):
    """The loss became NaN or infinite."""


class CollectError(StillroomError):
    """Endpoints, requests to them, and what they answer."""


class GuardError(StillroomError):
    """Keys, plans, evidence and records of the guard."""


class EntitlementError(StillroomError):
    """Terms records, confirmations and authorisations that cannot be used."""


class EntitlementDenied(StillroomError):
    """The teacher's terms forbid this use."""

    exit_code = 4


class EntitlementUnknown(StillroomError):
    """A fact about the teacher's terms is missing."""

    exit_code = 5


class Interrupted(StillroomError):
    """Stopped by Ctrl-C, resumable."""

    exit_code = 130
