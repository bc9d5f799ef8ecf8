"""The Triton kernels of `fused_triton`: from the products of states and heads to nats, and to the gradient with respect to the student's product.

Names as in `fused`: z a finished logit, p and q probabilities of teacher and student. A program has one row of V ids; sums over it are kept apart by lane
until its end. What is compiled in is in capitals. An id beyond the vocabulary, or one that is marked as listed, has the logit -inf. Everything is in
WIDE, float32 or float64, whatever is read and written.

Triton compiles from the source and knows neither types of Python nor libdevice when it interprets, so there are no annotations and no `libdevice.expm1`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stillroom.objectives import quantities

LOG_OF_ZERO = tl.constexpr(quantities.LOG_OF_ZERO)


@triton.jit
def over_all(
    student,
    student_stride,
    student_bias,
    out,
    out_stride,
    labels,
    label_products,
    coefficients,
    nats,
    size,
    teacher,
    teacher_stride,
    teacher_bias,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TEACHER_FACTOR: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TERMS: tl.constexpr,
    TERM_LANES: tl.constexpr,
    FORWARD: tl.constexpr,
    HARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Distributions over all ids: any number of terms on them, and the text's. TEACHER_FACTOR None: the teacher's are log-probabilities."""
    APART: tl.constexpr = HARD is not None and TEMPERATURE != 1.0
    SOFT: tl.constexpr = len(TERMS) > 0
    COOL: tl.constexpr = 1.0 / TEMPERATURE
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    out += row * out_stride
    lanes = tl.arange(0, BLOCK)

    top_q, sum_q = _nothing(BLOCK, WIDE)
    top_1, sum_1 = _nothing(BLOCK, WIDE)
    top_p, sum_p = _nothing(BLOCK, WIDE)
    for start in range(0, size, BLOCK):
        z, _ = _logits(student, student_bias, start + lanes, size, SOFTCAP, SCALE, WIDE)
        top_q, sum_q = _add_exp(top_q, sum_q, z * COOL)
        if APART:
            top_1, sum_1 = _add_exp(top_1, sum_1, z)
        if SOFT:
            y, _ = _logits(teacher + row * teacher_stride, teacher_bias, start + lanes, size, TEACHER_SOFTCAP, TEACHER_FACTOR, WIDE)
            if TEACHER_FACTOR is None:
                sum_p += tl.exp(y)
            else:
                top_p, sum_p = _add_exp(top_p, sum_p, y)
    top_q, sum_q = _over_lanes(top_q, sum_q)
    top_1, sum_1 = _over_lanes(top_1, sum_1)
    if TEACHER_FACTOR is None:
        # Log-probabilities that were rounded when they were stored do not sum to 1.
        mass = tl.sum(sum_p, 0)
    else:
        top_p, sum_p = _over_lanes(top_p, sum_p)
        mass = 1.0

    slopes_sum = tl.zeros([BLOCK], WIDE)
    if SOFT and not FORWARD and BACKWARD:
        for start in range(0, size, BLOCK):
            z, _ = _logits(student, student_bias, start + lanes, size, SOFTCAP, SCALE, WIDE)
            y, _ = _logits(teacher + row * teacher_stride, teacher_bias, start + lanes, size, TEACHER_SOFTCAP, TEACHER_FACTOR, WIDE)
            log_q, q = _normalised(z * COOL, top_q, sum_q)
            log_p, p = _teacher_normalised(y, top_p, sum_p, TEACHER_FACTOR)
            for place in tl.static_range(len(TERMS)):
                _, slopes = _value_and_slope(log_p, log_q, p, q, TERMS[place][0], TERMS[place][1], TERMS[place][2])
                slopes_sum += tl.where(start + lanes < size, TERMS[place][3] * slopes, 0.0)
    total = tl.sum(slopes_sum, 0)
    if SOFT and FORWARD:
        for place in tl.static_range(len(TERMS)):
            total -= TERMS[place][3] * mass
    if HARD is not None and not APART:
        total -= HARD

    if SOFT or BACKWARD:
        label = tl.load(labels + row)
        coefficient = tl.load(coefficients + row) * SCALE
        values = tl.zeros([TERM_LANES], WIDE)
        for start in range(0, size, BLOCK):
            ids = start + lanes
            z, capped = _logits(student, student_bias, ids, size, SOFTCAP, SCALE, WIDE)
            log_q, q = _normalised(z * COOL, top_q, sum_q)
            gradient = -total * q
            if SOFT:
                y, _ = _logits(teacher + row * teacher_stride, teacher_bias, ids, size, TEACHER_SOFTCAP, TEACHER_FACTOR, WIDE)
                log_p, p = _teacher_normalised(y, top_p, sum_p, TEACHER_FACTOR)
                for place in tl.static_range(len(TERMS)):
                    value, slopes = _value_and_slope(log_p, log_q, p, q, TERMS[place][0], TERMS[place][1], TERMS[place][2])
                    value_sum = tl.sum(tl.where(ids < size, value, 0.0), 0)
                    values += tl.where(tl.arange(0, TERM_LANES) == place, value_sum, 0.0)
                    gradient += TERMS[place][3] * slopes
            if BACKWARD:
                gradient *= COOL
                if HARD is not None:
                    gradient -= tl.where(ids == label, HARD, 0.0)
                if APART:
                    _, q_1 = _normalised(z, top_1, sum_1)
                    gradient += HARD * q_1
                gradient = _through_cap(gradient * coefficient, capped, SOFTCAP)
                tl.store(out + ids, gradient.to(out.dtype.element_ty), mask=ids < size)
        _store_values(nats, values, row, len(TERMS), TERM_LANES)
    if HARD is not None:
        _store_hard(nats, label_products, student_bias, labels, row, len(TERMS), top_1, sum_1, top_q, sum_q, APART, SOFTCAP, SCALE, WIDE)


