"""The sections that say how good the student is: summary, quality, the trade, training, fidelity, failures, samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from stillroom.web import format as f
from stillroom.web.charts import NAMES, Axes, Point, Row, curves, dots, legend, trade
from stillroom.web.difference import difference
from stillroom.web.markup import Child, Html, el, join
from stillroom.web.parts import figure, lead, passage, section, table
from stillroom.web.readings import Measured, Missing, Node, Reading, dig, read, sample_size, shared_n, shown, spread, value_only
from stillroom.web.sentences import verdict

MODELS = ("teacher", "student", "label_only", "student_before")

_SAMPLES_ON_PAGE = 60
_FAILURES_ON_PAGE = 5
_WEAKEST_FAMILIES = 5


# --- summary --------------------------------------------------------------------------------------------------------------------------


def summary(report: Node) -> Html:
    """Title, verdict, the four key figures, and what was decided on the way."""
    provenance = dig(report, "provenance") or {}
    created = el("span", f.moment(str(provenance.get("created") or "at an unrecorded time")), class_="whole")
    seed = provenance.get("seed", "not recorded")
    made = join("Recipe ", el("b", str(provenance.get("recipe_name") or "without a name")), f", seed {seed}, made ", created)
    return el(
        "header",
        el("p", "Stillroom \u00b7 distillation report", class_="eyebrow"),
        el("h1", str(report.get("title") or "Distillation report")),
        el("p", verdict(report), class_="verdict"),
        _key_figures(report),
        el("p", made, class_="made"),
        _decisions(provenance.get("decisions") or []),
        id="summary",
    )


def _key_figures(report: Node) -> Html:
    teacher = read(report, "quality", "teacher", "exact_match")
    beside = f"teacher {f.percent(teacher.value)}" if isinstance(teacher, Measured) else None
    gap, smaller, faster = (
        read(report, "quality", "gap_recovered"),
        read(report, "cost", "ratios", "parameters"),
        read(report, "cost", "ratios", "tokens_per_second"),
    )
    figures = [
        ("Gap recovered", gap, f.percent, "of the teacher\u2019s lead over labels alone" if isinstance(gap, Measured) else None),
        ("Student, exact match", read(report, "quality", "student", "exact_match"), f.percent, beside),
        (_ratio_name(smaller, "Smaller", "Size, teacher by student"), smaller, f.times, _from_to(report, "parameters", f.si, " parameters")),
        (_ratio_name(faster, "Faster", "Speed, student by teacher"), faster, f.times, _from_to(report, "tokens_per_second", f.rate, "")),
    ]
    return el("dl", [_key_figure(*entry) for entry in figures], class_="key")


def _key_figure(name: str, reading: Reading, style: f.Style, note: str | None) -> Html:
    notes = [el("dd", part, class_="note") for part in (spread(reading, style), note) if part]
    return el("div", el("dt", name), el("dd", value_only(reading, style)), notes)


def _ratio_name(ratio: Reading, better: str, plain: str) -> str:
    return better if isinstance(ratio, Missing) or ratio.value > 1 else plain


def _from_to(report: Node, name: str, style: f.Style, unit: str) -> str | None:
    teacher, student = (read(report, "cost", who, name) for who in ("teacher", "student"))
    if isinstance(teacher, Missing) or isinstance(student, Missing):
        return None
    return f"{style(teacher.value).removesuffix(' tokens/s')} to {style(student.value)}{unit}"


def _decisions(decisions: Sequence[Node]) -> Html | None:
    """Those that went another way than asked for, where the report tells which; else all."""
    degraded = [entry for entry in decisions if entry.get("degraded")]
    told_apart = any("degraded" in entry for entry in decisions)
    chosen = degraded if told_apart else list(decisions)
    if not chosen:
        return None
    title = "Not as asked for" if told_apart else "Decided on the way"
    return el("aside", el("h2", title, id="decided"), decision_list(chosen), class_="decided", aria_labelledby="decided")


def decision_list(decisions: Iterable[Node]) -> Html:
    """What was chosen, and why."""
    entries = [
        el(
            "li",
            el("b", el("bdi", str(entry.get("what")))),
            ": ",
            el("bdi", str(entry.get("chosen"))),
            el("span", str(entry.get("why")), class_="why"),
        )
        for entry in decisions
    ]
    return el("ul", entries, class_="decisions")


# --- quality --------------------------------------------------------------------------------------------------------------------------


def quality(report: Node) -> Html:
    """Exact match of all models, overall and by family."""
    overall = {model: read(report, "quality", model, "exact_match") for model in MODELS}
    present = [model for model in MODELS if isinstance(overall[model], Measured)]
    if not present:
        reasons = [el("li", f"{NAMES[model]}: ", shown(reading, f.percent)) for model, reading in overall.items()]
        return section("quality", "Quality", lead("Exact match was not measured."), el("ul", reasons, class_="reasons"))
    families = _family_rows(report)
    rows = [Row("All items", _n_note(overall.values()), {m: s for m, s in overall.items() if isinstance(s, Measured)})]
    rows += [Row(name, _n_note(scores.values()), {m: s for m, s in scores.items() if isinstance(s, Measured)}) for name, scores in families]
    spoken = ", ".join(f"{NAMES[m]} {f.percent(s.value)}" for m, s in rows[0].scores.items())
    picture, floor = dots(rows, f"Exact match with intervals. All items: {spoken}.")
    caption = "Share of items answered exactly right; the bar is the 95 % interval. All models saw the same items."
    caption += f" The axis begins at {f.percent_in_words(floor)}." if floor else ""
    return section(
        "quality", "Quality", lead(_gap_explained(report)), figure(caption, picture, key=legend(present)), _quality_table(overall, families)
    )


def _gap_explained(report: Node) -> Html:
    gap = read(report, "quality", "gap_recovered")
    if isinstance(gap, Missing):
        return join("The share of the gap between labels alone and the teacher that the student recovers is ", value_only(gap, f.percent), ".")
    behind = spread(gap, f.percent)
    words = "Of the distance between what the labels alone give and what the teacher can do, the student covers "
    return join(words, value_only(gap, f.percent), join(" (95 % interval ", behind, ")") if behind else None, ".")


def _family_rows(report: Node) -> list[tuple[str, dict[str, Reading]]]:
    """Families with each model's score, best student first."""
    names: dict[str, None] = {}
    for model in MODELS:
        names.update(dict.fromkeys(dig(report, "quality", model, "families") or {}))
    rows = [(name, {model: read(dig(report, "quality", model, "families"), name) for model in MODELS}) for name in names]
    return sorted(rows, key=lambda row: -_student_score(row[1]))


