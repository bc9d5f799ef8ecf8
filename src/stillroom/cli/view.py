"""How plans, progress, reports and comparisons look on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from stillroom.collect.spend import Spend, in_units
from stillroom.runs import Comparison, Plan
from stillroom.runs.plan import CardFit, CollectionFacts, ModelFacts, RedactionFacts, Terms
from stillroom.runs.projection import Piloted, caps_needed
from stillroom.runs.report import Absent, Collection, Maybe, Number, Report
from stillroom.runs.summaries import Pilot

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
    if plan.collection is not None:
        table.add_row("collection", Text(_asked(plan.collection)))
    table.add_row("objective", f"{plan.objective}; {plan.steps:,} steps, {plan.epochs:.1f} epochs")
    hardware = plan.hardware
    teacher = "" if hardware.teacher_dtype in (None, hardware.dtype) else f" (teacher {hardware.teacher_dtype})"
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


def _asked(facts: CollectionFacts) -> str:
    """What will be asked and what it can cost, what a pilot expects, and the caps."""
    money = "" if facts.most_money is None else f" ({_money(float(facts.most_money))} {facts.currency})"
    lines = [f"{facts.prompts:,} prompts and {facts.items:,} evaluation items: at the worst some {facts.most_tokens:,} tokens{money}"]
    if facts.pilot is None and facts.prompts:
        lines.append(f"what it will cost is not known ({facts.no_pilot}): stillroom pilot RECIPE")
    elif facts.pilot is not None:
        lines.append(f"expected {_expected(facts.pilot)}, by the pilot of {facts.pilot.day} with {facts.pilot.rows:,} prompts")
    caps = [] if facts.cap_tokens is None else [f"{facts.cap_tokens:,} tokens"]
    caps += [] if facts.cap_money is None else [f"{facts.cap_money} {facts.currency}"]
    lines.append(f"cap {' and '.join(caps)}" + ("" if facts.prices_as_of is None else f"; prices of {facts.prices_as_of}"))
    return "\n".join(lines)


def _expected(pilot: Pilot) -> str:
    """Tokens and money with their 95 % intervals."""
    tokens, money = pilot.tokens, pilot.money
    told = f"{tokens.value:,.0f} tokens ({tokens.low:,.0f} to {tokens.high:,.0f})"
    return told if money is None else f"{told}, {_money(money.value)} {pilot.currency} ({_money(money.low)} to {_money(money.high)})"


def _money(amount: float) -> str:
    """Two decimals, or two significant digits below a unit."""
    if amount >= 1 or amount == 0:
        return f"{amount:,.2f}"
    return f"{amount:.{1 - math.floor(math.log10(amount))}f}"


def pilot_page(piloted: Piloted) -> RenderableType:
    """What a pilot found: what became of its rows, what one takes, what all will cost, and whether the caps hold it."""
    pilot = piloted.pilot
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("endpoint", Text(f"{piloted.endpoint.model} at {piloted.endpoint.base_url}, {piloted.endpoint.route} route"))
    table.add_row("signal", Text(f"{piloted.signal}: {piloted.why}"))
    table.add_row("rows", Text(_pilot_rows(pilot)))
    table.add_row("an answer", Text(_pilot_answer(pilot)))
    table.add_row("the whole", Text(f"{pilot.prompts:,} prompts and {pilot.items:,} evaluation items: {_expected(pilot)}"))
    enough = "hold the upper end" if piloted.suffices else "may be reached"
    table.add_row("caps", Text(f"{_caps(piloted.spend)} {enough}; {caps_needed(pilot)} would do", style="" if piloted.suffices else "yellow"))
    spend, money = piloted.spend, piloted.spend.currency
    spent, held = (
        f"{one.tokens:,} tokens" + (f" ({in_units(one.money).normalize():f} {money})" if money else "") for one in (piloted.spent, piloted.reserved)
    )
    table.add_row("this pilot", Text(f"{spent} spent, {held} reserved"))
    table.add_row("store", Text(f"{piloted.store}: {spend.settled.tokens:,} tokens spent, {spend.reserved.tokens:,} reserved in all"))
    return table


def probe_advice(piloted: Piloted) -> str:
    """What there is to know where nothing was probed."""
    return (
        "No probe of this endpoint is kept. With log-probabilities rows may cost more, and are other rows: to have them, probe first:\n"
        f"stillroom probe {piloted.endpoint.base_url} --model {piloted.endpoint.model} --store {piloted.store}"
    )


def _pilot_rows(pilot: Pilot) -> str:
    lost = sum(pilot.failed.values()) + sum(pilot.left_out.values())
    told = [f"{pilot.rows - lost:,} of {pilot.rows:,} fit to learn from"]
    for name, reasons in (("failed", pilot.failed), ("left out", pilot.left_out), ("log-probabilities not believed", pilot.demoted)):
        told += [f"{name}: " + ", ".join(f"{reason} {number:,}" for reason, number in reasons.items())] if reasons else []
    return "; ".join([*told, *([f"{pilot.unknown:,} requests may have been billed without our knowing"] if pilot.unknown else [])])


def _pilot_answer(pilot: Pilot) -> str:
    reasoning = f", {pilot.reasoning_tokens:,.1f} of them reasoning" if pilot.reasoning_tokens else ""
    told = f"{pilot.prompt_tokens:,.1f} tokens of prompt and {pilot.completion_tokens:,.1f} of answer{reasoning} on average"
    if pilot.seconds_median is None or pilot.seconds_longest is None:
        return told
    pace = "" if pilot.answers_per_second is None else f"; {pilot.answers_per_second:,.1f} answers/s"
    return f"{told}; {_seconds(pilot.seconds_median)} in the median, {_seconds(pilot.seconds_longest)} at most{pace}"


def _caps(spend: Spend) -> str:
    caps = [] if spend.caps.tokens is None else [f"{spend.caps.tokens:,} tokens"]
    return " and ".join(caps + ([] if spend.caps.money is None else [f"{in_units(spend.caps.money).normalize():f} {spend.currency}"]))


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
    if isinstance(collection.pilot_tokens, Number):
        told = _with_interval(collection.pilot_tokens, lambda tokens: f"{tokens:,.0f}")
        account.append(f"a pilot had projected {told} tokens for the answers" + _of_answers(collection))
    if isinstance(collection.break_even_calls, Number):
        account.append(f"the student has paid for itself after {collection.break_even_calls.value:,.0f} calls")
    return Group(table, *(Text(line) for line in account))


def _of_answers(collection: Collection) -> str:
    answers = collection.answers_tokens
    return f", which cost {answers.value:,.0f}" if isinstance(answers, Number) else ""


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
            return _seconds(number.value)
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


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
