"""Services behind the calls of a local model, against real servers on loopback: what is sent, what comes
back, what it takes, and what happens when it does not come."""

import io, json, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np
from PIL import Image, ImageDraw
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from services import FAULTS, Door, of_model, picture, reply, words
from fada.phantoms import make_phantom
from fada.registry import model_spec
from fada import remote
from fada.remote import NEAR, PROBE, Journal, Remote, host_kind, house
from fada.settings import FadaError, load_settings
from fada.vlm import Request, load

KEY = 'sk-proj-aVerySecretKey0123456789'
URL = {'openai': '/v1', 'anthropic': ''}


@pytest.fixture(scope='module')
def nano():
    return load('blip2-nano')


@pytest.fixture(scope='module')
def femur():
    return Image.fromarray(make_phantom('Femur', (7, 1, 0)).image).convert('RGB')


@pytest.fixture
def door():
    "Opens doors, and closes them after the test"
    made = []

    def open_door(*a, **kw):
        made.append(Door(*a, **kw))
        return made[-1]

    yield open_door
    for d in made:
        d.close()


def service(door, out, sdk='openai', backoff=0.01, checkpoint='served', table=None, **settings):
    "A remote model behind `door`, writing below `out`"
    row = replace(
        model_spec(sdk),
        name=f'our-{sdk}',
        checkpoint=checkpoint,
        prompt='{question}',
        service={**model_spec(sdk).service, 'url': door.url + URL[sdk], **(table or {})},
    )
    given = dict(
        remote=True, remote_text=True, remote_rate=60_000, remote_timeout=1, remote_retries=8, output=str(out)
    )
    return Remote(row, load_settings(out, **{**given, **settings}), backoff)


PRICE = dict(input=2.5, output=10.0, currency='USD')


def as_llava(door, out, sdk='openai', **kw):
    "A paid remote model with the prompt of a local LLaVA"
    vlm = service(door, out, sdk, **{**dict(remote_timeout=20, table=dict(price=PRICE)), **kw})
    vlm.spec = replace(vlm.spec, prompt=model_spec('llava-1.5-7b').prompt)
    return vlm


@pytest.mark.parametrize('name', ['openai', 'anthropic', 'ensemble'])
def test_answer(name, nano, femur, door, tmp_path):
    """Answers are those of the model behind the door, in the order asked, with what they took and a complete
    identity"""
    d = door(of_model(nano))
    images = [femur, Image.fromarray(make_phantom('Abdomen', (7, 1, 0)).image)]
    sdk = 'anthropic' if name == 'anthropic' else 'openai'
    vlm = service(d, tmp_path, sdk, table=dict(price=PRICE))
    if name == 'ensemble':
        from fada.ensemble import Ensemble

        vlm = Ensemble(model_spec('ensemble'), dict(here=nano, there=vlm), votes=dict(here=1, there=1))
    asked = [1, 'plane', 'How is the image quality?', 1]
    requests = [*(Request(im, asked, k) for k, im in enumerate(images)), Request(None, [6], 2)]
    a, b = list(vlm.answer(requests)), list(nano.answer(requests))
    about = lambda said: [(x.id, x.question_id, x.error, x.pixels_sha256) for x in said]
    assert about(a) == about(b) and not any(x.error for x in a)
    same = [(x.text, y.text) for x, y in zip(a, b) if x.question_id]
    assert all(x == y for x, y in same), same
    if name == 'ensemble':
        assert all({p['model'] for p in x.more['parts']} == {'here', 'there'} for x in a)
    else:
        new = [x for k, x in enumerate(a) if k not in (3, 7)]  # question 1 again costs nothing
        assert all(x.more['tokens_in'] > 0 and x.more['cost'] > 0 for x in new)
        # one question asked twice is sent once; two for the proof of vision
        assert len(d.answered) == len(set(d.answered)) == 7 + 2
        identity = vlm.identity()
        assert identity['service'] == dict(
            sdk=sdk, model='served', host=f'this machine:{d.server.server_port}{URL[sdk]}'
        )
    assert vlm.identity() == vlm.identity() and vlm.paid and vlm.identity()['model']


