"""Prices, caps, worst cases, costs and break-even: exact, and refused where they cannot be."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.collect.spend import (
    LARGEST_MONEY_CAP,
    PICOS_PER_UNIT,
    TOKENS_PER_MESSAGE,
    TOKENS_PER_REQUEST,
    Amount,
    Caps,
    Price,
    PriceList,
    break_even_calls,
    cost,
    in_units,
    projected,
    worst_case,
)
from stillroom.collect.wire import Call, Endpoint, Usage
from stillroom.core.errors import SpendError
from stillroom.core.hashing import canonical_json

ENDPOINT = Endpoint(base_url="https://api.example.com/v1", model="large")
FILE = """
as_of: 2026-11-01
currency: USD
prices:
  - base_url: https://api.example.com/v1
    model: large
    input: 2.50
    cached_input: 1.25
    output: 10.00
    reasoning: 12.5
    per_request: 0.001
  - host: api.example.com
    model: small
    input: 0.037575
    output: "0.15"
    currency: EUR
    as_of: 2026-10-01
"""


def price(**values: Any) -> Price:
    return Price(**{"currency": "USD", "as_of": date(2026, 11, 1), "input": 3, "cached_input": 1, "output": 10, "reasoning": 12} | values)


def prices(tmp_path: Path, text: str) -> PriceList:
    path = tmp_path / "prices.yaml"
    path.write_text(text, encoding="utf-8")
    return PriceList.from_yaml(path)


# -- prices -------------------------------------------------------------------------------------------------------------------


def test_prices_are_read_digit_by_digit(tmp_path: Path) -> None:
    found = prices(tmp_path, FILE)
    assert found.price(ENDPOINT) == Price(
        currency="USD",
        as_of=date(2026, 11, 1),
        input=2_500_000,
        cached_input=1_250_000,
        output=10_000_000,
        reasoning=12_500_000,
        per_request=PICOS_PER_UNIT // 1000,
    )
    small = found.price(Endpoint(base_url="https://api.example.com/other", model="small"))
    assert small is not None
    assert (small.input, small.cached_input, small.output, small.reasoning) == (37_575, 37_575, 150_000, 150_000)
    assert (small.currency, small.as_of) == ("EUR", date(2026, 10, 1))
    assert found.price(Endpoint(base_url="https://api.example.com/v1", model="other")) is None
    assert found.price(Endpoint(base_url="https://other.example.com/v1", model="small")) is None


def test_the_price_of_a_base_url_is_before_that_of_its_host(tmp_path: Path) -> None:
    entries = "prices: [{host: h, model: m, input: 1, output: 1}, {base_url: 'http://h/v1/', model: m, input: 2, output: 2}]"
    found = prices(tmp_path, f"as_of: 2026-11-01\ncurrency: USD\n{entries}").price(Endpoint(base_url="http://h/v1", model="m"))
    assert found is not None
    assert found.input == 2_000_000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("input: 2.50", "input: -1"), "is -1"),
        (("input: 2.50", "input: .inf"), "inf"),
        (("input: 2.50", "input: .nan"), "nan"),
        (("input: 2.50", "input: NaN"), "NaN"),
        (("input: 2.50", "input: 0.0000001"), "at most 6 decimals"),
        (("input: 2.50", "input: 1e+400000000"), "1,000,000,000"),
        (("input: 2.50", "input: true"), "True"),
        (("input: 2.50", "input: [1]"), "a number"),
        (("input: 2.50", "input: cheap"), "cheap"),
        (("input: 2.50", "inptu: 2.50"), "`input`?"),
        (("    input: 2.50\n", ""), "no `input`"),
        (("model: large", "model: 3"), "of whom"),
        (("model: large", "model: large\n    host: h"), "of whom"),
        (("as_of: 2026-11-01\n", ""), "no day"),
        (("as_of: 2026-11-01\n", "as_of: 2026-13-41\n"), "prices.yaml"),
        (("currency: USD\n", "currency: USD\nrate: 1\n"), "rate"),
        (("input: 2.50", "input: 2.50\n    input: 3"), "twice"),
        (("host: api.example.com\n    model: small", "base_url: https://api.example.com/v1\n    model: large"), "second price"),
        ((FILE, ""), "list of `prices`"),
        ((FILE, "prices: {}"), "list of `prices`"),
        ((FILE, "prices: [1]"), "a mapping"),
        ((FILE, "prices: ["), "prices.yaml"),
        ((FILE, "!!python/object/apply:os.system [true]"), "prices.yaml"),
        ((FILE, "[" * 1000), "prices.yaml"),
    ],
)
def test_what_is_no_price_is_told(change: tuple[str, str], told: str, tmp_path: Path) -> None:
    with pytest.raises(SpendError) as caught:
        prices(tmp_path, FILE.replace(*change))
    assert caught.value.code == "prices-invalid"
    assert told in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpendError, match="prices-invalid"):
        PriceList.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpendError, match="prices-invalid"):
        PriceList.from_yaml(tmp_path / "b.yaml")


@settings(max_examples=30)
@given(st.text())
def test_any_text_is_prices_or_an_error(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        try:
            prices(Path(folder), text.encode(errors="replace").decode())
        except SpendError as error:
            assert error.code == "prices-invalid"  # noqa: PT017 - what is raised is not certain


def test_an_old_price_is_a_warning_and_so_is_one_of_tomorrow() -> None:
    assert price().age_warning(date(2026, 11, 1)) is None
    assert price().age_warning(date(2027, 1, 30)) is None
    assert "91 days" in (price().age_warning(date(2027, 1, 31)) or "")
    assert "not come" in (price().age_warning(date(2026, 10, 31)) or "")


def test_a_snapshot_is_the_price_again_and_known_by_what_it_says() -> None:
    one = price(per_request=10**15)
    assert Price.from_json(one.as_json()) == one
    assert one.id == price(per_request=10**15).id
    assert len({price(**{name: 99}).id for name in ("input", "cached_input", "output", "reasoning", "per_request")} | {price().id}) == 6


# -- caps ---------------------------------------------------------------------------------------------------------------------


def test_caps_are_exact() -> None:
    assert Caps.of("12.50", 7) == Caps(money=12_500_000_000_000, tokens=7)
    assert Caps.of(Decimal("0.000000000001")).money == 1
    assert Caps.of(0).money == 0
    assert Caps.of(LARGEST_MONEY_CAP // PICOS_PER_UNIT).money == LARGEST_MONEY_CAP


@pytest.mark.parametrize("money", ["x", "NaN", "inf", "-1", "1e-13", "1e99", LARGEST_MONEY_CAP // PICOS_PER_UNIT + 1])
def test_a_cap_that_cannot_be_kept_is_refused(money: str | int) -> None:
    with pytest.raises(SpendError, match="spend-cap-invalid"):
        Caps.of(money)


def test_a_cap_in_tokens_that_cannot_be_is_refused() -> None:
    for tokens in (-1, 2**62):
        with pytest.raises(SpendError, match="spend-cap-invalid"):
            Caps.of(None, tokens)


def test_without_a_price_a_cap_in_tokens_is_required_and_one_in_money_refused() -> None:
    for caps, known, code in (
        (Caps(), None, "spend-cap-missing"),
        (Caps(money=1), None, "price-unknown"),
        (Caps(money=1, tokens=1), None, "price-unknown"),
        (Caps(), price(), "spend-cap-missing"),
    ):
        with pytest.raises(SpendError) as caught:
            caps.require_for(known, ENDPOINT)
        assert caught.value.code == code
    Caps(tokens=0).require_for(None, ENDPOINT)
    Caps(tokens=1).require_for(price(), ENDPOINT)
    Caps(money=0).require_for(price(), ENDPOINT)


# -- costs --------------------------------------------------------------------------------------------------------------------


def call(**body: Any) -> Call:
    return Call(endpoint=ENDPOINT, body=body)


def test_the_worst_case_is_all_bytes_and_all_tokens_at_the_dearest_price() -> None:
    body = {"messages": [{"role": "user", "content": "Grüße 🙂"}] * 2, "max_tokens": 5, "n": 3}
    prompt = len(canonical_json(body)) + 2 * TOKENS_PER_MESSAGE + TOKENS_PER_REQUEST
    assert worst_case(call(**body), None) == Amount(prompt + 15, 0)
    assert worst_case(call(**body), price(per_request=7)) == Amount(prompt + 15, prompt * 3 + 15 * 12 + 7)
    assert worst_case(call(**body), price(cached_input=4, reasoning=1)).money == prompt * 4 + 15 * 10


def test_completions_are_counted_for_every_prompt_and_every_candidate() -> None:
    def completions(**body: Any) -> int:
        return worst_case(call(max_tokens=10, **body), price(input=0, cached_input=0, output=1, reasoning=1)).money

    assert completions(prompt="a") == 10
    assert completions(prompt=[1, 2, 3]) == 10
    assert completions(prompt=["a", "b"]) == 20
    assert completions(prompt=[[1], [2], [3]]) == 30
    assert completions(prompt="a", n=2, best_of=4) == 40
    assert completions(prompt="a", max_completion_tokens=15) == 15


@pytest.mark.parametrize("body", [{}, {"max_tokens": None}, {"max_tokens": "9"}, {"max_tokens": -1}, {"max_tokens": 1.5}])
def test_a_call_without_a_limit_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(SpendError, match="call-unbounded"):
        worst_case(call(prompt="a", **body), None)


tokens = st.integers(0, 10**6)


@given(tokens, tokens, tokens, tokens, st.integers(0, 10**10))
def test_a_cost_is_the_sum_over_the_tokens(cached: int, fresh: int, reasoning: int, said: int, per_request: int) -> None:
    usage = Usage(prompt_tokens=cached + fresh, completion_tokens=reasoning + said, cached_tokens=cached, reasoning_tokens=reasoning)
    expected = fresh * 3 + cached * 1 + said * 10 + reasoning * 12 + per_request
    assert cost(usage, price(per_request=per_request)) == Amount(cached + fresh + reasoning + said, expected)
    assert cost(usage, None) == Amount(cached + fresh + reasoning + said, 0)


@given(st.text(max_size=50), st.integers(0, 100), st.data())
def test_what_a_byte_level_tokenizer_counts_costs_no_more_than_the_worst_case(text: str, limit: int, data: st.DataObject) -> None:
    text = text.encode(errors="replace").decode()
    asked = call(messages=[{"role": "user", "content": text}], max_tokens=limit)
    prompt = data.draw(st.integers(0, len(text.encode()) + TOKENS_PER_MESSAGE + TOKENS_PER_REQUEST))
    completion = data.draw(st.integers(0, limit))
    usage = Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=data.draw(st.integers(0, prompt)),
        reasoning_tokens=data.draw(st.integers(0, completion)),
    )
    real, worst = cost(usage, price(per_request=5)), worst_case(asked, price(per_request=5))
    assert real.tokens <= worst.tokens
    assert real.money <= worst.money


@pytest.mark.parametrize(
    "counts",
    [
        {"prompt_tokens": -1},
        {"completion_tokens": -1},
        {"cached_tokens": 4},
        {"reasoning_tokens": 4},
        {"cached_tokens": -1},
        {"reasoning_tokens": -1},
    ],
)
def test_counts_that_cannot_be_are_no_cost(counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="cannot have counted"):
        cost(Usage(**{"prompt_tokens": 3, "completion_tokens": 3} | counts), price())


def test_a_million_calls_add_up_to_the_bill_to_the_last_digit(tmp_path: Path) -> None:
    small = prices(tmp_path, FILE).price(Endpoint(base_url="https://api.example.com/v1", model="small"))
    one = cost(Usage(prompt_tokens=333, completion_tokens=7), small)
    assert in_units(one.money * 10**6) == (333 * Decimal("0.037575") + 7 * Decimal("0.15"))


def test_amounts_fit_under_both_caps() -> None:
    assert Amount(5, 5).fits(Caps(money=5, tokens=5))
    assert not Amount(5, 6).fits(Caps(money=5, tokens=5))
    assert not Amount(6, 5).fits(Caps(money=5, tokens=5))
    assert Amount(6, 6).fits(Caps())


# -- reports ------------------------------------------------------------------------------------------------------------------


def test_what_is_to_come_is_projected_from_what_has_been() -> None:
    found = projected([1.0, 2.0, 3.0] * 20, 100)
    assert found is not None
    assert found.value == pytest.approx(200)
    assert 150 < found.low < 200 < found.high < 250
    assert found.n == 60
    assert projected([], 100) is None


def test_break_even() -> None:
    def calls(*costs: str | None) -> tuple[int | None, str | None]:
        found = break_even_calls(*(None if one is None else Decimal(one) for one in costs))
        return found.calls, found.reason

    assert calls("10", "5", "0.002", "0.0005") == (10_000, None)
    assert calls("10", "5.0001", "0.002", "0.0005") == (10_001, None)
    assert calls("0", "0", "0.001", "0.002") == (0, None)
    number, reason = calls("1", "1", "0.001", "0.001")
    assert number is None
    assert "no less" in (reason or "")
    number, reason = calls("1", None, "0.001", None)
    assert number is None
    assert reason == "not known: the cost of training, the student's cost of a call"


@given(*[st.decimals(0, 10**4, places=6)] * 4)
def test_at_break_even_the_student_has_paid_for_itself_and_not_one_call_before(
    collection: Decimal, training: Decimal, teacher: Decimal, student: Decimal
) -> None:
    found = break_even_calls(collection, training, teacher, student).calls
    if found is None:
        assert student >= teacher
        return
    assert found * teacher >= collection + training + found * student
    if found:
        assert (found - 1) * teacher < collection + training + (found - 1) * student
