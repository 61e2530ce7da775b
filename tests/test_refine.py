"""A text model may rephrase and not invent: a malicious one, over the real protocol, never gets a word in; fair
paraphrases pass; a real tiny language model through the loader of the real one."""

import random, re, sys
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from adversarial import attacks, exchange, originals, paraphrases
from services import reply, words
from test_remote import door, service  # noqa: F401, a fixture
from tiny import tiny
from fada.clinical import QUESTIONS, parse_answer, write_answer
from fada.phantoms import make_phantom
from fada.refine import added, claims, judge, lost, refine, report_text, write_report
from fada.settings import FadaError
from fada.vlm import load


def test_no_finding_is_added_by_500_rewrites(door, tmp_path):
    """A model that smuggles something into every answer: all originals stand, every attempt is recorded with what
    was wrong"""
    cases, nth, rounds, answers = attacks(500), {}, {}, {}
    for q, t, attack in cases:  # one answer is attacked in several ways: each in a round with a fresh journal
        n = nth[q, t] = nth.get((q, t), -1) + 1
        rounds.setdefault(n, []).append((q, t))
        answers.setdefault((QUESTIONS[q].text, t), []).append(attack)

    def liar(body):
        "The next rewrite of the answer in the prompt"
        m = re.search(r'Question: (.*?) Answer: (.*)$', words(body), re.S)
        return reply(answers[m[1], m[2].strip()].pop(0), 100, 30)

    d = door(liar)
    out = [r for n, pairs in rounds.items() for r in refine(service(d, tmp_path / str(n), remote_timeout=20), pairs)]
    assert len(out) == len(d.answered) == 500 and not any(r.error for r in out)
    slipped = [(r.original, r.attempt) for r in out if r.accepted or r.text != r.original]
    assert slipped == []
    assert all(r.attempt and (r.added or r.lost) for r in out)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 4))
def test_other_rewrites(seed):
    "The judgement alone, on other draws"
    slipped = [(t, a) for q, t, a in attacks(1500, seed) if judge(t, a, q).accepted]
    assert slipped == []


def test_fair_paraphrases_pass():
    "Other wordings, spellings and orders of the same: all stand, and each is read as the original"
    cases = paraphrases(300)
    said = [judge(t, a, q) for q, t, a in cases]
    assert [r for r in said if not r.accepted] == []
    assert all(parse_answer(q, r.text) == parse_answer(q, t) for (q, t, _), r in zip(cases, said))


def test_an_answer_claims_what_it_claims():
    "Every true answer adds nothing to itself, and its reading survives a round through itself"
    for q, t in originals():
        assert added(t, t) == lost(t, t) == [] and judge(t, t, q).accepted and (claims(t) or q == 0)


@pytest.mark.parametrize(
    'source,text,said',
    [
        ('abnormal: short femur', 'abnormal', 'lost'),
        ('no abnormality seen', '', 'lost'),
        ('stomach bubble, spine', 'spine', 'lost'),
        ('femur', 'femur with hydronephrosis', 'added'),
        ('20-24 weeks', '24 weeks', 'added'),
        ('AC 250.0 mm', 'AC 250.0 cm', 'added'),
        ('AC 250.0 mm, HC 300.0 mm', 'AC and HC, 250.0 mm and 300.0 mm', 'added'),
        ('no abnormality seen', 'Normal for gestational age', 'added'),
        ('head left, face up', 'head left, face down', 'added'),
        ('axial, spine left', 'axial, spine left, head', 'added'),
    ],
)
def test_one_by_one(source, text, said):
    r = judge(source, text)
    assert r.text == source and (r.added if said == 'added' else r.lost) and not r.accepted