def _student_score(scores: dict[str, Reading]) -> float:
    student = scores["student"]
    return student.value if isinstance(student, Measured) else 2.0


def _n_note(readings: Iterable[Reading]) -> str:
    n = shared_n(readings)
    return sample_size(n) if n is not None else "n differs, see the table"


def _quality_table(overall: dict[str, Reading], families: list[tuple[str, dict[str, Reading]]]) -> Html:
    models = [model for model in MODELS if isinstance(overall[model], Measured) or any(isinstance(s[model], Measured) for _, s in families)]
    left_out = [el("li", f"{NAMES[model]}: ", value_only(overall[model], f.percent)) for model in MODELS if model not in models]
    rows: list[list[Child]] = []
    for name, scores in [("All items", overall), *families]:
        n = shared_n(scores[model] for model in models)
        cells = [shown(scores[model], f.percent, with_n=n is None) for model in models]
        rows.append([join(el("bdi", name), el("span", sample_size(n), class_="why n") if n is not None else None), *cells])
    heads = ["Items", *("Student before" if model == "student_before" else NAMES[model] for model in models)]
    numbers = table("Exact match and its 95 % interval", heads, rows, class_="numbers")
    return join(numbers, el("ul", left_out, class_="reasons") if left_out else None)


# --- the trade ------------------------------------------------------------------------------------------------------------------------


