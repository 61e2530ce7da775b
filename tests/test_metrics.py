"""Properties of the parser, the scores and the statistics: bounds, symmetry, perfect answers, order, nothing that
raises."""

import json
from datetime import timedelta
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from fada.clinical import (
    CATEGORIES,
    FINDINGS,
    GRADES,
    PARAMETERS,
    QUESTIONS,
    REASONS,
    RECOMMENDATIONS,
    STRUCTURES,
    UNITS,
    phrase_answer,
)
from fada.metrics import primary, score_answer, score_table, set_f1
from fada.parse import made_up, read_answer
from fada.scores import agreement, question_scores, score_rows, token_f1, wording_scores
from fada.stats import class_interval, difference, holm, mean_interval, permutation_test, reliability

quick = settings(max_examples=60, deadline=timedelta(seconds=2), derandomize=True, database=None)
sets = lambda table: st.sets(st.sampled_from(list(table)), max_size=6).map(sorted)
IN_MM = [p for p in PARAMETERS if UNITS.get(p, 'mm') == 'mm']


@st.composite
def weeks(draw):
    low = draw(st.integers(5, 40))
    return dict(weeks=[low, low + draw(st.integers(1, 4))])


@st.composite
def biometry(draw):
    mm = draw(st.dictionaries(st.sampled_from(IN_MM), st.floats(2, 400).map(lambda v: round(v, 1)), max_size=3))
    return dict(parameters=sorted(mm) or draw(sets(IN_MM)), **({'mm': mm} if mm else {}))


ANSWERS = {
    1: sets(STRUCTURES).map(lambda s: dict(structures=s)),
    2: st.builds(
        lambda a, s: dict(axis=a, spine=s),
        st.sampled_from(['axial', 'longitudinal', 'sagittal']),
        st.sampled_from(['left', 'right', 'up', 'down']),
    ),
    3: st.builds(
        lambda c, s: dict(plane=c.plane, standard=s), st.sampled_from(list(CATEGORIES.values())), st.booleans()
    ),
    4: biometry(),
    5: st.one_of(weeks(), st.just(dict(weeks=None))),
    6: st.builds(lambda g, r: dict(grade=g, reasons=r), st.sampled_from(list(GRADES)), sets(REASONS)),
    7: sets(FINDINGS).map(lambda f: dict(normal=not f, findings=f)),
    8: st.sampled_from(list(RECOMMENDATIONS)).map(lambda c: {'class': c}),
}
answers = st.integers(1, 8).flatmap(lambda q: st.tuples(st.just(q), ANSWERS[q], ANSWERS[q], st.integers(0, 2)))


@given(answers)
@settings(quick, max_examples=300)
def test_every_wording_is_read_back_and_perfect_is_one(case):
    q, s, other, k = case
    found = read_answer(q, phrase_answer(q, s, k))
    assert {x: found.get(x) for x in s} == s, (phrase_answer(q, s, k), found)
    assert score_answer(q, s, found) == 1 and not made_up(q, s, found)
    assert 0 <= score_answer(q, s, read_answer(q, phrase_answer(q, other, k))) <= 1


@given(st.integers(1, 8), st.text(max_size=200))
@settings(quick, max_examples=300)
def test_any_text_is_read_or_not_but_never_raises(q, text):
    found = read_answer(q, text)
    json.dumps(found)
    assert isinstance(found, dict) and read_answer(q, f'  {text.upper()} ') == read_answer(q, text.upper())


@given(st.lists(st.sampled_from(list(STRUCTURES)), min_size=1, max_size=6, unique=True), st.randoms())
@quick
def test_order_and_repetition_of_items_do_not_matter(items, rnd):
    mixed = items + items[:1]
    rnd.shuffle(mixed)
    assert read_answer(1, ', '.join(items)) == read_answer(1, ', '.join(mixed)) == read_answer(1, ' and '.join(mixed))


@given(sets(STRUCTURES), sets(STRUCTURES))
@quick
def test_set_f1_is_symmetric_and_bounded(a, b):
    assert set_f1(a, b) == set_f1(b, a) and 0 <= set_f1(a, b) <= 1 and (set_f1(a, b) == 1) == (a == b)


@given(
    st.sampled_from(sorted(STRUCTURES)),
    st.sampled_from(
        [
            'no {} seen',
            'the {} is not visible',
            'absence of the {}',
            'without {}',
            '{} cannot be identified',
            'unable to identify the {}',
            'the {} was not well visualised',
        ]
    ),
)
@quick
def test_denied_structures_are_not_seen(name, words):
    found = read_answer(1, words.format(name))
    assert found['structures'] == [] and found['denied'], found


@given(
    st.integers(6, 41),
    st.integers(0, 6),
    st.sampled_from(
        ['{}w{}d', '{} weeks and {} days', '{}+{}', '{} weeks {} days', 'about {} + {} weeks', '{} {}/7 weeks']
    ),
)
@quick
def test_weeks_and_days(w, d, words):
    if words.endswith('/7 weeks') and not d:
        return
    assert read_answer(5, words.format(w, d))['days'] == [7 * w + d] * 2


@given(
    st.sampled_from(IN_MM),
    st.floats(3, 300).map(lambda v: round(v, 1)),
    st.sampled_from(['{p} {v} mm', '{p}: {v}mm', 'the {p} measures {v} mm', '{p} is about {v} mm', '{p} = {c} cm']),
)
@quick
def test_numbers_with_units(p, v, words):
    assert read_answer(4, words.format(p=p, v=v, c=round(v / 10, 3)))['mm'][p] == pytest.approx(v, rel=1e-6)
    assert 'mm' not in read_answer(4, f'{p} {v}')  # a number without its unit is no length


