"""The answers log: two writers, a killed writer, an identity that changes, a control that is not its donor's
answer, answers from elsewhere."""

import json, subprocess, sys, time
from pathlib import Path
import pandas as pd
import pytest
from commands import typed
from fada.answers import AnswersLog
from fada.evaluate import ask_table, evaluate, evaluate_answers
from fada.data import load_table, subset
from fada.vlm import load

WRITER = (
    "import sys; from fada.answers import AnswersLog; log = AnswersLog(sys.argv[1]); print('ready', flush=True); sys.stdin.readline()\n"
    "for k in range(150): log.append([dict(key=f'{sys.argv[2]}-{k}-{n}', text='x'*(97*k % 9000)) for n in range(3)])"
)


def writers(path, n=2):
    "Processes that append to one log, started together"
    ps = [
        subprocess.Popen(
            [sys.executable, '-c', WRITER, str(path), str(w)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for w in range(n)
    ]
    for p in ps:
        assert p.stdout.readline().strip() == 'ready'
    for p in ps:
        p.stdin.write('\n')
        p.stdin.flush()
    return ps


def test_two_processes_do_not_mix_their_lines(tmp_path):
    ps = writers(tmp_path / 'a.jsonl')
    assert [p.wait(60) for p in ps] == [0, 0]
    records, damaged = AnswersLog(tmp_path / 'a.jsonl').read()
    assert damaged == 0 and len(records) == len({r['key'] for r in records}) == 2 * 150 * 3


@pytest.mark.fault
def test_a_killed_writer_leaves_whole_lines_and_at_most_one_half(tmp_path):
    for _ in range(5):
        p, other = writers(tmp_path / 'a.jsonl')
        time.sleep(0.05)
        p.kill()
        p.wait()
        other.wait(60)
    AnswersLog(tmp_path / 'a.jsonl').append([dict(key='last')])
    records, damaged = AnswersLog(tmp_path / 'a.jsonl').read()
    raw = (tmp_path / 'a.jsonl').read_text().splitlines()
    assert damaged <= 5 and len(records) + damaged == len(raw) and records[-1]['key'] == 'last'
    assert sum(r['key'].startswith('1-') for r in records) == 5 * 450  # the other writer lost nothing


@pytest.mark.fault
def test_two_evaluations_on_one_log(small_data, tmp_path):
    "Two runs at once on one folder: whole lines, equal scores, and a third run asks nothing"
    command = typed(
        'evaluate --model blip2-nano --data {data} --out {out} --categories all --images 8 '
        '--control-images 4 --json --quiet',
        data=small_data,
        out=tmp_path / 'job',
    )
    ps = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    a, b = (json.loads(p.communicate(timeout=240)[0]) for p in ps)
    score = lambda m: {q: x['score']['mean'] for q, x in m['questions'].items()}
    records, damaged = AnswersLog(tmp_path / 'job' / 'answers.jsonl').read()
    assert damaged == 0 and score(a) == score(b)
    c = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert score(c) == score(a) and len(AnswersLog(tmp_path / 'job' / 'answers.jsonl').read()[0]) == len(records)


@pytest.fixture(scope='module')
def nano():
    return load('blip2-nano')


def test_another_identity_asks_again(small_data, tmp_path, nano):
    "Anything in the identity changes the key: longest answer, precision, prompt; the same identity asks nothing"
    log = AnswersLog(tmp_path / 'a.jsonl')
    rows = subset(load_table(small_data, split='test'), 2)
    n = len(rows)
    asked = lambda: len(log.read()[0])
    ask_table(nano, small_data, rows, 'plain', log)
    assert asked() == n
    ask_table(nano, small_data, rows, 'plain', log)
    assert asked() == n
    nano.max_new_tokens += 1
    try:
        ask_table(nano, small_data, rows, 'plain', log)
        assert asked() == 2 * n
    finally:
        nano.max_new_tokens -= 1
    nano.precision = 'bf16'
    try:
        ask_table(nano, small_data, rows, 'plain', log)
        assert asked() == 3 * n
    finally:
        nano.precision = 'fp32'
    ask_table(nano, small_data, rows.assign(question=rows.question + ' '), 'plain', log)
    assert asked() == 4 * n
    ask_table(nano, small_data, rows, 'plain', log)
    assert asked() == 4 * n


def test_a_shuffled_control_is_not_the_donors_answer(small_data, tmp_path, nano):
    "The same pixels shown in another row's place are asked and kept apart, with the row's reference"
    log = AnswersLog(tmp_path / 'a.jsonl')
    rows = load_table(small_data, split='test')
    a, b = rows.image.drop_duplicates().iloc[:2]
    sha = dict(zip(rows.image, rows.pixels_sha256))
    two = rows[rows.image.isin([a, b])]
    ask_table(nano, small_data, two, 'plain', log)
    said = ask_table(nano, small_data, two[two.image == a], 'shuffled same', log, {a: (b, sha[b])})
    records = log.read()[0]
    assert len(records) == 24 and len({r['key'] for r in records}) == 24
    own = {r['question_id']: r['text'] for r in records if r['condition'] == 'plain' and r['image'] == b}
    assert (
        said.prediction.tolist() == [own[q] for q in said.question_id]
        and said.answer.tolist() == two[two.image == a].answer.tolist()
    )
    ask_table(nano, small_data, two[two.image == a], 'shuffled same', log, {a: (a, sha[a])})
    assert len(log.read()[0]) == 32  # other pixels: again


def test_answers_from_elsewhere_score_as_ours(small_data, tmp_path, nano):
    "One run's answers as CSV and in the nested shape: the same scores, and a job folder that can be compared"
    ours = evaluate(nano, small_data, tmp_path / 'ours', controls=False)
    rows = pd.DataFrame(AnswersLog(tmp_path / 'ours' / 'answers.jsonl').read()[0])
    rows[['image', 'category', 'question', 'text']].rename(columns=dict(text='Response')).to_csv(
        tmp_path / 'a.csv', index=False
    )
    nested = {
        Path(i).name: dict(questions=[dict(question=r.question, response=r.text) for r in g.itertuples()])
        for i, g in rows.groupby('image')
    }
    (tmp_path / 'a.json').write_text(json.dumps(nested))
    for f in ('a.csv', 'a.json'):
        m = evaluate_answers(tmp_path / f, tmp_path / f'job-{f}', small_data)
        assert {q: x['score'] for q, x in m['questions'].items()} == {
            q: x['score'] for q, x in ours['questions'].items()
        }
        assert m['coverage']['missing'] == 0 and set(m['questions'][1]['controls']) == {
            'majority',
            'majority in category',
        }
    r = subprocess.run(
        typed(
            'evaluate --answers {answers} --data {data} --out {out} --json --quiet',
            answers=tmp_path / 'a.csv',
            data=small_data,
            out=tmp_path / 'cli',
        ),
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0 and json.loads(r.stdout)['endpoint']['mean'] == ours['endpoint']['mean'], r.stderr
    r = subprocess.run(
        typed('evaluate --answers {answers} --out {out} --quiet', answers=tmp_path / 'a.csv', out=tmp_path / 'alone'),
        capture_output=True,
        text=True,
    )
    # predictions alone
    assert r.returncode == 0 and 'green: ' not in r.stdout and (tmp_path / 'alone' / 'metrics.json').exists(), (
        r.stderr
    )
