"""The demo, whole, as a newcomer runs it: its claims, its files, and what others make of its student. One test, since the run takes minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from stillroom import Report, Run
from stillroom.data import TransferSet
from stillroom.demo import expressions
from stillroom.ledger import verify_ledger

# Before everything else: the other process can run all other tests meanwhile (conftest puts it first).
pytestmark = pytest.mark.first


def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = subprocess.run([sys.executable, "-m", "stillroom", "demo", "--out", str(out)], capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    run = Run.open(out)
    report = run.report
    _claims_hold(report)
    _students_prompts_had_no_labels(out)
    _nothing_held_out_was_seen(out)
    _the_book_is_whole(out, report)
    _plain_transformers_uses_the_student(run.student_path, out / "inputs" / "items.jsonl")
    _asking_again_changes_nothing(out)


def _claims_hold(report: Report) -> None:
    quality = report.quality
    teacher, student, label_only = (getattr(quality, name).exact_match for name in ("teacher", "student", "label_only"))
    assert teacher.n == student.n == label_only.n == 2000
    assert teacher.value >= 0.98
    assert teacher.value - label_only.value >= 0.15
    assert quality.gap_recovered.value >= 0.90
    assert quality.gap_recovered.low >= 0.85
    assert quality.gap_recovered.value == pytest.approx((student.value - label_only.value) / (teacher.value - label_only.value))
    assert report.cost.ratios.parameters.value >= 8
    assert set(quality.student.families) == set(expressions.FAMILIES)
    assert 0 < report.fidelity.forward_kl_nats.value < 0.2
    assert report.fidelity.acceptance.value > 0.9
    assert "absent" in report.making.money.model_dump()


def _students_prompts_had_no_labels(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "inputs" / "prompts.jsonl").read_text().splitlines()]
    assert all(set(row) == {"prompt"} for row in rows)


def _nothing_held_out_was_seen(out: Path) -> None:
    """By text: no evaluation item is among the prompts or the labelled pairs."""
    texts = {
        name: {json.loads(line)["prompt"].lower() for line in (out / "inputs" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("prompts", "labelled", "items")
    }
    assert not texts["items"] & texts["prompts"]
    assert not texts["items"] & texts["labelled"]


def _the_book_is_whole(out: Path, report: Report) -> None:
    head = verify_ledger(out / "ledger.jsonl")
    assert (head.entries, head.hash) == (report.provenance.ledger_entries, report.provenance.ledger_head)
    transfer_set = TransferSet.load(out / "transfer_set.json")
    assert transfer_set.requested == report.making.prompts.value
    stages = [json.loads(line)["entry"]["stage"] for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert stages.count("freeze") == stages.count("collect") >= transfer_set.accepted
    # All but the validation share was trained on.
    assert 0.9 * transfer_set.accepted < stages.count("train") < transfer_set.accepted


def _plain_transformers_uses_the_student(directory: Path, items: Path) -> None:
    """AutoModelForCausalLM and the text-generation pipeline, without Stillroom, answer correctly."""
    rows = [json.loads(line) for line in items.read_text().splitlines()][:40]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert model.dtype == torch.float32
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answers = [ask([{"role": "user", "content": row["prompt"]}], max_new_tokens=24)[0]["generated_text"][-1]["content"] for row in rows]
    assert sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True)) >= 32


def _asking_again_changes_nothing(out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    subprocess.run([sys.executable, "-m", "stillroom", "demo", "--out", str(out)], capture_output=True, timeout=120, check=True)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
