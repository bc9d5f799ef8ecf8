"""How plans, progress, reports and comparisons look on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from stillroom.runs import Comparison, Plan
from stillroom.runs.plan import CardFit, ModelFacts, RedactionFacts, Terms
from stillroom.runs.report import Absent, Collection, Maybe, Number, Report

_MODELS = (("teacher", "teacher"), ("student", "student"), ("label_only", "label-only"), ("student_before", "student before"))
_COSTS = (
    ("parameters", "parameters"),
    ("bytes", "size of the weights"),
    ("flops_per_token", "FLOP per token"),
    ("tokens_per_second", "tokens/s, batch 1"),
    ("tokens_per_second_batch_32", "tokens/s, batch 32"),
    ("latency_p50_seconds", "latency, median"),
    ("latency_p95_seconds", "latency, 95th percentile"),
    ("peak_memory_bytes", "peak memory"),
)


class Screen:
    """A runs.Observer that draws one progress bar a stage; on anything but a terminal it prints a line a stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""

    def stage(self, name: str, detail: str) -> None:
        """A new line for a new stage."""
        self.close()
        self._stage = name
        self._console.print(Text.assemble((f"{name:<11}", "bold"), detail), soft_wrap=True)

    def progress(self, done: int, total: int, unit: str, fields: dict[str, str]) -> None:
        """Moves the bar; the bar is gone when the stage is done."""
        if not self._console.is_terminal:
            return
        if self._progress is None:
            self._progress = _bar(self._console)
            self._progress.start()
            self._task = self._progress.add_task(self._stage, total=total, unit=unit, fields="")
        assert self._task is not None
        shown = "  ".join(f"{name} {value}" for name, value in fields.items())
        self._progress.update(self._task, completed=done, total=total, unit=unit, fields=shown)
        if done >= total:
            self.close()

    def note(self, text: str) -> None:
        """One dimmed line."""
        self._console.print(Padding(Text(text, style="dim"), (0, 0, 0, 11)))

    def close(self) -> None:
        """Removes the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("           "),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}"),
        console=console,
        transient=True,
    )


# --- the plan -------------------------------------------------------------------------------------------------------------------------


def plan_page(plan: Plan) -> RenderableType:
    """The plan on one screen."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("recipe", f"{plan.recipe_name}  (sha256 {plan.recipe_sha256[:12]})")
    for name, model in (("teacher", plan.teacher), ("student", plan.student)):
        table.add_row(name, _model_line(model))
    if plan.teacher.parameters is not None and plan.student.parameters:
        table.add_row("", f"the student has {plan.teacher.parameters / plan.student.parameters:.1f} times fewer parameters")
    vocabulary = plan.vocabulary
    wide = vocabulary.student_rows if vocabulary.teacher_rows is None else f"{vocabulary.teacher_rows} and {vocabulary.student_rows}"
    table.add_row("vocabulary", f"{vocabulary.size} tokens, the same in both; logits {wide} wide")
    table.add_row("terms", Text(_terms(plan.terms)))
    prompts = plan.prompts
    table.add_row(
        "prompts",
        f"{prompts.count:,} ({prompts.duplicates_dropped} duplicates dropped), {prompts.tokens_mean:.1f} tokens on average, {prompts.tokens_longest} at most; "
        f"answers taken as {prompts.answer_tokens_assumed:.1f} tokens ({prompts.answer_tokens_why})",
    )
    signal = plan.signal
    table.add_row("signal", f"{signal.kind}{' (live)' if signal.live else ''}, {signal.bytes_per_token} bytes a token: {signal.why}")
    if plan.curation is not None:
        table.add_row("curation", Text(f"{', '.join(plan.curation.steps) or 'no steps'}: {plan.curation.why}"))
    if plan.redaction is not None:
        table.add_row("redaction", Text(_redaction(plan.redaction)))
    table.add_row("objective", f"{plan.objective}; {plan.steps:,} steps, {plan.epochs:.1f} epochs")
    hardware = plan.hardware
    teacher = "" if hardware.teacher_dtype == hardware.dtype else f" (teacher {hardware.teacher_dtype})"
    packed = f"; sequences of {' and '.join(hardware.packing)} end to end" if hardware.packing else ""
    where = f"{hardware.device}, {hardware.dtype}{teacher}, {hardware.threads} threads"
    table.add_row("hardware", f"{where}, micro-batches of {hardware.micro_batch}{packed}: {hardware.why}")
    estimate = plan.estimate
    stages = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in estimate.seconds.items() if seconds)
    table.add_row("time", f"about {_duration(sum(estimate.seconds.values()))}: {stages}")
    table.add_row("memory", f"about {_size(estimate.peak_memory_bytes)} at its peak, of {_size(estimate.memory_available_bytes)} available")
    table.add_row("disk", f"about {_size(estimate.disk_bytes)}, of {_size(estimate.disk_free_bytes)} free")
    notes = [Text(f"warning: {warning}", style="yellow") for warning in plan.warnings]
    return Group(table, *([Text(""), _cards(plan.cards)] if plan.cards else []), *notes)