def exchange(report: Node) -> Html:
    """Size, quality and speed in one picture."""
    by, size_style = ("parameters", f.tick(f.si)) if _measured_both(report, "parameters") else ("bytes", f.tick(f.size))
    title = "Size, quality and speed"
    if not _measured_both(report, by):
        why = read(report, "cost", "student", "parameters")
        return section("trade", title, lead("There is no picture: the size of teacher and student was not measured (", value_only(why, f.si), ")."))
    points = _points(report, by)
    if points:
        caption = (
            f"To the right: {by}, on a logarithmic axis. Upwards: exact match with its 95 % interval. "
            "The area of the disc is the speed of greedy decoding at batch 1. The label-only model has the student\u2019s size and speed."
        )
        spoken = "Size, exact match and speed. " + "; ".join(", ".join(point.words) for point in points)
        picture = trade(points, spoken, Axes(by, size_style, "exact match", _whole_percent, shares=True))
        return section("trade", title, lead("Up is better, left is cheaper, a larger disc is faster."), figure(caption, picture))
    points = _speed_points(report, by)
    if not points:
        return section("trade", title, lead("There is no picture: neither exact match nor speed was measured."))
    caption = f"To the right: {by}, on a logarithmic axis. Upwards: tokens per second of greedy decoding at batch 1. Exact match was not measured."
    spoken = "Size and speed. " + "; ".join(", ".join(point.words) for point in points)
    picture = trade(points, spoken, Axes(by, size_style, "tokens per second", f.count, shares=False))
    return section("trade", title, lead("Up is faster, left is smaller."), figure(caption, picture))


def _whole_percent(value: float) -> str:
    return f"{round(value * 100, 6):g}{f.THIN}%"


def _measured_both(report: Node, name: str) -> bool:
    return all(isinstance(r := read(report, "cost", who, name), Measured) and r.value > 0 for who in ("teacher", "student"))


def _points(report: Node, by: str) -> list[Point]:
    points = []
    for model, costed in (("teacher", "teacher"), ("student", "student"), ("label_only", "student")):
        score, size = read(report, "quality", model, "exact_match"), read(report, "cost", costed, by)
        speed = read(report, "cost", costed, "tokens_per_second")
        if isinstance(score, Measured) and isinstance(size, Measured):
            words = [NAMES[model], f.percent(score.value)]
            if isinstance(speed, Measured) and model != "label_only":
                words.append(f.rate(speed.value))
            points.append(Point(model, size.value, score, speed.value if isinstance(speed, Measured) else None, tuple(words)))
    return points


def _speed_points(report: Node, by: str) -> list[Point]:
    points = []
    for model in ("teacher", "student"):
        size, speed = read(report, "cost", model, by), read(report, "cost", model, "tokens_per_second")
        if isinstance(size, Measured) and isinstance(speed, Measured):
            points.append(Point(model, size.value, speed, None, (NAMES[model], f.rate(speed.value))))
    return points


# --- training -------------------------------------------------------------------------------------------------------------------------

_LOGARITHMIC = " The axis upwards is logarithmic."

_METRICS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("learning rate", ("learning_rate",)),
    ("gradient norm", ("gradient_norm",)),
    ("tokens per second", ("wall", "tokens_per_second")),
)


def training(report: Node, metrics: Sequence[Node] | None) -> Html:
    """Curves of the objective over training; learning rate, gradient norm and speed where the metrics have them."""
    series = {name: _series(report.get("curves") or [], name) for name in ("train", "validation")}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return section("training", "Training", lead("The run recorded no curve."))
    ends = ", ".join(f"{name} {f.significant(points[-1][1])} at step {points[-1][0]:,.0f}" for name, points in series.items())
    picture, logarithmic = curves(series, f"Objective in nats per token over optimiser steps; last: {ends}.")
    caption = join("Objective in nats per scored token: lower is closer to the teacher.", _LOGARITHMIC if logarithmic else None)
    return section(
        "training", "Training", figure(caption, picture, el("output", class_="readout", hidden=True)), _curve_table(series), _metric_curves(metrics)
    )


def _series(entries: Iterable[Node], name: str) -> list[tuple[float, float]]:
    found = [(entry.get("step"), entry.get("nats")) for entry in entries if entry.get("name") == name]
    return _numeric(found)