@triton.jit
def over_list(
    student,
    student_stride,
    student_bias,
    out,
    out_stride,
    labels,
    label_products,
    coefficients,
    nats,
    size,
    ids,
    products,
    of_ids,
    of_others,
    offsets,
    gradients,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TERMS: tl.constexpr,
    TERM_LANES: tl.constexpr,
    HARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
):
    """Each listed id is a bucket, and all the others, whose products are the only ones above -inf in `student`, are one more: the last of the list."""
    APART: tl.constexpr = HARD is not None and TEMPERATURE != 1.0
    COOL: tl.constexpr = 1.0 / TEMPERATURE
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    out += row * out_stride
    begin = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    label = tl.load(labels + row)
    coefficient = tl.load(coefficients + row) * SCALE

    top_o, sum_o = _nothing(BLOCK, WIDE)
    top_1, sum_1 = _nothing(BLOCK, WIDE)
    for start in range(0, size, BLOCK):
        z, _ = _logits(student, student_bias, start + tl.arange(0, BLOCK), size, SOFTCAP, SCALE, WIDE)
        top_o, sum_o = _add_exp(top_o, sum_o, z * COOL)
        if APART:
            top_1, sum_1 = _add_exp(top_1, sum_1, z)
    top_o, sum_o = _over_lanes(top_o, sum_o)
    others_z = top_o + tl.log(sum_o)
    top_1, sum_1 = _over_lanes(top_1, sum_1)

    top_q, sum_q = _nothing(LIST_BLOCK, WIDE)
    top_l, sum_l = _nothing(LIST_BLOCK, WIDE)
    for first in range(begin, end + 1, LIST_BLOCK):
        _, _, z, _ = _listed(ids, products, student_bias, first, end, SOFTCAP, SCALE, WIDE, LIST_BLOCK)
        top_q, sum_q = _add_exp(top_q, sum_q, _bucket_logits(z, others_z, first, end, COOL, LIST_BLOCK))
        if APART:
            top_l, sum_l = _add_exp(top_l, sum_l, z)
    top_q, sum_q = _over_lanes(top_q, sum_q)
    if APART:
        top_l, sum_l = _over_lanes(top_l, sum_l)
        top_both = tl.maximum(top_1, top_l)
        sum_1 = sum_1 * tl.exp(top_1 - top_both) + sum_l * tl.exp(top_l - top_both)
        top_1 = top_both

    slopes_sum = tl.zeros([LIST_BLOCK], WIDE)
    others_slope = tl.zeros([LIST_BLOCK], WIDE)
    values = tl.zeros([TERM_LANES], WIDE)
    for first in range(begin, end + 1, LIST_BLOCK):
        entries = first + tl.arange(0, LIST_BLOCK)
        _, _, z, _ = _listed(ids, products, student_bias, first, end, SOFTCAP, SCALE, WIDE, LIST_BLOCK)
        log_q, q = _normalised(_bucket_logits(z, others_z, first, end, COOL, LIST_BLOCK), top_q, sum_q)
        log_p = _of_buckets(of_ids, of_others, row, first, end, LIST_BLOCK)
        for place in tl.static_range(len(TERMS)):
            value, slopes = _value_and_slope(log_p, log_q, tl.exp(log_p), q, TERMS[place][0], TERMS[place][1], TERMS[place][2])
            value_sum = tl.sum(tl.where(entries <= end, value, 0.0), 0)
            values += tl.where(tl.arange(0, TERM_LANES) == place, value_sum, 0.0)
            slopes_sum += tl.where(entries <= end, TERMS[place][3] * slopes, 0.0)
            others_slope += tl.where(entries == end, TERMS[place][3] * slopes, 0.0)
    total = tl.sum(slopes_sum, 0)
    if HARD is not None and not APART:
        total -= HARD
    _store_values(nats, values, row, len(TERMS), TERM_LANES)
    if HARD is not None:
        _store_hard(nats, label_products, student_bias, labels, row, len(TERMS), top_1, sum_1, top_q, sum_q, APART, SOFTCAP, SCALE, WIDE)

    if BACKWARD:
        # An id in the last bucket has its share of the bucket's gradient.
        others_q = tl.exp(others_z - top_q) / sum_q
        share = COOL * (tl.sum(others_slope, 0) - total * others_q) / sum_o
        for start in range(0, size, BLOCK):
            others = start + tl.arange(0, BLOCK)
            z, capped = _logits(student, student_bias, others, size, SOFTCAP, SCALE, WIDE)
            gradient = _add_text(share * tl.exp(z * COOL - top_o), z, others, label, top_1, sum_1, HARD, APART)
            gradient = _through_cap(gradient * coefficient, capped, SOFTCAP)
            tl.store(out + others, gradient.to(out.dtype.element_ty), mask=z > float("-inf"))
        for first in range(begin, end + 1, LIST_BLOCK):
            entries = first + tl.arange(0, LIST_BLOCK)
            inside, listed, z, capped = _listed(ids, products, student_bias, first, end, SOFTCAP, SCALE, WIDE, LIST_BLOCK)
            log_q, q = _normalised(z * COOL, top_q, sum_q)
            log_p = _of_buckets(of_ids, of_others, row, first, end, LIST_BLOCK)
            gradient = -total * q
            for place in tl.static_range(len(TERMS)):
                _, slopes = _value_and_slope(log_p, log_q, tl.exp(log_p), q, TERMS[place][0], TERMS[place][1], TERMS[place][2])
                gradient += TERMS[place][3] * slopes
            gradient = _add_text(gradient * COOL, z, listed, label, top_1, sum_1, HARD, APART)
            gradient = _through_cap(gradient * coefficient, capped, SOFTCAP)
            tl.store(gradients + entries, gradient.to(gradients.dtype.element_ty), mask=inside)