def test_what_is_asked_once_is_counted_once(door, tmp_path):
    "Sixteen equal questions in one go are one request, and the answers' tokens are the journal's less the probes"
    d = door(lambda body: reply('femur', 60 if picture(body) else 10))
    vlm = service(d, tmp_path, table=dict(price=PRICE))
    a = list(vlm.answer([Request(None, ['Is it?'], k) for k in range(16)]))
    assert len(d.log) == 1
    assert [x.text for x in a] == ['femur'] * 16
    a += vlm.ask(Image.fromarray(make_phantom('Femur', (7, 1, 0)).image), [1, 1, 2])
    probes = [r for r in vlm.journal.answers.values() if r['question'] == PROBE]
    assert len(probes) == 2
    took = vlm.journal.took - np.sum([p['tokens'] for p in probes], 0)
    assert [sum(x.more[k] for x in a) for k in ('tokens_in', 'tokens_out')] == took.tolist() == [130, 15]
    assert sum(x.more['tries'] for x in a) == len(d.log) - 2 == 3
    assert sum(x.more['cost'] for x in a) == pytest.approx(
        vlm.meter.worth(took) if vlm.meter.unit == 'USD' else (130 * 2.5 + 15 * 10) / 1e6
    )


def test_half_a_surrogate_pair_is_kept(door, tmp_path):
    "A reply that no file can hold as it is: written, read again, and not paid for twice"
    from fada.evaluate import AnswersLog

    d = door(lambda body: reply('femur \ud83d', 20))
    a = service(d, tmp_path).ask(None, 'plane')
    assert (a.text, a.error) == ('femur \ufffd', '') and service(d, tmp_path).ask(None, 'plane').text == a.text
    assert len(d.log) == 1
    log = AnswersLog(tmp_path / 'a.jsonl')
    log.append([dict(text='\ud83d')])
    assert log.read() == ([dict(text='\ud83d')], 0)


@pytest.mark.parametrize('sdk', ['openai', 'anthropic'])
def test_a_redirection_is_not_followed(sdk, nano, femur, door, tmp_path):
    "Nothing reaches the other origin; the one error names it"
    other = door(of_model(nano))
    to = dict(Location=other.url + '/v1/chat/completions?key=1')
    d = door(of_model(nano), special=lambda *_: (307, b'', to))
    with pytest.raises(FadaError, match=f'sends on to {other.url[7:]}') as e:
        service(d, tmp_path, sdk, table=dict(check_vision=False), remote_parallel=1).ask(femur)
    assert other.bodies == [] and len(d.log) == 1 and 'key=1' not in str(e.value)


@pytest.mark.parametrize('sdk', ['openai', 'anthropic'])
def test_no_header_of_the_environment_goes_along(sdk, nano, door, tmp_path, monkeypatch):
    "What the SDKs read from the environment besides their address never reaches a row's host"
    for name in ('OPENAI_ORG_ID', 'OPENAI_PROJECT_ID', 'OPENAI_ADMIN_KEY', 'ANTHROPIC_AUTH_TOKEN'):
        monkeypatch.setenv(name, KEY)
    d = door(of_model(nano))
    assert service(d, tmp_path, sdk, table=dict(key='')).ask(None, 'plane').text
    assert d.headers and KEY not in json.dumps(d.headers)
    name = f'{sdk.upper()}_CUSTOM_HEADERS'
    monkeypatch.setenv(name, f'X-Token: {KEY}')
    with pytest.raises(FadaError, match=name) as e:
        service(d, tmp_path, sdk)
    assert KEY not in str(e.value)


@pytest.mark.parametrize('slow', [dict(backoff=30.0), dict(remote_rate=2)])
def test_who_stops_listening_waits_for_nothing(slow, nano, femur, door, tmp_path):
    "A loop that is left ends the waiting of every thread, before a further try and before its turn"
    special = None if 'remote_rate' in slow else lambda body, *_: None if 'plane' in words(body) else (500, b'{}')
    d = door(of_model(nano), special=special)
    vlm = service(d, tmp_path, table=dict(check_vision=False), **slow)
    said = vlm.answer([Request(femur, ['plane', 1, 2, 3, 4, 5, 6])])
    assert next(said).text
    start = time.monotonic()
    said.close()
    assert time.monotonic() - start < 3
    n = len(d.log)
    time.sleep(0.3)
    assert len(d.log) == n and vlm.meter.under_way.tolist() == [0, 0]