@pytest.mark.parametrize(
    'source,text',
    [
        ('left kidney, right lung', 'right kidney, left lung'),
        ('left kidney absent, right kidney seen', 'right kidney absent, left kidney seen'),
        ('cisterna magna 5 mm, lateral ventricle 9 mm', 'cisterna magna 9 mm, lateral ventricle 5 mm'),
        ('AC and HC, 250.0 mm and 300.0 mm', 'AC and HC, 300.0 mm and 250.0 mm'),
        ('kidneys. Not seen. Spine.', 'spine. Not seen. Kidneys.'),
    ],
)
def test_sides_numbers_and_denials_stay_where_they_belong(source, text):
    assert not judge(source, text).accepted and judge(source, source).accepted


def test_exchanges_are_refused():
    "Two sides, two sizes or two structures in each other's place: no words are new, and none may pass"
    rng = random.Random(0)
    cases = [exchange(rng) for _ in range(1000)]
    assert [c for c in cases if judge(*c).accepted] == [] and all(judge(a, a).accepted for a, _ in cases)


@pytest.mark.parametrize(
    'source,text',
    [
        ('left kidney 5 mm', 'The left kidney measures 0.5 cm'),
        ('spine left, head down', 'The head is down and the spine to the left'),
        ('AC 250 mm, HC 300 mm', 'HC 30 cm and AC 25 cm'),
        ('spine left', 'Spine: to the left'),
    ],
)
def test_what_keeps_its_place_may_move_as_a_whole(source, text):
    assert judge(source, text).accepted


@pytest.fixture(scope='module')
def writer(tmp_path_factory):
    name, _, weights = tiny('gemma3-text', tmp_path_factory.mktemp('text'))
    return load(name, weights=weights, device='cpu', precision='fp32')


def test_a_real_language_model_cannot_spoil_an_answer(writer):
    """MedGemma's text architecture with random weights talks nonsense: the originals stand, the nonsense is on
    record"""
    pairs = originals()[:24]
    longest = writer.max_new_tokens
    out = refine(writer, pairs, longest=12)
    assert [r.text for r in out] == [t for _, t in pairs] and not any(r.accepted or r.error for r in out)
    assert any(r.attempt for r in out) and all(r.added or r.lost for r in out) and writer.max_new_tokens == longest


def test_a_report_from_findings(writer, door, tmp_path):
    "Templates, a model's nonsense, a fair model, one that invents: the findings and nothing else in each"
    found = make_phantom('Thorax', (5, 1, 0)).answers
    text = report_text(found)
    assert (
        write_report(found).text == text
        and added(text, ' '.join(report_text({q: s}) for q, s in found.items())) == []
    )
    nonsense = write_report(found, writer, 12)
    assert nonsense.text == text and not nonsense.accepted
    given = lambda body: words(body).split('Findings: ', 1)[1]
    fair = door(lambda body: reply('In this scan: ' + given(body).replace('moderate', 'fair'), 200, 90))
    r = write_report(found, service(fair, tmp_path / 'a'))
    assert r.accepted and r.text.startswith('In this scan') and r.text != text
    assert (r.more['tokens_in'], r.more['tokens_out']) == (200, 90) and r.seconds > 0  # what it took is told
    liar = door(lambda body: reply(given(body) + ' The cerebellum is normal.', 200, 90))
    r = write_report(found, service(liar, tmp_path / 'b'))
    assert r.text == text and 'cerebellum' in r.added
    broken = door(lambda body: reply('x'), faults=1.0, kinds=('500',))
    r = write_report(found, service(broken, tmp_path / 'c', remote_retries=1))
    assert r.text == text and 'answered 500' in r.error
    for nothing in ([], ['short femur']):
        s = dict(normal=False, findings=nothing)
        assert parse_answer(7, write_answer(7, s)) == s
    assert report_text({7: dict(normal=False, findings=[])}) == 'Findings: abnormal.'
    with pytest.raises(FadaError, match='is no finding'):
        report_text({'plane': {'standard': True}})
    with pytest.raises(FadaError, match='did you mean plane'):
        report_text({'plain': {}})