# -- parts of a kernel --------------------------------------------------------------------------------------------------


@triton.jit
def _logits(products, bias, ids, size, SOFTCAP: tl.constexpr, FACTOR: tl.constexpr, WIDE: tl.constexpr):
    """A row's logits at `ids`, and what tanh gave where there is a cap. FACTOR None: what is there is finished."""
    raw = tl.load(products + ids, mask=ids < size, other=float("-inf")).to(WIDE)
    if bias is not None:
        raw += tl.load(bias + ids, mask=ids < size, other=0.0).to(WIDE)
    return _finished(raw, SOFTCAP, FACTOR)


@triton.jit
def _listed(ids, products, bias, first, end, SOFTCAP: tl.constexpr, FACTOR: tl.constexpr, WIDE: tl.constexpr, LIST_BLOCK: tl.constexpr):
    """Entries of the list from `first` on: whether there are so many, their ids, logits, and what tanh gave."""
    entries = first + tl.arange(0, LIST_BLOCK)
    inside = entries < end
    listed = tl.load(ids + entries, mask=inside, other=0)
    raw = tl.load(products + entries, mask=inside, other=float("-inf")).to(WIDE)
    if bias is not None:
        raw += tl.load(bias + listed, mask=inside, other=0.0).to(WIDE)
    z, capped = _finished(raw, SOFTCAP, FACTOR)
    return inside, listed, z, capped