def test_why_there_is_no_connection(door, tmp_path):
    "Refused, no such host, no TLS: each in its own words"
    import socket

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        free = s.getsockname()[1]

    class Front:
        url = f'http://127.0.0.1:{free}'

    quick = dict(remote_retries=1, remote_parallel=1, table=dict(check_vision=False))
    with pytest.raises(FadaError, match='nothing listens there.*start the server'):
        service(Front, tmp_path, **quick).ask(None, 'plane')
    Front.url = 'http://no-such-host-of-ours'
    with pytest.raises(FadaError, match=r'no connection \(.*(resolution|known|Name)'):
        service(Front, tmp_path / 'b', **quick).ask(None, 'plane')
    Front.url = door(lambda body: reply('x')).url.replace('http:', 'https:')
    with pytest.raises(FadaError, match=r'no connection \(.*SSL'):
        service(Front, tmp_path / 'c', **quick).ask(None, 'plane')


def test_two_servers_are_two(door, tmp_path):
    "Two local servers with one model name: the second is asked, not answered from the first one's journal"
    assert [
        house(u)
        for u in (
            'http://gpu-box:1/v1',
            'http://gpu-box:2/v1/',
            'https://a.org/v1',
            'http://localhost:1',
            'http://127.0.0.1:1',
        )
    ] == ['gpu-box:1/v1', 'gpu-box:2/v1', 'a.org:443/v1', 'this machine:1', 'this machine:1']
    one, two = door(lambda body: reply('femur')), door(lambda body: reply('thorax'))
    assert [service(d, tmp_path).ask(None, 'plane').text for d in (one, two, one)] == ['femur', 'thorax', 'femur']
    assert len(one.log) == len(two.log) == 1


@pytest.mark.parametrize(
    'host',
    [
        '134744072',
        '0x8080808',
        '0x8.8.8.8',
        '010.8.8.8',
        '8.8.2056',
        '8.8.8.8.',
        '\uff11\uff13\uff14',
        '127.1',
        '0x7f.1',
    ],
)
def test_an_address_in_disguise_is_refused(host, monkeypatch):
    "Decimal, hexadecimal, octal, shortened: what a resolver would make of it is not asked"
    monkeypatch.setattr(remote, 'addresses', lambda host: ['10.0.0.1'])
    for scheme in ('http', 'https'):
        with pytest.raises(FadaError, match='an address in disguise|no address'):
            host_kind(f'{scheme}://{host}/v1')


def test_a_name_is_private_only_where_all_its_addresses_are(door, tmp_path, monkeypatch):
    "At the time of use: a name that moves out of the house after the model was opened gets nothing more"
    at = {
        'gpu-box': ['10.0.0.7'],
        'gpu.lan': ['192.168.1.2', 'fe80::1%eth0'],
        'both': ['10.0.0.7', '8.8.8.8'],
        'out': ['8.8.8.8'],
        'mapped': ['::ffff:8.8.8.8'],
    }
    monkeypatch.setattr(remote, 'addresses', lambda host: at[host])
    assert [host_kind(f'http://{h}/v1') for h in ('gpu-box', 'gpu.lan', '[::1]', '10.1.2.3')] == [
        NEAR[1],
        NEAR[1],
        NEAR[0],
        NEAR[1],
    ]
    for h in ('both', 'out', 'mapped', '8.8.8.8', '[::ffff:8.8.8.8]'):
        with pytest.raises(FadaError, match='unencrypted'):
            host_kind(f'http://{h}/v1')
    d = door(lambda body: reply('femur'))
    at['here'] = ['127.0.0.1']
    front = type('Front', (), dict(url=f'http://here:{d.server.server_port}'))
    vlm = service(front, tmp_path)
    at['here'] = ['8.8.8.8']
    with pytest.raises(FadaError, match='unencrypted'):
        vlm.ask(None, 'plane')
    assert d.log == []


ASKS = """import sys; sys.path.insert(0, sys.argv[1])
from test_remote import service
from fada.vlm import Request
from pathlib import Path
front = type('Front', (), dict(url=sys.argv[2])); v = service(front, Path(sys.argv[3]), remote_budget=sys.argv[4], remote_timeout=20)
print('ready', flush=True); sys.stdin.readline()
a = list(v.answer([Request(None, [f'Question {k}?' for k in range(24)])]))
print(sum(not x.error for x in a), sum(x.stage == 'budget' for x in a), sum(sum((x.more['tokens_in'], x.more['tokens_out'])) for x in a if not x.error))
"""


