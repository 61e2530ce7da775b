"""The same forty phantom questions through every back end: a local model, transformers' own `serve` with that
model, a door that fails three times in ten, both protocols, a text model that rephrases, two ensembles; and
through the command line."""

import json, os, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from services import Door, TransformersServe, of_model, picture, reply, words
from commands import FADA, typed
from test_remote import KEY, as_llava
from tiny import tiny
from fada.ensemble import Ensemble
from fada.evaluate import AnswersLog, evaluate
from fada.refine import claims
from fada.registry import model_spec
from fada.settings import FadaError
from fada.vlm import load

LONGEST = 12


def here(name, weights, longest=LONGEST):
    "A local model with tiny random weights"
    return load(name, weights=weights, device='cpu', precision='fp32', max_new_tokens=longest)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    return tiny('llava', tmp_path_factory.mktemp('llava'))[2]


@pytest.fixture(scope='module')
def local(weights):
    return here('llava-1.5-7b', weights)


@pytest.fixture(scope='module')
def serve(weights):
    s = TransformersServe(weights)
    yield s
    s.close()


# a remote model with the prompt and the longest answer of the local one
through = partial(as_llava, max_new_tokens=LONGEST)


def forty(vlm, data, out):
    "({(image, question): record}, metrics) of five images"
    out.mkdir(parents=True, exist_ok=True)
    metrics = evaluate(vlm, data, out, images=5, controls=True)
    records = [r for r in AnswersLog(out / 'answers.jsonl').read()[0] if r['condition'] == 'plain']
    return {(r['image'], r['question_id']): r for r in records}, metrics


def texts(records):
    return {k: r['text'] for k, r in records.items()}


@pytest.fixture(scope='module')
def reference(local, small_data, tmp_path_factory):
    "What the local model says"
    said, _ = forty(local, small_data, tmp_path_factory.mktemp('local'))
    assert len(said) == 40
    # hardly two alike: equal answers below mean the same image and question
    assert len(set(texts(said).values())) > 30
    return texts(said)


def test_transformers_serve_gives_the_local_answers(reference, serve, small_data, tmp_path):
    "Forty answers equal to the last character; no controls of a paid service unless asked for"

    class Front:
        url = serve.url[:-3]

    vlm = through(Front, tmp_path, checkpoint=serve.model)
    said, m = forty(vlm, small_data, tmp_path / 'job')
    assert texts(said) == reference and m['coverage']['answered'] == 40
    took = m['spending']
    assert took['tries'] == 40 and took['guessed'] == 0 and took['tokens_in'] > 40 * 16 and took['cost']['USD'] > 0
    assert m['questions'][1]['controls'] == {}
    assert all(r['more']['served'].startswith(serve.model) for r in said.values())


def test_controls_of_a_paid_service_that_were_asked_for(local, small_data, tmp_path):
    """With `paid_controls` the service is asked about blank, strange and missing images too, each question once,
    and is paid for it"""
    d = Door(of_model(local))
    try:
        for asked in (False, True):
            m = evaluate(
                through(d, tmp_path / str(asked)),
                small_data,
                tmp_path / f'job{asked}',
                images=2,
                control_images=2,
                paid_controls=asked,
            )
            found = {k for q in m['questions'].values() for k in q['controls']}
            assert ({'blank', 'shuffled other', 'no image'} <= found) == asked
            assert (m['spending']['tries'] > 2 * 8) == asked
    finally:
        d.close()


@pytest.mark.parametrize('sdk', ['openai', pytest.param('anthropic', marks=pytest.mark.slow)])
def test_three_faults_in_ten_change_nothing(sdk, reference, serve, small_data, tmp_path):
    "Equal answers; each question answered once; the journal's tokens are the log's; asked again nothing is sent"
    d = Door(serve, faults=0.3, seed=4, late=2.0)
    try:
        vlm = through(d, tmp_path, sdk, remote_timeout=1)
        said, m = forty(vlm, small_data, tmp_path / 'job')
        assert texts(said) == reference
        assert len(d.answered) == len(set(d.answered)) == 42  # forty, and two to prove that it sees
        faults = len(d.log) - len(d.answered)
        assert 0.15 < faults / len(d.log) < 0.45
        lines = map(json.loads, (tmp_path / 'remote' / f'our-{sdk}.jsonl').read_text().splitlines())
        probes = [r for r in lines if 'reserved' not in r][:2]
        took = m['spending']
        assert took['tries'] + sum(p['tries'] for p in probes) == len(d.log) and took['guessed'] > 0
        assert (
            took['tokens_in'] + took['tokens_out'] + sum(sum(p['tokens']) for p in probes) == vlm.journal.took.sum()
        )
        n = len(d.log)
        again, m2 = forty(through(d, tmp_path, sdk), small_data, tmp_path / 'another')
        assert texts(again) == reference and len(d.log) == n and m2['spending']['tries'] == 0
    finally:
        d.close()