@triton.jit
def _finished(raw, SOFTCAP: tl.constexpr, FACTOR: tl.constexpr):
    capped = raw
    if SOFTCAP is not None:
        capped = _tanh(raw * (1.0 / SOFTCAP))
        # tanh would bring back what is marked.
        raw = tl.where(raw == float("-inf"), raw, capped * (SOFTCAP * FACTOR))
    elif FACTOR is not None:
        raw = raw * FACTOR
    return raw, capped


@triton.jit
def _bucket_logits(z, others_z, first, end, COOL: tl.constexpr, LIST_BLOCK: tl.constexpr):
    return tl.where(first + tl.arange(0, LIST_BLOCK) == end, others_z, z * COOL)


@triton.jit
def _of_buckets(of_ids, of_others, row, first, end, LIST_BLOCK: tl.constexpr):
    entries = first + tl.arange(0, LIST_BLOCK)
    return tl.where(entries == end, tl.load(of_others + row), tl.load(of_ids + entries, mask=entries < end, other=0.0))


@triton.jit
def _through_cap(gradient, capped, SOFTCAP: tl.constexpr):
    # d tanh(x) / dx = 1 - tanh(x)^2
    if SOFTCAP is not None:
        gradient = gradient * (1.0 - capped * capped)
    return gradient


@triton.jit
def _add_text(gradient, z, ids, label, top_1, sum_1, HARD: tl.constexpr, APART: tl.constexpr):
    if HARD is not None:
        gradient -= tl.where(ids == label, HARD, 0.0)
    if APART:
        _, q_1 = _normalised(z, top_1, sum_1)
        gradient += HARD * q_1
    return gradient


@triton.jit
def _store_values(nats, values, row, TERMS: tl.constexpr, TERM_LANES: tl.constexpr):
    places = tl.arange(0, TERM_LANES)
    tl.store(nats + places * tl.num_programs(0) + row, values, mask=places < TERMS)