def asker(d, out, budget):
    "A process that is ready to ask 24 questions"
    import subprocess

    return subprocess.Popen(
        [sys.executable, '-c', ASKS, str(Path(__file__).parent), d.url, str(out), budget],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def two_processes(d, out, budget):
    "What two processes say that ask the same at once"
    ps = [asker(d, out, budget) for _ in range(2)]
    for p in ps:
        assert p.stdout.readline() == 'ready\n'
    for p in ps:
        p.stdin.write('\n')
        p.stdin.flush()
    return [tuple(map(int, p.communicate(timeout=60)[0].split())) for p in ps]


def test_two_processes_ask_nothing_twice(door, tmp_path):
    """The same 24 questions at once, each answered slowly: 24 are asked, both have all answers, one of them paid
    for each"""

    def slow(body):
        time.sleep(0.05)
        return reply('femur', 60, 5)

    d = door(slow)
    said = two_processes(d, tmp_path, '100000 tokens')
    assert [n for n, *_ in said] == [24, 24] and len(d.log) == len(set(d.answered)) == 24
    assert sum(t for *_, t in said) == 24 * 65


def test_two_processes_keep_one_budget(door, tmp_path):
    "Room for a few questions: what both took together is within it, and nothing is left set aside"

    def slow(body):
        time.sleep(0.05)
        return reply('femur', 60, 5)

    d = door(slow)
    said = two_processes(d, tmp_path, '700 tokens')
    took = 65 * len(d.answered)
    assert 4 * 65 <= took <= 700 and len(d.log) == len(set(d.answered)) and sum(b for _, b, _ in said) > 0
    j = next(Journal(p) for p in tmp_path.rglob('our-openai.jsonl'))
    assert j.took.sum() == took and j.held().tolist() == [0, 0]


def test_the_lock_holds_over_processes(door, tmp_path):
    "While one looks and sets aside, another process sends nothing"
    d = door(lambda body: reply('femur', 60, 5))
    vlm = service(d, tmp_path)
    p = asker(d, tmp_path, '100000 tokens')
    assert p.stdout.readline() == 'ready\n'
    with vlm.journal.locked():
        p.stdin.write('\n')
        p.stdin.flush()
        time.sleep(1)
        assert d.log == []
    assert p.communicate(timeout=60)[0].startswith('24 ') and len(d.log) == 24


def test_who_was_killed_while_asking(door, tmp_path):
    "Its reservation holds no question back, and stays counted: it may have been paid for"
    d = door(lambda body: reply('femur', 60, 5))
    vlm = service(d, tmp_path)
    j = vlm.job('plane', 'plane', None, '', (0, 0))
    vlm.meter.reserve(j, 40, 'mine')
    import threading

    halt = threading.Event()
    threading.Timer(0.3, halt.set).start()
    assert vlm.ask_once(j, halt)['error'] == 'stopped' and d.log == []  # we live: it waits
    old = vlm.journal.open['mine']
    vlm.journal.add(dict(old, holder=[old['holder'][0], old['holder'][1], '1']))
    assert vlm.ask_once(j, threading.Event())['text'] == 'femur' and vlm.meter.under_way.tolist() == old['reserved']


@pytest.mark.parametrize('error', [RuntimeError(f'boom {KEY}'), OSError('disk'), UnicodeError('half a pair')])
def test_what_no_sdk_foresaw_is_one_record(error, door, tmp_path, monkeypatch):
    """Not a traceback: an error with the question, counted as paid for, nothing left set aside, and asked again
    later"""
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    d = door(lambda body: reply('femur'))
    vlm = service(d, tmp_path)
    create = vlm._create

    def breaks(**body):
        raise error

    vlm._create = breaks
    a = vlm.ask(None, ['plane', 2])
    assert all(type(error).__name__ in x.error and KEY not in x.error and x.more['guessed'] > 0 for x in a)
    assert vlm.meter.under_way.tolist() == [0, 0] and vlm.journal.took.sum() == sum(x.more['guessed'] for x in a)
    lines = [json.loads(r) for r in vlm.journal.path.read_text().splitlines()]
    assert sum('reserved' not in r for r in lines) == 2
    vlm._create = create
    assert [x.text for x in vlm.ask(None, ['plane', 2])] == ['femur'] * 2


def test_ctrl_c_leaves_nothing_open(door, tmp_path):
    "Else the question would wait for itself when it is asked again"
    import threading

    vlm = service(door(lambda body: reply('femur')), tmp_path)
    create = vlm._create

    def breaks(**body):
        raise KeyboardInterrupt

    vlm._create = breaks
    j = vlm.job('plane', 'plane', None, '', (0, 0))
    with pytest.raises(KeyboardInterrupt):
        vlm.ask_once(j, threading.Event())
    assert vlm.meter.under_way.tolist() == [0, 0]
    vlm._create = create
    assert vlm.ask_once(j, threading.Event())['text'] == 'femur'


def test_gate_refuses_before_anything_leaves(nano, door, tmp_path, monkeypatch):
    d = door(of_model(nano))
    with pytest.raises(FadaError, match=r'\[remote\] allowed'):
        service(d, tmp_path, remote=False)
    (tmp_path / 'models.toml').write_text(f'[ours]\nlike = "openai"\n[ours.service]\nurl = "{d.url}/v1"\n')
    (tmp_path / 'settings.ini').write_text('[model]\nname = ours\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FadaError, match=r'\[remote\] allowed'):
        load()
    assert d.log == [] and not (tmp_path / 'outputs').exists()


def chunks(png):
    "Names of a PNG's chunks"
    out, at = [], 8
    while at < len(png):
        out.append(png[at + 4 : at + 8].decode())
        at += 12 + int.from_bytes(png[at : at + 4])
    return out


@pytest.mark.parametrize('suffix', ['png', 'jpg'])
def test_pixels_leave_and_nothing_else(suffix, nano, femur, door, tmp_path):
    """A file with a name in its tags and in its picture: neither leaves; with keep_text the picture does, the tags
    do not"""
    from PIL.PngImagePlugin import PngInfo
    from fada.images import read_image

    wide = Image.new('RGB', (femur.width + 120, femur.height))
    wide.paste(femur, (120, 0))
    ImageDraw.Draw(wide).text((4, 4), 'DOE^JANE 1990', fill='white')
    tags = PngInfo()
    tags.add_text('PatientName', 'Doe Jane')
    exif = Image.Exif()
    exif[0x010E] = 'Doe Jane'
    path = tmp_path / f'x.{suffix}'
    more = dict(pnginfo=tags) if suffix == 'png' else dict(quality=95)
    wide.save(path, exif=exif, icc_profile=b'Doe Jane' * 20, **more)
    assert b'Doe Jane' in path.read_bytes()
    for keep in (False, True):
        d = door(of_model(nano))
        vlm = service(d, tmp_path / str(keep), remote_text=keep)
        assert not vlm.ask(read_image(path), 'plane').error
        sent = picture(d.bodies[-1])
        im = np.asarray(Image.open(io.BytesIO(sent)))
        assert set(chunks(sent)) == {'IHDR', 'IDAT', 'IEND'} and b'Doe Jane' not in sent
        assert (im[:20, :110].max() > 200) == keep and im[:, 120:].max() > 100
        assert vlm.identity()['image']['text'] == ('kept' if keep else 'blanked')


def test_no_sector_no_image(nano, door, tmp_path):
    "Where writing cannot be told from picture nothing leaves; the answer is a record that says what to do"
    d = door(of_model(nano))
    page = Image.new('RGB', (300, 200))
    ImageDraw.Draw(page).text((20, 20), 'DOE^JANE', fill='white')
    a = service(d, tmp_path, remote_text=False).ask(page, [1, 2])
    assert all('no ultrasound sector' in x.error and '[remote] keep_text' in x.error for x in a)
    assert {x.stage for x in a} == {'read'} and d.log == []


def test_large_images_are_shrunk_where_the_row_says_so(nano, femur, door, tmp_path):
    d = door(of_model(nano))
    service(d, tmp_path, table=dict(max_side=100)).ask(femur.resize((900, 450)), 'plane')
    assert Image.open(io.BytesIO(picture(d.bodies[-1]))).size == (100, 50)


@pytest.mark.parametrize('sdk', ['openai', 'anthropic'])
@pytest.mark.parametrize('kind', FAULTS)
def test_a_fault_that_passes(kind, sdk, nano, femur, door, tmp_path):
    "Each fault on the first try: the second brings the answer, and a reply that was lost is counted as if paid for"
    d = door(of_model(nano), faults=1.0, kinds=(kind,), first=1, late=1.2)
    vlm = service(d, tmp_path, sdk, table=dict(check_vision=False))
    a = vlm.ask(femur, 'plane')
    assert (a.text, a.error, a.more['tries']) == (nano.ask(femur, 'plane').text, '', 2)
    assert [how for _, how in d.log] == [kind, 'ok'] and vlm.meter.under_way.tolist() == [0, 0]
    assert (a.more['guessed'] > 0) == (kind in ('late', 'dropped', 'malformed'))


@pytest.mark.parametrize(
    'kind,said',
    [
        ('dropped', 'connection broke'),
        ('429', 'answered 429'),
        ('500', 'answered 500'),
        ('malformed', 'could not be read'),
        ('empty', 'an empty answer'),
    ],
)
def test_a_fault_that_stays(kind, said, nano, femur, door, tmp_path):
    """After the last try the question has an error record; what was answered before and after it stands; later
    it is asked again"""
    d = door(of_model(nano), special=None)
    d.upstream = of_model(nano)
    vlm = service(d, tmp_path, table=dict(check_vision=False), remote_retries=2)
    first = vlm.ask(femur, 'plane')
    d.faults, d.kinds = 1.0, (kind,)
    a = vlm.ask(femur, [1, 'plane', 2])
    assert [x.error == '' for x in a] == [False, True, False] and said in a[0].error
    assert (a[0].stage, a[0].more['tries']) == ('service', 3)
    assert a[1].text == first.text and a[1].more['tries'] == 0
    d.faults = 0.0
    qs = [1, 'plane', 2]
    assert [x.text for x in vlm.ask(femur, qs)] == [x.text for x in nano.ask(femur, qs)]
    assert len(d.answered) == len(set(d.answered)) == 3


@pytest.mark.parametrize('header', ['1', 'date'])
def test_retry_after_is_honoured(header, nano, femur, door, tmp_path):
    "Nothing is sent before the time that the service names; one that asks for an hour is not waited for"
    from email.utils import formatdate

    arrived = []
    after = lambda: header if header == '1' else formatdate(time.time() + 2, usegmt=True)  # whole seconds

    def busy(body, headers, n):
        arrived.append(time.monotonic())
        if len(arrived) == 1:
            return 429, b'{}', {'Retry-After': after()}

    vlm = service(door(of_model(nano), special=busy), tmp_path, table=dict(check_vision=False), remote_parallel=1)
    assert not any(x.error for x in vlm.ask(femur, [1, 2, 3])) and arrived[1] - arrived[0] >= 0.95
    d = door(of_model(nano), special=lambda *_: (429, b'{}', {'Retry-After': '3600'}))
    start = time.monotonic()
    x = service(d, tmp_path / 'b', table=dict(check_vision=False)).ask(femur, 5)
    assert 'asks to wait 3,600 s' in x.error and time.monotonic() - start < 5 and len(d.log) == 1


def test_rate_limit(nano, femur, door, tmp_path):
    "Six questions at 300 a minute over four threads: 0.2 s apart"
    d = door(of_model(nano))
    vlm = service(d, tmp_path, table=dict(check_vision=False), remote_rate=300, remote_parallel=4)
    start = time.monotonic()
    vlm.ask(femur, [1, 2, 3, 4, 5, 6])
    assert 0.95 < time.monotonic() - start < 4


def refuses(status, message, when=lambda body: True):
    "A door's special reply"
    data = json.dumps(dict(error=dict(message=message))).encode()
    return lambda body, headers, n: (status, data) if when(body) else None


@pytest.mark.parametrize('sdk', ['openai', 'anthropic'])
@pytest.mark.parametrize(
    'status,message,said',
    [
        (401, f'Incorrect key {KEY}', 'the key was refused'),
        (404, 'no model served', 'no such address or model'),
        (403, 'not yours', 'may not ask this'),
        (429, 'insufficient_quota', 'quota is used up'),
    ],
)
def test_what_concerns_all_questions_is_one_error(
    status, message, said, sdk, nano, femur, door, tmp_path, monkeypatch
):
    "A wrong key, a wrong model: one sentence without the key, and nothing more is sent"
    monkeypatch.setenv(f'{sdk.upper()}_API_KEY', KEY)
    d = door(of_model(nano), special=refuses(status, message))
    vlm = service(d, tmp_path, sdk, remote_parallel=1)
    with pytest.raises(FadaError, match=said) as e:
        vlm.ask(femur)
    assert len(d.log) == 1 and KEY not in str(e.value) and 'our-' + sdk in str(e.value)
    assert KEY in json.dumps(d.headers)  # it went where it belongs


def test_the_key_of_one_house_is_not_shown_to_another(nano, femur, door, tmp_path, monkeypatch):
    "A row like openai with a url of its own is not given OpenAI's key"
    d = door(of_model(nano))
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'settings.ini').write_text('[remote]\nallowed = yes\nkeep_text = yes\nrequests_per_minute = 6000\n')
    (tmp_path / 'models.toml').write_text(
        f'[ours]\nlike = "openai"\n[ours.service]\nurl = "{d.url}/v1"\n'
        '[far]\nlike = "openai"\nservice = {url = "https://example.org/v1"}\n'
    )
    assert load('ours').ask(femur, 'plane').text and d.headers and KEY not in json.dumps(d.headers)
    with pytest.raises(FadaError, match='the service table of example.org'):
        load('far')
    assert model_spec('ours').service['sampling'] == dict(temperature=0, seed=0)


def test_no_key(tmp_path, monkeypatch):
    "A public service without a key is refused before anything else; the variable is named"
    for sdk in ('openai', 'anthropic'):
        monkeypatch.delenv(f'{sdk.upper()}_API_KEY', raising=False)
        with pytest.raises(FadaError, match=f'no key in the environment variable {sdk.upper()}_API_KEY'):
            Remote(model_spec(sdk), load_settings(tmp_path, remote=True, output=str(tmp_path)))


@pytest.mark.parametrize(
    'table,said',
    [
        (dict(key=KEY), 'no name of an environment variable'),
        (dict(url='http://api.openai.com/v1'), 'unencrypted'),
        (dict(url=f'https://me:{KEY}@example.org/v1'), 'a user, a password'),
        (dict(sdk='opneai'), 'did you mean openai'),
        (dict(ulr='x'), 'did you mean url'),
        (dict(price=dict(input=1.0)), 'of a million tokens'),
        (dict(sampling=3), 'a value of type dict'),
        (dict(limit='tokens'), 'max_tokens'),
    ],
)
def test_a_row_that_cannot_be_used(table, said, tmp_path):
    spec = model_spec('openai')
    s = load_settings(tmp_path, remote=True, output=str(tmp_path))
    row = replace(spec, service={**spec.service, 'url': 'http://127.0.0.1:9/v1', **table})
    with pytest.raises(FadaError, match=said) as e:
        Remote(row, s)
    assert KEY not in str(e.value)


def test_a_model_without_vision(nano, femur, door, tmp_path):
    """A server that drops the image and answers all the same is found out before the first image leaves; so is
    one that refuses it"""
    d = door(lambda body: reply('femur', 20))
    vlm = service(d, tmp_path)
    with pytest.raises(FadaError, match='answers without the image'):
        vlm.ask(femur, 'plane')
    assert all((picture(b) is None) or Image.open(io.BytesIO(picture(b))).size == (64, 64) for b in d.bodies)
    d = door(of_model(nano), special=refuses(400, 'image input is not supported', picture))
    with pytest.raises(FadaError, match='takes no image.*image input is not supported'):
        service(d, tmp_path / 'b').ask(femur, 'plane')
    assert service(d, tmp_path / 'b').ask(None, 'plane').text  # words it takes
    d = door(of_model(nano), special=refuses(400, 'temperature is not supported'))
    with pytest.raises(FadaError, match='temperature is not supported') as e:
        service(d, tmp_path / 't').ask(femur, 1)
    assert 'takes no image' not in str(e.value) and len(d.log) == 2
    trusted = service(door(lambda body: reply('femur', 20)), tmp_path / 'c', table=dict(check_vision=False))
    assert trusted.ask(femur, 'plane').text == 'femur'


def test_an_image_too_large_for_the_service(nano, femur, door, tmp_path):
    "One record; the next image is answered"
    large = lambda body: len(picture(body) or b'') > 120_000
    d = door(of_model(nano), special=refuses(413, 'image exceeds 5 MB', large))
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    a = list(service(d, tmp_path).answer([Request(noise, [1], 0), Request(femur, [1], 1)]))
    assert 'too large for the service' in a[0].error and 'max_side' in a[0].error
    assert a[0].stage == 'rejected' and not a[1].error


@pytest.mark.parametrize('sdk', ['openai', 'anthropic'])
def test_a_refusal_is_recorded_and_not_asked_again(sdk, femur, door, tmp_path):
    "No answer, no retry; paid for, and final"

    def shy(body):
        size = 60 if picture(body) else 10
        return reply('grey', size) if words(body) == PROBE else reply('', size, 7, refusal='I cannot help with that')

    d = door(shy)
    vlm = service(d, tmp_path, sdk)
    a = vlm.ask(femur, 1)
    assert (a.text, a.stage, a.more['tokens_out']) == ('', 'refused', 7) and 'refused: I cannot help' in a.error
    assert service(d, tmp_path, sdk).ask(femur, 1).error == a.error and len(d.log) == 3


def test_a_longest_answer_used_up_by_thought(femur, door, tmp_path):
    "Nothing said, and asking again would not help: the record says what to set"
    out = reply('', 60, 48)
    out['choices'][0]['finish_reason'] = 'length'
    d = door(lambda body: out)
    a = service(d, tmp_path, table=dict(check_vision=False)).ask(femur, 1)
    assert '[generate] max_new_tokens' in a.error and len(d.log) == 1 and a.more['tokens_out'] == 48


def test_budgets(nano, femur, door, tmp_path):
    """Zero asks nothing; money needs a price; a cap holds over threads, objects and faults, and what is answered
    stays answered"""
    d = door(of_model(nano))
    a = service(d, tmp_path, remote_budget='0 tokens').ask(femur)
    assert d.log == [] and {x.stage for x in a} == {'budget'} and '[remote] budget' in a[0].error
    with pytest.raises(FadaError, match='its price is not known'):
        service(d, tmp_path, remote_budget='5 USD')
    with pytest.raises(FadaError, match='its price is in USD'):
        service(d, tmp_path, remote_budget='5 EUR', table=dict(price=PRICE))
    with pytest.raises(FadaError, match='cannot be used'):
        service(d, tmp_path, remote_budget='much')
    images = [Image.fromarray(make_phantom('Abdomen', (k, 1, 0)).image) for k in range(3)]
    for unit, cap in (('tokens', 2000), ('USD', 0.005)):
        for faults, least in (
            (0, 18),
            (0.3, 1),
        ):  # faults take of the budget too: how much hangs on the order of threads
            d = door(of_model(nano), faults=faults, kinds=('dropped', '500', 'malformed', 'empty'), seed=3)
            out = tmp_path / f'{unit} {faults}'
            kept = {}
            for _ in range(3):
                vlm = service(d, out, remote_budget=f'{cap} {unit}', table=dict(price=PRICE))
                a = [(k, x) for k, im in enumerate(images) for x in vlm.ask(im)]
                assert vlm.meter.worth(vlm.journal.took) <= cap
                said = {(k, x.question): x.text for k, x in a if not x.error}
                assert kept.items() <= said.items()
                kept = said
            stages = {x.stage for _, x in a if x.error}
            assert len(kept) >= least
            assert stages == {'budget'} if faults else stages <= {'budget'}
            assert len(d.answered) == len(set(d.answered))


def test_two_jobs_share_one_journal(nano, femur, door, tmp_path):
    "What one job answered another does not ask; the budget counts both"
    d = door(of_model(nano))
    one, two = service(d, tmp_path), service(d, tmp_path)
    one.ask(femur, [1, 2])
    n = len(d.log)
    assert [x.more['tries'] for x in two.ask(femur, [1, 2])] == [0, 0] and len(d.log) == n
    assert two.journal.took.tolist() == one.journal.took.tolist() and two.ask(femur, 3).more['tries'] == 1