@given(st.text(max_size=60), st.text(max_size=60))
@quick
def test_wording_is_bounded_and_symmetric(a, b):
    assert token_f1(a, b) == token_f1(b, a) and 0 <= token_f1(a, b) <= 1 and token_f1(a, a) == 1
    w = wording_scores([a], [b])
    assert all(-1e-9 <= w[k] <= 1 + 1e-9 for k in ('exact', 'token_f1', 'rouge_l', 'bleu'))


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12)), min_size=1, max_size=60))
@quick
def test_intervals_hold_their_mean(rows):
    v, c = zip(*rows)
    m = mean_interval(v, c, draws=200)
    assert 0 <= m['mean'] <= 1 and m['clusters'] == len(set(c))
    if m['low'] is not None:
        assert min(v) - 1e-9 <= m['low'] <= m['high'] <= max(v) + 1e-9
    d, e = difference(v, np.zeros(len(v)), c, draws=200), difference(np.zeros(len(v)), v, c, draws=200)
    assert d['mean'] == pytest.approx(-e['mean']) and 0 < permutation_test(v, np.zeros(len(v)), c, draws=200) <= 1
    assert permutation_test(v, v, c, draws=200) == 1


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=8))
@quick
def test_holm_never_lowers_and_keeps_order(p):
    h = holm(p)
    assert all(p[k] <= h[k] <= 1 for k in p) and sorted(p, key=p.get) == sorted(h, key=lambda k: (h[k], p[k]))


@given(
    st.lists(st.tuples(st.sampled_from('abc'), st.sampled_from(['a', 'b', 'c', None])), min_size=1, max_size=40),
    st.randoms(),
)
@quick
def test_class_metrics_do_not_depend_on_row_order(rows, rnd):
    mixed = list(rows)
    rnd.shuffle(mixed)
    f = lambda r: class_interval(*map(list, zip(*r)), range(len(r)), draws=50)['mean']
    assert f(rows) == pytest.approx(f(mixed)) and 0 <= f(rows) <= 1
    assert class_interval([t for t, _ in rows], [t for t, _ in rows], range(len(rows)), draws=50)['mean'] == 1


def frame(q, truth, said, **more):
    return pd.DataFrame(
        dict(
            question_id=q,
            answer=truth,
            prediction=said,
            error='',
            patient=[f'P{k}' for k in range(len(truth))],
            **more,
        )
    )


def test_always_normal_has_one_half():
    "The score that published 98 % for saying nothing: here it is one half, with its sensitivity beside it"
    t = score_table(frame(7, ['no abnormality seen'] * 98 + ['abnormal: short femur'] * 2, ['Normal.'] * 100))
    d = question_scores(t)[7]
    assert (
        t.score.mean() == 0.98
        and d['score']['mean'] == 0.5
        and (d['sensitivity'], d['found'], d['positive']) == (0, 0, 2)
    )
    assert primary(t)['mean'] == 0.5


def test_errors_and_gaps_have_no_score():
    t = score_table(
        frame(6, ['good', 'good', '', 'good'], ['good', None, 'good', float('nan')]).assign(
            error=['', 'timeout', '', '']
        )
    )
    assert t.score.isna().tolist() == [False, True, True, False] and t.score[3] == 0
    c = question_scores(t)[6]['coverage']
    assert (c['asked'], c['failed'], c['no_reference'], c['unparsed']) == (4, 1, 1, 1)


def test_not_determinable_is_an_answer_and_a_number_is_made_up():
    t = score_table(frame(5, ['not determinable'] * 3, ['not determinable', '24 weeks', 'cannot be assessed']))
    assert t.score.tolist() == [1, 0, 1] and t.made_up.tolist() == [False, True, False]
    d = question_scores(t)[5]
    assert (d['left_open'], d['not_determinable'], d['made_up']) == (2, 3, 1)


def test_table_for_people_has_every_question():
    rows = pd.concat(
        [
            score_table(frame(q, [phrase_answer(q, s)] * 6, [phrase_answer(q, s, 1)] * 6, confidence=0.8))
            for q, s in {
                1: dict(structures=['liver']),
                2: dict(axis='axial', spine='left'),
                3: dict(plane='four-chamber plane', standard=True),
                4: dict(parameters=['FL'], mm={'FL': 30.0}),
                5: dict(weeks=[20, 22]),
                6: dict(grade='good', reasons=[]),
                7: dict(normal=True, findings=[]),
                8: {'class': 'refer'},
            }.items()
        ]
    )
    out = score_rows(question_scores(rows))
    assert len(out) == len(QUESTIONS) and (out.score == '1.00').all() and (out['not read'] == '0 of 6').all()


def test_agreement_is_bland_and_altman():
    a, b = np.array([10.0, 20, 30, 40]), np.array([11.0, 19, 33, 42])
    m = agreement(a, b)
    assert m['bias'] == pytest.approx((b - a).mean()) and m['high'] - m['low'] == pytest.approx(
        2 * 1.96 * (b - a).std(ddof=1)
    )
    assert reliability([0.9] * 10, [1] * 9 + [0])['ece'] == pytest.approx(0)