@triton.jit
def _store_hard(
    nats,
    products,
    bias,
    labels,
    row,
    TERMS: tl.constexpr,
    top_1,
    sum_1,
    top_q,
    sum_q,
    APART: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """-log q of the text's token, at temperature 1."""
    raw = tl.load(products + row).to(WIDE)
    if bias is not None:
        raw += tl.load(bias + tl.load(labels + row)).to(WIDE)
    z, _ = _finished(raw, SOFTCAP, SCALE)
    if APART:
        log_q, _ = _normalised(z, top_1, sum_1)
    else:
        log_q, _ = _normalised(z, top_q, sum_q)
    tl.store(nats + TERMS * tl.num_programs(0) + row, -log_q)


# Sums of exponentials, as (top, sum of e^(z - top)).


@triton.jit
def _nothing(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    # Below every logit, and not -inf, of which a difference would be no number.
    return tl.full([BLOCK], -3e38, WIDE), tl.zeros([BLOCK], WIDE)


@triton.jit
def _add_exp(top, total, z):
    """One more logit for each lane, with one exponential: that of the larger is 1."""
    smaller = tl.exp(-tl.abs(z - top))
    return tl.maximum(top, z), tl.where(z > top, total * smaller + 1.0, total + smaller)


@triton.jit
def _over_lanes(top, total):
    highest = tl.max(top, 0)
    return highest, tl.sum(total * tl.exp(top - highest), 0)


@triton.jit
def _normalised(z, top, total):
    """The logarithm of q, and q. The q of a row sum to 1 as the same exponentials sum to `total`: no rounding of the logarithm is in them."""
    return z - top - tl.log(total), tl.exp(z - top) / total


@triton.jit
def _teacher_normalised(y, top, total, FACTOR: tl.constexpr):
    if FACTOR is None:
        return y, tl.exp(y)
    return _normalised(y, top, total)


# The quantities, as in `quantities`: one bucket's share of the value, and its slope, up to a multiple of q.


@triton.jit
def _value_and_slope(log_p, log_q, p, q, FORM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    if FORM == "forward_kl":
        return _expected(p, log_p - log_q), -p
    elif FORM == "listed":
        # From drawn ids: p's place is taken by the share, log_p, of an id among the draws.
        return _expected(log_p, -log_q), -log_p
    elif FORM == "reverse_kl":
        slopes = q * (log_q - _without_zeros(log_p))
        return slopes, slopes
    elif FORM == "generalized_jsd":
        log_m = tl.log(_mixture(p, q, FIRST))
        slopes = (1.0 - FIRST) * q * (log_q - log_m)
        return FIRST * _expected(p, log_p - log_m) + slopes, slopes
    elif FORM == "skew_forward_kl":
        m = _mixture(p, q, FIRST)
        return _expected(p, log_p - tl.log(m)), (FIRST - 1.0) * (p * q / m)
    elif FORM == "skew_reverse_kl":
        m = _mixture(p, q, 1.0 - FIRST)
        value = q * (log_q - tl.log(m))
        return value, value + (1.0 - FIRST) * (p * q / m)
    elif FORM == "total_variation":
        # Equal up to rounding is equal.
        equal = tl.abs(log_p - log_q) <= (64.0 * 2.0**-52 if q.dtype == tl.float64 else 64.0 * 2.0**-23)
        half = 0.5 * q
        return 0.5 * tl.abs(q - p), tl.where(equal, 0.0, tl.where(q > p, half, tl.where(q < p, -half, 0.0)))
    else:
        tl.static_assert(FORM == "alpha_beta")
        return _alpha_beta(log_p, log_q, FIRST, SECOND)


@triton.jit
def _alpha_beta(log_p, log_q, ALPHA: tl.constexpr, BETA: tl.constexpr):
    S: tl.constexpr = ALPHA + BETA
    finite = _without_zeros(log_p)
    more = finite > log_q
    highest = tl.maximum(finite, log_q)
    apart = -tl.abs(finite - log_q)
    of_alpha = _grown(apart, ALPHA)
    of_beta = _grown(apart, BETA)
    share = tl.where(more, tl.exp(BETA * apart) * of_alpha - of_beta, tl.exp(ALPHA * apart) * of_beta - of_alpha)
    share = share * tl.exp(S * highest) / S
    slopes = tl.where(more, of_alpha, -of_alpha) * tl.exp(ALPHA * highest + BETA * log_q)
    if ALPHA > 0:
        zero = log_p == float("-inf")
        alone = tl.exp(S * log_q)
        share = tl.where(zero, alone / (ALPHA * S), share)
        slopes = tl.where(zero, alone / ALPHA, slopes)
    return share, slopes


@triton.jit
def _grown(x, RATE: tl.constexpr):
    if RATE == 0:
        return x
    return _expm1(RATE * x) / RATE


@triton.jit
def _without_zeros(log_p):
    return tl.where(log_p == float("-inf"), LOG_OF_ZERO, log_p)


@triton.jit
def _expected(p, difference):
    return tl.where(p > 0, p * difference, 0.0)


@triton.jit
def _mixture(p, q, WEIGHT_ON_P: tl.constexpr):
    tiny = 2.2250738585072014e-308 if q.dtype == tl.float64 else 1.1754943508222875e-38
    return tl.maximum(WEIGHT_ON_P * p + (1.0 - WEIGHT_ON_P) * q, tiny)


@triton.jit
def _tanh(x):
    grown = _expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0, grown, -grown) / (2.0 + grown)


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0, by its series where the difference would cancel. The interpreter knows no libdevice, which has one."""
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 8
    series = x * 0.0 + 1.0
    for place in tl.static_range(TERMS - 1):
        series = 1.0 + series * x * (1.0 / (TERMS - place))
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)