@pytest.mark.slow
def test_a_model_without_vision_behind_serve(tmp_path, tmp_path_factory, small_data):
    """transformers' serve drops images for a text model, and answers: found out by the tokens, before a phantom
    is sent"""
    folder = tiny('gemma3-text', tmp_path_factory.mktemp('text'))[2]
    text = folder.parent / 'text-only'
    vlm = here('medgemma-4b-text', folder)
    vlm.model.save_pretrained(text)
    vlm.processor.save_pretrained(text)
    about = text / 'tokenizer_config.json'
    kept = json.loads(about.read_text())
    kept.pop('processor_class')
    about.write_text(json.dumps(kept))
    s = TransformersServe(text)
    try:

        class Front:
            url = s.url[:-3]

        vlm = through(Front, tmp_path, checkpoint=s.model)
        with pytest.raises(FadaError, match='answers without the image'):
            forty(vlm, small_data, tmp_path / 'job')
    finally:
        s.close()


def test_a_text_model_is_asked_about_an_image(small_data, tmp_path, tmp_path_factory):
    "Forty error records, no answer"
    vlm = here('medgemma-4b-text', tiny('gemma3-text', tmp_path_factory.mktemp('t'))[2])
    said, m = without_controls(vlm, small_data, tmp_path / 'job')
    assert m['coverage']['failed'] == 40 and all('sees no image' in r['error'] for r in said.values())


def without_controls(vlm, data, out):
    "The same for models whose controls are not asked"
    out.mkdir(parents=True)
    m = evaluate(vlm, data, out, images=5, controls=False)
    return {(r['image'], r['question_id']): r for r in AnswersLog(out / 'answers.jsonl').read()[0]}, m


@pytest.mark.slow
def test_two_ensembles_keep_their_parts(serve, weights, small_data, tmp_path, tmp_path_factory):
    """By question (structures and the rest from two models, words by a text model that talks nonsense), and a
    weighted vote of a local model, one behind serve and one that fails: every part's answer is in the log, and
    no answer claims what no part said"""
    nano, row = load('blip2-nano'), model_spec('ensemble')

    class Front:
        url = serve.url[:-3]

    far = through(Front, tmp_path, checkpoint=serve.model)
    writer = here('medgemma-4b-text', tiny('gemma3-text', tmp_path_factory.mktemp('w'))[2], 8)
    mine = without_controls(nano, small_data, tmp_path / 'nano')[0]
    e = Ensemble(row, dict(eyes=nano, rest=far), route=dict(structures='eyes', others='rest'), writer=writer)
    by, m = without_controls(e, small_data, tmp_path / 'by')
    for (image, q), r in by.items():
        (part,) = r['more']['parts']
        assert part['model'] == ('eyes' if q == 1 else 'rest') and not r['error']
        refined = r['more']['refined']
        assert not refined['accepted'] and refined['attempt'] != r['text']
        if q == 1:
            assert r['text'] == mine[image, q]['text']
    where = serve.url.split('127.0.0.1', 1)[1]  # two servers of this machine are two
    assert (
        m['spending']['tries'] == 35 and m['identity']['members']['rest']['service']['host'] == f'this machine{where}'
    )
    broken = Door(of_model(nano), faults=1.0, kinds=('500',))
    try:
        absent = through(broken, tmp_path / 'b', remote_retries=1, table=dict(check_vision=False))
        e = Ensemble(row, dict(here=nano, there=far, broken=absent), votes=dict(here=2, there=1, broken=5))
        vote, m = without_controls(e, small_data, tmp_path / 'vote')
    finally:
        broken.close()
    for (image, q), r in vote.items():
        parts = {p['model']: p for p in r['more']['parts']}
        assert list(parts) == ['here', 'there', 'broken'] and 'answered 500' in parts['broken']['error']
        assert parts['here']['text'] == mine[image, q]['text'] and not r['error']
        said = set().union(*(ms for p in parts.values() for ms, _ in claims(p['text'])))
        assert all(ms & said or 'not determinable' in str(ms) for ms, _ in claims(r['text'])), (r['text'], parts)
    assert m['coverage']['answered'] == 40


def report_of_paid_answers(vlm, data, run, monkeypatch):
    "Evaluate as a job of `run`, then write the report where nothing may be loaded"
    from fada import vlm as room
    from fada.report import write_report
    from fada.settings import write_json

    out = run / 'job'
    out.mkdir(parents=True)
    m = evaluate(vlm, data, out, images=5, controls=False)
    write_json(
        out / 'config.json',
        dict(
            kind='evaluate',
            model=vlm.spec.name,
            weights='',
            adapter='',
            precision='fp32',
            categories=['all'],
            seed=0,
            data=str(data),
            load_seconds=0.0,
            load_grown_bytes=0,
            weights_bytes=0,
        ),
    )
    monkeypatch.setattr(room, 'load', None)
    write_report(run, data)
    monkeypatch.undo()
    return m