def _numeric(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    numbers = (int, float)
    kept = [(float(a), float(b)) for a, b in pairs if isinstance(a, numbers) and isinstance(b, numbers)]
    return sorted(pair for pair in kept if abs(pair[1]) < float("inf"))


def _curve_table(series: dict[str, list[tuple[float, float]]]) -> Html:
    name = "validation" if "validation" in series else "train"
    points = series[name]
    every = max(1, -(-len(points) // 12))
    picked = sorted({*points[::every], points[-1]})
    rows = [[f"{step:,.0f}", el("data", f.nats(value), value=repr(value), title=repr(value))] for step, value in picked]
    return el(
        "details",
        el("summary", "The numbers behind the curve"),
        table(f"Objective, {name}", ["Step", "Nats per token"], rows, class_="numbers small"),
    )


def _metric_curves(metrics: Sequence[Node] | None) -> Html | None:
    drawn = []
    for title, path in _METRICS:
        points = _numeric((row.get("step"), dig(row, *path)) for row in metrics or [])
        if len(points) > 1:
            picture, logarithmic = curves({"last": points}, f"{title} over optimiser steps", title=title)
            drawn.append(figure(f"{title.capitalize()} over training." + (_LOGARITHMIC if logarithmic else ""), picture))
    return el("details", el("summary", "Learning rate, gradient and speed over training"), drawn) if drawn else None


# --- fidelity -------------------------------------------------------------------------------------------------------------------------

_FIDELITY = (
    (
        "forward_kl_nats",
        "Forward KL",
        f.nats,
        "How much the student\u2019s probabilities differ from the teacher\u2019s, per token: 0 would be identical.",
    ),
    ("top1_agreement", "Top-1 agreement", f.percent, "How often both would write the same next token."),
    (
        "acceptance",
        "Acceptance",
        f.percent,
        "If the student drafted for the teacher, this share of its tokens would be expected to be accepted at temperature 1.",
    ),
)


def fidelity(report: Node) -> Html:
    """How close the student's distributions are to the teacher's."""
    rows: list[list[Child]] = [
        [join(el("b", name), el("span", explained, class_="why")), shown(read(report, "fidelity", key), style)]
        for key, name, style, explained in _FIDELITY
    ]
    words = "Quality asks whether the answer is right; fidelity asks how like the teacher the student writes, token by token, on the teacher\u2019s own answers."
    return section(
        "fidelity", "Fidelity", lead(words), table("Fidelity to the teacher, with 95 % intervals", ["Measure", "Value"], rows, class_="fidelity")
    )


# --- failures -------------------------------------------------------------------------------------------------------------------------


def failures(report: Node) -> Html:
    """The families with the lowest student score, and wrong answers of the student's."""
    return section("failures", "Where it fails", _weakest(report), _wrong_answers(report.get("samples") or []))


def _weakest(report: Node) -> Html:
    families = [(name, scores) for name, scores in _family_rows(report) if isinstance(scores["student"], Measured)]
    if not families:
        return lead("The items carry no families, so it cannot be said which kind of item is hardest.")
    missed = [row for row in families if _student_score(row[1]) < 1]
    if not missed:
        return lead("The student missed no item of any family.")
    rows: list[list[Child]] = []
    for name, scores in missed[::-1][:_WEAKEST_FAMILIES]:
        teacher, student = scores["teacher"], scores["student"]
        behind: Child = el("span", "absent: the teacher was not scored", class_="absent")
        if isinstance(teacher, Measured) and isinstance(student, Measured):
            behind = f.points(student.value - teacher.value)
        rows.append([el("bdi", name), shown(student, f.percent), shown(teacher, f.percent), behind])
    heads = ["Family", "Student", "Teacher", "Difference in points"]
    return table("Families with the lowest student score, lowest first", heads, rows, class_="numbers")


def _wrong_answers(samples: Sequence[Node]) -> Html:
    wrong = [sample for sample in samples if sample.get("student_right") is False]
    if not samples:
        return el("p", "The report holds no samples.")
    if not wrong:
        return el("p", f"Among the {len(samples):,} samples in the report there is none that the student is known to have got wrong.")
    wrong.sort(key=lambda sample: sample.get("teacher_right") is not True)
    lost = sum(sample.get("teacher_right") is True for sample in wrong)
    words = (
        f"Of the {len(samples):,} samples in the report (disagreements come first, so they are not a fair draw) the student got {len(wrong):,} wrong; "
        f"the teacher was right on {lost:,} of these."
    )
    return join(el("h3", "Wrong answers"), el("p", words), el("ol", [_wrong_answer(s) for s in wrong[:_FAILURES_ON_PAGE]], class_="wrong"))


def _wrong_answer(sample: Node) -> Html:
    expected, student = str(sample.get("expected") or ""), str(sample.get("student") or "")
    left, right = difference(expected, student)
    blame = {True: "the teacher was right", False: "the teacher was wrong too"}.get(sample.get("teacher_right"), "the teacher was not scored")  # type: ignore[arg-type]
    return el(
        "li",
        passage(str(sample.get("prompt") or ""), "Prompt", class_="prompt"),
        el(
            "dl",
            el("dt", "Expected"),
            el("dd", passage(left, "Expected answer")),
            el("dt", "Student"),
            el("dd", passage(right, "Student\u2019s answer")),
        ),
        el("p", _family_note(sample), blame, class_="note"),
    )


def _family_note(sample: Node) -> Html | None:
    family = sample.get("family")
    return join(el("bdi", str(family)), ", ") if family else None


# --- samples --------------------------------------------------------------------------------------------------------------------------


def side_by_side(report: Node) -> Html:
    """Teacher and student on the same prompts, disagreements first, what differs marked."""
    samples: list[Node] = sorted(report.get("samples") or [], key=lambda sample: bool(sample.get("agree")))
    if not samples:
        return section("samples", "Samples side by side", lead("The report holds no samples."))
    disagreements = sum(not sample.get("agree") for sample in samples)
    words = f"{len(samples):,} samples, {disagreements:,} of them disagreements, which come first. Characters that differ are marked."
    rest = len(samples) - _SAMPLES_ON_PAGE
    return section(
        "samples",
        "Samples side by side",
        lead(words),
        el("div", id="sample-filter", class_="filter", hidden=True),
        el("div", [_sample(sample) for sample in samples[:_SAMPLES_ON_PAGE]], id="sample-list", class_="samples"),
        el("p", f"{rest:,} more are in report.json.", class_="note") if rest > 0 else None,
    )


def _sample(sample: Node) -> Html:
    agree, wrong = bool(sample.get("agree")), sample.get("student_right") is False
    expected = sample.get("expected") if wrong and sample.get("teacher_right") is not True else None
    return el(
        "article",
        passage(str(sample.get("prompt") or ""), "Prompt", class_="prompt"),
        el("div", _answers(sample), class_="pair"),
        el("div", el("span", "Expected"), passage(str(expected), "Expected answer"), class_="expected") if expected is not None else None,
        el("p", _family_note(sample), "they agree" if agree else "they disagree", class_="note"),
        class_="sample",
        data_agree="yes" if agree else "no",
        data_wrong="yes" if wrong else "no",
    )


def _answers(sample: Node) -> Html:
    """Both answers with their differences marked, or the one that both gave."""
    teacher, student = str(sample.get("teacher") or ""), str(sample.get("student") or "")
    if teacher == student and sample.get("teacher_right") == sample.get("student_right"):
        return el("div", el("h3", "Teacher and student ", _mark_right(sample.get("student_right"))), passage(student, "Both answers"))
    left, right = difference(teacher, student)
    return join(
        el("div", el("h3", "Teacher ", _mark_right(sample.get("teacher_right"))), passage(left, "Teacher\u2019s answer")),
        el("div", el("h3", "Student ", _mark_right(sample.get("student_right"))), passage(right, "Student\u2019s answer")),
    )


def _mark_right(right: object) -> Html:
    match right:
        case True:
            return el("span", "right", class_="right")
        case False:
            return el("span", "wrong", class_="wrong-mark")
        case _:
            return el("span", "not scored", class_="absent")