def _redaction(found: RedactionFacts) -> str:
    if found.mode == "off":
        return "off: prompts are sent as they are"
    replaced = ", ".join(f"{one.places:,} {one.kind} in {one.texts:,}" for one in found.kinds) or "nothing was found"
    return f"{found.mode}; in {found.texts:,} texts: {replaced}"


def _model_line(model: ModelFacts) -> str:
    if model.parameters is None or model.bytes is None:
        return f"{model.source}  behind an endpoint"
    return f"{model.source}  {model.architecture}, {_count(model.parameters)} parameters, {model.layers} layers x {model.width}, {_size(model.bytes)}"


def _cards(cards: Sequence[CardFit]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("on cards of", "cards", "micro-batch", "at its peak", "of", "with"):
        table.add_column(name, overflow="fold", no_wrap=name != "with")
    for fit in cards:
        stage = max(fit.peak_bytes, key=fit.peak_bytes.__getitem__)
        number, micro_batch = (str(fit.cards), str(fit.micro_batch)) if fit.fits else ("does not fit", "")
        peak = f"{_size(fit.peak_bytes[stage])} ({stage})"
        table.add_row(fit.card, number, micro_batch, peak, _size(fit.usable_bytes), "; ".join(fit.settings) or "the recipe as it is")
    return table


def _terms(terms: Terms) -> str:
    """The verdict, what it rests on, what it asks for and what would change it, a line each."""
    lists = (
        ("because", terms.reasons),
        ("the student must carry", terms.obligations),
        ("what would change it", terms.changed_by),
        ("entitled teachers", terms.alternatives),
        ("mind", terms.warnings),
    )
    reached = "" if terms.access == "weights" else f" through {terms.access}"
    lines = [f"{terms.outcome}: {terms.teacher}{reached}, {terms.licence or 'no licence declared'}; catalogue of {terms.catalogue}"]
    lines += [f"{name}: {line}" for name, found in lists for line in found]
    return "\n".join([*lines, *([f"question: {terms.question}"] if terms.question else [])])


# --- the report -----------------------------------------------------------------------------------------------------------------------


def report_page(report: Report) -> RenderableType:
    """The main figures of a report."""
    parts = [
        _quality(report),
        _fidelity(report),
        _costs(report),
        *([_collection(report.collection)] if report.collection is not None else []),
        _made(report),
    ]
    return Group(*(piece for part in parts for piece in (Text(""), part)))


def _quality(report: Report) -> RenderableType:
    quality = report.quality
    families = list(quality.teacher.families)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("exact match, %", style="bold", no_wrap=True)
    table.add_column("all, 95 % interval", justify="right", no_wrap=True)
    for family in families:
        table.add_column(family, justify="right", no_wrap=True)
    for field, name in _MODELS:
        model = getattr(quality, field)
        per_family = [_hundredths(model.families[family].value) if family in model.families else "" for family in families]
        table.add_row(name, _with_interval(model.exact_match, _hundredths), *per_family)
    return Group(table, Text.assemble(("gap recovered  ", "bold"), _with_interval(quality.gap_recovered, _percent_value)))


def _fidelity(report: Report) -> RenderableType:
    fidelity = report.fidelity
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("closeness to the teacher", style="bold", no_wrap=True)
    table.add_column("95 % interval", overflow="fold")
    table.add_row("forward KL, nats/token", _with_interval(fidelity.forward_kl_nats, lambda nats: f"{nats:.4f}"))
    table.add_row("top-1 agreement", _with_interval(fidelity.top1_agreement, _percent_value))
    table.add_row("acceptance as a draft", _with_interval(fidelity.acceptance, _percent_value))
    return table


def _costs(report: Report) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("cost", style="bold", no_wrap=True)
    for name in ("teacher", "student", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for field, name in _COSTS:
        cells = [getattr(part, field) for part in (report.cost.teacher, report.cost.student)]
        ratio = getattr(report.cost.ratios, field)
        table.add_row(name, *(_quantity(cell) for cell in cells), f"{ratio.value:.1f}x" if isinstance(ratio, Number) else "absent")
    return table


def _collection(collection: Collection) -> RenderableType:
    """Where every row is, what of the log-probabilities was believed, and the account."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("asked of the endpoint", style="bold", no_wrap=True)
    for name in ("requested", "accepted", "rejected", "failed", "pending"):
        table.add_column(name, justify="right", no_wrap=True)
    for purpose, rows in collection.rows.items():
        counts = (rows.requested, rows.accepted, sum(rows.rejected.values()), sum(rows.failed.values()), rows.pending)
        table.add_row(purpose, *(f"{count:,}" for count in counts))
    account = [f"log-probabilities: {collection.logprobs_verified:,} answers verified, {_by_reason(collection.logprobs_demoted)} demoted"]
    left_out = [
        f"{purpose}: {reason} {count:,}" for purpose, rows in collection.rows.items() for reason, count in (rows.rejected | rows.failed).items()
    ]
    account += [f"left out: {', '.join(left_out)}"] if left_out else []
    cap = f" of a cap of {collection.cap_tokens.value:,.0f}" if isinstance(collection.cap_tokens, Number) else ""
    money = "" if isinstance(collection.spent_money, Absent) else f" ({collection.spent_money.value:.6g} {collection.spent_money.unit})"
    account.append(f"{collection.spent_tokens.value:,.0f} tokens spent{money}, {collection.reserved_tokens.value:,.0f} reserved{cap}")
    return Group(table, *(Text(line) for line in account))


def _by_reason(counts: dict[str, int]) -> str:
    reasons = f" ({', '.join(f'{reason} {count:,}' for reason, count in counts.items())})" if counts else ""
    return f"{sum(counts.values()):,}{reasons}"


def _made(report: Report) -> RenderableType:
    making = report.making
    stages = ", ".join(f"{name} {_duration(seconds.value)}" for name, seconds in making.wall_seconds.items())
    return Text(
        f"made in {_duration(sum(s.value for s in making.wall_seconds.values()))} ({stages}) from {making.prompts.value:,.0f} prompts; "
        f"terms: {report.provenance.verdict}" + "".join(f"\nobligation: {line}" for line in report.provenance.terms.get("obligations") or ())
    )


def side_by_side(rows: Sequence[Comparison]) -> RenderableType:
    """Prompts and both answers; differing answers are marked."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("prompt", "teacher", "student"):
        table.add_column(name, overflow="fold")
    for row in rows:
        style = "" if row.teacher == row.student else "yellow"
        table.add_row(Text(row.prompt), Text(row.teacher), Text(row.student, style=style))
    return table


# --- numbers --------------------------------------------------------------------------------------------------------------------------


def _percent_value(value: float) -> str:
    return f"{100 * value:.1f} %"


def _hundredths(value: float) -> str:
    return f"{100 * value:.1f}"


def _with_interval(number: Maybe, form: object) -> str:
    assert callable(form)
    if isinstance(number, Absent):
        return f"absent ({number.absent})"
    if number.low is None or number.high is None:
        return str(form(number.value))
    return f"{form(number.value)} [{form(number.low)}, {form(number.high)}]"


def _quantity(number: Maybe) -> str:
    if isinstance(number, Absent):
        return "absent"
    match number.unit:
        case "bytes":
            return _size(number.value)
        case "seconds":
            return f"{1000 * number.value:.1f} ms" if number.value < 1 else f"{number.value:.2f} s"
        case _:
            return _count(number.value)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _count(count: float) -> str:
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.0f}{unit}" if unit == "" else f"{count:.2f}{unit}"
        count /= 1000
    return f"{count:.2f}T"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