def test_a_writer_that_is_paid_and_a_part_that_is_down(small_data, tmp_path, monkeypatch):
    """What the writer took is in the spending; a part whose key is refused leaves an error in its places and takes
    nobody's answers with it; the report of it all needs neither key nor gate"""
    nano = load('blip2-nano')
    d = Door(lambda body: reply('nonsense', 100, 30))
    special = lambda *_: (401, b'{}')
    shut = Door(lambda body: reply('x'), special=special)
    try:
        writer, down = through(d, tmp_path / 'w'), through(shut, tmp_path / 'd', table=dict(check_vision=False))
        e = Ensemble(model_spec('ensemble'), dict(here=nano, down=down), votes=dict(here=1, down=9), writer=writer)
        m = report_of_paid_answers(e, small_data, tmp_path / 'run', monkeypatch)
        records = AnswersLog(tmp_path / 'run' / 'job' / 'answers.jsonl').read()[0]
        took = m['spending']
        gone = Ensemble(
            model_spec('ensemble'), dict(here=nano), votes=dict(here=1), writer=through(shut, tmp_path / 'g')
        ).ask(None, 'plane')
    finally:
        d.close()
        shut.close()
    assert len(records) == 40 and m['coverage']['answered'] == 40
    for r in records:
        parts = {p['model']: p for p in r['more']['parts']}
        assert 'key was refused' in parts['down']['error']
        assert r['text'] and not parts['here']['error'] and r['more']['refined']['attempt'] == 'nonsense'
    assert took['tries'] == len(d.log) and [took['tokens_in'], took['tokens_out']] == writer.journal.took.tolist()
    assert took['tokens_in'] == 100 * len(d.log) > 0 and took['cost']['USD'] > 0
    assert gone.text and not gone.error and 'key was refused' in gone.more['refined']['error']


def project(folder, url, **remote):
    "A group's folder: settings, a row of its own"
    folder.mkdir(exist_ok=True)
    (folder / 'models.toml').write_text(
        '[ours]\nlike = "openai"\ncheckpoint = "served"\nprompt = "{question}"\n'
        f'[ours.service]\nurl = "{url}/v1"\nkey = "OUR_KEY"\n'
        '[both]\nlike = "ensemble"\nparts = {"blip2-nano" = 2, ours = 1}\n'
    )
    given = {**dict(allowed='yes', keep_text='yes', timeout=2, requests_per_minute=60000), **remote}
    lines = ['[model]', 'name = ours', '[remote]', *(f'{k} = {v}' for k, v in given.items())]
    (folder / 'settings.ini').write_text('\n'.join(lines) + '\n')
    return folder


def run(folder, *command, key=KEY, **kw):
    "`fada` in that folder, with the SDK's own log switched on"
    env = dict(os.environ, OUR_KEY=key, OPENAI_LOG='debug', XDG_CONFIG_HOME=str(folder / 'config'))
    return subprocess.run([*FADA, *command], cwd=folder, capture_output=True, text=True, env=env, **kw)


@pytest.mark.slow
def test_the_key_is_nowhere(small_data, tmp_path):
    "A service that repeats the key in its errors and its answers: it is in no file, and on no stream"

    def gossip(body):
        return reply(f'the key is {KEY}, femur', 60 if picture(body) else 10)

    def special(body, headers, n):
        say = lambda text: json.dumps(dict(error=dict(message=text))).encode()
        if n == 1 and 'plane' in words(body):
            return 500, say(f'Bearer {KEY} failed')
        if 'abnormality' in words(body):
            return 400, say(f'your key {KEY} is fine, the question is not')

    d = Door(gossip, faults=0.3, kinds=('500', 'malformed', 'dropped', 'empty'), special=special)
    try:
        folder = project(tmp_path / 'p', d.url)
        r = run(
            folder,
            'evaluate',
            '--data',
            str(small_data),
            '--images',
            '3',
            '--out',
            str(folder / 'job'),
            '--json',
            '--categories',
            'all',
        )
        assert r.returncode == 0, r.stderr
        a = run(folder, 'ask', str(next(small_data.rglob('*.png'))), '--model', 'both', '--json')
        x = run(folder, 'models', 'access', 'ours', '--json')
    finally:
        d.close()
    assert sum(f'Bearer {KEY}' == h.get('authorization') for h in d.headers) == len(d.headers) > 24
    streams = [t for p in (r, a, x) for t in (p.stdout, p.stderr)]
    files = [p for p in folder.rglob('*') if p.is_file()]
    c = json.loads(r.stdout)['coverage']
    assert (c['asked'], c['failed']) == (24, 3) and len(files) >= 6
    assert json.loads(a.stdout)['answers'][0]['more']['parts'] and 'HTTP Request' in r.stderr
    for text in [*streams, *(p.read_bytes().decode('latin-1') for p in files)]:
        assert KEY[8:] not in text


@pytest.mark.parametrize(
    'command,remote,said',
    [
        (('ask', 'IMAGE'), dict(allowed='no'), '[remote] allowed'),
        pytest.param(
            ('ask', 'IMAGE', '--model', 'both'), dict(allowed='no'), '[remote] allowed', marks=pytest.mark.slow
        ),
        (('batch', 'GRID:ours'), dict(allowed='no'), 'ours sends images to this machine'),
        (('batch', 'GRID:both', '--dry-run'), dict(allowed='no'), '[remote] allowed'),
        (('ask', 'IMAGE'), dict(budget='0 tokens'), 'the budget of 0 tokens'),
        (('ask', 'IMAGE'), dict(budget='3 USD'), 'its price is not known'),
        pytest.param(('evaluate', '--data', 'DATA'), dict(allowed='no'), '[remote] allowed', marks=pytest.mark.slow),
        pytest.param(
            ('evaluate', '--data', 'DATA', '--weights', 'x'),
            {},
            'neither adapter nor weights',
            marks=pytest.mark.slow,
        ),
        (('ask', 'IMAGE', '--model', 'ensemble'), {}, 'without parts'),
        (('ask', 'IMAGE', '--model', 'plane-classifier'), {}, 'answers no questions'),
    ],
)
def test_bad_input_on_the_command_line(command, remote, said, small_data, tmp_path):
    "One sentence, exit 1, and nothing sent"
    d = Door(lambda body: reply('x'))
    try:
        folder = project(tmp_path / 'p', d.url, **remote)
        put = dict(IMAGE=str(next(small_data.rglob('*.png'))), DATA=str(small_data))
        for name in ('ours', 'both'):
            put[f'GRID:{name}'] = str(grid := folder / f'{name}.toml')
            grid.write_text(
                f'models = ["{name}"]\ntasks = ["baseline"]\ncategories = ["Femur"]\ndata = "{small_data}"\n'
            )
        r = run(folder, *[put.get(w, w) for w in command])
    finally:
        d.close()
    assert r.returncode == 1 and said in r.stderr + r.stdout and d.log == []
    assert 'Traceback' not in r.stderr
    if 'budget of 0' not in said:
        assert r.stdout == '' and r.stderr.count('error: ') == 1  # else eight records


def test_a_report_on_the_command_line(small_data, tmp_path):
    "Templates word what was read; a writer that sees nothing and is not there is one sentence"
    image = str(next(small_data.rglob('*.png')))
    r = run(tmp_path, "ask", image, "--report", "templates", "--json", "--model", "blip2-nano")
    assert r.returncode == 0, r.stderr
    said = json.loads(r.stdout)
    assert said['report']['text'].startswith('Structures: ') and said['report']['accepted']
    r = run(tmp_path, 'ask', image, 'plane', '--report', 'medgemma', '--model', 'blip2-nano')
    assert r.returncode == 1 and 'did you mean medgemma-4b' in r.stderr and r.stdout == ''


@pytest.mark.fault
def test_a_killed_evaluation_pays_nothing_twice(small_data, tmp_path):
    "Killed in the middle of its first batch: the next run asks only what was not answered"
    nano = load('blip2-nano')
    slow = of_model(nano)

    def answer(body):
        time.sleep(0.05)
        return slow(body)

    d = Door(answer)
    try:
        folder = project(tmp_path / 'p', d.url, parallel=2)
        env = dict(os.environ, OUR_KEY='k')
        command = typed(
            'evaluate --data {data} --images 8 --out {out} --categories all --json --quiet',
            data=small_data,
            out=folder / 'job',
        )
        p = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, start_new_session=True
        )
        end = time.time() + 120
        while len(d.answered) < 30:
            assert time.time() < end and p.poll() is None
            time.sleep(0.01)
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        time.sleep(0.3)
        before = len(d.answered)
        assert not (folder / 'job' / 'answers.jsonl').exists()  # nothing was logged yet: the journal alone knows
        out = subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout
        r = json.loads(out)
    finally:
        d.close()
    assert r['coverage']['answered'] == 64 and 30 <= before < 66
    twice = len(d.answered) - len(set(d.answered))
    assert twice <= 2  # replies under way when the process was killed
